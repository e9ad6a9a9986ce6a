"""The processes of a run, by Accelerate, and the trackers that mirror its metrics and pictures."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal, get_args

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from stablefield._distributed import Ranks
from stablefield._shapes import check_choice
from stablefield.training._run_folder import TRACKED, RunFolder

__all__ = ["Tracker", "check_tracker", "log_picture", "make_accelerator", "tracking"]

Tracker = Literal["none", "tensorboard", "wandb"]


def check_tracker(tracker: Tracker) -> None:
    """Check that there is such a tracker, and its package is installed.

    Raises:
        TypeError: if it is no string.
        ValueError: if there is no such tracker.
        ImportError: if its package is not installed, with the command that installs it.
    """
    check_choice("tracker", tracker, get_args(Tracker))
    if tracker != "none" and find_spec(tracker) is None:
        extra = 'pip install "stablefield[tensorboard]"' if tracker == "tensorboard" else "pip install wandb"
        raise ImportError(f"tracker={tracker} needs a package that is not installed: {extra}.")


def make_accelerator(device: torch.device, tracker: Tracker = "none", folder: RunFolder | None = None) -> Accelerator:
    """The processes of this run with their devices and tracker.

    The stepper sets the precision, because Accelerate fixes it once for a whole program, which may train several runs.

    Args:
        device: of a run on one process; with several, each takes its own GPU, or the CPU if this is the CPU.
        tracker: the tracker that mirrors metrics.jsonl.
        folder: the folder to which a tracker may write.

    Raises:
        ValueError: if the environment and Accelerate count different numbers of processes, or there is no such tracker.
    """
    check_tracker(tracker)
    ranks = Ranks.launched(device)  # Accelerate joins a group that it finds
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",
        log_with=None if tracker == "none" else tracker,
        project_dir=None if folder is None else str(folder.path),
    )
    if ranks.world_size == 1 and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ValueError("an observer or a callback that one of several processes runs cannot train: train outside it.")
    if accelerator.num_processes != ranks.world_size:
        raise ValueError(
            f"WORLD_SIZE={os.environ.get('WORLD_SIZE')} in the environment, and Accelerate counts "
            f"{accelerator.num_processes} processes: start them with torchrun or accelerate launch."
        )
    return accelerator


@contextmanager
def tracking(accelerator: Accelerator, tracker: Tracker, run: dict[str, str]) -> Generator[None]:
    if tracker == "none":
        yield
        return
    accelerator.init_trackers(TRACKED, run)
    try:
        yield
    finally:
        accelerator.end_training()


def log_picture(accelerator: Accelerator, step: int, grid: NDArray[np.uint8]) -> None:
    """Hand a picture (H, W, 1 or 3) to the trackers that take pictures."""
    colours = grid if grid.shape[2] == 3 else grid.repeat(3, axis=2)
    for tracker in accelerator.trackers:
        # TensorBoard takes arrays of any layout, if it is named.
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        log_images = getattr(tracker, "log_images", None)
        if log_images is not None:
            log_images({"samples": colours[None]}, step=step, **layout)
