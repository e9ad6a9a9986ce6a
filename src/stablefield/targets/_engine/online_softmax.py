r"""Online softmax: sums over some of the references, which merge into those over all of them.

For one query and references $k$ in a part, with logits $l_k$ relative to a fixed anchor, the sums are

$$ m \approx \max_k l_k, \quad Z = \sum_k e^{l_k - m}, \quad Z_2 = \sum_k e^{2 (l_k - m)}, \quad
   E = \sum_k e^{l_k - m} |y_k - a|^2, \quad S = \sum_k e^{l_k - m} (y_k - a) . $$

E and S are relative to the anchor $a$, so that both keep their digits where references are close to it; while chunks are
added, they are relative to the origin of the references, see `Logits.relative_to_anchor`. Two parts with the same anchor
merge by rescaling both to the larger $m$; the operation is associative and commutative, over chunks, mirrored sets or
processes. The scalars are kept in float64, S in the dtype of the data.

References:
    Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv 1805.02867, section 3.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from stablefield.targets._engine.matmul import Chunk
from stablefield.targets._engine.rows import wide_dtype

__all__ = ["Energy", "OnlineSoftmax"]

# A logit may exceed the level m by this much before the sums are rescaled to it, a pass over all of them: e^16 squared,
# summed over any number of references, is far from the end of float32.
_SLACK = 16.0
# Share of the rows above which it is cheaper to multiply all than to pick those that a chunk has weight for.
_MANY = 0.75

Energy = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""What weights (b, c) of a chunk, their sums (b,) and the queries that they are of (None for all) add to E, shape (b,)."""


