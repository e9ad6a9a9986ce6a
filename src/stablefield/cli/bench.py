"""`stablefield bench`: what the target costs on this machine, beside the least that it could."""

import dataclasses
import json
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import stablefield
from stablefield.cli.console import console, relative
from stablefield.cli.places import check_place
from stablefield.cli.sources import open_data
from stablefield.cli.train import pick_device
from stablefield.evaluation.cost import Cost, StepShare, measure_cost, measure_step
from stablefield.report import Line, LineChart, write_chart
from stablefield.report.extra import require
from stablefield.targets.band import NoiseBand, pick_noise_band
from stablefield.targets.pool import Pool

__all__ = ["Bench"]

# Above any image's own scale: every reference has weight, and nothing can be skipped.
_LEVEL = 100.0
# The growth curves, about the middle of the table.
_ROWS, _SIZES, _SIDES = (16, 64, 256, 1024), (256, 1024, 4096, 16384), (8, 16, 32, 64)


@dataclass(frozen=True)
class Bench:
    """Measure time and memory of the target, its share of a training step, and how the cost grows."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA", help_behavior_hint="")] = ""
    """Images to take references from, as for train; random pixels if not given."""
    device: str = ""
    """Where to compute, such as cpu or cuda; a GPU if there is one."""
    batch: tuple[int, ...] = (64, 512)
    """Batch sizes of the table."""
    references: tuple[int, ...] = (1024, 4096, 50_000)
    """Numbers of references of the table; at most those of DATA."""
    pairs: int = 3
    """How often the target and what it is compared with are timed in turn."""
    step: bool = True
    """Also time a training step of a network of 4.7 M parameters, batch 64."""
    growth: bool = True
    """Also measure how the cost grows with the references, the batch and the size of a sample."""
    out: Path | None = None
    """Folder for bench.json and the plot bench.png, which replace earlier ones there; nothing is written if not given."""

    def run(self) -> int:
        """Measure, print a table, and write the files if asked to."""
        if self.pairs < 1:
            raise ValueError(f"--pairs is {self.pairs}: at least one pair must be timed.")
        for flag, sizes in (("--batch", self.batch), ("--references", self.references)):
            if not sizes or min(sizes) < 1:
                raise ValueError(f"{flag} is {' '.join(map(str, sizes)) or 'empty'}: name numbers of at least 1.")
        if self.out is not None:
            require("matplotlib", "--out, which draws a plot,")
            check_place("--out", self.out, folder=True)
        device = pick_device(self.device)
        images = self._images().to(device)
        sizes = sorted({min(n, len(images)) for n in self.references})
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("measuring", total=len(sizes) * len(self.batch) + 12 * self.growth + self.step)
            costs: list[Cost] = []
            for n in sizes:
                for batch in self.batch:
                    costs.append(measure_cost(images[:n], batch, level=_LEVEL, pairs=self.pairs))
                    bar.advance(task)
            console.print(_cost_table(costs))
            growth: dict[str, list[Cost]] = {}
            if self.growth:
                growth = self._growth(device, lambda: bar.advance(task))
                console.print(_growth_table(growth))
            share = None
            band = pick_noise_band(Pool(images))
            if self.step:
                share = measure_step(images, noise_band=band.level, pairs=self.pairs)
                console.print(_share_text(share, band))
        if self.out is not None:
            self._write(self.out, device, costs, growth, share, band)
        return 0

    def _images(self) -> Tensor:
        if self.data:
            return torch.tensor(open_data(self.data).images)
        generator = torch.Generator().manual_seed(0)
        n = max(self.references)
        return torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)

    def _growth(self, device: torch.device, advance: Any) -> dict[str, list[Cost]]:
        generator = torch.Generator().manual_seed(0)

        def cost(n: int, batch: int, side: int) -> Cost:
            images = torch.randint(0, 256, (n, 3, side, side), generator=generator, dtype=torch.uint8).to(device)
            found = measure_cost(images, batch, level=_LEVEL, pairs=self.pairs, naive_bytes=0)
            advance()
            return found

        return {
            "references": [cost(n, 64, 32) for n in _SIZES],
            "batch": [cost(4096, batch, 32) for batch in _ROWS],
            "dim": [cost(4096, 64, side) for side in _SIDES],
        }

    def _write(
        self,
        out: Path,
        device: torch.device,
        costs: list[Cost],
        growth: dict[str, list[Cost]],
        share: StepShare | None,
        band: NoiseBand,
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        record = {
            "stablefield": stablefield.__version__,
            "torch": torch.__version__,
            "machine": _machine(device),
            "date": datetime.now(UTC).date().isoformat(),
            "data": self.data or "random pixels",
            "pairs": self.pairs,
            "costs": [dataclasses.asdict(cost) for cost in costs],
            "growth": {name: [dataclasses.asdict(cost) for cost in found] for name, found in growth.items()},
            "step": None if share is None else dataclasses.asdict(share),
            "noise_band": dataclasses.asdict(band),
        }
        (out / "bench.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        _plot(out / "bench.png", costs, growth)
        console.print(f"written: {relative(out / 'bench.json')}, {relative(out / 'bench.png')}", markup=False)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def _cost_table(costs: list[Cost]) -> Table:
    table = Table(title="one call, all rows above the noise band", title_justify="left", box=None, pad_edge=False)
    for name in ("B", "n", "d", "target", "products", "ratio", "memory", "naive", "its memory"):
        table.add_column(name, justify="right")
    for cost in costs:
        table.add_row(
            f"{cost.batch:,}",
            f"{cost.references:,}",
            f"{cost.dim:,}",
            _seconds(cost.seconds),
            _seconds(cost.products),
            f"{cost.ratio:.2f}",
            _bytes(cost.peak),
            "too large" if cost.naive is None else _seconds(cost.naive),
            _bytes(cost.naive_peak),
        )
    return table


def _growth_table(growth: dict[str, list[Cost]]) -> Table:
    table = Table(title="how it grows", title_justify="left", box=None, pad_edge=False)
    for name in ("B", "n", "d", "target", "products", "ratio", "memory"):
        table.add_column(name, justify="right")
    for found in growth.values():
        for cost in found:
            table.add_row(
                f"{cost.batch:,}",
                f"{cost.references:,}",
                f"{cost.dim:,}",
                _seconds(cost.seconds),
                _seconds(cost.products),
                f"{cost.ratio:.2f}",
                _bytes(cost.peak),
            )
        table.add_section()
    return table


def _share_text(share: StepShare, band: NoiseBand) -> str:
    return (
        f"a training step of {share.parameters / 1e6:.1f} M parameters, batch {share.batch}\n"
        f"{_seconds(share.stable)} with {share.references:,} references above noise level {band.level:.3g}, "
        f"{_seconds(share.single)} with none: {share.ratio - 1:+.1%}"
    )


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _bytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.0f} MB"


def _plot(path: Path, costs: list[Cost], growth: dict[str, list[Cost]]) -> None:
    labels = {"references": "references n", "batch": "batch B", "dim": "numbers per sample d"}
    fixed = {"references": "batch", "batch": "references", "dim": "references"}
    shown: dict[str, list[Cost]] = growth or {"references": [c for c in costs if c.batch == costs[0].batch]}
    times = [1e3 * value for found in shown.values() for cost in found for value in (cost.seconds, cost.products)]
    charts = [
        LineChart(
            title=f"{labels[fixed[name]]} = {getattr(found[0], fixed[name]):,}",
            lines=tuple(
                Line(label=label, x=[getattr(c, name) for c in found], y=[1e3 * getattr(c, time) for c in found])
                for label, time in (("target", "seconds"), ("two bare matrix products", "products"))
            ),
            x_label=labels[name],
            y_label="milliseconds per call",
            log_x=True,
            log_y=True,
            y_min=0.8 * min(times),
            y_max=1.25 * max(times),
        )
        for name, found in shown.items()
    ]
    write_chart(charts, path)
