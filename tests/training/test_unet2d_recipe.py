"""A UNet2DModel of diffusers as a network of the trainer: trained, resumed, sampled and exported like the others."""

import dataclasses
import hashlib
import shutil
from pathlib import Path

import pytest
import torch

from stablefield.cli.entry import main
from stablefield.data._digits import open_digits
from stablefield.training._config import decode, encode
from stablefield.training._recipe import DiffusersUNetConfig
from stablefield.training._recipes import named_recipe, unet2d

diffusers = pytest.importorskip("diffusers")

FLAGS = ["--recipe", "unet2d", "--network.widths", "32", "32", "--network.blocks", "1", "--batch", "8"]
FLAGS += ["--sample-every", "0", "--checkpoint-every", "2"]


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


def test_run_is_exported_as_a_model_that_diffusers_opens(run: Path, tmp_path: Path) -> None:
    assert status("sample", run, "--seeds", "0-3", "--steps", 2) == 0
    assert status("export", run, "--out", tmp_path / "pipe", "--samples", 4, "--steps", 2) == 0
    model = diffusers.UNet2DModel.from_pretrained(tmp_path / "pipe/unet")
    assert model.config.num_class_embeds == 11
    assert tuple(model.config.block_out_channels) == (32, 32)


@pytest.mark.parametrize("side", [8, 16, 28, 32, 64])
@pytest.mark.parametrize("accelerated", [False, True])
def test_recipe_fits_every_size(side: int, accelerated: bool) -> None:
    recipe = unet2d((3, side, side), 1000, accelerated=accelerated)
    with torch.device("meta"):
        recipe.network.build((3, side, side), 0, recipe.augment_dim, torch.Generator())


def test_recipe_is_chosen_by_name_and_read_back_from_json() -> None:
    name, recipe = named_recipe("unet2d", open_digits(), accelerated=False)
    assert name == "unet2d"
    assert isinstance(recipe.network, DiffusersUNetConfig)
    assert decode(encode(recipe)) == recipe


def test_weights_are_those_of_the_generator_and_leave_the_global_one_alone() -> None:
    network = DiffusersUNetConfig(widths=(32,), blocks=1)
    before = torch.get_rng_state()
    first, second, other = (network.build((1, 8, 8), 0, 0, torch.Generator().manual_seed(k)) for k in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(same)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "shape", "message"),
    [
        ({"widths": (32, 48)}, (1, 8, 8), "network.widths"),
        ({"attention": (True,)}, (1, 8, 8), "network.attention"),
        ({}, (1, 30, 30), "resolution=28"),
    ],
)
def test_network_that_does_not_fit_is_refused(change: dict, shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DiffusersUNetConfig(widths=(32, 32, 32)), **change).build(shape, 0, 0, torch.Generator())


def test_augmentation_is_refused() -> None:
    with pytest.raises(ValueError, match="augmentation needs"):
        DiffusersUNetConfig().build((1, 8, 8), 0, 9, torch.Generator())
