"""idx files, the format of MNIST and its family (Fashion-MNIST, KMNIST, EMNIST), plain or gzipped.

An idx file is two zero bytes, a byte for the type (8: unsigned bytes), a byte for the number k of axes, k big-endian 32-bit
lengths, then the values. Images have three axes (n, H, W), labels one. In a folder, the split "train" is the pair of files
with "train" in their names, "test" the pair with "t10k" or "test". The labels of a file of images are in the file of the
same name with "labels" for "images" and "idx1" for "idx3".

References:
    LeCun, Cortes, Burges, "The MNIST database of handwritten digits", 1998, section "File formats".
"""

import gzip
import math
import os
import struct
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from stablefield._regular_file import open_regular
from stablefield.data._image_files import stamp
from stablefield.data._image_set import (
    PIXEL_LIMIT,
    ImageSet,
    MissingSplitError,
    Origin,
    check_label_count,
    make_image_set,
)
from stablefield.data._raw_array import mapped, read_rows
from stablefield.data._resizing import Resize, Resolution, gathered_set

__all__ = ["idx_images", "is_idx", "open_idx"]

SPLITS = {"train": ("train",), "test": ("t10k", "test")}
SIZE_LIMIT = 2**36


def is_idx(path: Path) -> bool:
    """Whether the file begins like an idx file of bytes, perhaps behind gzip."""
    return _axes(path) is not None


def idx_images(folder: Path) -> list[Path]:
    """The files of images among the idx files in `folder`, by name."""
    found = sorted(path for path in folder.iterdir() if "idx" in path.name and path.is_file())
    return [path for path in found if _axes(path) == 3]


def open_idx(
    path: Path,
    split: str = "train",
    *,
    resolution: Resolution | None = None,
    limit: int | None = None,
    resize: Resize = "crop",
    memory_budget: int,
    cache: Path,
) -> ImageSet:
    """Read idx images and their labels, if there are any.

    Args:
        path: a file of images, or a folder of idx files.
        split: "train" or "test", for a folder.
        resolution: bring unpacked images to this side or height and width as they are read; mapped images keep their size.
        limit: without a resolution, choose the natural one up to this (see `natural_resolution`).
        resize: how.
        memory_budget: bytes of unpacked pixels that may be kept in memory.
        cache: the folder for a packed file if they are more.

    Raises:
        ValueError: if there is no such split or more than one file for it, or a file is cut short or does not fit.
    """
    source = path
    if path.is_dir():
        if split not in SPLITS:
            raise MissingSplitError(f"split={split!r}: a folder of idx files has the splits train and test.")
        images = idx_images(path)
        fitting = [file for file in images if any(word in file.name for word in SPLITS[split])]
        # A file and its gzipped twin hold the same images; the plain one needs no unpacking.
        fitting = [file for file in fitting if not (file.suffix == ".gz" and file.with_suffix("") in fitting)]
        if len(fitting) != 1:
            names = ", ".join(file.name for file in fitting or images)
            wrong = ValueError if fitting else MissingSplitError
            raise wrong(
                f"split={split!r}: {path} has {len(fitting)} idx files of images for it ({names}): name the file itself."
            )
        source = fitting[0]
    elif split != "train":
        raise MissingSplitError(f"split={split!r}: {path} is one file; name the file of the split, or the folder.")
    partner = _labels_of(source)
    text = f"idx file {source.name}" + ("" if partner is None else f" with labels {partner.name}")
    name = path.resolve().name if path.is_dir() else path.name.removesuffix(".gz")
    origin = Origin(name=name, source=text)
    with _opened(source, 3) as (file, shape, gzipped):
        if math.prod(shape[1:]) > PIXEL_LIMIT:
            raise ValueError(f"{source} has images of shape {shape[1:]}: up to {PIXEL_LIMIT:,} pixels are read.")
        if partner is not None:
            with _opened(partner, 1) as (_, found, _):
                if found[0] != shape[0]:
                    raise ValueError(f"{partner} has {found[0]:,} labels for the {shape[0]:,} images of {source}.")
            check_label_count(shape[0], partner)
        if not gzipped:
            pixels = mapped(cast("BinaryIO", file), source, file.tell(), shape)
            return make_image_set(pixels[:, None], _labels(partner), origin)
        return gathered_set(
            (rows[:, None] for rows in _unpacked(file, source, shape)),
            shape[0],
            (1, shape[1], shape[2]),
            lambda: _labels(partner),
            origin,
            key=[str(source.resolve()), *stamp(source), str(partner), *(() if partner is None else stamp(partner))],
            resolution=resolution,
            limit=limit,
            resize=resize,
            memory_budget=memory_budget,
            cache=cache,
        )


@contextmanager
def _bytes_of(path: Path) -> Generator[tuple[IO[bytes], bool], None, None]:
    """Open the file's bytes, unpacked if it is gzipped, and say whether it is."""
    with open_regular(path) as file:
        gzipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if gzipped:
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield cast("IO[bytes]", unpacked), True
        else:
            yield file, False


def _axes(path: Path) -> int | None:
    """How many axes an idx file of bytes has; None for any other file."""
    try:
        with _bytes_of(path) as (file, _):
            head = file.read(4)
    except (OSError, EOFError, zlib.error, ValueError):
        return None
    return head[3] if len(head) == 4 and head[:3] == b"\0\0\x08" and 1 <= head[3] <= 4 else None


def _labels_of(path: Path) -> Path | None:
    """The file of labels that belongs to a file of images, with or without .gz."""
    plain = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    candidates = [path.with_name(plain), path.with_name(f"{plain}.gz")]
    return next((file for file in candidates if file.is_file() and _axes(file) == 1), None)


@contextmanager
def _opened(path: Path, axes: int) -> Generator[tuple[IO[bytes], tuple[int, ...], bool], None, None]:
    """An idx file, open at its first value, with its shape and whether it is gzipped; a plain one is complete."""
    if _axes(path) != axes:
        raise ValueError(f"{path} is not an idx file of bytes with {axes} axes (images have three, labels one).")
    with _bytes_of(path) as (file, gzipped):
        start = 4 + 4 * axes
        try:
            head = file.read(start)
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(path) from error
        if len(head) < start:
            raise _damaged(path)
        shape = struct.unpack(f">{axes}I", head[4:])
        size = math.prod(shape)
        if size == 0 or size > SIZE_LIMIT:
            raise ValueError(f"{path} states the shape {shape}: it is empty or damaged; download it again.")
        if not gzipped:
            if file.seek(0, os.SEEK_END) != start + size:
                raise _damaged(path)
            file.seek(start)
        yield file, shape, gzipped


def _unpacked(file: IO[bytes], path: Path, shape: tuple[int, ...]) -> Iterator[NDArray[np.uint8]]:
    """The values of an idx file in pieces; refuses further content."""
    yield from read_rows(file, shape[0], shape[1:], str(path))
    try:
        more = file.read(1)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path) from error
    if more:
        raise _damaged(path)


def _labels(path: Path | None) -> NDArray[np.int64] | None:
    """The labels of a file; its header must fit the images."""
    if path is None:
        return None
    with _opened(path, 1) as (file, shape, _):
        return np.concatenate([rows.astype(np.int64) for rows in _unpacked(file, path, shape)])


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{path} is cut short or damaged: its length is not what its header says; download it again.")
