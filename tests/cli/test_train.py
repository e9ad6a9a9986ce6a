"""`stablefield train`: any folder of images, the recipe that fits it, and a run that can be left at any time."""

import io
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from forks import COMMAND, Fork
from stablefield.cli.entry import main
from stablefield.training._run_folder import RunFolder

QUICK = ["--steps", "2", "--batch", "4", "--network.base-channels", "8", "--sample-every", "0"]


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    code = exit_.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of many sizes, jpg and png, colour and grey."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for k in range(24):
        width, height = rng.integers(40, 70, 2)
        ramp = np.linspace(0, 255, width)[None, :, None] * rng.random(3) * np.ones((height, 1, 1))
        image = Image.fromarray(ramp.astype(np.uint8))
        (image.convert("L") if k % 3 == 0 else image).save(folder / f"{k}.{'jpg' if k % 2 else 'png'}")
    return folder


@pytest.mark.slow
def test_folder_of_mixed_pictures_trains_without_flags_and_can_be_sampled_after_ctrl_c(
    photos: Path, tmp_path: Path, fork: Callable[..., Fork]
) -> None:
    child = fork(COMMAND, "train", photos, cwd=tmp_path)
    until = time.monotonic() + 120
    while "run folder" not in child.stdout and child.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGINT)
    rest, told = child.communicate()
    assert child.returncode == 130, rest + told
    run = next((tmp_path / "runs").iterdir())
    assert "stopped at step" in rest
    assert f"--resume --out runs/{run.name}" in rest
    config = RunFolder.open(run).config()
    assert config.shape == (3, 32, 32)
    assert "Lanczos to 32 x 32" in config.manifest["resized"]
    assert status("sample", str(run), "--seeds", "0-3", "--steps", "2", "--out", str(tmp_path / "grid.png")) == 0
    assert (tmp_path / "grid.png").is_file()


AT_ONCE = """
import sys, time
from pathlib import Path
from stablefield.cli.entry import main

here, other = Path(sys.argv[1]), Path(sys.argv[2])

def wait(event, arguments):
    # Both have chosen a name when either is about to make its folder.
    if event == "os.mkdir" and Path(str(arguments[0])).name.startswith("digits-") and not here.exists():
        here.touch()
        until = time.monotonic() + 60
        while not other.exists():
            if time.monotonic() > until:
                raise TimeoutError("the other has not come here")
            time.sleep(0.001)

sys.addaudithook(wait)
main(sys.argv[3:])
"""


def test_two_runs_that_begin_at_once_without_out_get_two_folders(tmp_path: Path, fork: Callable[..., Fork]) -> None:
    here = [tmp_path / name for name in ("first", "second")]
    options = ["--steps", "2", "--batch", "4", "--network.width", "8", "--sample-every", "0", "--device", "cpu"]
    begun = [fork(AT_ONCE, own, other, "train", "digits", *options, cwd=tmp_path) for own, other in (here, here[::-1])]
    told = [process.communicate() for process in begun]
    assert [process.returncode for process in begun] == [0, 0], told
    folders = [re.search("^run folder: (.*)$", out, re.MULTILINE)[1] for out, _ in told]
    assert sorted(folders) == ["runs/digits-stf", "runs/digits-stf-2"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["digits-stf", "digits-stf-2"]
    for folder in folders:
        newest = RunFolder.open(tmp_path / folder).newest()
        assert newest is not None
        assert newest[1].step == 2


@pytest.fixture
def begin_two(fork_ranks: Callable[..., list[Fork]], tmp_path: Path) -> Callable[..., list[Fork]]:
    """Two processes of a run on the digits, whose network is small: what is tested is how they work together."""
    small = ("--network.width", "32", "--network.depth", "1")
    return partial(fork_ranks, 2, COMMAND, "train", "digits", "--device", "cpu", *small, cwd=tmp_path)


@pytest.mark.slow
def test_both_of_two_processes_end_a_failed_run_with_its_message(
    tmp_path: Path, begin_two: Callable[..., list[Fork]]
) -> None:
    started = begin_two("--steps", "5", "--learning-rate", "1e30", "--sample-every", "0", "--exact")
    messages = [process.communicate(timeout=200)[1] for process in started]
    assert "gradients:  summed in a fixed order; " in started[0].stdout
    # Not -6: gloo's threads abort a process that ends within its group.
    assert [process.returncode for process in started] == [1, 1], messages
    for message in messages:
        assert "the loss is nan" in message
        assert "lower --learning-rate" in message


@pytest.mark.slow
@pytest.mark.parametrize("references", ["all", "sharded"])
def test_a_process_that_dies_ends_the_other_with_a_message(
    references: str, tmp_path: Path, begin_two: Callable[..., list[Fork]]
) -> None:
    out = tmp_path / "run"
    first, second = begin_two("--steps", "100000", "--log-every", "5", "--references", references, "--out", str(out))
    log = out / "metrics.jsonl"
    while not (log.is_file() and log.read_text()):
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.1)
    second.kill()
    message = first.communicate(timeout=60)[1]
    second.communicate()
    assert first.returncode == 1
    assert "rank 0 of 2 waited for the others" in message
    assert "There is no checkpoint yet: a resume begins with the first step." in message
    assert "a bug in stablefield" not in message


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--dry-run"], []], ids=["dry run", "run"])
def test_a_batch_of_fewer_rows_than_parts_is_refused_by_all_processes(
    more: list[str], begin_two: Callable[..., list[Fork]]
) -> None:
    flags = ("--references", "sharded", "--batch", "3", "--gradient-accumulation-steps", "2", *more)
    started = begin_two(*flags)
    messages = [process.communicate(timeout=100)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], messages
    assert all("--batch 3 is below the 4 parts" in message for message in messages)


