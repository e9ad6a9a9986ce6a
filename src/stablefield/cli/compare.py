"""`stablefield compare DATA`: the single-sample target and the stable one, side by side, with a report."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from stablefield.cli.bar import TimeLeft
from stablefield.cli.console import console, quoted, relative
from stablefield.cli.extractors import ExtractorFlags
from stablefield.cli.interruption import Interruption
from stablefield.cli.places import check_folder, check_place
from stablefield.cli.recipes import RecipeName, chosen
from stablefield.cli.settling import pick_device
from stablefield.cli.words import duration, flags_of
from stablefield.data._image_set import ImageSet
from stablefield.report._extra import require
from stablefield.training._compare import DISTANCE, Comparison, ComparisonPlan, PlannedRun, compare
from stablefield.training._comparison import Outcome
from stablefield.training._loop import Report
from stablefield.training._observers import check_samples
from stablefield.training._recipe import Recipe

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
    evaluations: int | None = None
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
        if self.evaluations is not None and self.evaluations < 1:
            raise ValueError(f"--evaluations is {self.evaluations}: each run is scored at least once, at its end.")
        if self.samples is not None:
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
        with Interruption() as interruption, _Bars() as bars:
            found = compare(
                data,
                seeds=seeds,
                out=out,
                recipe=self.config,
                evaluations=self.evaluations,
                samples=self.samples,
                extractor=self.measure.open(data.shape, device),
                device=device,
                on_start=lambda plan: self._begin(plan, bars),
                progress=bars.update,
                on_run=bars.finish,
                stop=lambda: interruption.requested,
                command=self._command(data, accelerated=device.type == "cuda"),
            )
        if found is None:
            console.print(f"stopped; the same command goes on: --out {quoted(out)}")
            return interruption.status
        _print(found)
        for name in ("comparison.json", "comparison.csv", "report.html"):
            found.save(out / name)
        console.print(f"report:     {relative(out / 'report.html')}")
        console.print(f"numbers:    {relative(out / 'comparison.json')}, {relative(out / 'comparison.csv')}")
        return 0

    def _begin(self, plan: ComparisonPlan, bars: "_Bars") -> None:
        for note in self.yields:
            console.print(f"changed:    {note}", markup=False)
        console.print(f"references: {plan.references}")
        console.print(f"noise band: {plan.noise_band}")
        seeds, recipe = len(plan.runs) // 2, plan.runs[0].config.recipe
        console.print(
            f"DSM and STF on {escape(plan.data.name)}: {seeds} seeds, {recipe.steps:,} steps of {recipe.batch}, on "
            f"{plan.device}"
        )
        training, scoring, other = plan.training_seconds, plan.scoring_seconds, plan.other_seconds
        count = plan.scoring.count
        times = "once" if count == 1 else f"{count} times"
        console.print(
            f"takes about {duration(training + scoring + other)} from here: {duration(training)} of training, "
            f"{duration(scoring)} of scoring ({times} in each run, on {plan.scoring.samples:,} samples)"
            + (f", {duration(other)} of what is around them" if other >= 1 else "")
        )
        bars.begin(plan)

    def _command(self, data: ImageSet, *, accelerated: bool) -> str:
        """The command line, without where it writes to."""
        words = flags_of(self, Compare(), besides=("data", "out", "device", "config", "opened", "yields"))
        base = chosen(self.recipe, data, accelerated=accelerated)[1]
        return shlex.join(
            ["stablefield", "compare", self.data, *words, *flags_of(self.config, base, besides=("target",))]
        )


class _Bars:
    """A bar per run in a terminal; elsewhere a line per run that has ended."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeLeft(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[tuple[str, int], TaskID] = {}

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, plan: ComparisonPlan) -> None:
        """Show a bar for each run."""
        for run in plan.runs:
            name, steps = f"seed {run.seed} {run.target.upper()}", run.config.recipe.steps
            self._tasks[run.target, run.seed] = self._progress.add_task(name, total=steps, text="")
        self._progress.start()

    def update(self, run: PlannedRun, report: Report) -> None:
        """Show a report of a run."""
        task = self._tasks[run.target, run.seed]
        self._progress.update(task, completed=report.step, text=f"loss {report.loss:.3f}")

    def finish(self, outcome: Outcome) -> None:
        last = outcome.scores[-1]
        text = f"distance {last.middle:.4f}, Frechet {last.frechet:.3f}, {last.seconds:.0f} s"
        self._progress.update(self._tasks[outcome.target, outcome.seed], completed=last.step, text=text)
        if not console.is_terminal:
            console.print(f"seed {outcome.seed} {outcome.target.upper()}: {text}")


def _print(found: Comparison) -> None:
    table = Table(box=None, pad_edge=False)
    head, rows = found.rows()
    for column in head:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(DISTANCE)
    console.print(found.summary)


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds {text}: write numbers with commas, such as 0,1,2.") from None
    if len(set(found)) < len(found) or min(found) < 0:
        raise ValueError(f"--seeds {text}: name every seed once, and none below 0.")
    return found
