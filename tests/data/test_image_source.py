"""Folders and archives of images: order, labels, colour, size, and what is said about files that cannot be used."""

import io
import json
import sys
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from stablefield.data import MissingSplitError, open_images, pack, summary
from stablefield.data import _collector as collector
from stablefield.data import _image_files as image_files
from stablefield.data import _image_loader as image_loader
from stablefield.data._image_files import ChosenFiles, names_labels, table_note
from stablefield.data._resizing import natural_resolution, raised_resolution


def pixels(shape=(6, 8, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(path, **options)
    return path


def png_bytes(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def zipped(path, entries):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def chw(array):
    return array.reshape(*array.shape[:2], -1).transpose(2, 0, 1)


# Order and labels


def test_a_folder_of_mixed_jpg_and_png_is_read_in_the_order_of_names(tmp_path):
    names = ["10.png", "9.JPG", "a.jpeg", "B.png", "sub/0.png", "sub/deep/x.png"]
    for seed, name in enumerate(names):
        save(tmp_path / "photos" / name, pixels(seed=seed))
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    (tmp_path / "photos" / ".hidden.png").write_bytes(b"not an image")
    save(tmp_path / "photos" / ".cache" / "x.png", pixels((1, 1, 3)))
    opened = open_images(tmp_path / "photos")
    assert opened.images.shape == (6, 3, 6, 8)
    for row, name in zip(
        opened.images, ["10.png", "9.JPG", "B.png", "a.jpeg", "sub/0.png", "sub/deep/x.png"], strict=True
    ):
        with Image.open(tmp_path / "photos" / name) as image:
            np.testing.assert_array_equal(row, chw(np.asarray(image)))
    assert opened.labels is None
    assert opened.manifest["source"] == "folder photos with 6 image files"
    assert (opened.manifest["resized"], opened.manifest["conversions"], opened.manifest["skipped"]) == ("no", {}, 0)


def test_one_level_of_sub_folders_is_classes_in_the_order_of_names(tmp_path):
    for seed, name in enumerate(["dog/1.png", "cat/2.png", "cat/1.png", "Ant/7.png"]):
        save(tmp_path / "all" / name, pixels(seed=seed))
    # The folder above holds the same images one level deeper: nothing changes.
    for source in (tmp_path / "all", tmp_path):
        opened = open_images(source)
        assert opened.class_names == ("Ant", "cat", "dog")
        np.testing.assert_array_equal(opened.labels, [0, 1, 1, 2])
        np.testing.assert_array_equal(opened.images, [chw(pixels(seed=seed)) for seed in (3, 2, 1, 0)])


def test_numbers_in_the_names_of_classes_count_as_numbers(tmp_path):
    for name in map(str, range(12)):
        save(tmp_path / "numbers" / name / "x.png", pixels(seed=int(name)))
    opened = open_images(tmp_path / "numbers")
    assert opened.class_names == tuple(map(str, range(12)))
    # The label of a folder is the number that it is called; the images stay in the order of their names.
    for image, label in zip(opened.images, opened.labels, strict=True):
        np.testing.assert_array_equal(image, chw(pixels(seed=label)))
    wanted = ["-", "2", "007", "10", "1" * 200, "a", "n2b1", "n2b10", "n10", "n010"]
    names = {f"{name}/x.png": png_bytes(pixels()) for name in wanted}
    assert open_images(zipped(tmp_path / "a.zip", names)).class_names[:4] == ("2", "007", "10", "1" * 200)
    assert open_images(tmp_path / "a.zip").class_names[-5:] == ("a", "n2b1", "n2b10", "n010", "n10")


@pytest.mark.parametrize(
    "names", [["a/1.png", "2.png"], ["a/1.png", "b/c/2.png"], ["a/1.png", "a/2.png"], ["a/b/1.png", "c/d/2.png"]]
)
def test_other_nestings_have_no_classes(tmp_path, names):
    for name in names:
        save(tmp_path / name, pixels())
    assert open_images(tmp_path).labels is None


def test_folders_named_after_splits_are_splits_and_not_classes(tmp_path):
    for seed, name in enumerate(["train/cat/1.png", "train/dog/1.png", "val/cat/2.png", "val/dog/2.png"]):
        save(tmp_path / name, pixels(seed=seed))
    train, val = open_images(tmp_path), open_images(tmp_path, split="validation")
    np.testing.assert_array_equal(train.images, [chw(pixels(seed=seed)) for seed in (0, 1)])
    np.testing.assert_array_equal(val.images, [chw(pixels(seed=seed)) for seed in (2, 3)])
    assert train.class_names == val.class_names == ("cat", "dog")
    assert train.manifest["source"].endswith("split train")
    with pytest.raises(MissingSplitError, match=r"split='test'.*train, val"):
        open_images(tmp_path, split="test")
    with pytest.raises(MissingSplitError, match="has no splits"):
        open_images(tmp_path / "train", split="val")


@pytest.mark.parametrize("packing", ["folder", "zip"])
def test_an_image_beside_the_folders_of_classes_is_said_with_a_way_out(tmp_path, packing):
    entries = {name: png_bytes(pixels()) for name in ("a/1.png", "b/2.png", "b/3.png", "cover.png")}
    if packing == "zip":
        source = zipped(tmp_path / "x.zip", entries)
    else:
        source = tmp_path / "x"
        for name in entries:
            save(source / name, pixels())
    opened = open_images(source)
    assert opened.labels is None
    (note,) = opened.notes
    assert "The 2 folders do not count as classes, because 1 of 4 images lies elsewhere, the first cover.png" in note
    assert "for classes, move it" in note
    assert opened.manifest["notes"] == [note]
    assert ("note", note) in summary(opened)
    # The word goes where the images go: through packing and resizing.
    assert open_images(pack(opened, tmp_path / "packed")).notes == (note,)
    assert open_images(tmp_path / "packed", resolution=4).notes == (note,)
    del entries["cover.png"]
    assert open_images(zipped(tmp_path / "y.zip", entries)).notes == ()


@pytest.mark.parametrize("packing", ["folder", "zip"])
def test_images_of_a_kind_that_is_not_read_are_counted_in_a_note(tmp_path, packing):
    entries = {f"IMG_{k}.HEIC": b"x" for k in range(9)} | {
        "a.png": png_bytes(pixels()),
        "b.dng": b"y",
        "notes.txt": b"z",
    }
    if packing == "zip":
        source = zipped(tmp_path / "x.zip", entries)
    else:
        source = tmp_path / "x"
        source.mkdir()
        for name, content in entries.items():
            (source / name).write_bytes(content)
    opened = open_images(source)
    assert len(opened) == 1
    assert opened.notes == ("10 files that end in .dng, .heic are not read: save them as PNG or JPEG.",)


def pictures(path, *names):
    """An archive of pictures with these names, all alike."""
    return zipped(path, dict.fromkeys(names, png_bytes(pixels())))


@pytest.mark.parametrize(
    ("names", "classes", "said"),
    [
        (
            ["train_images/a", "train_images/b", "test_images/c"],
            ("test_images", "train_images"),
            "The folders test_images, train_images seem to be splits, but the images of all of them are read: to read one "
            "split, name its folder, such as test_images, or call the folders test, train.",
        ),
        (
            ["train_a/1", "train_a/2", "val_a/3", "train/4"],
            ("train", "train_a", "val_a"),
            "such as train_a, or call the folders train, val.",
        ),
        (
            ["train_images/1", "training-images/2", "test_images/3"],
            ("test_images", "train_images", "training-images"),
            "to read one split, name its folder, such as test_images.",
        ),
        (
            ["in/Train 2017/a", "in/val2017/c"],
            ("Train 2017", "val2017"),
            "to read one split, name its folder, such as in/T",
        ),
        (["cats-train/a", "cats-test/c"], ("cats-test", "cats-train"), "The folders cats-test, cats-train seem to be"),
        (
            ["trainset/cat/1", "trainset/dog/2", "testset/cat/3"],
            None,
            "The folders testset, trainset seem to be splits",
        ),
        (
            ["cat/train/1", "cat/test/2", "dog/train/3", "dog/test/4"],
            None,
            "The folders dog/test, dog/train seem to be splits, but the images of all of them are read, and the folders "
            "above them do not count as classes: to read one split with classes, put the folders of the classes into those "
            "of the splits, such as test/dog.",
        ),
        (["cat/train/1", "dog/test/2"], None, "The folders dog/test, cat/train seem to be splits"),
        (
            ["a/x/1", "a/2", "b/x/3"],
            None,
            "The 2 folders do not count as classes, because 2 of 3 images lie in folders below them, the first a/x/1.png",
        ),
        # Folders of something else than classes: LSUN's, patients, dates.
        (["a/x/1", "a/y/2", "b/x/3"], None, None),
        (["0/1/a/x1", "0/2/b/x2", "1/0/c/x3"], None, None),
        (["patient1/ct/1", "patient1/mr/2", "patient2/ct/3"], None, None),
        # Classes that are called as splits are, and actors.
        (["train/1", "bus/2", "test tube/3"], ("bus", "test tube", "train"), None),
        (["train/1", "val/2", "bus/3", "car/4"], ("bus", "car", "train", "val"), None),
        (["Dev_Patel/1", "Val_Kilmer/2"], ("Dev_Patel", "Val_Kilmer"), None),
        (["train_1/1", "val_1/2", "cat/3", "dog/4"], ("cat", "dog", "train_1", "val_1"), None),
        (["a/train/1", "a/test/2", "a/left/3", "b/right/4"], None, None),
        (["train_station/1", "harbour/2"], ("harbour", "train_station"), None),
        (["devices/1", "trains/2", "tests/3"], ("devices", "tests", "trains"), None),
        (["train/a/1", "train/b/2", "test/a/3"], ("a", "b"), None),
    ],
)
def test_images_of_several_splits_and_folders_that_are_no_classes_have_a_note(tmp_path, names, classes, said):
    opened = open_images(pictures(tmp_path / "x.zip", *(f"{name}.png" for name in names)))
    assert opened.class_names == classes
    assert len(opened) == (len(names) if said else len([name for name in names if not name.startswith("test/")]))
    assert len(opened.notes) == (said is not None)
    assert (said or "") in "".join(opened.notes)


def test_the_remedies_for_mixed_splits_read_one_split_with_its_classes(tmp_path):
    for name in ("trainset/cat/1", "trainset/dog/2", "testset/dog/3"):
        save(tmp_path / "in" / f"{name}.png", pixels())
    assert open_images(tmp_path / "in").labels is None
    assert open_images(tmp_path / "in" / "trainset").labels.tolist() == [0, 1]
    for name in ("train", "test"):
        (tmp_path / "in" / f"{name}set").rename(tmp_path / "in" / name)
    for split, labels in (("train", [0, 1]), ("test", [1])):
        opened = open_images(tmp_path / "in", split=split)
        assert (opened.labels.tolist(), opened.class_names) == (labels, ("cat", "dog"))


@pytest.mark.parametrize("below", ["", "images/"])
def test_a_split_with_images_of_one_class_has_the_numbers_of_the_training_split(tmp_path, below):
    train = [f"set/train/{below}{name}/1.png" for name in ("cat", "dog")]
    for name, label in (("dog", 1), ("cat", 0)):
        source = pictures(tmp_path / "x.zip", *train, f"set/test/{below}{name}/2.png", f"set/test/{below}{name}/3.png")
        opened = open_images(source, split="test")
        assert (opened.labels.tolist(), opened.class_names) == ([label] * 2, ("cat", "dog"))
        assert open_images(source).labels.tolist() == [0, 1]
    # Without classes in the training split, or with images elsewhere, there are none.
    for names in ([*train, f"set/test/{below}2.png"], ["train/cat/1.png", "test/cat/2.png"]):
        assert open_images(pictures(tmp_path / "y.zip", *names), split="test").labels is None


@pytest.mark.parametrize("lone", ["unknown", "images", "eel", "Cat"])
@pytest.mark.parametrize("below", ["", "images/"])
def test_a_split_in_one_folder_that_is_no_training_class_has_no_labels(tmp_path, lone, below):
    """As the test splits of contests, test/unknown/1.png, and the validation split of Tiny ImageNet, val/images/1.png."""
    names = [f"train/{below}cat/1", f"train/{below}dog/1", f"test/{below}{lone}/2", f"test/{below}{lone}/3"]
    source = pictures(tmp_path / "x.zip", *(f"{name}.png" for name in names))
    opened = open_images(source, split="test")
    assert (opened.labels, opened.class_names, opened.notes) == (None, None, ())
    assert open_images(source).class_names == ("cat", "dog")
    # Two folders are classes, known or not.
    source = pictures(tmp_path / "y.zip", *(f"{name}.png" for name in [*names, f"test/{below}dog/4"]))
    assert sorted(open_images(source, split="test").class_names) == sorted(["cat", "dog", lone])


@pytest.mark.parametrize("packing", ["folder", "zip"])
@pytest.mark.parametrize(
    ("beside", "said"),
    [
        (["metadata.csv"], "metadata.csv is not read, so labels in it are left out: "),
        (["in/metadata.jsonl"], "in/metadata.jsonl is not read, so labels in it are left out: "),
        (["metadata.parquet"], "metadata.parquet is not read, so labels in it are left out: "),
        (
            ["trainLabels.csv", "labels.txt"],
            "2 files, such as labels.txt, are not read, so labels in them are left out: ",
        ),
        (["LICENSE.txt", "scores.csv", ".labels.csv"], None),
        (
            ["meta/dataset.json"],
            "meta/dataset.json is not read, because not all images lie in its folder: for labels, put ",
        ),
        (
            ["a/dataset.json", "b/dataset.json"],
            "2 files, such as a/dataset.json, are not read, because not all images lie",
        ),
    ],
)
def test_labels_beside_the_images_that_are_not_read_have_a_note(tmp_path, packing, beside, said):
    entries = {name: png_bytes(pixels()) for name in ("in/1.png", "in/2.png")}
    entries |= dict.fromkeys(beside, b'{"labels": [["1.png", 3], ["2.png", 1]]}')
    if packing == "zip":
        source = zipped(tmp_path / "x.zip", entries)
    else:
        source = tmp_path / "x"
        for name, content in entries.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(content)
    opened = open_images(source)
    assert opened.labels is None
    assert len(opened.notes) == (said is not None)
    assert "".join(opened.notes).startswith(said or "")
    if packing == "folder" and "dataset.json" in beside[0]:
        assert opened.notes[0].endswith("into the folder in.")
        (source / beside[0]).rename(source / "in" / "dataset.json")
        for name in beside[1:]:
            (source / name).unlink()
        read = open_images(source)
        assert (read.labels.tolist(), read.recorded_notes) == ([3, 1], ())


def test_labels_beside_images_that_have_labels_or_in_the_folders_of_other_splits_have_no_note(tmp_path):
    image = png_bytes(pixels())
    classes = {f"{name}/1.png": image for name in "ab"}
    for name in ("metadata.csv", "metadata.jsonl", "metadata.parquet", "a/metadata.csv", "labels.csv"):
        opened = open_images(zipped(tmp_path / "a.zip", classes | {name: b"x"}))
        assert (opened.labels.tolist(), opened.notes) == ([0, 1], ())
    splits = {f"set/{name}/1.png": image for name in ("train", "val", "test")} | {"set/val/labels.csv": b"x"}
    for split, said in (("train", 0), ("val", 1), ("test", 0)):
        assert len(open_images(zipped(tmp_path / "b.zip", splits), split=split).notes) == said
    assert len(open_images(zipped(tmp_path / "b.zip", splits | {"set/labels.csv": b"x"})).notes) == 1
    # The folders give the labels, and that of a document in one of them does not count.
    opened = open_images(zipped(tmp_path / "c.zip", classes | {"a/dataset.json": dataset([["1.png", 5]])}))
    assert opened.labels.tolist() == [0, 1]
    assert opened.notes == ("a/dataset.json is not read, because the folder of each image gives its label.",)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(
            (name, True)
            for name in ("y", "Y", "label", "trainLabels", "class_id", "className", "target-number", "CLASS")
        ),
        *((name, True) for name in ("labels_train", "image_class", "label2", "categories")),
        *(
            (name, False)
            for name in ("target_width", "class_weight", "glass", "subclasses", "labelled_by", "x", "", "id")
        ),
        *((name, False) for name in ("image_id", "target_image_path", "names", "classifier")),
    ],
)
def test_a_name_seems_to_hold_labels_if_its_last_word_says_so(name, expected):
    assert names_labels(name) == expected


def test_captions_beside_millions_of_images_take_no_time_and_no_memory(tmp_path, monkeypatch):
    """Their names are compared as texts; the words of a name are split only if one may be a word for labels."""
    split = []
    monkeypatch.setattr(image_files.re, "findall", lambda *args: split.append(args) or [])
    beside = [f"in/{k:04d}.{suffix}" for k in range(100) for suffix in ("txt", "json", "npy")]
    assert table_note(beside, ChosenFiles(names=["in/1.png"])) == ()
    assert split == []


def test_a_dataset_json_of_another_split_or_below_one_that_is_read_is_no_loss_without_a_word(tmp_path):
    labels = [["1.png", 3], ["in/1.png", 2]]
    document = json.dumps({"labels": labels})
    entries = {name: png_bytes(pixels()) for name in ("train/1.png", "test/1.png")}
    entries |= {"train/dataset.json": document, "test/dataset.json": document}
    for split in ("train", "test"):
        opened = open_images(zipped(tmp_path / "a.zip", entries), split=split)
        assert (opened.labels.tolist(), opened.recorded_notes) == ([3], ())
    entries = {"in/1.png": png_bytes(pixels()), "in/dataset.json": document, "dataset.json": document}
    opened = open_images(zipped(tmp_path / "b.zip", entries))
    assert opened.labels.tolist() == [2]
    assert opened.recorded_notes == (
        "in/dataset.json is not read, because dataset.json gives the labels of all images.",
    )


def test_class_folders_beside_a_list_of_their_names_have_no_note(tmp_path):
    entries = {f"{name}/1.png": png_bytes(pixels()) for name in "ab"} | {"classes.txt": b"a\nb\n"}
    opened = open_images(zipped(tmp_path / "a.zip", entries))
    assert (opened.labels.tolist(), opened.notes) == ([0, 1], ())


def test_an_image_beside_splits_is_not_mixed_with_them(tmp_path):
    names = ["train/cat/1.png", "train/dog/1.png", "val/dog/2.png", "val/eel/2.png"]
    entries = {name: png_bytes(pixels(seed=seed)) for seed, name in enumerate(names)}
    with pytest.raises(ValueError, match=r"holds the splits train, val and beside them logo\.png.*move it, or name"):
        open_images(zipped(tmp_path / "a.zip", {**entries, "logo.png": png_bytes(pixels())}))
    (note,) = open_images(zipped(tmp_path / "b.zip", {**entries, "extra/x/1.png": png_bytes(pixels())})).notes
    assert note.startswith(
        "The folders train, val do not count as splits, because extra/x/1.png is in none of them, so"
    )
    # A class has one number in all splits.
    val = open_images(zipped(tmp_path / "c.zip", entries), split="val")
    assert val.class_names == ("cat", "dog", "eel")
    assert val.labels.tolist() == [1, 2]


def dataset(labels):
    return json.dumps({"labels": labels}).encode()


LAYOUT = {"00000/img0.png": 0, "00000/img1.png": 1, "00001/img2.png": 2}


@pytest.mark.parametrize("packing", ["folder", "zip"])
@pytest.mark.parametrize("top", ["", "top/"])
def test_dataset_json_gives_the_labels(tmp_path, packing, top):
    labels = [["00001/img2.png", 4], ["00000/img1.png", 0], ["00000/img0.png", 2], ["absent.png", 1]]
    entries = {top + name: png_bytes(pixels(seed=seed)) for name, seed in LAYOUT.items()}
    entries[f"{top}dataset.json"] = dataset(labels)
    if packing == "zip":
        source = zipped(tmp_path / "a.zip", entries)
    else:
        source = tmp_path / "folder"
        for name, content in entries.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(content)
    opened = open_images(source)
    np.testing.assert_array_equal(opened.labels, [2, 0, 4])
    np.testing.assert_array_equal(opened.images, [chw(pixels(seed=seed)) for seed in range(3)])
    assert (opened.classes, opened.class_names) == (5, None)


@pytest.mark.parametrize("document", [b'{"labels": null}', b"{}"])
def test_dataset_json_without_labels_means_none_even_with_sub_folders(tmp_path, document):
    entries = {name: png_bytes(pixels()) for name in LAYOUT} | {"dataset.json": document}
    assert open_images(zipped(tmp_path / "a.zip", entries)).labels is None


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (b"{", "cannot be parsed"),
        (b"[]", "cannot be parsed"),
        (b'{"labels": [1, 2]}', "cannot be parsed"),
        (dataset([["00000/img0.png", 1]]), r"no label for 2 of 3 images, the first 00000/img1\.png"),
        (dataset([[name, [0.0, 1.0]] for name in LAYOUT]), "whole number"),
        (dataset([[name, -1] for name in LAYOUT]), "the label -1"),
        (dataset([[name, True] for name in LAYOUT]), "the label True"),
        (dataset([*([name, 0] for name in LAYOUT), ["00000/img1.png", 1]]), r"gives 00000/img1\.png two labels"),
        (dataset([*([name, 0] for name in LAYOUT), ["absent.png", 1], ["absent.png", 2]]), r"absent\.png two labels"),
    ],
)
def test_a_dataset_json_that_does_not_fit_is_refused(tmp_path, document, says):
    entries = {name: png_bytes(pixels()) for name in LAYOUT} | {"dataset.json": document}
    with pytest.raises(ValueError, match=says):
        open_images(zipped(tmp_path / "a.zip", entries))


