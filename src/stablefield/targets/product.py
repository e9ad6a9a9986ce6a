"""Matrix products of few rows with many references: the arithmetic that a target is made of.

A batch has some tens of rows in its noise band, a chunk some hundreds of references, and each reference thousands of
numbers. BLAS libraries are tuned for squarer shapes: on AMD's processors, oneDNN takes 0.5 to 0.9 of the time of MKL for
`inner` and 0.4 to 0.8 for `weighted` (from 23 to 512 rows, chunks of 682 references, 3,072 numbers). On Intel's it takes as
long for `inner` and twice as long for `weighted`, so MKL has them. oneDNN is what `torch.compile` uses for linear layers;
torch has no public name for it, so where the operator is missing, or the tensors are not what it is for, torch's own
product stands in: slower, and equal up to rounding.
"""

import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["ULPS", "add_weighted", "inner", "padding", "weighted"]

_Linear = Callable[[Tensor, Tensor], Tensor]

ULPS = 10
"""Bound on the rounding error of `inner`, in ulps of the product of the two norms.

Of rows with themselves, where errors are largest: up to 7 measured on images, 10 on constants (MKL: 3 and 5).
"""

# Multiplications from which the operator's own overhead (some 15 us) does not show.
_LARGE = 2**20
# oneDNN compiles code for every new shape, about a millisecond each, and keeps the newest 1,024; rows of zeros keep the
# shapes few: at most this many to each doubling of the rows, but no fewer than 4 rows apart.
_PER_DOUBLING = 8


def inner(x: Tensor, rows: Tensor) -> Tensor:
    """Inner products of `x` (B, d) with `rows` (c, d), shape (B, c), in a tensor of its own."""
    linear = _linear(x, rows)
    return x @ rows.T if linear is None else _padded(linear, x, rows)


def weighted(weights: Tensor, rows: Tensor) -> Tensor:
    """Sums of `rows` (c, d) with `weights` (B, c), shape (B, d), in a tensor of its own."""
    linear = _linear(weights, rows)
    return weights @ rows if linear is None else _padded(linear, weights, rows.T)


def add_weighted(total: Tensor, weights: Tensor, rows: Tensor) -> None:
    """Add the sums of `rows` (c, d) with `weights` (B, c) to `total` (B, d), in place."""
    linear = _linear(weights, rows)
    if linear is None:
        total.addmm_(weights, rows)  # in one pass
    else:
        total.add_(_padded(linear, weights, rows.T))


def _padded(linear: _Linear, x: Tensor, weight: Tensor) -> Tensor:
    missing = padding(len(x))
    if not missing:
        return linear(x, weight)
    return linear(functional.pad(x, (0, 0, 0, missing)), weight)[: len(x)]


def padding(rows: int) -> int:
    """How many rows of zeros to add to `rows` of a product, so that oneDNN meets few shapes."""
    return -rows % max(4, 2 ** rows.bit_length() // (2 * _PER_DOUBLING))


def _linear(x: Tensor, rows: Tensor) -> _Linear | None:
    """OneDNN's x @ weight.T, if it is to be used for these tensors."""
    fits = x.device.type == "cpu" and x.dtype == rows.dtype == torch.float32
    if not fits or len(x) * rows.numel() < _LARGE or not torch.backends.mkldnn.enabled:
        return None
    return _find()


@cache
def _find() -> _Linear | None:
    """OneDNN's x @ weight.T, if torch has it on this machine and it does what it is expected to do."""
    if not _is_amd() or not torch.backends.mkldnn.is_available():
        return None

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    try:
        found = linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0], [7.0, 11.0]])).tolist()
    except (AttributeError, RuntimeError, TypeError):
        return None
    return linear if found == [[13.0, 29.0]] else None


def _is_amd() -> bool:
    """Whether this is an x86 processor of AMD. By its name and not by a clock, so that a machine has one result."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "AuthenticAMD" in platform.processor()
