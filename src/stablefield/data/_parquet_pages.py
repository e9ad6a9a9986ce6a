"""What a parquet file says of its size in memory, checked before pyarrow believes it.

pyarrow makes room for a page as soon as it has read the page's head, and an object for each piece that the table of contents
at the end of the file lists. A few bytes are enough to ask for GBs: pages of zeros, values of which many rows point to one,
a million columns. So the length of the table of contents is bounded, and the heads of all pages of the columns that are
wanted are read here first; they are structures of Thrift's compact protocol
(https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift). Pages that pass are decoded row by
row then, so that memory holds a dictionary, a page and one value at a time.
"""

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

__all__ = ["TEXT_PAGE", "check_contents", "check_pages", "row_limit"]

PAGE_FREE, PAGE_LIMIT, PAGE_EXPANSION = 2**24, 2**28, 4
"""Bytes that any page may have in memory; those that one may have which is no more than 4 times larger than on disk."""
TEXT_PAGE = 2**22
"""Bytes that a page of texts may have; pyarrow writes pages and dictionaries of 1 MiB."""
CONTENTS_FREE, CONTENTS_SHARE = 2**20, 512
"""Bytes of the table of contents: of any file, and one more for each so many bytes of the file."""
ROWS_FREE, ROWS_SHARE = 2**20, 64
"""Rows of one file: of any, and one more for each so many bytes: no image file is shorter, but rows may share one."""
HEAD_BYTES = 2**16
"""Bytes that the head of a page may have: pyarrow writes statistics of up to 4 kB there."""
# Values of these encodings are made of others' parts, or counted by the page's content: no head bounds their size.
UNBOUNDED = {6: "DELTA_LENGTH_BYTE_ARRAY", 7: "DELTA_BYTE_ARRAY"}

Fields: TypeAlias = "dict[int, int | bytes | Fields]"


def row_limit(size: int) -> int:
    """How many rows a file of `size` bytes may have."""
    return ROWS_FREE + size // ROWS_SHARE


def check_contents(file: BinaryIO, path: Path) -> None:
    """Refuse a file whose table of contents is missing or too long to be parsed.

    Args:
        file: the parquet file.
        path: what it is called in messages.

    Raises:
        ValueError: if it is no whole parquet file, or the table is longer than any that a file of its size needs.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    end = file.read(8)
    length = int.from_bytes(end[:4], "little")
    if size < 12 or end[4:] != b"PAR1" or length > size - 12:
        raise ValueError(f"the parquet file {path} cannot be read: it is cut short or damaged.")
    limit = CONTENTS_FREE + size // CONTENTS_SHARE
    if length > limit:
        raise ValueError(
            f"the parquet file {path} has {size:,} bytes and a table of contents of {length:,}, above the limit of "
            f"{limit:,} against files that memory would not hold: write it again with larger row groups or fewer columns."
        )


def check_pages(file: BinaryIO, path: Path, contents: Any, limits: Mapping[int, int]) -> None:
    """Refuse a file whose pages say that they take too much memory.

    Args:
        file: the parquet file.
        path: what it is called in messages.
        contents: its table of contents, a `pyarrow.parquet.FileMetaData`.
        limits: for the number of each column of plain values that will be read, how many bytes a page of it may have
            in memory; 0 for the limit of pages of images.

    Raises:
        ValueError: if a page is too large or damaged, its values are encoded so that their size is not known, or the file
            has more rows than its size allows.
    """
    size = file.seek(0, os.SEEK_END)
    if contents.num_rows > row_limit(size):
        raise ValueError(
            f"the parquet file {path} has {size:,} bytes and says that it has {contents.num_rows:,} rows, above the limit "
            f"of {row_limit(size):,}: no images are as small as that."
        )
    left = size
    for group in map(contents.row_group, range(contents.num_row_groups)):
        for number, limit in limits.items():
            column = group.column(number)
            # Pages that several parts of the table point to would be looked at without an end.
            left -= column.total_compressed_size
            start, dictionary = column.data_page_offset, column.dictionary_page_offset or 0
            start = dictionary if 0 < dictionary < start else start
            try:
                if start < 0 or column.total_compressed_size < 0 or left < 0:
                    raise IndexError
                for head, stored in _heads(file, start, min(size, start + column.total_compressed_size)):
                    _check_page(head, stored, limit, group.num_rows)
            except (IndexError, struct.error) as error:
                raise ValueError(
                    f"the parquet file {path} cannot be read: its pages of {column.path_in_schema} are damaged."
                ) from error
            except ValueError as error:
                raise ValueError(f"the parquet file {path}: a page of {column.path_in_schema} {error}.") from error


def _check_page(head: Fields, stored: int, limit: int, rows: int) -> None:
    size = _whole(head, 2)
    limit = limit or max(PAGE_FREE, min(PAGE_LIMIT, PAGE_EXPANSION * stored))
    if size > limit:
        raise ValueError(
            f"has {stored:,} bytes and would take {size:,} in memory, above the limit of {limit:,}: write the file again, "
            "with images as PNG or JPEG files, 100 rows to a row group"
        )
    # One of a data page, a dictionary, or a data page of version 2.
    for kind, encoding in ((5, 2), (7, 2), (8, 4)):
        said = head.get(kind)
        if said is None:
            continue
        if not isinstance(said, dict):
            raise IndexError
        # A dictionary may be that of the whole file, with values that no row of this part has.
        if _whole(said, 1) > (max(rows, ROWS_FREE) if kind == 7 else rows):
            raise ValueError(f"says that it has {_whole(said, 1):,} values for {rows:,} rows")
        if _whole(said, encoding) in UNBOUNDED:
            raise ValueError(
                f"is encoded as {UNBOUNDED[_whole(said, encoding)]}, which does not say how large its values are: write the "
                "file again without"
            )


def _heads(file: BinaryIO, place: int, end: int) -> Iterator[tuple[Fields, int]]:
    """The heads of the pages from `place` to `end`, each with the number of bytes that its page has on disk."""
    while place < end:
        file.seek(place)
        data = file.read(min(HEAD_BYTES, end - place))
        head, length = _fields(data, 0)
        stored = _whole(head, 3)
        place += length + stored
        if place > end:
            raise IndexError
        yield head, stored


def _whole(fields: Fields, number: int) -> int:
    found = fields.get(number, 0)
    if not isinstance(found, int) or found < 0:
        raise IndexError
    return found


def _fields(data: bytes, place: int, depth: int = 0) -> tuple[Fields, int]:
    """The fields of a structure by their numbers, and where it ends; `IndexError` for what no head of a page holds."""
    fields: Fields = {}
    number = 0
    while data[place]:
        kind, step = data[place] & 15, data[place] >> 4
        place += 1
        if step:
            number += step
        else:
            number, place = _varint(data, place)
        if kind in (1, 2):
            fields[number] = int(kind == 1)
        elif kind == 3:
            fields[number] = data[place]
            place += 1
        elif kind in (4, 5, 6):
            fields[number], place = _varint(data, place)
        elif kind == 7:
            place += 8
        elif kind == 8:
            length, place = _length(data, place)
            fields[number] = data[place : place + length]
            place += length
        elif kind == 12 and depth < 8:
            fields[number], place = _fields(data, place, depth + 1)
        else:
            raise IndexError
    return fields, place + 1


def _length(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[place] & 127) << shift
        shift += 7
        place += 1
        if data[place - 1] < 128:
            return value, place
        if shift > 63:
            raise IndexError


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value, place = _length(data, place)
    return (value >> 1) ^ -(value & 1), place