def test_the_same_label_twice_is_no_contradiction(tmp_path):
    entries = {name: png_bytes(pixels()) for name in LAYOUT}
    entries["dataset.json"] = dataset([[name, label] for name, label in LAYOUT.items() for _ in range(2)])
    assert open_images(zipped(tmp_path / "a.zip", entries)).labels.tolist() == [0, 1, 2]


def test_an_archive_with_the_separators_of_windows_gives_what_its_folder_gives(tmp_path):
    entries = {name: png_bytes(pixels(seed=seed)) for seed, name in enumerate(["pets/cat/1.png", "pets/dog/1.png"])}
    plain = open_images(zipped(tmp_path / "a.zip", entries))
    foreign = {"pets\\cat\\": b"", **{name.replace("/", "\\"): content for name, content in entries.items()}}
    opened = open_images(zipped(tmp_path / "b.zip", foreign))
    same = ("count", "class_names", "sha256", "labels_sha256")
    assert [opened.manifest[key] for key in same] == [plain.manifest[key] for key in same]
    with pytest.raises(ValueError, match=r"'pets/cat/1\.png' occurs twice"):
        open_images(zipped(tmp_path / "c.zip", entries | foreign))


def test_an_archive_gives_what_its_folder_gives(tmp_path):
    for seed, name in enumerate(["pets/dog/1.png", "pets/cat/2.jpg", "pets/cat/1.png"]):
        save(tmp_path / name, pixels(seed=seed))
    source = tmp_path / "pets.zip"
    with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(tmp_path.rglob("*.*g"), reverse=True):
            archive.write(path, path.relative_to(tmp_path))
        archive.writestr("__MACOSX/pets/dog/._1.png", b"rubbish")
    folder, archive = open_images(tmp_path / "pets"), open_images(source)
    same = ("count", "shape", "class_names", "sha256", "labels_sha256", "name")
    assert [archive.manifest[key] for key in same] == [folder.manifest[key] for key in same]
    assert archive.manifest["source"] == "archive pets.zip with 3 image files"


