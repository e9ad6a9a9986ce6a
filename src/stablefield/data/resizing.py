"""Bringing images to a resolution: cut to a square or squashed to one, then resampled.

"crop" takes the largest centred square (of an odd difference the extra row or column is cut at the far side), "squash" the
whole image; what was taken is resampled by Pillow's Lanczos filter, sinc(x) sinc(x / 3) for |x| < 3, widened by the factor
of reduction so that it does not alias. An image that has the size already is left as it is. The manifest says what was done.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stablefield.data.collector import Collector, cached
from stablefield.data.image_set import ImageSet, Origin, chunks
from stablefield.data.pillow import require_pillow

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Resize", "check_resize", "fit", "gathered_set", "natural_resolution", "resize_text", "resized_set"]

Resize: TypeAlias = Literal["crop", "squash"]


def check_resize(resolution: int | None, resize: Resize) -> None:
    """Refuse a resolution below 1 and an unknown way of resizing."""
    if resolution is not None and not 1 <= resolution <= 8192:
        raise ValueError(f"resolution={resolution}: pass the wanted side of the images in pixels, 1 to 8192.")
    if resize not in ("crop", "squash"):
        raise ValueError(f'resize={resize!r}: pass "crop" (largest centred square) or "squash" (the whole image).')


def natural_resolution(sizes: Iterable[tuple[int, int]], limit: int) -> int | None:
    """The resolution that suits images of some sizes, for a network of squares that are halved several times.

    Args:
        sizes: (height, width) of the images.
        limit: no resolution above this.

    Returns:
        None if the images are equal squares of a multiple of 4 pixels (above 32, of 8), not above the limit: they stay as
        they are. Else the largest power of two that is neither above the shortest side nor the limit, and at least 8.
    """
    distinct = set(sizes)
    if len(distinct) == 1:
        height, width = next(iter(distinct))
        if height == width <= limit and height % (4 if height <= 32 else 8) == 0:
            return None
    shortest = min(limit, *(min(size) for size in distinct))
    return max(8, 1 << (shortest.bit_length() - 1))


def fit(image: Image, resolution: int, resize: Resize) -> Image:
    """Bring an image of mode L or RGB to (resolution, resolution) pixels, by the rule of the module."""
    from PIL.Image import Resampling

    box = _box(*image.size, resize)
    if box != (0, 0, *image.size):
        # Cut first: resize(box=...) would let the filter look at what lies outside of the square.
        image = image.crop(box)
    return image.resize((resolution, resolution), Resampling.LANCZOS)


def _box(width: int, height: int, resize: Resize) -> tuple[int, int, int, int]:
    """What is taken of an image: left, top, right, bottom."""
    if resize == "squash":
        return 0, 0, width, height
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def resize_text(resolution: int, resize: Resize) -> str:
    """What `fit` does, for the manifest."""
    from PIL import __version__

    how = "cut to the largest centred square" if resize == "crop" else "squashed to a square"
    return f"{how}, then Lanczos to {resolution} x {resolution} (Pillow {__version__})"


def resized_set(images: ImageSet, resolution: int, resize: Resize, *, memory_budget: int, cache: Path) -> ImageSet:
    """Bring a whole set to a resolution.

    Args:
        images: the set; returned as it is if it has the resolution.
        resolution: the wanted side in pixels.
        resize: how (see the module).
        memory_budget: bytes of pixels that may be kept in memory.
        cache: the folder for a packed file if they are more.

    Returns:
        The set at (resolution, resolution).

    Raises:
        ValueError: if the result is beyond the budget and cannot be written.
        ImportError: if Pillow is not installed.
    """
    _, height, width = images.shape
    if (height, width) == (resolution, resolution):
        return images
    before = images.manifest
    origin = Origin(
        name=images.name,
        source=str(before.get("source", "")),
        class_names=images.class_names,
        resized=str(before.get("resized", "no")),
        conversions=dict(before.get("conversions", {})),
        skipped=int(before.get("skipped", 0)),
        skipped_files=tuple(before.get("skipped_files", ())),
    )
    return gathered_set(
        chunks(images.images),
        len(images),
        images.shape,
        lambda: images.labels,
        origin,
        key=[before["sha256"], before["labels_sha256"], images.class_names, images.shape],
        resolution=resolution,
        limit=None,
        resize=resize,
        memory_budget=memory_budget,
        cache=cache,
    )


def gathered_set(
    pieces: Iterable[NDArray[np.uint8]],
    count: int,
    shape: tuple[int, int, int],
    labels: Callable[[], NDArray[np.int64] | None],
    origin: Origin,
    *,
    key: list[Any],
    resolution: int | None,
    limit: int | None,
    resize: Resize,
    memory_budget: int,
    cache: Path,
) -> ImageSet:
    """Make a set of images that come piece by piece, each brought to its resolution before the next is asked for.

    Args:
        pieces: images (k, C, H, W).
        count: how many images they are together.
        shape: of one, (C, H, W).
        labels: gives their labels, shape (n,), or None; called when the images are there.
        origin: where they come from, before resizing.
        key: JSON values, all that the images and labels depend on, for the name of the packed file.
        resolution: the wanted side in pixels; None keeps the size.
        limit: where there is no resolution, choose the natural one up to this.
        resize: how (see the module).
        memory_budget: bytes of pixels that may be kept in memory.
        cache: the folder for a packed file if they are more.

    Raises:
        ValueError: if the result is beyond the budget and cannot be written.
        ImportError: if they are to be resized and Pillow is not installed.
    """
    channels, height, width = shape
    if resolution is None and limit is not None:
        resolution = natural_resolution([(height, width)], limit)
    resized = resolution is not None and (height, width) != (resolution, resolution)
    if resized and resolution is not None:
        require_pillow("resizing images")
        text = resize_text(resolution, resize)
        key = [*key, text]
        pieces = (_resized(piece, resolution, resize) for piece in pieces)
        enlarged = {"enlarged": count} if min(height, width) < resolution else {}
        origin = replace(
            origin,
            resized=text if origin.resized == "no" else f"{origin.resized}; {text}",
            conversions=origin.conversions | enlarged,
        )
        shape = (channels, resolution, resolution)
    file = cache
    if count * math.prod(shape) > memory_budget:
        file, found = cached(cache, json.dumps(key))
        if found is not None:
            return found
    with Collector(count, shape, memory_budget=memory_budget, file=file, class_names=origin.class_names) as collector:
        for piece in pieces:
            collector.append(piece)
        return collector.finish(labels(), origin)


def _resized(piece: NDArray[np.uint8], resolution: int, resize: Resize) -> NDArray[np.uint8]:
    """Bring images (k, C, H, W) to (k, C, resolution, resolution)."""
    from PIL.Image import fromarray

    count, channels, height, width = piece.shape
    small = np.empty((count, channels, resolution, resolution), np.uint8)
    left, top, right, bottom = _box(width, height, resize)
    for pixels, result in zip(piece[:, :, top:bottom, left:right], small, strict=True):
        plain = fromarray(np.ascontiguousarray(pixels[0] if channels == 1 else pixels.transpose(1, 2, 0)))
        result[:] = (
            np.asarray(fit(plain, resolution, resize)).reshape(resolution, resolution, channels).transpose(2, 0, 1)
        )
    return small
