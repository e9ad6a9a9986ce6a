"""Image data sets of the Hugging Face hub, in its forms on disk, or any `datasets.Dataset` with a column of images.

The images are taken as the files that they are stored as, and decoded like files of a folder. The label is the column
`label` or `labels` if there is one, of class labels, whole numbers or texts, else the only column of class labels; where
there are candidates and no labels, the manifest notes why.
"""

import io
import json
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from stablefield.data.image_files import SPLITS, ImageFiles, natural, stamp
from stablefield.data.image_set import check_label_count
from stablefield.regular_file import JSON_LIMIT, open_regular

__all__ = ["dataset_files", "hub_files", "is_saved", "parquet_files", "saved_files"]

LABEL_LIMIT = 2**31
EXPANSION_LIMIT, EXPANSION_FREE = 16, 2**26
"""How many times its size a parquet file may take in memory, beyond 64 MiB: its images are compressed files already."""


def hub_files(name: str, split: str = "train") -> ImageFiles:
    """The image files of a data set on the hub, fetched by the package `datasets`.

    Args:
        name: the data set's name, "owner/name" or "owner/name:configuration".
        split: which of its splits.

    Raises:
        ValueError: if it cannot be loaded, or has not exactly one column of images.
        ImportError: if `datasets` is not installed.
    """
    datasets = _package("an hf: source")
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


