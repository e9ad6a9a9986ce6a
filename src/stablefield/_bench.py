"""A benchmark of the target on this machine: `benchmark` measures costs, as `_cost` defines them, and their growth."""

import dataclasses
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import stablefield
from stablefield._cost import Cost, StepShare, measure_cost, measure_step, measure_transformer
from stablefield._progress import Progress
from stablefield._shapes import found_device, whole_number
from stablefield.data._image_set import ImageSet
from stablefield.report._cells import text_table
from stablefield.report._chart import Line, LineChart
from stablefield.report._page import Figure, Page, Table
from stablefield.report._result import Result
from stablefield.targets._band import NoiseBand, pick_noise_band
from stablefield.targets._pool import Pool

__all__ = ["Benchmark", "benchmark"]

# Above any image's own scale: every reference has weight, so the target can skip nothing.
_LEVEL = 100.0
# The growth curves, about the middle of the table.
_ROWS, _SIZES, _SIDES = (16, 64, 256, 1024), (256, 1024, 4096, 16384), (8, 16, 32, 64)
_SIZE = ("B", "n", "d")


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Benchmark(Result):
    """The cost of the target on this machine.

    Attributes:
        data: name of the references.
        machine: the GPU, or the processor with its threads.
        pairs: number of timings of the target and its baseline, in turn.
        costs: costs of one call, for each batch size and number of references.
        growth: costs along the "references", the "batch" and the "dim"; empty if not measured.
        step: cost of a training step; None if not measured.
        noise_band: noise band of the references.
        transformer: cost of a training step of SiT-B/2 on labelled latents; None if not measured.
    """

    data: str
    machine: str
    pairs: int
    costs: tuple[Cost, ...]
    growth: Mapping[str, tuple[Cost, ...]]
    step: StepShare | None
    noise_band: NoiseBand
    transformer: StepShare | None = None

    def cost_table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The costs of one call, all rows above the noise band: head and rows."""
        rows: list[tuple[str, ...]] = [
            (
                *_cells(cost),
                "too large" if cost.naive is None else _seconds(cost.naive),
                _bytes(cost.naive_peak),
            )
            for cost in self.costs
        ]
        return (*_SIZE, "target", "products", "ratio", "memory", "naive", "its memory"), rows

    def growth_table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """How the cost grows: head and rows."""
        return (*_SIZE, "target", "products", "ratio", "memory"), [
            _cells(cost) for found in self.growth.values() for cost in found
        ]

    @property
    def step_text(self) -> str:
        """The share of the target in a training step, in two lines; empty if it was not measured."""
        step = self.step
        if step is None:
            return ""
        return (
            f"a training step of {step.parameters / 1e6:.1f} M parameters, batch {step.batch}\n"
            f"{_seconds(step.stable)} with {step.references:,} references above noise level "
            f"{self.noise_band.level:.3g}, {_seconds(step.single)} with none: {step.ratio - 1:+.1%}"
        )

    @property
    def transformer_text(self) -> str:
        """The share of the target in a step of SiT-B/2, in two lines; empty if it was not measured."""
        step = self.transformer
        if step is None:
            return ""
        return (
            f"a training step of SiT-B/2 ({step.parameters / 1e6:.0f} M parameters) on latents, batch {step.batch}\n"
            f"{_seconds(step.single)}; the target, {step.references:,} references for each label, all rows: "
            f"{step.ratio - 1:+.1%}"
        )

    def __str__(self) -> str:
        parts = ["one call, all rows above the noise band", text_table(*self.cost_table())]
        if self.growth:
            parts += ["how it grows", text_table(*self.growth_table())]
        return "\n".join([*parts, *filter(None, [self.step_text, self.transformer_text])])

    def to_dict(self) -> dict[str, Any]:
        """All numbers with the machine and the date, as JSON values."""
        return {
            "stablefield": stablefield.__version__,
            "torch": torch.__version__,
            "machine": self.machine,
            "date": datetime.now(UTC).date().isoformat(),
            "data": self.data,
            "pairs": self.pairs,
            "costs": [dataclasses.asdict(cost) for cost in self.costs],
            "growth": {name: [dataclasses.asdict(cost) for cost in found] for name, found in self.growth.items()},
            "step": None if self.step is None else _step_record(self.step),
            "transformer": None if self.transformer is None else _step_record(self.transformer),
            "noise_band": self.noise_band.record(),
        }

    def charts(self) -> Mapping[str, LineChart]:
        """The time of a call along the references, the batch and the size of a sample; without growth, that of the table."""
        labels = {"references": "references n", "batch": "batch B", "dim": "numbers per sample d"}
        fixed = {"references": "batch", "batch": "references", "dim": "references"}
        first = [cost for cost in self.costs if cost.batch == self.costs[0].batch]
        shown = self.growth or {"references": first}
        times = [1e3 * value for found in shown.values() for cost in found for value in (cost.seconds, cost.products)]
        return {
            name: LineChart(
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
        }

    def page(self) -> Page:
        """The report."""
        figures = [
            Figure(chart, alt=f"Milliseconds per call against {chart.x_label}", title=f"{chart.title}.")
            for chart in self.charts().values()
        ]
        measured = [text.replace("\n", ": ") for text in (self.step_text, self.transformer_text) if text]
        summary = "; ".join(measured) or "one call, all rows above the noise band."
        table = Table(
            columns=(
                *("batch B", "references n", "numbers d", "target, ms", "products, ms", "ratio", "memory, MB"),
                *("naive, ms", "its memory, MB"),
            ),
            rows=tuple(
                (
                    *(cost.batch, cost.references, cost.dim),
                    *(1e3 * cost.seconds, 1e3 * cost.products, cost.ratio, _megabytes(cost.peak)),
                    *(None if cost.naive is None else 1e3 * cost.naive, _megabytes(cost.naive_peak)),
                )
                for cost in self.costs
            ),
            caption="Time and peak memory of one call, all rows above the noise band, beside two bare matrix products and "
            f"beside the naive form with all B x n differences at once (– where too large). References: {self.data}.",
        )
        title = f"What the target costs on {self.machine}"
        return Page(title=title, summary=summary[0].upper() + summary[1:], blocks=(table, *figures))


def benchmark(
    images: ImageSet | Tensor | NDArray[Any] | None = None,
    *,
    batch: Sequence[int] = (64, 512),
    references: Sequence[int] = (1024, 4096, 50_000),
    pairs: int = 3,
    step: bool = True,
    growth: bool = True,
    transformer: bool = False,
    device: torch.device | str | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> Benchmark:
    """Measure time and memory of the target, its share of a training step, and how the cost grows.

    Args:
        images: what to take references from, shape (n, C, H, W), uint8 that means x / 127.5 - 1, or floating point as the
            network sees it, shape (n, ...); random pixels of CIFAR-10's shape if None.
        batch: batch sizes in the table.
        references: numbers of references in the table; at most the number of images.
        pairs: how many times to time the target and its baseline in turn.
        step: also time a training step, batch 64: of a DDPM++ of 4.7 M parameters, or of a perceptron for vectors, signals
            and images with a side that is not a multiple of 4.
        growth: also measure how the cost grows with the references, the batch and the size of a sample.
        transformer: also time a training step of SiT-B/2, 130 M parameters, on random latents with labels, batch 16.
        device: where to compute; a GPU if there is one.
        progress: called after each measurement.

    Raises:
        ValueError: if a number is below 1.
    """
    whole_number("pairs", pairs, 1)
    for name, sizes in (("batch", batch), ("references", references)):
        for k, size in enumerate(sizes):
            whole_number(f"{name}[{k}]", size, 1)
        if not sizes:
            raise ValueError(f"{name} is empty: pass numbers of at least 1.")
    where = found_device(device)
    generator = torch.Generator().manual_seed(0)
    if images is None:
        pixels = torch.randint(0, 256, (max(references), 3, 32, 32), generator=generator, dtype=torch.uint8)
    else:
        pixels = torch.as_tensor(np.array(images.scaled(slice(None))) if isinstance(images, ImageSet) else images)
    pixels = pixels.to(where)
    sizes = sorted({min(n, len(pixels)) for n in references})
    total, done = len(sizes) * len(batch) + 12 * growth + step + transformer, 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(Progress(stage="measuring", done=done, total=total))

    # Before the long measurements: data that have no noise band fail here.
    band = pick_noise_band(Pool(pixels))
    costs: list[Cost] = []
    for n in sizes:
        for rows in batch:
            costs.append(measure_cost(pixels[:n], rows, level=_LEVEL, pairs=pairs))
            advance()
    grown: dict[str, tuple[Cost, ...]] = {}
    if growth:
        for name, found in _growth(where, pairs):
            grown[name] = (*grown.get(name, ()), found)
            advance()
    share = measure_step(pixels, noise_band=band.level, pairs=pairs) if step else None
    if step:
        advance()
    on_latents = measure_transformer(where, pairs=pairs) if transformer else None
    if transformer:
        advance()
    return Benchmark(
        data="random pixels" if images is None else images.name if isinstance(images, ImageSet) else "an array",
        machine=_machine(where),
        pairs=pairs,
        costs=tuple(costs),
        growth=grown,
        step=share,
        noise_band=band,
        transformer=on_latents,
    )


def _growth(device: torch.device, pairs: int) -> Iterator[tuple[str, Cost]]:
    generator = torch.Generator().manual_seed(0)
    places = [
        *(("references", n, 64, 32) for n in _SIZES),
        *(("batch", 4096, rows, 32) for rows in _ROWS),
        *(("dim", 4096, 64, side) for side in _SIDES),
    ]
    for name, n, rows, side in places:
        images = torch.randint(0, 256, (n, 3, side, side), generator=generator, dtype=torch.uint8).to(device)
        yield name, measure_cost(images, rows, level=_LEVEL, pairs=pairs, naive_bytes=0)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def _step_record(step: StepShare) -> dict[str, Any]:
    return dataclasses.asdict(step) | {"noise_band": step.noise_band if step.noise_band < math.inf else None}


def _cells(cost: Cost) -> tuple[str, ...]:
    return (
        *(f"{size:,}" for size in (cost.batch, cost.references, cost.dim)),
        _seconds(cost.seconds),
        _seconds(cost.products),
        f"{cost.ratio:.2f}",
        _bytes(cost.peak),
    )


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _megabytes(value: int | None) -> float | None:
    return None if value is None else value / 1e6


def _bytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.0f} MB"
