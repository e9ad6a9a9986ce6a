"""The verbs and their flags, from the dataclasses that carry them out."""

from collections.abc import Sequence
from typing import Annotated, Protocol, TypeVar, Union

import tyro

from stablefield.cli.bench import Bench
from stablefield.cli.compare import Compare
from stablefield.cli.data import Data
from stablefield.cli.doctor import Doctor
from stablefield.cli.ema import Ema
from stablefield.cli.evaluate import Evaluate
from stablefield.cli.export import Export
from stablefield.cli.importing import Import
from stablefield.cli.probe import Probe
from stablefield.cli.recipes import RECIPES
from stablefield.cli.sample import Sample
from stablefield.cli.settling import chooses, settled
from stablefield.cli.train import Train
from stablefield.training.recipe import Recipe
from stablefield.training.recipes import DIGITS, imagefolder

__all__ = ["UNET", "VERBS", "Verb", "parse"]

UNET = imagefolder((3, 32, 32), 10_000, accelerated=False)
"""What the help shows where the data are not known yet."""

VERBS: dict[str, type] = {
    "train": Train,
    "compare": Compare,
    "sample": Sample,
    "ema": Ema,
    "evaluate": Evaluate,
    "probe": Probe,
    "bench": Bench,
    "data": Data,
    "export": Export,
    "import": Import,
    "doctor": Doctor,
}
"""The verbs by name."""

Kind = TypeVar("Kind")

_DESCRIPTION = "Low-variance training targets for diffusion and flow models, and a trainer that uses them."
_CONFIG = (tyro.conf.AvoidSubcommands,)


class Verb(Protocol):
    """A verb with its flags filled in."""

    def run(self) -> int:
        """Do it, and return the exit status."""
        ...


def parse(arguments: Sequence[str]) -> Verb:
    """Read the command line; wrong use exits with status 2 and says what is wrong."""
    flat = any(argument.startswith(("--network.width", "--network.depth")) for argument in arguments)
    base = RECIPES.get(_recipe_name(arguments), DIGITS if flat else UNET)
    verb, unknown = _read(arguments, base)
    # Which flags there are depends on the recipe, so what is unknown here may be known when it is chosen.
    if unknown and not (isinstance(verb, Train | Compare) and chooses(verb)):
        verb = _parse(arguments, base)
    if isinstance(verb, Train):
        return verb.settled(lambda recipe: _again(Train, arguments, recipe), base)
    if isinstance(verb, Compare):
        return settled(verb, lambda recipe: _again(Compare, arguments, recipe))
    return verb


def _again(kind: type[Kind], arguments: Sequence[str], recipe: Recipe) -> Kind:
    verb = _parse(arguments, recipe)
    assert isinstance(verb, kind)
    return verb


def _parse(arguments: Sequence[str], recipe: Recipe) -> Verb:
    return tyro.cli(  # pyright: ignore[reportCallIssue]
        _verbs(recipe),  # pyright: ignore[reportArgumentType]
        prog="stablefield",
        description=_DESCRIPTION,
        args=list(arguments),
        config=_CONFIG,
    )


def _read(arguments: Sequence[str], recipe: Recipe) -> tuple[Verb, list[str]]:
    """The verb and the flags that it does not know."""
    return tyro.cli(  # pyright: ignore[reportCallIssue]
        _verbs(recipe),  # pyright: ignore[reportArgumentType]
        prog="stablefield",
        description=_DESCRIPTION,
        args=list(arguments),
        config=_CONFIG,
        return_unknown_args=True,
    )


def _verbs(recipe: Recipe) -> object:
    defaults = {"train": Train(config=recipe), "compare": Compare(config=recipe)}
    kinds = [
        Annotated[kind, tyro.conf.subcommand(name, default=defaults[name])]
        if name in defaults
        else Annotated[kind, tyro.conf.subcommand(name)]
        for name, kind in VERBS.items()
    ]
    return Union[tuple(kinds)]  # noqa: UP007


def _recipe_name(arguments: Sequence[str]) -> str:
    """The recipe, which decides the other flags' defaults and is so read before them."""
    for place, argument in enumerate(arguments):
        if argument.startswith("--recipe="):
            return argument.partition("=")[2]
        if argument == "--recipe" and place + 1 < len(arguments):
            return arguments[place + 1]
    return "digits" if "digits" in arguments or len(arguments) < 2 else "auto"
