"""The recipe of a call that trains: the named one, or one that suits the data, with the flags of the command line.

The flags depend on the recipe, and the recipe may depend on the data. So read the verb's own flags first, then open the
data, then read the recipe's flags with the recipe as default.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro

from stablefield.cli.parser import given, parse_resolution, read
from stablefield.cli.sources import DataFlags, print_classes, print_reading
from stablefield.data._colour import background_name
from stablefield.data._image_set import ImageSet
from stablefield.diffusion._noise_levels import LogUniform
from stablefield.diffusion._process import VE
from stablefield.training._plan import place
from stablefield.training._recipe import DiffusersUNetConfig, Recipe, SongUNetConfig
from stablefield.training._recipes import (
    RECIPES,
    NoiseDistribution,
    imagefolder,
    largest_resolution,
    named_recipe,
    sit,
    unet2d,
    with_noise_distribution,
)
from stablefield.training._weight_source import WeightSource, side_of

__all__ = ["BASES", "Chosen", "RecipeFlags", "TrainingFlags", "base_of"]

BASES = {
    "imagefolder": imagefolder((3, 32, 32), 10_000, accelerated=False),
    **RECIPES,
    "unet2d": unet2d((3, 32, 32), 10_000, accelerated=False),
    "sit": sit((3, 32, 32), 10_000, accelerated=False),
}
"""The recipes by name; those that depend on the data, for typical data."""

RecipeName = str
if not TYPE_CHECKING:  # the command's choices
    RecipeName = Literal[("auto", *RECIPES, "imagefolder", "unet2d", "sit")]


def base_of(name: str, data: str) -> Recipe:
    """A stand-in for the recipe before the data are open.

    Args:
        name: name of the recipe.
        data: value of DATA.
    """
    return BASES.get("digits" if name == "auto" and data == "digits" else name, BASES["imagefolder"])


@dataclass(frozen=True)
class RecipeFlags:
    """The flags of a command line that change a recipe, such as ("--steps", "300")."""

    words: tuple[str, ...] = ()

    def check(self, name: str, base: Recipe) -> None:
        """Check the flags before the data are open, as far as possible.

        Args:
            name: name of the recipe.
            base: the recipe, or a stand-in for it.

        Raises:
            ValueError: if a value is wrong, or the named recipe has no such flag.
        """
        _, unknown = read(Recipe, self.words, yielding(base, given(self.words))[0])
        if unknown and name in RECIPES:
            raise ValueError(_foreign(unknown, base))

    def on(self, recipe: Recipe, shape: tuple[int, ...] | None = None) -> tuple[Recipe, tuple[str, ...]]:
        """The recipe with these flags, and a line for each default that gives way to one.

        Args:
            recipe: the settings without flags.
            shape: shape of the images if --resolution resized them, else None.

        Raises:
            ValueError: if the recipe has no such flag, or a value does not fit.
        """
        flags = given(self.words)
        base, notes = yielding(recipe, flags)
        found, unknown = read(Recipe, self.words, base)
        if unknown:
            raise ValueError(_foreign(unknown, base))
        if shape is not None:
            found, fewer = with_fewer_levels(found, shape, flags)
            notes = (*notes, *fewer)
        return found, notes


@dataclass(frozen=True)
class TrainingFlags(DataFlags):
    """The flags of a verb that trains."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA", help_behavior_hint="")] = ""
    recipe: RecipeName = "auto"
    """Which settings to start from; the flags below change them. auto chooses one for the data."""
    noise_distribution: NoiseDistribution = "recipe"
    """Distribution of the training noise levels: lognormal (with EDM's numbers; logit-normal times in a flow), loguniform
    (VE's), uniform times, or the recipe's own. Flags such as --noise-levels.mean set its numbers."""
    device: str = ""
    """Where to compute, such as cpu or cuda; by default a GPU if there is one."""
    config: tyro.conf.Suppress[RecipeFlags] = RecipeFlags()
    """Flags that change the recipe."""

    def check(self) -> None:
        """Check the flags and the packages before reading the data.

        Raises:
            ValueError: naming the flag.
            ImportError: if a package is missing.
        """
        parse_resolution(self.resolution)
        background_name(self.background)
        base = with_noise_distribution(base_of(self.recipe, self.data), self.noise_distribution)
        self.config.check(self.recipe, base)

    def chosen(self, source: WeightSource | None = None) -> "Chosen":
        """Open the data, and apply the flags to the recipe that --recipe names or that suits them.

        Args:
            source: the source of the first weights, whose recipe is the default if it is a run's.

        Raises:
            ValueError: if the data are missing or cannot be opened, or a flag does not fit.
        """
        if not self.data:
            raise ValueError("DATA is missing: name the training data, such as: stablefield train digits.")
        device, ranks = place(self.device or None)
        accelerated = device.type == "cuda"
        with ranks.rank_0_first("to open the data"):
            if ranks.first:
                self.check()
            side = side_of(source) if self.recipe == "auto" else None
            data = self.open(limit=side or largest_resolution(self.recipe, accelerated=accelerated))
        print_reading(data)
        theirs = source.recipe_for(data) if source is not None and self.recipe == "auto" else None
        if source is not None and theirs is not None:
            name, base = f"that of {source.path}", theirs
        else:
            name, base = named_recipe(self.recipe, data, accelerated=accelerated)
        base = with_noise_distribution(base, self.noise_distribution)
        recipe, notes = self.config.on(base, data.shape if self.resolution else None)
        print_classes(data, conditional=recipe.conditional)
        return Chosen(data, name, base, recipe, notes, device)


