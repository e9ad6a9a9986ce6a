"""Image files in the rows of tables on disk: parquet files, and Arrow files in a folder that `datasets` saved.

Both are read by pyarrow, row by row, so that a value to which many rows point is not there once for each, as it would be
if a column were decoded as a whole. `stablefield.data.parquet_pages` bounds what a row takes. Arrow files are mapped, and
refused where they are compressed.
"""

import io
import itertools
import json
import re
import struct
import tempfile
import threading
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from stablefield.data.columns import image_column, label_column, read_labels
from stablefield.data.image_files import SPLITS, ImageFiles, stamp
from stablefield.data.image_set import check_label_count
from stablefield.data.parquet_pages import TEXT_PAGE, check_contents, check_pages, row_limit
from stablefield.regular_file import JSON_LIMIT, open_regular

__all__ = ["is_saved", "parquet_files", "saved_files"]

KEPT = 16
"""How many rows that were passed over are kept, for a thread that asks a little late."""
HELD = 2**22
"""Bytes of an image's file that are held in memory; longer ones wait in a temporary file until they are decoded."""
BUFFER = 2**16
TEXTS = 64
"""Rows of a column of texts that are decoded at a time, each of which may be as long as a page."""


@dataclass(frozen=True, kw_only=True)
class _Table:
    """One file of rows."""

    path: Path
    rows: int
    kinds: dict[str, str]
    """What each column holds, as `image_column` takes it."""
    names: dict[str, tuple[str, ...]]
    """What the classes of a column are called."""
    check: Callable[[str, str | None], None]
    """Refuse the file if the column of images or that of labels is damaged or would take too much memory."""
    values: Callable[[str], Iterator[Any]]
    """The values of a plain column, from the first row on."""
    images: Callable[[str, int], Generator[tuple[int, Any], None, None]]
    """The files of a column of images, from a row or one before it on: (row, buffer, path, None or what is wrong)."""


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
        ValueError: if it cannot be read, names a file that is no regular one or is compressed, has no such split, or has
            not exactly one column of images.
        ImportError: if pyarrow is not installed.
    """
    _require(f"{folder}, a data set saved by datasets,")
    damaged = f"{folder} is no data set saved by datasets, or damaged: {{}}; save it again."
    place = folder
    try:
        if (folder / "dataset_dict.json").exists():
            splits = [str(name) for name in _document(folder / "dataset_dict.json")["splits"]]
            place = folder / _only(folder, splits, split)
        state, info = _document(place / "state.json"), _document(place / "dataset_info.json")
        if place == folder and split != "train":
            # One split of its own: as with a folder of images, it is what is meant where none is named.
            _only(folder, [str(state.get("_split") or "")], split)
        files = [place / entry["filename"] for entry in state["_data_files"]]
    except (TypeError, KeyError) as error:
        raise ValueError(damaged.format("a file in it names no files of data")) from error
    if not files:
        raise ValueError(damaged.format("it names no files of data"))
    features: Any = info.get("features")
    tables = [_arrow_table(file, features) for file in files]
    name = folder.resolve().name
    return _table_files(tables, name=name, source=f"folder {name} saved by datasets, split {split}")


def parquet_files(files: Sequence[Path], place: Path, split: str = "train") -> ImageFiles:
    """The image files in the rows of parquet files.

    Args:
        files: the files; those of which the name or the folder begins with a word for a split are of that split.
        place: the folder in which they lie, or the only file.
        split: which of their splits.

    Raises:
        ValueError: if they cannot be read, would take too much memory, have no such split, or have not exactly one column
            of images.
        ImportError: if pyarrow is not installed.
    """
    _require(f"{place}, which holds parquet files,")
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
    tables = [_parquet_table(file) for file in chosen]
    name = place.resolve().stem if place.is_file() else place.resolve().name
    many = f"{len(chosen):,} parquet files" if len(chosen) != 1 else "1 parquet file"
    return _table_files(tables, name=name, source=f"{many} in {name}{f', split {word}' if word else ''}")


def _table_files(tables: Sequence[_Table], *, name: str, source: str) -> ImageFiles:
    """The image files of tables, one behind the other, that must agree in what is read of them."""
    first = tables[0]
    count = sum(table.rows for table in tables)
    image = image_column(first.kinds, count, source)
    label, notes = label_column(first.kinds)
    for table in tables:
        for column in filter(None, (image, label)):
            if (table.kinds.get(column), table.names.get(column)) != (first.kinds[column], first.names.get(column)):
                raise ValueError(
                    f"the column {column} differs between {first.path} and {table.path} in what it holds or in the names of "
                    "its classes: write the files again alike, or name one of them."
                )
        table.check(image, label)
    check_label_count(count, source)
    labels = names = None
    if label is not None:
        values = itertools.chain.from_iterable(table.values(label) for table in tables)
        labels, names, notes = read_labels(label, first.kinds[label], values, first.names.get(label))
    key = [[str(table.path.resolve()), *stamp(table.path)] for table in tables]
    return ImageFiles(
        names=tuple(f"{name} row {i}" for i in range(count)),
        open=_Rows(tables, image).open,
        labels=labels,
        class_names=names,
        name=name,
        source=source,
        fingerprint=lambda: f"{key} {image}",
        notes=notes,
    )


class _Rows:
    """The images of tables, for threads that ask for one row after the other, more or less in order."""

    def __init__(self, tables: Sequence[_Table], image: str) -> None:
        self._tables, self._image = tables, image
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
        return open_regular(Path(found)) if isinstance(found, str) else found

    def _at(self, i: int) -> Any:
        if not self._next <= i < self._next + KEPT:
            self._coming.close()
            self._kept.clear()
            self._coming, self._next = self._from(i), i
        for row, content in self._coming:
            if row < self._next:
                continue
            self._next = row + 1
            held = content if content is None or isinstance(content, str | Exception) else _held(content)
            if row == i:
                return held
            self._kept[row] = held
            if len(self._kept) > KEPT:
                del self._kept[min(self._kept)]
        raise ValueError("the file ends before this row")

    def _from(self, start: int) -> Generator[tuple[int, Any], None, None]:
        for place in range(bisect_right(self._starts, start) - 1, len(self._tables)):
            first = self._starts[place]
            for row, content in self._tables[place].images(self._image, max(0, start - first)):
                yield first + row, content


def _held(content: Any) -> BinaryIO:
    """A file of these bytes: decoders hold several, and a few threads ask for them at a time."""
    if len(content) <= HELD:
        return io.BytesIO(content)
    file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115, closed by who opened the row
    file.write(content)
    file.seek(0)
    return file


def _parquet_table(path: Path) -> _Table:
    with _reading(path), open_regular(path) as file:
        check_contents(file, path)
        parquet = _parquet(file)
        schema, contents = parquet.schema_arrow, parquet.metadata
        kinds, names = _described(schema, path)
        leaves = [contents.schema.column(j).path for j in range(contents.num_columns)]

    def parts(column: str) -> list[str]:
        """The plain columns that hold what is read of a column."""
        return [leaf for leaf in (column, f"{column}.bytes", f"{column}.path") if leaf in leaves]

    def check(image: str, label: str | None) -> None:
        limits = dict.fromkeys(parts(image), 0)
        for text in (f"{image}.path", *([label] if label is not None and kinds[label] == "text" else [])):
            limits[text] = TEXT_PAGE
        with _reading(path), open_regular(path) as file:
            check_pages(file, path, contents, {j: limits[leaf] for j, leaf in enumerate(leaves) if leaf in limits})

    def values(column: str) -> Iterator[Any]:
        with _reading(path), open_regular(path) as file:
            size = TEXTS if kinds[column] == "text" else BUFFER
            for batch in _parquet(file).iter_batches(size, columns=[column], use_threads=False):
                for value in batch.column(0):
                    yield value.as_py()

    def images(column: str, start: int) -> Generator[tuple[int, Any], None, None]:
        with open_regular(path) as file:
            parquet = _parquet(file, contents)
            end = 0
            for group in range(contents.num_row_groups):
                row, end = end, end + contents.row_group(group).num_rows
                if end <= start:
                    continue
                wrong = ValueError(f"{path} has fewer rows than it says")
                try:
                    with _reading(path):
                        # One row at a time: a dictionary, a page and one value are in memory then.
                        batches = parquet.iter_batches(1, [group], parts(column), use_threads=False)
                        for value in itertools.islice((value for batch in batches for value in batch[0]), end - row):
                            yield row, _content(value)
                            row += 1
                except ValueError as error:
                    wrong = error
                yield from ((row, wrong) for row in range(row, end))

    return _Table(
        path=path, rows=contents.num_rows, kinds=kinds, names=names, check=check, values=values, images=images
    )


def _parquet(file: BinaryIO, contents: Any = None) -> Any:
    """Pyarrow's reader of a file, which reads no more of it at a time than a page."""
    import pyarrow as pa  # pyright: ignore[reportMissingImports]
    from pyarrow.parquet import ParquetFile  # pyright: ignore[reportMissingImports, reportUnknownVariableType]

    return ParquetFile(pa.PythonFile(file, mode="r"), metadata=contents, buffer_size=BUFFER, pre_buffer=False)


