"""The named recipes say what the paper and the facts sheet say, and can be shown as Python."""

import dataclasses

import pytest
import torch

import stablefield as sf
from stablefield.cli.entry import main
from stablefield.data._digits import open_digits
from stablefield.data._image_set import Origin, make_image_set
from stablefield.data._resizing import natural_resolution
from stablefield.training import _recipe as recipe_module
from stablefield.training._recipe import DiffusersUNetConfig, Recipe, SiTConfig, SongUNetConfig
from stablefield.training._recipes import (
    CIFAR10_EDM,
    CIFAR10_VE,
    CIFAR10_VP,
    DIGITS,
    RECIPES,
    imagefolder,
    largest_resolution,
    named_recipe,
    recipe_for,
    sit,
    unet2d,
    with_noise_distribution,
)


def names() -> dict[str, object]:
    found = {name: getattr(recipe_module, name) for name in ("Recipe", "SongUNetConfig", "MLPConfig")}
    return {**found, **{name: getattr(sf, name) for name in sf.__all__}, "inf": float("inf")}


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_shown_is_python_that_makes_the_recipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--recipe", name, "--print"])
    text = capsys.readouterr().out
    assert eval(text, {"__builtins__": {}}, names()) == RECIPES[name]


@pytest.mark.parametrize(
    ("recipe", "parameters"), [(CIFAR10_EDM, 56_397_827), (CIFAR10_VE, 56_397_827), (CIFAR10_VP, 55_733_891)]
)
def test_cifar10_recipes_have_the_published_networks(recipe: Recipe, parameters: int) -> None:
    with torch.device("meta"):
        network = recipe.network.build((3, 32, 32), 0, recipe.augment_dim, torch.Generator())
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize("recipe", [CIFAR10_EDM, CIFAR10_VE, CIFAR10_VP])
def test_cifar10_recipes_follow_the_published_schedule(recipe: Recipe) -> None:
    assert recipe.batch == 512
    assert recipe.steps * recipe.batch == pytest.approx(200e6, rel=1e-5)
    assert recipe.learning_rate_at(0) == pytest.approx(1e-3 * 512 / 10e6)
    assert recipe.learning_rate_at(10_000_000 // 512 + 1) == recipe.learning_rate_at(recipe.steps - 1) == 1e-3
    assert (recipe.ema_half_life, recipe.ema_ramp, recipe.augmentation) == (500_000, 0.05, 0.12)
    assert isinstance(recipe.network, SongUNetConfig)
    assert recipe.network.dropout == 0.13
    assert not recipe.mirror
    assert recipe.nan_to_num


def test_ve_and_vp_weigh_the_error_in_the_noise_and_draw_the_published_levels() -> None:
    generator = torch.Generator().manual_seed(0)
    for recipe, low, high in ((CIFAR10_VE, 0.02, 100.0), (CIFAR10_VP, 0.0, 160.0)):
        level = recipe.process.noise_level(recipe.noise_levels.sample(recipe.process, 20_000, generator))
        assert low <= level.min()
        assert level.max() <= high
        torch.testing.assert_close(recipe.weighting(level), 1 / level**2)


@pytest.mark.parametrize(
    ("shape", "count", "name"),
    [((1, 28, 28), 500, "mnist28"), ((3, 64, 64), 500, "imagefolder"), ((3, 8, 8), 50, "imagefolder")],
)
def test_auto_chooses_by_the_data(shape: tuple[int, int, int], count: int, name: str) -> None:
    import numpy as np

    data = make_image_set(np.zeros((count, *shape), np.uint8), None, Origin(name="made", source="made up"))
    found, recipe = named_recipe("auto", data, accelerated=False)
    assert found == name
    assert recipe_for(data, accelerated=False) == recipe
    recipe.network.build(data.shape, 0, recipe.augment_dim, torch.Generator())
    assert recipe.batch <= count


def test_the_built_in_digits_have_their_recipe_at_any_size() -> None:
    for resolution in (None, 16):
        digits = sf.data.open_images("digits", resolution=resolution)
        assert named_recipe("auto", digits, accelerated=False) == ("digits", RECIPES["digits"])


@pytest.mark.parametrize("side", [8, 12, 16, 20, 28, 32, 40, 48, 56, 64])
@pytest.mark.parametrize("accelerated", [False, True])
def test_imagefolder_fits_every_size_that_it_chooses(side: int, accelerated: bool) -> None:
    recipe = imagefolder((3, side, side), 1000, accelerated=accelerated)
    with torch.device("meta"):
        recipe.network.build((3, side, side), 0, recipe.augment_dim, torch.Generator())


@pytest.mark.parametrize("size", [(8, 12), (12, 32), (24, 32), (32, 20), (48, 64), (64, 32), (40, 56)])
@pytest.mark.parametrize("accelerated", [False, True])
def test_recipes_fit_images_that_are_not_square(size: tuple[int, int], accelerated: bool) -> None:
    assert natural_resolution([size], 64) is None
    recipes = [make((3, *size), 1000, accelerated=accelerated) for make in (imagefolder, sit)]
    if accelerated:  # where alone the third one is
        recipes.append(unet2d((3, *size), 1000, accelerated=True))
    for recipe in recipes:
        if isinstance(recipe.network, DiffusersUNetConfig):
            pytest.importorskip("diffusers")
            if min(size) < 16:
                continue
        with torch.device("meta"):
            network = recipe.network.build((3, *size), 0, recipe.augment_dim, torch.Generator())
            assert network(torch.zeros(1, 3, *size), torch.zeros(1)).shape == (1, 3, *size)


@pytest.mark.parametrize(
    ("side", "cpu", "gpu"),
    [(8, 2, 2), (12, 2, 2), (16, 2, 2), (28, 4, 2), (30, 5, 2), (32, 4, 2), (64, 8, 4), (31, 1, 1)],
)
def test_transformer_has_the_smallest_patches_that_its_device_affords(side: int, cpu: int, gpu: int) -> None:
    for accelerated, patch in ((False, cpu), (True, gpu)):
        recipe = sit((3, side, side), 1000, accelerated=accelerated)
        assert isinstance(recipe.network, SiTConfig)
        assert recipe.network.patch_size == patch
        with torch.device("meta"):
            recipe.network.build((3, side, side), 10, recipe.augment_dim, torch.Generator())


def test_transformer_names_patches_and_resolution_for_images_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"pass network\.patch_size=5, or resolution=\(28, 40\)\."):
        SiTConfig(patch_size=4).build((3, 30, 40), 0, 0, torch.Generator())
    with pytest.raises(ValueError, match="augmentation needs"):
        SiTConfig().build((3, 32, 32), 0, 9, torch.Generator())
    assert SiTConfig.sized("B", 4) == SiTConfig(patch_size=4, width=768, depth=12, heads=12)
    with pytest.raises(ValueError, match="size='M': pass one of XXS"):
        SiTConfig.sized("M")


