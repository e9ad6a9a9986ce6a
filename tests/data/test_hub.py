"""Data sets of the hub: which files are fetched, and that they are read as files on disk are."""

import io
import json
import re
import threading
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import bombs
import numpy as np
import pytest
from PIL import Image

from stablefield.data import MissingSplitError, open_images

huggingface_hub = pytest.importorskip("huggingface_hub")
errors = pytest.importorskip("huggingface_hub.errors")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

CLIENT = ("pyarrow.parquet", "huggingface_hub.hf_api", "huggingface_hub._snapshot_download")
"""What is imported to fetch a data set and to read it."""
CONVERTED = "refs/convert/parquet"
CLASSES = {"_type": "ClassLabel", "names": ["cat", "dog"]}


def noise(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)


def pixels(*seeds):
    return [noise(seed).transpose(2, 0, 1) for seed in seeds]


def png(seed=0):
    buffer = io.BytesIO()
    Image.fromarray(noise(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(*seeds, features=None, **columns):
    """A parquet file with images of noise, as `datasets` describes and stores them."""
    images = [
        {"bytes": png(seed) if isinstance(seed, int) else seed, "path": None if seed is None else "a"} for seed in seeds
    ]
    features = {"image": {"_type": "Image"}, **(features or {})}
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"image": images, **columns}).replace_schema_metadata(described), file)
    return file.getvalue()


