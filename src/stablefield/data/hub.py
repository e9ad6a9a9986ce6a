"""Image data sets of the Hugging Face hub, or any `datasets.Dataset` with a column of images.

The package `datasets` downloads them and decodes their columns, in as much memory as it takes for that; tables on disk are
read by `stablefield.data.tables`. The images are taken as the files that they are stored as.
"""

import io
import re
import secrets
from pathlib import Path
from typing import Any, BinaryIO

from stablefield.data.columns import image_column, label_column, read_labels
from stablefield.data.image_files import ImageFiles
from stablefield.data.image_set import check_label_count
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
        raise ImportError('an hf: source needs the package datasets: pip install "stablefield[hub]"') from error
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

    kinds = {column: _kind(feature) for column, feature in dataset.features.items()}
    image = image_column(kinds, len(dataset), source)
    stored = dataset.cast_column(image, Image(decode=False))
    check_label_count(len(dataset), source)
    label, notes = label_column(kinds)
    labels = names = None
    if label is not None:
        described = tuple(map(str, dataset.features[label].names)) if kinds[label] == "ClassLabel" else None
        labels, names, notes = read_labels(label, kinds[label], dataset[label], described)

    def opened(i: int) -> BinaryIO:
        entry = stored[i][image]
        if entry is None:
            raise ValueError("the row has no image")
        return io.BytesIO(entry["bytes"]) if entry.get("bytes") is not None else open_regular(Path(entry["path"]))

    # Without a fingerprint of its own nothing says whether it is the same data set again.
    known = str(getattr(dataset, "_fingerprint", None) or secrets.token_hex(16))
    return ImageFiles(
        names=tuple(f"{name} row {i}" for i in range(len(dataset))),
        open=opened,
        labels=labels,
        class_names=names,
        name=name,
        source=source,
        fingerprint=lambda: f"{known} {image}",
        notes=notes,
    )


def _kind(feature: Any) -> str:
    """What a column holds: "Image", "ClassLabel", "bytes", "number", "text", or the name of its type."""
    if isinstance(feature, dict):
        return "bytes" if "bytes" in feature else "dict"
    dtype = str(getattr(feature, "dtype", ""))
    named = type(feature).__name__
    if named != "Value":
        return named
    if dtype in ("binary", "large_binary"):
        return "bytes"
    return "number" if re.fullmatch("u?int[0-9]+", dtype) else "text" if dtype in ("string", "large_string") else dtype
