"""Packed files: valid safetensors, mapped, whole or not there."""

import json
import struct

import numpy as np
import pytest

from stablefield.data import Origin, PackedWriter, make_image_set, open_images, open_packed, pack
from stablefield.data._packed_writer import METADATA_KEY


def toy(n=7, shape=(3, 5, 3), labels=True, class_names=None):
    rng = np.random.default_rng(0)
    origin = Origin(name="toy", source="made up", class_names=class_names, conversions={"enlarged": 2}, skipped=1)
    images = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
    return make_image_set(images, rng.integers(0, 2, n) if labels else None, origin)


def rewritten(path, change):
    """The file at `path` with its header's JSON object changed and its tensors as they were."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("class_names", [None, ("ä" * 500, "😀" * 500)])
def test_what_is_packed_is_what_is_opened(tmp_path, labels, class_names):
    made = toy(labels=labels, class_names=class_names if labels else None)
    path = pack(made, tmp_path / "new" / "toy.stablefield")
    opened = open_packed(path, verify=True)
    assert isinstance(opened.images, np.memmap)
    assert not opened.images.flags.writeable
    assert opened.file == path
    np.testing.assert_array_equal(opened.images, made.images)
    np.testing.assert_array_equal(opened.labels, made.labels)
    assert (opened.manifest, opened.class_names, opened.name) == (made.manifest, made.class_names, "toy")
    assert opened.describe().endswith(f"mapped from {path}")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_the_safetensors_package_reads_the_same(tmp_path, framework):
    # 7 images of 45 bytes: the labels begin at an odd byte.
    made = toy()
    path = pack(made, tmp_path / "toy.safetensors")
    load_file = pytest.importorskip(f"safetensors.{framework}").load_file
    tensors = {name: np.asarray(tensor) for name, tensor in load_file(path).items()}
    assert sorted(tensors) == ["images", "labels"]
    np.testing.assert_array_equal(tensors["images"], made.images)
    np.testing.assert_array_equal(tensors["labels"], made.labels)
    assert tensors["labels"].dtype == np.int64
    with pytest.importorskip("safetensors").safe_open(path, "np") as file:
        assert json.loads(file.metadata()["stablefield.images"]) == made.manifest


def test_images_written_one_by_one_give_the_same_file(tmp_path):
    made = toy()
    with PackedWriter(tmp_path / "stream", made.shape) as writer:
        for image in made.images:
            writer.append(image[None])
        writer.finish(made.labels, made.manifest)
    assert open_packed(tmp_path / "stream", verify=True).manifest == made.manifest


def test_every_cut_file_is_refused(tmp_path):
    path = pack(toy(), tmp_path / "toy")
    content = path.read_bytes()
    cuts = [0, 1, 7, 8, 9, 200, len(content) - 7 * 8 - 7 * 45 - 1, len(content) - 7 * 8, len(content) - 1]
    for cut in cuts:
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"damaged|not a packed image set"):
            open_packed(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="but its header states"):
        open_packed(path)


def test_verify_finds_one_changed_bit(tmp_path):
    path = pack(toy(), tmp_path / "toy")
    content = bytearray(path.read_bytes())
    content[-7 * 8 - 100] ^= 16
    path.write_bytes(content)
    opened = open_packed(path)
    with pytest.raises(ValueError, match="sha256"):
        opened.verify()
    with pytest.raises(ValueError, match="sha256"):
        open_packed(path, verify=True)


def test_a_changed_label_is_found_without_verify(tmp_path):
    path = pack(toy(), tmp_path / "toy")
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="labels_sha256"):
        open_packed(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["images"].update(dtype="I8"),
        lambda h: h["images"].update(shape=[7, 3, 5, 4]),
        lambda h: h["images"].update(shape=[7, 3, -5, -3]),
        lambda h: h["images"].update(shape=[7, 15, 3]),
        lambda h: h["images"].update(shape=[True, 3, 5, 63]),
        lambda h: h["images"].update(shape="7335"),
        lambda h: h["images"].update(data_offsets=[1, 316]),
        lambda h: h["images"].update(data_offsets=[0, 2**70]),
        lambda h: h["images"].pop("data_offsets"),
        lambda h: h.update(images=[]),
        lambda h: h["labels"].update(data_offsets=[0, 56]),
        lambda h: h["labels"].update(shape=[6]),
        lambda h: h.pop("images"),
        lambda h: h.update(more=h["labels"]),
        lambda h: h["__metadata__"].update({"stablefield.images": "{"}),
        lambda h: h["__metadata__"].update({"stablefield.images": "[]"}),
        lambda h: h["__metadata__"].update({"stablefield.images": 3}),
    ],
)
def test_a_header_that_does_not_fit_the_bytes_is_refused(tmp_path, change):
    path = pack(toy(), tmp_path / "toy")
    rewritten(path, lambda header: None)
    open_packed(path, verify=True)
    rewritten(path, change)
    with pytest.raises(ValueError, match="damaged or foreign"):
        open_packed(path)


@pytest.mark.parametrize(
    "content",
    [b"hello, world", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 4) + b"[1] ", struct.pack("<Q", 3) + b"{{{"],
)
def test_a_foreign_file_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="not a packed image set"):
        open_packed(tmp_path / "x")


def test_other_safetensors_files_are_refused(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    numpy.save_file({"weight": np.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="safetensors file, but not a packed image set"):
        open_images(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        open_packed(tmp_path / "absent")


def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path):
    made = toy()
    with PackedWriter(tmp_path / "toy", made.shape) as writer:
        writer.append(made.images)
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = pack(toy(), tmp_path / "toy")
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        pack(toy(labels=False), path, overwrite=True)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["toy"]


def test_an_existing_file_is_replaced_only_when_asked_for(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"precious")
    with pytest.raises(ValueError, match="exists"):
        pack(toy(), path)
    assert path.read_bytes() == b"precious"
    assert len(open_packed(pack(toy(), path, overwrite=True))) == 7
    with pytest.raises(ValueError, match="is a folder"):
        pack(toy(), tmp_path)


def test_the_writer_refuses_what_does_not_fit(tmp_path):
    made = toy()
    with PackedWriter(tmp_path / "toy", made.shape) as writer:
        with pytest.raises(ValueError, match="float64"):
            writer.append(made.images / 1.0)
        with pytest.raises(ValueError, match="shape"):
            writer.append(made.images[:, :1])
        with pytest.raises(ValueError, match="at least one image"):
            writer.finish(None, {})
        writer.append(made.images)
        with pytest.raises(ValueError, match="one label per image"):
            writer.finish(made.labels[:3], {})


def test_pixels_that_changed_since_the_checksum_are_not_packed(tmp_path):
    made = toy()
    made.images[0, 0, 0, 0] ^= 1
    with pytest.raises(ValueError, match="have changed"):
        pack(made, tmp_path / "toy")
    assert list(tmp_path.iterdir()) == []


def test_a_packed_file_is_a_source_like_any_other(tmp_path):
    made = toy(class_names=("a", "b"))
    opened = open_images(pack(made, tmp_path / "toy.bin"))
    assert opened.manifest == made.manifest
    assert opened.class_names == ("a", "b")
    assert pack(opened, tmp_path / "again.bin").read_bytes() == (tmp_path / "toy.bin").read_bytes()


def test_a_file_with_two_classes_of_one_name_says_how_to_name_them(tmp_path):
    path = pack(toy(class_names=("crane", "dog")), tmp_path / "toy.bin")

    def change(header):
        manifest = json.loads(header["__metadata__"][METADATA_KEY]) | {"class_names": ["crane", "dog", "crane"]}
        header["__metadata__"][METADATA_KEY] = json.dumps(manifest)

    rewritten(path, change)
    said = r"toy\.bin: class_names has 'crane' for the classes 0 and 2: give each class .*, such as 'crane \(0\)'"
    with pytest.raises(ValueError, match=said):
        open_images(path)
