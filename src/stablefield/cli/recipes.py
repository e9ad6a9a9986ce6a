"""Recipes by name, and the choice where none is named."""

import dataclasses
import math
import pprint
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from stablefield.data._image_set import ImageSet
from stablefield.diffusion._noise_levels import LogUniform
from stablefield.diffusion._process import VE
from stablefield.training._recipe import DiffusersUNetConfig, Recipe, SongUNetConfig
from stablefield.training._recipes import (
    CELEBA64_VE,
    CIFAR10_EDM,
    CIFAR10_VE,
    CIFAR10_VP,
    DIGITS,
    MNIST28,
    imagefolder,
    largest_resolution,
    unet2d,
)

__all__ = ["BY_DATA", "RECIPES", "RecipeName", "chosen", "limit", "shown", "with_fewer_levels", "yielding"]

RECIPES = {
    "digits": DIGITS,
    "mnist28": MNIST28,
    "cifar10-edm": CIFAR10_EDM,
    "cifar10-ve": CIFAR10_VE,
    "cifar10-vp": CIFAR10_VP,
    "celeba64-ve": CELEBA64_VE,
}
"""The recipes by name. A new one is listed here."""

BY_DATA = ("auto", "imagefolder", "unet2d")
"""Those that wait for the data."""

RecipeName = str
if not TYPE_CHECKING:  # what the command offers
    RecipeName = Literal[("auto", *RECIPES, *BY_DATA[1:])]


def limit(name: RecipeName, *, accelerated: bool) -> int | None:
    """The largest resolution that a recipe chooses by itself."""
    if name in (*BY_DATA, "celeba64-ve"):
        return largest_resolution(accelerated=accelerated or name == "celeba64-ve")
    return 32 if name.startswith("cifar10") else None


def chosen(name: RecipeName, data: ImageSet, *, accelerated: bool) -> tuple[str, Recipe]:
    """The recipe called `name` with its name; for those of `BY_DATA` as the data suggest."""
    if name == "auto" and data.shape == (1, 28, 28):
        name = "mnist28"
    if name in RECIPES:
        return name, RECIPES[name]
    if name == "unet2d":
        return name, unet2d(data.shape, len(data), accelerated=accelerated)
    return "imagefolder", imagefolder(data.shape, len(data), accelerated=accelerated)


def shown(recipe: Recipe) -> str:
    """A recipe as Python that makes it."""
    return pprint.pformat(recipe, width=100, sort_dicts=False)


def yielding(recipe: Recipe, given: Mapping[str, Sequence[str]]) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with those defaults changed that stand against flags that were given, and a line for each change.

    Args:
        recipe: whose defaults yield.
        given: the flags of the command line with their values.
    """
    found, notes = recipe, list[str]()

    def change(flag: str, name: str, value: Any, why: str) -> None:
        nonlocal found
        part, _, field = name.rpartition(".")
        old = getattr(getattr(found, part) if part else found, field)
        inner = dataclasses.replace(getattr(found, part), **{field: value}) if part else value
        found = dataclasses.replace(found, **{part or field: inner})
        label = f"--{name.replace('_', '-')}"
        notes.append(f"{flag} wins over the recipe's {label} {old:g}, which is {value:g} now: {why}.")

    if "--mirror" in given and "--augmentation" not in given and recipe.augmentation:
        change("--mirror", "augmentation", 0.0, "the augmentation mirrors images itself")
    references = _number(given.get("--references"))
    fewer = references is not None and 0 < references < recipe.batch and references % 1 == 0
    if references and fewer and "--batch" not in given and given.get("--target", [recipe.target]) == ["stf"]:
        change("--references", "batch", int(references), "every image of a batch is among its references")
    widths = [_number([width]) or 0.0 for width in given.get("--network.widths", ())]
    network, whole = recipe.network, all(width % 1 == 0 < width for width in widths)
    if isinstance(network, DiffusersUNetConfig) and "--network.groups" not in given and whole:
        groups = math.gcd(network.groups, *map(int, widths))
        if groups != network.groups:
            change("--network.widths", "network.groups", groups, "each width is a multiple of the groups")
    if isinstance(recipe.process, VE) and isinstance(recipe.noise_levels, LogUniform):
        ends = (("process.sigma-min", "noise_levels.minimum"), ("process.sigma-max", "noise_levels.maximum"))
        for process, level in ends:
            here, there = f"--{process}", f"--{level.replace('_', '-')}"
            value, other = _number(given.get(here)), _number(given.get(there))
            if value and there not in given and _ordered(found.noise_levels, level, value):
                change(here, level, value, "the process has no noise levels beyond it")
            elif other and here not in given and _ordered(found.process, process, other):
                change(there, process.replace("-", "_"), other, "the process has to reach that noise level")
    return found, tuple(notes)


def with_fewer_levels(
    recipe: Recipe, shape: tuple[int, int, int], given: Mapping[str, Sequence[str]]
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with no more levels of its U-Net than fit the resolution that was given, and a line if they are fewer.

    Args:
        recipe: with the flags applied.
        shape: of the images.
        given: the flags of the command line.
    """
    network = recipe.network
    if "--resolution" not in given or not isinstance(network, SongUNetConfig | DiffusersUNetConfig):
        return recipe, ()
    flag, name = (
        ("--network.multipliers", "multipliers")
        if isinstance(network, SongUNetConfig)
        else ("--network.widths", "widths")
    )
    sizes: Sequence[int] = getattr(network, name)
    fitting = 1 + min((side & -side).bit_length() - 1 for side in shape[1:])
    if flag in given or fitting >= len(sizes) or "--network.attention" in given:
        return recipe, ()
    fewer = dataclasses.replace(network, **{name: tuple(sizes[:fitting])})
    note = (
        f"--resolution {shape[-1]} wins over the recipe's {flag} {' '.join(map(str, sizes))}, which is "
        f"{' '.join(map(str, sizes[:fitting]))} now: {shape[-1]} can be halved {fitting - 1} times."
    )
    return dataclasses.replace(recipe, network=fewer), (note,)


def _number(values: Sequence[str] | None) -> float | None:
    try:
        return float(values[0]) if values else None
    except ValueError:
        return None


def _ordered(part: Any, name: str, value: float) -> bool:
    """Whether one end of a part stays on its side of the other end."""
    low, high = (getattr(part, field.name) for field in dataclasses.fields(part) if field.name != "stratified")
    return 0 < value < high if name.endswith(("minimum", "sigma-min")) else low < value < math.inf