def _arrow_table(path: Path, features: object) -> _Table:
    import pyarrow as pa  # pyright: ignore[reportMissingImports]

    with _reading(path):
        with open_regular(path) as file:
            size = file.seek(0, io.SEEK_END)
        mapped: Any = pa.memory_map(str(path))
        try:
            compressed = any(map(_is_compressed, pa.ipc.MessageReader.open_stream(mapped)))
        except (struct.error, IndexError) as error:
            raise ValueError(f"{path} cannot be read: its messages are damaged.") from error
        if compressed:
            raise ValueError(f"{path} is compressed, which datasets never does: save the data set again.")
        mapped.seek(0)
        # Nothing is read but the heads of the batches: their values stay where the file is mapped.
        table: Any = pa.ipc.open_stream(mapped).read_all()
        kinds, names = _described(table.schema, path, features)
    if table.num_rows > row_limit(size):
        raise ValueError(
            f"{path} has {size:,} bytes and says that it has {table.num_rows:,} rows, above the limit of "
            f"{row_limit(size):,}: no images are as small as that."
        )

    def check(image: str, label: str | None) -> None:
        # Where a value begins and ends is what the file says.
        with _reading(path):
            for column in filter(None, (image, label)):
                table[column].validate(full=True)

    def values(column: str) -> Iterator[Any]:
        for chunk in table[column].chunks:
            for value in chunk:
                yield value.as_py()

    def images(column: str, start: int) -> Generator[tuple[int, Any], None, None]:
        row = start
        for chunk in table[column].slice(start).chunks:
            for value in chunk:
                yield row, _content(value)
                row += 1

    return _Table(path=path, rows=table.num_rows, kinds=kinds, names=names, check=check, values=values, images=images)


