"""Placement: where the pixels of a run are, and which references this allows.

Resident pixels are all on the device. If they do not fit, several processes each hold a part, and every row still sees all
of them (`ShardedPool`); pixels that do not fit even then are read from their file, step by step.
"""

import os
from typing import Literal

import torch

from stablefield._memory import free_bytes, size_text
from stablefield.data._image_set import ImageSet
from stablefield.training._recipe import Recipe

__all__ = ["LOADED_REFERENCES", "Placement", "can_be_resident", "placed", "resolve_references"]

Placement = Literal["resident", "sharded", "loaded"]

LOADED_REFERENCES = 4096
"""References per step if the data do not fit on the device."""
RESIDENT_SHARE = 0.5
"""Share of the device's free memory that resident pixels may take."""


def _size(data: ImageSet) -> int:
    """Bytes of the pixels; of latents, those of the moments and of a draw, and of the mirrored images' ones."""
    copies = 1 if data.moments is None else 3 if data.flipped is None else 6
    return copies * data.images.nbytes


def can_be_resident(data: ImageSet, device: torch.device, processes: int = 1) -> bool:
    """Whether the pixels, in `processes` equal parts, may be resident: a part in half of each device's free memory.

    Processes on the CPU of one machine share its memory.
    """
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    return _size(data) * sharing <= RESIDENT_SHARE * free_bytes(device) * processes


def placed(recipe: Recipe, data: ImageSet, device: torch.device, processes: int = 1) -> Placement:
    """The placement of the pixels of a run with resolved references.

    A run that started with all data as references keeps them resident, even if the machine is busier now.

    Raises:
        ValueError: if a run of several processes, with a part of the data on each, continues on one that cannot hold all.
    """
    if recipe.target == "stf" and recipe.references == "all":
        return "resident"
    if recipe.target == "stf" and recipe.references == "sharded":
        if processes > 1:
            return "sharded"
        if not can_be_resident(data, device):
            raise ValueError(
                f"the references of this run are sharded over several processes, and the {size_text(_size(data))} "
                f"of its data are more than half of the free memory on {device}: continue with several processes."
            )
        return "resident"
    return "resident" if can_be_resident(data, device) else "loaded"


def resolve_references(
    recipe: Recipe, data: ImageSet, device: torch.device, processes: int = 1, held_out: int = 0
) -> tuple[int | Literal["all", "sharded"], str]:
    """Resolve the references `auto`, and describe the rule in words.

    Args:
        recipe: the recipe.
        data: the run's data.
        device: where to compute.
        processes: number of processes.
        held_out: how many of the data are held out.

    Raises:
        ValueError: if all are requested but do not fit on the device, or on those of all processes.
    """
    size, free, count = size_text(_size(data)), size_text(free_bytes(device)), len(data) - held_out
    if recipe.target == "dsm":
        return 1, "one, the sample itself"
    if isinstance(recipe.references, int):
        return recipe.references, f"{recipe.references:,} drawn for each step"
    if data.moments is not None and recipe.references == "sharded":
        raise ValueError(
            "references=sharded: latents of images are drawn anew, and are not split over processes: pass a number, such as "
            f"{min(count, max(LOADED_REFERENCES, recipe.images_per_step))}, to draw with each batch, or all."
        )
    if recipe.references == "sharded" and processes == 1:
        raise ValueError(
            "references=sharded needs several processes, each with a part of the data: start them with torchrun "
            "or accelerate launch, or leave it out."
        )
    if recipe.references != "sharded" and can_be_resident(data, device):
        return "all", f"all {count:,} (resident: {size}, at most half of the {free} free on {device})"
    if processes > 1 and data.moments is None and can_be_resident(data, device, processes):
        return "sharded", f"all {count:,}, a part of the {size} on each of {processes} processes"
    number = min(count, max(LOADED_REFERENCES, recipe.images_per_step))
    if recipe.references in ("all", "sharded"):
        parts = f", also in {processes} parts" if processes > 1 else ""
        raise ValueError(
            f"references={recipe.references}: the data take {size}, more than half of the {free} that are free on "
            f"{device}{parts}: pass a number, such as {number}, to read with each batch, or train on more processes."
        )
    return number, f"{number:,} read with each batch ({size} are more than half of the {free} free on {device})"
