"""Arrays of images, or of float data, in .npy and .npz files.

Pixels are uint8, (n, H, W) for greyscale, (n, C, H, W) or (n, H, W, C) with C = 1 or 3; the shape must show which it is. In
an .npz the images are called `images`, `x` or `arr_0` (or, with a split, `train_images`, `x_train`), the labels `labels` or
`y` (`train_labels`, `y_train`), or `arr_1` beside `arr_0` as in ADM's files, and the class names, if there are any,
`class_names`. A note names an array of whole numbers, one per image, that may hold labels under another name. A .npy file is
mapped into memory; the images of an .npz are read into memory up to a budget and into a packed file beyond it. Arrays that
need pickle are refused.

Float arrays are latents (n, C, H, W), signals (n, C, L) or vectors (n, d), of any meaning. In an .npz they may also be
called `data` or `latents`. They are kept as they are, and have a `Scaling`.
"""

import io
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from stablefield._memory import size_text
from stablefield._regular_file import open_regular
from stablefield.data._archive import Archive, Readable
from stablefield.data._image_files import names_labels, stamp
from stablefield.data._image_set import (
    CLASS_LIMIT,
    PIXEL_LIMIT,
    ImageSet,
    MissingSplitError,
    Origin,
    check_class_names,
    check_label_count,
    make_image_set,
)
from stablefield.data._raw_array import mapped, read_rows
from stablefield.data._resizing import Resize, Resolution, gathered_set
from stablefield.data._scaling import check_floats

__all__ = ["AS_THEY_ARE", "open_npy", "open_npz"]

AS_THEY_ARE = "float data are taken as they are"
"""How the note begins that says what float data are taken for."""
HEADER_LIMIT = 10_000
"""Bytes of a .npy header: NumPy itself accepts no more."""
NAMES_LIMIT = 2**24
"""Bytes that the class names may take."""


def open_npy(path: Path) -> ImageSet:
    """Map the images, or the float data, of a .npy file into memory.

    Raises:
        ValueError: if the file is damaged, its dtype or shape is not that of images or float data (see the module), or float
            data hold NaN or infinite values.
    """
    try:
        with open_regular(path) as file:
            shape, fortran, dtype = _header(str(path), file)
            layout, view = _layout(str(path), dtype, shape)
            start, size = file.tell(), file.seek(0, os.SEEK_END)
            if size < start + math.prod(shape) * dtype.itemsize:
                raise ValueError(
                    f"{path} is cut short or damaged: it has {size:,} bytes, but its header states shape {shape}; save it "
                    "again."
                )
            array = mapped(file, path, start, shape, "F" if fortran else "C", dtype)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    origin = Origin(name=path.stem, source=f"array file {path.name}, read as {layout}", notes=_notes(dtype, shape))
    return make_image_set(view(array), None, origin)


def open_npz(
    path: Path,
    split: str = "train",
    *,
    resolution: Resolution | None = None,
    limit: int | None = None,
    resize: Resize = "crop",
    memory_budget: int,
    cache: Path,
) -> ImageSet:
    """Read the images, or the float data, and the labels of an .npz file.

    Args:
        path: the file.
        split: which of its splits, if its arrays are named after splits.
        resolution: bring every image to this side or height and width as it is read.
        limit: without a resolution, choose the natural one up to this (see `natural_resolution`).
        resize: how.
        memory_budget: bytes of pixels that may be kept in memory.
        cache: the folder for a packed file if they are more.

    Raises:
        ValueError: if the file is damaged, holds no array of images under a known name, or their dtype or shape is not that
            of images (see the module).
    """
    with Archive(path) as archive:
        arrays = {entry.filename.removesuffix(".npy"): entry for entry in archive.entries}
        images_key, labels_key, wanted_key = _keys(path, set(arrays), split)
        with archive.open(arrays[images_key]) as file:
            what = f"{path}: {images_key}"
            shape, fortran, dtype = _header(what, file)
            layout, view = _layout(what, dtype, shape)
            if fortran:
                raise ValueError(f"{what} is in Fortran order: save np.ascontiguousarray of it.")

            def labels() -> NDArray[np.int64] | None:
                # Called after the images have confirmed the count that both headers state.
                return None if labels_key is None else _labels(path, archive, arrays[labels_key], shape[0])

            class_names, notes = None, _notes(dtype, shape)
            if labels_key is not None:
                _label_header(path, archive, arrays[labels_key], shape[0])
                if "class_names" in arrays:
                    class_names = _class_names(path, archive, arrays["class_names"], shape[0])
            else:
                notes += _label_note(archive, arrays, wanted_key, shape[0])
            origin = Origin(
                name=path.stem,
                source=f"array {images_key} of {path.name}, read as {layout}",
                class_names=class_names,
                notes=notes,
            )
            if dtype.kind == "f":
                return make_image_set(_floats(what, file, dtype, shape, memory_budget), labels(), origin)
            return gathered_set(
                (view(rows) for rows in read_rows(file, shape[0], shape[1:], what)),
                shape[0],
                view(np.empty((1, *shape[1:]), np.uint8)).shape[1:],
                labels,
                origin,
                key=[str(path.resolve()), *stamp(path), images_key, labels_key, class_names],
                resolution=resolution,
                limit=limit,
                resize=resize,
                memory_budget=memory_budget,
                cache=cache,
            )


