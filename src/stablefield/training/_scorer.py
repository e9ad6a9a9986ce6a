r"""A comparison: the single-sample target and the stable one, trained from the same seeds on the same batches and noise.

Both runs of a seed begin with the same weights and see the same rows, noise levels and noise; only the
regression target differs. At regular steps, a score of the averaged model takes

- its mean squared distance to the exact posterior mean over the whole training set, at several noise levels;
- the Frechet distance of samples of fixed seeds, with its jackknife error; in a conditional run with classes in the
  proportions of the training data, as for `evaluate`;
- the variance of the gradient from batch to batch, $E|g - E g|^2$ summed over the parameters, for both targets at the same
  weights: the stable target is there to lower it. A run with importance sampling draws the noise levels of both from the
  density that it has fitted so far.

Each score is a line of a file in the run's folder, so an interrupted comparison continues. The exact posterior mean costs a
pass over the data for every row, and is computed once for all scores of all runs.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from stablefield.data._image_set import ImageSet
from stablefield.diffusion._importance_sampling import ImportanceSampling
from stablefield.diffusion._preconditioning import Denoiser
from stablefield.probing._fit import Optimum, find_optimum
from stablefield.probing._population import Population
from stablefield.training._accelerator import make_accelerator
from stablefield.training._checkpoint import Trained
from stablefield.training._feed import Feed
from stablefield.training._loop import Report, fit, not_finite, writing
from stablefield.training._model import open_model
from stablefield.training._placement import placed
from stablefield.training._records import append_line, read_lines
from stablefield.training._run_config import RunConfig
from stablefield.training._run_data import optimum_data
from stablefield.training._run_folder import RunFolder
from stablefield.training._samples import draw_samples
from stablefield.training._scores import LEVELS, Outcome, Score, read_scores
from stablefield.training._scoring_plan import GRADIENTS, rows_of
from stablefield.training._self_check import SelfCheck
from stablefield.training._stepper import Stepper

__all__ = ["Scorer", "is_done", "optimum_of", "run_one", "samples_of"]


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
    values = np.array(data.images) if data.scaling is None else data.scaled(slice(None))
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
        self._importance: ImportanceSampling | None = None
        self._began = time.perf_counter()

    @property
    def every(self) -> int:
        """Steps between scores."""
        return self._every

    def follow(self, trained: Trained) -> None:
        """Take the density of noise levels from the run in progress, if it fits one."""
        self._importance = trained.importance

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
            raise not_finite(f"a score is not finite at step {step}")
        with writing():
            append_line(self._path, dataclasses.asdict(score))
        self._began = time.perf_counter()
        return {"frechet": score.frechet, "distance_to_optimum": score.middle}

    def stop(self, step: int) -> None:
        """Keep the training time up to a stop between two scores, in a line of scores.jsonl that is no score."""
        self._seconds += time.perf_counter() - self._began
        with writing():
            append_line(self._path, {"step": step, "seconds": self._seconds})

    def _gradient_variance(self, stepper: Stepper, denoiser: Denoiser) -> float:
        """E|g - E g|^2 over the batches of the first steps, unbiased, at the weights of `denoiser`."""
        stepper.trained.model.load_state_dict(denoiser.state_dict())
        if self._importance is not None and stepper.trained.importance is not None:
            stepper.trained.importance.load_state_dict(self._importance.state_dict())
        first = stepper.gradient(0).double()
        total, squares = torch.zeros_like(first), 0.0
        for step in range(1, GRADIENTS):
            gap = stepper.gradient(step).double() - first
            total += gap
            squares += float(gap.square().sum())
        return (squares - float(total.square().sum()) / GRADIENTS) / (GRADIENTS - 1)


def _seconds_until(path: Path, step: int) -> float:
    """Training time up to a step, from the lines of scores and stops."""
    found = [0.0]
    for record in read_lines(path):
        seconds = record.get("seconds")
        if isinstance(seconds, float) and isinstance(record.get("step"), int) and record["step"] <= step:
            found.append(seconds)
    return max(found)


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
        stop: called after every step but the last; True stops training.
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
            on_begin=scorer.follow,
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

    In a conditional run the seeds take in turn the classes that it has learned, and the images are sorted by class.
    """
    opened = open_model(outcome.folder, device=device)
    count = len(opened.config.learned_classes)
    if count:
        seeds = sorted(seeds, key=lambda seed: seed % count)
    autoencoder = opened.config.autoencoder
    decoder = None if autoencoder is None else autoencoder.open(device=device)
    return draw_samples(opened.denoiser, opened.config, seeds, device, autoencoder=decoder).numpy()
