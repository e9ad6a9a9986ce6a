"""Parquet and Arrow files of a few MB at most that stand for GBs: read in bounded memory, or refused with the reason."""

import io
import re
import struct
from pathlib import Path
from types import SimpleNamespace

import bombs
import numpy as np
import pytest

from stablefield.data import open_images
from stablefield.data._parquet_pages import check_pages
from stablefield.data._tables import parquet_files

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
MIB = bombs.MIB
BOUND = 340
"""MiB above the imports that opening any of them may take."""
MANY = 165
"""Images of a MiB each. To open them may take this many MiB less 30 at most: all of them at once take more."""
ALL = f"^{MANY} images$"
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
    parts = [
        pyarrow.StructArray.from_arrays([c, pyarrow.nulls(len(c), "string")], ["bytes", "path"]) for c in column.chunks
    ]
    return pyarrow.chunked_array(parts)


def write(path, columns, **options):
    parquet.write_table(pyarrow.table(columns), path, **{"compression": "zstd", **options})
    return path


def dictionaries(where):
    """One value for many rows."""
    yield "shared", write(where / "a.parquet", {"image": shared(PADDED, MANY)}), ALL
    path = write(where / "b.parquet", {"image": shared(PADDED, MANY)}, store_schema=False)
    assert path.stat().st_size < 1024
    yield "shared without Arrow's schema", path, ALL
    path = write(where / "c.parquet", {"image": cells(repeated(PADDED, MANY))}, write_batch_size=1)
    yield "shared in cells", path, ALL
    path = write(where / "d.parquet", {"image": shared(bombs.image_bytes() + bytes(15 * MIB), 8)}, store_schema=False)
    yield "one long value", path, "^8 images$"
    path = write(where / "l.parquet", {"image": shared(bombs.image_bytes() + bytes(16 * MIB), 8)}, store_schema=False)
    yield "one longer value", path, "a page of image has .* would take 16,"
    column = pyarrow.array([PADDED + bytes([k]) for k in range(15)] * 16)[:MANY]
    path = write(where / "e.parquet", {"image": column}, dictionary_pagesize_limit=2**30)
    yield "a long dictionary", path, ALL
    png = shared(bombs.image_bytes(), 1500)
    path = write(
        where / "f.parquet",
        {"image": shared(bombs.image_bytes(), 500), "label": shared("x" * MIB, 500, "string")},
        store_schema=False,
    )
    yield "long texts as labels", path, "^500 images$"
    path = write(where / "g.parquet", {"image": png, "label": shared("x" * 8 * MIB, 1500, "string")})
    yield "longer texts as labels", path, "a page of label has .* would take 8,"
    texts = [f"{k:1000000}" for k in range(60)]
    path = write(where / "h.parquet", {"image": shared(bombs.image_bytes(), 60), "label": texts}, use_dictionary=False)
    yield "texts in one page", path, "a page of label has .* would take 60,"
    options = {"use_dictionary": False, "write_batch_size": 1}
    path = write(where / "i.parquet", {"image": shared(bombs.image_bytes(), 60), "label": texts}, **options)
    yield "texts in many pages", path, "more than 33,554,432 letters of different texts"


