"""CIFAR-10, idx files, NumPy arrays, tables, and what is no source at all."""

import gzip
import io
import json
import struct
import sys
import warnings

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import stablefield as sf
from stablefield.data import MissingSplitError, Origin, make_image_set, open_images
from stablefield.data import _arrays as arrays


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# CIFAR-10


def cifar(folder, rows=4):
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    labels, images = noise((6, rows), 1) % 10, noise((6, rows, 3, 32, 32), 2)
    for name, numbers, pictures in zip(names, labels, images, strict=True):
        with (folder / name).open("wb") as file:
            for number, picture in zip(numbers, pictures, strict=True):
                file.write(bytes([number]))
                for plane in picture:  # red, green, blue
                    file.write(plane.tobytes())
    return labels, images


@pytest.mark.parametrize("place", [".", "cifar-10-batches-bin"])
def test_cifar10_gives_its_batches_in_order(tmp_path, place):
    labels, images = cifar(tmp_path / "data" / place)
    train, test = open_images(tmp_path / "data"), open_images(tmp_path / "data", split="test")
    np.testing.assert_array_equal(train.images, images[:5].reshape(20, 3, 32, 32))
    np.testing.assert_array_equal(train.labels, labels[:5].reshape(20))
    np.testing.assert_array_equal(test.images, images[5])
    np.testing.assert_array_equal(test.labels, labels[5])
    assert (train.name, train.class_names[3], train.classes) == ("cifar10", "cat", 10)


def test_an_incomplete_or_cut_cifar10_is_refused(tmp_path):
    cifar(tmp_path / "c")
    with pytest.raises(MissingSplitError, match="split='val'"):
        open_images(tmp_path / "c", split="val")
    path = tmp_path / "c" / "data_batch_3.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"data_batch_3\.bin has 12,291 bytes, not a multiple of 3,073"):
        open_images(tmp_path / "c")
    path.write_bytes(b"\x0a" + whole[1:])
    with pytest.raises(ValueError, match="the label 10"):
        open_images(tmp_path / "c")
    path.unlink()
    with pytest.raises(ValueError, match=r"lacks data_batch_3\.bin"):
        open_images(tmp_path / "c")


def test_cifar10_as_pickles_is_never_read(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(b"cos\nsystem\n(S'exit'\ntR.")
    with pytest.raises(ValueError, match=r"pickles.*binary version"):
        open_images(tmp_path)


# idx


def idx(path, array, code=8):
    content = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture(params=["", ".gz"])
def mnist(tmp_path, request):
    data = {"train": (noise((7, 5, 4)), noise(7) % 10), "t10k": (noise((3, 5, 4), 1), noise(3, 1) % 10)}
    for split, (images, labels) in data.items():
        idx(tmp_path / f"{split}-images-idx3-ubyte{request.param}", images)
        idx(tmp_path / f"{split}-labels-idx1-ubyte{request.param}", labels)
    return tmp_path, data, request.param


def test_a_folder_of_idx_files_gives_its_splits_with_labels(mnist):
    folder, data, _ = mnist
    for split, key in (("train", "train"), ("test", "t10k")):
        opened = open_images(folder, split=split)
        np.testing.assert_array_equal(opened.images[:, 0], data[key][0])
        np.testing.assert_array_equal(opened.labels, data[key][1])
    with pytest.raises(MissingSplitError, match="split='val'"):
        open_images(folder, split="val")


def test_one_idx_file_finds_its_labels_or_does_without(mnist):
    folder, data, suffix = mnist
    path = folder / f"t10k-images-idx3-ubyte{suffix}"
    np.testing.assert_array_equal(open_images(path).labels, data["t10k"][1])
    assert (open_images(path).file is None) == (suffix == ".gz")
    (folder / f"t10k-labels-idx1-ubyte{suffix}").unlink()
    assert open_images(path).labels is None


def test_a_cut_or_foreign_idx_file_is_refused(mnist):
    folder, _, suffix = mnist
    path = folder / f"train-images-idx3-ubyte{suffix}"
    whole = path.read_bytes()
    for content in (whole[:-9], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cut short or damaged"):
            open_images(folder)
    plain = gzip.decompress(whole) if suffix else whole
    for content in (plain[:-1], plain + b"\0", plain[:9]):
        path.write_bytes(gzip.compress(content) if suffix else content)
        with pytest.raises(ValueError, match="cut short or damaged"):
            open_images(folder)
    idx(path, noise((8, 5, 4)))
    with pytest.raises(ValueError, match="7 labels for the 8 images"):
        open_images(folder)
    with pytest.raises(ValueError, match="3 axes"):
        open_images(folder / f"train-labels-idx1-ubyte{suffix}")
    idx(path, np.zeros((0, 5, 4), np.uint8))
    with pytest.raises(ValueError, match="empty or damaged"):
        open_images(path)


def test_a_folder_with_several_training_sets_asks_for_a_file(tmp_path):
    for name in ("a-train-images-idx3-ubyte", "b-train-images-idx3-ubyte"):
        idx(tmp_path / name, noise((2, 3, 3)))
    with pytest.raises(ValueError, match=r"2 idx files of images.*a-train-images.*name the file itself"):
        open_images(tmp_path)


def test_an_idx_file_beside_its_gzipped_twin_is_no_ambiguity(tmp_path):
    idx(tmp_path / "train-images-idx3-ubyte", noise((2, 3, 3)))
    idx(tmp_path / "train-images-idx3-ubyte.gz", noise((2, 3, 3)))
    assert len(open_images(tmp_path)) == 2


# NumPy arrays


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((4, 5, 6), "NHW"),
        ((4, 3, 5, 6), "NCHW"),
        ((4, 1, 5, 6), "NCHW"),
        ((4, 5, 6, 3), "NHWC"),
        ((3, 5, 6, 1), "NHWC"),
    ],
)
@pytest.mark.parametrize("kind", ["npy", "npz", "mapped npz"])
def test_layouts_are_told_apart_by_shape_and_stated(tmp_path, shape, layout, kind):
    array = noise(shape)
    expected = {"NHW": array[:, None] if array.ndim == 3 else None, "NCHW": array, "NHWC": np.moveaxis(array, -1, 1)}[
        layout
    ]
    path = tmp_path / f"a.{kind[-3:]}"
    if kind == "npy":
        np.save(path, array)
    else:
        np.savez_compressed(path, images=array)
    options = {"memory_budget": 10, "cache": tmp_path / "cache"} if kind == "mapped npz" else {}
    opened = open_images(path, **options)
    np.testing.assert_array_equal(opened.images, expected)
    assert f"read as {layout}" in opened.manifest["source"]
    assert (opened.file is None) == (kind == "npz")
    opened.verify()
    if options:
        assert open_images(path, **options).file == opened.file