def test_transformer_learns_the_velocity_of_a_flow_with_logit_normal_times() -> None:
    recipe = sit((1, 8, 8), 1797, accelerated=False)
    t = recipe.noise_levels.sample(recipe.process, 20_000, torch.Generator().manual_seed(0))
    logits = torch.log(t / (1 - t))
    assert logits.mean().abs() < 0.03
    assert abs(logits.std() - 1) < 0.03
    level = recipe.process.noise_level(t)
    # The loss weighs the error of every time's velocity alike.
    torch.testing.assert_close(recipe.weighting(level) * recipe.preconditioning(level).c_out ** 2, torch.ones_like(t))


def test_limits_of_resolution_follow_recipe_and_device() -> None:
    assert largest_resolution("auto", accelerated=False) == largest_resolution(accelerated=False) == 32
    assert largest_resolution("imagefolder", accelerated=True) == 64
    assert largest_resolution("celeba64-ve", accelerated=False) == 64
    assert largest_resolution("cifar10-ve", accelerated=False) == 32
    assert largest_resolution("digits", accelerated=False) is None


def test_unet_names_the_resolution_for_images_that_it_does_not_fit() -> None:
    for shape, words in (
        ((3, 30, 30), "resolution=28, or at most 2 levels"),
        ((3, 42, 64), r"resolution=\(40, 64\), or at most 2"),
    ):
        with pytest.raises(ValueError, match=words):
            SongUNetConfig().build(shape, 0, 0, torch.Generator())


def test_augmentation_needs_a_network_that_can_be_told() -> None:
    recipe = dataclasses.replace(RECIPES["digits"], augmentation=0.1)
    with pytest.raises(ValueError, match="augmentation needs"):
        recipe.network.build(open_digits().shape, 0, recipe.augment_dim, torch.Generator())
    with pytest.raises(ValueError, match="mirror=True and augmentation"):
        dataclasses.replace(recipe, mirror=True)


def test_unknown_names_are_refused_with_the_likely_one() -> None:
    with pytest.raises(ValueError, match=r"^noise_distribution is 'log-normal': .* Did you mean lognormal"):
        with_noise_distribution(DIGITS, "log-normal")
    with pytest.raises(ValueError, match=r"^recipe is 'cifar10_edm': .* Did you mean cifar10-edm"):
        named_recipe("cifar10_edm", open_digits(), accelerated=False)
