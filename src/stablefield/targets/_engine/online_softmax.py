r"""Online softmax: sums over parts of the references, which merge into sums over all of them.

For one query and references $k$ in a part, with logits $l_k$ relative to one anchor, the sums are

$$ m \approx \max_k l_k, \quad Z = \sum_k e^{l_k - m}, \quad Z_2 = \sum_k e^{2 (l_k - m)}, \quad
   E = \sum_k e^{l_k - m} |y_k - a|^2, \quad S = \sum_k e^{l_k - m} (y_k - a) . $$

E and S are relative to the anchor $a$, so that both keep their digits for references close to it; while chunks are added,
they are relative to the origin of the references, see `Logits.relative_to_anchor`. Two parts with the same anchor
merge by rescaling both to the larger $m$; the operation is associative and commutative, over chunks, mirrored sets or
processes. The scalars are kept in float64, S in the dtype of the data.

References:
    Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv 1805.02867, section 3.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional

from stablefield.targets._engine.matmul import Chunk
from stablefield.targets._engine.reference_matrix import wide_dtype

__all__ = ["ChunkLogits", "OnlineSoftmax"]

# A logit may exceed the level m by this much before the sums are rescaled, which is a pass over all of them: e^16 squared,
# summed over any number of references, is far below the limit of float32.
_SLACK = 16.0
# Share of the rows above which it is cheaper to multiply all than to select those for which a chunk has weight.
_MANY = 0.75


@dataclass(frozen=True)
class ChunkLogits:
    """The logits of a chunk of c references.

    Attributes:
        chunk: the references.
        values: the logits, shape (B, c), -inf for references that a row may not use.
        largest: the largest logit of each row, shape (B,).
        log_prior: log of the summed prior weights of the references that the row may use, shape (B,) or ().
        energy: the contribution to E, shape (b,), of weights (b, c), their sums (b,) and their rows (None for all).
    """

    chunk: Chunk
    values: Tensor
    largest: Tensor
    log_prior: Tensor
    energy: Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass
class OnlineSoftmax:
    """Sums over a part of the references for B queries.

    Attributes:
        peak: the level m of the exponents, shape (B,): the largest logit, or up to 16 below it; -inf if no reference has
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
        """The neutral element, without references, for rows `like` (B, d).

        `level` (B,) is a logit that another part is known to have: references without weight beside it may be skipped here.
        """
        nothing = like.new_full((len(like),), -torch.inf, dtype=wide_dtype(like.device))
        zero = torch.zeros_like(nothing)
        peak = nothing if level is None else level.clone()
        return cls(peak, zero, zero.clone(), zero.clone(), torch.zeros_like(like), nothing.clone())

    def add(self, part: ChunkLogits, among: int | None = None) -> None:
        """Add a chunk of references; overwrites the values of its logits.

        Args:
            part: the logits.
            among: the total number of references, to skip weights so small that even this many would not change the sum.
                Finding them makes the host wait for a GPU; None skips nothing, and does not wait.
        """
        self.log_prior = torch.logaddexp(self.log_prior, part.log_prior.to(self.log_prior.dtype))
        old, largest = self.peak, part.largest
        above = largest > old + _SLACK
        if among is None:
            self._raise_to(torch.where(above, largest.to(old.dtype), old))
            self._add_all(part)
            return
        unseen = torch.finfo(part.values.dtype).eps / (4 * among)
        seen = (largest > old + math.log(unseen)).nonzero()[:, 0]
        if not len(seen):
            return
        if bool(above.any()):
            self._raise_to(torch.where(above, largest.to(old.dtype), old))
        self._add_some(seen, part, unseen * len(part.chunk))

    def put(self, rows: Tensor | slice, part: "OnlineSoftmax") -> None:
        """Put the sums of `part` (b,) in place of those of the rows at `rows` (b,)."""
        for field in fields(self):
            getattr(self, field.name)[rows] = getattr(part, field.name)

    def at(self, rows: Tensor | slice) -> "OnlineSoftmax":
        """The sums of the rows at `rows` (b,); changes of `total` are seen here if they are a slice."""
        return OnlineSoftmax(*(getattr(self, field.name)[rows] for field in fields(self)))

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

    def with_anchors(self, logit: Tensor) -> "OnlineSoftmax":
        """Like `merge` with the sums over only the anchors, which are 0 relative to themselves, at no cost.

        Their prior weights have been counted with the chunks, although their sums have not. `self` must have started from
        the level `logit` (B,), -inf for an anchor that is not a reference, so that its peak is not below it.
        """
        scale = torch.exp(logit - _finite(self.peak))
        return replace(self, mass=scale + self.mass, mass_squared=scale**2 + self.mass_squared)

    def _raise_to(self, peak: Tensor) -> None:
        keep = torch.exp(self.peak - _finite(peak))
        self.peak = peak
        self.mass = self.mass * keep
        self.mass_squared = self.mass_squared * keep**2
        self.energy = self.energy * keep
        self.total.mul_(keep.to(self.total.dtype)[:, None])

    def _add_all(self, part: ChunkLogits) -> None:
        weights = _exp(part.values.sub_(_finite(self.peak).to(part.values.dtype)[:, None]))
        mass = weights.sum(1).to(self.mass.dtype)
        self.mass = self.mass + mass
        self.energy = self.energy + part.energy(weights, mass, None)
        part.chunk.add_weighted(self.total, weights)
        self.mass_squared = self.mass_squared + weights.square_().sum(1)

    def _add_some(self, rows: Tensor, part: ChunkLogits, unseen: float) -> None:
        """Add for `rows`, but make the product only for those whose chunk weighs more than `unseen`."""
        logits = part.values if len(rows) == len(part.values) else part.values.index_select(0, rows)
        weights = _exp(logits.sub_(_finite(self.peak[rows]).to(logits.dtype)[:, None]))
        narrow = weights.sum(1)
        heavy = narrow > unseen
        count = int(heavy.sum())
        if count > _MANY * len(self.total) and len(rows) == len(self.total):
            part.chunk.add_weighted(self.total, weights)
        elif count:
            if count < len(rows):
                # Drop the others from all sums, so that the sums stay consistent.
                rows, weights, narrow = rows[heavy], weights[heavy], narrow[heavy]
            self.total.index_add_(0, rows, part.chunk.weighted(weights, rows))
        else:
            return
        mass = narrow.to(self.mass.dtype)
        self.mass = self.mass.index_add(0, rows, mass)
        self.energy = self.energy.index_add(0, rows, part.energy(weights, mass, rows))
        self.mass_squared = self.mass_squared.index_add(0, rows, weights.square_().sum(1).to(mass.dtype))


def _exp(logits: Tensor) -> Tensor:
    """Exponentials, in place; 0 instead of denormal numbers."""
    if logits.device.type != "cpu":
        return logits.exp_()
    # Denormal results take a CPU thirty times as long, and results of 0 ten times; most logits would give them.
    least = 4 * torch.finfo(logits.dtype).tiny
    return functional.threshold(logits.clamp_(min=math.log(least)).exp_(), 2 * least, 0.0, inplace=True)


def _finite(peak: Tensor) -> Tensor:
    # exp(-inf - -inf) would be nan; replacing an empty peak with 0 gives the intended 0.
    return torch.where(torch.isneginf(peak), torch.zeros_like(peak), peak)
