"""One image file: from its bytes to pixels.

The rules, each counted in the manifest where it changed something:

- Orientation: a picture is turned as its EXIF or XMP tag says, wherever Pillow finds it.
- Colour: modes 1 and L (also with alpha) are greyscale; RGB, palette, CMYK and YCbCr images become RGB by Pillow's
  conversion; colour profiles are not applied. A set is greyscale only if all of its images are.
- Transparency: composited over white.
- Depth: 8 bits per channel. Greyscale of 16 or 32 bits is refused, because only its owner knows what maps to 255; a colour
  PNG of 16 bits is read by Pillow as its high bytes.
- Animations: the first frame.
- Size: kept, or brought to a wanted resolution (see `resizing`).
- An image of more than 89,478,485 pixels (Pillow's own limit) is refused as a decompression bomb.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from stablefield.data.resizing import Resize, Resolution, fit, height_and_width

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Header", "decode", "read_header"]

PIXEL_LIMIT = 89_478_485
GREY_MODES = ("1", "L", "LA")
COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


@dataclass(frozen=True, kw_only=True)
class Header:
    """What is known of an image before it is decoded."""

    height: int
    """Pixels, after orientation."""
    width: int
    """Pixels, after orientation."""
    grey: bool
    """Whether it is greyscale."""


def read_header(file: BinaryIO) -> Header:
    """Read size and mode; no pixel is decoded.

    Args:
        file: an image file, open at its start.

    Raises:
        ValueError: if the kind, mode or size of image is not understood, with the remedy.
        Exception: whatever Pillow raises for a damaged file.
    """
    from PIL.Image import open as open_image
    from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

    with open_image(file) as image:
        late = image.format != "PNG" or _says_more_after_pixels(file)
        turned = _check(image, late=late) >= 5
        # Pillow turns a TIFF by itself, and its size may say so already; the tags are those of the file.
        tiff = isinstance(image, TiffImageFile)
        size: tuple[int, int] = (image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]) if tiff else image.size
        width, height = reversed(size) if turned else size
        return Header(height=height, width=width, grey=image.mode in GREY_MODES)


def decode(
    data: bytes, channels: int, resolution: Resolution | None = None, resize: Resize = "crop"
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Decode an image file.

    Args:
        data: the bytes of the file.
        channels: 1 or 3; a colour image has no 1-channel form here.
        resolution: bring it to this side or height and width; None keeps its size.
        resize: how.

    Returns:
        The pixels, shape (C, H, W), uint8, and what was done to them, for the manifest.

    Raises:
        ValueError: if the kind, mode or size of image is not understood, with the remedy.
        Exception: whatever Pillow raises for a damaged file.
    """
    from PIL import ImageOps
    from PIL.Image import open as open_image

    with open_image(io.BytesIO(data)) as image:
        notes: list[str] = []
        orientation = _check(image, late=True)
        if getattr(image, "n_frames", 1) > 1:
            notes.append("first frame of several taken")
        plain: Image = image
        if orientation > 1:
            plain = ImageOps.exif_transpose(image)
            notes.append("turned as EXIF says")
        grey = image.mode in GREY_MODES
        if plain.has_transparency_data:
            plain, transparent = _over_white(plain, "L" if grey else "RGB")
            notes += ["transparency composited over white"] * transparent
        if image.mode in ("CMYK", "YCbCr"):
            notes.append(f"{image.mode} converted to RGB")
        if grey and channels == 3:
            notes.append("greyscale repeated to RGB")
        plain = plain.convert("L" if channels == 1 else "RGB")
        if resolution is not None:
            height, width = height_and_width(resolution)
            if plain.height < height or plain.width < width:
                notes.append("enlarged")
            plain = fit(plain, resolution, resize)
        pixels = np.asarray(plain).reshape(plain.height, plain.width, channels)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)), tuple(notes)


def _check(image: Image, *, late: bool) -> int:
    """Refuse what cannot be decoded faithfully; return the EXIF orientation, 1 to 8.

    Args:
        image: an image file, open.
        late: whether to look behind the pixels as well, for which Pillow decodes a PNG.
    """
    from PIL.Image import Image as Plain

    if image.width * image.height > PIXEL_LIMIT:
        raise ValueError(
            f"{image.width} x {image.height} pixels, above the limit of {PIXEL_LIMIT:,} against decompression bombs: "
            "make it smaller first"
        )
    if image.mode not in GREY_MODES + COLOUR_MODES:
        raise ValueError(f"mode {image.mode} is not 8 bits of greyscale or colour: convert it to 8 bits first")
    # Pillow's own class for PNG decodes one without EXIF in front of its pixels; the class below it looks at what is known.
    orientation = (image.getexif() if late else Plain.getexif(image)).get(0x0112, 1)
    return orientation if orientation in range(1, 9) else 1


def _says_more_after_pixels(file: BinaryIO) -> bool:
    """Whether a PNG has EXIF or text behind its pixels, by the heads of its chunks; the file's position is kept."""
    start, place, pixels = file.tell(), 8, False
    try:
        while True:
            file.seek(place)
            head = file.read(8)
            kind = head[4:]
            if len(head) < 8 or kind == b"IEND":
                return False
            if pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            pixels = pixels or kind == b"IDAT"
            place += 12 + int.from_bytes(head[:4], "big")
    finally:
        file.seek(start)


def _over_white(image: Image, mode: str) -> tuple[Image, bool]:
    """Composite over white; also whether any pixel was transparent."""
    from PIL.Image import new

    layered = image.convert("RGBA")
    alpha = layered.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return layered.convert(mode), False
    ground = new("RGB", image.size, (255, 255, 255))
    ground.paste(layered.convert("RGB"), mask=alpha)
    return ground.convert(mode), True
