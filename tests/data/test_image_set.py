"""The image set: what it accepts, and what its manifest promises."""

import dataclasses
import hashlib
import subprocess
import sys

import numpy as np
import pytest

from stablefield.data import ImageSet, Origin, make_image_set, open_images
from stablefield.data._columns import read_labels
from stablefield.data._image_set import distinct_names, renumbered

ORIGIN = Origin(name="toy", source="made up")


def toy(n=5, shape=(3, 4, 6), labels=True, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
    return make_image_set(images, rng.integers(0, 3, n) if labels else None, ORIGIN)


def test_the_manifest_is_what_it_says():
    made = toy()
    assert made.manifest["count"] == len(made) == 5
    assert made.manifest["shape"] == [3, 4, 6]
    assert made.manifest["sha256"] == hashlib.sha256(made.images.tobytes()).hexdigest()
    assert made.manifest["labels_sha256"] == hashlib.sha256(made.labels.astype("<i8").tobytes()).hexdigest()
    assert made.manifest["classes"] == made.classes == made.labels.max() + 1
    assert toy(labels=False).manifest["labels_sha256"] is None


def test_the_checksum_is_of_the_values_and_not_of_the_memory_layout(monkeypatch):
    made = toy(40)
    channels_last = np.ascontiguousarray(made.images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    monkeypatch.setattr("stablefield.data._scaling.CHUNK_BYTES", 300)
    assert make_image_set(channels_last, made.labels, ORIGIN).manifest == made.manifest


def test_verify_finds_a_changed_pixel_and_a_changed_label():
    made = toy()
    made.verify()
    made.images[4, 2, 3, 5] ^= 1
    with pytest.raises(ValueError, match="sha256"):
        made.verify()
    made = toy()
    made.labels[0] += 1
    with pytest.raises(ValueError, match="labels_sha256"):
        made.verify()


def test_a_batch_is_a_copy_in_the_order_asked_for():
    made = toy()
    images, labels = made.batch(np.array([3, 0, 3]))
    np.testing.assert_array_equal(images, np.stack([made.images[3], made.images[0], made.images[3]]))
    np.testing.assert_array_equal(labels, made.labels[[3, 0, 3]])
    images[:] = 0
    labels[:] = 9
    made.verify()
    for index in (-1, 5):
        with pytest.raises(ValueError, match=f"index .*{index}"):
            made.batch(np.array([0, index]))


def test_it_describes_itself():
    assert toy().describe() == "toy: 5 RGB images of 6 x 4, 3 classes, 360 B in memory"
    assert toy(shape=(1, 4, 6), labels=False).describe() == "toy: 5 greyscale images of 6 x 4, 120 B in memory"


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        (np.zeros((2, 3, 4, 4), np.int32), None, "int32"),
        (np.zeros((2, 4, 4), np.uint8), None, r"\(2, 4, 4\)"),
        (np.zeros((0, 3, 4, 4), np.uint8), None, "pass at least one image"),
        (np.zeros((2, 4, 4, 4), np.uint8), None, "4 channels"),
        (np.zeros((2, 3, 4, 4), np.uint8), np.zeros(3, int), r"shape \(2,\)"),
        (np.zeros((2, 3, 4, 4), np.uint8), np.zeros(2), "whole numbers"),
        (np.zeros((2, 3, 4, 4), np.uint8), np.array([0, -1]), "counted from 0"),
    ],
)
def test_what_is_no_image_set_is_refused(images, labels, says):
    with pytest.raises(ValueError, match=says):
        make_image_set(images, labels, ORIGIN)


def test_a_label_without_a_class_is_refused():
    with pytest.raises(ValueError, match="holds 2, but class_names has 2"):
        ImageSet(
            images=np.zeros((1, 1, 2, 2), np.uint8), labels=np.array([2]), class_names=("a", "b"), name="x", manifest={}
        )


def test_importing_the_package_imports_no_optional_package():
    code = (
        "import sys, stablefield.data\n"
        "heavy = {'PIL', 'datasets', 'safetensors', 'sklearn', 'scipy', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_classes_are_numbered_anew_by_their_names():
    images = np.arange(4, dtype=np.uint8)[:, None, None, None]
    origin = Origin(name="toy", source="made up", class_names=("0", "1", "10"))
    made = make_image_set(images, np.array([0, 2, 1, 2]), origin)
    changed = renumbered(made, ("0", "10", "1"))
    assert changed.labels.tolist() == [0, 1, 2, 1]
    assert changed.class_names == ("0", "10", "1") == tuple(changed.manifest["class_names"])
    changed.verify()
    assert renumbered(changed, ("0", "1", "10")).manifest == made.manifest
    assert renumbered(made, ["0", "1", "10"]) is made
    for other in (("0", "1"), ("0", "1", "2"), ("0", "1", "1")):
        with pytest.raises(ValueError, match="has the classes 0, 1, 10, and not"):
            renumbered(made, other)


def test_two_classes_of_one_name_are_refused_wherever_the_names_come_from(tmp_path):
    names, said = ("crane", "dog", "crane"), r"has 'crane' for the classes 0 and 2: .* 'crane \(0\)' and 'crane \(2\)'"
    made = toy()
    with pytest.raises(ValueError, match=f"^class_names {said}"):
        Origin(name="x", source="x", class_names=names)
    with pytest.raises(ValueError, match=f"^class_names {said}"):
        dataclasses.replace(made, class_names=names)
    with pytest.raises(TypeError, match=r"^class_names\[1\] is an int: pass a name"):
        dataclasses.replace(made, class_names=("crane", 1, "dog"))
    np.savez(tmp_path / "a.npz", images=made.images, labels=made.labels, class_names=np.array(names))
    with pytest.raises(ValueError, match=rf"a\.npz: class_names {said}"):
        open_images(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=f"^the column label {said}"):
        read_labels("label", "ClassLabel", [0, 1, 2], names)


@pytest.mark.parametrize(
    ("names", "distinct"),
    [
        (("a", "b"), ("a", "b")),
        (("a", "b", "a"), ("a (0)", "b", "a (2)")),
        (("a", "a", "a (0)"), ("a (0) (0)", "a (1)", "a (0) (2)")),
    ],
)
def test_distinct_names_are_distinct(names, distinct):
    assert distinct_names(names) == distinct
