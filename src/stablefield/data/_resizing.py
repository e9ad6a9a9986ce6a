"""Bring images to a resolution: crop or squash them to its shape, then resample.

A resolution is the side of squares, or a height and a width. "crop" takes the largest centred part of that shape, for
squares the largest square (an odd difference cuts the extra row or column at the far side); "squash" takes the whole image.
Pillow's Lanczos filter, sinc(x) sinc(x / 3) for |x| < 3, then resamples it, widened by the factor of reduction to avoid
aliasing. An image that already has the size stays unchanged. The manifest records what was done.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stablefield._shapes import check_kind
from stablefield.data._collector import Collector, cached
from stablefield.data._image_set import ImageSet, Origin
from stablefield.data._pillow import require_pillow
from stablefield.data._scaling import chunks

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Resize",
    "Resolution",
    "check_resize",
    "fit",
    "gathered_set",
    "height_and_width",
    "natural_resolution",
    "origin_of",
    "raised_resolution",
    "resize_text",
    "resized_set",
]

_RARE = 0.1
"""Share of the images up to which those that lower the resolution of all are rare."""

Resize: TypeAlias = Literal["crop", "squash"]
Resolution: TypeAlias = int | Sequence[int]
"""The side of squares, or height and width, in pixels."""


def height_and_width(resolution: Resolution) -> tuple[int, int]:
    """The two sides of a resolution."""
    if isinstance(resolution, int):
        return resolution, resolution
    height, width = resolution
    return height, width


def check_resize(resolution: Resolution | None, resize: Resize) -> None:
    """Refuse a resolution below 1 and an unknown way of resizing."""
    if resolution is not None and not all(1 <= side <= 8192 for side in height_and_width(resolution)):
        raise ValueError(
            f"resolution={resolution}: pass the side of the images, or (height, width), in pixels, 1 to 8192."
        )
    check_kind("resize", resize, str, "'crop' or 'squash'")
    if resize not in ("crop", "squash"):
        raise ValueError(f'resize={resize!r}: pass "crop" (the largest centred part) or "squash" (the whole image).')


def natural_resolution(sizes: Iterable[tuple[int, int]], limit: int) -> Resolution | None:
    """The resolution that suits images of some sizes, for a network that halves them several times.

    Args:
        sizes: (height, width) of the images.
        limit: no resolution above this.

    Returns:
        None if the images have one size whose sides are multiples of 4 pixels (above 32, of 8) and not above the limit: they
        stay unchanged. For other images of one size that are not square, the height and width that keep their shape best,
        the longer side not above the limit. Otherwise the largest power of two that is neither above the shortest side nor
        the limit, and at least 8.
    """
    distinct = set(sizes)
    if len(distinct) == 1:
        height, width = next(iter(distinct))
        if height == width <= limit and height % (4 if height <= 32 else 8) == 0:
            return None
        found = _alike(height, width, limit)
        if height != width and min(found) >= 8:
            return None if found == (height, width) else found
    shortest = min(limit, *(min(size) for size in distinct))
    return max(8, 1 << (shortest.bit_length() - 1))


def raised_resolution(sizes: Mapping[tuple[int, int], int], limit: int) -> tuple[Resolution, int] | None:
    """The resolution that would suit images if the smallest were not there, and how many these are.

    Args:
        sizes: how many images have each (height, width).
        limit: no resolution above this.

    Returns:
        None if the natural resolution stays the same without a tenth of the images.
    """
    rising = sorted(sizes, key=min)
    most = _RARE * sum(sizes.values())
    best, found, removed = min(height_and_width(natural_resolution(rising, limit) or rising[0])), None, 0
    for size, following in pairwise(rising):
        removed += sizes[size]
        if removed > most:
            break
        # Of the remaining sizes, only the smallest counts, and whether it is the only one.
        without = natural_resolution({following, rising[-1]}, limit) or following
        if min(height_and_width(without)) > best:
            best, found = min(height_and_width(without)), (without, removed)
    return found


def _alike(height: int, width: int, limit: int) -> tuple[int, int]:
    """Sides that can be halved, in about the same proportion, and none above the limit."""
    longest = max(height, width)
    # If images shrink anyway, rounding up is as good as rounding down.
    sides = [side * limit / longest if longest > limit else side for side in (height, width)]
    step = 4 if min(sides) <= 32 else 8
    high, wide = (round(side / step) * step if longest > limit else side // step * step for side in sides)
    return int(high), int(wide)


def fit(image: Image, resolution: Resolution, resize: Resize) -> Image:
    """Bring an image of mode L or RGB to a resolution, by the rule of the module."""
    from PIL.Image import Resampling

    high, wide = height_and_width(resolution)
    box = _box(*image.size, resolution, resize)
    if box != (0, 0, *image.size):
        # Crop first: resize(box=...) would let the filter read pixels outside the part.
        image = image.crop(box)
    return image.resize((wide, high), Resampling.LANCZOS)


def _box(width: int, height: int, resolution: Resolution, resize: Resize) -> tuple[int, int, int, int]:
    """The part of an image that is kept: left, top, right, bottom."""
    if resize == "squash":
        return 0, 0, width, height
    high, wide = height_and_width(resolution)
    kept = min(width, max(1, round(height * wide / high))), min(height, max(1, round(width * high / wide)))
    left, top = (width - kept[0]) // 2, (height - kept[1]) // 2
    return left, top, left + kept[0], top + kept[1]


def resize_text(resolution: Resolution, resize: Resize, sizes: Iterable[tuple[int, int]]) -> str:
    """Describe what `fit` does to images of these heights and widths, for the manifest."""
    from PIL import __version__

    height, width = height_and_width(resolution)
    lanczos = f"Lanczos to {width} x {height} (Pillow {__version__})"
    if all(w * height == h * width for h, w in sizes):
        return lanczos
    shape = f"shape of {width} x {height}"
    crop, squash = ("square", "a square") if height == width else (f"part in the {shape}", f"the {shape}")
    how = f"cut to the largest centred {crop}" if resize == "crop" else f"squashed to {squash}"
    return f"{how}, then {lanczos}"


def resized_set(
    images: ImageSet, resolution: Resolution, resize: Resize, *, memory_budget: int, cache: Path
) -> ImageSet:
    """Bring a whole set to a resolution.

    Args:
        images: the set; returned unchanged if it has the resolution.
        resolution: the new one.
        resize: how (see the module).
        memory_budget: bytes of pixels that may be kept in memory.
        cache: the folder for a packed file if they are more.

    Returns:
        The set at this resolution.

    Raises:
        ValueError: if the result exceeds the budget and cannot be written.
        ImportError: if Pillow is not installed.
    """
    if images.shape[1:] == height_and_width(resolution):
        return images
    before = images.manifest
    return gathered_set(
        chunks(images.images),
        len(images),
        images.shape,
        lambda: images.labels,
        origin_of(images),
        key=[before["sha256"], before["labels_sha256"], images.class_names, images.recorded_notes, images.shape],
        resolution=resolution,
        limit=None,
        resize=resize,
        memory_budget=memory_budget,
        cache=cache,
    )


def origin_of(images: ImageSet) -> Origin:
    """Where a set came from, from its manifest."""
    manifest = images.manifest
    return Origin(
        name=images.name,
        source=str(manifest.get("source", "")),
        class_names=images.class_names,
        resized=str(manifest.get("resized", "no")),
        conversions=dict(manifest.get("conversions", {})),
        skipped=int(manifest.get("skipped", 0)),
        skipped_files=tuple(manifest.get("skipped_files", ())),
        notes=images.recorded_notes,
    )


def gathered_set(
    pieces: Iterable[NDArray[np.uint8]],
    count: int,
    shape: tuple[int, ...],
    labels: Callable[[], NDArray[np.int64] | None],
    origin: Origin,
    *,
    key: list[Any],
    resolution: Resolution | None,
    limit: int | None,
    resize: Resize,
    memory_budget: int,
    cache: Path,
) -> ImageSet:
    """Make a set of images that come piece by piece, resizing each piece before it asks for the next.

    Args:
        pieces: images (k, C, H, W).
        count: the total number of images.
        shape: of one, (C, H, W).
        labels: returns their labels, shape (n,), or None; called after the last image.
        origin: where they come from, before resizing.
        key: JSON values that determine the images and labels, for the name of the packed file.
        resolution: the new one; None keeps the size.
        limit: without a resolution, choose the natural one up to this.
        resize: how (see the module).
        memory_budget: bytes of pixels that may be kept in memory.
        cache: the folder for a packed file if they are more.

    Raises:
        ValueError: if the result exceeds the budget and cannot be written.
        ImportError: if they need resizing and Pillow is not installed.
    """
    channels, height, width = shape
    if resolution is None and limit is not None:
        resolution = natural_resolution([(height, width)], limit)
    if resolution is not None and (height, width) != height_and_width(resolution):
        require_pillow("resizing images")
        high, wide = height_and_width(resolution)
        text = resize_text(resolution, resize, [(height, width)])
        key = [*key, text]
        pieces = _resized(pieces, resolution, resize)
        enlarged = {"enlarged": count} if height < high or width < wide else {}
        origin = replace(
            origin,
            resized=text if origin.resized == "no" else f"{origin.resized}; {text}",
            conversions=origin.conversions | enlarged,
        )
        shape = (channels, high, wide)
    file = cache
    if count * math.prod(shape) > memory_budget:
        file, found = cached(cache, json.dumps(key), origin.notes)
        if found is not None:
            return found
    with Collector(count, shape, memory_budget=memory_budget, file=file, class_names=origin.class_names) as collector:
        for piece in pieces:
            collector.append(piece)
        return collector.finish(labels(), origin)


def _resized(
    pieces: Iterable[NDArray[np.uint8]], resolution: Resolution, resize: Resize
) -> Iterator[NDArray[np.uint8]]:
    """Bring images (k, C, H, W) to a resolution, one by one: a whole enlarged piece may take any amount of memory."""
    from PIL.Image import Resampling, fromarray

    high, wide = height_and_width(resolution)
    for piece in pieces:
        _, channels, height, width = piece.shape
        left, top, right, bottom = _box(width, height, resolution, resize)
        for pixels in piece[:, :, top:bottom, left:right]:
            plain = fromarray(np.ascontiguousarray(pixels[0] if channels == 1 else pixels.transpose(1, 2, 0)))
            small = np.asarray(plain.resize((wide, high), Resampling.LANCZOS)).reshape(high, wide, channels)
            yield small.transpose(2, 0, 1)[None]
