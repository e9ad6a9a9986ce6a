"""`stablefield compare DATA`: the single-sample target and the stable one, side by side, with a report."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.markup import escape

from stablefield.cli.console import console, print_table, quoted, relative, shown_warnings
from stablefield.cli.extractors import ExtractorFlags
from stablefield.cli.interruption import Interruption
from stablefield.cli.parser import parse_seeds, words_of
from stablefield.cli.places import check_file, check_folder
from stablefield.cli.progress import StageBar
from stablefield.cli.recipe_flags import Chosen, TrainingFlags
from stablefield.report._cells import duration, show
from stablefield.report._extra import require
from stablefield.training._compare import ComparisonPlan, compare
from stablefield.training._comparison import DISTANCE
from stablefield.training._scores import Outcome
from stablefield.training._self_check import check_samples

__all__ = ["Compare"]


@dataclass(frozen=True)
class Compare(TrainingFlags):
    """Train with the single-sample target and the stable one from the same seeds, and report the results."""

    out: Path | None = None
    """Folder of the comparison; compare/DATA by default. An interrupted comparison continues, with the same settings."""
    seeds: str = "0,1,2"
    """Seeds of weights, batches and noise, such as 0,1,2 or 0-2; two runs each."""
    evaluations: int | None = None
    """Most scores per run, evenly spaced; by default up to 8, so that scoring takes no longer than training."""
    samples: int | None = None
    """Samples per Frechet distance; by default 200 to 1,000, so that scoring takes no longer than training."""
    measure: Annotated[ExtractorFlags, tyro.conf.arg(name="")] = field(
        default_factory=lambda: ExtractorFlags(extractor="pixels")
    )
    """The network that measures the samples."""

    def check(self) -> None:
        """Check the flags and the packages before reading the data.

        Raises:
            ValueError: naming the flag.
            ImportError: if a package is missing.
        """
        super().check()
        parse_seeds(self.seeds)
        for package in ("jinja2", "matplotlib"):
            require(package, "a report of the comparison")
        self.measure.check()
        if self.evaluations is not None and self.evaluations < 1:
            raise ValueError(f"--evaluations is {self.evaluations}: pass at least 1, the score at the end of each run.")
        if self.samples is not None:
            check_samples(f"--samples {self.samples}", self.samples)
        check_folder("--out", self.out or Path("compare", "new"))

    def run(self) -> int:
        """Train, score, print a table, and write numbers and a report."""
        seeds = parse_seeds(self.seeds)
        chosen = self.chosen()
        data, device = chosen.data, chosen.device
        out = self.out or Path("compare") / data.name
        check_file("--out", out / "report.html")
        with Interruption() as interruption, StageBar() as bar, shown_warnings():
            found = compare(
                data,
                seeds=seeds,
                out=out,
                recipe=chosen.recipe,
                evaluations=self.evaluations,
                samples=self.samples,
                extractor=self.measure.open(data.shape, device, floating=data.scaling is not None),
                device=device,
                on_start=lambda plan: _print_plan(plan, chosen.notes),
                progress=bar.update,
                on_run=_print_outcome,
                stop=lambda: interruption.requested,
                command=self.command(chosen),
            )
        if found.missing:
            console.print(f"stopped; to continue, run the same command with --out {quoted(out)}")
            return interruption.status
        print_table(*found.rows())
        console.print(DISTANCE)
        console.print(found.summary)
        for name in ("comparison.json", "comparison.csv", "report.html"):
            found.save(out / name)
        console.print(f"report:     {relative(out / 'report.html')}")
        console.print(f"numbers:    {relative(out / 'comparison.json')}, {relative(out / 'comparison.csv')}")
        return 0

    def command(self, chosen: Chosen) -> str:
        """The command line, without --out and --device."""
        words = words_of(self, Compare(), besides=("data", "out", "device", "config"))
        changes = words_of(chosen.recipe, chosen.base, besides=("target",))
        return shlex.join(["stablefield", "compare", self.data, *words, *changes])


def _print_plan(plan: ComparisonPlan, notes: Sequence[str]) -> None:
    for note in notes:
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
        + (f", {duration(other)} of setup and report" if other >= 1 else "")
    )


def _print_outcome(outcome: Outcome) -> None:
    last = outcome.last
    console.print(
        f"seed {outcome.seed} {outcome.target.upper()}: distance {show(last.middle)}, Frechet {show(last.frechet)}, "
        f"{last.seconds:.0f} s"
    )
