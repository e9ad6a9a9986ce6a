"""A run is a function of its recipe: the same seed gives the same bytes, however often it was interrupted."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import stablefield
from pictures import whole_pictures
from stablefield._distributed import RankError, Ranks
from stablefield.data._digits import open_digits
from stablefield.diffusion._preconditioning import Denoiser
from stablefield.training._accelerator import make_accelerator
from stablefield.training._loop import TrainingError, fit
from stablefield.training._recipe import MLPConfig, Recipe, SongUNetConfig
from stablefield.training._recipes import DIGITS
from stablefield.training._run_config import RunConfig
from stablefield.training._run_data import check_fit
from stablefield.training._run_folder import RunFolder
from stablefield.training._stepper import Stepper

SMALL = dataclasses.replace(
    DIGITS,
    references="all",
    noise_band=0.0,
    steps=24,
    batch=32,
    network=MLPConfig(width=32, depth=1),
    sample_every=0,
    checkpoint_every=8,
    log_every=4,
)


def start(path: Path, recipe: Recipe) -> RunFolder:
    data = open_digits()
    classes = data.classes if recipe.conditional else 0
    config = RunConfig(
        data="digits", shape=data.shape, classes=classes, manifest=data.manifest, recipe=recipe, version="test"
    )
    return RunFolder.create(path, config)


def go(folder: RunFolder) -> None:
    fit(folder, folder.config(), open_digits(), device=torch.device("cpu"))


def weights(folder: RunFolder, step: int = 24) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.checkpoint(step).glob("*.safetensors")}


@pytest.mark.parametrize(
    "change", [{}, {"target": "dsm"}, {"references": 64}, {"conditional": True}, {"noise_band": 1.0}]
)
def test_same_seed_gives_same_bytes_and_another_seed_others(tmp_path: Path, change: dict[str, object]) -> None:
    recipe = dataclasses.replace(SMALL, steps=8, **change)
    runs = [start(tmp_path / str(k), dataclasses.replace(recipe, seed=seed)) for k, seed in enumerate((0, 0, 1))]
    for run in runs:
        go(run)
    first, again, other = (weights(run, 8) for run in runs)
    assert len(first) == 3
    assert first == again
    assert first["model.safetensors"] != other["model.safetensors"]


@pytest.mark.parametrize(
    "network",
    [
        MLPConfig(width=32, depth=1, dropout=0.2),
        # Its weights are channels-last, its files not.
        SongUNetConfig(base_channels=8, multipliers=(1,), blocks=1, dropout=0.2),
    ],
)
@pytest.mark.parametrize(
    "levers",
    [{}, {"draws_per_image": 2, "antithetic": True}, {"importance_sampling": True}],
    ids=["", "pairs", "importance"],
)
def test_run_resumed_from_a_checkpoint_equals_the_uninterrupted_run(
    tmp_path: Path, network: MLPConfig | SongUNetConfig, levers: dict[str, object]
) -> None:
    short = dataclasses.replace(SMALL, steps=12, batch=16, checkpoint_every=4, log_every=2)
    recipe = dataclasses.replace(short, network=network, references=64, **levers)
    whole, cut = start(tmp_path / "whole", recipe), start(tmp_path / "cut", recipe)
    go(whole)

    def interrupt(report: object) -> None:
        if report.step >= 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(cut, cut.config(), open_digits(), device=torch.device("cpu"), report=interrupt, every=1)
    with (cut.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a line cut off by a kill
    go(cut)
    assert weights(whole, 12) == weights(cut, 12)
    steps = [
        [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, cut)
    ]
    assert steps[0] == steps[1] == [2, 4, 6, 8, 10, 12]


def test_damaged_newest_checkpoint_is_named_and_the_one_before_used(tmp_path: Path) -> None:
    run = start(tmp_path / "run", SMALL)
    go(run)
    expected = weights(run)
    damaged = run.checkpoint(24) / "ema.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x55")
    newest = run.newest()
    assert newest is not None
    folder, state, complaints = newest
    assert (folder, state.step) == (run.checkpoint(16), 16)
    assert "ema.safetensors" in complaints[0]
    # A damaged one must not take the place of a whole one among those to keep.
    stopped = fit(run, run.config(), open_digits(), device=torch.device("cpu"), stop=lambda: True)
    assert stopped == 17
    assert sorted(path.name for path in run.checkpoint(17).parent.iterdir()) == ["step-00000016", "step-00000017"]
    go(run)
    assert weights(run) == expected


def test_every_checkpoint_damaged_is_an_error_and_not_a_new_start(tmp_path: Path) -> None:
    run = start(tmp_path / "run", dataclasses.replace(SMALL, steps=8))
    go(run)
    (run.checkpoint(8) / "state.json").write_text("{")
    with pytest.raises(ValueError, match="no checkpoint of this run is intact"):
        run.newest()


def test_loss_that_is_not_finite_stops_the_run_and_keeps_earlier_checkpoints(tmp_path: Path) -> None:
    run = start(tmp_path / "run", dataclasses.replace(SMALL, learning_rate=1e30, ramp_images=0, checkpoint_every=1))
    with pytest.raises(TrainingError, match=r"the (loss is|weight .* is not finite).*lower learning_rate"):
        go(run)
    newest = run.newest()
    assert newest is not None
    assert all(value.isfinite().all() for value in load_file(newest[0] / "model.safetensors").values())


class Sums:
    """An observer that fails at its second measurement."""

    every = 8

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, step: int, denoiser: Denoiser) -> dict[str, float]:
        if step > 8:
            raise self.error
        return {"weights": sum(float(value.sum()) for value in denoiser.parameters())}


@pytest.mark.parametrize("kind", [ZeroDivisionError, OverflowError, FileNotFoundError, OSError])
@pytest.mark.parametrize("place", ["observer", "progress", "stop"])
def test_errors_of_callbacks_are_raised_as_they_are_and_the_run_can_go_on(
    tmp_path: Path, kind: type[Exception], place: str
) -> None:
    error, run = kind("their own"), start(tmp_path / "run", dataclasses.replace(SMALL, steps=16))
    calls = []

    def fail(*_: object) -> bool:
        calls.append(None)
        if len(calls) > 9:
            raise error
        return False

    watchers = {
        "observer": {"observers": [Sums(error)]},
        "progress": {"report": fail, "every": 1},
        "stop": {"stop": fail},
    }
    with pytest.raises(kind, match=r"^their own$") as raised:
        fit(run, run.config(), open_digits(), device=torch.device("cpu"), **watchers[place])
    assert raised.value is error
    newest = run.newest()
    assert newest is not None
    assert newest[1].step == 8
    go(run)
    whole = start(tmp_path / "whole", dataclasses.replace(SMALL, steps=16))
    go(whole)
    assert weights(run, 16) == weights(whole, 16)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"every": 0}, ValueError, "every=0: pass a whole number of at least 1"),
        ({"every": 2.5}, ValueError, "every=2.5: pass a whole number"),
        ({"every": None}, TypeError, "every is None: pass a whole number"),
        ({"progress": True}, TypeError, r"progress is the bool True: .* progress\(report\)"),
        ({"on_start": "x"}, TypeError, r"on_start is the string 'x': .* on_start\(run, images\)"),
        ({"stop": False}, TypeError, r"stop is the bool False: .* stop\(\)"),
        ({"observers": Sums(OSError())}, TypeError, "observers is a Sums: pass a list of observers"),
        ({"observers": [lambda *_: {}]}, TypeError, r"observers\[0\].every is None: pass a whole number"),
        ({"observers": [SimpleNamespace(every=4)]}, TypeError, r"observers\[0\] is a SimpleNamespace: "),
    ],
)
def test_wrong_callbacks_are_refused_before_a_run_begins(
    tmp_path: Path, change: dict[str, Any], kind: type[Exception], said: str
) -> None:
    recipe = dataclasses.replace(SMALL, steps=2)
    with pytest.raises(kind, match=f"^{said}"):
        stablefield.train("digits", out=tmp_path / "run", recipe=recipe, device="cpu", **change)
    assert not (tmp_path / "run").exists()
    run = start(tmp_path / "begun", recipe)
    with pytest.raises(kind, match=f"^{said}"):
        stablefield.Run(run.path).resume(device="cpu", **change)


def test_a_dead_process_is_told_as_such_and_not_as_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Stepper, step: int) -> None:
        raise RankError("rank 1 has died.")

    monkeypatch.setattr(Stepper, "take", fail)
    words = r"^rank 1 has died\. No step is done: start the run again\.$"
    with pytest.raises(TrainingError, match=words):
        go(start(tmp_path / "run", SMALL))


def test_stable_loss_plus_variance_removed_is_the_single_sample_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Gradients would take much of the time, for a network that stays as it is.
    monkeypatch.setattr(Accelerator, "backward", lambda *_: None)
    # Same weights (learning rate ~ 0), same draws: the two losses differ by the variance removed, in expectation.
    recipe = dataclasses.replace(SMALL, steps=150, batch=128, learning_rate=1e-12, log_every=150, checkpoint_every=150)
    values = {}
    for target in ("stf", "dsm"):
        run = start(tmp_path / target, dataclasses.replace(recipe, target=target))
        with torch.no_grad():
            go(run)
        values[target] = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
    gap = values["dsm"]["loss"] - values["stf"]["loss"]
    assert values["dsm"]["variance_removed"] == 0
    assert gap == pytest.approx(values["stf"]["variance_removed"], rel=0.1)


def test_data_other_than_the_run_was_started_with_are_refused(tmp_path: Path) -> None:
    run = start(tmp_path / "run", SMALL)
    digits = open_digits()
    manifest = {**digits.manifest, "sha256": "0"}
    with pytest.raises(ValueError, match="sha256"):
        fit(run, run.config(), dataclasses.replace(digits, manifest=manifest), device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch": 2000}, "batch=2000"),
        ({"references": 1798}, "references=1798"),
        ({"references": 31}, "references=31"),
    ],
)
def test_recipe_that_does_not_fit_the_data_is_refused(change: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_fit(dataclasses.replace(SMALL, **change), open_digits())


def test_conditional_run_without_labels_is_refused() -> None:
    data = dataclasses.replace(open_digits(), labels=None, class_names=None)
    with pytest.raises(ValueError, match="conditional=True"):
        check_fit(dataclasses.replace(SMALL, conditional=True), data)


def test_numbers_of_the_picture_are_the_samples_of_the_run(tmp_path: Path) -> None:
    from PIL import Image

    from stablefield.data._png import tile
    from stablefield.sampling._noise import SampleNoise
    from stablefield.training._model import open_model

    run = start(tmp_path / "run", dataclasses.replace(SMALL, steps=8))
    with whole_pictures():
        go(run)
    denoiser = open_model(run.path).denoiser
    sigmas = stablefield.sampling.edm_sigmas(18)
    latents = SampleNoise(list(range(64))).latents((1, 8, 8), dtype=torch.float64)
    clean = stablefield.sampling.heun(denoiser, latents * 80.0, sigmas)
    images = ((clean.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    with Image.open(run.picture(8)) as picture:
        shown = np.asarray(picture)
    np.testing.assert_array_equal(shown, tile(images)[:, :, 0])


def test_processes_that_accelerate_does_not_count_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # As where a job manager sets WORLD_SIZE and no LOCAL_RANK: each process would train alone, in one folder.
    monkeypatch.setattr("stablefield.training._accelerator.Ranks.launched", lambda device: Ranks(0, 2))
    monkeypatch.setattr("stablefield.training._accelerator.Accelerator", lambda **_: SimpleNamespace(num_processes=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2 in the environment, and Accelerate counts 1 processes"):
        make_accelerator(torch.device("cpu"))