def is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote the folder, by `save_to_disk`."""
    one = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return one or (folder / "dataset_dict.json").is_file()


def saved_files(folder: Path, split: str = "train") -> ImageFiles:
    """The image files of a data set that `datasets` saved by `save_to_disk`.

    Args:
        folder: the data set, or several splits of it.
        split: which of its splits.

    Raises:
        ValueError: if it cannot be loaded, names a file that is no regular one, has no such split, or has not exactly one
            column of images.
        ImportError: if `datasets` is not installed.
    """
    datasets = _package(f"{folder}, a data set saved by datasets,")
    _check_saved(folder)
    try:
        dataset: Any = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise ValueError(f"{folder} cannot be loaded as a data set saved by datasets: {error}") from error
    if isinstance(dataset, dict):
        dataset = dataset[_only(folder, list(dataset), split)]  # pyright: ignore[reportUnknownVariableType]
    elif split != "train":
        # One split of its own: as with a folder of images, it is what is meant where none is named.
        _only(folder, [str(dataset.split or "")], split)
    name = folder.resolve().name
    return dataset_files(dataset, name=name, source=f"folder {name} saved by datasets, split {split}")


def parquet_files(files: Sequence[Path], place: Path, split: str = "train") -> ImageFiles:
    """The image files in the rows of parquet files.

    Args:
        files: the files; those of which the name or the folder begins with a word for a split are of that split.
        place: the folder in which they lie, or the only file.
        split: which of their splits.

    Raises:
        ValueError: if they cannot be read, have no such split, or have not exactly one column of images.
        ImportError: if `datasets` is not installed.
    """
    datasets = _package(f"{place}, which holds parquet files,")
    groups: dict[str, list[Path]] = {}
    for file in sorted(files):
        parts = file.relative_to(place).parts if file != place else (file.name,)
        groups.setdefault(next(filter(None, map(_split_word, reversed(parts))), ""), []).append(file)
    if "" in groups and len(groups) > 1:
        raise ValueError(
            f"{place} holds parquet files of the splits {', '.join(filter(None, groups))} and beside them "
            f"{groups[''][0]}, which is of none: move it, or begin its name with the word for a split."
        )
    # One split of its own: as with a folder of images, it is what is meant where none is named.
    word = next(iter(groups)) if len(groups) == 1 and split == "train" else _only(place, list(groups), split)
    chosen = groups[word]
    for file in chosen:
        _check_regular(file)
        _check_expansion(file)
    try:
        dataset: Any = datasets.load_dataset("parquet", data_files=[str(file) for file in chosen], split="train")
    except Exception as error:
        raise ValueError(f"the parquet files of {place} cannot be read: {error}") from error
    name = place.resolve().stem if place.is_file() else place.resolve().name
    many = f"{len(chosen):,} parquet files" if len(chosen) != 1 else "1 parquet file"
    source = f"{many} in {name}{f', split {word}' if word else ''}"
    key = [[str(file.resolve()), *stamp(file)] for file in chosen]
    return dataset_files(dataset, name=name, source=source, fingerprint=str(key))


def _check_saved(folder: Path) -> None:
    """Refuse a saved data set of which `datasets` would open what is no regular file, or read a document without an end."""
    try:
        splits = [str(split) for split in _document(folder / "dataset_dict.json").get("splits", [])]
        for place in (folder, *(folder / split for split in splits)):
            _document(place / "dataset_info.json")
            for entry in _document(place / "state.json").get("_data_files", []):
                _check_regular(place / entry["filename"])
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{folder} is no data set saved by datasets, or damaged: a file in it names no files of data; save it again."
        ) from error


def _document(path: Path) -> dict[str, Any]:
    """What a file of JSON says; nothing if it is missing or not understood, which `datasets` will say then."""
    if not path.exists():
        return {}
    try:
        with open_regular(path) as file:
            text = file.read(JSON_LIMIT + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(text) > JSON_LIMIT:
        raise ValueError(f"{path} has more than {JSON_LIMIT:,} bytes: save the data set again without its notes.")
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _check_regular(path: Path) -> None:
    """Refuse what is no regular file, before a package opens it by its name."""
    try:
        open_regular(path).close()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error


def _check_expansion(path: Path) -> None:
    """Refuse a parquet file that its own table of contents says to be far larger in memory than on disk."""
    from pyarrow import ArrowException  # pyright: ignore[reportMissingImports, reportUnknownVariableType]
    from pyarrow.parquet import read_metadata  # pyright: ignore[reportMissingImports, reportUnknownVariableType]

    try:
        contents: Any = read_metadata(path)
        groups = range(contents.num_row_groups)
        size = sum(max(0, int(contents.row_group(k).total_byte_size)) for k in groups)
    except (ArrowException, OSError, MemoryError) as error:
        raise ValueError(f"the parquet file {path} cannot be read: {error}") from error
    limit = EXPANSION_LIMIT * path.stat().st_size + EXPANSION_FREE
    if size > limit:
        raise ValueError(
            f"the parquet file {path} has {path.stat().st_size:,} bytes and would take {size:,} in memory, more than "
            f"{EXPANSION_LIMIT} times as many: its column of images does not hold compressed images. Write it again with "
            "images as PNG or JPEG files."
        )


def _package(purpose: str) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f'{purpose} needs the package datasets: pip install "stablefield[hub]"') from error
    return datasets


def _split_word(name: str) -> str:
    """The word for a split that a name begins with, or nothing."""
    word = re.split(r"[-_.]", name)[0].lower()
    return word if any(word in words for words in SPLITS.values()) else ""


def _only(place: Path, there: Sequence[str], split: str) -> str:
    """The one of the splits `there` that `split` means."""
    alike = next((words for words in SPLITS.values() if split.lower() in words), (split,))
    found = [name for name in there if name.lower() in alike]
    if len(found) != 1:
        known = ", ".join(filter(None, there))
        remedy = f"has the splits {known}; pass one of them." if known else "has no splits; leave split out."
        raise ValueError(f"split={split!r}: {place} {remedy}")
    return found[0]


def dataset_files(dataset: Any, *, name: str, source: str, fingerprint: str = "") -> ImageFiles:
    """The image files of a `datasets.Dataset`.

    Args:
        dataset: the data set, one split of it.
        name: a short name for the set.
        source: one line that says where it came from.
        fingerprint: a text that changes when the data set does; its own if not given.

    Raises:
        ValueError: if it is empty, or has not exactly one column of images.
        ImportError: if `datasets` is not installed.
    """
    from datasets import Image  # pyright: ignore[reportMissingImports, reportUnknownVariableType]

    kinds = {column: _kind(feature) for column, feature in dataset.features.items()}
    images = [column for column, kind in kinds.items() if kind == "Image"]
    # Without the library's own description of columns, an image is its bytes.
    images = images or [column for column, kind in kinds.items() if kind == "bytes"]
    image = images[0] if len(images) == 1 else next((c for c in ("image", "img") if c in images), None)
    if image is None or len(dataset) == 0:
        raise ValueError(
            f"{source} has {len(dataset):,} rows with the columns {kinds}: exactly one column of images, or one that is "
            "called image, is needed."
        )
    stored = dataset.cast_column(image, Image(decode=False))
    check_label_count(len(dataset), source)
    labels, names, notes = _labels(dataset, kinds)

    def opened(i: int) -> BinaryIO:
        entry = stored[i][image]
        if entry is None:
            raise ValueError("the row has no image")
        return io.BytesIO(entry["bytes"]) if entry.get("bytes") is not None else open_regular(Path(entry["path"]))

    # Without a fingerprint of its own nothing says whether it is the same data set again.
    known = fingerprint or str(getattr(dataset, "_fingerprint", None) or secrets.token_hex(16))
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


def _labels(
    dataset: Any, kinds: dict[str, str]
) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None, tuple[str, ...]]:
    """Labels, names of the classes, and what a person should know of them."""
    classes = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    called = [column for column in ("label", "labels") if kinds.get(column) in ("ClassLabel", "number", "text")]
    if not called and len(classes) > 1:
        note = (
            f"The columns {', '.join(classes)} all hold class labels and none is called label, so there are no labels."
        )
        return None, None, (note,)
    label = next(iter([*called, *classes]), None)
    if label is None:
        return None, None, ()
    values: list[Any] = list(dataset[label])
    kind = kinds[label]
    unlabelled = sum(value is None or (kind != "text" and value < 0) for value in values)
    if unlabelled:
        note = (
            f"{unlabelled:,} of {len(values):,} rows have no label in the column {label} (none, or below 0), so the labels "
            "are left out."
        )
        return None, None, (note,)
    if kind == "text":
        names = tuple(sorted(set(values), key=natural))
        number = {name: i for i, name in enumerate(names)}
        return np.array([number[value] for value in values], np.int64), names, ()
    if max(values) >= LABEL_LIMIT:
        raise ValueError(
            f"the column {label} holds {max(values)}: a label is a whole number from 0 to {LABEL_LIMIT - 1:,}."
        )
    described = tuple(map(str, dataset.features[label].names)) if kind == "ClassLabel" else None
    return np.array(values, np.int64), described, ()