@dataclass(frozen=True)
class Chosen:
    """The data and the recipe of a call that trains.

    Attributes:
        data: the images.
        name: name of the recipe.
        base: the recipe of that name.
        recipe: the same with the flags.
        notes: further changes to it because of the flags, a line each.
        device: where to compute.
    """

    data: ImageSet
    name: str
    base: Recipe
    recipe: Recipe
    notes: tuple[str, ...]
    device: torch.device


def _foreign(unknown: Sequence[str], recipe: Recipe) -> str:
    """The error for flags that only other recipes have."""
    flags = [word.partition("=")[0] for word in unknown if word.startswith("--")] or list(unknown)
    part = flags[0].removeprefix("--").partition(".")[0].replace("-", "_")
    kind = getattr(recipe, part, None)
    if kind is None:
        return f"{' and '.join(flags)} cannot be used here: stablefield --help lists the verbs and their flags."
    names = [f"--{part.replace('_', '-')}.{field.name.replace('_', '-')}" for field in dataclasses.fields(kind)]
    own = f"its flags are {', '.join(names)}" if names else "it has no flags"
    chosen = type(kind).__name__.removesuffix("Config")
    other = "name another --noise-distribution" if part == "noise_levels" else "name another --recipe"
    return (
        f"{' and '.join(flags)}: the chosen recipe has {chosen} for its {part.replace('_', ' ')}, and "
        f"{own}. Leave the flag out, or {other}."
    )


def yielding(recipe: Recipe, flags: Mapping[str, Sequence[str]]) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe without the defaults that conflict with the given flags, and a line for each change.

    Args:
        recipe: the recipe to change.
        flags: the flags of the command line with their values.
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

    if "--mirror" in flags and "--augmentation" not in flags and recipe.augmentation:
        change("--mirror", "augmentation", 0.0, "the augmentation mirrors images itself")
    if "--antithetic" in flags and "--draws-per-image" not in flags and recipe.draws_per_image % 2:
        change("--antithetic", "draws_per_image", 2 * recipe.draws_per_image, "the draws of an image come in pairs")
    references = _number(flags.get("--references"))
    draws = int(_number(flags.get("--draws-per-image")) or found.draws_per_image)
    fewer = references is not None and 0 < references * draws < recipe.batch and references % 1 == 0
    if references and fewer and "--batch" not in flags and flags.get("--target", [recipe.target]) == ["stf"]:
        change("--references", "batch", int(references) * draws, "every image of a batch is among its references")
    widths = [_number([width]) or 0.0 for width in flags.get("--network.widths", ())]
    if (
        isinstance(recipe.network, DiffusersUNetConfig)
        and "--network.groups" not in flags
        and all(w % 1 == 0 < w for w in widths)
    ):
        groups = math.gcd(recipe.network.groups, *map(int, widths))
        if groups != recipe.network.groups:
            change("--network.widths", "network.groups", groups, "each width is a multiple of the groups")
    if isinstance(recipe.process, VE) and isinstance(recipe.noise_levels, LogUniform):
        ends = (("process.sigma-min", "noise_levels.minimum"), ("process.sigma-max", "noise_levels.maximum"))
        for process, level in ends:
            here, there = f"--{process}", f"--{level.replace('_', '-')}"
            value, other = _number(flags.get(here)), _number(flags.get(there))
            if value and there not in flags and _ordered(found.noise_levels, level, value):
                change(here, level, value, "the process has no noise levels beyond it")
            elif other and here not in flags and _ordered(found.process, process, other):
                change(there, process.replace("-", "_"), other, "the process has to reach that noise level")
    return found, tuple(notes)


def with_fewer_levels(
    recipe: Recipe, shape: tuple[int, ...], flags: Mapping[str, Sequence[str]]
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with as many levels of its U-Net as fit the resolution, and a line if that removes some.

    Args:
        recipe: the recipe with the flags applied.
        shape: shape of the images.
        flags: the flags of the command line.
    """
    network = recipe.network
    if not isinstance(network, SongUNetConfig | DiffusersUNetConfig):
        return recipe, ()
    flag, name = (
        ("--network.multipliers", "multipliers")
        if isinstance(network, SongUNetConfig)
        else ("--network.widths", "widths")
    )
    sizes: Sequence[int] = getattr(network, name)
    fitting = 1 + min((side & -side).bit_length() - 1 for side in shape[1:])
    if flag in flags or fitting >= len(sizes) or "--network.attention" in flags:
        return recipe, ()
    changes: dict[str, Any] = {name: tuple(sizes[:fitting])}
    fewer = dataclasses.replace(network, **changes)
    size = str(shape[-1]) if shape[-2] == shape[-1] else f"{shape[-2]}x{shape[-1]}"
    note = (
        f"--resolution {size} wins over the recipe's {flag} {' '.join(map(str, sizes))}, which is "
        f"{' '.join(map(str, sizes[:fitting]))} now: {size} can be halved {fitting - 1} times."
    )
    return dataclasses.replace(recipe, network=fewer), (note,)


def _number(values: Sequence[str] | None) -> float | None:
    try:
        return float(values[0]) if values else None
    except ValueError:
        return None


def _ordered(part: Any, name: str, value: float) -> bool:
    """Whether `value` for one end of an interval is on the right side of the other end."""
    low, high = (getattr(part, field.name) for field in dataclasses.fields(part) if field.name != "stratified")
    return 0 < value < high if name.endswith(("minimum", "sigma-min")) else low < value < math.inf
