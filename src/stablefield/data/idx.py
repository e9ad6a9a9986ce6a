"""idx files, the form of MNIST and its family (Fashion-MNIST, KMNIST, EMNIST), plain or gzipped.

An idx file is two zero bytes, a byte for the type (8: unsigned bytes), a byte for the number k of axes, k big-endian 32-bit
lengths, then the values. Images have three axes (n, H, W), labels one. In a folder, the split "train" is the pair of files
with "train" in their names, "test" the pair with "t10k" or "test"; the labels of a file of images are in the file that is
called the same with "labels" for "images" and "idx1" for "idx3".

References:
    LeCun, Cortes, Burges, "The MNIST database of handwritten digits", 1998, section "File formats".
"""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from stablefield.data.image_set import ImageSet, Origin, make_image_set

__all__ = ["idx_images", "is_idx", "open_idx"]

SPLITS = {"train": ("train",), "test": ("t10k", "test")}
SIZE_LIMIT = 2**36


def is_idx(path: Path) -> bool:
    """Whether the file begins like an idx file of bytes, perhaps behind gzip."""
    try:
        with _opened(path) as file:
            head = file.read(4)
    except (OSError, EOFError, zlib.error):
        return False
    return len(head) == 4 and head[:3] == b"\0\0\x08" and 1 <= head[3] <= 4


def idx_images(folder: Path) -> list[Path]:
    """The files of images among the idx files that lie in `folder`, by name."""
    found = sorted(path for path in folder.iterdir() if "idx" in path.name and path.is_file() and is_idx(path))
    return [path for path in found if _axes(path) == 3]


def open_idx(path: Path, split: str = "train") -> ImageSet:
    """Read idx images and, where they are, their labels.

    Args:
        path: a file of images, or a folder of idx files.
        split: "train" or "test", for a folder.

    Raises:
        ValueError: if there is no such split or more than one file for it, or a file is cut short or does not fit.
    """
    source = path
    if path.is_dir():
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: a folder of idx files has the splits train and test.")
        images = idx_images(path)
        fitting = [file for file in images if any(word in file.name for word in SPLITS[split])]
        # A file and its gzipped twin hold the same; the plain one needs no unpacking.
        fitting = [file for file in fitting if not (file.suffix == ".gz" and file.with_suffix("") in fitting)]
        if len(fitting) != 1:
            names = ", ".join(file.name for file in fitting or images)
            raise ValueError(
                f"split={split!r}: {path} has {len(fitting)} idx files of images for it ({names}): name the file itself."
            )
        source = fitting[0]
    elif split != "train":
        raise ValueError(f"split={split!r}: {path} is one file; name the file of the split, or the folder.")
    pixels = _read(source, 3)
    labels = None
    partner = _labels_of(source)
    if partner is not None:
        labels = _read(partner, 1)
        if len(labels) != len(pixels):
            raise ValueError(f"{partner} has {len(labels):,} labels for the {len(pixels):,} images of {source}.")
    text = f"idx file {source.name}" + ("" if partner is None else f" with labels {partner.name}")
    name = path.resolve().name if path.is_dir() else path.name.removesuffix(".gz")
    return make_image_set(pixels[:, None], labels, Origin(name=name, source=text))


def _opened(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    return cast("BinaryIO", gzip.open(path, "rb")) if gzipped else path.open("rb")


def _axes(path: Path) -> int:
    with _opened(path) as file:
        return file.read(4)[3]


def _labels_of(path: Path) -> Path | None:
    """The file of labels that belongs to a file of images, with or without .gz."""
    plain = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    candidates = [path.with_name(plain), path.with_name(f"{plain}.gz")]
    return next((file for file in candidates if file.is_file() and is_idx(file) and _axes(file) == 1), None)


def _read(path: Path, axes: int) -> NDArray[np.uint8]:
    """The values of an idx file, mapped if it is plain, with its length held against its header."""
    if not is_idx(path) or _axes(path) != axes:
        raise ValueError(f"{path} is not an idx file of bytes with {axes} axes (images have three, labels one).")
    try:
        with _opened(path) as file:
            start = 4 + 4 * axes
            head = file.read(start)
            if len(head) < start:
                raise EOFError
            shape = struct.unpack(f">{axes}I", head[4:])
            size = math.prod(shape)
            if size == 0 or size > SIZE_LIMIT:
                raise ValueError(f"{path} says that its shape is {shape}: it is empty or damaged; fetch it again.")
            if not isinstance(file, gzip.GzipFile):
                if path.stat().st_size != start + size:
                    raise EOFError
                return np.memmap(path, np.uint8, "r", start, shape)
            content = file.read(size + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path} is cut short or damaged: its length is not what its header says; fetch it again."
        ) from error
    if len(content) != size:
        raise ValueError(f"{path} is cut short or damaged: its length is not what its header says; fetch it again.")
    return np.frombuffer(content, np.uint8).reshape(shape)
