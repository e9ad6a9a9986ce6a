"""Claims on the opening of files: a regular file or a link to one is opened, anything else is refused at once, by name.

And on the parsing of JSON that others made: how many bytes of it are ever parsed.
"""

import json
import os
import socket
import stat
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
from PIL import Image

from stablefield._regular_file import open_regular
from stablefield.cli.entry import main
from stablefield.data._digits import open_digits
from stablefield.data._image_set import ImageSet
from stablefield.data._latent_folder import LatentFolder
from stablefield.data._packed import open_packed, pack
from stablefield.data._source import open_images
from stablefield.evaluation._reference import load_tensor
from stablefield.evaluation._result import Evaluation
from stablefield.interop._weight_files import read_weight_file
from stablefield.training._files import read_tensors, tensor_shapes
from stablefield.training._post_hoc import snapshot_steps
from stablefield.training._records import read_record, write_record
from stablefield.training._weight_source import open_weights

# Python parses 4 MiB of lists within lists in about a second, and 16 MiB in 5 s or more; spaces are as many bytes.
MOST = 2**22
DOCUMENT = b'{"labels": [[]]}'
FEATURES = {"reference_count": 2}


@pytest.mark.parametrize("linked", [False, True])
def test_a_regular_file_is_opened(tmp_path, linked):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").symlink_to("a")
    with open_regular(tmp_path / ("b" if linked else "a")) as file:
        assert file.read() == b"abc"
        assert file.seek(1) == 1
        assert not os.get_inheritable(file.fileno())


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", ["folder", "FIFO", "socket", "device"])
def test_anything_else_is_refused_by_name_and_without_waiting(tmp_path, monkeypatch, kind, linked):
    path = tmp_path / "thing"
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            monkeypatch.chdir(tmp_path)  # the address of a socket is short
            listener.bind("thing")
    else:
        path.symlink_to("/dev/zero")
    if linked:
        (tmp_path / "link").symlink_to(path)
        path = tmp_path / "link"
    with pytest.raises(ValueError, match=f"{path} is (a link to )?a {kind}: only regular files"):
        open_regular(path)


@pytest.mark.parametrize("kind", ["FIFO", "device"])
def test_a_file_that_is_changed_for_a_fifo_or_device_at_the_last_moment_is_refused(tmp_path, monkeypatch, kind):
    path = tmp_path / "thing"
    if kind == "FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    regular = os.stat_result((stat.S_IFREG | 0o644, *os.stat(tmp_path)[1:]))
    monkeypatch.setattr(os, "stat", lambda *_, **__: regular)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match=f"a {kind}: only regular"):
        open_regular(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_missing_or_in_a_circle_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="circle"):
        open_regular(tmp_path / "circle")


def safetensors_of(text):
    return struct.pack("<Q", len(text)) + text + bytes(64)


# What is read, under which name it lies, and what is around the text.
READERS = {
    "packed images": (open_packed, "a.stablefield", safetensors_of),
    "images": (open_images, "a.safetensors", safetensors_of),
    "weights": (read_weight_file, "a.safetensors", safetensors_of),
    "tensors of a run": (read_tensors, "a.safetensors", safetensors_of),
    "shapes of a run": (tensor_shapes, "a.safetensors", safetensors_of),
    "snapshots": (lambda path: snapshot_steps(path.parent), "step-00000001.safetensors", safetensors_of),
    "cached features": (lambda path: load_tensor(path, "rows", FEATURES)[0], "a.safetensors", safetensors_of),
    "record": (lambda path: read_record(path, frozenset()), "config.json", bytes),
    "results": (Evaluation.load, "results.json", bytes),
    "initial weights": (lambda path: open_weights(path.parent).read(), "model_index.json", bytes),
    "latents": (lambda path: LatentFolder.read(path.parent), "latents.json", bytes),
    "labels": (lambda path: open_images(path.parent), "dataset.json", bytes),
    "saved data set": (lambda path: open_images(path.parent), "state.json", bytes),
}


