"""Checks: what every row of an argument must meet, looked at together, since on a GPU every look waits for the device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Check", "each", "finite", "require"]


@dataclass(frozen=True)
class Check:
    """A condition on the rows of an argument.

    Attributes:
        holds: for which rows it holds, bool (B,).
        tell: the message for one for which it does not.
    """

    holds: Tensor
    tell: Callable[[int], str]


def each(holds: Tensor, name: str, value: Tensor, rule: str) -> Check:
    """That `holds` (B,) is true for every `value` (B,) of the argument `name`; `rule` says what it means."""
    return Check(holds, lambda row: f"{name}[{row}] is {value[row].item():g}: {rule}.")


def finite(squares: Tensor, name: str) -> Check:
    """That the squared norms (B,) of the rows of `name` are finite, and so the rows, too.

    They are needed anyway, or made in one pass without a copy, which a look at every number is not.
    """
    return Check(
        squares.isfinite(),
        lambda row: f"{name}[{row}] holds NaN or inf (or overflows when squared): clean the data first.",
    )


def require(*checks: Check) -> None:
    """Look once whether all `checks` hold.

    Raises:
        ValueError: for the first row of the first check that does not.
    """
    if bool(torch.stack([check.holds.all() for check in checks]).all()):
        return
    for check in checks:
        failing = (~check.holds).nonzero()
        if len(failing):
            raise ValueError(check.tell(int(failing[0, 0])))