def refusal(kind, said):
    """An error of the client, without the response that it came with."""
    error = kind.__new__(kind)
    error.args = (said,)
    return error


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the client. `hub.put` puts files into owner/pets; `hub.fetched` lists what was fetched of it."""
    state = SimpleNamespace(fetched=[], revisions={}, down=None)

    def put(files, revision=None):
        state.revisions.setdefault(revision, {}).update(files)

    def at(repo_id, repo_type, revision):
        assert repo_type == "dataset"
        if state.down is not None:
            raise state.down
        if repo_id != "owner/pets":
            raise refusal(errors.RepositoryNotFoundError, "404 Client Error. Repository Not Found for url ...")
        if revision not in state.revisions:
            raise refusal(errors.RevisionNotFoundError, "404 Client Error. Revision Not Found for url ...")
        return state.revisions[revision]

    class Api:
        def list_repo_files(self, repo_id, *, repo_type=None, revision=None):
            return list(at(repo_id, repo_type, revision))

    def snapshot_download(repo_id, *, repo_type=None, revision=None, allow_patterns=None):
        there = at(repo_id, repo_type, revision)
        folder = tmp_path / "cache" / (revision or "main").replace("/", "-")
        for name in huggingface_hub.utils.filter_repo_objects(there, allow_patterns=allow_patterns):
            blob, link = tmp_path / "blobs" / f"{len(state.fetched)}", folder / name
            for path in (blob, link):
                path.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            blob.write_bytes(there[name])
            link.symlink_to(blob)
            if name != "README.md":
                state.fetched.append(name)
        return str(folder)

    state.put = put
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_cached_repo_tree", refusing(OSError("nothing")), raising=False)
    return state


def refusing(error):
    def refuse(*_, **__):
        raise error

    return refuse


def test_pixels_labels_and_class_names_of_the_split_are_read_and_only_its_files_fetched(hub):
    for split, seeds in (("train", (0, 1, 2)), ("validation", (3, 4))):
        for k in (0, 1):
            part = seeds[2 * k : 2 * k + 2] if split == "train" else seeds[k : k + 1]
            labels = [seed % 2 for seed in part]
            hub.put({f"data/{split}-0000{k}-of-00002.parquet": rows(*part, features={"label": CLASSES}, label=labels)})
    opened = open_images("hf:owner/pets")
    assert hub.fetched == ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    np.testing.assert_array_equal(opened.images, pixels(0, 1, 2))
    assert opened.labels.tolist() == [0, 1, 0]
    assert (opened.name, opened.class_names, opened.notes) == ("pets", ("cat", "dog"), ())
    assert opened.manifest["source"] == "Hugging Face owner/pets, 2 parquet files, split train"
    np.testing.assert_array_equal(open_images("hf:owner/pets", split="val").images, pixels(3, 4))
    with pytest.raises(
        MissingSplitError, match="split='test': hf:owner/pets has the splits train, validation; pass one"
    ):
        open_images("hf:owner/pets", split="test")


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["data/train-00000-of-00001.parquet", "data/unlabelled-00000-of-00001-abc.parquet"], "unlabelled", [1]),
        (["data/valid_a-00000-of-00001.parquet", "data/valid_b-00000-of-00001.parquet"], "valid_b", [1]),
        (["pets/train-00000-of-00001.parquet", "pets/test-00000-of-00001.parquet"], "test", [1]),
        (["train/0000.parquet", "test/0000.parquet"], "test", [1]),
        (["b.parquet", "a.parquet"], "train", [1, 0]),
        (["data/test-00000-of-00001.parquet"], "train", [0]),
        (["data/train_[1].parquet", "data/train_1.parquet"], "train", [1, 0]),
    ],
)
def test_the_split_is_what_the_name_or_the_folder_says(hub, names, split, expected):
    hub.put({name: rows(k) for k, name in enumerate(names)})
    np.testing.assert_array_equal(open_images("hf:owner/pets", split=split).images, pixels(*expected))
    assert sorted(hub.fetched) == sorted(names[k] for k in expected)


def test_of_several_configurations_one_is_named(hub):
    for k, name in enumerate(("small/train-00000-of-00001", "small/test-00000-of-00001", "large/train/0000")):
        hub.put({f"{name}.parquet": rows(k)})
    said = "has several configurations: there are large, small; name one, such as hf:owner/pets:large"
    with pytest.raises(ValueError, match=f"^hf:owner/pets: the data set owner/pets {said}"):
        open_images("hf:owner/pets")
    with pytest.raises(ValueError, match="has no configuration tiny: there are large, small"):
        open_images("hf:owner/pets:tiny")
    assert hub.fetched == []
    np.testing.assert_array_equal(open_images("hf:owner/pets:large").images, pixels(2))
    opened = open_images("hf:owner/pets:small", split="test")
    np.testing.assert_array_equal(opened.images, pixels(1))
    assert opened.manifest["source"] == "Hugging Face owner/pets:small, 1 parquet file, split test"


CARD = """---
license: mit
dataset_info: &notes
  features: [{name: image, dtype: image}]
configs:
- config_name: small
  data_files:
  - split: train
    path: some/a-*
  - split: test
    path: ["some/b.parquet", "**/deep/?.parquet"]
- config_name: large
  %s
  data_dir: more

- config_name: one
  data_files: some/[ab]*.parquet
