"""Factors: references of a chunk as what rows are multiplied with, decoded or as the bytes that they are stored as."""

from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from stablefield.targets import product
from stablefield.targets.integers import LONGEST, Digits, available
from stablefield.targets.reference_matrix import ReferenceMatrix, largest_magnitude

__all__ = ["ByteFactor", "DecodedFactor", "Factor", "Operand", "factor_size", "factors"]

# Multiplications of a whole pass over the references from which digits are worth making.
_LARGE = 2**24
# Numbers per row below which products of bytes gain nothing.
_SHORT = 256


class Operand:
    """Rows that are multiplied with many factors; what a kind of factor makes of them is made once.

    Args:
        rows: shape (B, d), finite.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    @cached_property
    def digits(self) -> Digits:
        """The rows as digits."""
        return Digits.of(self.rows, largest_magnitude(self.rows))

    @cached_property
    def sums(self) -> Tensor:
        """The sum of each row, shape (B,)."""
        return self.rows.sum(1)


class Factor(Protocol):
    """Some references, c rows of d numbers."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    @property
    def rows(self) -> Tensor:
        """All of them, decoded, shape (c, d)."""
        ...

    @property
    def wide(self) -> Tensor:
        """All of them in float64, shape (c, d), without another rounding than that of their decoder."""
        ...

    def at(self, index: Tensor) -> Tensor:
        """Those at `index` (m,) with the origin still in them, decoded, shape (m, d)."""
        ...

    def inner(self, x: Operand) -> Tensor:
        """Inner products with the rows of `x`, shape (B, c), in a tensor of its own."""
        ...

    def weighted(self, weights: Tensor) -> Tensor:
        """Their sums with `weights` (B, c), none negative, shape (B, d), in a tensor of its own."""
        ...

    def add_weighted(self, total: Tensor, weights: Tensor) -> None:
        """Add their sums with `weights` (B, c), none negative, to `total` (B, d), in place."""
        ...


class DecodedFactor:
    """References as floats.

    Args:
        rows: shape (c, d).
        stored: what they were before the origin was taken off, which may have rounded them, in any floating point dtype,
            shape (c, d); None if there is no origin.
        origin: the origin, shape (d,).
    """

    def __init__(self, rows: Tensor, stored: Tensor | None = None, origin: Tensor | None = None) -> None:
        self._rows = rows
        self._stored = stored
        self._origin = origin

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> Tensor:  # noqa: D102
        return self._rows

    @property
    def wide(self) -> Tensor:  # noqa: D102
        if self._stored is None or self._origin is None:
            return self._rows.double()
        return self._stored.to(torch.float64, copy=True).sub_(self._origin)

    def at(self, index: Tensor) -> Tensor:  # noqa: D102
        return self._rows[index] if self._stored is None else self._stored[index].to(self._rows.dtype)

    def inner(self, x: Operand) -> Tensor:  # noqa: D102
        return product.inner(x.rows, self._rows)

    def weighted(self, weights: Tensor) -> Tensor:  # noqa: D102
        return product.weighted(weights, self._rows)

    def add_weighted(self, total: Tensor, weights: Tensor) -> None:  # noqa: D102
        product.add_weighted(total, weights, self._rows)


class ByteFactor:
    """References as bytes b that mean (b + 1/2) / 127.5: uint8 images u, by b = u - 128.

    Args:
        values: shape (c, d), int8.
    """

    def __init__(self, values: Tensor) -> None:
        self._bytes = values

    def __len__(self) -> int:
        return len(self._bytes)

    @property
    def rows(self) -> Tensor:  # noqa: D102
        return _meaning(self._bytes)

    @property
    def wide(self) -> Tensor:  # noqa: D102
        return self.rows.double()

    def at(self, index: Tensor) -> Tensor:  # noqa: D102
        return _meaning(self._bytes[index])

    def inner(self, x: Operand) -> Tensor:  # noqa: D102
        return self._times(x.digits, x.sums, self._bytes.T)

    def weighted(self, weights: Tensor) -> Tensor:  # noqa: D102
        return self._times(Digits.of(weights, weights.amax(1)), weights.sum(1), self._bytes)

    def add_weighted(self, total: Tensor, weights: Tensor) -> None:  # noqa: D102
        total.add_(self.weighted(weights))

    def _times(self, digits: Digits, sums: Tensor, matrix: Tensor) -> Tensor:
        halves, scale = sums * (0.5 / 127.5), digits.scale / 127.5
        return digits.times(matrix).mul_(scale[:, None]).add_(halves[:, None])


def factor_size(matrix: ReferenceMatrix, batch: int, dtype: torch.dtype) -> int:
    """How many references of `matrix` a factor for `batch` rows should have, by the memory at hand."""
    return matrix.chunk_size(batch, decoded=not _stays_bytes(matrix, batch, dtype))


def factors(matrix: ReferenceMatrix, size: int, batch: int, dtype: torch.dtype) -> Iterator[tuple[slice, Factor]]:
    """The references of `matrix`, at most `size` at a time, for products with `batch` rows of `dtype`.

    The origin of their norms, if there is one, has been taken off. uint8 images stay bytes if rows are float32 on a CPU that
    has products for bytes, and there is enough to multiply.

    Yields:
        Their place in the matrix, and the factor, valid until the next one is asked for.
    """
    origin = matrix.norms(dtype).origin
    if origin is not None:
        buffer = torch.empty(min(size, len(matrix)), matrix.dim, dtype=dtype, device=matrix.device)
        for where, part in matrix.pages(size):
            stored = part.to(matrix.device).reshape(len(part), matrix.dim)
            yield where, DecodedFactor(torch.sub(stored, origin, out=buffer[: len(part)]), stored, origin)
        return
    if not _stays_bytes(matrix, batch, dtype):
        for where, rows in matrix.chunks(size, dtype):
            yield where, DecodedFactor(rows)
        return
    # Weighted sums run over the references of a factor.
    size = min(size, LONGEST)
    buffer = torch.empty(min(size, len(matrix)), *matrix.data.shape[1:], dtype=torch.uint8)
    for where, part in matrix.pages(size):
        values = torch.bitwise_xor(part, 128, out=buffer[: len(part)])
        yield where, ByteFactor(values.view(torch.int8).view(len(part), matrix.dim))


def _stays_bytes(matrix: ReferenceMatrix, batch: int, dtype: torch.dtype) -> bool:
    return (
        dtype == torch.float32
        and matrix.device.type == "cpu"
        and matrix.holds_bytes
        and _SHORT <= matrix.dim <= LONGEST
        and batch * len(matrix) * matrix.dim >= _LARGE
        and available()
    )


def _meaning(values: Tensor) -> Tensor:
    return values.to(torch.float32).add_(0.5).div_(127.5)