@dataclass
class OnlineSoftmax:
    """Sums over a part of the references for B queries.

    Attributes:
        peak: the level m of the exponents, shape (B,): the largest logit, or up to 16 below it; -inf where no reference has
            been allowed so far.
        mass: Z, shape (B,).
        mass_squared: Z_2, shape (B,).
        energy: E, shape (B,).
        total: S, shape (B, d).
        log_prior: log of the summed prior weights of the allowed references, shape (B,).
    """

    peak: Tensor
    mass: Tensor
    mass_squared: Tensor
    energy: Tensor
    total: Tensor
    log_prior: Tensor

    @classmethod
    def empty(cls, like: Tensor, level: Tensor | None = None) -> "OnlineSoftmax":
        """The neutral element, no reference seen, for rows `like` (B, d).

        `level` (B,) is a logit that another part is known to have: what has no weight beside it need not be added here.
        """
        nothing = like.new_full((len(like),), -torch.inf, dtype=wide_dtype(like.device))
        zero = torch.zeros_like(nothing)
        peak = nothing if level is None else level.clone()
        return cls(peak, zero, zero.clone(), zero.clone(), torch.zeros_like(like), nothing.clone())

    @classmethod
    def of_anchors(cls, logit: Tensor, rows: Tensor) -> "OnlineSoftmax":
        """The anchor of each query as a reference; its prior weight is left to `add_prior`.

        Args:
            logit: its logit, shape (B,), float64; -inf for a query whose anchor is none.
            rows: the anchors, shape (B, d).
        """
        mass = torch.ones_like(logit).masked_fill_(torch.isneginf(logit), 0)
        nothing = torch.full_like(logit, -torch.inf)
        # Of zeros that take no memory.
        total = rows.new_zeros(1, 1).expand(rows.shape)
        return cls(logit, mass, mass.clone(), torch.zeros_like(mass), total, nothing)

    def add_prior(self, log_prior: Tensor) -> None:
        """Count prior weights, given as the log of their sum, shape (B,) or (): of what `add` adds, and of the anchors."""
        self.log_prior = torch.logaddexp(self.log_prior, log_prior.to(self.log_prior.dtype))

    def add(self, logits: Tensor, largest: Tensor, chunk: Chunk, energy: Energy, among: int | None = None) -> None:
        """Add a chunk of c references, but for their prior weights.

        Args:
            logits: shape (B, c), -inf where a reference may not be used; overwritten.
            largest: the largest logit of each query, shape (B,).
            chunk: the references.
            energy: what their weights add to E.
            among: how many references there are in all. What weighs so little that all of them, if they weighed no more,
                could not be seen in the dtype, is left out. This reads values, for which the host would wait for a
                GPU: None adds all without reading any.
        """
        old = self.peak
        above = largest > old + _SLACK
        if among is None:
            self._raise_to(torch.where(above, largest.to(old.dtype), old))
            self._add_all(logits, chunk, energy)
            return
        unseen = torch.finfo(logits.dtype).eps / (4 * among)
        seen = largest > old + math.log(unseen)
        count = int(seen.sum())
        if count == 0:
            return
        if bool(above.any()):
            self._raise_to(torch.where(above, largest.to(old.dtype), old))
        self._add_some(seen.nonzero()[:, 0], logits, chunk, energy, unseen * len(chunk))

    def merge(self, other: "OnlineSoftmax") -> "OnlineSoftmax":
        """The posterior sums over the references of both parts, which must be disjoint and share their anchor."""
        peak = torch.maximum(self.peak, other.peak)
        a, b = torch.exp(self.peak - _finite(peak)), torch.exp(other.peak - _finite(peak))
        narrow = self.total.dtype
        return OnlineSoftmax(
            peak=peak,
            mass=a * self.mass + b * other.mass,
            mass_squared=a**2 * self.mass_squared + b**2 * other.mass_squared,
            energy=a * self.energy + b * other.energy,
            total=a.to(narrow)[:, None] * self.total + b.to(narrow)[:, None] * other.total,
            log_prior=torch.logaddexp(self.log_prior, other.log_prior),
        )

    def with_anchors(self, anchors: "OnlineSoftmax") -> "OnlineSoftmax":
        """As `merge` with the part of the anchors alone, whose sums about themselves are 0, at no cost.

        `self` must have started from the level of `anchors`, so that it is not below it.
        """
        scale = torch.exp(anchors.peak - _finite(self.peak))
        return replace(
            self,
            mass=scale * anchors.mass + self.mass,
            mass_squared=scale**2 * anchors.mass_squared + self.mass_squared,
            log_prior=torch.logaddexp(self.log_prior, anchors.log_prior),
        )

    def _raise_to(self, peak: Tensor) -> None:
        keep = torch.exp(self.peak - _finite(peak))
        self.peak = peak
        self.mass = self.mass * keep
        self.mass_squared = self.mass_squared * keep**2
        self.energy = self.energy * keep
        self.total.mul_(keep.to(self.total.dtype)[:, None])

    def _add_all(self, logits: Tensor, chunk: Chunk, energy: Energy) -> None:
        weights = _exp(logits.sub_(_finite(self.peak).to(logits.dtype)[:, None]))
        mass = weights.sum(1).to(self.mass.dtype)
        self.mass = self.mass + mass
        self.energy = self.energy + energy(weights, mass, None)
        chunk.add_weighted(self.total, weights)
        self.mass_squared = self.mass_squared + weights.square_().sum(1)

    def _add_some(self, queries: Tensor, logits: Tensor, chunk: Chunk, energy: Energy, unseen: float) -> None:
        """Add for `queries`, and make the product for those of them whose chunk weighs more than `unseen`."""
        if len(queries) < len(logits):
            logits = logits.index_select(0, queries)
        weights = _exp(logits.sub_(_finite(self.peak[queries]).to(logits.dtype)[:, None]))
        narrow = weights.sum(1)
        heavy = narrow > unseen
        count = int(heavy.sum())
        if count > _MANY * len(self.total) and len(queries) == len(self.total):
            chunk.add_weighted(self.total, weights)
        else:
            if count < len(queries):
                # From all sums alike, or they would not belong together.
                queries, weights, narrow = queries[heavy], weights[heavy], narrow[heavy]
            if not count:
                return
            self.total.index_add_(0, queries, chunk.weighted(weights))
        mass = narrow.to(self.mass.dtype)
        self.mass = self.mass.index_add(0, queries, mass)
        self.energy = self.energy.index_add(0, queries, energy(weights, mass, queries))
        self.mass_squared = self.mass_squared.index_add(0, queries, weights.square_().sum(1).to(mass.dtype))


def _exp(logits: Tensor) -> Tensor:
    """Exponentials, in place; 0 for those that are no normal numbers."""
    if logits.device.type != "cpu":
        return logits.exp_()
    # Denormal results take a CPU thirty times as long, and results of 0 ten times; most logits would have them.
    least = 4 * torch.finfo(logits.dtype).tiny
    return functional.threshold(logits.clamp_(min=math.log(least)).exp_(), 2 * least, 0.0, inplace=True)


def _finite(peak: Tensor) -> Tensor:
    # exp(-inf - -inf) would be nan; with 0 in place of an empty peak it is the 0 that is meant.
    return torch.where(torch.isneginf(peak), torch.zeros_like(peak), peak)
