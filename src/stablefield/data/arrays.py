"""Arrays of images in .npy and .npz files.

Pixels are uint8, (n, H, W) for greyscale, (n, C, H, W) or (n, H, W, C) with C = 1 or 3; which of them it is must be
plain from the shape. In an .npz the images are called `images`, `x` or `arr_0` (or, with a split, `train_images`,
`x_train`), the labels `labels` or `y` (`train_labels`, `y_train`), or `arr_1` beside `arr_0` as in ADM's files, and the
names of the classes, if they are there, `class_names`. A .npy file is mapped; the images of an .npz are read
into memory up to a budget and into a packed file beyond it. Nothing that needs pickle is read.
"""

import json
import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from stablefield.data.collector import Collector, cached
from stablefield.data.image_files import stamp
from stablefield.data.image_set import ImageSet, Origin, labels_sha256, make_image_set

__all__ = ["open_npy", "open_npz"]

NAMES_LIMIT = 2**24
"""Bytes that the names of the classes may take."""


def open_npy(path: Path) -> ImageSet:
    """Map the images of a .npy file into memory.

    Raises:
        ValueError: if the file is damaged, or its dtype or shape is not that of images (see the module).
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is cut short, damaged, or holds Python objects ({error}): save it again.") from error
    layout, view = _layout(str(path), array.dtype, array.shape)
    return make_image_set(view(array), None, Origin(name=path.stem, source=f"array file {path.name}, read as {layout}"))


def open_npz(path: Path, split: str = "train", *, memory_budget: int, cache: Path) -> ImageSet:
    """Read the images and labels of an .npz file.

    Args:
        path: the file.
        split: which of its splits, where its arrays are named after splits.
        memory_budget: bytes of pixels that may be kept in memory.
        cache: the folder for a packed file if they are more.

    Raises:
        ValueError: if the file is damaged, holds no array of images under a known name, or their dtype or shape is not that
            of images (see the module).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            images_key, labels_key = _keys(path, names, split)
            labels = None if labels_key is None else _labels(path, archive, labels_key)
            named = labels is not None and "class_names" in names
            class_names = _class_names(path, archive) if named else None
            with archive.open(f"{images_key}.npy") as file:
                return _images(path, file, images_key, labels, class_names, memory_budget, cache)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is cut short or damaged ({error}): save it again.") from error


def _keys(path: Path, names: set[str], split: str) -> tuple[str, str | None]:
    plain = ("images", "x", "arr_0") if split == "train" else ()
    images = [key for key in (*plain, f"{split}_images", f"x_{split}") if key in names]
    if len(images) != 1:
        raise ValueError(
            f"{path} holds the arrays {', '.join(sorted(names))}: exactly one of them should hold the images of split "
            f"{split!r} and be called images (or x, arr_0, {split}_images, x_{split})."
        )
    labels = {
        "images": "labels",
        "x": "y",
        "arr_0": "arr_1",
        f"{split}_images": f"{split}_labels",
        f"x_{split}": f"y_{split}",
    }
    fallback = [key for key in ("labels", "y") if key in names and split == "train"]
    own = labels.get(images[0])
    # A name that says what it is comes before the place in a list.
    found = [*fallback, own] if own == "arr_1" else [own, *fallback]
    return images[0], next((key for key in found if key in names), None)


def _class_names(path: Path, archive: zipfile.ZipFile) -> tuple[str, ...]:
    with archive.open("class_names.npy") as file:
        read_header = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read_header(file)
        size = math.prod(shape) * dtype.itemsize
        if len(shape) != 1 or dtype.kind != "U" or size > NAMES_LIMIT:
            raise ValueError(
                f"{path}: class_names has dtype {dtype} and shape {shape}: save one text per class, shape (classes,)."
            )
        content = file.read(size)
        if len(content) != size:
            raise EOFError("class_names is shorter than its header says")
        return tuple(str(name) for name in np.frombuffer(content, dtype))


