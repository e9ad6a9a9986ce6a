"""`stablefield compare DATA`: the single-sample target and the stable one, side by side, with a report."""

from __future__ import annotations

import csv
import dataclasses
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

import stablefield
from stablefield.atomic_file import write_atomically
from stablefield.cli.bar import TimeLeft
from stablefield.cli.comparison_words import foretold, summary
from stablefield.cli.console import console, quoted, relative
from stablefield.cli.extractors import ExtractorFlags
from stablefield.cli.interruption import Interruption
from stablefield.cli.places import check_folder, check_place
from stablefield.cli.recipes import RecipeName, chosen
from stablefield.cli.settling import opening_of, pick_device
from stablefield.cli.words import flags_of
from stablefield.data.image_set import ImageSet, class_text
from stablefield.evaluation.fid import frechet_name
from stablefield.probing.fit import Optimum
from stablefield.report import write_page
from stablefield.report.extra import require
from stablefield.training.comparison import (
    LEVELS,
    MIDDLE,
    Looks,
    Outcome,
    TargetName,
    improvement,
    is_done,
    optimum_of,
    plan_looks,
    run_one,
    samples_of,
)
from stablefield.training.comparison_page import comparison_page
from stablefield.training.config import encode
from stablefield.training.loop import Report, check_fit
from stablefield.training.placement import resolve_band, resolve_references
from stablefield.training.recipe import Recipe
from stablefield.training.run_folder import RunConfig, RunFolder

if TYPE_CHECKING:
    from stablefield.evaluation.self_check import SelfCheck

__all__ = ["Compare"]


