r"""Draws: whether the rows of a run were drawn from a pool with the probabilities that it assumes.

The prior of a posterior over a pool is the probability of drawing each sample. A sampler that prefers some samples, or a run
on a part of the pool's data, has another prior, which biases every target. The counts of drawn samples reveal it: Pearson's
statistic

$$ X^2 = \sum_k \frac{(c_k - e_k)^2}{e_k} $$

summed over the samples with an expected count of at least 1, is chi-square if the draws are as assumed; sampling in epochs
makes it smaller. If a batch makes r rows of each sample, the statistic grows by a factor r, so r is measured. Calls in a
row with the same samples, such as those that accumulate the gradients of several draws of noise, are one draw. The number of
samples never drawn should be about $\sum_k e^{-e_k}$, and 0 after an epoch. Rows with a label are compared with the other
samples of that label, because the posterior sees no others; rows without one, with all.

That needs some draws of every sample. Long before, samples that come too often show in coincidences, see `_coincidences`.

The rows of all ranks reach each shard of a `ShardedPool`, so it sees how often all of them have drawn its samples. It
compares these with each other, and the shard as a whole with the rest, because each shard may hold one class. So every pair
of samples is compared, and no rank counts more than its own samples. Coincidences are left out there: a sampler may read one
shard after the other.

References:
    Pearson, "On the Criterion that a Given System of Deviations...", Philosophical Magazine 1900; Wilson, Hilferty, "The
    Distribution of Chi-Square", PNAS 1931.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stablefield._distributed import Ranks
from stablefield.targets._checks import Check
from stablefield.targets._coincidences import Coincidences
from stablefield.targets._engine.reference_matrix import wide_dtype

__all__ = ["Draws", "Frequencies", "Shares"]

# Standard deviations beyond which draws are not as assumed; chance never reaches them.
_SPREADS = 12.0
# Mean squared relative deviation of the probabilities that deserves a warning: 10 % each.
_DEVIATION = 0.01
# Draws for each sample before the first comparison; later ones follow whenever the draws have doubled.
_FIRST = 4
# Draws before the first comparison of coincidences.
_EARLY = 1024
# Calls in a row with the same samples that are one draw. Longer runs train on one batch, a draw in each step.
_SAME_CALLS = 64
# Probability of the same samples by chance, as in tiny pools, from which on calls are separate draws.
_COINCIDENCE = 1e-3


class Frequencies:
    """Counts of the drawn samples.

    Args:
        weights: probability of each sample, any scale, shape (n,), float64.
        labels: label of each sample, integers (n,), or None.
        first: draws before the first comparison; None for four for each sample, and for coincidences before.
        name: makes a sample's name from its index.
    """

    @torch.inference_mode(False)  # or later calls could not count in place
    def __init__(
        self,
        weights: Tensor,
        labels: Tensor | None,
        first: int | None = None,
        name: Callable[[int], str] = "sample {}".format,
    ) -> None:
        self._weights = weights
        self._labels: Tensor | None = None
        if labels is not None:
            numbers, order = _numbered(labels)
            self._labels = torch.empty_like(numbers).scatter_(0, order, numbers)
        kinds = 1 if labels is None else 2
        self._counts = torch.zeros(kinds, len(weights), dtype=torch.int32, device=weights.device)
        # Sum over batches of the squared numbers of rows of one sample, and its value for independent draws.
        self._squares = torch.zeros((), dtype=weights.dtype, device=weights.device)
        self._rows, self._pairs = torch.zeros_like(self._squares), torch.zeros_like(self._squares)
        self._chance = (weights.square().sum() / weights.sum().square()).to(weights.dtype)
        self._drawn = 0
        self._first = self._next = first or _FIRST * len(weights)
        self._repeated = _Repeated(self._chance)
        # The drawn rows without those of repeated calls.
        self._fresh = torch.zeros((), dtype=torch.long, device=weights.device)
        self._coincidences: Coincidences | None = None
        if first is None and self._first > _EARLY:
            self._next, self._coincidences = _EARLY, Coincidences(weights, self._labels)
        self._name = name

    def add(
        self, index: Tensor, labelled: Tensor | None, counted: Tensor | None, fresh: Tensor | None = None
    ) -> Check | None:
        """Count a batch, and check whether all draws so far are as assumed; None if it is too early, or after a warning.

        Args:
            index: the drawn samples, integers (B,).
            labelled: which rows have a label, bool (B,); None if no sample has one.
            counted: which rows to count, bool (B,); None for all.
            fresh: whether the batch is a new draw, a bool; None to ask whether it has the samples of the call before.
        """
        if self._next == 0:
            return None
        count = len(self._weights)
        fresh = ~self._repeated(index) if fresh is None else fresh
        self._fresh += fresh * len(index)
        place = index.clamp(0, count - 1)
        if labelled is not None:
            place = place + count * labelled.long()
        one = fresh.int().expand(len(place)) if counted is None else fresh.int() * counted.int()
        self._counts.view(-1).index_add_(0, place, one)
        rows = one.sum().to(self._squares)
        self._squares += _repeats(place, one.to(self._weights.dtype))
        self._rows += rows
        self._pairs += rows * (rows - 1)
        if self._coincidences is not None:
            self._coincidences.add(place, one > 0)
        self._drawn += len(index)
        if self._drawn < self._next:
            return None
        self._next = 2 * self._drawn
        if self._coincidences is not None and self._drawn < self._first:
            self._next = min(self._next, self._first)
            return Check(self._coincidences.deviations() <= 1, self._message, warning=True)
        self._coincidences = None
        deviations = torch.stack([self._deviation(kind) for kind in range(len(self._counts))])
        return Check((deviations <= 1) | (self._fresh < self._first), self._message, warning=True)

    def _deviation(self, kind: int) -> Tensor:
        """The deviation of the draws with a label (kind 1) or without (kind 0) from the assumption, over the bound."""
        counts = self._counts[kind].to(self._weights.dtype)
        expected = self._expected(counts, kind)
        often = expected >= 1
        cells = often.sum().clamp(min=1)
        # Rows of one sample in one batch, such as antithetic pairs, count as one draw.
        repeats = (self._squares / (self._rows + self._chance * self._pairs).clamp(min=1)).clamp(min=1)
        square = torch.where(often, (counts - expected).square() / expected.clamp(min=1), 0).sum() / repeats
        width = 2 / (9 * cells)
        spreads = ((square / cells) ** (1 / 3) - (1 - width)) / width.sqrt()
        deviation = (square - cells) * repeats / counts.sum().clamp(min=1)
        uneven = torch.minimum(spreads / _SPREADS, deviation / _DEVIATION)
        likely = torch.exp(-expected / repeats) * often
        missing = ((counts == 0) & often).sum() - likely.sum()
        return torch.maximum(uneven, missing / (_SPREADS * (1 + likely.sum().sqrt())))

    def _expected(self, counts: Tensor, kind: int) -> Tensor:
        if kind == 0 or self._labels is None:
            return counts.sum() * self._weights / self._weights.sum()
        classes = torch.zeros(len(counts), dtype=counts.dtype, device=counts.device)
        drawn = classes.index_add(0, self._labels, counts)
        weight = classes.index_add(0, self._labels, self._weights)
        return (drawn / weight.clamp(min=torch.finfo(counts.dtype).tiny))[self._labels] * self._weights

    def _message(self, kind: int) -> str:
        self._next = 0  # one warning is enough
        counts = self._counts[kind].to(self._weights.dtype)
        expected = self._expected(counts, kind)
        worst = int(((counts - expected).abs() / expected.clamp(min=1).sqrt()).argmax())
        more = f"and {int((counts == 0).sum())} samples never came"
        if self._coincidences is not None:
            found, chance = self._coincidences.pairs(kind)
            more = f"and two batches had a sample in common {found} times, where at most {chance} were expected"
            self._coincidences = None
        among = " with a label" if kind else " without a label" if self._labels is not None else ""
        return (
            f"the rows{among} were not drawn from the Pool as it assumes: {self._name(worst)} came {int(counts[worst])} "
            f"times among {int(counts.sum())} rows, where {float(expected[worst]):.3g} were expected, {more}. The targets "
            "are biased towards samples that come less often. Pass weights=... to the Pool with the probability of each "
            "sample, make the Pool from the samples that you train on, and drop labels independently of the sample. Ignore "
            "this if each process draws from its own part of the Pool and the parts together cover it, or if you made the "
            "same draws twice, such as in a second run from the same seed with this Pool. For calls outside training pass "
            "StableTarget(..., validate_args=False)."
        )


class _Repeated:
    """Whether calls have the same samples as the call before.

    Args:
        chance: probability that two independent rows have the same sample.
    """

    def __init__(self, chance: Tensor) -> None:
        self._chance = chance
        self._last: Tensor | None = None
        self._calls = torch.zeros((), dtype=torch.long, device=chance.device)

    def __call__(self, index: Tensor) -> Tensor:
        """Whether the samples at `index` (B,) are those of the last call, and the run is not too long: a bool on its device.

        `torch.equal` would wait for a GPU.
        """
        last, self._last = self._last, index.clone()
        if last is None or last.shape != index.shape:
            self._calls = torch.zeros_like(self._calls)
        else:
            same = (last == index).all() & (self._chance ** len(index) < _COINCIDENCE)
            self._calls = torch.where(same, self._calls + 1, 0)
        return (self._calls > 0) & (self._calls < _SAME_CALLS)


def _numbered(values: Tensor) -> tuple[Tensor, Tensor]:
    """The sorted values (n,) as consecutive numbers from 0, and their order: `torch.unique` would wait for a GPU."""
    ordered, order = values.sort()
    return torch.cat([ordered.new_zeros(1), (ordered.diff() != 0).cumsum(0)]), order


def _repeats(index: Tensor, counted: Tensor) -> Tensor:
    """Sum over the samples at `index` (B,) of their squared numbers of rows, where each row counts 1 or 0 (B,)."""
    numbers, order = _numbered(index)
    return torch.zeros_like(counted).index_add_(0, numbers, counted[order]).square().sum()


@dataclass(frozen=True)
class Shares:
    """The prior weight in a shard and elsewhere.

    Attributes:
        distinct: the labels in the shard, each once, sorted, (k,).
        here: the weight of each label in the shard, (k,).
        elsewhere: the weight of each label elsewhere, (k,).
        own: all weight in the shard.
        rest: all weight elsewhere.
    """

    distinct: Tensor
    here: Tensor
    elsewhere: Tensor
    own: float
    rest: float

    @classmethod
    def gathered(cls, ranks: Ranks, labels: Tensor | None, weights: Tensor, device: torch.device) -> "Shares":
        """Collect them over all ranks; each passes the labels (n_r,) of its shard, or None, and their weights (n_r,)."""
        labels = torch.zeros(len(weights), dtype=torch.long, device="cpu") if labels is None else labels.long()
        weights = weights.to(device, wide_dtype(device))
        distinct: Tensor
        kind: Tensor
        distinct, kind = torch.unique(labels.to(device), return_inverse=True)
        here = weights.new_zeros(len(distinct)).index_add(0, kind, weights)
        heads = ranks.all_gather(torch.tensor([len(distinct)], device=device), "to compare their labels")
        counts = [int(head) for head in heads]
        others = ranks.all_gather_rows(distinct, "to compare their labels", counts)
        weight = ranks.all_gather_rows(here, "to compare their labels", counts).clone()
        start = sum(counts[: ranks.rank])
        weight[start : start + len(distinct)] = 0
        place, known = _among(distinct, others)
        elsewhere = torch.zeros_like(here).index_add(0, place, weight * known)
        return cls(distinct, here, elsewhere, float(here.sum()), float(weight.sum()))


class Draws:
    """Counts of the draws of all ranks from the samples of this shard.

    Args:
        shares: the prior weight in this shard and elsewhere.
        weights: of the samples of the shard, (n_r,), or None.
        labels: their labels, (n_r,), or None.
        start: index of the shard's first sample in the whole set.
        count: number of samples in the shard.
        total: number of samples of all ranks.
        device: the device of the batches.
    """

    @torch.inference_mode(False)  # or later calls could not count in place
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
        # A sampler that reads the data part by part needs some passes before all samples have come.
        first = _FIRST * total
        self._distinct = None if labels is None else shares.distinct.to(device)
        self._repeated = _Repeated(torch.full_like(here[0], 1 / total))
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

    def add(self, place: Tensor, here: Tensor, labels: Tensor | None, source: Tensor) -> list[Check]:
        """Count the rows of all ranks.

        Args:
            place: their indices in the shard, (B,).
            here: whether they are in it, bool (B,).
            labels: their labels, (B,), or -1; or None.
            source: their indices in the whole set, (B,).
        """
        if not len(place):
            return []
        fresh = ~self._repeated(source)
        labelled = None if labels is None else labels >= 0
        found = [self._within.add(place, None if self._distinct is None else labelled, here, fresh)]
        where = (~here).long()
        found.append(self._between.add(where, None, None if labelled is None else ~labelled, fresh))
        if self._of_label is not None and self._distinct is not None and labels is not None:
            kind, known = _among(self._distinct, labels)
            found.append(self._of_label.add(kind + len(self._distinct) * where, labels >= 0, known, fresh))
        return [_of_all_ranks(check) for check in found if check is not None]


def _of_all_ranks(check: Check) -> Check:
    def message(row: int) -> str:
        return f"{check.message(row)} (This counts the rows of all processes.)"

    return replace(check, message=message)


def _among(distinct: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The index of each of `labels` (B,) in the sorted `distinct` (k,), and whether it is one of them."""
    place = torch.searchsorted(distinct, labels).clamp(max=len(distinct) - 1)
    return place, distinct[place] == labels