@pytest.mark.parametrize("shape", [(4, 3, 5, 3), (4, 1, 5, 3), (4, 1, 5, 1)])
def test_an_ambiguous_layout_is_refused_with_the_remedy(tmp_path, shape):
    np.save(tmp_path / "a.npy", noise(shape))
    with pytest.raises(ValueError, match=r"may be \(n, C, H, W\) or \(n, H, W, C\): .*greyscale images as \(n, H, W\)"):
        open_images(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (noise((4, 5, 6)).astype(np.int32), r"int32.*astype\('uint8'\)"),
        (noise((4, 5, 6)) > 9, "bool"),
        (noise((4, 5, 6, 4)), "alpha"),
        (noise((4, 5)), r"\(4, 5\)"),
        (noise((0, 5, 6)), "n above 0"),
    ],
)
def test_arrays_that_are_no_images_are_refused_with_the_remedy(tmp_path, array, says):
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", x=array)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(ValueError, match=says):
            open_images(tmp_path / name)


def test_pickled_arrays_are_never_read(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", images=noise((2, 5, 5)), labels=np.array([{}, {}], object))
    with pytest.raises(ValueError, match="Python objects"):
        open_images(tmp_path / "a.npy")
    with pytest.raises(ValueError, match=r"[Oo]bject"):
        open_images(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "keys",
    [
        ("images", "labels"),
        ("x", "y"),
        ("arr_0", "labels"),
        ("arr_0", "arr_1"),
        ("train_images", "train_labels"),
        ("x_train", "y_train"),
    ],
)
@pytest.mark.parametrize("column", [False, True])
def test_labels_of_an_npz_are_found_under_the_usual_names(tmp_path, keys, column):
    labels = np.array([2, 0, 1], np.uint8)
    np.savez(tmp_path / "a.npz", **{keys[0]: noise((3, 5, 5)), keys[1]: labels[:, None] if column else labels})
    opened = open_images(tmp_path / "a.npz")
    np.testing.assert_array_equal(opened.labels, labels)
    assert opened.labels.dtype == np.int64


@pytest.mark.parametrize(
    ("images", "other", "wanted"),
    [
        ("images", "label", "labels"),
        ("x", "targets", "y"),
        ("data", "target", "labels"),
        ("arr_0", "classIds", "labels"),
    ],
)
def test_labels_of_an_npz_under_another_name_are_noted_and_read_under_the_name_that_the_note_says(
    tmp_path, monkeypatch, images, other, wanted
):
    values = np.random.default_rng(0).normal(size=(4, 5)) if images == "data" else noise((4, 6, 6))
    numbers = np.array([1, 0, 2, 1], np.int16)
    beside = {"seeds": np.arange(4), "weights": np.ones(4), "edges": np.arange(5), "objects": np.array([None] * 4)}
    beside |= {name: np.arange(4) for name in ("image_ids", "frame", "target_width")}
    np.savez(tmp_path / "x.npz", **{images: values, other: numbers}, **beside)
    opened = open_images(tmp_path / "x.npz", memory_budget=2**20)
    assert opened.labels is None
    said = f"so there are no labels: if the array {other} holds them, save it as {wanted}."
    assert opened.notes == (f"No array is called {wanted}, {said}",)
    if images != "data":
        mapped = open_images(tmp_path / "x.npz", memory_budget=0, cache=tmp_path / "cache")
        assert (mapped.notes, mapped.file is None) == (opened.notes, False)
        # A version that says something else maps the same file.
        with monkeypatch.context() as patch:
            patch.setattr(arrays, "_label_note", lambda *_: ("Another note.",))
            again = open_images(tmp_path / "x.npz", memory_budget=0, cache=tmp_path / "cache")
        assert (again.notes, again.file) == (("Another note.",), mapped.file)
    np.savez(tmp_path / "x.npz", **{images: values, wanted: numbers}, **beside)
    opened = open_images(tmp_path / "x.npz")
    assert (opened.labels.tolist(), opened.notes) == ([1, 0, 2, 1], ())
    np.savez(tmp_path / "x.npz", **{images: values}, **beside)
    assert open_images(tmp_path / "x.npz").notes == ()


def test_one_value_beside_one_image_may_be_anything(tmp_path):
    np.savez(tmp_path / "x.npz", images=noise((1, 6, 6)), num_classes=np.array([10]), classes=np.array([10]))
    assert open_images(tmp_path / "x.npz").notes == ()


def test_class_names_of_an_npz_are_read(tmp_path):
    names = ("cat", "dog", "\u732b")
    np.savez(tmp_path / "a.npz", arr_0=noise((3, 5, 5)), arr_1=[9, 9, 9], labels=[2, 0, 2], class_names=np.array(names))
    opened = open_images(tmp_path / "a.npz")
    # An array that says what it is comes before the second one.
    assert opened.labels.tolist() == [2, 0, 2]
    assert opened.class_names == names
    mapped = open_images(tmp_path / "a.npz", memory_budget=0, cache=tmp_path)
    assert mapped.class_names == names
    for wrong in ([0, 1], [["a", "b"]]):
        np.savez(tmp_path / "b.npz", images=noise((3, 5, 5)), labels=[0, 0, 1], class_names=np.array(wrong))
        with pytest.raises(ValueError, match="one text per class"):
            open_images(tmp_path / "b.npz")


def test_an_npz_with_splits_gives_each(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=noise((3, 5, 5)), y_train=[0, 1, 0], x_test=noise((2, 5, 5), 1), y_test=[1, 1])
    opened = open_images(tmp_path / "a.npz", split="test")
    np.testing.assert_array_equal(opened.images[:, 0], noise((2, 5, 5), 1))
    np.testing.assert_array_equal(opened.labels, [1, 1])


@pytest.mark.parametrize("shape", [(7, 5, 3), (7, 5, 1), (7, 5, 4)])
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_one_image_with_its_channels_last_is_not_taken_for_many(tmp_path, shape, kind):
    path = tmp_path / f"a.{kind}"
    np.save(path, noise(shape)) if kind == "npy" else np.savez(path, images=noise(shape))
    with pytest.raises(ValueError, match=r"may be one image \(H, W, C\) or 7 greyscale images .*x\[None\]"):
        open_images(path)
    if shape[2] == 3:
        np.save(tmp_path / "b.npy", noise(shape)[None])
        assert open_images(tmp_path / "b.npy").shape == (3, 7, 5)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"pictures": noise((3, 5, 5))}, "holds the arrays pictures"),
        ({"images": noise((3, 5, 5)), "x": noise((3, 5, 5))}, "exactly one"),
        ({"images": noise((3, 5, 5)), "labels": [0, 1]}, "2 labels for 3 images"),
        ({"images": noise((3, 5, 5)), "labels": np.eye(3, dtype=int)}, "argmax"),
        ({"images": noise((3, 5, 5)), "labels": [0.0, 1, 2]}, "float64"),
        ({"images": noise((3, 5, 5)), "labels": [0, 1, -1]}, "counted from 0"),
        ({"images": np.asfortranarray(noise((3, 5, 5)))}, "Fortran"),
        ({"arr_0": noise((3, 5, 5)), "arr_1": noise((3, 5, 5))}, "labels are whole numbers"),
    ],
)
def test_an_npz_that_does_not_fit_is_refused(tmp_path, arrays, says):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=says):
        open_images(tmp_path / "a.npz")


