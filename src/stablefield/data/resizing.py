"""Bringing images to a resolution: cut to a square or squashed to one, then resampled.

"crop" takes the largest centred square (of an odd difference the extra row or column is cut at the far side), "squash" the
whole image; what was taken is resampled by Pillow's Lanczos filter, sinc(x) sinc(x / 3) for |x| < 3, widened by the factor
of reduction so that it does not alias. An image that has the size already is left as it is. The manifest says what was done.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from stablefield.data.collector import Collector, cached
from stablefield.data.image_set import ImageSet, Origin
from stablefield.data.pillow import require_pillow
from stablefield.shapes import check_kind

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Resize", "check_resize", "fit", "natural_resolution", "resize_text", "resized_set"]

Resize: TypeAlias = Literal["crop", "squash"]


def check_resize(resolution: int | None, resize: Resize) -> None:
    """Refuse a resolution below 1 and an unknown way of resizing."""
    if resolution is not None and not 1 <= resolution <= 8192:
        raise ValueError(f"resolution={resolution}: pass the wanted side of the images in pixels, 1 to 8192.")
    check_kind("resize", resize, str, "'crop' or 'squash'")
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

    width, height = image.size
    if resize == "crop" and width != height:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        # Cut first: resize(box=...) would let the filter look at what lies outside of the square.
        image = image.crop((left, top, left + side, top + side))
    return image.resize((resolution, resolution), Resampling.LANCZOS)


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
    channels, height, width = images.shape
    if (height, width) == (resolution, resolution):
        return images
    require_pillow("resizing images")
    from PIL import Image

    before = images.manifest
    text = resize_text(resolution, resize)
    key = json.dumps([before["sha256"], before["labels_sha256"], images.class_names, images.shape, text])
    file, found = cached(cache, key)
    if found is not None:
        return found
    shape = (channels, resolution, resolution)
    origin = Origin(
        name=images.name,
        source=str(before.get("source", "")),
        class_names=images.class_names,
        resized=text if before.get("resized", "no") == "no" else f"{before['resized']}; {text}",
        conversions=dict(before.get("conversions", {}))
        | ({"enlarged": len(images)} if min(height, width) < resolution else {}),
        skipped=int(before.get("skipped", 0)),
        skipped_files=tuple(before.get("skipped_files", ())),
    )
    with Collector(
        len(images), shape, memory_budget=memory_budget, file=file, class_names=images.class_names
    ) as collector:
        for pixels in images.images:
            plain = Image.fromarray(np.ascontiguousarray(pixels[0] if channels == 1 else pixels.transpose(1, 2, 0)))
            small = np.asarray(fit(plain, resolution, resize)).reshape(resolution, resolution, channels)
            collector.append(small.transpose(2, 0, 1)[None])
        return collector.finish(images.labels, origin)
