"""The feed: for each step the rows of the batch and the references, as a function of (seed, step).

References are decoupled from the batch. Where the data are *resident*, all pixels lie on the device as uint8, and the
references are the whole set or a number of it drawn anew for each step. Where they are not, each step reads the
references, the batch among them, from the file that the data are mapped from, a step ahead of its use.

The set of references is chosen for the whole batch, so all processes and all parts of a step share it.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield.data.image_set import ImageSet, size_text
from stablefield.data.index_stream import IndexStream
from stablefield.targets.band import pick_noise_band
from stablefield.targets.references import Pool, choose
from stablefield.training.recipe import Recipe
from stablefield.training.seeding import Purpose, generator_for

__all__ = ["LOADED_REFERENCES", "Feed", "Rows", "fits", "resolve_band", "resolve_references"]

LOADED_REFERENCES = 4096
"""References per step where the data do not fit on the device."""
RESIDENT_SHARE = 0.5
"""Share of the device's free memory that resident pixels may take."""


@dataclass(frozen=True)
class Rows:
    """A step's rows and references.

    Attributes:
        pixels: uint8, shape (b, C, H, W): the part of the batch that was asked for.
        labels: classes of these rows, shape (b,), or None.
        index: their places in `pool`, shape (b,).
        pool: the references.
    """

    pixels: Tensor
    labels: Tensor | None
    index: Tensor
    pool: Pool