def _notes(dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> tuple[str, ...]:
    """What to do if float data are meant to be images."""
    if dtype.kind != "f" or not (len(shape) == 3 or (len(shape) == 4 and shape[1] in (1, 3))):
        return ()
    kind = f"{shape[1]} channels of {' x '.join(map(str, shape[2:]))} values"
    return (
        f"{AS_THEY_ARE}, here as {kind}. Images are best as uint8, (n, H, W) or (n, C, H, W): from "
        "values in [0, 1] by (x * 255).round().clip(0, 255).astype('uint8').",
    )


def _floats(
    what: str, file: Readable, dtype: np.dtype[np.generic], shape: tuple[int, ...], memory_budget: int
) -> NDArray[np.generic]:
    """Read float data into memory."""
    width = math.prod(shape[1:]) * dtype.itemsize
    if shape[0] * width > memory_budget:
        raise ValueError(
            f"{what} takes {size_text(shape[0] * width)}, above the {size_text(memory_budget)} that are read into memory: "
            "save it as a .npy or .safetensors file, which is mapped."
        )
    values, end = np.empty(shape, dtype), 0
    for rows in read_rows(file, shape[0], (width,), what):
        values[end : end + len(rows)] = rows.view(dtype).reshape(-1, *shape[1:])
        end += len(rows)
    return values


def _header(what: str, file: Readable) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Shape, whether in Fortran order, and dtype of the array in `file`, which is then at the first byte of its data."""
    try:
        head = file.read(8)
        # Versions 2 and 3 have four bytes for the length of the header.
        head += file.read(2 if head[6:7] == b"\1" else 4)
        length = int.from_bytes(head[8:], "little")
        if length > HEADER_LIMIT:
            raise ValueError(f"a header of {length:,} bytes")
        stream = io.BytesIO(head + file.read(length))
        read = npy.read_array_header_1_0 if npy.read_magic(stream) == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if any(type(side) is not int or side < 0 for side in shape) or math.prod(shape) * dtype.itemsize >= 2**63:
            raise ValueError(f"shape {shape}")
    except Exception as error:
        # NumPy parses the header as a Python expression, which may raise anything.
        raise ValueError(f"{what} is cut short or damaged ({error}): save it again.") from error
    if dtype.hasobject:
        raise ValueError(f"{what} holds Python objects, which are never read: save an array of numbers.")
    return shape, fortran, dtype


def _keys(path: Path, names: set[str], split: str) -> tuple[str, str | None, str]:
    """The names of the images and of their labels, if there are any, and what the labels should be called."""
    plain = ("images", "x", "arr_0", "data", "latents") if split == "train" else ()
    images = [key for key in (*plain, f"{split}_images", f"x_{split}") if key in names]
    if len(images) != 1:
        wrong = ValueError if images or split == "train" else MissingSplitError
        raise wrong(
            f"{path} holds the arrays {', '.join(sorted(names))}: exactly one of them should hold the images of split "
            f"{split!r} and be called images (or x, arr_0, {split}_images, x_{split}, or data or latents for float data)."
        )
    labels = {
        "images": "labels",
        "x": "y",
        "arr_0": "arr_1",
        f"{split}_images": f"{split}_labels",
        f"x_{split}": f"y_{split}",
    }
    fallback = [key for key in ("labels", "y") if key in names and split == "train"]
    own = labels.get(images[0], "labels")
    # A descriptive name takes precedence over a position.
    found = [*fallback, own] if own == "arr_1" else [own, *fallback]
    return images[0], next((key for key in found if key in names), None), found[0] if found[0] != "arr_1" else "labels"


def _label_note(archive: Archive, arrays: dict[str, zipfile.ZipInfo], wanted: str, count: int) -> tuple[str, ...]:
    """A note on arrays that may hold the labels of `count` images under another name; none without such arrays."""
    similar: list[str] = []
    for key, entry in sorted(arrays.items()):
        # Any array of one value fits a single image.
        if count == 1 or not names_labels(key):
            continue
        try:
            with archive.open(entry) as file:
                shape, _, dtype = _header(key, file)
        except ValueError:
            # What is not read may be of any kind, and damaged.
            continue
        if dtype.kind in "iu" and shape in ((count,), (count, 1)):
            similar.append(key)
    if not similar:
        return ()
    which = f"the array {similar[0]}" if len(similar) == 1 else f"one of the arrays {', '.join(similar)}"
    return (f"No array is called {wanted}, so there are no labels: if {which[:1000]} holds them, save it as {wanted}.",)


def _class_names(path: Path, archive: Archive, entry: zipfile.ZipInfo, count: int) -> tuple[str, ...]:
    """The class names of `count` images."""
    with archive.open(entry) as file:
        what = f"{path}: class_names"
        shape, _, dtype = _header(what, file)
        size = math.prod(shape) * dtype.itemsize
        if len(shape) != 1 or dtype.kind != "U" or not 0 < size <= NAMES_LIMIT or shape[0] > max(CLASS_LIMIT, count):
            raise ValueError(
                f"{what} has dtype {dtype} and shape {shape}: save one text per class, shape (classes,), for up to "
                f"{max(CLASS_LIMIT, count):,} classes and of up to {NAMES_LIMIT:,} bytes."
            )
        content = b"".join(rows.tobytes() for rows in read_rows(file, shape[0], (dtype.itemsize,), what))
    try:
        names = tuple(str(name) for name in np.frombuffer(content, dtype))
        "".join(names).encode()
    except ValueError as error:
        raise ValueError(f"{what} is damaged ({error}): save it again.") from error
    check_class_names(what, names)
    return names


def _label_header(path: Path, archive: Archive, entry: zipfile.ZipInfo, count: int) -> None:
    """Refuse labels whose header does not fit `count` images."""
    with archive.open(entry) as file:
        key = entry.filename.removesuffix(".npy")
        shape, _, dtype = _header(f"{path}: {key}", file)
    if dtype.kind not in "iu" or math.prod(shape) != max(shape, default=0):
        raise ValueError(
            f"{path}: {key} has dtype {dtype} and shape {shape}: labels are whole numbers, one per image, "
            "shape (n,); for one-hot rows, save argmax(1)."
        )
    if math.prod(shape) != count:
        raise ValueError(f"{path} has {math.prod(shape):,} labels for {count:,} images: save one label per image.")
    check_label_count(count, path)


def _labels(path: Path, archive: Archive, entry: zipfile.ZipInfo, count: int) -> NDArray[np.int64]:
    """The labels; their header must fit."""
    with archive.open(entry) as file:
        what = f"{path}: {entry.filename.removesuffix('.npy')}"
        _, _, dtype = _header(what, file)
        labels = np.empty(count, np.int64)
        end = 0
        for rows in read_rows(file, count, (dtype.itemsize,), what):
            labels[end : end + len(rows)] = rows.view(dtype)[:, 0]
            end += len(rows)
    return labels


def _layout(
    what: str, dtype: np.dtype[np.generic], shape: tuple[int, ...]
) -> tuple[str, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]]:
    """The layout of an array, and a function that views images as (n, C, H, W), and floats as they are, without a copy."""
    if dtype.kind == "f":
        check_floats(what, dtype, shape)
        kinds = {2: "vectors (n, d)", 3: "signals (n, C, L)", 4: "latents (n, C, H, W)"}
        return kinds[len(shape)], lambda x: x
    if len(shape) in (3, 4) and math.prod(shape[1:]) // (3 if 3 in shape[1::2] else 1) > PIXEL_LIMIT:
        raise ValueError(
            f"{what} has shape {shape}: one image may have up to {PIXEL_LIMIT:,} pixels; make them smaller."
        )
    if dtype != np.uint8:
        raise ValueError(
            f"{what} has dtype {dtype}: images are uint8, 0 to 255. From values in [0, 1]: "
            "(x * 255).round().clip(0, 255).astype('uint8'); from values in [-1, 1]: ((x + 1) * 127.5) instead of x * 255. "
            "Other data are float16, float32 or float64."
        )
    # Equal sides mean many small images: a single image 3 or 4 pixels wide and as high is unlikely.
    if len(shape) == 3 and shape[2] in (1, 3, 4) and shape[1] != shape[2] and math.prod(shape):
        raise ValueError(
            f"{what} has shape {shape}, which may be one image (H, W, C) or {shape[0]:,} greyscale images (n, H, W), "
            f"{shape[2]} pixels wide: save one image as x[None], shape {(1, *shape)}"
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
            f"{what} has shape {shape}, which may be (n, C, H, W) or (n, H, W, C): save it so that one of the two axes is "
            "neither 1 nor 3; greyscale images as (n, H, W)."
        )
    return ("NCHW", lambda x: x) if first else ("NHWC", lambda x: x.transpose(0, 3, 1, 2))
