"""Nothing but regular files is opened, and whatever is wrong with a file is said with its name."""

import gzip
import json
import os
import random
import socket
import struct
import time
import warnings
import zipfile

import bombs
import numpy as np
import pytest
from PIL import Image

from stablefield.data import Origin, make_image_set, open_images, pack
from stablefield.data._bounded_file import BoundedFile

KINDS = ["FIFO", "device", "socket", "link"]


def put(path, kind, monkeypatch):
    """Something at `path` that no reading comes back from, or never should be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with monkeypatch.context() as patch, socket.socket(socket.AF_UNIX) as listener:
            patch.chdir(path.parent)  # the address of a socket is short
            listener.bind(path.name)
    else:
        os.mkfifo(path.parent / "pipe")
        path.symlink_to("pipe")
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["data", "a.zip", "a.npz", "a.npy", "train-images-idx3-ubyte.gz"])
def test_a_source_that_is_no_regular_file_is_refused_by_name(tmp_path, monkeypatch, kind, name):
    path = put(tmp_path / name, kind, monkeypatch)
    with pytest.raises(ValueError, match=f"{path} is a .*: only regular files are read"):
        open_images(path)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_in_a_folder_is_a_broken_image(tmp_path, monkeypatch, kind):
    path = put(tmp_path / "b.png", kind, monkeypatch)
    put(tmp_path / "notes.txt" if kind != "link" else tmp_path / "sub" / "notes.txt", kind, monkeypatch)
    (tmp_path / "a.png").write_bytes(bombs.image_bytes())
    with pytest.raises(ValueError, match=rf"1 of 2 image files .*{path.name} .*: only regular files are read"):
        open_images(tmp_path)
    assert len(open_images(tmp_path, skip_broken=True)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_documents_and_parts_that_are_no_regular_files_are_refused_or_passed_over(tmp_path, monkeypatch, kind):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.png").write_bytes(bombs.image_bytes())
    put(tmp_path / "a" / "dataset.json", kind, monkeypatch)
    with pytest.raises(ValueError, match=r"dataset\.json is a .*: only regular files are read"):
        open_images(tmp_path / "a")
    images = bombs.gzipped(tmp_path / "b" / "train-images-idx3-ubyte.gz", bombs.idx_header(2, 5, 5) + bytes(50))
    put(tmp_path / "b" / "train-labels-idx1-ubyte.gz", kind, monkeypatch)
    assert open_images(images).labels is None
    put(tmp_path / "c" / "data_batch_1.bin", kind, monkeypatch)
    with pytest.raises(ValueError, match=r"only regular files are read|holds no image file"):
        open_images(tmp_path / "c")


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_parquet_folders_and_saved_data_sets_are_regular_files(tmp_path, monkeypatch, kind):
    pytest.importorskip("pyarrow")
    put(tmp_path / "tables" / "a.parquet", kind, monkeypatch)
    with pytest.raises(ValueError, match=r"a\.parquet is a .*: only regular files are read"):
        open_images(tmp_path / "tables")
    arrow = put(tmp_path / "train" / "data.arrow", kind, monkeypatch)
    state = json.dumps({"_data_files": [{"filename": "data.arrow"}]})
    (tmp_path / "train" / "state.json").write_text(state)
    (tmp_path / "train" / "dataset_info.json").touch()
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for source in (arrow.parent, tmp_path):
        with pytest.raises(ValueError, match=r"data\.arrow is a .*: only regular files are read"):
            open_images(source)
    (tmp_path / "train" / "dataset_info.json").unlink()
    put(tmp_path / "train" / "dataset_info.json", "device", monkeypatch)
    with pytest.raises(ValueError, match=r"dataset_info\.json is a .*: only regular files are read"):
        open_images(tmp_path)


def test_documents_of_a_saved_data_set_are_bounded_and_understood(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "dataset_info.json").touch()
    for text in (
        '{"_data_files": 3}',
        '{"_data_files": [3]}',
        '{"_data_files": [{}]}',
        '{"_data_files": [{"filename": 3}]}',
        '{"_data_files": []}',
        "",
        "[" * 100_000,
        "[]",
        "{}",
    ):
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(ValueError, match=f"{tmp_path} is not a data set saved by datasets, or is damaged"):
            open_images(tmp_path)
    with (tmp_path / "dataset_info.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"dataset_info\.json has more than 4,194,304 bytes"):
        open_images(tmp_path)


def test_an_entry_of_an_archive_that_is_a_link_or_a_device_is_a_broken_image(tmp_path):
    for mode in (0o120777, 0o010644, 0o020644):
        path = bombs.zipped(tmp_path / "a.zip", {"a.png": (bombs.image_bytes(), 0)}, mode=mode)
        with pytest.raises(ValueError, match=r"'a\.png' is a link or a device"):
            open_images(path)


@pytest.mark.parametrize("method", [12, 14, 93, 97])
def test_an_archive_compressed_in_another_way_is_said_by_name(tmp_path, method):
    path = bombs.zipped(tmp_path / "a.zip", {"a.png": (bombs.image_bytes(), 0)}, method=method)
    with pytest.raises(ValueError, match=rf"a\.zip: the entry 'a\.png' is compressed by method {method}"):
        open_images(path)
    array = bombs.npy_header((2, 5, 5)) + bytes(50)
    path = bombs.zipped(tmp_path / "a.npz", {"images.npy": (array, 0)}, method=method)
    with pytest.raises(ValueError, match=rf"a\.npz: the entry 'images\.npy' is compressed by method {method}"):
        open_images(path)


@pytest.mark.parametrize("name", ["", ".", "/", "a/", "\x1b[2J"])
def test_an_entry_without_a_name_is_passed_over(tmp_path, name):
    path = bombs.zipped(tmp_path / "a.zip", {"a.png": (bombs.image_bytes(), 0), name: (b"", 0)})
    if name == "/":
        with pytest.raises(ValueError, match="leads out of the archive"):
            open_images(path)
    else:
        assert len(open_images(path)) == 1


def test_what_hides_behind_the_name_of_an_image_is_not_handed_to_another_program(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match=r"a\.png \(not an image of a supported kind"):
        open_images(tmp_path)


@pytest.mark.parametrize(
    "document",
    [
        b"[" * 100_000,
        b'{"labels": ' + b"[" * 100_000,
        b'{"labels": [["a.png", 1e400]]}',
        b'{"labels": [["a.png", NaN]]}',
        b'{"labels": [["a.png", ' + b"9" * 5000 + b"]]}",
        b'{"labels": [["a.png", 99999999999999999999]]}',
        b'{"labels": [["a.png", 4294967295]]}',
        b'{"labels": [["\xff\xfe", 0]]}',
        b'{"labels": "abc"}',
        b'{"labels": 3}',
        b'{"labels": {"a.png": 0}}',
        b'{"labels": [["\\ud800", 0]]}',
        b"",
        b"null",
    ],
)
def test_a_damaged_dataset_json_is_its_own_fault(tmp_path, document):
    (tmp_path / "a.png").write_bytes(bombs.image_bytes())
    (tmp_path / "dataset.json").write_bytes(document)
    with pytest.raises(ValueError, match=str(tmp_path)) as caught:
        open_images(tmp_path)
    assert len(str(caught.value)) < 1000


MANIFESTS = [
    ("name", 3),
    ("name", ["a"]),
    ("name", "\ud800"),
    ("source", None),
    ("classes", "ten"),
    ("classes", 1e400),
    ("class_names", 3),
    ("class_names", {"a": 1}),
    ("class_names", ["a", 1]),
    ("class_names", [["a"]]),
    ("class_names", []),
    ("conversions", []),
    ("conversions", {"a": "b"}),
    ("conversions", {"a": float("nan")}),
    ("skipped", None),
    ("skipped", -1),
    ("skipped", True),
    ("skipped_files", "abc"),
    ("skipped_files", [3]),
    ("resized", 3),
    ("sha256", None),
    ("sha256", 3),
    ("count", 1e400),
    ("shape", [1, 2]),
]


@pytest.mark.parametrize(("key", "value"), MANIFESTS)
def test_a_packed_file_whose_manifest_has_another_type_is_damaged_by_name(tmp_path, key, value):
    made = make_image_set(np.zeros((3, 1, 4, 4), np.uint8), np.array([0, 1, 0]), Origin(name="toy", source="made up"))
    path = pack(made, tmp_path / "toy")
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    manifest = json.loads(header["__metadata__"]["stablefield.images"]) | {key: value}
    header["__metadata__"]["stablefield.images"] = json.dumps(manifest)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    with pytest.raises(ValueError, match=f"{path} is a damaged or foreign file"):
        open_images(path)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b'{"\xff": 1}', b'{"__metadata__": 3}']
)
def test_a_packed_file_whose_header_cannot_be_parsed_is_said_by_name(tmp_path, text):
    path = bombs.safetensors(tmp_path / "toy", b"{" + text if text[:1] != b"{" else text)
    with pytest.raises(ValueError, match=f"{path} is a safetensors file, but not|{path} is not a packed image set"):
        open_images(path)


def test_labels_that_stand_for_too_many_classes_are_said_with_the_file(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 5, 5), np.uint8), labels=[0, 65536])
    with pytest.raises(ValueError, match=r"a\.npz: labels holds 65536 and implies 65,537 classes"):
        open_images(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 5, 5), np.uint8), labels=[0, 65535])
    assert open_images(tmp_path / "a.npz").classes == 65536


def test_a_bounded_file_gives_its_bytes_and_no_more_than_agreed(tmp_path):
    content = bytes(range(200))
    (tmp_path / "a").write_bytes(content)
    with (tmp_path / "a").open("rb") as file:
        bounded = BoundedFile(file, 100)
        assert bounded.read(10) == content[:10]
        assert (bounded.seek(-5, os.SEEK_END), bounded.tell()) == (195, 195)
        assert bounded.read() == content[195:]
        assert bounded.seek(20) == 20
        assert bounded.read(85) == content[20:105]
        with pytest.raises(ValueError, match="more than 100 bytes"):
            bounded.read(1)


# --- seeded damage ----------------------------------------------------------------------------------------------------


def wholes(where):
    """A small whole source of every kind: the file that is damaged, the source that it belongs to."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    saves = {
        "png": {"exif": exif},
        "jpg": {"exif": exif},
        "gif": {"save_all": True, "append_images": [Image.new("RGB", (9, 7), 5)]},
        "webp": {"lossless": True, "exif": exif},
        "bmp": {},
        "tif": {"compression": "tiff_lzw"},
        "tiff": {},
        "ppm": {},
        "tga": {"compression": "tga_rle"},
        "jp2": {},
        "avif": {},
    }
    for suffix, options in saves.items():
        folder = where / suffix
        folder.mkdir()
        picture.save(folder / f"a.{suffix}", **options)
        yield folder / f"a.{suffix}", folder
    np.save(where / "a.npy", rng.integers(0, 256, (3, 5, 7), dtype=np.uint8))
    yield where / "a.npy", where / "a.npy"
    arrays = {"images": rng.integers(0, 256, (3, 5, 7), dtype=np.uint8), "labels": np.array([0, 1, 2])}
    np.savez(where / "a.npz", **arrays)
    np.savez_compressed(where / "b.npz", **arrays)
    made = make_image_set(arrays["images"][:, None], arrays["labels"], Origin(name="toy", source="made up"))
    files = [where / "a.npz", where / "b.npz", pack(made, where / "packed")]
    document = {"labels": [["a/0.png", 1], ["b/1.png", 0]]}
    for name, method in (("a.zip", zipfile.ZIP_STORED), ("b.zip", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(where / name, "w", method) as archive:
            archive.writestr("a/0.png", bombs.image_bytes())
            archive.writestr("b/1.png", bombs.image_bytes(kind="JPEG"))
            archive.writestr("dataset.json", json.dumps(document))
        files.append(where / name)
    yield from ((path, path) for path in files)
    (where / "json" / "a").mkdir(parents=True)
    (where / "json" / "a" / "0.png").write_bytes(bombs.image_bytes())
    (where / "json" / "dataset.json").write_text(json.dumps({"labels": document["labels"][:1]}))
    yield where / "json" / "dataset.json", where / "json"
    for suffix in ("", ".gz"):
        folder = where / f"idx{suffix}"
        folder.mkdir()
        for kind, shape in (("images-idx3", (3, 5, 7)), ("labels-idx1", (3,))):
            content = bombs.idx_header(*shape) + bytes(i % 7 for i in range(int(np.prod(shape))))
            path = folder / f"train-{kind}-ubyte{suffix}"
            path.write_bytes(gzip.compress(content) if suffix else content)
            yield path, folder
    (where / "cifar").mkdir()
    for i in range(1, 6):
        (where / "cifar" / f"data_batch_{i}.bin").write_bytes(bytes(2 * 3073))
    yield where / "cifar" / "data_batch_1.bin", where / "cifar"


def damaged(content, rng, others):
    """`content` with a few bits or bytes changed, numbers put in, or parts cut, doubled, moved or taken from elsewhere."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(len(content) + 1)
        length = rng.choice((1, 2, 4, 8, rng.randrange(64) + 1))
        match rng.randrange(8):
            case 0:
                content[place : place + 1] = bytes([rng.randrange(256)])
            case 1 if content:
                content[place % len(content)] ^= 1 << rng.randrange(8)
            case 2:
                size = rng.choice((1, 2, 4, 8))
                number = rng.choice((0, 1, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1))
                content[place : place + size] = (number % 256**size).to_bytes(size, rng.choice(("little", "big")))
            case 3:
                del content[place:]
            case 4:
                del content[place : place + length]
            case 5:
                content[place:place] = content[place : place + length] * rng.choice((1, 2, 100))
            case 6:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                content[place : place + length] = other[start : start + length]
            case _:
                content += bytes(length)
    return bytes(content)


def attempt(path, source, **options):
    """Open a damaged source: a set, or an error that names it."""
    before = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened = open_images(source, **options)
            opened.batch(np.arange(min(3, len(opened))))
    except ValueError as error:
        text = str(error)
        if source.name not in text and path.name not in text:
            return f"an error without a name: {text}"
        text.encode()
        return None if len(text) < 3000 else f"an error of {len(text)} letters: {text[:300]}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - before
    return None if seconds < 20 else f"{seconds:.0f} seconds"


def rounds(where, seed, count):
    """Damage each file `count` times; what did not end as it should, with the seed that shows it again."""
    files = [(path, source, path.read_bytes()) for path, source in wholes(where)]
    contents = [content for _, _, content in files]
    wrong = []
    for path, source, _ in files:
        assert attempt(path, source) is None
        assert len(open_images(source)) > 0
    for number in range(count):
        for path, source, content in files:
            rng = random.Random(f"{seed} {number} {source.name}/{path.name}")
            path.write_bytes(damaged(content, rng, contents))
            options = rng.choice(({}, {"resolution": 4}, {"limit": 8}, {"skip_broken": True}))
            outcome = attempt(path, source, **options)
            path.write_bytes(content)
            if outcome is not None:
                wrong.append(f"{source.name}/{path.name} in round {number} of seed {seed}: {outcome}")
    return wrong


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="memory is measured by Linux's /proc")
def test_damaged_files_of_every_kind_give_images_or_an_error_that_names_them(tmp_path):
    def status(key):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    assert rounds(tmp_path, seed=0, count=40) == []
    assert status("VmHWM") - before < 1024
