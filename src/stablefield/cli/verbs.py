"""The verbs and their flags, from the dataclasses that carry them out."""

from collections.abc import Sequence
from typing import Annotated, Protocol

import tyro

from stablefield.cli.bench import Bench
from stablefield.cli.data import Data
from stablefield.cli.doctor import Doctor
from stablefield.cli.sample import Sample
from stablefield.cli.train import RECIPES, Train

__all__ = ["Verb", "parse"]


class Verb(Protocol):
    """A verb with its flags filled in."""

    def run(self) -> int:
        """Do it, and return the exit status."""
        ...


def parse(arguments: Sequence[str]) -> Verb:
    """Read the command line; wrong use exits with status 2 and says what is wrong."""
    train = Train(config=RECIPES[_recipe_name(arguments)])
    verbs = (
        Annotated[Train, tyro.conf.subcommand("train", default=train)]
        | Annotated[Sample, tyro.conf.subcommand("sample")]
        | Annotated[Data, tyro.conf.subcommand("data")]
        | Annotated[Bench, tyro.conf.subcommand("bench")]
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
    # The recipe decides the other flags' defaults, so it is read before them.
    for place, argument in enumerate(arguments):
        name = argument.partition("=")[2] if argument.startswith("--recipe=") else ""
        if argument == "--recipe" and place + 1 < len(arguments):
            name = arguments[place + 1]
        if name in RECIPES:
            return name
    return "digits"
