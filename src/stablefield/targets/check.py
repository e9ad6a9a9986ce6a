"""Checks: what every row of an argument must meet, looked at together, since on a GPU every look waits for the device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Check", "finite_check", "require", "value_check"]


@dataclass(frozen=True)
class Check:
    """A condition on the rows of an argument.

    Args:
        holds: for which rows it holds, bool (B,).
        tell: the message for one for which it does not.
    """

    holds: Tensor
    tell: Callable[[int], str]


def value_check(holds: Tensor, name: str, value: Tensor, rule: str) -> Check:
    """A check of the argument `name`, whose `value` (B,) meets the `rule` where `holds` (B,) is true."""
    return Check(holds, lambda row: f"{name}[{row}] is {value[row].item():g}: {rule}.")


def finite_check(squares: Tensor, name: str) -> Check:
    """A check that the rows of the argument `name` are finite, by their squared norms `squares` (B,)."""
    return Check(
        squares.isfinite(),
        lambda row: f"{name}[{row}] holds NaN or inf (or overflows when squared): clean the data first.",
    )


def require(*checks: Check) -> None:
    """Look once whether all `checks` (at least one) hold.

    Raises:
        ValueError: for the first row of the first check that does not.
    """
    if bool(torch.stack([check.holds.all() for check in checks]).all()):
        return
    for check in checks:
        failing = (~check.holds).nonzero()
        if len(failing):
            raise ValueError(check.tell(int(failing[0, 0])))
