"""Rows and their scalars, and the basic checks of arguments for every layer.

Throughout the library a batch has shape (B, ...), and a row's scalars (time, noise level, weight) have shape (B,) or are one
float for all rows.

The checks examine types, dtypes and layouts, never the numbers in a tensor, so none waits for a device.
"""

import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "array_of_numbers",
    "as_device",
    "check_callable",
    "check_choice",
    "check_floating_dtype",
    "check_generator",
    "check_kind",
    "check_labels",
    "check_numbers",
    "check_tensor",
    "drawn_by",
    "either",
    "flag",
    "found_device",
    "is_integer",
    "number",
    "per_row",
    "row_values",
    "shape_of",
    "whole_number",
]


def row_values(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """Return `value`, a float or a tensor of shape () or (B,), as a tensor of shape (B,) on the device of `x`.

    Args:
        name: of the value, for errors.
        value: a float, or a tensor of shape () or (B,).
        x: its batch, shape (B, ...).

    Raises:
        TypeError: if the value is neither a number nor a tensor of real numbers.
        ValueError: if the shape is neither () nor (B,), or a tensor is on another device.
    """
    if not isinstance(value, Tensor):
        return torch.full(
            (x.shape[0],), number(name, value), dtype=torch.float64 if _has_float64(x) else x.dtype, device=x.device
        )
    if value.layout != torch.strided or value.is_complex() or value.dtype == torch.bool:
        check_tensor(name, value)
        raise TypeError(f"{name} has dtype {value.dtype}: pass real numbers, one for all rows or one per row.")
    if value.ndim == 0:
        return value.to(x.device).expand(x.shape[0])
    if value.shape != x.shape[:1]:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but the batch has {x.shape[0]} rows: "
            f"pass one number, or one per row (shape ({x.shape[0]},))."
        )
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, but the batch is on {x.device}: move one of them.")
    return value


def per_row(value: Tensor, x: Tensor) -> Tensor:
    """Shape `value` (B,) as (B, 1, ..., 1) in the dtype of `x` (B, ...), to broadcast against it."""
    return value.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def check_tensor(
    name: str,
    value: Any,
    *,
    floating: bool = False,
    real: bool = False,
    batch: bool = False,
    numbers: bool = False,
) -> None:
    """Check that the argument `name` is a dense tensor.

    Args:
        name: of the argument, for errors.
        value: the argument.
        floating: whether it must hold floating point numbers.
        real: whether it must hold real numbers, floating point or integers.
        batch: whether it must have rows, shape (B, ...).
        numbers: whether it must hold numbers, so not be on the device "meta".

    Raises:
        TypeError: if it is not a tensor, or a sparse or nested one.
        ValueError: if its dtype or shape does not fit, or it is on the device "meta".
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {_a(value)}: pass a tensor{_made_of(name, value)}.")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(
            f"{name} is a tensor of layout {value.layout}: pass a dense one ({_variable(name)}.to_dense())."
        )
    if floating and not value.is_floating_point():
        raise ValueError(f"{name} has dtype {value.dtype}: pass floating point numbers ({_variable(name)}.float()).")
    if real and (value.is_complex() or value.dtype == torch.bool):
        raise ValueError(f"{name} has dtype {value.dtype}: pass real numbers.")
    if batch and value.ndim == 0:
        raise ValueError(
            f"{name} has shape (): pass a batch, shape (B, ...); {_variable(name)}[None] is a batch of one row."
        )
    if numbers and value.device.type == "meta":
        raise ValueError(f"{name} is on the device meta, which holds no numbers: move the data to cpu or cuda.")


def check_labels(name: str, value: Any, rows: int | None = None) -> None:
    """Check that the argument `name` is a tensor with one integer per row, shape (`rows`,).

    Raises:
        TypeError: if it is not a tensor.
        ValueError: if it has another dtype or shape.
    """
    check_tensor(name, value)
    if value.ndim != 1 or not is_integer(value.dtype) or (rows is not None and len(value) != rows):
        shape = "(B,)" if rows is None else f"({rows},)"
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}: "
            f"pass one integer per row, shape {shape}, -1 for no class."
        )


def number(name: str, value: Any) -> float:
    """Return the argument `name` as a float: a Python or NumPy number, or a tensor with one real number.

    Raises:
        TypeError: if it is anything else.
        ValueError: if it is an integer beyond the range of a float.
    """
    single = isinstance(value, Tensor | np.ndarray) and value.ndim == 0 and _is_real(value)
    if not single and (isinstance(value, bool | np.bool_) or not isinstance(value, Real)):
        raise TypeError(f"{name} is {_a(value)}: pass a number.")
    if isinstance(value, Tensor) and value.device.type == "meta":
        raise ValueError(f"{name} is a tensor on the device meta, which holds no numbers: pass a number.")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is an integer of {len(str(value))} digits: pass a number below 1e308.") from None


def check_numbers(owner: object, *names: str) -> None:
    """Check that the attributes `names` of `owner`, its arguments, are numbers.

    Raises:
        TypeError: if one is not.
    """
    for name in names:
        number(name, getattr(owner, name))


def whole_number(name: str, value: Any, least: int | None = None, most: int = 2**63 - 1) -> int:
    """Return the argument `name` as an int: a whole Python or NumPy number, from `least` to `most`.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is not whole, or out of range.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        raise TypeError(f"{name} is {_a(value)}: pass a whole number.")
    if not isinstance(value, Integral):
        raise ValueError(f"{name}={value}: pass a whole number, an int.")
    size = int(value)
    if least is not None and size < least:
        raise ValueError(f"{name}={max(size, -(10**20))}: pass a whole number of at least {least}.")
    if size > most:
        given = size if size < 10**20 else f"an integer of {len(str(size))} digits"
        raise ValueError(f"{name} is {given}: pass a whole number of at most {most}.")
    return size