def test_a_link_into_its_own_folder_ends(tmp_path):
    save(tmp_path / "a" / "1.png", pixels())
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert len(open_images(tmp_path)) == 1


# Archives that are not what they seem


@pytest.mark.parametrize(
    "name",
    [
        "../a.png",
        "x/../../a.png",
        "/a.png",
        "C:/a.png",
        "..\\a.png",
        "x\\..\\..\\a.png",
        "\\a.png",
        "\\\\host\\a.png",
        "C:\\a.png",
    ],
)
def test_an_entry_that_leads_out_of_the_archive_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="leads out of the archive"):
        open_images(zipped(tmp_path / "a.zip", {"ok.png": png_bytes(pixels()), name: png_bytes(pixels())}))


def test_an_entry_that_occurs_twice_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", png_bytes(pixels()))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.png", png_bytes(pixels(seed=1)))
    with pytest.raises(ValueError, match="occurs twice"):
        open_images(tmp_path / "a.zip")


def test_an_encrypted_entry_is_refused(tmp_path):
    content = bytearray(zipped(tmp_path / "a.zip", {"a.png": png_bytes(pixels())}).read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(ValueError, match="encrypted"):
        open_images(tmp_path / "a.zip")


def test_a_cut_archive_is_refused(tmp_path):
    path = zipped(tmp_path / "a.zip", {"a.png": png_bytes(pixels())})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"not a complete \.zip archive"):
        open_images(path)


