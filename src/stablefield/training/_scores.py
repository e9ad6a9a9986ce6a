"""The scores of a comparison's runs: one model at one point of its training, kept as a line of scores.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from stablefield.training._records import from_record, read_lines

__all__ = ["LEVELS", "MIDDLE", "Outcome", "Score", "Spread", "TargetName", "improvement", "read_scores", "spread"]

LEVELS = (0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)
"""Noise levels for the distance to the posterior mean."""
MIDDLE = (1.5, 5.0)
"""Range of noise levels, with both ends, that a comparison's summary averages over."""
TargetName = Literal["dsm", "stf"]


@dataclass(frozen=True)
class Score:
    """A model at one point of its training.

    Attributes:
        step: steps done.
        seconds: training time so far, without scoring.
        distance: mean squared distance to the exact posterior mean at each of `LEVELS`, per number of a sample.
        frechet: Frechet distance of the samples.
        frechet_error: its standard error over fresh samples.
        gradient_variance: variance of the gradient with the run's own target, with importance sampling at the noise levels
            that the run has fitted.
        gradient_ratio: that variance with the stable target, divided by that with the single sample, at these weights
            and levels.
    """

    step: int
    seconds: float
    distance: tuple[float, ...]
    frechet: float
    frechet_error: float
    gradient_variance: float
    gradient_ratio: float

    @property
    def middle(self) -> float:
        """Mean of the distance over the middle noise levels."""
        inside = [d for level, d in zip(LEVELS, self.distance, strict=True) if MIDDLE[0] <= level <= MIDDLE[1]]
        return sum(inside) / len(inside)


@dataclass(frozen=True)
class Outcome:
    """A run of a comparison.

    Attributes:
        target: the regression target.
        seed: seed of weights, batches and noise.
        scores: scores over training, the last one at its end.
        folder: the run's folder.
    """

    target: TargetName
    seed: int
    scores: tuple[Score, ...]
    folder: Path

    @property
    def last(self) -> Score:
        """The score at the end of training."""
        return self.scores[-1]


def improvement(outcomes: Sequence[Outcome], seed: int) -> float:
    """The share by which the stable target has less distance to the posterior mean at middle noise levels."""
    last = {outcome.target: outcome.last.middle for outcome in outcomes if outcome.seed == seed}
    return 1 - last["stf"] / last["dsm"]


@dataclass(frozen=True)
class Spread:
    """A figure over seeds.

    Attributes:
        mean: mean over the seeds.
        error: standard error of the mean; None with one seed.
        least: lowest value of a seed.
        most: highest value of a seed.
    """

    mean: float
    error: float | None
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """Mean and spread of one value per seed.

    Raises:
        ValueError: if there are no values.
    """
    if not values:
        raise ValueError("values are empty: pass one for each seed.")
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else None
    return Spread(float(np.mean(values)), error, min(values), max(values))


def read_scores(folder: Path) -> list[Score]:
    """The scores in a run's folder, in order, without damaged lines; for a step with two scores, the later one."""
    found: dict[int, Score] = {}
    for record in read_lines(folder / "scores.jsonl"):
        try:
            score = from_record(Score, record)
        except ValueError:
            continue  # another kind of line
        found[score.step] = score
    return [found[step] for step in sorted(found)]
