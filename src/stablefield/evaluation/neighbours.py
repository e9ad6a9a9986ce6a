"""Nearest neighbours in feature space, block by block.

Squared distances are taken as |x|^2 + |y|^2 - 2 <x, y> in float64, about the mean of one side, in blocks: no (n, m)
matrix ever stands whole. Their error is a few roundings of |x|^2 + |y|^2; where a distance itself is the result it is
computed again from the difference, which is exactly 0 between equal rows.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from stablefield.evaluation.features import in_float64
from stablefield.shapes import check_tensor

__all__ = ["Ball", "Neighbours", "blocks", "kth_neighbour", "nearest", "others"]

# 2048 x 8192 distances are 134 MB in float64.
ROWS, COLUMNS = 2048, 8192

# Two ways to the same distance differ by up to about this times |x|^2 + |y|^2, far below what float32 features resolve
# (6e-8): within it a point counts as on the sphere, which is no part of the ball.
ROUNDING = 1e-12


class Ball:
    """Open balls about the rows of `centres`, each reaching to its k-th nearest other row, which is not in it.

    Args:
        centres: features, shape (n, d), n > k.
        k: which neighbour.
        squared_radii: to the k-th other row, shape (n,), where that is known; found here if None.
        rows: rows per block.
        columns: columns per block.
    """

    def __init__(
        self,
        centres: Tensor,
        k: int,
        squared_radii: Tensor | None = None,
        *,
        rows: int = ROWS,
        columns: int = COLUMNS,
    ) -> None:
        self.centres, self._rows, self._columns = centres, rows, columns
        if squared_radii is not None:
            check_tensor("radii", squared_radii, floating=True, numbers=True)
            if squared_radii.shape != centres.shape[:1] or squared_radii.device != centres.device:
                raise ValueError(
                    f"radii have shape {tuple(squared_radii.shape)} on {squared_radii.device}: pass one for each of the "
                    f"{len(centres)} centres on {centres.device}."
                )
        known = kth_neighbour(centres, k, rows=rows, columns=columns) if squared_radii is None else squared_radii
        self._squared_radii = known

    def holds(self, points: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield (rows of the centres, rows of the points, whether each ball holds each point) for every block."""
        for rows, columns, squared, scale in blocks(self.centres, points, rows=self._rows, columns=self._columns):
            yield rows, columns, squared < self._squared_radii[rows, None] - ROUNDING * scale


class Neighbours:
    """Squared distances of the rows of one array to their nearest others, kept from one metric to the next.

    They cost all pairs of rows, far more than the metrics that use them.
    """

    # As many as any metric asks for unless told.
    _LEAST = 5

    def __init__(self) -> None:
        self._known: Tensor | None = None

    def __call__(self, points: Tensor, k: int) -> Tensor | None:
        """To the k-th nearest other row, shape (n,); None if there are no more than k rows.

        Args:
            points: features, shape (n, d), the same at every call.
            k: 1 for the nearest.
        """
        if len(points) <= k:
            return None
        if self._known is None or self._known.shape[1] < k:
            self._known = others(points, min(max(k, self._LEAST), len(points) - 1))
        return self._known[:, k - 1]


def blocks(
    a: Tensor, b: Tensor, *, rows: int = ROWS, columns: int = COLUMNS
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Yield (rows of a, rows of b, squared distances, |x|^2 + |y|^2 about the mean of a) by blocks, rows outermost."""
    centre = sum(in_float64(part).sum(dim=0) for part in a.split(rows)) / len(a)
    for i in range(0, len(a), rows):
        x = in_float64(a[i : i + rows]) - centre
        for j in range(0, len(b), columns):
            y = in_float64(b[j : j + columns]) - centre
            scale = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
            squared = torch.addmm(scale, x, y.T, alpha=-2).clamp(min=0)
            yield slice(i, i + len(x)), slice(j, j + len(y)), squared, scale


def kth_neighbour(points: Tensor, k: int, *, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """Squared distance of every row to its k-th nearest other row, shape (n,); arguments as for `others`."""
    return others(points, k, rows=rows, columns=columns)[:, k - 1]


def others(points: Tensor, k: int, *, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """Squared distances of every row to its k nearest other rows, nearest first, shape (n, k), float64.

    Args:
        points: features, shape (n, d), n > k >= 1.
        k: how many.
        rows: rows per block.
        columns: columns per block.
    """
    best: dict[int, Tensor] = {}
    for i, j, squared, _ in blocks(points, points, rows=rows, columns=columns):
        own = torch.arange(i.start, i.stop, device=squared.device)
        inside = (own >= j.start) & (own < j.stop)
        squared[inside.nonzero().flatten(), own[inside] - j.start] = torch.inf
        least = squared.topk(min(k, squared.shape[1]), largest=False).values
        joined = torch.cat([best[i.start], least], dim=1) if i.start in best else least
        best[i.start] = joined.topk(min(k, joined.shape[1]), largest=False).values
    return torch.cat([best[start] for start in sorted(best)])


def nearest(a: Tensor, b: Tensor, k: int, *, rows: int = ROWS, columns: int = COLUMNS) -> tuple[Tensor, Tensor]:
    """The k nearest rows of `b` to every row of `a`, nearest first.

    Args:
        a: features, shape (n, d).
        b: features, shape (m, d), m >= k.
        k: how many.
        rows: rows per block.
        columns: columns per block.

    Returns:
        Distances, shape (n, k), float64, and rows of `b`, shape (n, k).
    """
    best: dict[int, tuple[Tensor, Tensor]] = {}
    for i, j, squared, _ in blocks(a, b, rows=rows, columns=columns):
        # One more than asked for: rounding may swap the last with its successor.
        values, where = squared.topk(min(k + 1, squared.shape[1]), largest=False)
        where = where + j.start
        if i.start in best:
            values, where = torch.cat([best[i.start][0], values], dim=1), torch.cat([best[i.start][1], where], dim=1)
            values, order = values.topk(min(k + 1, values.shape[1]), largest=False)
            where = where.gather(1, order)
        best[i.start] = values, where
    found = torch.cat([best[start][1] for start in sorted(best)])
    distances = torch.cat([_distances(x, b, where) for x, where in zip(a.split(256), found.split(256), strict=True)])
    order = distances.argsort(dim=1, stable=True)[:, :k]
    return distances.gather(1, order), found.gather(1, order.to(found.device))


def _distances(x: Tensor, b: Tensor, where: Tensor) -> Tensor:
    neighbours = in_float64(b[where.to(b.device)])
    return (neighbours - in_float64(x)[:, None]).square().sum(dim=2).sqrt()
