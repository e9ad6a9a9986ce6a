"""Decode one image file to pixels.

The manifest counts how often each of these rules changed an image:

- Orientation: a picture is turned as its EXIF or XMP tag says, wherever Pillow finds it.
- Colour: modes 1 and L (also with alpha) are greyscale; RGB, palette, CMYK and YCbCr images become RGB by Pillow's
  conversion; colour profiles are not applied. Unless asked otherwise, a set is greyscale only if all of its images are.
- Transparency: composited over the background, white unless asked otherwise, before greyscale is made of it.
- Depth: 8 bits per channel. Greyscale of 16 or 32 bits is refused, because only its owner knows which value maps to 255; of
  a colour PNG of 16 bits, Pillow reads the high bytes.
- Animations: the first frame.
- Size: kept, or brought to a resolution (see `_resizing`).
- An image of more than 89,478,485 pixels (Pillow's own limit) is refused as a decompression bomb, and so is one that would
  take more than 768 MiB to decode: a small file can claim that.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from stablefield._memory import size_text
from stablefield.data._archive import EntryFile
from stablefield.data._bounded_file import BoundedFile
from stablefield.data._colour import GREYED, REPEATED, rgb_of
from stablefield.data._image_set import PIXEL_LIMIT
from stablefield.data._resizing import Resize, Resolution, fit, height_and_width

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

__all__ = ["DECODING_MEMORY", "Header", "decode", "read_header"]

DECODING_MEMORY = 3 * 2**28
"""Bytes that all images being decoded at one time may take together."""
HEADER_BYTES = 2**25
"""Bytes of a file that may be read to learn the image's size; some decoders read the whole file for it."""
PIXEL_BYTES = 8
"""Further bytes that may be read for each pixel, to decode it: four channels of 16 bits."""
EXIF_BYTES = 2**20
TIFF_VALUES = 2**17
"""How many numbers one tag of a TIFF file may hold; each becomes an object. Most are offsets of strips."""
STRIP_PIXELS = 2**20

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "TGA", "AVIF")
"""Supported formats, whatever the file's name: Pillow knows more, and hands some of them to other programs."""
# Peak bytes per pixel while decoding: the measured memory of the decoder beside the image (planes of coefficients, the
# previous frame, wavelets of 32 bits), or the image and its converted copy, if that is more.
COST = {"WEBP": 16, "AVIF": 20, "JPEG2000": 26}
COST_PROGRESSIVE = 12
COST_OTHERS = 8
GREY_MODES = ("1", "L", "LA")
COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


@dataclass(frozen=True, kw_only=True)
class Header:
    """The properties of an image that are known before it is decoded."""

    height: int
    """Pixels, after orientation."""
    width: int
    """Pixels, after orientation."""
    grey: bool
    """Whether it is greyscale."""
    memory: int
    """Bytes that decoding it takes, without the resulting pixels."""


def read_header(
    file: BinaryIO | EntryFile, taken: Callable[[int], AbstractContextManager[object]] = nullcontext
) -> Header:
    """Read size and mode; decodes pixels only of a PNG file with metadata after its pixels.

    Args:
        file: an image file, open at its start.
        taken: returns a context that reserves this many bytes of memory.

    Raises:
        ValueError: if the kind, mode or size of image is not supported, with the remedy.
        Exception: whatever Pillow raises for a damaged file.
    """
    from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

    bounded = BoundedFile(file, HEADER_BYTES)
    with _opened(bounded) as image:
        _check(image)
        memory, mode = _memory(image, file), image.mode
        if image.format == "PNG":
            # `BoundedFile` keeps everything that it read of an archive's entry, so looking after the pixels takes memory.
            bounded.limit += PIXEL_BYTES * _area(image)
            with taken(memory):
                if _says_more_after_pixels(bounded):
                    image.load()
                turned = _orientation(image) >= 5
        else:
            turned = _orientation(image) >= 5
        # Pillow turns a TIFF itself, and `size` may already reflect that; the tags are those of the file.
        tiff = isinstance(image, TiffImageFile)
        size: tuple[int, int] = (image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]) if tiff else image.size
        width, height = reversed(size) if turned else size
        return Header(height=height, width=width, grey=mode in GREY_MODES, memory=memory)


