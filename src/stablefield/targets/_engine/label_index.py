"""References by label: which of them each row meets, so that no product is made only to be masked out.

A row with a label meets the references of its label, a row without one meets all. Rows of one label share a product; labels
with equally many rows share one, too, while their references fit into a chunk together: so a batch with hundreds of labels
takes few operations on a GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield.targets._engine.columns import Columns

__all__ = ["LabelIndex", "Parts"]

# Multiplications that take as long as the operations of one more part: 0.2 ms of a CPU.
_PART = 2**23
# Multiplications that take as long as gathering a number of a reference.
_GATHERED = 16


@dataclass(frozen=True)
class Part:
    """Rows of a query that meet the same references, or G groups of equally many rows that each meet their label's.

    Attributes:
        rows: the rows, a slice of the query in the order of `Parts`.
        runs: the place of each group's first reference in the order by label, and their number; None for all references.
    """

    rows: slice
    runs: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Parts:
    """The rows of a query, part by part; rows that meet no reference are in none.

    Attributes:
        order: indices of the rows, on the host, (b,).
        parts: the parts.
    """

    order: Tensor
    parts: list[Part]


class LabelIndex:
    """The references in the order of their labels.

    Args:
        labels: of the references, integers (n,).
    """

    def __init__(self, labels: Tensor) -> None:
        # On the host, which then waits for a device once.
        given: NDArray[np.int64] = labels.cpu().numpy()
        order = np.argsort(given, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        self._labels, self._starts, self._counts = np.unique(given[order], return_index=True, return_counts=True)
        self._is_sorted = bool((np.diff(order) > 0).all())
        self._order, self._rank = (torch.from_numpy(one).to(labels.device, non_blocking=True) for one in (order, rank))

    def parts(self, labels: Tensor, dim: int, size: int) -> Parts | None:
        """The parts of a query, for references of `dim` numbers, `size` in a chunk.

        Args:
            labels: of the query's rows, (B,), on the host; -1 for those that meet all references.
            dim: numbers per reference.
            size: references in a chunk.

        Returns:
            The parts; None if it is cheaper to compare all rows with all references.
        """
        given: NDArray[np.int64] = labels.numpy()
        rows = np.argsort(given, kind="stable")
        free, rows = rows[given[rows] == -1], rows[given[rows] != -1]
        distinct, first, repeats = np.unique(given[rows], return_index=True, return_counts=True)
        place = np.searchsorted(self._labels, distinct).clip(max=len(self._labels) - 1)
        # A shard may have no reference of a label.
        known = self._labels[place] == distinct
        first, repeats, place = first[known], repeats[known], place[known]
        counts, starts = self._counts[place], self._starts[place]
        by_label = int((repeats * counts).sum()) + _GATHERED * int(counts.sum())
        parts, taken = ([Part(slice(0, len(free)))] if len(free) else []), [free]
        # Labels with equally many rows, those with the fewest references first: the others of a part are padded to its last.
        order = np.lexsort((counts, repeats))
        begin, row = 0, len(free)
        while begin < len(order):
            each = int(repeats[order[begin]])
            end = begin + 1
            while end < len(order) and repeats[order[end]] == each and (end + 1 - begin) * counts[order[end]] <= size:
                end += 1
            some = order[begin:end]
            runs = tuple((int(starts[k]), int(counts[k])) for k in some)
            taken.append(rows[(first[some, None] + np.arange(each)).ravel()])
            parts.append(Part(slice(row, row + each * len(some)), runs))
            begin, row = end, row + each * len(some)
        if (len(rows) * len(self._order) - by_label) * dim < _PART * len(parts):
            return None
        return Parts(torch.from_numpy(np.concatenate(taken)), parts)

    @property
    def largest(self) -> int:
        """The number of references of the label that has most."""
        return int(self._counts.max())

    def drawn(self, labels: Tensor, size: int, seed: int) -> Tensor:
        """Indices of `size` references of each label in `labels` (B,), on the host, or of all that it has, (m,).

        Drawn without replacement; the same for the same seed.
        """
        some = np.isin(self._labels, labels.numpy())
        starts, counts = self._starts[some, None], self._counts[some, None]
        if not len(counts):
            return self._order[:0]
        # Those with the smallest of random keys, in one pass over all labels.
        column = np.arange(int(counts.max()))
        keys = np.random.default_rng(seed).random((len(counts), len(column)), np.float32)
        keys[column >= counts] = 2
        if size < len(column):
            column = np.argpartition(keys, size - 1, axis=1)[:, :size]
        places = (starts + column)[column < counts]
        return self._order[torch.from_numpy(places).to(self._order.device)]

    def columns(self, part: Part, size: int) -> Iterator[Columns]:
        """The references of a part's runs, at most `size` at a time."""
        assert part.runs is not None
        device = self._order.device
        width = max(count for _, count in part.runs)
        step = max(1, size // len(part.runs))
        if len(part.runs) == 1 and self._is_sorted:
            start, count = part.runs[0]
            yield from (Columns(slice(start + k, start + min(k + step, count))) for k in range(0, count, step))
            return
        runs = torch.tensor(part.runs, device="cpu").to(device, non_blocking=True)
        first, counts = runs[:, 0], runs[:, 1]
        padded = any(count != width for _, count in part.runs)
        for k in range(0, width, step):
            column = torch.arange(k, min(k + step, width), device=device)
            used = column < counts[:, None] if padded else None
            places = first[:, None] + (torch.minimum(column, counts[:, None] - 1) if padded else column)
            yield Columns(self._order[places], self._rank, first + k, used)