def _labels(path: Path, archive: zipfile.ZipFile, key: str) -> NDArray[np.int64]:
    with archive.open(f"{key}.npy") as file:
        labels: NDArray[np.int64] = npy.read_array(file, allow_pickle=False)
    if labels.dtype.kind not in "iu" or labels.size != max(labels.shape, default=0):
        raise ValueError(
            f"{path}: {key} has dtype {labels.dtype} and shape {labels.shape}: labels are whole numbers, one per image, "
            "shape (n,); from one-hot rows they are had by argmax(1)."
        )
    return labels.reshape(-1).astype(np.int64)


def _images(
    path: Path,
    file: IO[bytes],
    key: str,
    labels: NDArray[np.int64] | None,
    class_names: tuple[str, ...] | None,
    memory_budget: int,
    cache: Path,
) -> ImageSet:
    version = npy.read_magic(file)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    layout, view = _layout(f"{path}: {key}", dtype, shape)
    if fortran:
        raise ValueError(f"{path}: {key} lies in Fortran order: save np.ascontiguousarray of it.")
    if labels is not None and len(labels) != shape[0]:
        raise ValueError(f"{path} has {len(labels):,} labels for {shape[0]:,} images: save one label per image.")
    size, row = math.prod(shape), math.prod(shape[1:])
    packed, found = cached(
        cache, json.dumps([str(path.resolve()), *stamp(path), key, labels_sha256(labels), class_names])
    )
    if size > memory_budget and found is not None:
        return found
    origin = Origin(name=path.stem, source=f"array {key} of {path.name}, read as {layout}", class_names=class_names)
    image_shape = view(np.empty((1, *shape[1:]), np.uint8)).shape[1:]
    rows = max(1, 2**24 // row)
    with Collector(
        shape[0], image_shape, memory_budget=memory_budget, file=packed, class_names=class_names
    ) as collector:
        for start in range(0, shape[0], rows):
            count = min(rows, shape[0] - start)
            content = file.read(count * row)
            if len(content) != count * row:
                raise EOFError(f"{key} is shorter than its header says")
            collector.append(view(np.frombuffer(content, np.uint8).reshape(count, *shape[1:])))
        return collector.finish(labels, origin)


def _layout(
    what: str, dtype: np.dtype[np.generic], shape: tuple[int, ...]
) -> tuple[str, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]]:
    """The layout of an array of images, and the function that makes (n, C, H, W) of it without a copy."""
    if dtype != np.uint8:
        raise ValueError(
            f"{what} has dtype {dtype}: images are uint8, 0 to 255. From values in [0, 1]: "
            "(x * 255).round().clip(0, 255).astype('uint8'); from values in [-1, 1]: ((x + 1) * 127.5) instead of x * 255."
        )
    if len(shape) == 3 and shape[2] in (1, 3, 4) and math.prod(shape):
        raise ValueError(
            f"{what} has shape {shape}, which may be one image (H, W, C) as well as {shape[0]:,} greyscale images "
            f"(n, H, W) of {shape[2]} pixels' width: save one image as x[None], shape {(1, *shape)}"
            f"{', without its alpha channel' if shape[2] == 4 else ''}, and several in one array (n, H, W, C)."
        )
    if len(shape) == 3 and math.prod(shape):
        return "NHW", lambda x: x[:, None]
    first, last = (shape[1] in (1, 3), shape[3] in (1, 3)) if len(shape) == 4 else (False, False)
    if math.prod(shape) == 0 or not (first or last):
        raise ValueError(
            f"{what} has shape {shape}: images are (n, H, W), (n, C, H, W) or (n, H, W, C), with n above 0 and C = 1 or 3; "
            "drop an alpha channel."
        )
    if first and last:
        raise ValueError(
            f"{what} has shape {shape}, which may be (n, C, H, W) as well as (n, H, W, C): save it such that one of the two "
            "axes is neither 1 nor 3; greyscale images as (n, H, W)."
        )
    return ("NCHW", lambda x: x) if first else ("NHWC", lambda x: x.transpose(0, 3, 1, 2))
