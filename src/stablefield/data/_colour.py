"""Colour of images: greyscale or RGB for all of them, and the background behind transparent pixels.

Greyscale is ITU-R 601's luma in the fixed point of Pillow, (19595 r + 38470 g + 7471 b + 32768) >> 16.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stablefield._shapes import check_kind
from stablefield.data._image_set import ImageSet
from stablefield.data._resizing import gathered_set, origin_of
from stablefield.data._scaling import chunks

__all__ = ["GREYED", "REPEATED", "Colour", "background_name", "channels_of", "check_colour", "converted_set", "rgb_of"]

Colour: TypeAlias = Literal["auto", "grey", "rgb"]
"""Greyscale or RGB for all images; auto is greyscale only if all of them are."""

GREYED = "colour converted to greyscale"
REPEATED = "greyscale repeated to RGB"
"""What happened to an image, in a manifest."""

_NAMED = {"white": "#ffffff", "black": "#000000"}


def background_name(background: str) -> str:
    """The one name of a background: white, black, or #rrggbb in small letters.

    Raises:
        ValueError: if it is none of these.
    """
    check_kind("background", background, str, "white, black or a colour #rrggbb")
    code = _NAMED.get(background.lower(), background.lower())
    if not re.fullmatch("#[0-9a-f]{6}", code):
        raise ValueError(f"background={background}: pass white, black or a colour #rrggbb, such as #808080.")
    return next((name for name, named in _NAMED.items() if named == code), code)


def rgb_of(background: str) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of a background that `background_name` returned."""
    red, green, blue = bytes.fromhex(_NAMED.get(background, background).removeprefix("#"))
    return red, green, blue


def check_colour(colour: Colour) -> None:
    """Refuse an unknown colour."""
    check_kind("colour", colour, str, "'auto', 'grey' or 'rgb'")
    if colour not in ("auto", "grey", "rgb"):
        raise ValueError(f"colour={colour!r}: pass 'auto', 'grey' or 'rgb'.")


def channels_of(colour: Colour, *, grey: bool) -> int:
    """The channels of a set of images; `grey` says whether all of them are greyscale."""
    return (1 if grey else 3) if colour == "auto" else 1 if colour == "grey" else 3


def converted_set(images: ImageSet, colour: Colour, *, memory_budget: int, cache: Path) -> ImageSet:
    """Make all images of a set greyscale or RGB; returns the set itself if they are.

    Args:
        images: the set, of 8-bit images.
        colour: what to make of them.
        memory_budget: bytes of pixels that may be kept in memory.
        cache: the folder for a packed file if they are more.

    Raises:
        ValueError: if the result exceeds the budget and cannot be written.
    """
    channels, height, width = images.shape
    wanted = channels_of(colour, grey=channels == 1)
    if wanted == channels:
        return images
    origin = origin_of(images)
    change = GREYED if wanted == 1 else REPEATED
    manifest = images.manifest
    return gathered_set(
        (_grey(piece) if wanted == 1 else piece.repeat(3, axis=1) for piece in chunks(images.images)),
        len(images),
        (wanted, height, width),
        lambda: images.labels,
        replace(origin, conversions=origin.conversions | {change: len(images)}),
        key=[manifest["sha256"], manifest["labels_sha256"], images.class_names, images.recorded_notes, wanted],
        resolution=None,
        limit=None,
        resize="crop",
        memory_budget=memory_budget,
        cache=cache,
    )


def _grey(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Greyscale (k, 1, H, W) of RGB images (k, 3, H, W)."""
    red, green, blue = images.astype(np.uint32).transpose(1, 0, 2, 3)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(np.uint8)[:, None]