def decode(
    file: BinaryIO | EntryFile,
    channels: int,
    resolution: Resolution | None = None,
    resize: Resize = "crop",
    background: str = "white",
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Decode an image file.

    Args:
        file: an image file whose header was read, open at its start.
        channels: 1 for greyscale or 3 for RGB.
        resolution: bring it to this side or height and width; None keeps its size.
        resize: how.
        background: the colour behind transparent pixels, a name of `background_name`.

    Returns:
        The pixels, shape (C, H, W), uint8, and the changes made, for the manifest.

    Raises:
        ValueError: if the kind, mode or size of image is not supported, with the remedy.
        Exception: whatever Pillow raises for a damaged file.
    """
    from PIL.Image import new

    bounded = BoundedFile(file, HEADER_BYTES)
    with _opened(bounded) as image:
        notes: list[str] = []
        _check(image)
        _memory(image, file)
        bounded.limit += PIXEL_BYTES * _area(image)
        if getattr(image, "is_animated", False):
            notes.append("first frame of several taken")
        grey, mode = image.mode in GREY_MODES, image.mode
        # Pillow turns a TIFF as it loads it, and drops the tag; a PNG may hold its orientation after its pixels.
        turned = image.format != "PNG" and _orientation(image) > 1
        image.load()
        plain: Image = image
        orientation = _orientation(image)
        if turned or orientation > 1:
            notes.append("turned as EXIF says")
        if orientation > 1:
            plain = _turned(image, orientation)
            image.close()
        target = "L" if channels == 1 else "RGB"
        if plain.mode != target or plain.has_transparency_data:
            # Strip by strip: the copies in between would take several times the memory of the image.
            converted = new(target, plain.size)
            transparent = False
            for box in _strips(plain):
                strip = plain.crop(box)
                if plain.has_transparency_data:
                    strip, any_transparent = _over(rgb_of(background), strip)
                    transparent |= any_transparent
                # Pillow makes greyscale of RGB alone.
                converted.paste((strip if strip.mode in GREY_MODES else strip.convert("RGB")).convert(target), box)
            plain = converted
            notes += [f"transparency composited over {background}"] * transparent
        if plain is not image:
            image.close()
        if mode in ("CMYK", "YCbCr"):
            notes.append(f"{mode} converted to RGB")
        if grey == (channels == 3):
            notes.append(REPEATED if grey else GREYED)
        if resolution is not None:
            height, width = height_and_width(resolution)
            if plain.height < height or plain.width < width:
                notes.append("enlarged")
            plain = fit(plain, resolution, resize)
        pixels = np.empty((channels, plain.height, plain.width), np.uint8)
        for left, top, right, bottom in _strips(plain):
            strip = np.asarray(plain.crop((left, top, right, bottom)))
            pixels[:, top:bottom] = strip.reshape(bottom - top, right, channels).transpose(2, 0, 1)
        return pixels, tuple(notes)


def _opened(file: BoundedFile) -> ImageFile:
    """Open the image in a file, if its kind is supported."""
    from PIL.Image import OPEN, init
    from PIL.Image import open as open_image

    init()
    _check_tiff(file)
    # `BoundedFile` has the methods of a file that Pillow uses.
    return open_image(cast("BinaryIO", file), formats=[name for name in FORMATS if name in OPEN])


def _check_tiff(file: BoundedFile) -> None:
    """Refuse a TIFF file with more numbers than its pixels need: Pillow makes an object of each, and of each strip."""
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is not None and len(head) == 16 and 42 in (head[2], head[3]):
        file.seek(struct.unpack(f"{order}I", head[4:8])[0])
        count, entry = struct.unpack(f"{order}H", file.read(2).ljust(2, b"\0"))[0], f"{order}HHI4s"
    elif order is not None and len(head) == 16 and 43 in (head[2], head[3]):
        file.seek(struct.unpack(f"{order}Q", head[8:])[0])
        count, entry = struct.unpack(f"{order}Q", file.read(8).ljust(8, b"\0"))[0], f"{order}HHQ8s"
    else:
        count, entry = 0, "<HHI4s"
    size = struct.calcsize(entry)
    table = file.read(min(count, 2**16) * size)
    for tag, kind, values, _ in struct.iter_unpack(entry, table[: len(table) // size * size]):
        # Pillow makes no objects of bytes and text.
        if values > TIFF_VALUES and kind not in (1, 2, 6, 7):
            raise ValueError(f"its TIFF tag {tag} holds {values:,} numbers, above {TIFF_VALUES:,}: save it again")
    file.seek(0)


def _area(image: ImageFile) -> int:
    """The number of pixels decoded at a time: the image, or a tile of a TIFF file if that is larger."""
    tags = getattr(image, "tag_v2", {})
    width, height = (tags.get(tag, 0) for tag in (322, 323))
    tile = width * height if isinstance(width, int) and isinstance(height, int) else 0
    return max(image.width * image.height, tile)


def _memory(image: ImageFile, file: BinaryIO | EntryFile) -> int:
    """The bytes that decoding takes; refuses an image that takes too many."""
    area = _area(image)
    whole = image.format in ("WEBP", "AVIF") or (image.format == "TIFF" and image.info.get("compression") != "raw")
    size = file.size if isinstance(file, EntryFile) else file.seek(0, os.SEEK_END) if whole else 0
    cost = COST.get(str(image.format), COST_PROGRESSIVE if "progressive" in image.info else COST_OTHERS)
    memory = cost * area + min(size, HEADER_BYTES + PIXEL_BYTES * area)
    if memory > DECODING_MEMORY:
        raise ValueError(
            f"{image.width} x {image.height} pixels of {image.format} take {size_text(memory)} to decode, above the limit "
            f"of {size_text(DECODING_MEMORY)} against decompression bombs: make it smaller first"
        )
    return memory


def _turned(image: Image, orientation: int) -> Image:
    from PIL.Image import Transpose

    return image.transpose(
        {
            2: Transpose.FLIP_LEFT_RIGHT,
            3: Transpose.ROTATE_180,
            4: Transpose.FLIP_TOP_BOTTOM,
            5: Transpose.TRANSPOSE,
            6: Transpose.ROTATE_270,
            7: Transpose.TRANSVERSE,
            8: Transpose.ROTATE_90,
        }[orientation]
    )


def _strips(image: Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of full rows (left, top, right, bottom) that cover an image, a million pixels each."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(image.height, top + rows)


def _check(image: Image) -> None:
    """Refuse an image that cannot be decoded faithfully."""
    if image.width * image.height > PIXEL_LIMIT:
        raise ValueError(
            f"{image.width} x {image.height} pixels, above the limit of {PIXEL_LIMIT:,} against decompression bombs: "
            "make it smaller first"
        )
    if image.mode not in GREY_MODES + COLOUR_MODES:
        raise ValueError(f"mode {image.mode} is not 8 bits of greyscale or colour: convert it to 8 bits first")


def _orientation(image: Image) -> int:
    """The EXIF or XMP orientation, 1 to 8, from the part of the file read so far."""
    from PIL.Image import Image as Plain

    if len(image.info.get("exif", b"")) > EXIF_BYTES:
        raise ValueError(f"its EXIF block has more than {EXIF_BYTES:,} bytes: save it again without EXIF")
    # Pillow's PNG class would decode a file without EXIF before its pixels; its base class reads only what is loaded.
    orientation = Plain.getexif(image).get(0x0112, 1)
    return orientation if orientation in range(1, 9) else 1


def _says_more_after_pixels(file: BoundedFile) -> bool:
    """Whether a PNG has EXIF or text after its pixels, by its chunk headers; restores the file's position."""
    start, place, pixels = file.tell(), 8, False
    try:
        while True:
            file.seek(place)
            head = file.read(8)
            kind = head[4:]
            if kind == b"IEND" or not re.fullmatch(rb"\w{4}", kind):
                return False
            if pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            pixels = pixels or kind == b"IDAT"
            place += 12 + int.from_bytes(head[:4], "big")
    finally:
        file.seek(start)


def _over(ground: tuple[int, int, int], image: Image) -> tuple[Image, bool]:
    """Composite over a colour, as RGB; also returns whether any pixel was transparent."""
    from PIL.Image import new

    layered = image.convert("RGBA")
    alpha = layered.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return layered.convert("RGB"), False
    below = new("RGB", image.size, ground)
    below.paste(layered.convert("RGB"), mask=alpha)
    return below, True
