r"""A comparison: the single-sample target and the stable one, trained from the same seeds on the same batches and noise.

Both runs of a seed begin with the same weights and see the same rows, noise levels and noise; only what they regress on
differs. Every so often the averaged model is scored by

- its mean squared distance to the exact posterior mean over the whole training set, at several noise levels;
- the Frechet distance of samples of fixed seeds, with its jackknife error;
- the variance of the gradient from batch to batch, $E|g - E g|^2$ summed over the parameters, for both targets at the same
  weights: what the stable target is there to lower.

Scores are kept in the run's folder line by line, so a comparison that was interrupted goes on where it stopped.

A score is expensive: 1,000 samples by Heun's method in 18 steps are 35,000 rows through the network, as many as in some
hundred training steps. `plan_scoring` therefore chooses how often and on how many samples, so that scoring takes no longer
than training where possible. The exact posterior mean, which costs a pass over the data for every row, is computed once for
all scores of all runs.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_type_hints

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from stablefield.data._image_set import ImageSet
from stablefield.diffusion._preconditioning import Denoiser
from stablefield.probing._fit import Optimum, find_optimum
from stablefield.probing._population import Population
from stablefield.training._config import fits
from stablefield.training._feed import Feed
from stablefield.training._loop import Report, fit, make_accelerator
from stablefield.training._model import open_model
from stablefield.training._observers import SelfCheck, samples
from stablefield.training._placement import placed
from stablefield.training._recipe import Recipe
from stablefield.training._records import append_line, read_lines
from stablefield.training._run_folder import RunConfig, RunFolder
from stablefield.training._stepper import Stepper

__all__ = [
    "LEVELS",
    "MIDDLE",
    "NFE",
    "Outcome",
    "Score",
    "Scorer",
    "Scoring",
    "Spread",
    "TargetName",
    "improvement",
    "is_done",
    "optimum_of",
    "plan_scoring",
    "rows_of",
    "run_one",
    "samples_of",
    "spread",
]  # fmt: skip

LEVELS = (0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)
"""Noise levels at which the distance to the posterior mean is measured."""
MIDDLE = (1.5, 5.0)
"""The noise levels, both ends included, over which a comparison is summed up."""
GRADIENTS = 16
"""Batches between which the variance of the gradient is measured."""
ROWS = 1024
"""Noisy rows at each noise level that a model is held against the posterior mean on."""
NFE = 35
"""Network evaluations of a sample."""
# Fewest samples whose Frechet distance shows a target that is much better, and most, unless more are asked for.
_FEWEST, _MOST = 200, 1000
# Most scores, unless more are asked for.
_MOST_SCORES = 8
# A gradient costs three evaluations.
_BACKWARD = 3
# Bytes of the posterior means that are kept.
_KEPT = 2**28

TargetName = Literal["dsm", "stf"]


@dataclass(frozen=True)
class Score:
    """A model at one point of its training.

    Attributes:
        step: steps done.
        seconds: spent on training until then, without the scoring.
        distance: mean squared distance to the exact posterior mean at each of `LEVELS`, per number of a sample.
        frechet: Frechet distance of the samples.
        frechet_error: its standard error over fresh samples.
        gradient_variance: of the run's own target.
        gradient_ratio: variance of the gradient with the stable target over that with the single sample, at these weights.
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
        target: what it regressed on.
        seed: of weights, batches and noise.
        scores: over training, the last one at the end.
        folder: of the run.
    """

    target: TargetName
    seed: int
    scores: tuple[Score, ...]
    folder: Path


def improvement(outcomes: Sequence[Outcome], seed: int) -> float:
    """By which share the stable target's distance to the posterior mean is below the other's at middle noise levels."""
    last = {outcome.target: outcome.scores[-1].middle for outcome in outcomes if outcome.seed == seed}
    return 1 - last["stf"] / last["dsm"]


@dataclass(frozen=True)
class Spread:
    """A figure over seeds.

    Attributes:
        mean: over the seeds.
        error: standard error of the mean; None with one seed.
        least: of a seed.
        most: of a seed.
    """

    mean: float
    error: float | None
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """The mean of one value per seed, with what it varies by.

    Raises:
        ValueError: if there are none.
    """
    if not values:
        raise ValueError("values are empty: pass one for each seed.")
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else None
    return Spread(float(np.mean(values)), error, min(values), max(values))


@dataclass(frozen=True)
class Scoring:
    """How often a run is scored, and on what.

    Attributes:
        count: scores over training, the last one at its end.
        samples: drawn for each.
        rows: rows through the network that a score takes, those of gradients counted three times.
        training: the same of the whole training.
    """

    count: int
    samples: int
    rows: int
    training: int


def plan_scoring(recipe: Recipe, images: int, *, evaluations: int | None = None, samples: int | None = None) -> Scoring:
    """Scores that take no longer than the training does, unless asked otherwise; one at the end at least.

    Args:
        recipe: of the run.
        images: in the data; no more samples are drawn.
        evaluations: how many scores; 1 to 8 if None.
        samples: for each; 200 to 1,000 if None.
    """
    training = _BACKWARD * recipe.steps * recipe.batch
    fixed = 2 * _BACKWARD * GRADIENTS * recipe.batch + len(LEVELS) * min(ROWS, images)
    if samples is None:
        affordable = (training // (_MOST_SCORES if evaluations is None else evaluations) - fixed) // NFE
        samples = min(max(_FEWEST, min(_MOST, affordable)), images)
    one = fixed + NFE * samples
    if evaluations is None:
        evaluations = max(1, min(_MOST_SCORES, training // one))
    return Scoring(min(evaluations, recipe.steps), samples, one, training)


def rows_of(data: ImageSet) -> int:
    """Noisy rows at each noise level that a model of these data is held against: as many as memory is given to."""
    return min(len(data), ROWS, max(64, _KEPT // (4 * len(LEVELS) * math.prod(data.shape))))


def optimum_of(data: ImageSet, device: torch.device, *, labelled: bool, rows: int | None = None) -> Optimum:
    """Noisy rows of `data` at `LEVELS` with their exact posterior mean, for all scores of all runs.

    Args:
        data: the images.
        device: where the networks are.
        labelled: whether the posterior stays within classes.
        rows: how many at each level; those of `rows_of` if None.
    """
    labels = torch.from_numpy(data.labels) if labelled and data.labels is not None else None
    population = Population(
        torch.from_numpy(data.images.copy()).to(device), None if labels is None else labels.to(device)
    )
    return find_optimum(population, LEVELS, rows=rows_of(data) if rows is None else rows)


class Scorer:
    """Scores a run in training; an observer of the loop.

    Args:
        folder: of the run; scores.jsonl in it is continued.
        config: of the run.
        data: the images.
        check: measures samples.
        every: steps between scores.
        accelerator: of the run.
        optimum: what `optimum_of` makes of the images.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        data: ImageSet,
        check: SelfCheck,
        every: int,
        accelerator: Accelerator,
        optimum: Optimum,
    ) -> None:
        self._path, self._config, self._check, self._every = folder.path / "scores.jsonl", config, check, every
        self._device = accelerator.device
        # References as the stable target has them, whichever target this run regresses on.
        stable = dataclasses.replace(config.recipe, target="stf")
        feed = Feed(
            data, stable, self._device, labelled=config.classes > 0, placement=placed(stable, data, self._device)
        )
        self._optimum = optimum
        self._steppers = {
            target: Stepper(
                dataclasses.replace(
                    config, recipe=dataclasses.replace(config.recipe, target=target, gradient_accumulation_steps=1)
                ),
                feed,
                accelerator,
            )
            for target in ("dsm", "stf")
        }
        newest = folder.newest()
        started = newest[1].step if newest is not None else 0
        self._seconds = max((score.seconds for score in read_scores(folder.path) if score.step <= started), default=0.0)
        self._began = time.perf_counter()

    @property
    def every(self) -> int:
        """Steps between scores."""
        return self._every

    def __call__(self, step: int, denoiser: Denoiser) -> dict[str, float]:
        """Score the model, and add a line to scores.jsonl."""
        self._seconds += time.perf_counter() - self._began
        reading = self._check.read(lambda seeds: samples(denoiser, self._config.shape, seeds, self._device))
        variances = {target: self._gradient_variance(stepper, denoiser) for target, stepper in self._steppers.items()}
        fit = self._optimum.fit(denoiser, labelled=self._config.classes > 0)
        score = Score(
            step=step,
            seconds=self._seconds,
            distance=tuple((fit.distance.mean / fit.dim).tolist()),
            frechet=reading.value,
            frechet_error=reading.standard_error,
            gradient_variance=variances[self._config.recipe.target],
            gradient_ratio=variances["stf"] / variances["dsm"],
        )
        numbers = (*score.distance, score.frechet, score.frechet_error, score.gradient_variance, score.gradient_ratio)
        if not all(map(math.isfinite, numbers)):
            raise ArithmeticError(f"a score is not finite at step {step}")
        append_line(self._path, dataclasses.asdict(score))
        self._began = time.perf_counter()
        return {"frechet": score.frechet, "distance_to_optimum": score.middle}

    def _gradient_variance(self, stepper: Stepper, denoiser: Denoiser) -> float:
        """E|g - E g|^2 over the batches of the first steps, unbiased, at the weights of `denoiser`."""
        stepper.trained.model.load_state_dict(denoiser.state_dict())
        first = stepper.gradient(0).double()
        total, squares = torch.zeros_like(first), 0.0
        for step in range(1, GRADIENTS):
            gap = stepper.gradient(step).double() - first
            total += gap
            squares += float(gap.square().sum())
        return (squares - float(total.square().sum()) / GRADIENTS) / (GRADIENTS - 1)


