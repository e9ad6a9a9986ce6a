"""The training loop: batches, noise and references as functions of (seed, step).

A step takes its rows from the index stream, everything random from generators of (seed, purpose, step), and leaves nothing
behind but weights, average and optimiser: continuing from a checkpoint repeats what an uninterrupted run does.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from stablefield.data.image_set import ImageSet
from stablefield.data.index_stream import IndexStream
from stablefield.data.png import tile, write_png
from stablefield.diffusion.objective import Objective
from stablefield.sampling.grids import edm_sigmas
from stablefield.sampling.ode import heun
from stablefield.targets.references import Pool
from stablefield.targets.target import DenoisingTarget, StableTarget
from stablefield.training.checkpoint import State, restore, save
from stablefield.training.ema import ema_decay, follower, update_ema
from stablefield.training.model import build_denoiser, draw
from stablefield.training.recipe import Recipe
from stablefield.training.run_folder import RunConfig, RunFolder
from stablefield.training.seeding import Purpose, generator_for, seed_for

__all__ = ["Report", "TrainingError", "check_fit", "train"]

SAMPLE_SEEDS = range(64)
SAMPLE_STEPS = 18


class TrainingError(Exception):
    """The run cannot go on; the message says why and what is left."""


@dataclass(frozen=True)
class Report:
    """What a stretch of steps came to.

    Attributes:
        step: steps done.
        loss: mean loss over the stretch.
        variance_removed: mean of what the references took from the loss, in its units.
        images_per_second: over the stretch, without checkpoints and pictures.
    """

    step: int
    loss: float
    variance_removed: float
    images_per_second: float

    @property
    def share_removed(self) -> float:
        """Variance removed as a share of the loss that the single-sample target would have."""
        whole = self.loss + self.variance_removed
        return self.variance_removed / whole if whole > 0 else 0.0


def check_fit(recipe: Recipe, data: ImageSet) -> None:
    """Check a recipe against the data before anything is made.

    Raises:
        ValueError: if the batch or the references are larger than the data, references fewer than the batch, or classes
            are asked for and not there.
    """
    n = len(data)
    if recipe.batch > n:
        raise ValueError(f"--batch {recipe.batch} is above the {n} images of the data: pass --batch {n} or less.")
    if recipe.references != "all" and recipe.references > n:
        raise ValueError(
            f"--references {recipe.references} is above the {n} images of the data: pass at most {n}, or all."
        )
    if recipe.target == "stf" and recipe.references != "all" and recipe.references < recipe.batch:
        raise ValueError(
            f"--references {recipe.references} is below --batch {recipe.batch}: every image of a batch is among its "
            f"references, so pass at least {recipe.batch}, or --target dsm for none."
        )
    if recipe.conditional and data.labels is None:
        raise ValueError("--conditional needs classes, and the data have no labels: leave it out.")


def train(
    folder: RunFolder,
    config: RunConfig,
    data: ImageSet,
    *,
    device: torch.device,
    report: Callable[[Report], None] | None = None,
    every: int = 10,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Train the run in `folder` to its last step, from its newest checkpoint if it has one.

    Args:
        folder: the run's folder.
        config: what config.json says.
        data: the images.
        device: where to compute.
        report: called after every `every` steps.
        every: steps between reports.
        stop: asked after every step; if true, the run is saved with a checkpoint and a picture, and left.

    Returns:
        The steps done.

    Raises:
        TrainingError: if the loss is not finite.
        ValueError: if no checkpoint of a run to continue is whole, or the data are not those of the run.
    """
    recipe = config.recipe
    if data.manifest["sha256"] != config.manifest["sha256"]:
        raise ValueError(f"{config.data} is not what this run was started with (its pixels' sha256 differs).")
    model = build_denoiser(config).to(device)
    ema = follower(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    state = State(0, 0)
    newest = folder.newest()
    if newest is not None:
        state = restore(newest[0], model, ema, optimizer)
    folder.rewind_log(state.step)

    # A copy: a mapped file is read-only, and every row is wanted at every step.
    pixels = torch.from_numpy(np.array(data.images)).to(device)
    labels = torch.from_numpy(data.labels).to(device) if config.classes and data.labels is not None else None
    objective = _objective(recipe, pixels, labels)
    stream = IndexStream(len(data), recipe.batch, recipe.seed)
    reported, logged = _Meter(device), _Meter(device)
    for step in range(state.step, recipe.steps):
        index = torch.from_numpy(stream.batch_at(step)).to(device)
        x0 = pixels[index].float().div_(127.5).sub_(1)
        model.train()
        torch.manual_seed(seed_for(recipe.seed, Purpose.DROPOUT, step))
        optimizer.param_groups[0]["lr"] = recipe.learning_rate_at(step)
        generator = generator_for(recipe.seed, Purpose.OBJECTIVE, step, device)
        value = objective(model, x0, None if labels is None else labels[index], index, generator=generator)
        optimizer.zero_grad(set_to_none=True)
        value.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        update_ema(ema, model, ema_decay(recipe.batch, step * recipe.batch, recipe.ema_half_life, recipe.ema_ramp))

        done = step + 1
        last = done == recipe.steps or stop()
        removed = value.variance_removed.mean()
        reported.add(value.loss.detach(), removed, recipe.batch)
        logged.add(value.loss.detach(), removed, recipe.batch)
        if done % recipe.log_every == 0 or last:
            entry = logged.report(done)
            if not math.isfinite(entry.loss):
                raise TrainingError(
                    f"the loss is {entry.loss} at step {done}: lower --learning-rate or --clip. "
                    "The checkpoints written before are whole."
                )
            folder.log(
                {
                    "step": done,
                    "images": done * recipe.batch,
                    "loss": entry.loss,
                    "variance_removed": entry.variance_removed,
                    "images_per_second": entry.images_per_second,
                    "learning_rate": recipe.learning_rate_at(step),
                }
            )
            logged = _Meter(device)
        if report is not None and (done % every == 0 or last):
            report(reported.report(done))
            reported = _Meter(device)
        if last or (recipe.sample_every and done % recipe.sample_every == 0):
            _picture(folder, config, ema, done, device)
        if last or done % recipe.checkpoint_every == 0:
            save(folder.checkpoint(done), State(done, done * recipe.batch), model, ema, optimizer)
            reported.restart()
            logged.restart()
        if last:
            return done
    return state.step


class _Meter:
    """Sums over a stretch of steps; the device is asked for numbers at its end only."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float32, device=device)
        self._steps = 0
        self._images = 0
        self._seconds = 0.0
        self._clock = time.perf_counter()

    def add(self, loss: torch.Tensor, removed: torch.Tensor, images: int) -> None:
        self._sums += torch.stack([loss.float(), removed.float()])
        self._steps += 1
        self._images += images
        self.restart(count=True)

    def restart(self, count: bool = False) -> None:
        now = time.perf_counter()
        if count:
            self._seconds += now - self._clock
        self._clock = now

    def report(self, step: int) -> Report:
        loss, removed = (self._sums / max(1, self._steps)).tolist()
        return Report(step, loss, removed, self._images / max(1e-9, self._seconds))


def _objective(recipe: Recipe, pixels: torch.Tensor, labels: torch.Tensor | None) -> Objective:
    if recipe.target == "dsm":
        target: StableTarget = DenoisingTarget(recipe.process)
    else:
        size = None if recipe.references == "all" else recipe.references
        pool = Pool(pixels, size, labels)
        target = StableTarget(recipe.process, references=pool, noise_band=recipe.noise_band)
    return Objective(
        recipe.process,
        noise_levels=recipe.noise_levels,
        weighting=recipe.weighting,
        target=target,
        label_dropout=recipe.label_dropout if labels is not None else 0.0,
    )


def _picture(folder: RunFolder, config: RunConfig, ema: torch.nn.Module, step: int, device: torch.device) -> None:
    sigmas = edm_sigmas(SAMPLE_STEPS)
    images = draw(lambda x, _: heun(ema, x, sigmas), config.shape, SAMPLE_SEEDS, float(sigmas[0]), device)
    write_png(folder.picture(step), tile(images))
