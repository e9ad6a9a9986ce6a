"""The verbs and their flags, from the dataclasses that carry them out."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
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
from stablefield.cli.recipes import RECIPES, with_fewer_levels, yielding
from stablefield.cli.sample import Sample
from stablefield.cli.settling import chooses, settled
from stablefield.cli.train import Train
from stablefield.training._recipe import Recipe
from stablefield.training._recipes import DIGITS, imagefolder, unet2d

__all__ = ["UNET", "VERBS", "Verb", "base_of", "parse"]

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

Kind = TypeVar("Kind", Train, Compare)

_CONFIG = (tyro.conf.AvoidSubcommands,)


class Verb(Protocol):
    """A verb with its flags filled in."""

    def run(self) -> int:
        """Do it, and return the exit status."""
        ...


def parse(arguments: Sequence[str]) -> Verb:
    """Read the command line.

    Raises:
        ValueError: if it is wrong, with what is.
    """
    given = _given(arguments)
    base, notes = yielding(base_of(arguments), given)
    verb, unknown = _read(arguments, base)
    # Which flags there are depends on the recipe, so what is unknown here may be known when it is chosen.
    if unknown and not (isinstance(verb, Train | Compare) and chooses(verb)):
        raise ValueError(_foreign(unknown, base))
    if isinstance(verb, Train):
        verb = dataclasses.replace(verb, yields=notes)
        return _fitted(verb.settled(lambda recipe: _again(Train, arguments, recipe), base), given)
    if isinstance(verb, Compare):
        verb = dataclasses.replace(verb, yields=notes)
        return _fitted(settled(verb, lambda recipe: _again(Compare, arguments, recipe)), given)
    return verb


def base_of(arguments: Sequence[str]) -> Recipe:
    """The recipe whose flags a command line is read with first."""
    flat = not {"--network.width", "--network.depth"}.isdisjoint(_given(arguments))
    name = _recipe_name(arguments)
    if name == "unet2d":
        return unet2d((3, 32, 32), 10_000, accelerated=False)
    return RECIPES.get(name, DIGITS if flat else UNET)


def _again(kind: type[Kind], arguments: Sequence[str], recipe: Recipe) -> Kind:
    base, notes = yielding(recipe, _given(arguments))
    verb, unknown = _read(arguments, base)
    if unknown:
        raise ValueError(_foreign(unknown, base))
    assert isinstance(verb, kind)
    return dataclasses.replace(verb, yields=notes)


def _fitted(verb: Kind, given: Mapping[str, Sequence[str]]) -> Kind:
    if verb.opened is None:
        return verb
    recipe, notes = with_fewer_levels(verb.config, verb.opened.shape, given)
    return dataclasses.replace(verb, config=recipe, yields=(*verb.yields, *notes))


def _given(arguments: Sequence[str]) -> dict[str, list[str]]:
    """The flags of a command line, each with what stands behind it up to the next."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for word in arguments:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            values = found[name.replace("_", "-")] = [value] if equals else []
        else:
            values.append(word)
    return found


def _foreign(unknown: Sequence[str], recipe: Recipe) -> str:
    """What to say of flags that other recipes have."""
    flags = [word.partition("=")[0] for word in unknown if word.startswith("--")] or list(unknown)
    part = flags[0].removeprefix("--").partition(".")[0].replace("-", "_")
    kind = getattr(recipe, part, None)
    if kind is None:
        return f"{' and '.join(flags)} cannot be used here: stablefield --help tells what there is."
    names = [f"--{part.replace('_', '-')}.{field.name.replace('_', '-')}" for field in dataclasses.fields(kind)]
    own = f"its flags are {', '.join(names)}" if names else "it has no flags"
    chosen = type(kind).__name__.removesuffix("Config")
    return (
        f"{' and '.join(flags)}: the recipe that was chosen has {chosen} for its {part.replace('_', ' ')}, and "
        f"{own}. Leave the flag out, or name another --recipe."
    )


def _read(arguments: Sequence[str], recipe: Recipe) -> tuple[Verb, list[str]]:
    """The verb and the flags that it does not know.

    Raises:
        ValueError: if a value does not fit.
    """
    told = io.StringIO()
    try:
        # What the parser says is a box; a message of this command is a paragraph.
        with contextlib.redirect_stderr(told):
            return tyro.cli(  # pyright: ignore[reportCallIssue]
                _verbs(arguments[0], recipe),  # pyright: ignore[reportArgumentType]
                prog="stablefield",
                args=list(arguments),
                config=_CONFIG,
                return_unknown_args=True,
                add_help=False,
            )
    except SystemExit:
        raise ValueError(_paragraph(told.getvalue())) from None


def _paragraph(box: str) -> str:
    """The words of a box, without its frame and title, up to its first rule."""
    lines = [line.strip(" │|") for line in box.splitlines()]
    said: list[str] = []
    for line in lines[1:]:
        if re.fullmatch(r"[-─╭╮╰╯ ]*", line):
            if said:
                break
            continue
        said.append(line)
    text = " ".join(said) or " ".join(lines)
    return re.sub(r"^Error parsing (?:__tyro-dummy-inner__\.)?(?:config\.)?(?:--)?([\w.-]+): ", r"--\1: ", text)


def _verbs(name: str, recipe: Recipe) -> object:
    """What the parser reads a verb with; it makes no more of the other verbs than it must, which takes it a while."""
    other = "ema" if name == "doctor" else "doctor"
    defaults = {"train": Train(config=recipe), "compare": Compare(config=recipe)}
    kinds = [
        Annotated[VERBS[verb], tyro.conf.subcommand(verb, default=defaults[verb])]
        if verb in defaults
        else Annotated[VERBS[verb], tyro.conf.subcommand(verb)]
        for verb in (name, other)
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