@dataclass(frozen=True)
class Compare:
    """Train with the single-sample target and the stable one from the same seeds, and report what came out."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA", help_behavior_hint="")] = ""
    """What to train on: digits (built in), a folder or .zip of images, .npy, .npz, idx or CIFAR-10 files."""
    out: Path | None = None
    """Folder of the comparison; compare/DATA if not given. One that was interrupted goes on where it stopped."""
    seeds: str = "0,1,2"
    """Seeds of weights, batches and noise; two runs each."""
    looks: int | None = None
    """How often each run is scored over training; up to 8 by default, no more than take as long as the training."""
    samples: int | None = None
    """Samples of each Frechet distance; 200 to 1,000 by default, no more than take as long as the training."""
    measure: ExtractorFlags = field(default_factory=lambda: ExtractorFlags(extractor="pixels"))
    """What looks at the samples."""
    recipe: RecipeName = "auto"
    """Which settings to start from; the flags below change them. auto chooses by the data."""
    resolution: int | None = None
    """Bring every image to this many pixels a side; chosen by the recipe where sizes differ."""
    resize: Literal["crop", "squash"] = "crop"
    """Cut to the largest centred square first, or take the whole image."""
    skip_broken: bool = False
    """Leave out files that cannot be read, and count them."""
    device: str = ""
    """Where to compute; a GPU if there is one."""
    config: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)
    """What the runs do; the target is both."""
    opened: tyro.conf.Suppress[Any] = None
    """The data, once they are open."""
    yields: tyro.conf.Suppress[tuple[str, ...]] = ()
    """What flags have changed in the recipe."""

    def check(self) -> None:
        """Find out before the data are read whether it can be done.

        Raises:
            ValueError: naming the flag.
            ImportError: if a package is missing.
        """
        _numbers(self.seeds)
        for package in ("jinja2", "matplotlib"):
            require(package, "a report of the comparison")
        self.measure.check()
        if self.looks is not None and self.looks < 1:
            raise ValueError(f"--looks is {self.looks}: each run is scored at least once, at its end.")
        if self.samples is not None:
            from stablefield.evaluation.self_check import check_samples  # needs torchmetrics

            check_samples(f"--samples {self.samples}", self.samples)
        check_folder("--out", self.out or Path("compare", "new"))

    def run(self) -> int:
        """Train, score, print a table, and write numbers and a report."""
        seeds = _numbers(self.seeds)
        device = pick_device(self.device)
        data = self.opened
        assert isinstance(data, ImageSet)
        out = self.out or Path("compare") / data.name
        check_place("--out", out / "report.html")
        from stablefield.evaluation.self_check import SelfCheck, check_samples  # needs torchmetrics

        wanted = len(data) if self.samples is None else self.samples
        check_samples(f"--samples {wanted}", wanted, len(data))
        looks, configs = self._configs(seeds, data, device)
        extractor = self.measure.open(data.shape, device)
        first = configs[0][2].recipe
        console.print(
            f"DSM and STF on {data.name}: {len(seeds)} seeds, {first.steps:,} steps of {first.batch}, on {device}"
        )
        check = SelfCheck.prepare(data, extractor, samples=min(looks.samples, len(data)))
        console.print(foretold(configs, looks, data, check, device, out))
        with Interruption() as interruption:
            outcomes = self._train(configs, data, check, looks, device, out, interruption)
        if outcomes is None:
            console.print(f"stopped; the same command goes on: --out {quoted(out)}")
            return interruption.status
        name = frechet_name(extractor)
        _print(outcomes, seeds, name)
        self._write(outcomes, seeds, data, out, name, check, device)
        console.print(f"report:     {relative(out / 'report.html')}")
        console.print(f"numbers:    {relative(out / 'comparison.json')}, {relative(out / 'comparison.csv')}")
        return 0

    def _configs(
        self, seeds: Sequence[int], data: ImageSet, device: torch.device
    ) -> tuple[Looks, list[tuple[TargetName, int, RunConfig]]]:
        recipe = dataclasses.replace(self.config, target="stf")
        references, rule = resolve_references(recipe, data, device)
        recipe = dataclasses.replace(recipe, references=references)
        check_fit(recipe, data)
        band, finding = resolve_band(recipe, data, device)
        for note in self.yields:
            console.print(f"changed:    {note}", markup=False)
        console.print(f"references: {rule}")
        console.print(f"noise band: {finding}")
        looks = plan_looks(recipe, len(data), looks=self.looks, samples=self.samples)
        every = max(1, recipe.steps // looks.count)
        found: list[tuple[TargetName, int, RunConfig]] = []
        targets: tuple[TargetName, ...] = ("dsm", "stf")
        for seed in seeds:
            for target in targets:
                one = dataclasses.replace(
                    recipe,
                    target=target,
                    noise_band=band,
                    seed=seed,
                    sample_every=0,
                    checkpoint_every=every,
                )
                check_fit(one, data)
                config = RunConfig(
                    data=self.data,
                    shape=data.shape,
                    classes=data.classes if one.conditional else 0,
                    manifest=data.manifest,
                    recipe=one,
                    version=stablefield.__version__,
                    opening=opening_of(self, data),
                )
                found.append((target, seed, config))
        return looks, found

    def _train(
        self,
        configs: Sequence[tuple[TargetName, int, RunConfig]],
        data: ImageSet,
        check: SelfCheck,
        looks: Looks,
        device: torch.device,
        out: Path,
        interruption: Interruption,
    ) -> list[Outcome] | None:
        outcomes: list[Outcome] = []
        optimum: Optimum | None = None
        with _Bars(configs) as bars:
            for target, seed, config in configs:
                path = out / f"{target}-seed{seed}"
                folder = RunFolder(path) if (path / "config.json").is_file() else RunFolder.create(path, config)
                if (
                    folder.config().recipe != config.recipe
                    or folder.config().manifest["sha256"] != data.manifest["sha256"]
                ):
                    raise ValueError(f"{path} holds a run with other settings: name another --out for this comparison.")
                if optimum is None and not is_done(folder):
                    optimum = optimum_of(data, device, labelled=config.classes > 0)
                outcome = run_one(
                    folder,
                    data,
                    check,
                    max(1, config.recipe.steps // looks.count),
                    device,
                    report=lambda report, key=(target, seed): bars.update(key, report),
                    stop=lambda: interruption.requested,
                    optimum=optimum,
                )
                if outcome is None:
                    return None
                outcomes.append(outcome)
                bars.finish(outcome)
        return outcomes

    def _command(self, data: ImageSet, *, accelerated: bool) -> str:
        """The command line, without where it writes to."""
        told = flags_of(self, Compare(), besides=("data", "out", "device", "config", "opened", "yields"))
        base = chosen(self.recipe, data, accelerated=accelerated)[1]
        return shlex.join(
            ["stablefield", "compare", self.data, *told, *flags_of(self.config, base, besides=("target",))]
        )

    def _write(
        self,
        outcomes: Sequence[Outcome],
        seeds: Sequence[int],
        data: ImageSet,
        out: Path,
        name: str,
        check: SelfCheck,
        device: torch.device,
    ) -> None:
        recipe = RunFolder(outcomes[0].folder).config().recipe
        command = self._command(data, accelerated=device.type == "cuda")
        gains = {str(seed): improvement(outcomes, seed) for seed in seeds}
        protocol = {
            "stablefield": stablefield.__version__,
            "torch": torch.__version__,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "data": {key: data.manifest[key] for key in ("name", "count", "shape", "sha256")},
            "recipe": encode(recipe),
            "seeds": list(seeds),
            "frechet": {
                "name": name,
                "samples": len(check.seeds),
                "floor": check.floor,
                "sampler": "heun, 18 steps, NFE 35",
            },
            "noise_levels": list(LEVELS),
            "middle": list(MIDDLE),
        }
        record = {
            "command": command,
            "protocol": protocol,
            "less_distance_to_the_optimum": gains,
            "runs": [
                {"target": o.target, "seed": o.seed, "scores": [dataclasses.asdict(score) for score in o.scores]}
                for o in outcomes
            ],
        }
        write_atomically(out / "comparison.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
        write_atomically(out / "comparison.csv", lambda path: _write_csv(path, outcomes))
        config = RunFolder(outcomes[0].folder).config()
        told = [class_text(number, config.class_names) for number in range(min(config.classes, 36))]
        in_order = f", in the order of the classes {', '.join(told)}" if told else ""
        grids = [
            (f"{o.target.upper()}, seed {o.seed}{in_order}", samples_of(o, range(36), device))
            for o in outcomes
            if o.seed == seeds[0]
        ]
        page = comparison_page(
            f"DSM and STF on {data.name}", summary(outcomes, seeds, name), outcomes, grids, protocol, name, command
        )
        write_page(page, out / "report.html")


class _Bars:
    """A bar per run in a terminal; elsewhere a line per run that has ended."""

    def __init__(self, configs: Sequence[tuple[TargetName, int, RunConfig]]) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeLeft(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[tuple[str, int], TaskID] = {
            (target, seed): self._progress.add_task(f"seed {seed} {target.upper()}", total=config.recipe.steps, text="")
            for target, seed, config in configs
        }

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, key: tuple[str, int], report: Report) -> None:
        self._progress.update(self._tasks[key], completed=report.step, text=f"loss {report.loss:.3f}")

    def finish(self, outcome: Outcome) -> None:
        last = outcome.scores[-1]
        text = f"distance {last.middle:.4f}, Frechet {last.frechet:.3f}, {last.seconds:.0f} s"
        self._progress.update(self._tasks[outcome.target, outcome.seed], completed=last.step, text=text)
        if not console.is_terminal:
            console.print(f"seed {outcome.seed} {outcome.target.upper()}: {text}")


def _print(outcomes: Sequence[Outcome], seeds: Sequence[int], name: str) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("seed", "distance DSM", "STF", "gain", f"{name} DSM", "STF", "s DSM", "STF"):
        table.add_column(column, justify="right")
    last = {(o.target, o.seed): o.scores[-1] for o in outcomes}
    for seed in seeds:
        a, b = last["dsm", seed], last["stf", seed]
        table.add_row(
            str(seed),
            f"{a.middle:.4f}",
            f"{b.middle:.4f}",
            f"{round(100 * improvement(outcomes, seed), 1) + 0.0:.1f}%",
            f"{a.frechet:.3f} ± {a.frechet_error:.3f}",
            f"{b.frechet:.3f} ± {b.frechet_error:.3f}",
            f"{a.seconds:.0f}",
            f"{b.seconds:.0f}",
        )
    console.print(table)
    console.print(
        f"distance: mean squared distance to the exact posterior mean, noise levels {MIDDLE[0]:g} to {MIDDLE[1]:g}"
    )
    console.print(summary(outcomes, seeds, name))


def _write_csv(path: Path, outcomes: Sequence[Outcome]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        distances = [f"distance_{level:g}" for level in LEVELS]
        head = ("target", "seed", "step", "seconds", "frechet", "frechet_error", "gradient_variance", "gradient_ratio")
        writer.writerow([*head, *distances])
        for o in outcomes:
            for s in o.scores:
                numbers = (s.step, s.seconds, s.frechet, s.frechet_error, s.gradient_variance, s.gradient_ratio)
                writer.writerow([o.target, o.seed, *numbers, *s.distance])


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds {text}: write numbers with commas, such as 0,1,2.") from None
    if len(set(found)) < len(found) or min(found) < 0:
        raise ValueError(f"--seeds {text}: every seed once, and none below 0.")
    return found
