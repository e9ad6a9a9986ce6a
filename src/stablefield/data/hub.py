"""Image data sets of the Hugging Face hub, or any `datasets.Dataset` with a column of images.

The images are taken as the files that they are stored as, and decoded like files of a folder. The label is the column
`label` if there is one, else the only column of class labels; with several and none of that name there are no labels.
"""

import io
import secrets
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from stablefield.data.image_files import ImageFiles
from stablefield.regular_file import open_regular

__all__ = ["dataset_files", "hub_files"]


def hub_files(name: str, split: str = "train") -> ImageFiles:
    """The image files of a data set on the hub, fetched by the package `datasets`.

    Args:
        name: the data set's name, "owner/name" or "owner/name:configuration".
        split: which of its splits.

    Raises:
        ValueError: if it cannot be loaded, or has not exactly one column of images.
        ImportError: if `datasets` is not installed.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError('hf: sources need the package datasets: pip install "stablefield[hub]"') from error
    repository, _, configuration = name.partition(":")
    if not repository:
        raise ValueError("hf: names no data set: write hf:OWNER/NAME, or hf:OWNER/NAME:CONFIGURATION.")
    try:
        dataset: Any = datasets.load_dataset(repository, configuration or None, split=split)
    except Exception as error:
        raise ValueError(
            f"the data set {repository!r} (configuration {configuration or 'default'}, split {split!r}) cannot be loaded: "
            f"{error}"
        ) from error
    return dataset_files(dataset, name=repository.split("/")[-1], source=f"Hugging Face {name}, split {split}")


def dataset_files(dataset: Any, *, name: str, source: str) -> ImageFiles:
    """The image files of a `datasets.Dataset`.

    Args:
        dataset: the data set, one split of it.
        name: a short name for the set.
        source: one line that says where it came from.

    Raises:
        ValueError: if it is empty, or has not exactly one column of images.
        ImportError: if `datasets` is not installed.
    """
    from datasets import Image  # pyright: ignore[reportMissingImports, reportUnknownVariableType]

    kinds = {column: type(feature).__name__ for column, feature in dataset.features.items()}
    images = [column for column, kind in kinds.items() if kind == "Image"]
    image = images[0] if len(images) == 1 else next((c for c in ("image", "img") if c in images), None)
    if image is None or len(dataset) == 0:
        raise ValueError(
            f"{source} has {len(dataset):,} rows with the columns {kinds}: exactly one column of images, or one that is "
            "called image, is needed."
        )
    classes = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    label = "label" if "label" in classes else classes[0] if len(classes) == 1 else None
    stored = dataset.cast_column(image, Image(decode=False))
    labels, names = None, None
    if label is not None:
        labels = np.array(list(dataset[label]), np.int64)
        names = tuple(str(value) for value in dataset.features[label].names)
        if labels.min() < 0:
            labels, names = None, None

    def opened(i: int) -> BinaryIO:
        entry = stored[i][image]
        if entry is None:
            raise ValueError("the row has no image")
        return io.BytesIO(entry["bytes"]) if entry.get("bytes") is not None else open_regular(Path(entry["path"]))

    # Without a fingerprint of its own nothing says whether it is the same data set again.
    fingerprint = str(getattr(dataset, "_fingerprint", None) or secrets.token_hex(16))
    return ImageFiles(
        names=tuple(f"{name} row {i}" for i in range(len(dataset))),
        open=opened,
        labels=labels,
        class_names=names,
        name=name,
        source=source,
        fingerprint=lambda: f"{fingerprint} {image} {label}",
    )
