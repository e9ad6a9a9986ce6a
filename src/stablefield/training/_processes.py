"""The processes of a training, as torchrun or `accelerate launch` starts them: their set-up, order, and common values."""

from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from stablefield.targets._ranks import Ranks

__all__ = ["first_process_first", "from_first", "start_processes"]

PATIENCE = timedelta(hours=12)
"""How long processes wait for the first one, which may be decoding a large folder, or drawing samples."""

Value = TypeVar("Value")


def start_processes(*, accelerated: bool) -> PartialState:
    """The processes of this program, set up at the first call."""
    return PartialState(cpu=not accelerated, timeout=PATIENCE)


@contextmanager
def first_process_first(state: PartialState) -> Generator[None]:
    """For a block that the first process goes through before the others."""
    wait = "to have the data opened"
    if state.num_processes > 1 and not state.is_main_process:
        with Ranks().waiting(wait):
            state.wait_for_everyone()
    yield
    if state.num_processes > 1 and state.is_main_process:
        with Ranks().waiting(wait):
            state.wait_for_everyone()


def from_first(value: Value) -> Value:
    """What the first process has for `value`, on all of them."""
    if PartialState().num_processes == 1:
        return value
    values = [value]
    with Ranks().waiting("to hear from the first how the run is to be"):
        broadcast_object_list(values)
    return values[0]