def test_an_entry_with_a_wrong_checksum_is_a_broken_file(tmp_path):
    array = pixels()
    content = bytearray(zipped(tmp_path / "a.zip", {"a.png": png_bytes(array), "b.png": png_bytes(array)}).read_bytes())
    content[content.index(b"IDAT") + 30] ^= 255
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"1 of 2 image files cannot be read: .*a\.zip/a\.png \(.+\)"):
        open_images(tmp_path / "a.zip")


# Broken files


def test_broken_files_are_all_found_and_named_with_their_reason(tmp_path):
    for seed in range(20):
        save(tmp_path / f"{seed:02}.png", pixels(seed=seed))
    (tmp_path / "03.png").write_bytes(b"")
    (tmp_path / "05.png").write_bytes(b"GIF89a, no more")
    whole = (tmp_path / "17.png").read_bytes()
    (tmp_path / "17.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="skip_broken=True") as caught:
        open_images(tmp_path)
    message = str(caught.value)
    assert message.startswith("3 of 20 image files cannot be read: ")
    for name in ("03.png", "05.png", "17.png"):
        assert f"{tmp_path / name} (" in message
    assert "truncated" in message
    assert "BytesIO" not in message


def test_skipped_files_are_counted_and_take_their_labels_with_them(tmp_path):
    for seed, name in enumerate(["a/0.png", "a/1.png", "b/2.png", "b/3.png"]):
        save(tmp_path / name, pixels(seed=seed))
    (tmp_path / "a" / "1.png").write_bytes((tmp_path / "a" / "1.png").read_bytes()[:100])
    (tmp_path / "b" / "2.png").write_text("<html>404</html>")
    opened = open_images(tmp_path, skip_broken=True)
    np.testing.assert_array_equal(opened.images, [chw(pixels(seed=seed)) for seed in (0, 3)])
    np.testing.assert_array_equal(opened.labels, [0, 1])
    assert opened.manifest["skipped"] == 2
    assert [text.split(" (")[0] for text in opened.manifest["skipped_files"]] == [
        str(tmp_path / name) for name in ("a/1.png", "b/2.png")
    ]
    assert (opened.manifest["count"], opened.manifest["class_names"]) == (2, ["a", "b"])


def test_more_than_a_few_broken_files_are_counted_and_the_first_named(tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.png").write_text("?")
    save(tmp_path / "good.png", pixels())
    with pytest.raises(ValueError, match=r"9 of 10 .*/4\.png \([^)]*\) and 4 more"):
        open_images(tmp_path)
    (tmp_path / "good.png").unlink()
    for skip in (False, True):
        with pytest.raises(ValueError, match="none of 9 image files can be read"):
            open_images(tmp_path, skip_broken=skip)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    save(tmp_path / "a.png", pixels())
    # 20,000 x 20,000 pixels in a header, and nothing behind it that could be decoded.
    header = b"IHDR" + (20000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    chunk = (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT\x35\xaf\x06\x1e")
    with pytest.raises(ValueError, match=r"bomb\.png \(.*decompression bomb"):
        open_images(tmp_path)
    # Between Pillow's warning and its error, and where somebody switched Pillow's own check off.
    for limit in (300_000_000, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=r"bomb\.png \(.*decompression bomb"):
            open_images(tmp_path)


def test_a_folder_without_images_says_what_it_looked_for(tmp_path):
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"holds no image file.*\.png"):
        open_images(tmp_path)
    with pytest.raises(ValueError, match="holds no image file"):
        open_images(zipped(tmp_path / "a.zip", {"readme.txt": b"hello"}))


# Sizes


def test_images_of_different_size_are_named_with_the_remedy(tmp_path):
    save(tmp_path / "a.png", pixels((6, 8, 3)))
    save(tmp_path / "b.png", pixels((6, 8, 3)))
    save(tmp_path / "c.png", pixels((5, 9, 3)))
    with pytest.raises(
        ValueError, match=r"a\.png has 8 x 6 pixels, .*c\.png has 9 x 5.*resolution=N.*shortest side .* 5"
    ):
        open_images(tmp_path)


def lanczos(line, size):
    """Resample a float64 line by the definition: sinc(x) sinc(x / 3), widened when reducing, weights normalised."""
    scale = len(line) / size
    wide = max(scale, 1.0)
    place = (np.arange(size) + 0.5) * scale - 0.5
    x = (np.arange(len(line)) - place[:, None]) / wide
    weight = np.where(abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    return weight / weight.sum(1, keepdims=True) @ line


@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize(("shape", "resolution"), [((21, 32, 3), 8), ((33, 20, 3), 16), ((9, 12), 24)])
def test_resizing_is_a_centred_crop_and_lanczos_as_the_manifest_says(tmp_path, resize, shape, resolution):
    # Pillow rounds to bytes after each of its two passes, and the weights of the second have absolute sum below 1.5.
    y, x = np.mgrid[: shape[0], : shape[1]]
    smooth = np.stack([np.sin(x / 5 + k) + np.cos(y / 4 - k) for k in range(3)], -1)[..., : 3 if len(shape) == 3 else 1]
    array = np.rint(127.5 + 60 * smooth).astype(np.uint8).reshape(shape)
    save(tmp_path / "a.png", array)
    opened = open_images(tmp_path, resolution=resolution, resize=resize)
    wanted = array.reshape(*shape[:2], -1).astype(float)
    if resize == "crop":
        side = min(shape[:2])
        top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
        wanted = wanted[top : top + side, left : left + side]
    wanted = np.apply_along_axis(lanczos, 0, np.apply_along_axis(lanczos, 1, wanted, resolution), resolution)
    assert abs(opened.images[0] - wanted.transpose(2, 0, 1)).max() <= 0.5 * 1.5 + 0.5
    how = {"crop": "cut to the largest centred square", "squash": "squashed to a square"}[resize]
    assert opened.manifest["resized"].startswith(f"{how}, then Lanczos to {resolution} x {resolution} (Pillow")
    assert opened.manifest["conversions"] == ({"enlarged": 1} if min(shape[:2]) < resolution else {})


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([(24, 32)], 32, None),  # kept
        ([(64, 48)], 64, None),
        ([(8, 64)], 64, None),
        ([(48, 64)], 32, (24, 32)),  # smaller in the same shape
        ([(480, 640)], 64, (48, 64)),
        ([(30, 40)], 64, (28, 40)),  # cut to what can be halved
        ([(218, 178)], 64, (64, 56)),
        ([(1080, 1920)], 64, (32, 64)),
        ([(1080, 1920)], 32, (16, 32)),
        ([(10, 1000)], 64, 8),  # no network for it
        ([(24, 32), (32, 24)], 32, 16),  # several sizes: squares
        ([(32, 32)], 32, None),
        ([(30, 30)], 64, 16),
        ([(100, 100)], 64, 64),
    ],
)
def test_images_of_one_size_keep_their_shape_where_it_can_be_halved(sizes, limit, expected):
    assert natural_resolution(sizes, limit) == expected


def test_a_few_small_images_that_lower_the_resolution_are_counted_as_by_removing_them_one_by_one():
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(300):
        common = rng.choice([16, 40, 64, 100, 160], (rng.integers(1, 4), 2))
        sizes = [tuple(map(int, common[k])) for k in rng.integers(0, len(common), rng.integers(5, 45))]
        sizes += [tuple(map(int, pair)) for pair in rng.integers(4, 40, (rng.integers(0, 5), 2))]
        limit = int(rng.choice([16, 32, 64]))
        sizes.sort(key=lambda size: (min(size), size))

        def side(rest, limit=limit):
            resolution = natural_resolution(rest, limit) or rest[0]
            return resolution if isinstance(resolution, int) else min(resolution)

        # Those of one shortest side go together.
        counts = [k for k in range(len(sizes) // 10 + 1) if k == 0 or min(sizes[k - 1]) < min(sizes[k])]
        sides = {k: side(sizes[k:]) for k in counts}
        best = max(sides.values())
        raised = raised_resolution(Counter(sizes), limit)
        if best == sides[0]:
            assert raised is None
            continue
        found += 1
        assert raised is not None
        resolution, removed = raised
        assert (resolution if isinstance(resolution, int) else min(resolution)) == best
        assert removed == min(k for k in counts if sides[k] == best)
    assert found > 20


@pytest.mark.parametrize("source", ["folder", "npy"])
@pytest.mark.parametrize(
    ("size", "limit", "text"),
    [
        ((24, 32), 32, "no"),
        ((48, 64), 32, "Lanczos to 32 x 24 (Pillow"),
        ((30, 41), 64, "cut to the largest centred part in the shape of 40 x 28, then Lanczos to 40 x 28 (Pillow"),
    ],
)
def test_what_became_of_images_that_are_not_square_is_said_and_done_again_alike(tmp_path, source, size, limit, text):
    arrays = np.stack([pixels((*size, 3), seed) for seed in range(2)])
    if source == "npy":
        np.save(tmp_path / "a.npy", arrays)
    for seed, array in enumerate(arrays):
        save(tmp_path / "a" / f"{seed}.png", array)
    path = tmp_path / ("a.npy" if source == "npy" else "a")
    opened = open_images(path, limit=limit)
    assert opened.manifest["resized"].startswith(text)
    height, width = opened.shape[1:]
    # The largest centred part of the shape, by its definition: no side can grow.
    kept = min(size[0], round(size[1] * height / width)), min(size[1], round(size[0] * width / height))
    top, left = ((whole - part) // 2 for whole, part in zip(size, kept, strict=True))
    for image, array in zip(opened.images, arrays, strict=True):
        part = Image.fromarray(array[top : top + kept[0], left : left + kept[1]])
        expected = array if text == "no" else np.asarray(part.resize((width, height), Image.Resampling.LANCZOS))
        np.testing.assert_array_equal(image, chw(expected))
    again = open_images(path, resolution=[height, width])
    assert again.manifest["sha256"] == opened.manifest["sha256"]
    assert open_images(path, resolution=(8, 16), resize="squash").shape == (3, 8, 16)


def test_images_that_have_the_resolution_are_left_as_they_are(tmp_path):
    save(tmp_path / "a.png", pixels((8, 8, 3)))
    opened = open_images(tmp_path, resolution=8)
    np.testing.assert_array_equal(opened.images[0], chw(pixels((8, 8, 3))))
    assert opened.manifest["resized"] == "no"


def test_a_crop_without_reduction_copies_pixels(tmp_path):
    save(tmp_path / "a.png", pixels((8, 13, 3)))
    np.testing.assert_array_equal(open_images(tmp_path, resolution=8).images[0], chw(pixels((8, 13, 3))[:, 2:10]))


@pytest.mark.parametrize("arguments", [{"resolution": 0}, {"resolution": -4}, {"resize": "stretch"}])
def test_bad_arguments_are_named(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        open_images("digits", **arguments)


# Colour


def test_greyscale_stays_one_channel_if_all_images_are(tmp_path):
    grey = pixels((6, 8))
    save(tmp_path / "a.png", grey)
    save(tmp_path / "b.jpg", grey, quality=100)
    save(tmp_path / "c.png", Image.fromarray(grey > 127))
    opened = open_images(tmp_path)
    assert opened.images.shape == (3, 1, 6, 8)
    np.testing.assert_array_equal(opened.images[0, 0], grey)
    np.testing.assert_array_equal(opened.images[2, 0], 255 * (grey > 127))
    save(tmp_path / "d.png", pixels())
    mixed = open_images(tmp_path)
    assert mixed.images.shape == (4, 3, 6, 8)
    np.testing.assert_array_equal(mixed.images[0], np.stack([grey] * 3))
    assert mixed.manifest["conversions"] == {"greyscale repeated to RGB": 3}


def test_transparency_is_composited_over_white(tmp_path):
    array = pixels((6, 8, 4))
    array[:3, :, 3] = 0
    array[3, :, 3] = 255
    save(tmp_path / "a.png", array)
    opened = open_images(tmp_path).images[0].astype(int)
    alpha = array[..., 3:] / 255
    expected = chw(array[..., :3] * alpha + 255 * (1 - alpha))
    np.testing.assert_array_equal(opened[:, :3], 255)
    np.testing.assert_array_equal(opened[:, 3], chw(array[..., :3])[:, 3])
    assert abs(opened - expected).max() <= 1
    assert open_images(tmp_path).manifest["conversions"] == {"transparency composited over white": 1}


@pytest.mark.parametrize(
    ("background", "ground", "told"),
    [("black", (0, 0, 0), "black"), ("#FF8000", (255, 128, 0), "#ff8000"), ("#ffffff", (255, 255, 255), "white")],
)
def test_a_background_lies_below_transparent_pixels_as_by_pillows_alpha_composite(tmp_path, background, ground, told):
    layers = {"a.png": Image.fromarray(pixels((6, 8, 4))), "c.png": Image.fromarray(pixels((6, 8, 3)))}
    layers["b.webp"] = Image.merge("RGBA", [Image.fromarray(pixels((6, 8)))] * 3 + [Image.fromarray(pixels((6, 8)))])
    for name, image in layers.items():
        image.save(tmp_path / name, lossless=True)
    opened = open_images(tmp_path, background=background)
    for found, (_, image) in zip(opened.images, sorted(layers.items()), strict=True):
        below = Image.new("RGBA", (8, 6), (*ground, 255))
        expected = chw(np.asarray(Image.alpha_composite(below, image.convert("RGBA")).convert("RGB")))
        assert abs(found.astype(int) - expected).max() <= 1
    assert opened.manifest["conversions"] == {f"transparency composited over {told}": 2}
    assert opened.opening is not None
    for again in (open_images(**opened.opening), open_images(opened.place, **opened.reading)):
        assert again.manifest["sha256"] == opened.manifest["sha256"]
    # The packed file of large sets is another one, too.
    small = {"memory_budget": 0, "cache": tmp_path / "cache"}
    packed = [open_images(tmp_path, background=one, **small) for one in ("white", background)]
    assert packed[1].manifest["sha256"] == opened.manifest["sha256"]
    assert (packed[0].file == packed[1].file) == (told == "white")


def test_colour_makes_files_and_arrays_greyscale_or_rgb_as_pillow_does(tmp_path):
    grey, rgb, layered = pixels((6, 8)), pixels((6, 8, 3)), pixels((6, 8, 4))
    for name, array in (("a.png", grey), ("b.png", rgb), ("c.png", layered)):
        save(tmp_path / "in" / name, array)
    over = Image.new("RGB", (8, 6), (0, 255, 0))
    over.paste(Image.fromarray(layered).convert("RGB"), mask=Image.fromarray(layered).getchannel("A"))
    opened = open_images(tmp_path / "in", colour="grey", background="#00ff00")
    wanted = [grey, np.asarray(Image.fromarray(rgb).convert("L")), np.asarray(over.convert("L"))]
    np.testing.assert_array_equal(opened.images[:, 0], wanted)
    assert opened.manifest["conversions"] == {
        "colour converted to greyscale": 2,
        "transparency composited over #00ff00": 1,
    }
    assert opened.opening is not None
    assert opened.opening | {"colour": "grey", "background": "#00ff00"} == opened.opening
    save(tmp_path / "grey" / "a.png", grey)
    np.testing.assert_array_equal(open_images(tmp_path / "grey", colour="rgb").images[0], np.stack([grey] * 3))
    np.save(tmp_path / "a.npy", rgb[None])
    np.save(tmp_path / "b.npy", grey[None])
    np.testing.assert_array_equal(open_images(tmp_path / "a.npy", colour="grey").images, wanted[1][None, None])
    repeated = open_images(tmp_path / "b.npy", colour="rgb")
    np.testing.assert_array_equal(repeated.images[0], np.stack([grey] * 3))
    assert repeated.manifest["conversions"] == {"greyscale repeated to RGB": 1}
    np.save(tmp_path / "c.npy", np.ones((3, 4), np.float32) * np.arange(3)[:, None])
    with pytest.raises(ValueError, match=r"colour=grey: .* leave colour out"):
        open_images(tmp_path / "c.npy", colour="grey")
    for wrong in ({"colour": "gray"}, {"background": "red"}, {"background": "#12345"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            open_images(tmp_path / "in", **wrong)


@pytest.mark.parametrize("budget", [0, 2**20])
def test_arrays_become_greyscale_after_they_are_resized_so_that_runs_of_earlier_versions_find_their_pixels(
    tmp_path, budget
):
    images = np.stack([pixels((24, 24, 3), seed) for seed in range(3)])
    np.savez(tmp_path / "a.npz", images=images)
    wanted = [
        np.asarray(Image.fromarray(each).resize((9, 9), Image.Resampling.LANCZOS).convert("L")) for each in images
    ]
    opened = open_images(
        tmp_path / "a.npz", resolution=9, colour="grey", memory_budget=budget, cache=tmp_path / "cache"
    )
    np.testing.assert_array_equal(opened.images[:, 0], wanted)


def test_opaque_alpha_is_dropped_without_a_word(tmp_path):
    array = pixels((6, 8, 4))
    array[..., 3] = 255
    save(tmp_path / "a.png", array)
    opened = open_images(tmp_path)
    np.testing.assert_array_equal(opened.images[0], chw(array[..., :3]))
    assert opened.manifest["conversions"] == {}


def test_transparent_greyscale_stays_greyscale(tmp_path):
    layered = Image.merge("LA", [Image.fromarray(pixels((6, 8))), Image.fromarray(np.zeros((6, 8), np.uint8))])
    save(tmp_path / "a.png", layered)
    save(tmp_path / "b.png", pixels((6, 8)), transparency=int(pixels((6, 8))[2, 3]))
    opened = open_images(tmp_path)
    assert opened.images.shape == (2, 1, 6, 8)
    assert (opened.images[0] == 255).all()
    keyed = pixels((6, 8))
    np.testing.assert_array_equal(opened.images[1, 0], np.where(keyed == keyed[2, 3], 255, keyed))
    assert opened.manifest["conversions"] == {"transparency composited over white": 2}


def test_palette_images_become_their_colours(tmp_path):
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 99, 199]], np.uint8)
    index = pixels((6, 8)) % 4
    image = Image.fromarray(index)
    image.putpalette(colours.ravel().tolist())
    save(tmp_path / "a.png", image)
    save(tmp_path / "b.gif", image)
    save(tmp_path / "c.png", image, transparency=2)
    opened = open_images(tmp_path)
    expected = chw(colours[index])
    np.testing.assert_array_equal(opened.images[0], expected)
    np.testing.assert_array_equal(opened.images[1], expected)
    np.testing.assert_array_equal(opened.images[2], np.where(index == 2, 255, expected))
    assert opened.manifest["conversions"] == {"transparency composited over white": 1}


def test_cmyk_is_converted_and_said(tmp_path):
    ink = pixels((6, 8, 4))
    save(tmp_path / "a.tif", Image.merge("CMYK", [Image.fromarray(ink[..., i]) for i in range(4)]))
    opened = open_images(tmp_path)
    expected = (255 - ink[..., :3].astype(float)) * (255 - ink[..., 3:]) / 255
    assert abs(opened.images[0] - chw(expected)).max() <= 1
    assert opened.manifest["conversions"] == {"CMYK converted to RGB": 1}


def test_sixteen_bit_greyscale_is_refused_with_the_remedy(tmp_path):
    save(tmp_path / "a.png", Image.fromarray(pixels((6, 8)).astype(np.uint16) * 257))
    with pytest.raises(ValueError, match=r"mode I;16 is not 8 bits.*convert it to 8 bits"):
        open_images(tmp_path)
    (tmp_path / "a.png").unlink()
    save(tmp_path / "a.tif", Image.fromarray(pixels((6, 8)).astype(np.float32)))
    with pytest.raises(ValueError, match="mode F"):
        open_images(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_images_are_turned_as_exif_says(tmp_path, suffix):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 250, 10, 10
    upright[8:, 16:] = 10, 10, 250
    stored = {  # what a camera stores for each tag: the upright picture, turned the other way
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    for tag, array in stored.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
        save(tmp_path / f"{tag}.{suffix}", np.ascontiguousarray(array), exif=exif, **options)
    opened = open_images(tmp_path)
    assert opened.images.shape == (8, 3, 16, 24)
    assert abs(opened.images.astype(int) - chw(upright)).max() <= (3 if suffix == "jpg" else 0)
    assert opened.manifest["conversions"] == {"turned as EXIF says": 7}


def with_chunk(png, kind, content, *, late):
    """A PNG with one more chunk, in front of its pixels or behind them."""
    chunk = len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
    place = png.index(b"IEND" if late else b"IDAT") - 4
    return png[:place] + chunk + png[place:]


XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>"""


@pytest.mark.parametrize("packing", ["folder", "zip"])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["eXIf", "iTXt", "zTXt"])
def test_a_png_is_turned_wherever_its_orientation_is_written(tmp_path, kind, late, packing):
    upright = pixels((6, 8, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = exif.tobytes().removeprefix(b"Exif\0\0")
    profile = b"\nexif\n%8d\n" % (len(raw) + 6) + (b"Exif\0\0" + raw).hex().encode() + b"\n"
    content = {
        "eXIf": raw,
        "iTXt": b"XML:com.adobe.xmp\0\0\0\0\0" + XMP,
        "zTXt": b"Raw profile type exif\0\0" + zlib.compress(profile),
    }[kind]
    stored = png_bytes(np.ascontiguousarray(np.rot90(upright)))
    entries = {"a.png": with_chunk(stored, kind.encode(), content, late=late), "b.png": png_bytes(upright)}
    if packing == "zip":
        source = zipped(tmp_path / "a.zip", entries)
    else:
        source = tmp_path
        for name, data in entries.items():
            (tmp_path / name).write_bytes(data)
    opened = open_images(source)
    np.testing.assert_array_equal(opened.images, [chw(upright)] * 2)
    assert opened.manifest["conversions"] == {"turned as EXIF says": 1}


def test_a_png_that_says_more_behind_its_pixels_is_decoded_within_the_memory_for_decoding(tmp_path, monkeypatch):
    taken, load = image_loader._Room.taken, PngImageFile.load
    held, during = [], []

    @contextmanager
    def noted(self, size):
        with taken(self, size):
            held.append(size)
            yield
            held.pop()

    def loaded(self):
        # Pillow calls it once more for every look at the pixels.
        during.append(sum(held))
        return load(self)

    monkeypatch.setattr(image_loader._Room, "taken", noted)
    monkeypatch.setattr(PngImageFile, "load", loaded)
    content = b"XML:com.adobe.xmp\0\0\0\0\0" + XMP
    for late in (False, True):
        data = with_chunk(png_bytes(pixels((60, 80, 3))), b"iTXt", content, late=late)
        (tmp_path / "a.png").write_bytes(data)
        during.clear()
        opened = open_images(tmp_path, progress=lambda report: during.append(report.stage))
        assert opened.shape == (3, 80, 60)
        looked = during[: during.index("reading headers")]
        assert looked == [8 * 60 * 80] * late
        assert min(size for size in during if not isinstance(size, str)) == 8 * 60 * 80


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.fromarray(np.full((6, 8, 3), value, np.uint8)) for value in (40, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    opened = open_images(tmp_path)
    assert (opened.images == 40).all()
    assert opened.manifest["conversions"] == {"first frame of several taken": 1}


# Memory


def test_images_beyond_the_memory_budget_are_mapped_and_kept_for_the_next_time(tmp_path, monkeypatch):
    for seed, name in enumerate(["a/0.png", "a/1.png", "b/2.png"]):
        save(tmp_path / "in" / name, pixels(seed=seed))
    (tmp_path / "in" / "b" / "3.png").write_text("?")
    held = open_images(tmp_path / "in", skip_broken=True, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    # Four files were promised, of 144 bytes each.
    small = {"memory_budget": 4 * 144 - 1, "cache": tmp_path / "cache"}
    with pytest.raises(ValueError, match="1 of 4"):
        open_images(tmp_path / "in", **small)
    assert list((tmp_path / "cache").iterdir()) == []
    mapped = open_images(tmp_path / "in", skip_broken=True, **small)
    assert isinstance(mapped.images, np.memmap)
    assert mapped.file.parent == tmp_path / "cache"
    np.testing.assert_array_equal(mapped.images, held.images)
    np.testing.assert_array_equal(mapped.labels, held.labels)
    assert mapped.manifest == held.manifest
    written = mapped.file.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr("stablefield.data._image_loader.decode", None)
        again = open_images(tmp_path / "in", skip_broken=True, **small)
    assert again.file == mapped.file
    assert again.file.stat().st_mtime_ns == written
    # What was skipped is not passed over in silence by somebody who does not skip.
    with pytest.raises(ValueError, match="1 of 4"):
        open_images(tmp_path / "in", **small)
    # A damaged cache file and a changed source are decoded anew.
    mapped.file.write_bytes(mapped.file.read_bytes()[:-1])
    assert open_images(tmp_path / "in", skip_broken=True, **small).manifest == held.manifest
    save(tmp_path / "in" / "a" / "1.png", pixels(seed=7))
    changed = open_images(tmp_path / "in", skip_broken=True, **small)
    np.testing.assert_array_equal(changed.images[1], chw(pixels(seed=7)))


def test_another_note_is_no_reason_to_decode_anew(tmp_path, monkeypatch):
    for name in ("1", "2"):
        save(tmp_path / "in" / f"{name}.png", pixels())
    keys = []

    def cached(folder, key, notes):
        keys.append(key)
        return collector.cached(folder, key, notes)

    monkeypatch.setattr(image_loader, "cached", cached)
    opened = open_images(tmp_path / "in", memory_budget=10, cache=tmp_path / "cache")
    (file,), (plain,) = (tmp_path / "cache").iterdir(), keys
    monkeypatch.setattr(image_loader, "decode", None)
    (tmp_path / "in" / "labels.csv").write_text("1,0")
    noted = open_images(tmp_path / "in", memory_budget=10, cache=tmp_path / "cache")
    assert (noted.file, noted.manifest["sha256"]) == (file, opened.manifest["sha256"])
    assert (opened.notes, [note.split(",")[0] for note in noted.notes]) == ((), ["labels.csv is not read"])
    # A file of an earlier version, named by its notes, too.
    (earlier,) = (key for key in keys if key != plain)
    named, _ = collector.cached(tmp_path / "cache", earlier, ())
    file.rename(named)
    assert open_images(tmp_path / "in", memory_budget=10, cache=tmp_path / "cache").file == named
    # Its note is gone with the table.
    named.rename(file)
    (tmp_path / "in" / "labels.csv").unlink()
    assert open_images(tmp_path / "in", memory_budget=10, cache=tmp_path / "cache").notes == ()


def test_a_cache_disk_that_is_too_small_is_said_before_decoding(tmp_path, monkeypatch):
    save(tmp_path / "in" / "a.png", pixels())
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(ValueError, match=r"above the memory budget of 10 B.*100 B free.*XDG_CACHE_HOME"):
        open_images(tmp_path / "in", memory_budget=10, cache=tmp_path / "cache")


def test_the_cache_lies_where_the_system_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save(tmp_path / "in" / "a.png", pixels())
    assert open_images(tmp_path / "in", memory_budget=10).file.parent == tmp_path / "cache" / "stablefield"


def test_decoding_runs_only_a_little_ahead(tmp_path, monkeypatch):
    started = []
    results = image_loader._reported("decoding", None, lambda i: started.append(i) or i, 1000)
    assert [next(results) for _ in range(10)] == list(range(10))
    assert len(started) <= 10 + image_loader.WINDOW
    results.close()
    assert len(started) <= 11 + image_loader.WINDOW


def test_progress_is_reported_for_every_file_and_both_passes(tmp_path):
    for i in range(5):
        save(tmp_path / f"{i}.png", pixels())
    calls = []
    open_images(tmp_path, progress=calls.append)
    seen = [(call.stage, call.done, call.total) for call in calls]
    assert seen == [(stage, i + 1, 5) for stage in ("reading headers", "decoding") for i in range(5)]


def test_without_pillow_the_extra_is_named(tmp_path, monkeypatch):
    save(tmp_path / "a.png", pixels())
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'pip install "stablefield\[train\]"'):
        open_images(tmp_path)
