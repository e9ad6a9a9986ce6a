"""Claims on runs that go on: an extended run is the run that was planned as long, on one process and on two."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import stablefield as sf
from forks import Fork
from stablefield.cli.entry import main
from stablefield.data._digits import open_digits
from stablefield.training._recipe import MLPConfig, Recipe
from stablefield.training._recipes import DIGITS, RECIPES, imagefolder, sit, unet2d
from stablefield.training._run_config import Extension

TINY = Recipe(
    batch=16,
    references=32,
    noise_band=0.5,
    ramp_images=50,
    decay_share=0.0,
    importance_sampling=True,
    ema_snapshot_every=4,
    checkpoint_every=4,
    sample_every=0,
    log_every=3,
    network=MLPConfig(width=16, depth=1, dropout=0.1),
)
FLAGS = ("--network.width", "16", "--network.depth", "1", "--batch", "16", "--sample-every", "0", "--device", "cpu")

# A run that is planned as 8 steps and one that is extended to as many, and two that begin with the weights of the first,
# of which one is stopped and resumed; at last one whose time is over after a few of its steps, and whose trial steps one of
# the processes finds too few. Each on all processes.
PAIR = """
import dataclasses, os, sys
from pathlib import Path
import stablefield as sf
from stablefield.training import _estimate
sys.path.insert(0, sys.argv[2])
from test_going_on import TINY

out = Path(sys.argv[1])
data = sf.data.open_images("digits")
sf.train(data, out=out / "whole", recipe=TINY, steps=8, device="cpu")
run = sf.train(data, out=out / "short", recipe=TINY, steps=3, device="cpu")
run.resume(steps=8, data=data, device="cpu")
for name, wanted in (("second", False), ("cut", True)):
    run = sf.train(data, out=out / name, init=out / "whole", steps=4, device="cpu", stop=lambda: wanted)
    run.resume(data=data, device="cpu")
