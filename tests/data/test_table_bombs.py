"""Parquet and Arrow files of a few MB at most that stand for GBs: read in bounded memory, or refused with the reason."""

import json
import re
import struct
from pathlib import Path

import bombs
import numpy as np
import pytest

from stablefield.data import open_images

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
MIB = bombs.MIB
BOUND = 400
"""MiB that opening any of them may take, the import of pyarrow included."""
PADDED = bombs.image_bytes() + bytes(MIB)
"""An image file that decoders read the first bytes of."""


def shared(value, rows, kind=None):
    """A column in which all rows point to one value."""
    indices = pyarrow.array(np.zeros(rows, np.int32))
    return pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array([value], kind or pyarrow.binary()))


def repeated(value, times, pieces=1):
    """A column with a value that is there for each row."""
    return pyarrow.chunked_array([pyarrow.array([value] * times, pyarrow.binary())] * pieces)


def cells(column):
    """The column as `datasets.Image` keeps it."""
    parts = [pyarrow.StructArray.from_arrays([c, pyarrow.nulls(len(c), "string")], ["bytes", "path"]) for c in column.chunks]
    return pyarrow.chunked_array(parts)


def write(path, columns, **options):
    parquet.write_table(pyarrow.table(columns), path, **{"compression": "zstd", **options})
    return path


def dictionaries(where):
    yield "shared", write(where / "a.parquet", {"image": shared(PADDED, 1500)}), "^1500 images$"
    path = write(where / "b.parquet", {"image": shared(PADDED, 1500)}, store_schema=False)
    assert path.stat().st_size < 1024
    yield "shared without Arrow's schema", path, "^1500 images$"
    column = pyarrow.chunked_array([shared(PADDED, 1500).cast(pyarrow.binary())])
    yield "shared in cells", write(where / "c.parquet", {"image": cells(column)}), "^1500 images$"
    path = write(where / "d.parquet", {"image": shared(bombs.image_bytes() + bytes(63 * MIB), 8)}, store_schema=False)
    yield "one long value", path, "^8 images$"
    column = pyarrow.array([PADDED + bytes([k]) for k in range(60)] * 4)
    path = write(where / "e.parquet", {"image": column}, dictionary_pagesize_limit=2**30)
    yield "a long dictionary", path, "^240 images$"
    png = shared(bombs.image_bytes(), 1500)
    path = write(where / "f.parquet", {"image": png, "label": shared("x" * MIB, 1500, "string")})
    yield "long texts as labels", path, "^1500 images$"
    path = write(where / "g.parquet", {"image": png, "label": shared("x" * 8 * MIB, 1500, "string")}, store_schema=False)
    yield "longer texts as labels", path, "a page of label has .* would take 8,"
    texts = [f"{k:1000000}" for k in range(60)]
    path = write(where / "h.parquet", {"image": shared(bombs.image_bytes(), 60), "label": texts}, use_dictionary=False)
    yield "texts in one page", path, "a page of label has .* would take 60,"


def pages(where):
    for codec in ("zstd", "gzip", "snappy", "brotli", "lz4"):
        column = repeated(PADDED, 60, 5)
        path = write(where / f"{codec}.parquet", {"image": column}, compression=codec, use_dictionary=False, write_batch_size=60)
        yield f"pages of {codec}", path, "^300 images$"
    for version in ("1.0", "2.0"):
        column = cells(repeated(PADDED, 60, 5))
        options = {"use_dictionary": False, "write_batch_size": 60, "data_page_version": version}
        path = write(where / f"cells{version}.parquet", {"image": column}, **options)
        yield f"pages of cells, version {version}", path, "^300 images$"
        path = write(where / f"long{version}.parquet", {"image": column}, use_dictionary=False, data_page_version=version)
        yield f"a page of 300 MiB, version {version}", path, "a page of image.bytes has .* would take 314,"
    for encoding in ("DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"):
        column = repeated(PADDED, 60, 5)
        options = {"use_dictionary": False, "column_encoding": {"image": encoding}, "write_batch_size": 60}
        yield encoding, write(where / f"{encoding}.parquet", {"image": column}, **options), f"is encoded as {encoding}"
    png = bombs.image_bytes()
    column = pyarrow.array([[png] * 3] * 4)
    yield "lists", write(where / "lists.parquet", {"image": column}), "exactly one column of images"
    path = write(where / "rows.parquet", {"image": pyarrow.nulls(2**24, pyarrow.binary())})
    yield "rows of nothing", path, "says that it has 16,777,216 rows, above the limit of 1,048,"
    path = write(where / "fewer.parquet", {"image": pyarrow.nulls(2**19, pyarrow.binary())})
    yield "half a million rows of nothing", path, "none of 524288 image files|none of 524,288 image files"


def contents(where):
    """Tables of contents that say much with few bytes."""
    png = bombs.image_bytes()
    for count, says in ((100_000, "a table of contents of"), (12_000, "^4 images$")):
        columns = {"image": [png] * 4, **{f"c{k}": pyarrow.array([0] * 4, "int8") for k in range(count)}}
        options = {"use_dictionary": False, "write_statistics": False, "store_schema": False}
        yield f"{count} columns", write(where / f"{count}.parquet", columns, **options), says
    end = varint(0) + b"\x15\x02\x19\xfc" + unsigned(2**20) + bytes(2**20)
    path = where / "short.parquet"
    path.write_bytes(b"PAR1" + end + struct.pack("<I", len(end)) + b"PAR1")
    yield "a million elements of no bytes", path, "short.parquet cannot be read"


def saved(where):
    """Folders that look as if `datasets` had saved them."""

    def folder(name, column, **options):
        place = where / name
        place.mkdir()
        table = pyarrow.table({"image": column})
        chosen = pyarrow.ipc.IpcWriteOptions(**options)
        with pyarrow.ipc.new_stream(place / "data.arrow", table.schema, options=chosen) as stream:
            stream.write_table(table)
        (place / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
        (place / "dataset_info.json").write_text("{}")
        return place

    yield "Arrow's dictionary", folder("a", shared(PADDED, 1500)), "^1500 images$"
    for codec in ("zstd", "lz4"):
        yield f"Arrow with {codec}", folder(codec, repeated(PADDED, 60, 40), compression=codec), "is compressed"
        yield f"a dictionary with {codec}", folder(f"d{codec}", shared(PADDED, 1500), compression=codec), "is compressed"
    yield "Arrow's rows of nothing", folder("n", pyarrow.nulls(2**24).cast("binary").slice(0, 2**22)), "4,194,304 rows"


def unsigned(value):
    return bytes([*(value >> 7 * k & 127 | 128 for k in range(max(0, value.bit_length() - 1) // 7)), value >> (max(0, value.bit_length() - 1) // 7 * 7)])


def varint(value):
    return unsigned(value << 1)


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process's memory is measured by Linux's /proc"
)
def test_no_table_takes_more_memory_than_is_stated(tmp_path):
    cases = [case for make in (dictionaries, pages, contents, saved) for case in make(tmp_path)]
    found = bombs.opened({name: (path, {}) for name, path, _ in cases})
    report = [
        f"{name}: {found[name][1]:.0f} MiB of {BOUND}, {found[name][0][:300]}"
        for name, _, says in cases
        if not re.search(says, found[name][0]) or found[name][1] > BOUND
    ]
    assert report == []