@pytest.mark.parametrize("name", READERS)
def test_no_more_than_4_mib_of_json_are_parsed(name, tmp_path, monkeypatch):
    read, file, around = READERS[name]
    image = open_digits().images[0, 0]
    Image.fromarray(image).save(tmp_path / "a.png")
    if name == "saved data set":
        (tmp_path / "dataset_info.json").write_text("{}")
        pytest.importorskip("pyarrow")
    parsed = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text, **options: parsed.append(len(text)) or loads(text, **options))

    def counted(function):
        def opened(path, *args, **options):
            with open(path, "rb") as content:
                parsed.append(struct.unpack("<Q", content.read(8))[0])
            return function(path, *args, **options)

        return opened

    monkeypatch.setattr(safetensors, "safe_open", counted(safetensors.safe_open))
    monkeypatch.setattr(safetensors.torch, "load_file", counted(safetensors.torch.load_file))
    allowed = MOST + 2 * 512 if name == "labels" else MOST  # so much for each file in the folder
    (tmp_path / file).write_bytes(around(DOCUMENT.ljust(allowed + 1)))
    with pytest.raises(ValueError, match=f"{allowed + 1:,} bytes|{allowed:,} bytes") as refused:
        read(tmp_path / file)
    assert str(refused.value).count(str(tmp_path / file)) <= 1
    assert [length for length in parsed if length > 100] == []
    # The longest is parsed, and refused for what it says.
    (tmp_path / file).write_bytes(around(DOCUMENT.ljust(allowed)))
    with pytest.raises(ValueError, match=r"^((?!bytes).)*$"):
        read(tmp_path / file)
    assert max(parsed) == allowed


def test_what_would_not_be_read_back_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json would take [0-9,]+ bytes, above the limit of 4,194,304"):
        write_record(tmp_path / "config.json", {"names": ["a" * 1000] * 4200})
    digits = open_digits()
    many = tuple(f"{k:01000d}" for k in range(4200))
    named = ImageSet(
        images=digits.images,
        labels=digits.labels,
        class_names=many,
        name=digits.name,
        manifest=digits.manifest | {"class_names": list(many), "classes": len(many)},
    )
    with pytest.raises(ValueError, match=r"the manifest takes [0-9,]+ bytes, above 4,194,304: shorten the names"):
        pack(named, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


RUN = ("checkpoints/step-00000002/model.safetensors", "checkpoints/step-00000002/state.json")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("fifos") / "run"
    tiny = ("--steps", "2", "--network.width", "8", "--network.depth", "1", "--sample-every", "0")
    with pytest.raises(SystemExit) as end:
        main(["train", "digits", *tiny, "--ema-snapshot-every", "1", "--out", str(path)])
    assert end.value.code == 0
    return path


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("data inspect {x}", "x.npy"),
        ("data inspect {x}", "x.zip"),
        ("data inspect {folder}", "folder/a.png"),
        ("data inspect {folder}", "folder/dataset.json"),
        ("import {x} --out made", "x.safetensors"),
        ("evaluate {run} --against {x}", "x.json"),
        ("evaluate {run} --extractor torchscript --extractor-file {x}", "x.pt"),
        *((f"{verb} {{run}}", f"run/{name}") for name in RUN for verb in ("sample", "train --resume --out")),
        ("probe {run}", "run/metrics.jsonl"),
        ("export {run} --out made", "run/evaluations/x.json"),
        ("sample {run} --ema 0.05", "run/ema/step-00000001.safetensors"),
    ],
)
def test_what_is_no_regular_file_is_named_once(line, name, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save("folder/picture.png")
    path = run.parent / name if name.startswith("run/") else tmp_path / name
    kept = path.read_bytes() if path.exists() else None
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    try:
        with pytest.raises(SystemExit) as end:
            main([word.format(x=path, folder="folder", run=run) for word in line.split()])
    finally:
        path.unlink()
        if kept is not None:
            path.write_bytes(kept)
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert told.count(str(path) if path.is_absolute() and not name.startswith("folder") else name) == 1, told
    assert told.count("a FIFO: only regular files are read") == 1, told
    assert ".." not in told
