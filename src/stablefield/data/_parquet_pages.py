"""Check how much memory a parquet file claims before pyarrow allocates it.

pyarrow allocates a page as soon as it has read the page's header, and an object for each entry in the footer at the end of
the file. A few bytes can thus claim gigabytes: pages of zeros, one value shared by many rows, a million columns. So this
module bounds the length of the footer, and first reads the headers of all pages of the columns that will be read. They are
structures of Thrift's compact protocol
(https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift). Pages that pass are then decoded row
by row, so that memory holds a dictionary, a page and one value at a time.
"""

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

__all__ = ["TEXT_PAGE", "check_footer", "check_pages", "row_limit"]

PAGE_FREE, PAGE_LIMIT, PAGE_EXPANSION = 2**24, 2**28, 4
"""Bytes that any page may take in memory, and the limit for pages that take at most 4 times their size on disk."""
TEXT_PAGE = 2**22
"""Bytes that a page of texts may have; pyarrow writes pages and dictionaries of 1 MiB."""
FOOTER_FREE, FOOTER_SHARE = 2**20, 512
"""Bytes of the footer that any file may have, and bytes of the file for which it may have one more."""
ROWS_FREE, ROWS_SHARE = 2**20, 64
"""Rows that any file may have, and bytes of the file for each further row: no image is smaller, but rows may share one."""
HEAD_BYTES = 2**16
"""Bytes that a page's header may have: pyarrow writes statistics of up to 4 kB there."""
# These encodings build values from parts of others, or state sizes in the page's content: no header bounds their size.
UNBOUNDED = {6: "DELTA_LENGTH_BYTE_ARRAY", 7: "DELTA_BYTE_ARRAY"}

Fields: TypeAlias = "dict[int, int | bytes | Fields]"


def row_limit(size: int) -> int:
    """How many rows a file of `size` bytes may have."""
    return ROWS_FREE + size // ROWS_SHARE


def check_footer(file: BinaryIO, path: Path) -> None:
    """Refuse a file whose footer is missing or too long to be parsed.

    Args:
        file: the parquet file.
        path: its name in messages.

    Raises:
        ValueError: if it is not a complete parquet file, or its footer is longer than a file of its size needs.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    end = file.read(8)
    length = int.from_bytes(end[:4], "little")
    if size < 12 or end[4:] != b"PAR1" or length > size - 12:
        raise ValueError(f"the parquet file {path} cannot be read: it is cut short or damaged.")
    limit = FOOTER_FREE + size // FOOTER_SHARE
    if length > limit:
        raise ValueError(
            f"the parquet file {path} has {size:,} bytes and a footer of {length:,}, above the limit of {limit:,} that "
            "protects memory: write it again with larger row groups or fewer columns."
        )


def check_pages(file: BinaryIO, path: Path, contents: Any, limits: Mapping[int, int]) -> None:
    """Refuse a file whose pages claim too much memory.

    Args:
        file: the parquet file.
        path: its name in messages.
        contents: its footer, a `pyarrow.parquet.FileMetaData`.
        limits: for the number of each column of plain values that will be read, how many bytes its pages may take in
            memory; 0 for the limit of pages of images.

    Raises:
        ValueError: if a page is too large or damaged, its encoding hides the size of its values, or the file has more rows
            than its size allows.
    """
    size = file.seek(0, os.SEEK_END)
    if contents.num_rows > row_limit(size):
        raise ValueError(
            f"the parquet file {path} has {size:,} bytes and claims {contents.num_rows:,} rows, above the limit of "
            f"{row_limit(size):,}: no images are that small; write it again."
        )
    left = size
    for group in map(contents.row_group, range(contents.num_row_groups)):
        for number, limit in limits.items():
            column = group.column(number)
            # Footer entries could point to the same pages again and again, and the check would never end.
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
        page = head.get(kind)
        if page is None:
            continue
        if not isinstance(page, dict):
            raise IndexError
        # A dictionary may belong to the whole file, with values that no row of this group has.
        if _whole(page, 1) > (max(rows, ROWS_FREE) if kind == 7 else rows):
            raise ValueError(f"claims {_whole(page, 1):,} values for {rows:,} rows")
        if _whole(page, encoding) in UNBOUNDED:
            raise ValueError(
                f"is encoded as {UNBOUNDED[_whole(page, encoding)]}, which does not state how large its values are: write "
                "the file again with another encoding"
            )


def _heads(file: BinaryIO, place: int, end: int) -> Iterator[tuple[Fields, int]]:
    """The headers of the pages from `place` to `end`, each with its page's size on disk in bytes."""
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
    """The fields of a structure by number, and where it ends; `IndexError` for content that no page header has."""
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
