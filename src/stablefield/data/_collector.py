"""Collect decoded images: in memory up to a budget, in a packed file beyond it.

The file is written in constant memory and mapped, so a set may be larger than memory. It is in the cache folder, named by a
hash of everything that determines its content. Opening the same source in the same way uses it again; you may delete it at
any time. Processes that decode the same source at once write the same bytes, and the last to finish gives the file its name.
"""

import hashlib
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from stablefield._memory import size_text
from stablefield.data._image_set import ImageSet, Origin, make_image_set
from stablefield.data._packed import open_packed
from stablefield.data._packed_writer import PackedWriter, room_for

__all__ = ["MEMORY_BUDGET", "Collector", "cache_folder", "cached"]

MEMORY_BUDGET = 2 * 2**30
"""Decoded images of up to this many bytes are kept in memory unless the caller says otherwise."""


def cache_folder() -> Path:
    """`stablefield` in $XDG_CACHE_HOME, or in ~/.cache."""
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path.home() / ".cache") / "stablefield"


def cached(folder: Path, key: str, notes: tuple[str, ...]) -> tuple[Path, ImageSet | None]:
    """The cache file for `key`, which determines its pixels and labels, and its content if the file exists and is intact.

    Args:
        folder: the folder of the file.
        key: determines the content.
        notes: those of the content now; the file may be of a version that said other things.
    """
    path = folder / f"images-{hashlib.sha256(key.encode()).hexdigest()[:20]}.stablefield"
    try:
        found = open_packed(path)
        return path, replace(found, manifest={**found.manifest, "notes": list(notes)})
    except ValueError:
        return path, None


class Collector:
    """Takes images one by one and returns an `ImageSet`; a context manager that removes an incomplete file.

    Args:
        count: how many images may come.
        shape: shape of one, (C, H, W).
        memory_budget: bytes of pixels that may be kept in memory.
        file: where to write if they are more.
        class_names: class names.

    Raises:
        ValueError: if the images exceed the budget and the file cannot be written or does not fit on its disk.
    """

    def __init__(
        self,
        count: int,
        shape: tuple[int, ...],
        *,
        memory_budget: int,
        file: Path,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        self._kept = 0
        self._images: NDArray[np.uint8] | None = None
        self._writer: PackedWriter | None = None
        size = count * math.prod(shape)
        if size <= memory_budget:
            self._images = np.empty((count, *shape), np.uint8)
            return
        remedy = "set XDG_CACHE_HOME to a folder on a larger disk, choose a lower resolution, or raise memory_budget"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(file.parent).free
            if free < size + 2**24:
                raise ValueError(
                    f"{count:,} images decode to {size_text(size)}, above the memory budget of "
                    f"{size_text(memory_budget)}, and {file.parent} has only {size_text(free)} free: {remedy}."
                )
            self._writer = PackedWriter(file, shape, overwrite=True, room=room_for({"class_names": class_names}))
        except OSError as error:
            raise ValueError(f"{file} cannot be written ({error.strerror or error}): {remedy}.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.__exit__(kind, error, trace)

    def append(self, images: NDArray[np.uint8]) -> None:
        """Take images of shape (k, C, H, W)."""
        if self._writer is not None:
            self._writer.append(images)
        elif self._images is not None:
            self._images[self._kept : self._kept + len(images)] = images
        self._kept += len(images)

    def finish(self, labels: NDArray[np.int64] | None, origin: Origin) -> ImageSet:
        """The set of the images taken.

        Args:
            labels: one per image taken, or None.
            origin: where they came from; its class names are those passed at the start.

        Raises:
            ValueError: if no image was taken, or labels do not fit.
        """
        if self._writer is None:
            images = self._images[: self._kept] if self._images is not None else np.empty((0, 1, 1, 1), np.uint8)
            return make_image_set(images, labels, origin)
        classes = 0 if labels is None else len(origin.class_names or ()) or int(labels.max()) + 1
        return open_packed(self._writer.finish(labels, origin.manifest(classes)))