def flag(name: str, value: Any) -> bool:
    """Return the argument `name`, True or False, as a bool.

    Raises:
        TypeError: if it is anything else.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} is {_a(value)}: pass True or False.")
    return bool(value)


def shape_of(name: str, value: Any) -> tuple[int, ...]:
    """Return the argument `name`, a sequence of whole numbers from 0, as a tuple.

    Raises:
        TypeError: if it is not a sequence of whole numbers.
        ValueError: if one is negative.
    """
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise TypeError(f"{name} is {_a(value)}: pass a sequence of whole numbers, such as (3, 32, 32).")
    sizes: Sequence[Any] = value
    return tuple(whole_number(f"{name}[{k}]", size, 0) for k, size in enumerate(sizes))


def array_of_numbers(name: str, value: Any) -> Tensor:
    """Return the argument `name`, a tensor, an array or a nested list of real numbers, as a dense tensor.

    Raises:
        TypeError: if it is anything else.
        ValueError: if it is on the device "meta".
    """
    if not isinstance(value, Tensor):
        check_kind(name, value, (np.ndarray, np.generic, list, tuple, range, int, float), "a tensor of numbers")
        try:
            value = torch.as_tensor(np.asarray(value))
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name} is {_a(value)}: pass a tensor of numbers.") from None
    check_tensor(name, value, numbers=True)
    if value.is_complex() or value.dtype == torch.bool or value.is_quantized:
        raise TypeError(f"{name} has dtype {value.dtype}: pass real numbers.")
    return value


def check_kind(name: str, value: Any, kind: type | tuple[type, ...], remedy: str) -> None:
    """Check that the argument `name` is an instance of `kind`; `remedy` says what to pass.

    Raises:
        TypeError: if it is not.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {_a(value)}: pass {remedy}.")


def check_choice(name: str, value: Any, choices: Sequence[str], *others: str) -> None:
    """Check that the argument `name` is one of the choices, strings; `others` say what else it may be.

    Raises:
        TypeError: if it is no string.
        ValueError: if it is another one; suggests the likely one.
    """
    listed = either([*others, *choices])
    check_kind(name, value, str, listed)
    if value not in choices:
        near = get_close_matches(value.lower(), choices, 1)
        raise ValueError(f"{name} is {value!r:.60}: pass {listed}." + (f" Did you mean {near[0]}?" if near else ""))


def either(choices: Sequence[str]) -> str:
    """Choices in words: a, b or c."""
    return " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))


