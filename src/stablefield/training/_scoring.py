r"""A comparison: the single-sample target and the stable one, trained from the same seeds on the same batches and noise.

Both runs of a seed begin with the same weights and see the same rows, noise levels and noise; only the
regression target differs. At regular steps, a score of the averaged model takes

- its mean squared distance to the exact posterior mean over the whole training set, at several noise levels;
- the Frechet distance of samples of fixed seeds, with its jackknife error; in a conditional run with classes in the
  proportions of the training data, as for `evaluate`;
- the variance of the gradient from batch to batch, $E|g - E g|^2$ summed over the parameters, for both targets at the same
  weights: the stable target is there to lower it.

Each score is a line of a file in the run's folder, so an interrupted comparison continues. A record beside that file keeps
the settings of the scores: numbers of other extractors or other numbers of samples never stand under one name.

A score is expensive: 1,000 samples by Heun's method in 18 steps are 35,000 rows through the network, as many as in some
hundred training steps. So `plan_scoring` chooses the number of scores and samples such that scoring takes no longer than
training where possible. The exact posterior mean costs a pass over the data for every row, and is computed once for all
scores of all runs.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_type_hints

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from stablefield._regular_file import reason
from stablefield.data._image_set import ImageSet
from stablefield.diffusion._preconditioning import Denoiser
from stablefield.evaluation._extractor import Extractor
from stablefield.probing._fit import Optimum, find_optimum
from stablefield.probing._population import Population
from stablefield.training._accelerator import make_accelerator
from stablefield.training._config import fits
from stablefield.training._feed import Feed
from stablefield.training._loop import Report, fit
from stablefield.training._model import open_model
from stablefield.training._observers import SelfCheck, samples
from stablefield.training._placement import placed
from stablefield.training._recipe import Recipe
from stablefield.training._records import append_line, read_lines, read_record, write_record
from stablefield.training._run_config import RunConfig
from stablefield.training._run_data import optimum_data
from stablefield.training._run_folder import RunFolder
from stablefield.training._stepper import Stepper

__all__ = [
    "LEVELS",
    "MIDDLE",
    "NFE",
    "SAMPLER",
    "Outcome",
    "Score",
    "Scorer",
    "Scoring",
    "Spread",
    "TargetName",
    "check_settings",
    "improvement",
    "is_done",
    "keep_settings",
    "optimum_of",
    "plan_scoring",
    "rows_of",
    "run_one",
    "samples_of",
    "settings_of",
    "spread",
]  # fmt: skip

LEVELS = (0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)
"""Noise levels for the distance to the posterior mean."""
MIDDLE = (1.5, 5.0)
"""Range of noise levels, with both ends, that a comparison's summary averages over."""
GRADIENTS = 16
"""Batches for the variance of the gradient."""
ROWS = 1024
"""Noisy rows per noise level for the distance to the posterior mean."""
NFE = 35
"""Network evaluations per sample."""
SAMPLER = f"heun, 18 steps, NFE {NFE}"
"""The sampler of the samples."""
# Fewest samples whose Frechet distance shows a much better target, and most by default.
_FEWEST, _MOST = 200, 1000
# Most scores by default.
_MOST_SCORES = 8
# A gradient costs three evaluations.
_BACKWARD = 3
# The record of the settings in a run's folder.
_SETTINGS = "scoring.json"
# Bytes for the posterior means.
_KEPT = 2**28

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
        gradient_variance: variance of the gradient with the run's own target.
        gradient_ratio: that variance with the stable target, divided by that with the single sample, at these weights.
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


def improvement(outcomes: Sequence[Outcome], seed: int) -> float:
    """The share by which the stable target has less distance to the posterior mean at middle noise levels."""
    last = {outcome.target: outcome.scores[-1].middle for outcome in outcomes if outcome.seed == seed}
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


