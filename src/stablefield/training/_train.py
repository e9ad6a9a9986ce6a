"""Train a model on images: from the data, or from a plan, to a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield.data._image_set import ImageSet
from stablefield.data._source import Images
from stablefield.training._accelerator import Tracker, check_tracker
from stablefield.training._checkpoint import State, save
from stablefield.training._loop import Observer, Report, check_watchers
from stablefield.training._model import untrained
from stablefield.training._pace import Pace, clock
from stablefield.training._plan import Plan, images_and_recipe, make_plan, place
from stablefield.training._recipe import Recipe
from stablefield.training._run import Run, fit_run
from stablefield.training._run_data import check_vae
from stablefield.training._run_folder import HasFolder, RunFolder
from stablefield.training._time_budget import seconds_of
from stablefield.training._weight_source import open_weights

__all__ = ["train"]


def train(
    images: Images | Plan,
    *,
    labels: NDArray[np.int64] | Tensor | None = None,
    out: str | Path | None = None,
    recipe: Recipe | None = None,
    init: str | Path | HasFolder | None = None,
    held_out: float | Images | None = None,
    steps: int | None = None,
    time: str | float | None = None,
    vae: str | Path = "",
    device: torch.device | str | None = None,
    tracker: Tracker = "none",
    observers: Sequence[Observer] = (),
    on_start: Callable[[Run, ImageSet], object] | None = None,
    progress: Callable[[Report], object] | None = None,
    every: int = 10,
    stop: Callable[[], bool] = lambda: False,
) -> Run:
    """Train a diffusion model, and write a run folder.

    On a tensor or an array of your own, uint8 of shape (n, C, H, W):

        images = ((x + 1) * 127.5).round().to(torch.uint8)  # from x in [-1, 1]
        run = sf.train(images, out="runs/mine")
        run.sample(64).save("grid.png")

    With the weights of another run, on other images, perhaps of other classes or of another size:

        run = sf.train("sketches", init="runs/photos")
        print(run.config.initial)  # what was copied, and what was not

    Other data are floats: latents (n, C, H, W), signals (n, C, L) or vectors (n, d). The run measures the mean and the
    standard deviation of each channel, trains on scaled values, and draws samples in the units of the data.

        run = sf.train(latents, labels=labels, out="runs/latents")
        run.sample(64).save("samples.npz")

    Started by torchrun or `accelerate launch`, the processes train together.

    Args:
        images: a path or name that `open_images` opens, an image set, uint8 of shape (n, C, H, W), float data (n, ...), or
            the `Plan` of a run.
        labels: class numbers from 0 of an array of images, shape (n,), on which the network is conditioned; `recipe`, if
            given, must have `conditional=True`. `Run.resume` takes them again.
        out: folder of the run, new or empty; by default runs/DATA-TARGET, with a number if that exists. A call that fails
            before its first step leaves it empty.
        recipe: how to train; by default one that suits the data and the device, or that of the run `init`.
        init: weights to begin with: a run or its folder (the averaged weights of its newest checkpoint), a folder that
            `Run.export` wrote, or a file of safetensors or of `torch.save` with a state dict, such as one in a run's
            checkpoint. Tensors are matched by name; a part of a class embedding is copied for each class that both have,
            by name, or by number if either has no names. Float data in the units of a run or an export take its scaling;
            `run.config.initial.notes` say so, and what else differs. Without `init`, the weights are random.
        held_out: samples not to train on: a share of the images, such as 0.05, chosen by the recipe's seed; or other images
            of the same shape, as an image set if the network is conditioned on classes. They are never in a batch and never
            a reference. The run logs its loss on them at fixed noise, with the averaged weights, and keeps the checkpoint
            with the lowest one. Copies of training samples among them are counted, and warned of from 1 % on.
        steps: training steps, in place of the recipe's.
        time: time that the call may take, such as 600, "10m" or "2h", in place of `steps`; `Plan.within` says what it
            determines. Without `recipe` and `init`, it also determines the width of a U-Net.
        vae: the autoencoder's place, if it has moved, of latents of images; it decodes the run's pictures.
        device: where to compute; a GPU if there is one.
        tracker: mirror metrics.jsonl to "tensorboard" or "wandb".
        observers: further metrics, measured during the run.
        on_start: called with the run and its images once the folder exists.
        progress: called with a `Report` after every `every` steps, in the first process.
        every: steps between reports.
        stop: called after every step but the last; if it returns True, the run is saved and training stops; `Run.resume`
            continues it.

    Returns:
        The run; if `stop` ended it, with fewer steps than its recipe has.

    Raises:
        ValueError: if an argument does not fit the data, the folder is not empty, or a tensor of `init` has another shape
            than the network's.
        TrainingError: if the loss is not finite or the disk is full; earlier checkpoints are intact. Errors of `progress`,
            `stop` and observers are raised as they are.
        ImportError: if a package is missing.
    """
    began = clock()
    check_watchers(observers, progress, every, stop, on_start)
    check_tracker(tracker)
    seconds = None if time is None else seconds_of(time)
    where, ranks = place(device)
    if not isinstance(images, Plan):
        if seconds is not None and steps is not None:
            raise ValueError(f"steps={steps} and time={time}: pass one of the two.")
        source = None if init is None else open_weights(init)
        chosen = recipe is None and source is None
        with ranks.rank_0_first("to open the data"):
            data, recipe = images_and_recipe(images, labels, recipe, steps, where, source)
        plan = make_plan(data, recipe, init=init, held_out=held_out, device=where)
        if seconds is not None:
            plan = plan.within(max(1e-3, seconds - (clock() - began)), where, vae, fit_width=chosen)
    else:
        given = {"recipe": recipe, "steps": steps, "labels": labels, "init": init, "time": time, "held_out": held_out}
        if superfluous := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"images is a Plan, which holds all settings: leave {' and '.join(superfluous)} out.")
        plan = images
    check_vae(vae, plan.config)
    pace = None if plan.seconds is None or plan.costs is None else Pace(plan.seconds, plan.costs)
    where_to, made = Path(), None
    try:
        if ranks.first:
            config = plan.config
            where_to = Path(out) if out is not None else _unused_folder(f"{plan.data.name}-{config.recipe.target}")
            made = RunFolder.create(where_to, config)
            _save_initial(made, plan)
        run = Run(ranks.broadcast(str(where_to), "to make the run's folder"))
        fit_run(
            run,
            plan.data,
            where,
            tracker,
            observers,
            on_start,
            progress,
            every,
            stop,
            pace,
            held_out=plan.held_out,
            vae=vae,
        )
    except Exception:
        # A corrected call can use the folder, if no step was taken.
        if made is not None:
            made.withdraw()
        if ranks.first and out is None:
            with suppress(OSError):  # of a run that has begun
                where_to.rmdir()
        raise
    return run


def _save_initial(folder: RunFolder, plan: Plan) -> None:
    """Save a checkpoint of the weights to begin with, if they are those of another network."""
    if plan.initial is not None:
        try:
            save(folder.checkpoint(0), State(0, 0), untrained(plan.config, torch.device("cpu"), plan.initial))
        except OSError as error:
            raise ValueError(
                f"out={folder.path} cannot be written ({error.strerror or error}): free some space, or name another place."
            ) from error


def _unused_folder(name: str) -> Path:
    # A run never overwrites another: the second is called -2. Create it now, since another run may start at the same time.
    number = 1
    while True:
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError:
            return path  # the first write there reports the reason
        else:
            return path