def check_callable(name: str, value: Any, call: str) -> None:
    """Check that the argument `name` is callable; the error shows the `call`.

    Raises:
        TypeError: if it cannot.
    """
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{name} is {_a(value)}: pass a function or module that is called as {call}.")


def check_generator(name: str, value: Any) -> None:
    """Check that the argument `name` is a generator of torch or None.

    Raises:
        TypeError: if it is not.
    """
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"{name} is {_a(value)}: pass a torch.Generator, such as torch.Generator().manual_seed(0).")


def drawn_by(generator: torch.Generator | None) -> dict[str, Any]:
    """The keyword of torch's random functions for a generator; none for torch's global one.

    A compiled function whose shapes vary cannot pass `generator=None`.
    """
    return {} if generator is None else {"generator": generator}


def check_floating_dtype(name: str, value: Any) -> TypeGuard[torch.dtype]:
    """Check that the argument `name` is a floating point dtype; returns True.

    Raises:
        TypeError: if it is not a dtype.
        ValueError: if it is one of integers, bool or complex numbers, in which noise levels would be cut or lost.
    """
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{name} is {_a(value)}: pass a dtype of torch, such as torch.float32.")
    if not value.is_floating_point:
        raise ValueError(f"{name}={value}: pass a floating point dtype, such as torch.float32.")
    return True


def as_device(name: str, value: Any) -> torch.device:
    """Return the argument `name`, a device or its name, as a device of this machine; None is the CPU.

    Raises:
        TypeError: if it is neither.
        ValueError: if there is no such device.
    """
    if value is None:
        return torch.device("cpu")
    if not isinstance(value, str | torch.device):
        raise TypeError(f"{name} is {_a(value)}: pass a device or its name, such as 'cpu' or 'cuda'.")
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except Exception as error:  # whatever the device's own package raises
        why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"{name}={str(value)!r} cannot be used here: {why}. Pass 'cpu'.") from error
    return device


def found_device(device: torch.device | str | None) -> torch.device:
    """The argument `device` of a long call; for None a GPU if there is one (this process's own, where there are several).

    "cuda" without a number is the process's own GPU, too. A GPU that is named by its number becomes the current one, which
    accelerate and compilers take.

    Raises:
        TypeError: if it is neither a device nor its name.
        ValueError: if this machine has no such device, or it holds no numbers.
    """
    if device is not None:
        found = as_device("device", device)
        if found.type == "meta":
            raise ValueError("device='meta' cannot be used here: it holds no numbers. Pass 'cpu'.")
        if str(found).startswith("cuda:"):
            torch.cuda.set_device(found)
        if str(found) != "cuda" or "LOCAL_RANK" not in os.environ:
            return found
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device(f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}")


def _a(value: Any) -> str:
    """A value's kind, in a few words."""
    if value is None:
        return "None"
    if isinstance(value, str):
        return f"the string {value[:40]!r}"
    if isinstance(value, bool | np.bool_):
        return f"the bool {value}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, Tensor | np.ndarray):
        return f"{_article(type(value).__name__)} of shape {tuple(value.shape)} and dtype {value.dtype}"
    return _article(type(value).__name__)


def _article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _variable(name: str) -> str:
    """The argument in code: `sigmas` of "euler: sigmas", and x of what has only a description."""
    last = name.rpartition(": ")[2]
    return last if re.fullmatch(r"[\w.\[\]]+", last) else "x"


def _made_of(name: str, value: Any) -> str:
    name = _variable(name)
    if isinstance(value, np.ndarray):
        return f" (torch.from_numpy({name}))"
    if isinstance(value, list | tuple):
        return f" (torch.tensor({name}), or torch.stack({name}) for a list of tensors)"
    if hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, str | bytes | dict):
        return f" (torch.stack of the samples of {name})"
    return ""


def _is_real(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.layout == torch.strided and not value.is_complex() and value.dtype != torch.bool
    return value.dtype.kind in "iuf"


def is_integer(dtype: torch.dtype) -> bool:
    """Whether a dtype is one of whole numbers."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _has_float64(x: Tensor) -> bool:
    return x.device.type != "mps"
