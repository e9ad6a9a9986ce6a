r"""Flips: whether a row is a flipped sample with probability 1/2.

A pool that holds mirror images or flipped samples assumes that a row is a flipped one with probability 1/2. Let $f_i$ be 1/2
if row i is flipped, and -1/2 otherwise. Rows of one sample g in a batch may share their flip; those of different samples do
not. Then $\sum_g f_g$ with $f_g = \sum_{i \in g} f_i$ has mean 0, and its variance is the expectation of $\sum_g f_g^2$. The
sum exceeds s roots of the latter with a probability of at most $2 e^{-s^2 / 2}$, by Hoeffding's inequality, since each term
is as likely as its negative.

References:
    Hoeffding, "Probability Inequalities for Sums of Bounded Random Variables", JASA 1963.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stablefield.targets._checks import Check

__all__ = ["Flips"]

# Standard deviations beyond which the share is not 1/2, by chance never reached, and the deviation that deserves a warning.
_SPREADS, _DEVIATION = 5.0, 0.01
# Draws for each sample before the first comparison; later ones follow whenever the draws have doubled.
_FIRST = 4


class Flips:
    """Counts of the rows that are flipped samples.

    Args:
        count: number of samples.
    """

    @torch.inference_mode(False)  # or later calls could not count in place
    def __init__(self, count: int) -> None:
        # Sums over the batches of each sample's flipped rows less its others, of the squares of this, and of its rows.
        self._sums = torch.zeros(3, count, dtype=torch.long, device="cpu")
        self._drawn = 0
        # A loader that reads the samples and then the flipped ones needs two passes until the share is 1/2.
        self._next = _FIRST * count
        self._last: tuple[Tensor, Tensor, Tensor] | None = None
        self._own: Tensor | None = None

    def add(
        self, index: Tensor, flipped: Tensor | None, counted: Tensor, own: Callable[[Tensor], Tensor]
    ) -> Check | None:
        """Count a batch, and check the share of flipped rows; None if it is too early, or after a warning.

        Args:
            index: the drawn samples, integers (B,), on the host, as all.
            flipped: which rows are flipped, bool (B,); None if no row says so: then none is, because the pool compares rows
                with its samples.
            counted: which rows to count, bool (B,).
            own: finds which of the samples at an index (m,) are their own flips, bool (m,): they count for neither.
        """
        if self._next == 0:
            return None
        given, flipped = flipped is not None, torch.zeros_like(counted) if flipped is None else flipped
        last, self._last = self._last, (index.clone(), flipped.clone(), counted.clone())
        if last is not None and all(torch.equal(one, other) for one, other in zip(last, self._last, strict=True)):
            return None  # the same draw, such as to accumulate gradients over draws of noise
        samples, place = torch.unique(index[counted], return_inverse=True)
        signs = 2 * flipped[counted].long() - 1
        sums = signs.new_zeros(2, len(samples)).index_add_(1, place, torch.stack([signs, signs.abs()]))
        self._sums[:, samples] += torch.stack([sums[0], sums[0].square(), sums[1]])
        self._drawn += len(place)
        if self._drawn < self._next:
            return None
        self._next = 2 * self._drawn
        if self._uneven() and self._own is None:  # it reads samples, so only now
            self._own = torch.zeros(self._sums.shape[1], dtype=torch.bool, device="cpu")
            there = self._sums[2].nonzero()[:, 0]
            self._own[there] = own(there)
        return Check(torch.tensor([not self._uneven()], device="cpu"), lambda _: self._message(given), warning=True)

    def _totals(self) -> list[int]:
        sums = self._sums if self._own is None else self._sums[:, ~self._own]
        return sums.sum(1).tolist()

    def _uneven(self) -> bool:
        total, square, rows = self._totals()
        return abs(total) > max(_SPREADS * math.sqrt(square), 2 * _DEVIATION * rows)

    def _message(self, given: bool) -> str:
        self._next = 0  # one warning is enough
        total, square, rows = self._totals()
        how = (
            "say flip=" if given else "are flipped (no flip= was given, and rows are compared with the Pool's samples)"
        )
        return (
            f"{(rows + total) // 2} of {rows} rows {how}, {abs(total) / math.sqrt(square):.3g} standard errors from half of "
            "them. The Pool holds each sample and its flip, and takes both for equally likely: the targets are biased. "
            "Flip each row with probability 1/2 and pass flip=, or make the Pool without mirrored=True, flipped= or "
            "flipped_mean=. For calls outside training pass StableTarget(..., validate_args=False)."
        )
