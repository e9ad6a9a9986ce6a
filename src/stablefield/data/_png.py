"""Pictures: images tiled into one array, and PNG files.

Tiling lays n images (C, H, W) out row by row on a white ground. It enlarges small images by a whole factor, so that each
pixel becomes a sharp square. Images with classes are laid out in the order of the classes, with a caption where a class
begins.
"""

import math
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablefield._atomic_file import write_atomically
from stablefield._shapes import check_kind, whole_number
from stablefield.data._image_set import class_text
from stablefield.data._pillow import require_pillow

__all__ = ["PICTURES", "as_pictures", "caption", "class_grid", "is_picture", "tile", "write_picture", "write_png"]

PICTURES = (".png", ".jpg", ".jpeg")
"""Suffixes of the pictures that `write_picture` writes."""
PICTURE_WIDTH = 1000
CELL_WIDTH = 128
CAPTION = 13
"""Size of the letters of a caption, in pixels."""
# Not a character by definition: fonts draw it with their glyph for missing characters.
_NO_LETTER = "\uffff"


def is_picture(shape: Sequence[int]) -> bool:
    """Whether samples of a shape can be shown as pictures: (1, H, W) or (3, H, W)."""
    return len(shape) == 3 and shape[0] in (1, 3)


def as_pictures(images: NDArray[Any]) -> NDArray[np.uint8]:
    """8-bit images as they are; float ones (n, C, H, W) with their smallest value as 0 and their largest as 255.

    Raises:
        ValueError: if the samples have another shape than (1 or 3, H, W).
    """
    if images.dtype == np.uint8:
        return images
    if not is_picture(images.shape[1:]):
        raise ValueError(
            f"samples of shape {images.shape[1:]} cannot be shown: a picture is (1, H, W) or (3, H, W). Save arrays as .npz."
        )
    values = images.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    return ((values - low) * (255 / (high - low or 1.0))).round().astype(np.uint8)