@dataclass(frozen=True)
class Scoring:
    """The number of scores of a run, and their cost.

    Attributes:
        count: scores over training, the last one at its end.
        every: steps between scores.
        samples: samples per score.
        rows: rows through the network per score; a gradient's rows count three times.
        training: rows through the network for the whole training, counted the same way.
    """

    count: int
    every: int
    samples: int
    rows: int
    training: int


def plan_scoring(recipe: Recipe, images: int, *, evaluations: int | None = None, samples: int | None = None) -> Scoring:
    """Plan scores that take no longer than the training, unless the arguments ask for more; at least one, at the end.

    Args:
        recipe: the run's recipe.
        images: number of images in the data, the upper bound of samples.
        evaluations: most scores; 1 to 8 if None.
        samples: samples per score; 200 to 1,000 if None.
    """
    training = _BACKWARD * recipe.steps * recipe.batch
    fixed = 2 * _BACKWARD * GRADIENTS * recipe.batch + len(LEVELS) * min(ROWS, images)
    if samples is None:
        affordable = (training // (_MOST_SCORES if evaluations is None else evaluations) - fixed) // NFE
        samples = min(max(_FEWEST, min(_MOST, affordable)), images)
    one = fixed + NFE * samples
    if evaluations is None:
        evaluations = max(1, min(_MOST_SCORES, training // one))
    every = math.ceil(recipe.steps / evaluations)
    return Scoring(math.ceil(recipe.steps / every), every, samples, one, training)


def rows_of(data: ImageSet) -> int:
    """Noisy rows per noise level for these data: as many as fit the memory set aside."""
    return min(len(data), ROWS, max(64, _KEPT // (4 * len(LEVELS) * math.prod(data.shape))))


def optimum_of(config: RunConfig, data: ImageSet, device: torch.device, *, rows: int | None = None) -> Optimum:
    """Noisy rows of a run's data at `LEVELS` with their exact posterior mean, for all scores of all runs.

    Args:
        config: of one of the runs; the optimum has the mirror images and the classes of its training.
        data: the images.
        device: the networks' device.
        rows: rows per level; `rows_of(data)` if None.
    """
    rows = rows_of(data) if rows is None else rows
    data = optimum_data(config, data)
    labels = torch.from_numpy(data.labels) if config.classes and data.labels is not None else None
    values = data.images.copy() if data.scaling is None else data.scaled(slice(None))
    population = Population(torch.from_numpy(values).to(device), None if labels is None else labels.to(device))
    return find_optimum(population, LEVELS, rows=rows)


class Scorer:
    """Scores a run in training; an observer of the loop.

    Args:
        folder: the run's folder; appends to its scores.jsonl.
        config: the run's configuration.
        data: the images.
        check: measures samples.
        every: steps between scores.
        accelerator: the run's accelerator.
        optimum: the result of `optimum_of` for the images.
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
        # The stable target's references, whichever target this run regresses on.
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
        self._seconds = _seconds_until(self._path, started)
        self._began = time.perf_counter()

    @property
    def every(self) -> int:
        """Steps between scores."""
        return self._every

    def __call__(self, step: int, denoiser: Denoiser) -> dict[str, float]:
        """Score the model, and add a line to scores.jsonl."""
        self._seconds += time.perf_counter() - self._began
        reading = self._check.read_model(denoiser, self._config, self._device)
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

    def stop(self, step: int) -> None:
        """Keep the training time up to a stop between two scores, in a line of scores.jsonl that is no score."""
        self._seconds += time.perf_counter() - self._began
        append_line(self._path, {"step": step, "seconds": self._seconds})

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
    """The scores in a run's folder, in order, without damaged lines; for a step with two scores, the later one."""
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


def _seconds_until(path: Path, step: int) -> float:
    """Training time up to a step, from the lines of scores and stops."""
    found = [0.0]
    for record in read_lines(path):
        seconds = record.get("seconds")
        if isinstance(seconds, float) and isinstance(record.get("step"), int) and record["step"] <= step:
            found.append(seconds)
    return max(found)


def settings_of(config: RunConfig, data: ImageSet, extractor: Extractor, samples: int) -> dict[str, Any]:
    """What a run's scores depend on besides its training, as JSON values.

    Args:
        config: the run's configuration.
        data: the images.
        extractor: maps images to features.
        samples: samples per score.
    """
    return {
        "extractor": extractor.name,
        "sha256": extractor.sha256,
        "resize": extractor.resize,
        "features": extractor.dim,
        "samples": samples,
        "seeds": "from 0",
        "sampler": SAMPLER,
        "classes": "in the proportions of the data" if config.classes else "none",
        "levels": list(LEVELS),
        "rows": rows_of(data),
        "gradients": GRADIENTS,
        **({"optimum": "with the mirror images"} if config.recipe.mirror else {}),
    }


def check_settings(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Check that the scores in a run's folder, if any, have these settings.

    Returns:
        Whether that is known: earlier versions kept no record.

    Raises:
        ValueError: if the scores have other settings, or the record is damaged.
    """
    path = folder / _SETTINGS
    if not read_scores(folder):
        return True
    if not path.exists():
        return False
    try:
        found = read_record(path, frozenset())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be used: {reason(error)}. It keeps the settings of this run's scores: pass another out=FOLDER "
            "for this comparison."
        ) from error
    names = dict.fromkeys([*settings, *found])
    other = [
        f"{name} {found.get(name, 'unknown')!s:.40} there, {settings.get(name, 'unknown')!s:.40} here"
        for name in names
        if name not in found or name not in settings or found[name] != settings[name]
    ]
    if other:
        raise ValueError(
            f"{folder} holds scores of other settings: {'; '.join(other)}. Pass another out=FOLDER for this comparison, or "
            "the same settings."
        )
    return True


def keep_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Record the settings of the scores in a run's folder, before the first one.

    Raises:
        ValueError: if it cannot be written.
    """
    if read_scores(folder):
        return
    try:
        write_record(folder / _SETTINGS, settings)
    except OSError as error:
        raise ValueError(
            f"{folder / _SETTINGS} cannot be written ({error.strerror}): free some space, or pass another out=FOLDER for "
            "this comparison."
        ) from error


def is_done(folder: RunFolder) -> bool:
    """Whether the run in `folder` has finished training and scoring."""
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
    """Train and score the run in `folder` to its end, from wherever it is; None if `stop` ended it.

    Args:
        folder: the run's folder.
        data: the images.
        check: measures samples.
        every: steps between scores.
        device: where to compute.
        report: called with the progress.
        stop: called after every step; True stops training.
        optimum: the result of `optimum_of` for the images, which several runs may share; computed here if None.
    """
    config = folder.config()
    assert config.recipe.target in ("dsm", "stf")
    data = config.numbered(data)
    if not is_done(folder):
        accelerator = make_accelerator(device)
        optimum = optimum or optimum_of(config, data, accelerator.device)
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
            page=False,  # it would count as time of training
        )
        if done < config.recipe.steps:
            scorer.stop(done)
            return None
        scores = read_scores(folder.path)
        if not scores or scores[-1].step < done:  # the last line of a finished run is damaged
            scorer(done, open_model(folder.path, device=device).denoiser)
    return Outcome(config.recipe.target, config.recipe.seed, tuple(read_scores(folder.path)), folder.path)


def samples_of(outcome: Outcome, seeds: Sequence[int], device: torch.device) -> NDArray[Any]:
    """Images that the run's averaged model draws from `seeds`, uint8, shape (len(seeds), C, H, W), or other data.

    In a conditional run seed k has class k modulo the number of classes, and the images are sorted by class.
    """
    opened = open_model(outcome.folder, device=device)
    classes = opened.config.classes
    if classes:
        seeds = sorted(seeds, key=lambda seed: seed % classes)
    autoencoder = opened.config.autoencoder
    decoder = None if autoencoder is None else autoencoder.open(device=device)
    return samples(opened.denoiser, opened.config, seeds, device, autoencoder=decoder).numpy()
