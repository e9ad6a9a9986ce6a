"""The verbs and their flags, from the dataclasses that carry them out."""

from collections.abc import Sequence
from typing import Annotated, Protocol

import tyro

from stablefield.cli.data import Data
from stablefield.cli.doctor import Doctor
from stablefield.cli.ema import Ema
from stablefield.cli.evaluate import Evaluate
from stablefield.cli.export import Export
from stablefield.cli.importing import Import
from stablefield.cli.probe import Probe
from stablefield.cli.recipes import RECIPES
from stablefield.cli.sample import Sample
from stablefield.cli.train import Train
from stablefield.training.recipe import Recipe
from stablefield.training.recipes import DIGITS, imagefolder

__all__ = ["Verb", "parse"]

UNET = imagefolder((3, 32, 32), 10_000, accelerated=False)
"""What the help shows where the data are not known yet."""


class Verb(Protocol):
    """A verb with its flags filled in."""

    def run(self) -> int:
        """Do it, and return the exit status."""
        ...


def parse(arguments: Sequence[str]) -> Verb:
    """Read the command line; wrong use exits with status 2 and says what is wrong."""
    base = RECIPES.get(_recipe_name(arguments), UNET if _recipe_name(arguments) == "imagefolder" else DIGITS)
    verb = _parse(arguments, base)
    if not isinstance(verb, Train):
        return verb

    def again(recipe: Recipe) -> Train:
        read = _parse(arguments, recipe)
        assert isinstance(read, Train)
        return read

    return verb.settled(again, base)


def _parse(arguments: Sequence[str], recipe: Recipe) -> Verb:
    train = Train(config=recipe)
    verbs = (
        Annotated[Train, tyro.conf.subcommand("train", default=train)]
        | Annotated[Sample, tyro.conf.subcommand("sample")]
        | Annotated[Ema, tyro.conf.subcommand("ema")]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Probe, tyro.conf.subcommand("probe")]
        | Annotated[Data, tyro.conf.subcommand("data")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Import, tyro.conf.subcommand("import")]
        | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    )
    return tyro.cli(
        verbs,  # pyright: ignore[reportArgumentType]
        prog="stablefield",
        description="Low-variance training targets for diffusion and flow models, and a trainer that uses them.",
        args=list(arguments),
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
    )


def _recipe_name(arguments: Sequence[str]) -> str:
    """The recipe, which decides the other flags' defaults and is so read before them."""
    for place, argument in enumerate(arguments):
        if argument.startswith("--recipe="):
            return argument.partition("=")[2]
        if argument == "--recipe" and place + 1 < len(arguments):
            return arguments[place + 1]
    # Not named: it is chosen by the data, and all but the digits are for a U-Net.
    return "digits" if "digits" in arguments or len(arguments) < 2 else "imagefolder"
