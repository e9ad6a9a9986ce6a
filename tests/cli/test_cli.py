"""The command: from digits to pictures, and every wrong use told in one paragraph with status 2."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import stablefield as sf
from forks import COMMAND, Fork
from stablefield.cli.entry import main
from stablefield.data._digits import open_digits

TINY = ["--steps", "4", "--network.width", "16", "--network.depth", "1", "--sample-every", "0"]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).copy()


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    code = exit_.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "digits"
    # In few steps as good as in twice as many by the recipe's own learning rate and average.
    quick = ("--steps", "350", "--learning-rate", "0.003", "--ema-half-life", "2500")
    network = ("--network.width", "256", "--network.depth", "2")
    assert status("train", "digits", *quick, *network, "--out", str(path)) == 0
    return path


def test_train_leaves_the_run_folder_of_the_contract(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        "config.json",
        "environment.jsonl",
        "metrics.jsonl",
        "checkpoints",
        "samples",
    }
    assert (run / "samples" / "step-00000350.png").is_file()
    assert (run / "checkpoints" / "step-00000350" / "state.json").is_file()


@pytest.mark.slow
def test_samples_of_a_short_run_are_near_the_digits_and_no_copies(run: Path, tmp_path: Path) -> None:
    assert status("sample", str(run), "--seeds", "0-63", "--out", str(tmp_path / "images")) == 0
    images = np.stack([pixels(path) for path in sorted((tmp_path / "images").iterdir())])
    assert images.shape == (64, 8, 8)
    data = open_digits().images.reshape(-1, 64).astype(float)

    def nearest(rows: np.ndarray) -> np.ndarray:
        distance = np.sqrt(((rows[:, None] - data[None]) ** 2).sum(-1))
        return np.sort(distance, axis=1)

    own = np.median(nearest(data[:200])[:, 1])  # a digit's distance to the nearest other digit
    drawn = nearest(images.reshape(64, 64).astype(float))[:, 0]
    noise = np.median(nearest(np.random.default_rng(0).integers(0, 256, (64, 64)).astype(float))[:, 0])
    assert np.median(drawn) < 1.5 * own < noise / 2
    assert (drawn > 0).all()


def test_image_k_is_the_same_in_every_call(run: Path, tmp_path: Path) -> None:
    for name, seeds, batch in (("a", "3-9", "2"), ("b", "5", "1")):
        assert status("sample", str(run), "--seeds", seeds, "--batch", batch, "--out", str(tmp_path / name)) == 0
    one, other = (pixels(tmp_path / name / "000005.png").astype(int) for name in ("a", "b"))
    assert np.abs(one - other).max() <= 1  # the network's rounding depends on the batch size


@pytest.mark.parametrize(("sampler", "nfe"), [("heun", 35), ("euler", 18), ("dpmpp-2m", 18), ("ancestral", 18)])
def test_every_sampler_says_its_evaluations(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], sampler: str, nfe: int
) -> None:
    out = tmp_path / "grid.png"
    assert status("sample", str(run), "--seeds", "0-3", "--sampler", sampler, "--out", str(out)) == 0
    assert f"{nfe} network evaluations" in capsys.readouterr().out
    assert pixels(out).shape[1] > 200


def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    assert status("train", "digits", *TINY, "--out", str(path)) == 0
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert status("train", "--resume", "--out", str(path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "nothing left to do: 4 of 4 steps are done."
    assert lines[1] == f"for longer: stablefield train --resume --steps 8 --out {path}"
    assert lines[2].startswith("draw more:  stablefield sample ")
    assert len(lines) == 3
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_resume_of_a_finished_run_needs_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images.npy"
    np.save(images, np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8))
    assert status("train", str(images), *TINY, "--out", str(tmp_path / "run")) == 0
    images.unlink()
    assert status("train", "--resume", "--out", str(tmp_path / "run")) == 0
    assert "nothing left to do" in capsys.readouterr().out


LONGER = ["--steps", "80", "--network.width", "16", "--network.depth", "1", "--sample-every", "0"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody has interrupted."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert status("train", "digits", *LONGER, "--out", str(path)) == 0
    return path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_is_saved_and_resumed_to_the_bytes_of_the_whole(
    whole: Path, tmp_path: Path, number: int, fork: Callable[..., Fork]
) -> None:
    cut = tmp_path / "cut"
    measured = ["--device", "cpu", "--evaluate-every", "70", "--evaluate-samples", "40", "--extractor", "pixels"]
    process = fork(COMMAND, "train", "digits", *LONGER, "--log-every", "1", "--out", cut, *measured)
    log = cut / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > 5) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, number)
    told, _ = process.communicate(60)
    assert process.returncode == 128 + number  # as a shell has it: 130 and 143
    given = next(line for line in told.splitlines() if "to continue: " in line).partition("to continue: ")[2]
    command, *words = shlex.split(given)
    assert command == "stablefield"
    # What the run keeps is not in it.
    assert words[:2] == ["train", "--resume"]
    assert words[4:] == ["--device", "cpu", *measured[2:]]
    assert status("sample", str(cut), "--seeds", "0", "--out", str(tmp_path / "one.png")) == 0
    assert status(*words) == 0
    assert [entry["step"] for entry in sf.Run(cut).metrics() if "frechet" in entry] == [70, 80]
    name = "checkpoints/step-00000080/ema.safetensors"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_runs_without_a_name_never_overwrite_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert status("train", "digits", *TINY) == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"digits-stf", "digits-stf-2"}


def test_packed_digits_train_to_the_same_bytes_as_the_built_in_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "digits.safetensors"
    assert status("data", "pack", "digits", str(packed)) == 0
    assert status("data", "pack", "digits", str(packed)) == 2  # never overwritten unasked
    assert "overwrite" in capsys.readouterr().err
    assert status("data", "inspect", str(packed), "--out", str(tmp_path / "some.png")) == 0
    assert "1,797" in capsys.readouterr().out
    assert pixels(tmp_path / "some.png").shape[1] > 500
    weights = []
    for name, data in (("a", "digits"), ("b", str(packed))):
        assert status("train", data, *TINY, "--out", str(tmp_path / name)) == 0
        weights.append((tmp_path / name / "checkpoints/step-00000004/ema.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_doctor_finds_the_target_exact_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("doctor") == 0
    assert "exact: relative error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "no-such-data"], ["no-such-data does not exist", "digits"]),
        (["train"], ["DATA is missing"]),
        (["train", "digits", "--steps", "0"], ["--steps is 0"]),
        (["train", "digits", "--references", "1798"], ["--references 1798", "1797"]),
        (["train", "digits", "--references", "5", "--batch", "9"], ["--references 5", "--batch 9"]),
        (["train", "digits", "--batch", "2000"], ["--batch 2000"]),
        (["train", "digits", "--device", "abacus"], ["--device abacus"]),
        (["train", "--resume"], ["--out"]),
        (["train", "--resume", "--out", "nowhere"], ["nowhere is not a run"]),
        (["train", "digits", "--out", "{full}"], ["is not empty", "--resume"]),
        (["train", "digits", "--out", "{file}/run"], ["cannot be written"]),
        (["data", "inspect", "digits", "--out", "{file}/x.png"], ["cannot be written"]),
        (["data", "pack", "{full}", "{full}/x"], ["holds no image file"]),
        (["sample", "nowhere"], ["nowhere is not a run"]),
        (["sample", "{run}", "--seeds", "a-b"], ["--seeds a-b"]),
        (["sample", "{run}", "--seeds", "9-3"], ["ends before it begins"]),
        (["sample", "{run}", "--steps", "0"], ["steps"]),
        (["sample", "{run}", "--out", "{file}/x.png"], ["cannot be written"]),
    ],
)
def test_wrong_use_is_one_paragraph_and_status_2(
    arguments: list[str], words: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    places = {"full": tmp_path / "full", "file": tmp_path / "file", "run": run}
    assert status(*(argument.format(**places) for argument in arguments)) == 2
    told = capsys.readouterr().err
    text = " ".join(told.split())
    assert all(word in text for word in words), told
    assert "Traceback" not in told
    assert told.startswith("stablefield: ")
    assert "\n\n" not in told.strip()
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"


def test_unknown_flag_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("train", "digits", "--stepz", "3") == 2
    assert "--stepz" in capsys.readouterr().err


def test_command_without_its_extra_says_what_to_install() -> None:
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'tyro' else find(name, *rest)\n"
        "from stablefield.cli.entry import main; main(['doctor'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'pip install "stablefield[train]"' in done.stderr