task_categories:
- unconditional-image-generation
---
# Pets
"""


@pytest.mark.parametrize(
    ("source", "split", "expected"),
    [
        ("hf:owner/pets:small", "train", ["some/a-1.parquet"]),
        ("hf:owner/pets:small", "testing", ["some/b.parquet", "some/x/deep/c.parquet"]),
        ("hf:owner/pets", "train", ["more/train/d.parquet"]),
        ("hf:owner/pets:large", "test", ["more/test-e.parquet"]),
        ("hf:owner/pets:one", "train", ["some/a-1.parquet", "some/b.parquet"]),
    ],
)
def test_configurations_and_splits_are_those_that_the_card_declares(hub, source, split, expected):
    names = [
        "some/a-1.parquet",
        "some/b.parquet",
        "some/x/deep/c.parquet",
        "more/train/d.parquet",
        "more/test-e.parquet",
    ]
    hub.put({name: rows(k) for k, name in enumerate(names)})
    hub.put({"README.md": (CARD % "default: true").encode()})
    np.testing.assert_array_equal(open_images(source, split=split).images, pixels(*map(names.index, expected)))
    assert hub.fetched == expected
    hub.put({"README.md": (CARD % "").encode()})
    with pytest.raises(ValueError, match="has several configurations: there are small, large, one; name one"):
        open_images("hf:owner/pets")
    with pytest.raises(MissingSplitError, match="has the splits train, test; pass one"):
        open_images("hf:owner/pets:small", split="validation")


@pytest.mark.parametrize(
    ("configs", "said"),
    [
        ("configs:\n- [\n", "cannot be parsed"),
        ("configs:\n- 3\n", "cannot be parsed"),
        ("configs:\n- data_files:\n  - split: train\n    path: 3\n", "the files of train are not a list"),
        ("configs: &a\n- config_name: b\n  data_files: *a\n", "refer to other parts of the card"),
        ("configs:\n" + "- config_name: x\n" * 20000, "more than 131,072 letters"),
        ("configs:\n- " + "[" * 50000 + "\n", "nested too deep"),
        ("configs:\n- " + "- " * 50000 + "\n", "cannot be parsed"),
        ("configs:\n- data_files:\n" + "".join(f"  - 'a{k}*'\n" for k in range(1001)), "more than 1,000 patterns"),
    ],
)
def test_a_card_that_is_not_understood_is_refused_in_one_sentence(hub, configs, said):
    hub.put({"a.parquet": rows(0), "README.md": f"---\n{configs}---\n".encode()})
    with pytest.raises(ValueError, match=rf"^hf:owner/pets: .*{said}"):
        open_images("hf:owner/pets")


def test_what_the_hub_converted_is_read_where_the_files_are_of_another_kind(hub):
    hub.put({"data/train.tar": b"", ".gitattributes": b"", "README.md": b"# Pets"})
    with pytest.raises(
        ValueError,
        match=r"hf:owner/pets holds no supported images, but files of the kinds \.md, \.tar; .*Download it with",
    ):
        open_images("hf:owner/pets")
    hub.put({"default/train/0000.parquet": rows(0), "default/train/0001.parquet": rows(1)}, CONVERTED)
    hub.put({"default/test/0000.parquet": rows(2)}, CONVERTED)
    opened = open_images("hf:owner/pets")
    np.testing.assert_array_equal(opened.images, pixels(0, 1))
    assert opened.notes == ()
    np.testing.assert_array_equal(open_images("hf:owner/pets", split="test").images, pixels(2))
    assert hub.fetched == ["default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"]
    hub.put({"other/partial-train/0000.parquet": rows(3)}, CONVERTED)
    opened = open_images("hf:owner/pets:other")
    np.testing.assert_array_equal(opened.images, pixels(3))
    assert opened.notes[0].startswith("These are the first images of the split train")


def test_a_configuration_of_image_files_is_one_that_the_hub_converted(hub):
    card = "---\nconfigs:\n- config_name: a\n  data_dir: a\n- config_name: b\n  default: true\n  data_dir: b\n---\n"
    hub.put({"a/1.png": png(0), "b/1.png": png(1), "README.md": card.encode()})
    with pytest.raises(ValueError, match="holds no supported images by configurations"):
        open_images("hf:owner/pets:a")
    hub.put({"a/train/0000.parquet": rows(0), "b/train/0000.parquet": rows(1)}, CONVERTED)
    np.testing.assert_array_equal(open_images("hf:owner/pets:a").images, pixels(0))
    np.testing.assert_array_equal(open_images("hf:owner/pets").images, pixels(1))


def test_parquet_files_of_no_split_are_left_out_with_a_note(hub):
    hub.put({"data/train-0.parquet": rows(0), "data/extra.parquet": rows(1)})
    opened = open_images("hf:owner/pets")
    np.testing.assert_array_equal(opened.images, pixels(0))
    assert opened.notes == ("1 parquet files belong to no split and are ignored, the first data/extra.parquet.",)


def test_folders_of_images_are_read_with_the_classes_of_the_training_split(hub):
    hub.put({f"{split}/{kind}/1.png": png(k) for k, (split, kind) in enumerate([("train", "cat"), ("train", "dog")])})
    hub.put({"test/dog/1.png": png(2), "test/cow/1.png": png(3), "README.md": b"---\nlicense: mit\n---\n"})
    opened = open_images("hf:owner/pets", split="test")
    assert sorted(hub.fetched) == ["test/cow/1.png", "test/dog/1.png"]
    np.testing.assert_array_equal(opened.images, pixels(3, 2))
    assert (opened.labels.tolist(), opened.class_names, opened.name) == ([2, 1], ("cat", "dog", "cow"), "pets")
    # What was fetched before lies beside, and is not of this split.
    np.testing.assert_array_equal(open_images("hf:owner/pets").images, pixels(0, 1))
    with pytest.raises(MissingSplitError, match="split='val': hf:owner/pets holds the splits test, train"):
        open_images("hf:owner/pets", split="val")
    hub.put({"test/dog/2.png": b"?"})
    with pytest.raises(ValueError, match=r"1 of 3 .*owner/pets/test/dog/2\.png"):
        open_images("hf:owner/pets", split="test")


def test_labels_of_images_come_from_dataset_json_or_from_what_the_hub_converted(hub):
    hub.put({"a.png": png(0), "b.png": png(1), "dataset.json": b'{"labels": [["a.png", 3], ["b.png", 2]]}'})
    assert open_images("hf:owner/pets").labels.tolist() == [3, 2]
    del hub.revisions[None]["dataset.json"]
    hub.put({"metadata.csv": b"file_name,label\na.png,5\n"})
    opened = open_images("hf:owner/pets")
    assert opened.labels is None
    assert [note.split(":")[0] for note in opened.notes] == ["metadata.csv is not read, so labels in it are left out"]
    hub.put({"default/partial-train/0000.parquet": rows(0, label=[5])}, CONVERTED)
    assert len(open_images("hf:owner/pets")) == 2
    hub.revisions[CONVERTED] = {"default/train/0000.parquet": rows(0, 1, label=[5, 4])}
    assert open_images("hf:owner/pets").labels.tolist() == [5, 4]


def test_an_archive_of_the_split_is_read(hub, tmp_path):
    for split, seed in (("train", 0), ("test", 1)):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("cat/1.png", png(seed))
        hub.put({f"data/{split}.zip": (tmp_path / "a.zip").read_bytes()})
    np.testing.assert_array_equal(open_images("hf:owner/pets", split="test").images, pixels(1))
    assert hub.fetched == ["data/test.zip"]
    hub.put({"data/train_2.zip": b""})
    with pytest.raises(ValueError, match="has 2 archives for one split: only one"):
        open_images("hf:owner/pets")
    hub.put({"teaser.png": png(5)})
    with pytest.raises(ValueError, match="holds no supported images"):
        open_images("hf:owner/pets")


def test_a_row_of_the_hub_names_no_file_of_this_machine(hub, tmp_path):
    (tmp_path / "own.png").write_bytes(png(0))
    file = io.BytesIO()
    parquet.write_table(
        pyarrow.table({"image": [{"bytes": png(1), "path": ""}, {"bytes": None, "path": f"{tmp_path}/own.png"}]}), file
    )
    hub.put({"train.parquet": file.getvalue()})
    with pytest.raises(
        ValueError, match=r"1 of 2 .*pets row 1 \(the row holds the path of an image instead of the image\)"
    ):
        open_images("hf:owner/pets")


def test_broken_and_missing_images_are_named_by_row(hub):
    hub.put({"train.parquet": rows(None, b"?", 0, 1, features={"label": CLASSES}, label=[0, 1, 1, 0])})
    with pytest.raises(ValueError, match=r"2 of 4 .*pets row 0 \(the row has no image\); pets row 1 \(not an image"):
        open_images("hf:owner/pets")
    assert open_images("hf:owner/pets", skip_broken=True).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("features", "columns", "expected", "names", "note"),
    [
        ({"fine": CLASSES}, {"fine": [0, 1], "note": [3, 4]}, [0, 1], ("cat", "dog"), ""),
        ({"a": CLASSES, "b": CLASSES}, {"a": [0, 0], "b": [0, 0]}, None, None, "The columns a, b"),
        ({"label": CLASSES}, {"label": [-1, -1]}, None, None, "2 of 2 rows have no label in the column label"),
        ({}, {"label": ["10", "9"]}, [1, 0], ("9", "10"), ""),
        ({}, {"labels": [3, 0]}, [3, 0], None, ""),
        ({}, {"note": [3, 0]}, None, None, ""),
        ({}, {"label": pyarrow.array([3, -1], "int8")}, None, None, "1 of 2 rows have no label in the column label"),
        ({}, {"label": ["a", None]}, None, None, "1 of 2 rows have no label"),
        ({}, {"label": [True, False]}, [1, 0], None, ""),
        ({}, {"labels": [2.0, 0.0]}, [2, 0], None, ""),
        ({}, {"label": pyarrow.array([0, 1], "float32")}, [0, 1], None, ""),
        ({}, {"label": [3.0, None]}, None, None, "1 of 2 rows have no label in the column label"),
        ({}, {"label": [3.0, float("nan")]}, None, None, "1 of 2 rows have no label in the column label"),
        ({}, {"label": [True, None]}, None, None, "1 of 2 rows have no label in the column label"),
        ({}, {"label": [1.0, 0.5]}, None, None, "The column label holds 0.5, which is no class number"),
        ({}, {"label": [1.0, float("inf")]}, None, None, "The column label holds inf, which is no class number"),
        ({}, {"label": [[0, 1], [1, 0]]}, None, None, "The column label holds lists, so there are no labels: write"),
        (
            {},
            {"label": pyarrow.nulls(2)},
            None,
            None,
            "The column label holds no values, so there are no labels: write",
        ),
        ({}, {"label": [{"a": 1}] * 2}, None, None, "The column label holds records, so there"),
        # Floats and truth values may be other quantities, so they come last.
        ({}, {"label": [0.1, 0.9], "labels": [0, 1]}, [0, 1], None, ""),
        ({"kind": CLASSES}, {"label": [0.1, 0.9], "kind": [1, 0]}, [1, 0], ("cat", "dog"), ""),
        ({"kind": CLASSES}, {"labels": [True, False], "kind": [1, 0]}, [1, 0], ("cat", "dog"), ""),
        ({"kind": CLASSES}, {"label": [5, 0], "kind": [1, 0]}, [5, 0], None, ""),
        # Prices and Unix times are no class numbers, and no error: the images are what they were.
        (
            {},
            {"label": [350000.0, 1.0]},
            None,
            None,
            "The column label holds 350000, and class numbers run from 0",
        ),
        ({}, {"label": [1.7e9, 1.6e9]}, None, None, "The column label holds 1700000000, and class numbers run from 0"),
        ({}, {"label": [3e12, 0.0]}, None, None, "The column label holds 3000000000000, and class numbers run from 0"),
        ({}, {"label": [65535.0, 0.0]}, [65535, 0], None, ""),
        (
            {},
            {"Label": [1, 0], "note": [1, 2]},
            None,
            None,
            "No column is called label, so there are no labels: if the co",
        ),
        (
            {},
            {"class": ["a", "b"], "target": [0.0, 1.0]},
            None,
            None,
            "No column is called label, so there are no labels",
        ),
        ({}, {"label": [0, 1], "class": ["a", "b"]}, [0, 1], None, ""),
        ({"class": CLASSES}, {"class": [1, 0]}, [1, 0], ("cat", "dog"), ""),
        ({}, {"caption": ["a", "b"], "width": [4, 4], "glass": [1, 2]}, None, None, ""),
        ({}, {"target_width": [512, 512], "class_weight": [0.5, 1.5], "target_caption": ["a", "b"]}, None, None, ""),
    ],
)
def test_the_label_is_the_one_called_label_or_the_only_one(hub, features, columns, expected, names, note):
    hub.put({"train.parquet": rows(0, 1, features=features, **columns)})
    opened = open_images("hf:owner/pets")
    assert (None if opened.labels is None else opened.labels.tolist()) == expected
    assert opened.class_names == names
    assert len(opened.recorded_notes) == bool(note)
    assert "".join(opened.notes).startswith(note)


@pytest.mark.parametrize("label", [[1.0, 0.0] * 8, [True, False] * 8, [350000.0] * 16])
def test_a_run_without_classes_resumes_on_a_table_whose_labels_were_not_read_at_its_start(tmp_path, label):
    """As one of a version that read no floats and truth values; the table had no labels then."""
    import stablefield as sf

    images = rows(*range(16))
    table = tmp_path / "a.parquet"
    table.write_bytes(images)
    network = sf.training.MLPConfig(width=8, depth=1)
    recipe = sf.training.Recipe(steps=4, batch=8, checkpoint_every=2, sample_every=0, log_every=2, network=network)
    stopped = sf.train(table, out=tmp_path / "run", recipe=recipe, device="cpu", stop=lambda: True)
    assert stopped.step < 4
    table.write_bytes(rows(*range(16), label=label))
    assert open_images(table).labels is None or open_images(table).labels.tolist() == label
    assert stopped.resume(device="cpu").step == 4


def test_a_column_that_may_hold_labels_is_read_once_it_is_called_as_the_note_says(hub):
    hub.put({"train.parquet": rows(0, 1, className=[1, 0])})
    (note,) = open_images("hf:owner/pets").notes
    assert note.endswith("if the column className holds them, rename it label.")
    hub.put({"train.parquet": rows(0, 1, label=[1, 0])})
    assert open_images("hf:owner/pets").labels.tolist() == [1, 0]


def test_a_data_set_without_one_column_of_images_is_refused(hub):
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["a"]}), file)
    hub.put({"train.parquet": file.getvalue()})
    with pytest.raises(ValueError, match=r"^Hugging Face owner/pets, .*exactly one column of images"):
        open_images("hf:owner/pets")


@pytest.mark.parametrize(
    ("down", "source", "said"),
    [
        (None, "hf:owner/cars", "the hub has no data set owner/cars that you may read: check its name.*log in with"),
        (None, "hf:", "write hf:OWNER/NAME"),
        (errors.HFValidationError("not so"), "hf:a/b/c", "hf:a/b/c does not name a data set: write hf:OWNER/NAME, or"),
        (refusal(errors.GatedRepoError, "403"), "hf:owner/pets", "that you may read: .*request access on its page"),
        (
            ConnectionError("no\nroute"),
            "hf:owner/pets",
            r"data set owner/pets cannot be downloaded from the hub \(no route\):",
        ),
        (
            TimeoutError(),
            "hf:owner/pets:x",
            r"\(TimeoutError\).*`hf download owner/pets --repo-type dataset --local-dir",
        ),
    ],
)
def test_a_data_set_that_cannot_be_had_is_one_sentence_with_the_remedy(hub, down, source, said):
    hub.put({"train.parquet": rows(0)})
    hub.down = down
    with pytest.raises(ValueError, match=said) as caught:
        open_images(source)
    assert "\n" not in str(caught.value)


def test_a_download_that_stops_or_lacks_a_file_is_one_sentence_too(hub, monkeypatch, tmp_path):
    hub.put({"train.parquet": rows(0)})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ValueError, match=r"hf:owner/pets: train\.parquet was not downloaded: try again"):
        open_images("hf:owner/pets")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refusing(OSError("disk is full")))
    with pytest.raises(ValueError, match=r"owner/pets cannot be downloaded from the hub \(disk is full\)"):
        open_images("hf:owner/pets")


def test_what_the_package_writes_is_read(hub, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    columns = {"image": [Image.fromarray(noise(seed)) for seed in range(3)], "label": [1, 0, 1]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")
    hub.put({"data/train-00000-of-00001.parquet": (tmp_path / "a.parquet").read_bytes()})
    opened = open_images("hf:owner/pets")
    np.testing.assert_array_equal(opened.images, pixels(0, 1, 2))
    assert opened.labels.tolist() == [1, 0, 1]
    assert opened.class_names == ("cat", "dog")


# The client itself, against a hub that listens on this machine only


class Hub(BaseHTTPRequestHandler):
    """What the client asks of a hub to list and fetch the files of owner/pets, which are `server.files`."""

    def do_GET(self):
        path, files = unquote(urlsplit(self.path).path), self.server.files
        if path.startswith("/api/datasets/owner/pets/revision/main"):
            return self.answer(json.dumps({"id": "owner/pets", "sha": "0" * 40, "siblings": []}).encode())
        if re.match("/api/datasets/owner/pets/tree/(main|0+)$", path):
            tree = [{"type": "file", "path": name, "size": len(files[name]), "oid": "1" * 40} for name in files]
            return self.answer(json.dumps(tree).encode())
        name = path.removeprefix(f"/datasets/owner/pets/resolve/{'0' * 40}/")
        if name in files:
            self.server.asked.add(name)
            return self.answer(files[name])
        return self.answer(b'{"error": "not here"}', 404)

    def do_HEAD(self):
        self.do_GET()

    def answer(self, content, code=200):
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{zlib.crc32(content)}"')
        self.send_header("X-Error-Code", "RepoNotFound" if code == 404 else "")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format, *args):  # noqa: A002
        pass


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process's memory is measured by Linux's /proc"
)
def test_the_client_fetches_what_is_asked_for_and_a_bomb_on_the_hub_is_refused_in_bounded_memory(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = set()
    bomb = io.BytesIO()
    column = pyarrow.array([bombs.image_bytes() + bytes(bombs.MIB)] * 100)
    # One page of 100 MiB, a few kB long.
    parquet.write_table(pyarrow.table({"image": column}), bomb, compression="zstd", use_dictionary=False)
    server.files = {
        "small/train-00000-of-00001.parquet": rows(0, 1),
        "small/test-[1].parquet": rows(2),
        "bomb/train-00000-of-00001.parquet": bomb.getvalue(),
    }
    for key, value in {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    sources = {
        "split": ("hf:owner/pets:small", {"split": "test"}),
        "bomb": ("hf:owner/pets:bomb", {}),
        "none": ("hf:owner/cars", {}),
    }
    try:
        found = bombs.opened(sources, apart=True, imports=CLIENT)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert found["split"][0] == "1 images"
    assert server.asked == {"small/test-[1].parquet", "bomb/train-00000-of-00001.parquet"}
    assert re.search(r"a page of image has .* would take 10\d,", found["bomb"][0])
    assert found["bomb"][1] < 300
    assert re.search("ValueError: hf:owner/cars: the hub has no data set owner/cars", found["none"][0])
    # What was fetched is there without the hub.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline = bombs.opened({"split": sources["split"], "none": sources["none"]}, apart=True, imports=CLIENT)
    if hasattr(huggingface_hub, "get_cached_repo_tree"):
        assert offline["split"][0] == "1 images"
    assert re.search("ValueError: hf:owner/cars: the data set owner/cars cannot be downloaded", offline["none"][0])
