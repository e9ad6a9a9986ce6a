"""CIFAR-10 in its binary form: a folder with data_batch_1.bin to data_batch_5.bin and test_batch.bin.

A file is a sequence of records of 3,073 bytes: a label, 0 to 9, then 1,024 bytes each of red, green and blue, row by row of
a 32 x 32 image. The split "train" is the five batches in order (50,000 images in all), "test" the sixth (10,000).

References:
    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", technical report, University of Toronto, 2009.
"""

import os
from pathlib import Path

import numpy as np

from stablefield._regular_file import open_regular
from stablefield.data._image_set import ImageSet, MissingSplitError, Origin, make_image_set

__all__ = ["cifar10_folder", "open_cifar10"]

FILES = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RECORD = 1 + 3 * 32 * 32
RECORDS = 10_000


def cifar10_folder(folder: Path) -> Path | None:
    """The folder with the binary files: `folder`, or the archive's own folder in it; None if neither has them."""
    for place in (folder, folder / "cifar-10-batches-bin"):
        if any((place / file).is_file() for file in (*FILES["train"], *FILES["test"])):
            return place
    return None


def open_cifar10(folder: Path, split: str = "train") -> ImageSet:
    """Read one split of CIFAR-10 into memory.

    Args:
        folder: where the .bin files lie.
        split: "train" or "test".

    Raises:
        ValueError: if there is no such split, or a file is missing, cut short, or holds a label above 9.
    """
    if split not in FILES:
        raise MissingSplitError(f"split={split!r}: CIFAR-10 has the splits train and test.")
    missing = [file for file in FILES[split] if not (folder / file).is_file()]
    if missing:
        lacking = MissingSplitError if missing == list(FILES[split]) else ValueError
        raise lacking(f"{folder} lacks {', '.join(missing)}: unpack CIFAR-10's binary archive again.")
    parts: list[np.ndarray] = []
    for file in FILES[split]:
        path = folder / file
        with open_regular(path) as opened:
            size = opened.seek(0, os.SEEK_END)
            if not 0 < size <= RECORDS * RECORD or size % RECORD:
                raise ValueError(
                    f"{path} has {size:,} bytes, not a multiple of {RECORD:,} up to {RECORDS:,} times that: it is cut short "
                    "or damaged; download it again."
                )
            opened.seek(0)
            content = np.frombuffer(opened.read(size), np.uint8)
        records = content.reshape(-1, RECORD)
        if records[:, 0].max() > 9:
            raise ValueError(
                f"{path} holds the label {records[:, 0].max()}, but CIFAR-10 has ten classes: download it again."
            )
        parts.append(records)
    labels = np.concatenate([records[:, 0] for records in parts])
    images = np.concatenate([records[:, 1:] for records in parts]).reshape(-1, 3, 32, 32)
    origin = Origin(name="cifar10", source=f"CIFAR-10, binary files, split {split}", class_names=CLASSES)
    return make_image_set(images, labels, origin)