def _is_compressed(message: Any) -> bool:
    """Whether a message of Arrow's format holds compressed values: its header has a field for how.

    https://github.com/apache/arrow/blob/main/format/Message.fbs; pyarrow has no word for it.
    """
    data = message.metadata.to_pybytes()

    def field(table: int, number: int) -> int:
        """Where a table of FlatBuffers has a field, or 0."""
        start = table - struct.unpack_from("<i", data, table)[0]
        length = struct.unpack_from("<H", data, start)[0]
        place = 4 + 2 * number
        offset = struct.unpack_from("<H", data, start + place)[0] if place < length else 0
        return table + offset if offset else 0

    def inner(place: int) -> int:
        return place + struct.unpack_from("<I", data, place)[0]

    header = field(inner(0), 2)
    if message.type == "dictionary":
        header = field(inner(header), 1)
    return message.type in ("record batch", "dictionary") and field(inner(header), 3) != 0


def _described(schema: Any, path: Path, features: object = None) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """What each column holds and what the classes are called, by its type and the description that `datasets` adds."""
    if len(set(schema.names)) < len(schema.names):
        raise ValueError(f"{path} has two columns of one name: write it again without.")
    if not isinstance(features, dict):
        try:
            features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        except (KeyError, TypeError, ValueError, RecursionError):
            features = None
    said = cast("dict[str, Any]", features) if isinstance(features, dict) else {}
    kinds: dict[str, str] = {}
    names: dict[str, tuple[str, ...]] = {}
    for column in schema:
        kind = _kind(column.type)
        feature: Any = said.get(column.name)
        declared = str(feature.get("_type", "Value")) if isinstance(feature, dict) else "Value"
        if declared == "Image" and kind in ("bytes", "text"):
            kind = "Image"
        elif declared == "ClassLabel" and kind == "number" and isinstance(feature.get("names"), list):
            kind = "ClassLabel"
            names[column.name] = tuple(map(str, feature["names"]))
        elif declared not in ("Value", "Image", "ClassLabel"):
            kind = declared
        kinds[column.name] = kind
    return kinds, names


def _kind(dtype: Any) -> str:
    from pyarrow import types  # pyright: ignore[reportMissingImports, reportUnknownVariableType]

    if types.is_dictionary(dtype):
        dtype = dtype.value_type
    if types.is_integer(dtype):
        return "number"
    if types.is_string(dtype) or types.is_large_string(dtype):
        return "text"
    if types.is_struct(dtype) and dtype.get_field_index("bytes") >= 0:
        path = dtype.get_field_index("path")
        plain = _kind(dtype.field("bytes").type) == "bytes" and (path < 0 or _kind(dtype.field("path").type) == "text")
        return "bytes" if plain and not types.is_struct(dtype.field("bytes").type) else "struct"
    return "bytes" if types.is_binary(dtype) or types.is_large_binary(dtype) else str(dtype)[:100]


def _content(value: Any) -> Any:
    """The buffer of an image's file, its path, or None, from a value of a column of images."""
    import pyarrow as pa  # pyright: ignore[reportMissingImports]

    if not value.is_valid:
        return None
    if isinstance(value, pa.DictionaryScalar):
        return _content(value.value)
    if isinstance(value, pa.StructScalar):
        parts = (_content(value[name]) for name in ("bytes", "path") if name in value)
        return next((content for content in parts if content is not None), None)
    # A path is text, and what is in a file is not.
    return value.as_py() if _kind(value.type) == "text" else value.as_buffer()


@contextmanager
def _reading(path: Path) -> Generator[None, None, None]:
    """Say of which file pyarrow complains."""
    from pyarrow import ArrowException  # pyright: ignore[reportMissingImports, reportUnknownVariableType]

    try:
        yield
    except (ArrowException, OSError, UnicodeError, KeyError) as error:
        text = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ValueError(f"{path} cannot be read: {text[:500]}") from error


def _require(purpose: str) -> None:
    try:
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{purpose} needs the package pyarrow: pip install "stablefield[hub]"') from error


def _document(path: Path) -> dict[str, Any]:
    """What a file of JSON says; nothing if it is missing or not understood."""
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