@pytest.mark.slow
def test_what_ends_the_first_process_before_the_run_ends_the_other(
    tmp_path: Path, begin_two: Callable[..., list[Fork]]
) -> None:
    (tmp_path / "note.txt").write_text("not empty")
    started = begin_two("--steps", "2", "--out", str(tmp_path))
    messages = [process.communicate(timeout=100)[1] for process in started]
    assert [process.returncode for process in started] == [2, 1], messages
    assert "is not empty" in messages[0]
    assert "rank 1 of 2 waited for the others to open the data" in messages[1]


@pytest.mark.slow
def test_two_processes_measure_themselves_on_the_way(tmp_path: Path, begin_two: Callable[..., list[Fork]]) -> None:
    out = tmp_path / "run"
    flags = ("--steps", "4", "--batch", "64", "--sample-every", "0", "--log-every", "2", "--out", str(out))
    started = begin_two(*flags, "--evaluate-every", "2", "--evaluate-samples", "60", "--held-out", "0.1")
    ends = [process.communicate(timeout=100) for process in started]
    assert [process.returncode for process in started] == [0, 0], ends
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [2, 4]
    assert all(any("frechet" in key.lower() for key in entry) for entry in entries), entries
    assert "gradients:  summed by DistributedDataParallel; a resumed run has the same bits on 2 processes" in ends[0][0]
    best = min((entry["held_out_loss"], entry["step"]) for entry in entries)
    assert RunFolder.open(out).best() == (best[1], best[0])


