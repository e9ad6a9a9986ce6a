"""Pictures for people: images tiled into one array, and PNG files.

Tiling lays n images (C, H, W) out row by row on a white ground. Small images are enlarged by a whole factor, each
pixel becoming a square, so that what is seen is what is there.
"""

import math
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stablefield.data.pillow import require_pillow
from stablefield.shapes import check_kind, whole_number

__all__ = ["tile", "write_png"]

PICTURE_WIDTH = 1000
CELL_WIDTH = 128


def tile(
    images: NDArray[np.uint8], columns: int | None = None, scale: int | None = None, padding: int = 2
) -> NDArray[np.uint8]:
    """Lay images out as one picture.

    Args:
        images: shape (n, C, H, W), uint8, C = 1 or 3.
        columns: images per row; by default as many as make the grid about square.
        scale: by which whole factor to enlarge; by default the largest that keeps the picture within 1000 pixels and an
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
        room = (PICTURE_WIDTH - padding * (columns + 1)) // (columns * width)
        scale = max(1, min(room, CELL_WIDTH // width))
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


def write_png(path: str | Path, array: NDArray[np.uint8]) -> Path:
    """Write a picture as a PNG file, whole or not at all.

    Args:
        path: the file; folders on the way are made, a file of that name is replaced.
        array: shape (height, width), (height, width, 1) or (height, width, 3), uint8.

    Returns:
        The path.

    Raises:
        ValueError: if `array` is not a picture.
        ImportError: if Pillow is not installed.
    """
    check_kind("path", path, (str, Path), "the path of the file to write")
    check_kind("array", array, np.ndarray, "a numpy array of uint8, shape (height, width, 1 or 3)")
    picture = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if picture.dtype != np.uint8 or picture.size == 0 or (picture.ndim != 2 and picture.shape[2:] != (3,)):
        raise ValueError(
            f"array has dtype {array.dtype} and shape {array.shape}: a picture is uint8 of shape (height, width, 1 or 3); "
            "pass a batch of images through tile first."
        )
    require_pillow("writing a PNG file")
    from PIL import Image

    path = Path(path)
    if not path.name or path.is_dir():
        raise ValueError(f"path {str(path)!r} is a folder: name the file to write, such as samples.png.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        Image.fromarray(np.ascontiguousarray(picture)).save(temporary, format="PNG")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
