"""Checks: what every row of an argument must meet, looked at together, since on a GPU every look waits for the device."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield.shapes import check_tensor, is_integer

__all__ = ["Check", "finite_check", "require", "row_numbers", "to_host", "value_check"]


@dataclass(frozen=True)
class Check:
    """A condition on the rows of an argument.

    Args:
        holds: for which rows it holds, bool (B,); of one number if the condition is on the whole batch.
        tell: the message for one for which it does not.
        warning: whether a failure is a warning, and not an error.
    """

    holds: Tensor
    tell: Callable[[int], str]
    warning: bool = False


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
    """Look once whether all `checks` hold.

    Raises:
        ValueError: for the first row of the first check that does not.

    Warns:
        UserWarning: for the first row of each check that does not and is a warning.
    """
    if not checks or bool(torch.stack([check.holds.all() for check in checks]).all()):
        return
    for check in sorted(checks, key=lambda check: check.warning):
        failing = (~check.holds).nonzero()
        if len(failing):
            message = check.tell(int(failing[0, 0]))
            if not check.warning:
                raise ValueError(message)
            warnings.warn(message, UserWarning, stacklevel=4)  # the call of a target


def to_host(*values: Tensor | None) -> list[Tensor | None]:
    """Bring rows of numbers (B,) to the host in one transfer, for which a GPU is waited for once."""
    given = [value for value in values if value is not None]
    device = given[0].device
    if device.type == "cpu":
        return list(values)
    if device.type == "mps":  # which has no format that holds all of them
        return [None if value is None else value.cpu() for value in values]
    # One conversion for each dtype, and not for each value.
    dtypes = list(dict.fromkeys(value.dtype for value in given))
    parts = [torch.stack([value for value in given if value.dtype == dtype]).double() for dtype in dtypes]
    rows = dict(
        zip(dtypes, (iter(part) for part in torch.cat(parts).cpu().split([len(part) for part in parts])), strict=True)
    )
    return [None if value is None else next(rows[value.dtype]).to(value.dtype) for value in values]


def row_numbers(name: str, value: Tensor, x: Tensor) -> Tensor:
    """Check that the argument `name` is one integer per row of the batch `x` (B, ...), and return it.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if its shape, dtype or device do not fit.
    """
    check_tensor(name, value)
    if value.shape != x.shape[:1] or not is_integer(value.dtype):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}: pass one integer per row, shape ({len(x)},)."
        )
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, the batch is on {x.device}: move one of them.")
    return value
