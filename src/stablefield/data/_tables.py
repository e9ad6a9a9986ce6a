"""Image files in the rows of tables on disk: folders of parquet files, and folders saved by `datasets`."""

import io
import itertools
import json
import os
import tempfile
import threading
from bisect import bisect_right
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from stablefield._regular_file import open_regular, read_limited
from stablefield.data._columns import image_column, label_column, read_labels
from stablefield.data._image_files import SPLITS, ImageFiles, split_word, stamp
from stablefield.data._image_set import MissingSplitError, check_label_count
from stablefield.data._table_file import Table, arrow_table, parquet_table, return_free_memory

__all__ = ["is_saved", "parquet_files", "parquet_rows", "require_pyarrow", "saved_files", "split_of"]

KEPT = 16
"""How many rows read ahead are kept for threads that ask for them a little late."""
HELD = 2**22
"""Bytes of an image's file to hold in memory; longer ones wait in a temporary file until they are decoded."""


def is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote the folder, by `save_to_disk`."""
    one = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return one or (folder / "dataset_dict.json").is_file()


def saved_files(folder: Path, split: str = "train") -> ImageFiles:
    """The image files of a data set saved by `datasets` with `save_to_disk`.

    Args:
        folder: the data set, or several splits of it.
        split: which of its splits.

    Raises:
        ValueError: if it cannot be read, names a file that is compressed or not a regular file, has no such split, or does
            not have exactly one column of images.
        ImportError: if pyarrow is not installed.
    """
    require_pyarrow(f"{folder}, a data set saved by datasets,")
    damaged = f"{folder} is not a data set saved by datasets, or is damaged: {{}}; save it again."
    place = folder
    try:
        if (folder / "dataset_dict.json").exists():
            splits = [str(name) for name in _document(folder / "dataset_dict.json")["splits"]]
            place = folder / _only(folder, splits, split)
        state, info = _document(place / "state.json"), _document(place / "dataset_info.json")
        if place == folder and split != "train":
            # A single split is the default, as with a folder of images.
            _only(folder, [str(state.get("_split") or "")], split)
        files = [place / entry["filename"] for entry in state["_data_files"]]
    except (TypeError, KeyError) as error:
        raise ValueError(damaged.format("a file in it names no files of data")) from error
    if not files:
        raise ValueError(damaged.format("it names no files of data"))
    features: Any = info.get("features")
    tables = [arrow_table(file, features) for file in files]
    name = folder.resolve().name
    return _table_files(tables, name=name, source=f"folder {name} saved by datasets, split {split}")


def parquet_files(files: Sequence[Path], place: Path, split: str = "train") -> ImageFiles:
    """The image files in the rows of parquet files.

    Args:
        files: the files; a file belongs to a split if its name or its folder's begins with a word for that split.
        place: their folder, or the only file.
        split: which of their splits.

    Raises:
        ValueError: if they cannot be read, would take too much memory, have no such split, or do not have exactly one
            column of images.
        ImportError: if pyarrow is not installed.
    """
    require_pyarrow(f"{place}, which holds parquet files,")
    groups: dict[str, list[Path]] = {}
    for file in sorted(files):
        parts = file.relative_to(place).parts if file != place else (file.name,)
        groups.setdefault(next(filter(None, map(split_word, reversed(parts))), ""), []).append(file)
    if "" in groups and len(groups) > 1:
        raise ValueError(
            f"{place} holds parquet files of the splits {', '.join(filter(None, groups))} and beside them "
            f"{groups[''][0]}, which is in none: move it, or begin its name with the word for a split."
        )
    word = split_of(place, list(groups), split)
    chosen = groups[word]
    name = place.resolve().stem if place.is_file() else place.resolve().name
    many = f"{len(chosen):,} parquet files" if len(chosen) != 1 else "1 parquet file"
    return parquet_rows(chosen, name=name, source=f"{many} in {name}{f', split {word}' if word else ''}")


def parquet_rows(files: Sequence[Path], *, name: str, source: str, paths: bool = True) -> ImageFiles:
    """The image files in the rows of parquet files, all of them.

    Args:
        files: the files, in the order of their rows.
        name: a short name for the set.
        source: one line that describes where it came from.
        paths: whether a row may name an image file on this machine instead of holding its bytes.

    Raises:
        ValueError: if they cannot be read, would take too much memory, or do not have exactly one column of images.
    """
    return _table_files([parquet_table(file) for file in files], name=name, source=source, paths=paths)


def _table_files(tables: Sequence[Table], *, name: str, source: str, paths: bool = True) -> ImageFiles:
    """The image files of consecutive tables, whose columns of images and labels must agree."""
    first = tables[0]
    count = sum(table.rows for table in tables)
    image = image_column(first.kinds, count, source)
    label, notes = label_column(first.kinds)
    for table in tables:
        for column in filter(None, (image, label)):
            if (table.kinds.get(column), table.names.get(column)) != (first.kinds[column], first.names.get(column)):
                raise ValueError(
                    f"the column {column} differs between {first.path} and {table.path} in its type or its class names: "
                    "write the files again alike, or name one of them."
                )
        table.check(image, label)
    check_label_count(count, source)
    labels = names = None
    if label is not None:
        values = itertools.chain.from_iterable(table.values(label) for table in tables)
        labels, names, notes = read_labels(label, first.kinds[label], values, first.names.get(label))
    key = [[str(table.path.resolve()), *stamp(table.path)] for table in tables]
    rows = _Rows(tables, image, paths)

    def fingerprint() -> str:
        named = [[os.path.abspath(path), *stamp(Path(path))] for _, path in sorted(rows.named.items())]
        return f"{key} {image}{f' {named}' if named else ''}"

    return ImageFiles(
        names=tuple(f"{name} row {i}" for i in range(count)),
        open=rows.open,
        labels=labels,
        class_names=names,
        name=name,
        source=source,
        fingerprint=fingerprint,
        notes=notes,
    )


class _Rows:
    """The images of tables, for threads that ask for rows more or less in order."""

    def __init__(self, tables: Sequence[Table], image: str, paths: bool) -> None:
        self._tables, self._image, self._paths = tables, image, paths
        self.named: dict[int, str] = {}
        """The path of the image file that a row names, for the rows opened so far."""
        self._starts = [0, *itertools.accumulate(table.rows for table in tables)]
        self._lock = threading.Lock()
        self._coming = self._from(0)
        self._next = 0
        self._kept: dict[int, Any] = {}

    def open(self, i: int) -> BinaryIO:
        """Open the image of row i."""
        with self._lock:
            found = self._kept.pop(i) if i in self._kept else self._at(i)
        if found is None:
            raise ValueError("the row has no image")
        if isinstance(found, Exception):
            raise found
        if not isinstance(found, str):
            return found
        if not self._paths:
            raise ValueError("the row holds the path of an image instead of the image")
        self.named[i] = found
        return open_regular(Path(found))

    def _at(self, i: int) -> Any:
        if not self._next <= i < self._next + KEPT:
            self._coming.close()
            while self._kept:
                self._drop(min(self._kept))
            self._coming, self._next = self._from(i), i
        for row, content in self._coming:
            if row < self._next:
                continue
            self._next = row + 1
            held = _held(content)
            if row == i:
                return held
            self._kept[row] = held
            if len(self._kept) > KEPT:
                self._drop(min(self._kept))
        raise ValueError("the file ends before this row")

    def _drop(self, i: int) -> None:
        file = self._kept.pop(i)
        if isinstance(file, io.IOBase):
            file.close()

    def _from(self, start: int) -> Generator[tuple[int, Any], None, None]:
        for place in range(bisect_right(self._starts, start) - 1, len(self._tables)):
            first = self._starts[place]
            for row, content in self._tables[place].images(self._image, max(0, start - first)):
                yield first + row, content


def _held(content: Any) -> Any:
    """A file with a copy of these bytes, so that their batch can be freed; a path, an error or None unchanged."""
    if content is None or isinstance(content, str | Exception):
        return content
    if len(content) <= HELD:
        return io.BytesIO(content)
    file = tempfile.TemporaryFile()  # noqa: SIM115, the caller of `open` closes it
    file.write(content)
    file.seek(0)
    return_free_memory()
    return file


def require_pyarrow(purpose: str) -> None:
    """Raise an error if pyarrow, which `purpose` needs, is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{purpose} needs the package pyarrow: pip install "stablefield[hub]"') from error


def _document(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if it is missing or is not a JSON object."""
    if not path.exists():
        return {}
    try:
        text = read_limited(path, "save the data set again without its notes")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def split_of(place: Path | str, there: Sequence[str], split: str) -> str:
    """The one of the existing splits `there` that `split` means.

    Raises:
        ValueError: if there is not exactly one.
    """
    # A single split is the default, as with a folder of images.
    return there[0] if len(there) == 1 and split == "train" else _only(place, there, split)


def _only(place: Path | str, there: Sequence[str], split: str) -> str:
    """The one of the splits `there` that `split` means."""
    alike = next((words for words in SPLITS.values() if split.lower() in words), (split,))
    found = [name for name in there if name.lower() in alike]
    if len(found) != 1:
        known = ", ".join(filter(None, there))
        remedy = f"has the splits {known}; pass one of them." if known else "has no splits; leave split out."
        wrong = ValueError if found else MissingSplitError
        raise wrong(f"split={split!r}: {place} {remedy}")
    return found[0]
