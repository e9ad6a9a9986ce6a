"""Columns: which references of a matrix the rows of a query meet in one product."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Columns"]


@dataclass(frozen=True)
class Columns:
    """Some references of a matrix, as the columns of a block of logits (b, C).

    Either all rows meet the same references; or the rows are G groups of equally many, and each group meets others.

    Attributes:
        where: the references: a slice, for all rows; or their indices (G, C), for each group.
        rank: for groups, the place of each reference of the matrix in an order in which each group's are one run, (n,).
        first: for groups, the place of the group's first column in that order, (G,).
        used: which columns are no padding, bool (G, C); None for all.
    """

    where: slice | Tensor
    rank: Tensor | None = None
    first: Tensor | None = None
    used: Tensor | None = None

    def __len__(self) -> int:
        return self.where.stop - self.where.start if isinstance(self.where, slice) else self.where.shape[1]

    @property
    def groups(self) -> int:
        """Number of groups, G."""
        return 1 if isinstance(self.where, slice) else len(self.where)

    def of(self, values: Tensor, rows: int) -> Tensor:
        """Those of the references' `values` (n,), for a number of `rows`: (C,) if the same for all rows, else (rows, C)."""
        return self._of_rows(values[self.where], rows)

    def usable(self, rows: int) -> Tensor | None:
        """Which columns are no padding, for a number of `rows`: bool, (C,) or (rows, C); None for all."""
        return None if self.used is None else self._of_rows(self.used, rows)

    def of_source(self, source: Tensor) -> Tensor:
        """The column of each row's source, an index (b,) into the matrix or -1; not 0 to C - 1 if it is not among them."""
        if isinstance(self.where, slice):
            return source - self.where.start
        assert self.rank is not None
        assert self.first is not None
        first = self.first.repeat_interleave(len(source) // self.groups, output_size=len(source))
        return (self.rank[source.clamp(min=0)] - first).masked_fill(source < 0, -1)

    def _of_rows(self, values: Tensor, rows: int) -> Tensor:
        if isinstance(self.where, slice):
            return values
        return values[0] if len(values) == 1 else values.repeat_interleave(rows // len(values), 0, output_size=rows)
