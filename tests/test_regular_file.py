"""Claims on the opening of files: a regular file or a link to one is opened, anything else is refused at once, by name."""

import os
import socket
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stablefield.cli.entry import main
from stablefield.regular_file import open_regular


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