def tile(
    images: NDArray[np.uint8], columns: int | None = None, scale: int | None = None, padding: int = 2
) -> NDArray[np.uint8]:
    """Lay images out as one picture.

    Args:
        images: shape (n, C, H, W), uint8, C = 1 or 3.
        columns: images per row; by default as many as make the grid about square.
        scale: the whole factor to enlarge by; by default the largest that keeps the picture within 1000 pixels and an
            image within 128 pixels of width, and at least 1.
        padding: white pixels around every image, after enlarging.

    Returns:
        The picture, shape (height, width, C), uint8.

    Raises:
        ValueError: if `images` is not such an array, or a number is out of range.
    """
    check_kind("images", images, np.ndarray, "a numpy array of uint8, shape (n, C, H, W)")
    for name, value in (("columns", columns), ("scale", scale), ("padding", padding)):
        if value is not None:
            whole_number(name, value)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or images.size == 0:
        raise ValueError(
            f"images has dtype {images.dtype} and shape {images.shape}: tile takes uint8 of shape (n, C, H, W), C = 1 or 3."
        )
    n, channels, height, width = images.shape
    if columns is None:
        columns = math.ceil(math.sqrt(n))
    if columns < 1 or padding < 0 or (scale is not None and scale < 1):
        raise ValueError(
            f"columns={columns}, scale={scale}, padding={padding}: columns and scale must be at least 1, padding at least 0."
        )
    if scale is None:
        scale = _scale(columns, width, padding)
    rows = math.ceil(n / columns)
    large = images.repeat(scale, axis=2).repeat(scale, axis=3).transpose(0, 2, 3, 1)
    high, wide = height * scale, width * scale
    shape = (rows * (high + padding) + padding, columns * (wide + padding) + padding, channels)
    picture = np.full(shape, 255, np.uint8)
    for i, image in enumerate(large):
        top = padding + (i // columns) * (high + padding)
        left = padding + (i % columns) * (wide + padding)
        picture[top : top + high, left : left + wide] = image
    return picture


def class_grid(
    images: NDArray[Any], labels: NDArray[np.int64] | None, class_names: Sequence[str] | None = None
) -> NDArray[np.uint8]:
    """Lay images out by class, each class with a caption of its number and name.

    A few classes each start a new row; many follow one another.

    Args:
        images: shape (n, C, H, W), C = 1 or 3, uint8 or floats (see `as_pictures`); images of one class keep their order.
        labels: class numbers, -1 for none, shape (n,); None for images without classes, which `tile` lays out.
        class_names: class names, if known.

    Returns:
        The picture, shape (height, width, C), uint8.

    Raises:
        ValueError: if `images` is not such an array, or `labels` does not fit.
        ImportError: if Pillow is not installed.
    """
    images = as_pictures(images)
    if labels is None:
        return tile(images)
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels has shape {labels.shape}: pass one class number per image, shape ({len(images)},).")
    classes, counts = np.unique(labels, return_counts=True)
    columns = math.ceil(math.sqrt(len(images)))
    wide = min(int(counts.max(initial=1)), 2 * columns)
    lines = int((-(-counts // wide)).sum())
    if len(counts) > 1 and lines <= 2 * wide and lines * wide <= 2 * len(images):
        columns = wide
        rows = [group for c in classes for group in _split(np.flatnonzero(labels == c), columns)]
    else:
        rows = _split(np.argsort(labels, kind="stable"), columns)
    padding = 2
    scale = _scale(max(columns, len(rows)), images.shape[3], padding)
    width = columns * (images.shape[3] * scale + padding) + padding
    parts: list[NDArray[np.uint8]] = []
    named: set[int] = set()
    for row in rows:
        begins = [place for place, i in enumerate(row) if int(labels[i]) not in named and not named.add(int(labels[i]))]
        if begins:
            numbers = [int(labels[row[place]]) for place in begins]
            texts = [(class_text(number, class_names), class_text(number, None)) for number in numbers]
            lefts = [padding + place * (images.shape[3] * scale + padding) for place in begins]
            parts.append(_captions(texts, [*lefts, width], images.shape[1]))
        parts.append(_widened(tile(images[row], len(row), scale, padding), width))
    return np.concatenate(parts)


def caption(text: str, width: int, channels: int) -> NDArray[np.uint8]:
    """A strip with a caption, shape (height, width, channels), uint8; a text that is too long is cut.

    Raises:
        ImportError: if Pillow is not installed.
    """
    return _captions([(text, text)], [2, width], channels)


def _split(places: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [places[start : start + size] for start in range(0, len(places), size)]


def _widened(picture: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    return np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)), constant_values=255)


def _captions(texts: Sequence[tuple[str, str]], edges: Sequence[int], channels: int) -> NDArray[np.uint8]:
    """A strip of captions, each cut before the next one begins.

    Args:
        texts: each caption, and its fallback where the font lacks a letter.
        edges: where each begins, and where the strip ends.
        channels: of the strip.
    """
    require_pillow("drawing captions")
    from PIL import Image, ImageDraw

    font = _font()
    strip = Image.new("L", (edges[-1], CAPTION + 6), 255)
    drawing = ImageDraw.Draw(strip)
    for (text, plain), left, right in zip(texts, edges[:-1], edges[1:], strict=True):
        # A letter and its accent may be two characters, as in names from a Mac, and would be drawn side by side.
        composed = unicodedata.normalize("NFC", text)
        printed = "".join(letter if letter.isprintable() else "?" for letter in composed)
        shown = cut = printed if all(map(partial(_has, font), printed)) else plain
        while cut and drawing.textlength(shown, font) > right - left - 4:
            cut = cut[:-1]
            shown = f"{cut.rstrip()}..."
        drawing.text((left + 1, 3), shown, fill=40, font=font)
    return np.repeat(np.asarray(strip)[:, :, None], channels, axis=2)


def _font() -> Any:
    """The font of captions: matplotlib's, with Latin, Greek and Cyrillic letters, else Pillow's, which has few."""
    from PIL import ImageFont

    try:
        found = find_spec("matplotlib")  # locates it without importing it
        folder = None if found is None or found.origin is None else Path(found.origin).parent
        if folder is not None:
            with suppress(OSError):
                return ImageFont.truetype(str(folder / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"), CAPTION - 1)
        return ImageFont.load_default(CAPTION)
    except (ImportError, OSError):  # Pillow without FreeType has one small font, of Latin letters
        return ImageFont.load_default()


def _has(font: Any, letter: str) -> bool:
    """Whether a font draws a letter rather than a box."""
    # The font has these letters, but would neither join them nor draw them from right to left.
    if unicodedata.bidirectional(letter) in ("R", "AL"):
        return False
    try:
        drawn = font.getmask(letter)
    except UnicodeEncodeError:  # the small font has nothing beyond Latin-1
        return False
    try:
        missing = font.getmask(_NO_LETTER)
    except UnicodeEncodeError:
        return True
    return letter.isspace() or drawn.size != missing.size or bytes(drawn) != bytes(missing)


def _scale(columns: int, width: int, padding: int) -> int:
    room = (PICTURE_WIDTH - padding * (columns + 1)) // (columns * width)
    return max(1, min(room, CELL_WIDTH // width))


def write_png(path: str | Path, array: NDArray[np.uint8]) -> Path:
    """Write a picture as a PNG file, atomically, as `write_picture` does."""
    return _write(path, array, jpeg=False)


def write_picture(path: str | Path, array: NDArray[np.uint8]) -> Path:
    """Write a picture atomically, as JPEG if the file name ends in .jpg or .jpeg, else as PNG.

    Args:
        path: the file, which is replaced if it exists; missing folders are created.
        array: shape (height, width), (height, width, 1) or (height, width, 3), uint8.

    Returns:
        The path.

    Raises:
        ValueError: if `array` is not a picture.
        ImportError: if Pillow is not installed.
    """
    check_kind("path", path, (str, Path), "the path of the file to write")
    return _write(path, array, jpeg=Path(path).suffix.lower() in (".jpg", ".jpeg"))


def _write(path: str | Path, array: NDArray[np.uint8], *, jpeg: bool) -> Path:
    check_kind("path", path, (str, Path), "the path of the file to write")
    check_kind("array", array, np.ndarray, "a numpy array of uint8, shape (height, width, 1 or 3)")
    picture = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if picture.dtype != np.uint8 or picture.size == 0 or (picture.ndim != 2 and picture.shape[2:] != (3,)):
        raise ValueError(
            f"array has dtype {array.dtype} and shape {array.shape}: a picture is uint8 of shape (height, width, 1 or 3); "
            "pass a batch of images through tile first."
        )
    require_pillow("writing a picture")
    from PIL import Image

    path = Path(path)
    if not path.name or path.is_dir():
        raise ValueError(f"path {str(path)!r} is a folder: name the file to write, such as samples.png.")
    image = Image.fromarray(np.ascontiguousarray(picture))
    look: dict[str, Any] = {"format": "JPEG", "quality": 95, "subsampling": 0} if jpeg else {"format": "PNG"}
    write_atomically(path, lambda temporary: image.save(temporary, **look))
    return path
