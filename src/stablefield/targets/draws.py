"""Draws from a sharded set: counted where the samples lie, and compared with what is assumed.

The rows of all ranks come to a shard, so it sees how often all of them have drawn its samples. Those are compared with each
other, and the shard as a whole with the rest: shards may hold a class each. So every pair of samples is compared, and no
rank counts more than its own.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stablefield.targets.check import Check
from stablefield.targets.frequency import FIRST, Frequencies
from stablefield.targets.ranks import Ranks

__all__ = ["Draws", "Shares"]


@dataclass(frozen=True)
class Shares:
    """What weight lies where.

    Attributes:
        distinct: the labels in a shard, each once, sorted, (k,).
        here: the weight of each that lies there, (k,).
        elsewhere: the weight of each that lies elsewhere, (k,).
        own: all weight there.
        rest: all weight elsewhere.
    """

    distinct: Tensor
    here: Tensor
    elsewhere: Tensor
    own: float
    rest: float

    @classmethod
    def gathered(cls, ranks: Ranks, labels: Tensor | None, weights: Tensor, device: torch.device) -> "Shares":
        """Ask all ranks, each with the labels (n_r,) of its shard, or None, and their weights (n_r,)."""
        labels = torch.zeros(len(weights), dtype=torch.long) if labels is None else labels.long()
        weights = weights.to(device, torch.float32 if device.type == "mps" else torch.float64)
        distinct: Tensor
        kind: Tensor
        distinct, kind = torch.unique(labels.to(device), return_inverse=True)
        here = weights.new_zeros(len(distinct)).index_add(0, kind, weights)
        heads = ranks.gather_equal(torch.tensor([len(distinct)], device=device), "to compare their labels")
        counts = [int(head) for head in heads]
        others = ranks.gather(distinct[:, None], counts)[:, 0]
        weight = ranks.gather(here[:, None], counts)[:, 0]
        start = sum(counts[: ranks.rank])
        weight[start : start + len(distinct)] = 0
        place, known = _among(distinct, others)
        elsewhere = torch.zeros_like(here).index_add(0, place, weight * known)
        return cls(distinct, here, elsewhere, float(here.sum()), float(weight.sum()))


class Draws:
    """Counts of the draws of all ranks, as far as they concern the samples of this shard.

    Args:
        shares: what weight lies where.
        weights: of the samples of the shard, (n_r,), or None.
        labels: their labels, (n_r,), or None.
        start: the number of the first.
        count: how many there are.
        total: how many all ranks have.
        device: where the batches are.
    """

    def __init__(
        self,
        shares: Shares,
        weights: Tensor | None,
        labels: Tensor | None,
        start: int,
        count: int,
        total: int,
        device: torch.device,
    ) -> None:
        own = f"the samples {start} to {start + count - 1}"
        here, elsewhere = shares.here.to(device), shares.elsewhere.to(device)
        weights = torch.ones(count, dtype=here.dtype, device=device) if weights is None else weights
        # Before all samples have come some times, a sampler that reads the data part by part has not come round.
        first = FIRST * total
        self._distinct = None if labels is None else shares.distinct.to(device)
        self._within = Frequencies(weights, labels, first, lambda place: f"sample {start + place}")
        whole = torch.tensor([shares.own, shares.rest], dtype=here.dtype, device=device)
        self._between = Frequencies(
            whole, None, first, lambda place: "one of the samples elsewhere" if place else f"one of {own}"
        )
        self._of_label: Frequencies | None = None
        if labels is not None:
            kinds, distinct = torch.arange(len(here), device=device).repeat(2), shares.distinct

            def name(place: int) -> str:
                where = f"among {own}" if place < len(distinct) else "elsewhere"
                return f"one with label {int(distinct[place % len(distinct)])} {where}"

            self._of_label = Frequencies(torch.cat([here, elsewhere]), kinds, first, name)

    def add(self, place: Tensor, here: Tensor, labels: Tensor | None) -> list[Check]:
        """Count the rows of all ranks: their places in the shard, (B,), whether they are there, and their labels, or -1."""
        if not len(place):
            return []
        labelled = None if labels is None else labels >= 0
        found = [self._within.add(place, None if self._distinct is None else labelled, here)]
        where = (~here).long()
        found.append(self._between.add(where, None, None if labelled is None else ~labelled))
        if self._of_label is not None and self._distinct is not None and labels is not None:
            kind, known = _among(self._distinct, labels)
            found.append(self._of_label.add(kind + len(self._distinct) * where, labels >= 0, known))
        return [_of_all_ranks(check) for check in found if check is not None]


def _of_all_ranks(check: Check) -> Check:
    tell = check.tell

    def told(row: int) -> str:
        return f"{tell(row)} (Here the rows of all processes have been counted.)"

    return replace(check, tell=told)


def _among(distinct: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The place of each of `labels` (B,) in the sorted `distinct` (k,), and whether it is one of them."""
    place = torch.searchsorted(distinct, labels).clamp(max=len(distinct) - 1)
    return place, distinct[place] == labels
