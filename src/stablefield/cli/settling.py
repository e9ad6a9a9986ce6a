"""What a call that trains must know before its flags can be read to the end: the data, and the recipe they suggest."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar

import torch

from stablefield._distributed import Ranks
from stablefield._shapes import found_device
from stablefield.cli.recipes import BY_DATA, RecipeName, chosen, limit
from stablefield.cli.sources import open_data, print_reading
from stablefield.training._recipe import Recipe

__all__ = [
    "Trains",
    "chooses",
    "pick_device",
    "settled",
]


class Trains(Protocol):
    """A verb that trains: its flags, as far as they decide about data and recipe."""

    @property
    def data(self) -> str: ...  # noqa: D102
    @property
    def recipe(self) -> RecipeName: ...  # noqa: D102
    @property
    def resolution(self) -> int | None: ...  # noqa: D102
    @property
    def resize(self) -> Literal["crop", "squash"]: ...  # noqa: D102
    @property
    def skip_broken(self) -> bool: ...  # noqa: D102
    @property
    def device(self) -> str: ...  # noqa: D102
    @property
    def opened(self) -> Any: ...  # noqa: D102
    def check(self) -> None: ...  # noqa: D102


Call = TypeVar("Call", bound=Trains)


def chooses(call: Trains) -> bool:
    """Whether the recipe waits for the data."""
    return bool(call.data) and call.recipe in BY_DATA and not getattr(call, "resume", False)


def settled(call: Call, parse: Callable[[Recipe], Call]) -> Call:
    """The call with its data open and the recipe that they suggest, if none was named, under its flags.

    Args:
        call: the verb as it was read.
        parse: reads the command line on top of a recipe.

    Raises:
        ValueError: if the data are missing or cannot be opened.
    """
    if not call.data:
        raise ValueError("DATA is missing: name what to train on, such as: stablefield train digits.")
    device = pick_device(call.device)
    accelerated = device.type == "cuda"
    bound = None if call.resolution else limit(call.recipe, accelerated=accelerated)
    ranks = Ranks.launched(device)
    with ranks.rank_0_first("to open the data"):
        if ranks.first:
            call.check()
        data = open_data(call.data, call.resolution, call.resize, "train", call.skip_broken, bound)
    if ranks.first:
        print_reading(data)
    name: str = call.recipe
    if chooses(call):
        wanted = "digits" if call.data == "digits" and call.recipe == "auto" else call.recipe
        name, recipe = chosen(wanted, data, accelerated=accelerated)
        call = parse(recipe)
    return dataclasses.replace(call, recipe=name, opened=data)  # pyright: ignore[reportArgumentType]


def pick_device(name: str) -> torch.device:
    """The device called `name`, or a GPU if there is one (this process's own, where there are several), else the CPU.

    Raises:
        ValueError: if it cannot be used.
    """
    try:
        device = torch.device(name) if name else found_device(None)
        if name.startswith("cuda:"):
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except Exception as error:  # whatever the device's own package raises
        raise ValueError(
            f"--device {name} cannot be used here: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    if device.type == "meta":
        raise ValueError(f"--device {name} cannot be used here: it holds no numbers.")
    return device
