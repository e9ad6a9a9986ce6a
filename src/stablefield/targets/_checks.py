"""Checks of a call's arguments.

Conditions on values are collected and read together, because each read on a GPU makes the host wait.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield._shapes import check_tensor, is_integer
from stablefield._warning import warn

__all__ = ["Check", "check_pair", "finite_check", "require", "row_flags", "row_numbers", "to_host", "value_check"]


@dataclass(frozen=True)
class Check:
    """A condition on the rows of an argument.

    Args:
        holds: the rows for which it holds, bool (B,); a single number if the condition is on the whole batch.
        message: the error for a row that fails it.
        warning: whether a failure is a warning instead of an error.
    """

    holds: Tensor
    message: Callable[[int], str]
    warning: bool = False


def value_check(holds: Tensor, name: str, value: Tensor, rule: str) -> Check:
    """A check of the argument `name`: its `value` (B,) meets the `rule` in rows where `holds` (B,) is true."""
    return Check(holds, lambda row: f"{name}[{row}] is {value[row].item():g}: {rule}.")


def finite_check(squares: Tensor, name: str) -> Check:
    """A check that the rows of the argument `name` are finite, by their squared norms `squares` (B,)."""
    return Check(
        squares.isfinite(),
        lambda row: f"{name}[{row}] holds NaN or inf (or overflows when squared): clean the data first.",
    )


def require(*checks: Check) -> None:
    """Read once whether all `checks` hold.

    Raises:
        ValueError: for the first row of the first check that fails.

    Warns:
        UserWarning: for the first row of each failing check that is a warning.
    """
    if not checks or bool(torch.stack([check.holds.all() for check in checks]).all()):
        return
    for check in sorted(checks, key=lambda check: check.warning):
        failing = (~check.holds).nonzero()
        if len(failing):
            message = check.message(int(failing[0, 0]))
            if not check.warning:
                raise ValueError(message)
            warn(message)


def to_host(given: Sequence[Tensor], optional: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Bring rows of numbers (B,) to the host in one transfer, so that it waits for a GPU once."""
    values = [*given, *(value for value in optional if value is not None)]
    device = values[0].device
    if device.type == "mps":  # it has no dtype that holds all of them
        values = [value.cpu() for value in values]
    elif device.type != "cpu":
        # One conversion for each dtype, not for each value.
        dtypes = list(dict.fromkeys(value.dtype for value in values))
        parts = [torch.stack([value for value in values if value.dtype == dtype]).double() for dtype in dtypes]
        there = torch.cat(parts).cpu().split([len(part) for part in parts])
        rows = dict(zip(dtypes, map(iter, there), strict=True))
        values = [next(rows[value.dtype]).to(value.dtype) for value in values]
    rest = iter(values[len(given) :])
    return values[: len(given)], [None if value is None else next(rest) for value in optional]


def row_numbers(name: str, value: Tensor, x: Tensor) -> Tensor:
    """Check that the argument `name` is one integer per row of the batch `x` (B, ...), and return it, signed.

    Raises:
        TypeError: if it is not a tensor.
        ValueError: if its shape, dtype or device do not fit.
    """
    check_tensor(name, value)
    if value.shape != x.shape[:1] or not is_integer(value.dtype):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}: pass one integer per row, shape ({len(x)},)."
        )
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, the batch is on {x.device}: move one of them.")
    # torch compares few unsigned numbers, and takes a uint8 of 255 for -1.
    return value if value.dtype.is_signed else value.long()


def row_flags(name: str, value: Tensor, x0: Tensor, columns: bool = False) -> Tensor:
    """Check that the argument `name` is one bool per row of `x0` (B, ...), or one per row and axis if `columns`.

    Returns:
        Shape (B,), or (B, m) if `columns`.

    Raises:
        TypeError: if it is not a tensor.
        ValueError: if its shape or dtype does not fit.
    """
    check_tensor(name, value)
    if value.dtype != torch.bool or value.shape[:1] != x0.shape[:1] or value.ndim > 1 + columns:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}: pass one bool per row, shape ({len(x0)},)"
            + (f" or ({len(x0)}, m)." if columns else ".")
        )
    if not columns:
        return value
    flags = value.reshape(len(x0), -1)
    if flags.shape[1] >= x0.ndim:
        raise ValueError(
            f"{name} has {flags.shape[1]} columns, but rows of shape {tuple(x0.shape[1:])} have fewer axes."
        )
    return flags


def check_pair(x0: Tensor, x_t: Tensor, noise: Tensor | None) -> None:
    """Check that the samples of a call are floating point and have the same shape and device.

    Raises:
        TypeError: if one is not a tensor.
        ValueError: if shapes, dtypes or devices do not fit.
    """
    for name, value in (("x0", x0), ("x_t", x_t), ("noise", noise)):
        if value is not None:
            check_tensor(name, value)
    if not x0.is_floating_point():
        raise ValueError(f"x0 has dtype {x0.dtype}: it must be floating point (uint8 images: x0 / 127.5 - 1).")
    if x0.ndim < 2 or len(x0) == 0:
        raise ValueError(f"x0 has shape {tuple(x0.shape)}: pass at least one row and one data dimension, (B, ...).")
    if not x_t.is_floating_point():
        raise ValueError(f"x_t has dtype {x_t.dtype}: pass floating point samples.")
    for name, value in (("x_t", x_t), ("noise", noise)):
        if value is None:
            continue
        if value.shape != x0.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, x0 has {tuple(x0.shape)}: they must be equal.")
        if value.device != x0.device:
            raise ValueError(f"{name} is on {value.device}, x0 is on {x0.device}: move one of them.")
        if not value.is_floating_point():
            raise ValueError(f"{name} has dtype {value.dtype}: pass floating point noise.")
