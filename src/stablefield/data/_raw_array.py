"""Raw arrays: contiguous numbers in a file, mapped into memory or read piece by piece."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from stablefield.data._archive import Readable
from stablefield.data._scaling import CHUNK_BYTES

__all__ = ["mapped", "read_rows"]


def mapped(
    file: BinaryIO,
    path: Path,
    start: int,
    shape: tuple[int, ...],
    order: Literal["C", "F"] = "C",
    dtype: DTypeLike = np.uint8,
) -> NDArray[Any]:
    """Map an array in an open file into memory, read-only; the map gives `path` as its file name."""
    # NumPy would open a path again, and by then another file may be there.
    array = np.memmap(file, dtype, "r", start, shape, order)
    array.filename = str(path.resolve())
    return array


def read_rows(file: Readable, count: int, shape: tuple[int, ...], what: str) -> Iterator[NDArray[np.uint8]]:
    """Read `count` arrays of `shape`, contiguous bytes, in pieces (k, *shape) of about 16 MiB.

    Args:
        file: open at the start of the first.
        count: how many there should be.
        shape: of one.
        what: the file's name, for the error.

    Raises:
        ValueError: if some are missing, or reading fails: unpacking finds damage.
    """
    size = math.prod(shape)
    rows = max(1, CHUNK_BYTES // size)
    for start in range(0, count, rows):
        wanted = min(rows, count - start) * size
        try:
            content = file.read(wanted)
            if len(content) != wanted:
                raise EOFError("it ends early")
        except Exception as error:
            raise ValueError(
                f"{what} is cut short or damaged: its length is not what its header says, or it cannot be unpacked "
                f"({error}); fetch or save it again."
            ) from error
        yield np.frombuffer(content, np.uint8).reshape(-1, *shape)