def free_memory(device: torch.device) -> int:
    """Bytes of memory that are free on the device; of the machine, for a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            entries = dict(line.split(":", 1) for line in file)
        return int(entries["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def fits(data: ImageSet, device: torch.device) -> bool:
    """Whether the pixels may be resident: they take at most half of the memory that is free on the device."""
    return data.images.nbytes <= RESIDENT_SHARE * free_memory(device)


def resolve_references(recipe: Recipe, data: ImageSet, device: torch.device) -> tuple[int | str, str]:
    """What `auto` comes to, and the rule in words.

    Raises:
        ValueError: if all are asked for and do not fit on the device.
    """
    size, free = size_text(data.images.nbytes), size_text(free_memory(device))
    resident = fits(data, device)
    if recipe.target == "dsm":
        return 1, "one, the sample itself"
    if recipe.references == "all" and not resident:
        raise ValueError(
            f"--references all: the data take {size}, more than half of the {free} that are free on {device}: pass a "
            f"number, such as {LOADED_REFERENCES}, which is read with each batch."
        )
    if isinstance(recipe.references, int):
        return recipe.references, f"{recipe.references:,} drawn for each step"
    if resident:
        return "all", f"all {len(data):,} (resident: {size}, at most half of the {free} free on {device})"
    number = min(len(data), max(LOADED_REFERENCES, recipe.batch))
    return number, f"{number:,} read with each batch ({size} are more than half of the {free} free on {device})"


def resolve_band(recipe: Recipe, data: ImageSet, device: torch.device) -> tuple[float, str]:
    """What the noise band `auto` comes to on these data, and what was found, in words."""
    if recipe.target == "dsm":
        return 0.0, "none, the single sample is used everywhere"
    if recipe.noise_band != "auto":
        return recipe.noise_band, f"from {recipe.noise_band:g}, as told"
    labels = torch.from_numpy(data.labels) if recipe.conditional and data.labels is not None else None
    size = recipe.references if isinstance(recipe.references, int) else None
    found = pick_noise_band(Pool(data.images, size, labels, mirrored=recipe.mirror), device=device)
    if found.level == float("inf"):
        return found.level, "none: every sample is its own only reference"
    return found.level, (
        f"from {found.level:.3g}: below it references take less than {found.tolerance:.0%} of the weight, by "
        f"{found.rows:,} probed"
    )


class Feed:
    """Rows and references of any step.

    Args:
        data: the images.
        recipe: its batch, seed, target and references (resolved: a number, or "all") count.
        device: where they are wanted.
        labelled: whether the network is told classes, which are then the groups of the references.
        resident: keep all pixels on the device.

    Attributes:
        labelled: whether rows come with labels.

    Raises:
        ValueError: if all data are to be references and are not resident.
    """

    def __init__(self, data: ImageSet, recipe: Recipe, device: torch.device, *, labelled: bool, resident: bool) -> None:
        self._data, self._recipe, self._device = data, recipe, device
        self._stream = IndexStream(len(data), recipe.batch, recipe.seed)
        self._labels = torch.from_numpy(data.labels).to(device) if labelled and data.labels is not None else None
        self.labelled = self._labels is not None
        # DSM asks for no references: what is at hand serves, and not resident it is the batch alone.
        self._whole = resident and (recipe.target == "dsm" or recipe.references == "all")
        self._number = recipe.batch if recipe.target == "dsm" else recipe.references
        if not self._whole and not isinstance(self._number, int):
            raise ValueError(
                f"--references {self._number} needs all data on {device}, and they do not fit there: train on a device with "
                "more memory, or start a run with a number of references."
            )
        self._pool: Pool | None = None
        if resident:
            # Copied where the file is mapped: it is read-only, and every row is wanted at every step.
            images = data.images if data.file is None and data.images.flags.writeable else np.array(data.images)
            self._pool = self._wrap(torch.from_numpy(images).to(device), self._labels)
        self._worker = None if resident else ThreadPoolExecutor(1, thread_name_prefix="stablefield-feed")
        self._ahead: tuple[int, Future[Pool]] | None = None
        self._chosen: tuple[int, Tensor, Tensor] | None = None
        self._subset: tuple[int, Pool] | None = None

    def rows(self, step: int, part: slice) -> Rows:
        """The rows `part` of the batch of `step`, with the references of that step."""
        index = torch.from_numpy(self._stream.batch_at(step)).to(self._device)
        if self._whole and self._pool is not None:
            pool, places = self._pool, index
        else:
            places = self._choice(step)[1].to(self._device)
            pool = self._pool_of(step)
        places = places[part]
        labels = None if self._labels is None else self._labels[index[part]]
        pixels = pool.data[places]
        assert isinstance(pixels, Tensor)
        return Rows(pixels, labels, places, pool)

    def close(self) -> None:
        """End the thread that reads ahead, if there is one."""
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)

    def _wrap(self, pixels: Tensor, labels: Tensor | None) -> Pool:
        return Pool(pixels, group=labels, mirrored=self._recipe.mirror)

    def _choice(self, step: int) -> tuple[Tensor, Tensor]:
        """Places in the data of the references of `step`, and those of the batch among them; on the CPU."""
        if self._chosen is None or self._chosen[0] != step:
            self._chosen = (step, *self._choose(step))
        return self._chosen[1:]

    def _choose(self, step: int) -> tuple[Tensor, Tensor]:
        index = torch.from_numpy(self._stream.batch_at(step))
        generator = generator_for(self._recipe.seed, Purpose.REFERENCES, step)
        assert isinstance(self._number, int)
        return choose(len(self._data), index, self._number, generator)

    def _pool_of(self, step: int) -> Pool:
        if self._subset is not None and self._subset[0] == step:
            return self._subset[1]
        if self._pool is not None:
            pool = self._pool.subset(self._choice(step)[0].to(self._device))
        else:
            assert self._worker is not None
            ahead, self._ahead = self._ahead, None
            now = ahead[1] if ahead is not None and ahead[0] == step else self._worker.submit(self._read, step)
            pool = now.result()
            self._ahead = (step + 1, self._worker.submit(self._read, step + 1))
        self._subset = (step, pool)
        return pool

    def _read(self, step: int) -> Pool:
        chosen = self._choose(step)[0]
        # In the order of the file, which is the order in which a disk is quick.
        order = np.argsort(chosen.numpy(), kind="stable")
        pixels: NDArray[np.uint8] = np.empty((len(chosen), *self._data.shape), np.uint8)
        pixels[order] = self._data.batch(chosen.numpy()[order])[0]
        labels = None if self._labels is None else self._labels[chosen.to(self._device)]
        return self._wrap(torch.from_numpy(pixels).to(self._device), labels)
