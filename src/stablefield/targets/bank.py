"""A bank: a set of references as the rows of a matrix, decoded chunk by chunk.

The references may be floating point or uint8 images, in any memory layout. Whatever they are, a bank hands them out as
contiguous rows of the dtype of the computation, a chunk at a time, so that no second copy of the set ever exists.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["Bank", "squared_norms"]

# Elements of the largest temporary matrix: 32 MB in float32. Larger chunks are no faster, smaller ones starve the
# matrix products.
_BUDGET = 2**23


def squared_norms(rows: Tensor) -> Tensor:
    """Squared norms of `rows` (n, d) in float64 (float32 where a device has none), shape (n,).

    The squares are rounded to the dtype of the rows and summed in float64, block by block to stay in the cache.
    """
    wide = torch.float32 if rows.device.type == "mps" else torch.float64
    step = max(1, 2**18 // max(1, rows.shape[1]))
    return (
        torch.cat([block.square().sum(1, dtype=wide) for block in rows.split(step)]) if len(rows) else rows.new_empty(0)
    )


class Bank:
    """The references `data`, shape (n, ...), as n rows of d numbers.

    Args:
        data: floating point, or uint8 images that mean data / 127.5 - 1.
    """

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self._squares: dict[torch.dtype, Tensor] = {}

    def __len__(self) -> int:
        return self.data.shape[0]

    @property
    def dim(self) -> int:
        """Numbers per reference, d."""
        return self.data[:1].numel()

    @property
    def dtype(self) -> torch.dtype:
        """The floating point dtype in which the references are exact: float32 or, for float64 references, float64."""
        return torch.float64 if self.data.dtype == torch.float64 else torch.float32

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The references at `index` (m,), decoded, shape (m, d)."""
        return self._decode(self.data[index], dtype)

    def take(self, index: Tensor) -> "Bank":
        """A bank of the references at `index` (m,), with what is known of their norms."""
        part = Bank(self.data[index])
        part._squares = {dtype: self.squares(dtype)[index] for dtype in (self._squares or {self.dtype: None})}
        return part

    def chunk_size(self, batch: int) -> int:
        """Rows per chunk such that neither (batch, chunk) nor (chunk, d) exceeds the budget for temporaries."""
        return max(1, min(len(self), _BUDGET // max(batch, self.dim, 1)))

    def chunks(self, size: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield (slice, rows), with rows of shape (at most `size`, d) in `dtype`."""
        for start in range(0, len(self), size):
            where = slice(start, min(start + size, len(self)))
            yield where, self._decode(self.data[where], dtype)

    def squares(self, dtype: torch.dtype) -> Tensor:
        """Squared norms of all references as decoded to `dtype`, shape (n,), computed once."""
        if dtype not in self._squares:
            size = self.chunk_size(1)
            self._squares[dtype] = torch.cat([squared_norms(rows) for _, rows in self.chunks(size, dtype)])
        return self._squares[dtype]

    def _decode(self, data: Tensor, dtype: torch.dtype) -> Tensor:
        rows = data.reshape(data.shape[0], self.dim)
        if rows.dtype == torch.uint8:
            return rows.to(dtype).div_(127.5).sub_(1)
        return rows.to(dtype)