def test_damaged_arrays_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", noise((4, 50, 60)))
    np.savez(tmp_path / "a.npz", images=noise((4, 50, 60)))
    for name in ("a.npy", "a.npz"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="cut short"):
            open_images(tmp_path / name)
    content = bytearray(whole)
    content[len(content) // 2] ^= 255
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match="cut short or damaged"):
        open_images(tmp_path / "a.npz")


def test_arrays_are_resized_too_and_say_so(tmp_path):
    colour, grey = noise((3, 3, 12, 12)), noise((3, 12, 12))
    np.savez(tmp_path / "c.npz", images=colour, labels=[2, 0, 1])
    np.save(tmp_path / "g.npy", grey)
    opened = open_images(tmp_path / "c.npz", resolution=6)
    for row, image in zip(opened.images, colour, strict=True):
        source_only = Image.fromarray(image.transpose(1, 2, 0)).resize((6, 6), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(row, np.asarray(source_only).transpose(2, 0, 1))
    np.testing.assert_array_equal(opened.labels, [2, 0, 1])
    assert "Lanczos to 6 x 6" in opened.manifest["resized"]
    opened.verify()
    mapped = open_images(tmp_path / "g.npy", resolution=24, memory_budget=100, cache=tmp_path / "cache")
    assert mapped.images.shape == (3, 1, 24, 24)
    assert mapped.file.parent == tmp_path / "cache"
    assert mapped.manifest["conversions"] == {"enlarged": 3}
    assert (
        open_images(tmp_path / "g.npy", resolution=24, memory_budget=100, cache=tmp_path / "cache").file == mapped.file
    )


# Tables


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def table_of(labels, seeds=None):
    """Images of noise with these labels, as `datasets` describes them."""
    pyarrow = pytest.importorskip("pyarrow")
    images = [{"bytes": png(noise((5, 6, 3), seed)), "path": "a.png"} for seed in seeds or range(len(labels))]
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    return pyarrow.table({"image": images, "label": labels}).replace_schema_metadata(described)


def save(folder, *tables, split=None):
    """What `save_to_disk` writes of these tables, one to a file."""
    pyarrow = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{k}.arrow" for k in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with pyarrow.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names], "_split": split}))
    (folder / "dataset_info.json").write_text("{}")


def test_a_data_set_saved_to_disk_is_read_by_its_split(tmp_path):
    folder = tmp_path / "pets"
    save(folder, table_of([1, 0, 1]), table_of([0], [3]))
    opened = open_images(folder)
    np.testing.assert_array_equal(opened.images, [noise((5, 6, 3), seed).transpose(2, 0, 1) for seed in range(4)])
    np.testing.assert_array_equal(opened.labels, [1, 0, 1, 0])
    assert (opened.name, opened.class_names) == ("pets", ("cat", "dog"))
    with pytest.raises(MissingSplitError, match="has no splits; leave split out"):
        open_images(folder, split="test")
    several = tmp_path / "several"
    save(several / "training", table_of([1, 0]))
    save(several / "test", table_of([1]))
    (several / "dataset_dict.json").write_text('{"splits": ["training", "test"]}')
    assert len(open_images(several)) == 2
    assert len(open_images(several, split="test")) == 1
    with pytest.raises(MissingSplitError, match="has the splits training, test; pass one"):
        open_images(several, split="val")
    (folder / "data-1.arrow").write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"data-1\.arrow cannot be read"):
        open_images(folder)


