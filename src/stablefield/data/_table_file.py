"""One table on disk: a parquet file, or an Arrow file as `datasets` saves it.

Both are read by pyarrow, row by row: a value to which many rows point would be there once for each if a column were decoded
as a whole. `stablefield.data._parquet_pages` bounds what a row takes. Arrow files are mapped, and refused where they are
compressed.
"""

import io
import itertools
import json
import struct
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from stablefield._regular_file import open_regular
from stablefield.data._parquet_pages import TEXT_PAGE, check_contents, check_pages, row_limit

__all__ = ["Table", "arrow_table", "parquet_table", "return_free_memory"]

BUFFER = 2**16
TEXTS = 64
"""Rows of a column of texts that are decoded at a time, each of which may be as long as a page."""


@dataclass(frozen=True, kw_only=True)
class Table:
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


def parquet_table(path: Path) -> Table:
    """A parquet file; its table of contents is read, and nothing else.

    Raises:
        ValueError: if it is no regular file, damaged, or its table of contents is too long.
    """
    with _parquet(path) as parquet:
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
        size = TEXTS if kinds[column] == "text" else BUFFER
        with _parquet(path, contents) as parquet:
            for batch in parquet.iter_batches(size, columns=[column], use_threads=False):
                for value in batch.column(0):
                    yield value.as_py()

    def images(column: str, start: int) -> Generator[tuple[int, Any], None, None]:
        with _parquet(path, contents) as parquet:
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

    return Table(path=path, rows=contents.num_rows, kinds=kinds, names=names, check=check, values=values, images=images)


@contextmanager
def _parquet(path: Path, contents: Any = None) -> Generator[Any, None, None]:
    """The reader of a parquet file, which reads no more of it at a time than a page."""
    import pyarrow as pa  # pyright: ignore[reportMissingImports]
    from pyarrow.parquet import ParquetFile  # pyright: ignore[reportMissingImports, reportUnknownVariableType]

    with _reading(path), open_regular(path) as file:
        if contents is None:
            check_contents(file, path)
        try:
            yield ParquetFile(pa.PythonFile(file, mode="r"), metadata=contents, buffer_size=BUFFER, pre_buffer=False)
        finally:
            return_free_memory()


def arrow_table(path: Path, features: object) -> Table:
    """An Arrow file in the stream format, mapped.

    Args:
        path: the file.
        features: what `datasets` says of its columns, as in dataset_info.json, or None.

    Raises:
        ValueError: if it is no regular file, damaged or compressed, or has more rows than its size allows.
    """
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

    return Table(path=path, rows=table.num_rows, kinds=kinds, names=names, check=check, values=values, images=images)


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


def return_free_memory() -> None:
    """Have pyarrow give freed memory back: it keeps it for what comes next, several times as much as it uses."""
    import pyarrow as pa  # pyright: ignore[reportMissingImports]

    pa.default_memory_pool().release_unused()


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