def read_scores(folder: Path) -> list[Score]:
    """The scores in a run's folder, in order, without damaged lines; of a step that was scored twice, the later line."""
    found: dict[int, Score] = {}
    hints = get_type_hints(Score)
    for record in read_lines(folder / "scores.jsonl"):
        entries: dict[str, Any] = {
            name: tuple(cast("list[Any]", v)) if isinstance(v, list) else v for name, v in record.items()
        }
        if set(entries) == set(hints) and all(fits(entries[name], hint) for name, hint in hints.items()):
            score = Score(**entries)
            found[score.step] = score
    return [found[step] for step in sorted(found)]


def is_done(folder: RunFolder) -> bool:
    """Whether the run in `folder` is trained and scored to its end."""
    scores, newest = read_scores(folder.path), folder.newest()
    steps = folder.config().recipe.steps
    return bool(scores) and newest is not None and min(scores[-1].step, newest[1].step) >= steps


def run_one(
    folder: RunFolder,
    data: ImageSet,
    check: SelfCheck,
    every: int,
    device: torch.device,
    *,
    report: Callable[[Report], object] | None = None,
    stop: Callable[[], bool] = lambda: False,
    optimum: Optimum | None = None,
) -> Outcome | None:
    """Train and score the run in `folder`, or what is left of it; None if it was stopped.

    Args:
        folder: of the run.
        data: the images.
        check: measures samples.
        every: steps between scores.
        device: where to compute.
        report: told of progress.
        stop: asked after every step.
        optimum: what `optimum_of` makes of the images, where several runs share it; made here if None.
    """
    config = folder.config()
    assert config.recipe.target in ("dsm", "stf")
    data = config.numbered(data)
    if not is_done(folder):
        accelerator = make_accelerator(device)
        optimum = optimum or optimum_of(data, accelerator.device, labelled=config.classes > 0)
        scorer = Scorer(folder, config, data, check, every, accelerator, optimum)
        done = fit(
            folder,
            config,
            data,
            device=device,
            report=report,
            stop=stop,
            observers=(scorer,),
            accelerator=accelerator,
        )
        if done < config.recipe.steps:
            return None
        scores = read_scores(folder.path)
        if not scores or scores[-1].step < done:  # the line of a run that had ended before is damaged
            scorer(done, open_model(folder.path, device=device).denoiser)
    return Outcome(config.recipe.target, config.recipe.seed, tuple(read_scores(folder.path)), folder.path)


def samples_of(outcome: Outcome, seeds: Sequence[int], device: torch.device) -> NDArray[np.uint8]:
    """Images of `seeds` that the run's averaged model draws, uint8, shape (len(seeds), C, H, W).

    Of a run that is told classes, seed k is of class k modulo their number, and the images are in the order of the classes.
    """
    opened = open_model(outcome.folder, device=device)
    classes = opened.config.classes
    if classes:
        seeds = sorted(seeds, key=lambda seed: seed % classes)
    labels = torch.tensor(seeds) % classes if classes else None
    return samples(opened.denoiser, opened.config.shape, seeds, device, labels).numpy()
