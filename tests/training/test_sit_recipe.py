"""The transformer as a network of the trainer: trained, resumed, sampled and exported like the others."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

import stablefield as sf
from stablefield.cli.entry import main
from stablefield.data._digits import open_digits
from stablefield.networks import SiT
from stablefield.training._config import decode, encode
from stablefield.training._model import open_model
from stablefield.training._recipes import named_recipe

FLAGS = ["--recipe", "sit", "--network.width", "16", "--network.heads", "2", "--network.depth", "1", "--batch", "8"]
FLAGS += ["--sample-every", "0", "--checkpoint-every", "2", "--network.checkpointing", "--noise-band", "0.5"]


def status(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "digits"
    assert status("train", "digits", *FLAGS, "--steps", 4, "--conditional", "--out", path) == 0
    return path


def weights(run: Path) -> str:
    return hashlib.sha256((run / "checkpoints/step-00000004/model.safetensors").read_bytes()).hexdigest()


def test_resumed_run_has_the_bytes_of_the_uninterrupted_one(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    shutil.rmtree(other / "checkpoints/step-00000004")
    assert status("train", "--resume", "--out", other) == 0
    assert weights(other) == weights(run)


def test_run_is_a_flow_with_classes_and_samples_with_guidance(run: Path, tmp_path: Path) -> None:
    model = open_model(run)
    assert isinstance(model.denoiser.network, SiT)
    assert model.denoiser.network.classes == 10
    assert model.config.recipe.process == sf.RectifiedFlow()
    assert model.config.recipe.preconditioning == sf.FlowPreconditioning()
    words = ("--seeds", "0-3", "--steps", 2, "--class", 3, "--guidance-scale", 2)
    assert status("sample", run, *words, "--out", tmp_path / "images") == 0
    assert len(list((tmp_path / "images").glob("0*.png"))) == 4


def test_run_is_exported_as_plain_weights_under_the_published_names(run: Path, tmp_path: Path) -> None:
    words = ("--format", "plain", "--samples", 4, "--steps", 2)
    assert status("export", run, "--out", tmp_path / "plain", *words) == 0
    file = tmp_path / "plain" / "model.safetensors"
    # config.json states the preconditioning and the heads; without it, both have to be given.
    assert status("import", file, "--out", tmp_path / "stated") == 0
    (tmp_path / "plain" / "config.json").unlink()
    assert status("import", file, "--out", tmp_path / "run", "--preconditioning", "flow") == 2
    assert status("import", file, "--out", tmp_path / "run", "--preconditioning", "flow", "--heads", 2) == 0
    x, labels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, -1])
    ours, *theirs = (open_model(path).denoiser(x, 0.7, labels) for path in (run, tmp_path / "run", tmp_path / "stated"))
    assert all(torch.equal(ours, one) for one in theirs)


def test_bf16_trains_close_to_float32_and_flags_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = []
    for precision in ("float32", "bf16"):
        words = ("--steps", 2, "--log-every", 1, "--precision", precision, "--out", tmp_path / precision)
        assert status("train", "digits", *FLAGS, *words) == 0
        lines = (tmp_path / precision / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    capsys.readouterr()
    assert status("train", "digits", *FLAGS, "--network.patch-size", 3, "--out", tmp_path / "other") == 2
    assert "pass --network.patch-size 2, or --resolution 6" in capsys.readouterr().err


def test_recipe_is_chosen_by_name_and_read_back_from_json() -> None:
    name, recipe = named_recipe("sit", open_digits(), accelerated=False)
    assert name == "sit"
    assert decode(encode(recipe)) == recipe