_estimate.ENOUGH = 9.0 * int(os.environ["RANK"])
plan = sf.training.make_plan(data, TINY, device="cpu").within("10m", "cpu")
(out / os.environ["RANK"]).write_text(str(plan.config.recipe.steps))
few = dataclasses.replace(plan.config, recipe=dataclasses.replace(TINY, steps=40))
sf.train(dataclasses.replace(plan, config=few, seconds=0.01), out=out / "timed", device="cpu")
"""


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def files_of(run: sf.Run) -> dict[str, bytes]:
    """The files of the newest checkpoint, whose bytes are the weights, their averages and the moments."""
    newest = run.folder.newest()
    assert newest is not None
    return {path.name: path.read_bytes() for path in newest[0].glob("*.safetensors")}


def train(path: Path, steps: int, **options: object) -> sf.Run:
    return sf.train("digits", out=path, recipe=TINY, steps=steps, device="cpu", **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> sf.Run:
    return train(tmp_path_factory.mktemp("runs") / "whole", 14)


def test_an_extended_run_has_the_bytes_of_the_run_that_was_planned_as_long(whole: sf.Run, tmp_path: Path) -> None:
    run = train(tmp_path / "run", 7)
    before = json.loads((run.path / "config.json").read_text())
    assert "extensions" not in before
    assert run.resume(steps=14, device="cpu").step == 14
    assert files_of(run) == files_of(whole)
    assert set(files_of(run)) >= {"model.safetensors", "ema.safetensors", "optimizer.safetensors"}
    assert run.config.recipe == whole.config.recipe
    # Both numbers stay in the file.
    assert run.config.extensions == (Extension(step=7, before=7, after=14),)
    after = json.loads((run.path / "config.json").read_text())
    assert after["extensions"] == [{"step": 7, "before": 7, "after": 14}]
    assert (before["recipe"].pop("steps"), after["recipe"].pop("steps")) == (7, 14)
    assert before["recipe"] == after["recipe"]


def test_a_later_resume_goes_on_to_the_new_end(whole: sf.Run, tmp_path: Path) -> None:
    run = train(tmp_path / "run", 3)
    assert run.resume(steps=14, device="cpu", stop=lambda: True).step == 4
    # The same call again, as of a script, changes nothing more.
    assert run.resume(steps=14, device="cpu", stop=lambda: True).step == 5
    assert run.resume(device="cpu").step == 14
    assert files_of(run) == files_of(whole)
    assert run.config.extensions == (Extension(step=3, before=3, after=14),)
    run.resume(steps=16, device="cpu")
    assert [(one.before, one.after) for one in run.config.extensions] == [(3, 14), (14, 16)]


def test_a_decay_that_has_not_begun_does_not_show(tmp_path: Path) -> None:
    decaying = dataclasses.replace(TINY, decay_share=0.5)
    options = {"recipe": decaying, "device": "cpu"}
    planned = sf.train("digits", out=tmp_path / "whole", steps=16, **options)
    done: list[int] = []
    stopped = sf.train(
        "digits", out=tmp_path / "run", steps=10, every=1, progress=lambda r: done.append(r.step),
        stop=lambda: len(done) >= 4, **options,
    )  # fmt: skip
    assert stopped.resume(steps=16, device="cpu").step == 16
    assert files_of(stopped) == files_of(planned)


def test_a_decay_that_had_begun_goes_back_to_the_schedule_of_the_new_total(tmp_path: Path) -> None:
    decaying = dataclasses.replace(TINY, decay_share=0.5, log_every=1)
    run = sf.train("digits", out=tmp_path / "run", recipe=decaying, steps=6, device="cpu")
    run.resume(steps=12, device="cpu")
    rates = [entry["learning_rate"] for entry in run.metrics()]
    level = decaying.learning_rate
    # By hand: images seen over those of the ramp, and the rest of the steps over those of the decay.
    ramp = [min(1, 16 * (step + 1) / 50) for step in range(12)]
    expected = [min(ramp[step], (6 - step) / 3, 1) for step in range(6)]
    expected += [min(ramp[step], (12 - step) / 6, 1) for step in range(6, 12)]
    assert rates == pytest.approx([level * share for share in expected])
    assert rates[5] < rates[6]


def test_recipes_decay_over_the_share_that_the_tutorial_names() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "tutorial.md").read_text("utf-8")
    named = {
        name: int(share or 0) / 100
        for row, share in re.findall(r"^\| ((?:`[\w-]+`(?:, )?)+) \| (?:(\d+)% of the steps|never) \|$", text, re.M)
        for name in re.findall(r"`([\w-]+)`", row)
    }
    own = {name: recipe.decay_share for name, recipe in RECIPES.items()}
    for accelerated in (False, True):
        for make in (imagefolder, unet2d, sit):
            assert named[make.__name__] == make((3, 32, 32), 1000, accelerated=accelerated).decay_share
            # "For images below 16 pixels a side, `imagefolder` and `sit` take the training settings of `digits`, so 30%."
            small = make((3, 8, 8), 1000, accelerated=accelerated)
            assert (small.decay_share == DIGITS.decay_share == 0.3) == (make is not unet2d)
    assert "`imagefolder` and `sit` take the training settings of `digits`, so 30%." in text
    assert named.items() >= own.items()
    assert len(named) == len(own) + 3


def test_data_in_the_home_folder_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "x.npy", open_digits().images[:60])
    run = sf.train("~/x.npy", out=tmp_path / "run", recipe=TINY, steps=1, device="cpu")
    assert run.config.data == "~/x.npy"
    assert run.resume(steps=2, device="cpu").step == 2


def test_steps_that_are_done_cannot_be_taken_back(whole: sf.Run) -> None:
    before = (whole.path / "config.json").read_bytes()
    for steps in (3, 13):
        with pytest.raises(ValueError, match=rf"^steps={steps}: 14 of this run's 14 steps are done.*pass more than 14"):
            whole.resume(steps=steps, device="cpu")
    with pytest.raises(ValueError, match=r"^steps"):
        whole.resume(steps=0, device="cpu")
    other = open_digits().images[::-1].copy()
    with pytest.raises(ValueError, match="is not what this run was started with"):
        whole.resume(steps=20, data=other, device="cpu")
    assert (whole.path / "config.json").read_bytes() == before
    assert whole.resume(steps=14, device="cpu").step == 14


def test_extensions_that_are_none_are_refused(tmp_path: Path) -> None:
    run = train(tmp_path / "run", 2)
    record = json.loads((run.path / "config.json").read_text())
    del record["checksum"]
    for odd in ("x", [1], [{"step": 1}], [{"step": 1, "before": -1, "after": 2}]):
        (run.path / "config.json").write_text(json.dumps({**record, "extensions": odd}))
        with pytest.raises(ValueError, match=r"config\.json cannot be used: its extensions are not"):
            _ = run.config


def test_the_command_extends_and_says_what_becomes_of_the_learning_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    assert status("train", "digits", *FLAGS, "--steps", "4", "--ramp-images", "0", "--out", out) == 0
    before = (tmp_path / "run" / "config.json").read_bytes()
    capsys.readouterr()
    assert status("train", "--resume", "--steps", "10", "--out", out, "--dry-run") == 0
    assert "6 of 10 left, of 16: 96 images" in capsys.readouterr().out
    assert status("train", "--resume", "--steps", "3", "--out", out) == 2
    assert "--steps 3: 4 of this run's 4 steps are done" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    assert status("train", "--resume", "--steps", "10", "--out", out) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "continuing from step 4 steps: 10, instead of 4" in told
    # Its last step, the fourth, had 1 / 1.2 of the level.
    assert "note: the learning rate had fallen to 0.00083 for the end at step 4; it goes back to 0.001" in told
    assert "10 steps of 16" in told
    assert sf.Run(out).step == 10


def test_two_processes_go_on_and_begin_anew_to_the_bytes_of_their_whole_runs(
    tmp_path: Path, fork_ranks: Callable[..., list[Fork]]
) -> None:
    started = fork_ranks(2, PAIR, tmp_path, Path(__file__).parent)
    messages = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], messages
    short, planned, second, cut = (sf.Run(tmp_path / name) for name in ("short", "whole", "second", "cut"))
    assert files_of(short) == files_of(planned)
    assert (planned.step, second.step) == (8, 4)
    assert files_of(cut) == files_of(second)
    first = second.folder.checkpoint(0) / "model.safetensors"
    assert first.read_bytes() == files_of(planned)["ema.safetensors"]
    timed = sf.Run(tmp_path / "timed")
    assert timed.step == timed.config.recipe.steps == timed.config.extensions[-1].after < 40
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()
    assert short.config.extensions == (Extension(step=3, before=3, after=8),)
    assert np.isfinite([entry["loss"] for entry in short.metrics()]).all()