def pages(where):
    """Values that are compressed to a thousandth."""
    for codec in ("zstd", "gzip", "snappy", "brotli", "lz4"):
        column = repeated(PADDED, 15, MANY // 15)
        options = {"use_dictionary": False, "write_batch_size": 15}
        yield f"pages of {codec}", write(where / codec, {"image": column}, compression=codec, **options), ALL
    for version in ("1.0", "2.0"):
        options = {"use_dictionary": False, "data_page_version": version}
        path = write(
            where / f"cells{version}",
            {"image": cells(repeated(PADDED, 15, MANY // 15))},
            **options,
            write_batch_size=15,
        )
        yield f"pages of cells, version {version}", path, ALL
        path = write(where / f"long{version}", {"image": cells(repeated(PADDED, 100))}, **options)
        yield f"a page of 100 MiB, version {version}", path, r"a page of image\.bytes has .* would take 10\d,"
    for encoding in ("DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"):
        options = {"use_dictionary": False, "column_encoding": {"image": encoding}, "write_batch_size": 15}
        yield (
            encoding,
            write(where / encoding, {"image": repeated(PADDED, 15, 20)}, **options),
            f"encoded as {encoding}",
        )
    lists = pyarrow.array([[bombs.image_bytes()] * 3] * 4)
    yield "lists", write(where / "lists", {"image": lists}), "exactly one column of images"
    path = write(where / "rows", {"image": pyarrow.nulls(2**24, pyarrow.binary())})
    yield "rows of nothing", path, "claims 16,777,216 rows, above the limit of 1,049,"
    path = write(where / "fewer", {"image": pyarrow.nulls(2**14, pyarrow.binary())})
    yield "fewer rows of nothing", path, "none of 16,384 image files"


def contents(where):
    """Tables of contents that say much in few bytes."""
    columns = {"image": [bombs.image_bytes()] * 4, **{f"c{k}": pyarrow.array([0] * 4, "int8") for k in range(8000)}}
    options = {"use_dictionary": False, "write_statistics": False, "store_schema": False}
    yield "8,000 columns", write(where / "wide", columns, **options), "^4 images$"
    for name, (chunks, groups, columns), says in (
        ("pieces of a row group", (345_000, 1, 1), "none of 1 image files"),
        ("row groups", (1, 100_000, 1), "none of 1 image files"),
        ("columns", (1, 1, 125_000), "two columns with the same name"),
        ("more columns", (1, 1, 200_000), "a footer of 1,600,035, above the limit of 1,05"),
    ):
        yield f"many {name}", listing(where / name, chunks, groups, columns), says


def listing(path, chunks, groups, columns):
    """A file that is only a footer, whose elements hold no more than they must."""
    leaf = b"\x15\x0c\x25\x02\x18\x01a\0"
    schema = listed(columns + 1, b"\x48\x06schema\x15" + unsigned(2 * columns) + b"\0" + leaf * columns)
    group = b"\x19" + listed(chunks, b"\x26\0\0" * chunks) + b"\x16\0\x16\0\0"
    end = b"\x15\x02\x19" + schema + b"\x16\x02\x19" + listed(groups, group * groups) + b"\0"
    path.write_bytes(b"PAR1" + end + struct.pack("<I", len(end)) + b"PAR1")
    return path


def listed(count, content):
    return (bytes([count << 4 | 12]) if count < 15 else b"\xfc" + unsigned(count)) + content


def unsigned(value):
    """A whole number in Thrift's compact protocol."""
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + unsigned(value >> 7)


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

    yield "Arrow's dictionary", folder("a", shared(PADDED, MANY)), ALL
    for codec in ("zstd", "lz4"):
        yield f"Arrow with {codec}", folder(f"v{codec}", repeated(PADDED, 60, 10), compression=codec), "is compressed"
        yield (
            f"a dictionary with {codec}",
            folder(f"d{codec}", shared(PADDED, 1500), compression=codec),
            "is compressed",
        )
    yield "Arrow's rows of nothing", folder("n", pyarrow.nulls(2**21, "binary")), "2,097,152 rows, above"


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process's memory is measured by Linux's /proc"
)
def test_no_table_takes_more_memory_than_is_stated(tmp_path):
    cases = [case for make in (dictionaries, pages, contents, saved) for case in make(tmp_path)]
    found = bombs.opened({name: (path, {}) for name, path, _ in cases}, apart=True, imports=["pyarrow.parquet"])
    report = [
        f"{name}: {found[name][1]:.0f} MiB of {bound}, {found[name][0][:300]}"
        for name, _, says in cases
        for bound in [MANY - 30 if says == ALL else BOUND]
        if not re.search(says, found[name][0]) or found[name][1] > bound
    ]
    assert report == []


def head(size, stored, kind, values, encoding):
    """The head of a page: a structure of Thrift's compact protocol."""
    fields = [b"\x15\0", b"\x15" + unsigned(2 * size), b"\x15" + unsigned(2 * stored)]
    said = (
        b"\x15" + unsigned(2 * values) + bytes([(4 if kind == 8 else 2) - 1 << 4 | 5]) + unsigned(2 * encoding) + b"\0"
    )
    return b"".join(fields) + bytes([kind - 3 << 4 | 12]) + said + b"\0"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (head(90, 9, 5, 3, 0) + bytes(9), None),
        (head(90, 9, 7, 3, 0) + bytes(9) + head(9, 9, 8, 3, 8) + bytes(9), None),
        (head(2**31 - 1, 9, 5, 3, 0) + bytes(9), "would take 2,147,483,647 in memory"),
        (head(90, 9, 5, 3, 0) + bytes(9) + head(2**24 + 1, 9, 7, 3, 0) + bytes(9), "would take 16,777,217 in memory"),
        (head(90, 9, 5, 2**31 - 1, 0) + bytes(9), "2,147,483,647 values for 3 rows"),
        (head(90, 9, 7, 2**20 + 1, 0) + bytes(9), "1,048,577 values for 3 rows"),
        (head(90, 9, 8, 3, 7) + bytes(9), "DELTA_BYTE_ARRAY"),
        (head(90, 10, 5, 3, 0) + bytes(9), "are damaged"),
        (head(90, 9, 5, 3, 0)[:-1], "are damaged"),
        (b"\x25\1\0", "are damaged"),
        (b"\x19\x1c\0\0", "are damaged"),
        (b"\xff" * 99, "are damaged"),
        (b"\x1c" * 99, "are damaged"),
    ],
)
def test_the_heads_of_pages_are_read_before_their_values(content, says):
    column = SimpleNamespace(
        data_page_offset=4, dictionary_page_offset=None, total_compressed_size=len(content), path_in_schema="image"
    )
    group = SimpleNamespace(num_rows=3, column=lambda number: column)
    table = SimpleNamespace(num_rows=3, num_row_groups=1, row_group=lambda number: group)
    file = io.BytesIO(b"PAR1" + content)
    if says is None:
        check_pages(file, Path("x"), table, {0: 0})
        table.num_row_groups = 3
        says = "are damaged"  # three row groups that share their pages
    with pytest.raises(ValueError, match=says):
        check_pages(file, Path("x"), table, {0: 0})


@pytest.mark.parametrize("codec", ["none", "zstd", "gzip", "snappy", "brotli", "lz4"])
@pytest.mark.parametrize(
    "options", [{"use_dictionary": False}, {}, {"data_page_version": "2.0"}, {"row_group_size": 7}]
)
def test_what_bombs_are_made_of_is_read_where_it_is_none(tmp_path, codec, options):
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 256, (40, 3, 4, 5), np.uint8)
    files = [bombs.png_of(array) for array in arrays]
    # The first twenty come twice, so that a dictionary pays.
    order = [*range(40), *range(20)]
    flat = pyarrow.array([files[k] for k in order])
    label = pyarrow.array([f"{k}" for k in order]).dictionary_encode()
    for name, column in (
        ("flat", flat),
        ("cells", cells(pyarrow.chunked_array([flat]))),
        ("long", flat.cast("large_binary")),
    ):
        write(tmp_path / f"{name}.parquet", {"image": column, "label": label}, compression=codec, **options)
        opened = open_images(tmp_path / f"{name}.parquet")
        np.testing.assert_array_equal(opened.images, arrays[order])
        np.testing.assert_array_equal(opened.labels, order)


