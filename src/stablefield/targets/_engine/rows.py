"""Rows of numbers: norms and inner products that keep their digits, in passes that stay in a CPU's cache."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["in_blocks", "inner_products", "largest_magnitude", "row_blocks", "squared_norms", "wide_dtype"]

# Numbers that a pass takes at a time, of which several things are made at once: 512 kB in float32, for one core's cache.
_BLOCK = 2**17
# Numbers that are summed without float64.
_PART = 128


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype of scalars and sums: float64, float32 where a device has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def row_blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of `rows` (B, d) that fit a CPU's cache; one of all rows elsewhere, where each operation is a launch."""
    count, dim = rows.shape
    step = max(1, _BLOCK // max(1, dim)) if rows.device.type == "cpu" else max(1, count)
    return (slice(start, min(start + step, count)) for start in range(0, max(1, count), step))


def in_blocks(of: Callable[[slice], Tensor], rows: Tensor) -> Tensor:
    """What `of` makes of the slices of `rows` (B, d) that `row_blocks` gives, one after the other in the last axis."""
    parts = [of(some) for some in row_blocks(rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def squared_norms(rows: Tensor) -> Tensor:
    """Squared norms of `rows` (n, d) in the wide dtype, shape (n,).

    Parts of 128 numbers are summed in the dtype of the rows, the parts in float64: an ulp or two in all.
    """
    wide = wide_dtype(rows.device)
    if rows.shape[1] % _PART == 0 and rows.numel() and rows.is_contiguous():
        parts = torch.linalg.vector_norm(rows.view(len(rows), -1, _PART), dim=2)
        return parts.to(wide).square_().sum(1)
    return in_blocks(lambda some: rows[some].square().sum(1, dtype=wide), rows)


def inner_products(p: Tensor, q: Tensor) -> Tensor:
    """Inner products of the rows of `p` with those of `q`, (n, d) each, shape (n,): as accurate as `squared_norms`."""
    wide = wide_dtype(p.device)

    def of(some: slice) -> Tensor:
        products = p[some] * q[some]
        if p.shape[1] % _PART or not p.numel():
            return products.sum(1, dtype=wide)
        return products.view(len(products), -1, _PART).sum(2).to(wide).sum(1)

    return in_blocks(of, p)


def largest_magnitude(rows: Tensor) -> Tensor:
    """The largest magnitude of a number in each of `rows` (n, d), shape (n,); NaN where there is one, 0 for d = 0.

    As fast as memory; torch's own infinity norm takes 25 times as long on a CPU.
    """
    if rows.shape[1] == 0:
        return rows.new_zeros(len(rows))
    return torch.maximum(rows.amax(1), -rows.amin(1))
