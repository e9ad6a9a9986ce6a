"""Nearest neighbours in feature space, block by block.

Squared distances are |x|^2 + |y|^2 - 2 <x, y> in float64, about the mean of one side, in blocks: no whole (n, m) matrix
exists. Their error is a few roundings of |x|^2 + |y|^2. If the result is a distance itself, compute it again from the
difference, which is exactly 0 between equal rows.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from stablefield.evaluation._features import in_float64

__all__ = ["blocks", "nearest", "others"]

# 2048 x 8192 distances are 134 MB in float64.
ROWS, COLUMNS = 2048, 8192


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


def others(points: Tensor, k: int, *, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """Squared distances of every row to its k nearest other rows, nearest first, shape (n, k), float64.

    Args:
        points: features, shape (n, d), n > k >= 1.
        k: number of neighbours.
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


def nearest(
    a: Tensor, b: Tensor, k: int, *, groups: Tensor | None = None, rows: int = ROWS, columns: int = COLUMNS
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of `b` to every row of `a`, nearest first.

    Args:
        a: features, shape (n, d).
        b: features, shape (m, d), m >= k.
        k: number of neighbours.
        groups: numbers of the groups of b's rows, shape (m,), of which there are at least k: only the nearest row of each
            group counts. If None, each row is a group.
        rows: rows per block.
        columns: columns per block.

    Returns:
        Distances, shape (n, k), float64, and rows of `b`, shape (n, k).
    """
    best: dict[int, tuple[Tensor, Tensor]] = {}
    if groups is not None and b.device.type == "mps":
        groups = groups.cpu()  # as the blocks, whose float64 such a device does not have
    for i, j, squared, _ in blocks(a, b, rows=rows, columns=columns):
        # One more than k: rounding may swap the last with its successor.
        values, where = _least(squared, k + 1, None if groups is None else groups[None, j])
        where = where + j.start
        if i.start in best:
            values, where = torch.cat([best[i.start][0], values], dim=1), torch.cat([best[i.start][1], where], dim=1)
            values, order = _least(values, k + 1, None if groups is None else groups[where])
            where = where.gather(1, order)
        best[i.start] = values, where
    found = torch.cat([best[start][1] for start in sorted(best)])
    distances = torch.cat([_distances(x, b, where) for x, where in zip(a.split(256), found.split(256), strict=True)])
    if groups is not None:
        distances[torch.cat([best[start][0] for start in sorted(best)]).isinf()] = torch.inf
    order = distances.argsort(dim=1, stable=True)[:, :k]
    return distances.gather(1, order), found.gather(1, order.to(found.device))


def _least(values: Tensor, k: int, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    """The k smallest values of each row, at most one of each group, and their columns; infinite where groups run out."""
    if groups is None:
        return values.topk(min(k, values.shape[1]), largest=False)
    groups, values = groups.expand_as(values), values.clone()
    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(min(k, values.shape[1])):
        least, column = values.min(dim=1, keepdim=True)
        found.append((least, column))
        values.masked_fill_(groups == groups.gather(1, column), torch.inf)
    least, columns = zip(*found, strict=True)
    return torch.cat(least, dim=1), torch.cat(columns, dim=1)


def _distances(x: Tensor, b: Tensor, where: Tensor) -> Tensor:
    neighbours = in_float64(b[where.to(b.device)])
    return (neighbours - in_float64(x)[:, None]).square().sum(dim=2).sqrt()
