"""One table on disk: a parquet file, or an Arrow file saved by `datasets`.

pyarrow reads both row by row: decoding a whole column would copy a value that many rows share once for each of them.
`stablefield.data._parquet_pages` bounds the memory of a row. Arrow files are mapped, and refused if they are compressed.
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
from stablefield.data._parquet_pages import TEXT_PAGE, check_footer, check_pages, row_limit

__all__ = ["Table", "arrow_table", "parquet_table", "return_free_memory"]

BUFFER = 2**16
TEXTS = 64
"""Rows of a column of texts to decode at a time; each may be as long as a page."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """One file of rows."""

    path: Path
    rows: int
    kinds: dict[str, str]
    """The content of each column, as `image_column` takes it."""
    names: dict[str, tuple[str, ...]]
    """The class names of a column."""
    check: Callable[[str, str | None], None]
    """Refuse the file if its column of images or of labels is damaged or would take too much memory."""
    values: Callable[[str], Iterator[Any]]
    """The values of a plain column, from the first row on."""
    images: Callable[[str, int], Generator[tuple[int, Any], None, None]]
    """The files in a column of images, starting at or before a given row: (row, buffer, path, None or an error)."""


def parquet_table(path: Path) -> Table:
    """A parquet file; reads only its footer.

    Raises:
        ValueError: if it is not a regular file, is damaged, or its footer is too long.
    """
    with _parquet(path) as parquet:
        schema, contents = parquet.schema_arrow, parquet.metadata
        kinds, names = _described(schema, path)
        leaves = [contents.schema.column(j).path for j in range(contents.num_columns)]

    def parts(column: str) -> list[str]:
        """The plain columns that hold the parts we read of a column."""
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
                wrong = ValueError(f"{path} has fewer rows than its footer states")
                try:
                    with _reading(path):
                        # One row at a time, so that memory holds one dictionary, one page and one value.
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
    """Open a parquet file for reading page by page."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    with _reading(path), open_regular(path) as file:
        if contents is None:
            check_footer(file, path)
        try:
            yield ParquetFile(pa.PythonFile(file, mode="r"), metadata=contents, buffer_size=BUFFER, pre_buffer=False)
        finally:
            return_free_memory()


def arrow_table(path: Path, features: object) -> Table:
    """An Arrow file in the stream format, mapped.

    Args:
        path: the file.
        features: the description of its columns that `datasets` writes to dataset_info.json, or None.

    Raises:
        ValueError: if it is not a regular file, is damaged or compressed, or has more rows than its size allows.
    """
    import pyarrow as pa

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
        # Reads only the headers of the batches; their values stay in the mapped file.
        table: Any = pa.ipc.open_stream(mapped).read_all()
        kinds, names = _described(table.schema, path, features)
    if table.num_rows > row_limit(size):
        raise ValueError(
            f"{path} has {size:,} bytes and claims {table.num_rows:,} rows, above the limit of {row_limit(size):,}: no "
            "images are that small; save the data set again."
        )

    def check(image: str, label: str | None) -> None:
        # The file itself states where a value begins and ends, so check that.
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
    """Whether an Arrow message holds compressed values: its header then has a compression field.

    https://github.com/apache/arrow/blob/main/format/Message.fbs; pyarrow does not expose it.
    """
    data = message.metadata.to_pybytes()

    def field(table: int, number: int) -> int:
        """The position of a field in a FlatBuffers table, or 0."""
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
    """Make pyarrow release freed memory, of which it otherwise keeps several times what it uses."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()


def _described(schema: Any, path: Path, features: object = None) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """The content and class names of each column, from its type and the description that `datasets` adds."""
    if len(set(schema.names)) < len(schema.names):
        raise ValueError(f"{path} has two columns with the same name: rename one.")
    if not isinstance(features, dict):
        try:
            features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        except (KeyError, TypeError, ValueError, RecursionError):
            features = None
    described = cast("dict[str, Any]", features) if isinstance(features, dict) else {}
    kinds: dict[str, str] = {}
    names: dict[str, tuple[str, ...]] = {}
    for column in schema:
        kind = _kind(column.type)
        feature: Any = described.get(column.name)
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
    from pyarrow import types

    if types.is_dictionary(dtype):
        dtype = dtype.value_type
    if types.is_integer(dtype):
        return "number"
    if types.is_boolean(dtype):
        return "bool"
    if types.is_floating(dtype):
        return "float"
    if types.is_string(dtype) or types.is_large_string(dtype):
        return "text"
    if types.is_struct(dtype) and dtype.get_field_index("bytes") >= 0:
        path = dtype.get_field_index("path")
        plain = _kind(dtype.field("bytes").type) == "bytes" and (path < 0 or _kind(dtype.field("path").type) == "text")
        return "bytes" if plain and not types.is_struct(dtype.field("bytes").type) else "struct"
    return "bytes" if types.is_binary(dtype) or types.is_large_binary(dtype) else str(dtype)[:100]


def _content(value: Any) -> Any:
    """The buffer of an image's file, its path, or None, from a value of a column of images."""
    import pyarrow as pa

    if not value.is_valid:
        return None
    if isinstance(value, pa.DictionaryScalar):
        return _content(value.value)
    if isinstance(value, pa.StructScalar):
        parts = (_content(value[name]) for name in ("bytes", "path") if name in value)
        return next((content for content in parts if content is not None), None)
    # A path is text; the content of a file is bytes.
    return value.as_py() if _kind(value.type) == "text" else value.as_buffer()


@contextmanager
def _reading(path: Path) -> Generator[None, None, None]:
    """Name the file in pyarrow's errors."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, UnicodeError, KeyError) as error:
        text = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ValueError(f"{path} cannot be read: {text[:500]}") from error