def test_parquet_files_are_read_by_the_split_that_their_names_begin_with(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    order = []

    def read(*arguments, **options):
        opened = open_images(*arguments, **options)
        return [order[seed] for seed in opened.labels], opened.manifest["source"]

    def put(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            # Each file is known by its label.
            order.append(name)
            parquet.write_table(table_of([len(order) - 1]).replace_schema_metadata(), tmp_path / name)

    put("one/b.parquet", "one/a.parquet")
    assert read(tmp_path / "one") == (["one/a.parquet", "one/b.parquet"], "2 parquet files in one")
    assert read(tmp_path / "one/b.parquet") == (["one/b.parquet"], "1 parquet file in b")
    with pytest.raises(MissingSplitError, match="has no splits"):
        open_images(tmp_path / "one", split="test")
    names = ["two/data/train-00000-of-00002.parquet", "two/data/train-00001-of-00002.parquet"]
    put(*names, "two/data/validation-00000-of-00001.parquet", "two/test/0000.parquet")
    assert read(tmp_path / "two") == (names, "2 parquet files in two, split train")
    assert read(tmp_path / "two", split="val")[0] == ["two/data/validation-00000-of-00001.parquet"]
    assert read(tmp_path / "two", split="test")[0] == ["two/test/0000.parquet"]
    put("two/x.parquet")
    with pytest.raises(ValueError, match=r"beside them .*x\.parquet, which is in none"):
        open_images(tmp_path / "two")
    (tmp_path / "one" / "a.png").write_bytes(png(noise((5, 6, 3))))
    with pytest.raises(ValueError, match=r"holds parquet files, such as .*and image files, such as .*a\.png"):
        open_images(tmp_path / "one")


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_cached_pixels_of_rows_that_name_files_follow_the_files(tmp_path, kind):
    """Also where only some rows do, and where a file that was missing comes back."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = [tmp_path / f"{k}.png" for k in range(2)]
    images = [{"bytes": None, "path": str(file)} for file in files] + [{"bytes": png(noise((5, 6, 3), 9)), "path": "a"}]
    source = tmp_path / "in"
    features = {"image": {"_type": "Image"}}
    table = pyarrow.table({"image": images})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    source.mkdir()
    if kind == "parquet":
        parquet.write_table(table, source / "x.parquet")
    else:
        save(source, table)

    def write(*seeds):
        for file, seed in zip(files, seeds, strict=True):
            file.write_bytes(png(noise((5, 6, 3), seed)))

    def read(**options):
        return open_images(source, memory_budget=0, cache=tmp_path / "cache", **options)

    def hold(opened, *seeds):
        np.testing.assert_array_equal(opened.images, [noise((5, 6, 3), seed).transpose(2, 0, 1) for seed in seeds])

    write(1, 2)
    first = read()
    hold(first, 1, 2, 9)
    assert read().file == first.file
    write(3, 4)
    hold(read(), 3, 4, 9)
    files[0].unlink()
    hold(read(skip_broken=True), 4, 9)
    with pytest.raises(ValueError, match="1 of 3 image files cannot be read"):
        read()
    write(5, 4)
    hold(read(skip_broken=True), 5, 4, 9)


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path):
    for package in ("huggingface_hub", "pyarrow"):
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").touch()
    for source in ("hf:x", tmp_path / "a.parquet", tmp_path, tmp_path / "saved"):
        with pytest.raises(
            ImportError, match=r'needs the package (huggingface_hub|pyarrow): pip install "stablefield\[hub\]"'
        ):
            open_images(source)


def test_what_the_real_package_saved_and_plain_parquet_files_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    arrays = [noise((5, 6, 3), seed) for seed in range(3)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [Image.fromarray(array) for array in arrays], "label": [1, 0, 1]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=dataset, test=dataset.select([2])).save_to_disk(tmp_path / "two")
    for split, chosen in (("train", [0, 1, 2]), ("test", [2])):
        (tmp_path / "files").mkdir(exist_ok=True)
        dataset.select(chosen).to_parquet(tmp_path / "files" / f"{split}-00000-of-00001.parquet")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    contents = [png(array) for array in arrays]
    for name, images in (
        ("bytes", pyarrow.array(contents)),
        ("struct", pyarrow.array([{"bytes": content, "path": "a.png"} for content in contents])),
    ):
        (tmp_path / name).mkdir()
        parquet.write_table(
            pyarrow.table({"image": images, "label": ["dog", "cat", "dog"]}), tmp_path / name / "x.parquet"
        )
    for name in ("one", "two", "files", "bytes", "struct"):
        opened = open_images(tmp_path / name)
        np.testing.assert_array_equal(opened.images, [array.transpose(2, 0, 1) for array in arrays])
        np.testing.assert_array_equal(opened.labels, [1, 0, 1])
        assert opened.class_names == ("cat", "dog")
    for name in ("two", "files"):
        np.testing.assert_array_equal(open_images(tmp_path / name, split="test").labels, [1])


# What is no source


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.bin", b"hello", "is not a supported source"),
        ("a.tar", bytes(257) + b"ustar" + bytes(300), "unpack it"),
        ("a.tar.gz", gzip.compress(b"hello", mtime=0), "unpack it"),
        ("a.png", b"\x89PNG\r\n\x1a\nxxxx", "name its folder"),
        ("a.bin", b"", "is not a supported source"),
    ],
)
def test_what_is_not_understood_gets_one_paragraph_with_all_that_is(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        open_images(tmp_path / name)
    for word in ("digits", "folder", ".zip", "CIFAR-10", "idx", ".npy", "data pack", "hf:OWNER/NAME"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_that_does_not_exist_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere does not exist\. Supported sources"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cannot be read: File name too long"):
        open_images("a" * 5000)


@pytest.mark.parametrize("shape", [(6, 8, 8, 4), (6, 12, 8, 3), (6, 32, 32, 16)])
def test_float_data_whose_channels_seem_to_come_last_have_a_note(tmp_path, shape):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.save(tmp_path / "x.npy", values)
    opened = open_images(tmp_path / "x.npy")
    assert f"have {shape[1]} channels here: if their channels come last, move them to axis 1" in opened.notes[-1]
    np.save(tmp_path / "x.npy", values.transpose(0, 3, 1, 2))
    assert not any("come last" in note for note in open_images(tmp_path / "x.npy").notes)


@pytest.mark.parametrize(
    "shape", [(6, 64, 4), (6, 255, 3), (6, 63, 1), (6, 12, 3), (6, 512, 8), (6, 64, 16), (6, 2, 2)]
)
def test_encoded_series_of_many_channels_and_few_values_have_no_note(tmp_path, shape):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=shape))
    assert not any("come last" in note for note in open_images(tmp_path / "x.npy").notes)


@pytest.mark.parametrize("shape", [(6, 100, 2), (6, 64, 2), (6, 64, 1), (6, 256, 3), (6, 300, 4)])
@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors", "array"])
def test_a_series_whose_channels_seem_to_come_last_has_a_note_whose_remedy_scales_each_channel(tmp_path, shape, kind):
    values = np.random.default_rng(0).normal(size=shape) * np.arange(1, shape[2] + 1)

    def read(values):
        if kind == "array":
            return make_image_set(values, None, Origin(name="x", source="an array"))
        if kind == "npz":
            np.savez(tmp_path / "x.npz", data=values)
        elif kind == "npy":
            np.save(tmp_path / "x.npy", values)
        else:
            safetensors.numpy.save_file({"data": np.ascontiguousarray(values)}, tmp_path / "x.safetensors")
        return open_images(tmp_path / f"x.{kind}")

    (note,) = (note for note in read(values).notes if "read as" in note)
    assert note.startswith(f"Samples of shape {shape[1:]} are read as {shape[1]} channels of {shape[2]} value")
    assert note.endswith("if their channels come last, pass x.transpose(0, 2, 1).")
    moved = read(values.transpose(0, 2, 1))
    assert not any("read as" in note for note in moved.notes)
    np.testing.assert_allclose(moved.scaling.std, values.std(axis=(0, 1)))


@pytest.mark.parametrize("shape", [(6, 3, 2), (6, 4, 100), (6, 64, 32), (6, 7)])
def test_series_with_their_channels_first_and_vectors_have_no_such_note(tmp_path, shape):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=shape))
    assert not any("transpose" in note for note in open_images(tmp_path / "x.npy").notes)


@pytest.mark.parametrize(("top", "noted"), [(1, True), (16, True), (31, True), (32, False), (255, False), (0, False)])
def test_images_that_are_nearly_black_are_noted_with_the_factor_that_may_be_missing(tmp_path, top, noted):
    images = np.random.default_rng(0).integers(0, top + 1, (20, 8, 8)).astype(np.uint8)
    images[0, 0, 0] = top
    np.save(tmp_path / "x.npy", images)
    said = (
        f"The brightest value of all images is {top} of 255, so they are nearly black: if {top} means white, scale them"
    )
    assert any(note.startswith(said) for note in open_images(tmp_path / "x.npy").notes) == noted
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        pixels = sf.evaluation.RawPixels((1, 8, 8))
        sf.evaluate(images[:, None], data=images[:, None], metrics=["frechet"], extractor=pixels, cache=False)
    assert any(said in str(one.message) for one in seen) == noted