def test_rows_may_be_asked_for_in_any_order(tmp_path):
    contents = [bytes([k]) * (5 * MIB if k % 10 == 3 else 3) if k % 7 else None for k in range(60)]
    for k, part in enumerate((contents[:35], contents[35:])):
        write(tmp_path / f"{k}.parquet", {"image": pyarrow.array(part, "binary")}, row_group_size=10)
    files = parquet_files([tmp_path / "0.parquet", tmp_path / "1.parquet"], tmp_path)
    for i in [*range(60), *range(0, 60, 3), *np.random.default_rng(0).permutation(60), 3, 3, 2, 1, 0, 59]:
        if contents[i] is None:
            with pytest.raises(ValueError, match="the row has no image"):
                files.open(i)
        else:
            with files.open(i) as file:
                assert file.read() == contents[i]
                assert file.seek(0) == 0
                assert file.read(2) == contents[i][:2]


def test_rows_behind_a_damaged_page_are_broken_and_the_others_are_read(tmp_path):
    files = [bombs.png_of(np.full((3, 4, 5), k, np.uint8)) for k in range(30)]
    path = write(tmp_path / "x.parquet", {"image": files}, use_dictionary=False, row_group_size=10, compression="zstd")
    column = parquet.read_metadata(path).row_group(1).column(0)
    content = bytearray(path.read_bytes())
    place = column.data_page_offset + column.total_compressed_size
    content[place - 100 : place] = bytes(100)
    path.write_bytes(content)
    opened = open_images(path, skip_broken=True)
    assert opened.images[:, 0, 0, 0].tolist() == [*range(10), *range(20, 30)]
    with pytest.raises(ValueError, match=r"10 of 30 .* row 10 \(.*x\.parquet cannot be read"):
        open_images(path)


def test_files_of_one_set_must_agree(tmp_path):
    png = bombs.image_bytes()
    write(tmp_path / "a.parquet", {"image": [png], "label": [1]})
    write(tmp_path / "b.parquet", {"image": [png], "label": ["one"]})
    with pytest.raises(ValueError, match=r"the column label differs between .*a\.parquet and .*b\.parquet"):
        open_images(tmp_path)


@pytest.mark.parametrize("content", [b"PAR1", b"PAR1" * 8, b"PAR1" + bytes(99) + struct.pack("<I", 99) + b"PAR1"])
def test_damaged_files_are_named(tmp_path, content):
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.parquet cannot be read"):
        open_images(tmp_path)
