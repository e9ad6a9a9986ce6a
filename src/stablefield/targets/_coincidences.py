r"""Coincidences: samples that come in several batches, as common birthdays do.

They show draws that prefer some samples long before every sample has come. Let $d_k$ be the number of earlier batches with
sample k. Given these, a row drawn as assumed, with probability $p_k$, has $\sum_k p_k d_k$ coincidences in expectation, with
a variance of at most $\sum_k p_k d_k^2$. So the coincidences D less the sum A of the expectations are a martingale. Let V be
the sum of the variances and b the largest $d_k$. By Freedman's inequality

$$ P(D - A \ge x) \le \exp\left(-\frac{x^2}{2 (V + b x / 3)}\right) , $$

whatever the pool, its weights and the time of the comparison. A is about $N^2 / 2n$ for N rows and equal weights. Epochs in
any order have fewer coincidences. A sample counts once in a batch, and a batch is compared with all but the one before it:
neither several rows of a sample in a batch nor such rows across its end are coincidences. A row with a label has $p_k$ and
$d_k$ among the samples and the earlier rows of its label, so it does not matter how often a label comes. Passes over one
batch, over a part of the pool or over the fixed share of a rank have more coincidences, too, but the fewest for so many
draws of so many samples, because their $d_k$ are equal up to 1. They are left to Pearson's test.

References:
    Freedman, "On Tail Probabilities for Martingales", Annals of Probability 1975, theorem 1.6.
"""

import math

import torch
from torch import Tensor

__all__ = ["Coincidences"]

# Standard deviations beyond which draws are not as assumed; chance never reaches them.
_SPREADS = 12.0
# The relative excess that deserves a warning.
_DEVIATION = 0.01
# The share of the coincidences that passes over a part of the pool would not have.
_UNEQUAL = 0.1
# Rows to keep until their coincidences are counted.
_KEPT = 2**15


class Coincidences:
    """Samples that come in several batches.

    Args:
        weights: probability of each sample, any scale, shape (n,), float64.
        labels: label of each sample, numbered from 0, (n,), or None.
    """

    @torch.inference_mode(False)  # or later calls could not count in place
    def __init__(self, weights: Tensor, labels: Tensor | None) -> None:
        n, self._weights, self._labels = len(weights), weights, labels
        kinds = 1 if labels is None else 2
        # The samples that a row may be: all without a label, number 0, else those of label j, number 1 + j.
        self._total = weights.new_zeros(1 if labels is None else 1 + n)
        self._total[0] = weights.sum()
        if labels is not None:
            self._total.index_add_(0, 1 + labels, weights)
        # The d_k; for each number the sums of p_k d_k and p_k d_k^2; for each kind of rows D, A and V.
        self._times = torch.zeros(kinds * n, dtype=torch.int32, device=weights.device)
        self._expected = weights.new_zeros(2, len(self._total))
        self._sums = weights.new_zeros(3, kinds)
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._rows = 0

    def add(self, place: Tensor, counted: Tensor) -> None:
        """Add a batch: the drawn samples (B,), plus n for rows with a label, and which rows to count, bool (B,)."""
        self._kept.append((place, counted))
        self._rows += len(place)
        if self._rows >= _KEPT:
            self._count()

    def _count(self) -> None:
        """Count the batches that were kept: many at once, because each operation takes its time."""
        if not self._kept:
            return
        n, calls = len(self._weights), len(self._kept) + 1
        place, counted = (torch.cat(parts) for parts in zip(*self._kept, strict=True))
        call = torch.cat([torch.full_like(part, k + 1) for k, (part, _) in enumerate(self._kept)])
        self._kept, self._rows = [], 0
        # In the order of samples and then of calls; the first row of each sample in a call decides, a counted one if any is.
        key = (2 * (place * calls + call) + (~counted).long()).sort().values
        row, place, call = key // 2, key // 2 // calls, key // 2 % calls
        begins = place.new_ones(1)
        drawn = torch.cat([begins, (row.diff() != 0).long()]) * (1 - key % 2)
        earlier = drawn.cumsum(0) - drawn
        of_sample = (torch.cat([begins, (place.diff() != 0).long()]) * earlier).cummax(0).values
        before = self._times[place] + earlier - of_sample
        neighbour = torch.searchsorted(key, 2 * (row - 1)).clamp(max=len(key) - 1)
        others = before - (key[neighbour] == 2 * (row - 1)).long()
        # The sums over the rows of the same number in earlier calls, but the last.
        kind = place // n
        number = kind if self._labels is None else kind * (1 + self._labels[place - kind * n])
        weight = self._weights[place - kind * n]
        chance = drawn * weight / self._total[number].clamp(min=torch.finfo(weight.dtype).tiny)
        gain = torch.stack([chance, chance * (2 * before + 1)])
        ordered, order = (number * calls + call).sort()
        running = torch.nn.functional.pad(gain[:, order].cumsum(1), (1, 0))
        first, last = (torch.searchsorted(ordered, number * calls + end) for end in (0, call - 1))
        sums = self._expected[:, number] + running[:, last] - running[:, first]
        self._sums.index_add_(1, kind, torch.cat([others[None].to(sums), sums]) * drawn)
        self._expected.index_add_(1, number, gain)
        self._times.index_add_(0, place, drawn.int())

    def deviations(self) -> Tensor:
        """How many more coincidences there are than chance makes, over the bound, for each kind of rows (1 or 2,)."""
        self._count()
        found, chance, variance = self._sums
        times = self._times.view(-1, len(self._weights))
        excess = (found - chance).clamp(min=0)
        spreads = excess / (variance + times.amax(1) * excess / 3).clamp(min=1).sqrt()
        unequal = torch.stack([self._unequal(each, kind) for kind, each in enumerate(times)])
        uneven = torch.minimum(spreads / _SPREADS, excess / (_DEVIATION * chance).clamp(min=1))
        return torch.minimum(uneven, unequal / _UNEQUAL)

    def _unequal(self, times: Tensor, kind: int) -> Tensor:
        """The share of the pairs of batches with a sample in common that equal `times` (n,) would not have."""
        times = times.to(self._weights.dtype)
        number = torch.zeros_like(times).long() if kind == 0 or self._labels is None else self._labels
        draws, samples = torch.zeros(2, len(times), dtype=times.dtype, device=times.device).index_add_(
            1, number, torch.stack([times, (times > 0).to(times)])
        )
        each = (draws / samples.clamp(min=1)).floor()
        least = samples * each * (each - 1) / 2 + (draws - samples * each) * each
        pairs = (times * (times - 1) / 2).sum()
        return (pairs - least.sum()) / pairs.clamp(min=1)

    def pairs(self, kind: int) -> tuple[int, int]:
        """The number of coincidences, and that expected."""
        found, chance, _ = self._sums[:, kind].tolist()
        return round(found), math.ceil(chance)
