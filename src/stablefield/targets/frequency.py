r"""Frequencies: whether the rows of a run were drawn from a pool with the probabilities that it assumes.

The posterior over a pool has the probability of drawing a sample for its prior. A sampler that prefers some samples, or a
run on a part of the pool's data, makes another prior, which biases every target. It shows in how often each sample has been
drawn: Pearson's statistic

$$ X^2 = \sum_k \frac{(c_k - e_k)^2}{e_k} $$

over the samples that were to be expected once at least is chi-square if the draws are as assumed, and smaller if they come
in epochs. It grows by the number of rows that a batch makes of one sample, which is counted. And there are few samples that
have never come: $\sum_k e^{-e_k}$, or none of epochs. Rows with a label are compared with the other samples of that label,
since the posterior sees no others; rows without one, with all.

References:
    Pearson, "On the Criterion that a Given System of Deviations...", Philosophical Magazine 1900; Wilson, Hilferty, "The
    Distribution of Chi-Square", PNAS 1931.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from stablefield.targets.check import Check

__all__ = ["FIRST", "Frequencies"]

# Standard deviations beyond which draws are not as assumed: never by chance.
_SPREADS = 12.0
# Mean squared relative deviation of the probabilities that is worth a warning: 10 % each.
_DEVIATION = 0.01
# Draws for each sample before the first look; then whenever they have doubled.
FIRST = 4


class Frequencies:
    """Counts of the samples that were drawn.

    Args:
        weights: probability of each sample, any scale, shape (n,), float64.
        labels: label of each sample, integers (n,), or None.
        first: draws before the first look; four for each sample if None.
        name: what to call a sample, by its place.
    """

    def __init__(
        self,
        weights: Tensor,
        labels: Tensor | None,
        first: int | None = None,
        name: Callable[[int], str] = "sample {}".format,
    ) -> None:
        self._weights = weights
        self._labels = None if labels is None else _numbered(labels)
        kinds = 1 if labels is None else 2
        self._counts = torch.zeros(kinds, len(weights), dtype=torch.int32, device=weights.device)
        # Sum over batches of the squared numbers of rows of one sample, and what it is for independent draws.
        self._squares = torch.zeros((), dtype=weights.dtype, device=weights.device)
        self._rows, self._pairs = torch.zeros_like(self._squares), torch.zeros_like(self._squares)
        self._chance = (weights.square().sum() / weights.sum().square()).to(weights.dtype)
        self._drawn = 0
        self._next = first or FIRST * len(weights)
        self._name = name

    def add(self, index: Tensor, labelled: Tensor | None, counted: Tensor | None) -> Check | None:
        """Count a batch, and ask whether all draws so far are as assumed; None while it is too early to tell, or told.

        Args:
            index: the samples that were drawn, integers (B,).
            labelled: which rows have a label, bool (B,); None if no sample has one.
            counted: which rows to count, bool (B,); None for all.
        """
        if self._next == 0:
            return None
        count = len(self._weights)
        place = index.clamp(0, count - 1)
        if labelled is not None:
            place = place + count * labelled.long()
        one = torch.ones_like(place, dtype=torch.int32) if counted is None else counted.int()
        self._counts.view(-1).index_add_(0, place, one)
        rows = one.sum().to(self._squares)
        self._squares += _repeats(place, one.to(self._weights.dtype))
        self._rows += rows
        self._pairs += rows * (rows - 1)
        self._drawn += len(index)
        if self._drawn < self._next:
            return None
        self._next = 2 * self._drawn
        excess = torch.stack([self._excess(kind) for kind in range(len(self._counts))])
        return Check(excess <= 1, self._tell, warning=True)

    def _excess(self, kind: int) -> Tensor:
        """How far the draws with a label (kind 1) or without one (kind 0) are from what is assumed, over the bound."""
        counts = self._counts[kind].to(self._weights.dtype)
        expected = self._expected(counts, kind)
        often = expected >= 1
        cells = often.sum().clamp(min=1)
        # Rows of one sample in one batch, such as antithetic pairs, are one draw.
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

    def _tell(self, kind: int) -> str:
        self._next = 0  # told once
        counts = self._counts[kind].to(self._weights.dtype)
        expected = self._expected(counts, kind)
        worst = int(((counts - expected).abs() / expected.clamp(min=1).sqrt()).argmax())
        never = int((counts == 0).sum())
        among = " with a label" if kind else " without a label" if self._labels is not None else ""
        return (
            f"the rows{among} were not drawn from the Pool as it assumes: {self._name(worst)} came {int(counts[worst])} "
            f"times among {int(counts.sum())} rows, where {float(expected[worst]):.3g} were to be expected, and {never} "
            "samples never came. The targets are biased towards samples that come less often. Pass weights=... to the Pool "
            "with the probability of each sample, make it of the samples that you train on, and drop labels independently "
            "of the sample. Ignore this if each process draws from its own part of the Pool and all parts together make it "
            "up, or if you made the same draws twice, as by a second run from the same seed with this Pool. For calls that "
            "are no training pass StableTarget(..., validate_args=False)."
        )


def _numbered(labels: Tensor) -> Tensor:
    """The labels (n,) as numbers from 0 without gaps. `torch.unique` would make Python wait for a GPU."""
    values, order = labels.sort()
    numbers = torch.cat([values.new_zeros(1), (values.diff() != 0).cumsum(0)])
    return torch.empty_like(numbers).scatter_(0, order, numbers)


def _repeats(index: Tensor, counted: Tensor) -> Tensor:
    """Sum over the samples at `index` (B,) of their squared numbers of rows, where each row counts 1 or 0 (B,)."""
    values, order = index.sort()
    run = torch.cat([values.new_zeros(1), (values.diff() != 0).cumsum(0)])
    return torch.zeros_like(counted).index_add_(0, run, counted[order]).square().sum()
