"""Room for names: where to put labels so that none covers another."""

from collections.abc import Sequence

__all__ = ["lanes", "spread"]


def spread(centres: Sequence[float], sizes: Sequence[float], low: float, high: float, gap: float = 0.0) -> list[float]:
    """Move intervals apart by as little as possible (least squares), keeping their order.

    With the sizes subtracted this is isotonic regression, which pooling adjacent violators solves exactly; bounds are a
    clip of its solution (Barlow, Bartholomew, Bremner and Brunk, Statistical Inference under Order Restrictions, 1972).

    Args:
        centres: where each interval would like its middle to be.
        sizes: how long each is.
        low: where all should begin at the earliest.
        high: where all should end at the latest; they reach beyond it only if together they are longer than the room.
        gap: the least distance between two.

    Returns:
        The middles, in the order given.
    """
    order = sorted(range(len(centres)), key=lambda i: centres[i])
    shifts: list[float] = []
    reach = 0.0
    for i in order:
        shifts.append(reach + sizes[i] / 2)
        reach += sizes[i] + gap
    pools: list[tuple[float, int]] = []
    for i, shift in zip(order, shifts, strict=True):
        value, count = centres[i] - shift, 1
        while pools and pools[-1][0] > value:
            other, number = pools.pop()
            value, count = (value * count + other * number) / (count + number), count + number
        pools.append((value, count))
    latest = max(low, high - (reach - gap))
    begins = [min(max(value, low), latest) for value, count in pools for _ in range(count)]
    placed = [0.0] * len(centres)
    for i, begin, shift in zip(order, begins, shifts, strict=True):
        placed[i] = begin + shift
    return placed


def lanes(extents: Sequence[tuple[float, float]]) -> list[int]:
    """For each interval the first lane where it touches none before it, beginning at 0."""
    taken: list[list[tuple[float, float]]] = []
    found: list[int] = []
    for begin, end in extents:
        free = (i for i, lane in enumerate(taken) if all(end <= other[0] or begin >= other[1] for other in lane))
        lane = next(free, len(taken))
        if lane == len(taken):
            taken.append([])
        taken[lane].append((begin, end))
        found.append(lane)
    return found
