"""A flag wins over what a recipe sets, for every recipe and every flag, and what is changed is printed."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest
import torch

from stablefield.cli.entry import main
from stablefield.cli.flags import Flag
from stablefield.cli.inventory import inventory
from stablefield.cli.parser import given
from stablefield.cli.recipe_flags import BASES, RecipeFlags, yielding
from stablefield.data._image_set import ImageSet
from stablefield.diffusion._noise_levels import LogNormal, LogUniform, NoiseLevels, Uniform
from stablefield.diffusion._process import VE, RectifiedFlow
from stablefield.training._recipe import MLPConfig, Recipe
from stablefield.training._recipes import NoiseDistribution, imagefolder, with_noise_distribution
from stablefield.training._run_data import check_fit

KINDS = {
    **BASES,
    "imagefolder-gpu": imagefolder((3, 64, 64), 100_000, accelerated=True),
}


def values_of(flag: Flag, default: Any) -> Iterator[list[str]]:
    """Some values that are right in themselves, near the default."""
    if flag.count == 0:
        yield []
        return
    words = [word for word in flag.takes if word not in ("int", "float", "text", "path")]
    if flag.count == 1:
        yield from ([word] for word in words)
    numbers = default if isinstance(default, tuple) else (default,)
    if "float" in flag.takes or "int" in flag.takes:
        usual = 0.25 if "float" in flag.takes else 1
        numbers = [
            number if isinstance(number, int | float) and number not in (0, float("inf")) else usual
            for number in numbers
        ]
        for factor in (0.5, 2):
            scaled = [number * factor for number in numbers]
            if "float" not in flag.takes:
                scaled = [max(1, round(number)) for number in scaled]
            elif any(0.5 < number <= 1 for number in numbers):
                scaled = [min(1.0, number) for number in scaled]  # a share
            yield [str(number) for number in scaled]


def value_at(recipe: Recipe, name: str) -> Any:
    found: Any = recipe
    for part in name.removeprefix("--").split("."):
        found = getattr(found, part.replace("-", "_"))
    return found


def changed(recipe: Recipe, arguments: list[str]) -> Recipe:
    """The recipe with a flag applied, as the parser applies it."""
    name, *words = arguments
    part, _, field = name.removeprefix("--").replace("-", "_").rpartition(".")
    plain = field.removeprefix("no_")
    old = value_at(recipe, f"--{part}.{plain}" if part else f"--{plain}")
    value: Any
    if isinstance(old, bool):
        field, value = plain, not field.startswith("no_")
    elif isinstance(old, tuple) or old is None:
        value = tuple(float(word) if "." in word else int(word) for word in words)
    elif isinstance(old, float) or "." in words[0]:
        value = float(words[0])
    else:
        value = int(words[0]) if words[0].isdigit() else words[0]
    if part:
        value = dataclasses.replace(getattr(recipe, part), **{field: value})
    return dataclasses.replace(recipe, **{part or field: value})


def cases() -> Iterator[tuple[str, list[str]]]:
    fields = {field.name for field in dataclasses.fields(Recipe)}
    for name, recipe in KINDS.items():
        for flag_name, (flag, *_) in inventory(recipe)["train"].flags().items():
            bare = re.sub(r"(^|\.)no_", r"\1", flag_name.removeprefix("--").replace("-", "_"))
            if bare.partition(".")[0] in fields:
                for values in values_of(flag, value_at(recipe, f"--{bare}")):
                    yield name, [flag_name, *values]


def test_every_flag_can_be_given_with_every_recipe() -> None:
    """A flag alone never fails for what the recipe sets: where two things cannot be, the recipe's yields."""
    impossible = {
        # The network of these recipes cannot be told of an augmentation, and no flag names another network.
        ("digits", "--augmentation"),
        ("unet2d", "--augmentation"),
        # A norm of so many groups takes widths that are multiples of it, and nobody said which.
        ("unet2d", "--network.groups"),
        ("sit", "--augmentation"),
        # Another width or number of heads alone need not divide, nor need the images into other patches.
        ("sit", "--network.width"),
        ("sit", "--network.heads"),
        ("sit", "--network.patch-size"),
        # One value a level, and the recipe's levels are three.
        ("unet2d", "--network.attention"),
        # Only latents of images have an autoencoder.
        *((name, "--latent-scaling") for name in KINDS),
    }
    seen = 0
    for name, arguments in cases():
        if (name, arguments[0]) in impossible:
            continue
        base, _ = yielding(KINDS[name], given(arguments))
        recipe = changed(base, arguments)  # raises where it does not fit
        shape = (1, 8, 8) if isinstance(recipe.network, MLPConfig) else (3, 64, 64)
        labels = torch.zeros(10**6, dtype=torch.int64).numpy()
        images = torch.zeros(1, *shape, dtype=torch.uint8).expand(10**6, *shape).numpy()
        check_fit(recipe, ImageSet(images=images, labels=labels, class_names=None, name="x", manifest={}))
        if name in ("digits", "imagefolder", "unet2d", "sit") and arguments[0].startswith("--network"):
            with torch.device("meta"):
                recipe.network.build(shape, 0, recipe.augment_dim, torch.Generator())
        seen += 1
    assert seen > 400


