r"""Spread: whether the batches of a run are spread over a pool like random subsets.

If a part of the pool is drawn for a batch, the batch's own rows are in it, so the batch must be a random subset itself.
Batches from sorted data, of one class or of one clip are not: their samples lie together. Let $v_i$ be the place of row i in
the order of the pool, shifted and scaled to mean 0 and variance 1 over the pool. For a batch of u rows that are a random
subset, $z = \sum_i v_i / \sqrt u$ has mean 0 and a variance of at most 1, so the sum of $z^2$ over k batches is about
chi-square with k degrees of freedom, or less. For batches whose rows have the correlation $\rho$, the mean of $z^2$ is
$1 + (u - 1) \rho$. References of which u of s are such rows lie off the middle of the data by the share $u / s$ of the
batch's own deviation, so at high noise the slope of the bias on the exact target is about $\rho u / s$.

A sample counts when it comes first, so fixed batches that come again and again say nothing new, and only until three
quarters of the pool have come, since the rest is no random subset. A row with a label meets the batch's rows of its label
only: batches of one class do not bias it, so its place is that among the samples of its label. A row whose label was dropped
meets all, so the places of its batch are in the order of the labels, which shows batches of one class in shuffled data, too.

References:
    Wilson, Hilferty, "The Distribution of Chi-Square", PNAS 1931.
"""

import math

import torch
from torch import Tensor

from stablefield.targets._checks import Check

__all__ = ["Spread"]

# Standard deviations that chance never reaches, and the slope of a bias that deserves a warning.
_SPREADS, _SLOPE = 12.0, 0.01
# Batches before the first comparison, and the share of the samples that may have come.
_LEAST, _COVERED = 4, 0.75


class Spread:
    """Whether the batches of a run are spread over a pool like random subsets.

    Args:
        n: number of samples.
        size: number of references of a batch.
        labels: label of each sample, (n,), or None.
    """

    @torch.inference_mode(False)  # or later calls could not count in place
    def __init__(self, n: int, size: int, labels: Tensor | None) -> None:
        self._n, self._size, self._by_label = n, size, labels is not None
        places = [torch.arange(n, device="cpu")]
        counts = [torch.full((n,), n, device="cpu")]
        if labels is not None:
            _, number, members = torch.unique(labels.cpu(), return_inverse=True, return_counts=True)
            order = number.argsort(stable=True)
            places = [torch.empty_like(order).scatter_(0, order, places[0])] * 2
            places[1] = places[1] - (members.cumsum(0) - members)[number]
            counts.append(members[number])
        # For rows without a label, and with one: the standardised places, and 0 for the only sample of a label.
        count = torch.stack(counts)
        centred = (2 * torch.stack(places) + 1).double() / count - 1
        self._places = (centred / ((1 - 1 / count.double().square()) / 3).sqrt()).where(count > 1, 0).float()
        self._placed = count > 1
        self._seen, self._came = torch.zeros(n, dtype=torch.bool, device="cpu"), 0
        self._squares, self._batches, self._done = [0.0, 0.0], [0, 0], False

    def add(self, index: Tensor, labelled: Tensor | None, counted: Tensor) -> Check | None:
        """Count a batch; a warning if the batches so far are no random subsets.

        Args:
            index: the drawn samples, integers (B,), on the host, as all.
            labelled: which rows have a label, bool (B,); None if no sample has one.
            counted: which rows to count, bool (B,).
        """
        if self._done:
            return None
        labelled = torch.zeros_like(counted) if labelled is None else labelled
        kinds = [index[counted]] if bool((counted & ~labelled).any()) else [index[:0]]
        kinds += [index[counted & labelled]] if self._by_label else []
        found = [self._square(some, kind) for kind, some in enumerate(kinds)]
        some = torch.unique(index[counted])
        self._came += int((~self._seen[some]).sum())  # not counted anew: a pool may be large
        self._seen[some] = True
        self._done = self._came > _COVERED * self._n
        for kind, square in enumerate(found):
            if square is not None:
                self._squares[kind] += square
                self._batches[kind] += 1
        uneven = [self._uneven(kind) for kind in range(len(kinds))]
        if not any(uneven):
            return None
        return Check(~torch.tensor(uneven, device="cpu"), self._message, warning=True)

    def _square(self, index: Tensor, kind: int) -> float | None:
        """The square of z of the samples at `index` (m,) that come first; None if most have come before."""
        samples = torch.unique(index)
        new = samples[~self._seen[samples]]
        if not len(new) or 2 * len(new) < len(samples):
            return None
        return float(self._places[kind, new].sum()) ** 2 / max(1, int(self._placed[kind, new].sum()))

    def _uneven(self, kind: int) -> bool:
        batches, square = self._batches[kind], self._squares[kind]
        if batches < _LEAST or (square / batches - 1) / self._size < _SLOPE:
            return False
        width = 2 / (9 * batches)
        return ((square / batches) ** (1 / 3) - (1 - width)) / math.sqrt(width) > _SPREADS

    def _message(self, kind: int) -> str:
        self._done = True  # one warning is enough
        order = "of one label" if kind else "in the order of the labels" if self._by_label else "in its order"
        unless = "" if self._by_label and not kind else " Ignore this if the Pool's samples are in random order."
        ratio = self._squares[kind] / self._batches[kind]
        return (
            f"the batches are no random subsets of the Pool: their samples {order} lie so close together that over "
            f"{self._batches[kind]} batches their middle has {ratio:.3g} times the variance of that of random ones. With "
            f"size={self._size} the rows of a batch are references for each other, which then biases the targets towards "
            "the batch. Shuffle all of the data, make the Pool from the samples that you train on, or pass "
            f"weights=torch.ones({self._n}) to the Pool, whose references are drawn without regard to the batch.{unless} "
            "For calls outside training pass StableTarget(..., validate_args=False)."
        )
