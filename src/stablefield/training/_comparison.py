"""The result of comparing the targets: table, summary, report and files."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stablefield.data._image_set import class_text
from stablefield.report import Code, Estimate, Page, Section, json_details
from stablefield.report._cells import show, text_table
from stablefield.report._chart import Chart
from stablefield.report._result import Result, Tables
from stablefield.training._comparison_page import comparison_page, distance_chart, gain_texts, level_chart, over_seeds
from stablefield.training._run_folder import RunFolder
from stablefield.training._scorer import samples_of
from stablefield.training._scores import LEVELS, MIDDLE, Outcome, improvement

__all__ = ["DISTANCE", "Comparison", "summary"]

# Samples per target in a report.
_SHOWN = 36

DISTANCE = f"distance: mean squared distance to the exact posterior mean, noise levels {MIDDLE[0]:g} to {MIDDLE[1]:g}"
"""Explains the columns of distances."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Comparison(Result):
    """Both targets side by side; a notebook shows the report, and `save` also writes every score to a .csv file.

    A stopped comparison covers the seeds that both targets have trained with; the same call continues with the others.

    Attributes:
        data_name: name of the training data.
        outcomes: the runs with their scores, both targets for each seed.
        missing: seeds that have not finished training.
        frechet_name: name of the Frechet distance of the samples.
        protocol: all settings, as JSON values.
        command: the command or call that made the comparison.
        device: where to draw the report's samples.
    """

    data_name: str
    outcomes: tuple[Outcome, ...]
    missing: tuple[int, ...] = ()
    frechet_name: str
    protocol: Mapping[str, Any]
    command: str
    device: torch.device

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs."""
        return sorted({outcome.seed for outcome in self.outcomes})

    @property
    def summary(self) -> str:
        """The results in words, each figure with its spread over seeds."""
        left = (
            f"Stopped before seed {', '.join(map(str, self.missing))}: the same call continues." if self.missing else ""
        )
        found = summary(self.outcomes, self.seeds, self.frechet_name) if self.outcomes else ""
        if self.outcomes and len(self.protocol.get("environments", ())) > 1:
            found += " The runs were trained in several environments, so their times do not compare."
        return f"{found} {left}".strip()

    def rows(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The table at the end of training: its head, and a row for each seed."""
        head = (
            "seed", "distance DSM", "STF", "gain", f"{self.frechet_name} DSM", "STF", "s DSM", "STF",
        )  # fmt: skip
        last = {(o.target, o.seed): o.last for o in self.outcomes}
        rows: list[tuple[str, ...]] = []
        for seed in self.seeds:
            a, b = last["dsm", seed], last["stf", seed]
            rows.append(
                (
                    str(seed),
                    show(a.middle),
                    show(b.middle),
                    f"{round(100 * improvement(self.outcomes, seed), 1) + 0.0:.1f}%",
                    show(Estimate(a.frechet, a.frechet_error)),
                    show(Estimate(b.frechet, b.frechet_error)),
                    f"{a.seconds:.0f}",
                    f"{b.seconds:.0f}",
                )
            )
        return head, rows

    def __str__(self) -> str:
        head, rows = self.rows()
        return "\n".join([text_table(head, rows), DISTANCE, self.summary] if rows else [self.summary])

    def to_dict(self) -> dict[str, Any]:
        """The protocol, the gains and every score, as JSON values."""
        return {
            "command": self.command,
            "protocol": dict(self.protocol),
            "less_distance_to_the_optimum": {str(seed): improvement(self.outcomes, seed) for seed in self.seeds},
            "runs": [
                {"target": o.target, "seed": o.seed, "scores": [dataclasses.asdict(score) for score in o.scores]}
                for o in self.outcomes
            ],
        }

    def tables(self) -> Tables:
        """Every score, a row for each run and step."""
        head = ("target", "seed", "step", "seconds", "frechet", "frechet_error", "gradient_variance", "gradient_ratio")
        rows: list[tuple[str | float, ...]] = []
        for o in self.outcomes:
            for s in o.scores:
                numbers = (s.step, s.seconds, s.frechet, s.frechet_error, s.gradient_variance, s.gradient_ratio)
                rows.append((o.target, o.seed, *numbers, *s.distance))
        return {"comparison": ((*head, *(f"distance_{level:g}" for level in LEVELS)), rows)}

    def charts(self) -> dict[str, Chart]:
        """Distance to the optimum over training, and by noise level at its end."""
        if not self.outcomes:
            return {}
        return {"distance": distance_chart(self.outcomes), "levels": level_chart(self.outcomes)}

    def page(self) -> Page:
        """The report, with samples of both targets of the first seed, drawn now."""
        title = f"DSM and STF on {self.data_name}"
        if not self.outcomes:
            protocol = json_details("Every setting", dict(self.protocol))
            return Page(
                title=title, summary=self.summary, blocks=(Section("Protocol", (Code(self.command), protocol)),)
            )
        config = RunFolder(self.outcomes[0].folder).config()
        first = [o for o in self.outcomes if o.seed == self.seeds[0]] if config.picture_shape is not None else []
        names = [class_text(number, config.class_names) for number in config.learned_classes[:_SHOWN]]
        in_order = f", in the order of the classes {', '.join(names)}" if names else ""
        grids = [
            (f"{o.target.upper()}, seed {o.seed}{in_order}", samples_of(o, range(_SHOWN), self.device)) for o in first
        ]
        return comparison_page(
            title,
            self.summary,
            self.outcomes,
            grids,
            dict(self.protocol),
            self.frechet_name,
            self.command,
        )


def _gain(values: Sequence[float]) -> str:
    """The mean of shares over seeds in per cent, with their spread; without for one seed."""
    mean, between = gain_texts(values)
    return f"by {mean}" if len(values) == 1 else f"by {mean} on average ({between})"


def summary(outcomes: Sequence[Outcome], seeds: Sequence[int], name: str) -> str:
    """The results in words, each figure with its spread over seeds.

    Args:
        outcomes: the finished runs.
        seeds: seeds of the runs.
        name: name of the Frechet distance.
    """
    gains = [improvement(outcomes, seed) for seed in seeds]
    better = sum(gain > 0 for gain in gains)
    frechet = {t: [o.last.frechet for o in outcomes if o.target == t] for t in ("dsm", "stf")}
    seconds = {t: float(np.mean([o.last.seconds for o in outcomes if o.target == t])) for t in ("dsm", "stf")}
    lower = sum(b < a for a, b in zip(frechet["dsm"], frechet["stf"], strict=True))
    single = len(seeds) == 1
    spreads = (
        "One seed shows no spread: pass more, such as 0, 1, 2. "
        if single
        else f"± is the standard error over {len(seeds)} seeds. "
    )
    many = "1 seed" if single else f"{len(seeds)} seeds"
    return (
        f"STF is nearer to the optimum at middle noise levels in {better} of {many}, {_gain(gains)}; its {name} is lower in "
        f"{lower} of {len(seeds)}: {show(over_seeds(frechet['stf']))} against {show(over_seeds(frechet['dsm']))}. {spreads}"
        f"Training took {seconds['stf']:.0f} s with STF, {seconds['dsm']:.0f} s with DSM."
    )
