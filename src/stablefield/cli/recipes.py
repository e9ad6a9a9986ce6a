"""Recipes by name, and the choice where none is named."""

import pprint
from typing import Literal

from stablefield.data.image_set import ImageSet
from stablefield.training.recipe import Recipe
from stablefield.training.recipes import (
    CELEBA64_VE,
    CIFAR10_EDM,
    CIFAR10_VE,
    CIFAR10_VP,
    DIGITS,
    MNIST28,
    imagefolder,
    unet2d,
)

__all__ = ["BY_DATA", "RECIPES", "RecipeName", "chosen", "limit", "shown"]

RecipeName = Literal[
    "auto", "digits", "mnist28", "cifar10-edm", "cifar10-ve", "cifar10-vp", "celeba64-ve", "imagefolder", "unet2d"
]

RECIPES = {
    "digits": DIGITS,
    "mnist28": MNIST28,
    "cifar10-edm": CIFAR10_EDM,
    "cifar10-ve": CIFAR10_VE,
    "cifar10-vp": CIFAR10_VP,
    "celeba64-ve": CELEBA64_VE,
}


BY_DATA = ("auto", "imagefolder", "unet2d")
"""Those that wait for the data."""


def limit(name: RecipeName, *, accelerated: bool) -> int | None:
    """The largest resolution that a recipe chooses by itself."""
    if name in (*BY_DATA, "celeba64-ve"):
        return 64 if accelerated or name == "celeba64-ve" else 32
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