@pytest.mark.parametrize(
    ("name", "line", "changed"),
    [
        ("cifar10-edm", "--mirror", {"augmentation": 0.0, "mirror": True}),
        ("imagefolder", "--mirror", {"augmentation": 0.0}),
        ("digits", "--references 5", {"batch": 5, "references": 5}),
        ("digits", "--references 5 --draws-per-image 4", {"batch": 20, "references": 5, "draws_per_image": 4}),
        ("digits", "--antithetic", {"draws_per_image": 2, "antithetic": True}),
        ("cifar10-ve", "--process.sigma-max 50", {"process.sigma-max": 50.0, "noise-levels.maximum": 50.0}),
        ("cifar10-ve", "--process.sigma-min 0.5", {"process.sigma-min": 0.5, "noise-levels.minimum": 0.5}),
        ("cifar10-ve", "--noise-levels.maximum 300", {"process.sigma-max": 300.0, "noise-levels.maximum": 300.0}),
        ("unet2d", "--network.widths 48 80", {"network.groups": 16}),
    ],
)
def test_the_recipe_yields_and_says_so(name: str, line: str, changed: dict[str, Any]) -> None:
    recipe, notes = RecipeFlags(tuple(line.split())).on(KINDS[name])
    assert {field: value_at(recipe, f"--{field}") for field in changed} == changed
    assert len(notes) == 1
    assert line.split()[0] in notes[0]
    assert "wins over the recipe's --" in notes[0]


def test_nothing_yields_to_flags_that_agree_or_that_were_both_given(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("--steps 5 --noise-band 0.3", "--mirror --augmentation 0", "--no-mirror"):
        assert yielding(KINDS["cifar10-edm"], given(line.split())) == (KINDS["cifar10-edm"], ())
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--recipe", "cifar10-edm", "--mirror", "--augmentation", "0.1", "--print"])
    assert "--mirror and --augmentation 0.1: the augmentation mirrors images itself" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--recipe", "cifar10-edm", "--mirror", "--print"])
    assert capsys.readouterr().out.startswith("# --mirror wins over the recipe's --augmentation 0.12, which is 0 now")


def test_a_resolution_wins_over_the_levels_of_the_network() -> None:
    recipe = KINDS["imagefolder"]
    for side, levels in ((30, 2), (25, 1), (28, 3)):
        found, notes = RecipeFlags().on(recipe, (3, side, side))
        assert found.network.multipliers == recipe.network.multipliers[:levels]  # type: ignore[union-attr]
        assert len(notes) == (levels < 3)
        with torch.device("meta"):
            found.network.build((3, side, side), 0, found.augment_dim, torch.Generator())
    assert RecipeFlags().on(recipe) == (recipe, ())  # where no resolution was asked for
    named = RecipeFlags(("--network.multipliers", "1", "1", "1"))
    assert named.on(recipe, (3, 30, 30)) == named.on(recipe)


def test_processes_with_an_end_are_all_known_to_yield() -> None:
    kinds = get_args(get_type_hints(Recipe)["process"])
    ended = [kind for kind in kinds if any(f.name.startswith("sigma") for f in dataclasses.fields(kind))]
    assert ended == [VE]


@pytest.mark.parametrize(
    ("name", "distribution", "expected"),
    [
        ("sit", "uniform", Uniform(0.0, 1.0)),
        ("sit", "lognormal", LogNormal(0.0, 1.0)),
        ("digits", "lognormal", LogNormal(-1.2, 1.2)),
        ("digits", "loguniform", LogUniform()),
        ("cifar10-ve", "loguniform", LogUniform(0.02, 100.0)),
        ("cifar10-ve", "lognormal", LogNormal(-1.2, 1.2)),
        ("cifar10-vp", "lognormal", LogNormal(-1.2, 1.2)),
        ("cifar10-ve", "uniform", Uniform(1e-5, 1.0)),
    ],
)
def test_a_recipe_takes_another_distribution_of_noise(
    name: str, distribution: NoiseDistribution, expected: NoiseLevels
) -> None:
    for stratified in (False, True):
        levels = dataclasses.replace(BASES[name].noise_levels, stratified=stratified)
        found = with_noise_distribution(dataclasses.replace(BASES[name], noise_levels=levels), distribution)
        assert found.noise_levels == dataclasses.replace(expected, stratified=stratified)


def test_the_lognormal_distribution_of_a_flow_is_the_logit_normal_one_of_its_times() -> None:
    levels = with_noise_distribution(BASES["sit"], "lognormal").noise_levels
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    expected = torch.sigmoid(torch.distributions.Normal(0.0, 1.0).icdf(u))
    torch.testing.assert_close(levels.quantile(u, RectifiedFlow()), expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["digits", "--noise-distribution", "uniform"], "has no end. Pass lognormal or loguniform"),
        (["digits", "--recipe", "sit", "--noise-levels.start", "0.1"], "or name another --noise-distribution."),
        (["--resume", "--out", "runs/old", "--noise-distribution", "uniform"], "a run continues with its own recipe"),
    ],
)
def test_a_distribution_that_does_not_fit_is_an_error(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", *flags])
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_distribution_is_part_of_the_recipe_that_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--noise-distribution", "uniform", "--noise-levels.start", "0.1", "--noise-levels.stratified"]
    with pytest.raises(SystemExit):
        main(["train", "digits", "--recipe", "sit", *flags, "--print"])
    assert "noise_levels=Uniform(stratified=True, start=0.1, end=1.0)" in capsys.readouterr().out