def test_dry_run_says_what_a_run_takes_and_writes_nothing(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert status("train", str(photos), *QUICK, "--dry-run") == 0
    text = capsys.readouterr().out
    for word in ("parameters", "memory", "steps", "references", "a step here", "all of it"):
        assert word in text
    assert list(tmp_path.iterdir()) == []


def test_print_shows_the_recipe_with_flags_applied(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("train", "--recipe", "cifar10-ve", "--batch", "64", "--network.base-channels", "32", "--print") == 0
    text = capsys.readouterr().out
    assert "batch=64" in text
    assert "base_channels=32" in text
    assert "VE(sigma_min=0.02, sigma_max=100.0)" in text


def test_flags_that_resume_would_not_heed_are_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    assert status("train", str(photos), *QUICK, "--out", out) == 0
    assert status("train", "--resume", "--out", out, "--batch", "9") == 2
    assert "--batch with --resume" in capsys.readouterr().err
    assert status("train", "--resume", "--out", out) == 0


def test_every_flag_is_on_top_of_the_recipe_that_the_data_chose(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--references", "8", "--augmentation", "0", "--mirror", "--resolution", "16", "--conditional"]
    assert status("train", str(photos), *QUICK, *flags[:-1], "--out", str(out)) == 0
    recipe = RunFolder.open(out).config().recipe
    assert (recipe.references, recipe.augmentation, recipe.mirror, recipe.steps) == (8, 0.0, True, 2)
    assert RunFolder.open(out).config().shape == (3, 16, 16)
    assert status("train", str(photos), *QUICK, *flags, "--out", str(tmp_path / "other")) == 2


@pytest.mark.slow
def test_tensorboard_receives_what_metrics_jsonl_does(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    assert status("train", str(photos), *QUICK, "--log-every", "1", "--tracker", "tensorboard", "--out", str(out)) == 0
    events = EventAccumulator(str(out / "stablefield")).Reload()
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    (shown,) = events.Images("samples")
    assert shown.step == 2
    with (
        Image.open(io.BytesIO(shown.encoded_image_string)) as logged,
        Image.open(out / "samples/step-00000002.png") as grid,
    ):
        np.testing.assert_array_equal(np.asarray(logged.convert("RGB")), np.asarray(grid.convert("RGB")))


def test_averages_of_any_length_are_made_and_sampled_after_training(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    assert status("train", str(photos), *QUICK, "--steps", "6", "--ema-snapshot-every", "2", "--out", out) == 0
    with pytest.warns(UserWarning, match=r"^length=0\.2: .* differs by \d\d\.\d%"):
        assert status("ema", out, "--length", "0.07", "0.2") == 0
    capsys.readouterr()
    assert status("ema", out, "--length", "0.07", "--step", "3") == 2
    assert "--step 3 has no snapshot: pass 2, 4 or 6" in capsys.readouterr().err
    assert (tmp_path / "run" / "ema" / "length-0.07.safetensors").is_file()
    grid = str(tmp_path / "grid.png")
    assert status("sample", out, "--seeds", "0-3", "--steps", "2", "--ema", "0.07", "--out", grid) == 0
    capsys.readouterr()
    assert status("sample", out, "--ema", "best", "--out", grid, "--overwrite") == 2
    assert "half-life, none, or a length" in capsys.readouterr().err


def test_resume_finds_data_that_moved_and_heeds_nothing_that_would_change_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    array = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    np.save(tmp_path / "a.npy", array)
    out = str(tmp_path / "run")
    small = ("--network.width", "16", "--network.depth", "1", "--batch", "4", "--sample-every", "0")
    assert status("train", str(tmp_path / "a.npy"), *small, "--steps", "2", "--out", out) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # of a run that is done, the data are not asked for
    (tmp_path / "a.npy").rename(tmp_path / "b.npy")
    capsys.readouterr()
    assert status("train", "--resume", "--out", out) == 2
    assert f"data is missing: the run's own data, {tmp_path}/a.npy, do not exist" in capsys.readouterr().err
    assert status("train", str(tmp_path / "b.npy"), "--resume", "--out", out) == 0
    assert status("train", str(tmp_path / "b.npy"), "--resume", "--out", out, "--resolution", "16") == 2
    assert "--resolution with --resume" in capsys.readouterr().err


def test_images_of_one_size_that_are_not_square_are_trained_on_in_their_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 48, 1), dtype=np.uint8)
    flags = [*QUICK, "--recipe", "imagefolder", "--network.multipliers", "1", "1", "--device", "cpu"]
    for name, side, said in (
        ("kept", 16, "images:     24 wide, 16 high, as they are"),
        (
            "smaller",
            32,
            "images:     cut to the largest centred part in the shape of 32 x 20, then Lanczos to 32 x 20 (",
        ),
    ):
        np.save(tmp_path / f"{name}.npy", pixels[:, :side, : side * 3 // 2])
        out = str(tmp_path / name)
        assert status("train", str(tmp_path / f"{name}.npy"), *flags, "--out", out) == 0
        assert said in capsys.readouterr().out
        # The run opens its data alike again; otherwise their checksum would not be that of the run.
        assert status("train", "--resume", "--out", out) == 0
        capsys.readouterr()


@pytest.mark.parametrize("packing", ["folder", "packed"])
def test_why_there_are_no_classes_is_said_where_they_are_asked_for(
    packing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat/1", "cat/2", "dog/1", "dog/2", "cover"):
        path = tmp_path / "pets" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    source = str(tmp_path / "pets")
    said = "The 2 folders do not count as classes, because 1 of 5 images lies elsewhere, the first cover.png"
    if packing == "packed":
        assert status("data", "pack", source, str(tmp_path / "packed")) == 0
        source = str(tmp_path / "packed")
        assert said in " ".join(capsys.readouterr().out.split())
    assert status("train", source, "--conditional", "--batch", "4", "--out", str(tmp_path / "run")) == 2
    told = capsys.readouterr()
    assert said in " ".join(told.out.split())
    assert f"the data have no labels: leave it out. {said}" in " ".join(told.err.split())


def test_print_and_dry_run_of_a_run_to_resume_are_about_that_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    small = ("--network.width", "16", "--network.depth", "1", "--batch", "4", "--sample-every", "0")
    assert status("train", "digits", *small, "--steps", "3", "--out", str(out)) == 0
    before = sorted(path.name for path in out.rglob("*"))
    capsys.readouterr()
    assert status("train", "--resume", "--out", str(out), "--print") == 0
    assert "steps=3" in capsys.readouterr().out
    assert status("train", "--resume", "--out", str(out), "--dry-run") == 0
    assert "0 of 3 left, of 4: 0 images" in capsys.readouterr().out
    assert sorted(path.name for path in out.rglob("*")) == before


def test_wrong_use_is_found_before_a_folder_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert status("train", "digits", "--evaluate-every", "-1", "--out", str(out)) == 2
    assert "--evaluate-every" in capsys.readouterr().err
    assert not out.exists()


@pytest.fixture
def usual_ctrl_c() -> Iterator[None]:
    # A shell's background job is started with Ctrl-C ignored, and so are these tests in one.
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, found)


@pytest.mark.usefixtures("usual_ctrl_c")
def test_second_sigterm_is_the_same_wish_and_a_second_ctrl_c_is_not() -> None:
    from stablefield.cli.interruption import Interruption

    with Interruption() as interruption:
        assert interruption.status == 0
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert interruption.requested
        assert interruption.status == 143
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.requested
        assert interruption.status == 130
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
