r"""Partial posteriors: softmax sums over some of the references, which merge into those over all of them.

For one query and references $k$ in a part, with logits $l_k$ relative to a fixed anchor, a partial posterior holds

$$ m \approx \max_k l_k, \quad Z = \sum_k e^{l_k - m}, \quad Z_2 = \sum_k e^{2 (l_k - m)}, \quad
   E = \sum_k e^{l_k - m} |y_k|^2, \quad S = \sum_k e^{l_k - m} y_k . $$

Two parts with the same anchor merge by rescaling both to the larger $m$; the operation is associative and
commutative, over chunks, mirrored sets or processes. The scalars are kept in float64, S in the dtype of the data.

References:
    Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv 1805.02867, section 3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield.targets.bank import Norms

__all__ = ["Partial"]

# A logit may exceed the level m by this much before the sums are rescaled to it, a pass over all of them: e^16 squared,
# summed over any number of references, is far from the end of float32.
_SLACK = 16.0
# Share of the rows up to which it is cheaper to pick those that a chunk has weight for.
_FEW = 0.75


@dataclass
class Partial:
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
    def empty(
        cls, batch: int, dim: int, dtype: torch.dtype, device: torch.device, level: Tensor | None = None
    ) -> "Partial":
        """The neutral element: no reference seen.

        `level` (B,) is a logit that another part is known to have: what has no weight beside it need not be added here.
        """
        wide = torch.float32 if device.type == "mps" else torch.float64
        nothing = torch.full((batch,), -torch.inf, dtype=wide, device=device)
        zero = torch.zeros(batch, dtype=wide, device=device)
        total = torch.zeros(batch, dim, dtype=dtype, device=device)
        return cls(
            nothing if level is None else level.clone(), zero, zero.clone(), zero.clone(), total, nothing.clone()
        )

    @classmethod
    def of_one(cls, logit: Tensor, squares: Tensor, rows: Tensor) -> "Partial":
        """One reference for each query; its prior weight is left to be counted with those of its chunk.

        Args:
            logit: its logit, shape (B,), float64; -inf for a query that has none.
            squares: its squared norm, shape (B,).
            rows: the reference, shape (B, d).
        """
        none = torch.isneginf(logit)
        mass = torch.ones_like(logit).masked_fill_(none, 0)
        total = rows * mass.to(rows.dtype)[:, None]
        return cls(logit, mass, mass.clone(), squares * mass, total, torch.full_like(logit, -torch.inf))

    def add(
        self, logits: Tensor, largest: Tensor, rows: Tensor, norms: Norms, log_prior: Tensor, cut: float | None = None
    ) -> None:
        """Add a chunk of c references.

        Args:
            logits: shape (B, c), -inf where a reference may not be used; overwritten.
            largest: the largest logit of each query, shape (B,).
            rows: the references, shape (c, d).
            norms: their squared norms.
            log_prior: log of the summed prior weights of the allowed references of this chunk, shape (B,) or ().
            cut: leave out the queries whose logits are all this far below the level. This looks at the values, for which a
                GPU would have to be waited for: None adds all of them without a look.
        """
        self.log_prior = torch.logaddexp(self.log_prior, log_prior.to(self.log_prior.dtype))
        old = self.peak
        if cut is None:
            self._raise_to(torch.where(largest > old + _SLACK, largest.to(old.dtype), old))
        else:
            seen = largest > old - cut
            count = int(seen.sum())
            if count == 0:
                return
            if bool((largest > old + _SLACK).any()):
                self._raise_to(torch.where(largest > old + _SLACK, largest.to(old.dtype), old))
            if count < _FEW * len(old):
                self._add_to(seen.nonzero()[:, 0], logits, rows, norms)
                return
        weights = logits.sub_(_finite(self.peak).to(logits.dtype)[:, None]).exp_()
        mass = weights.sum(1).to(self.mass.dtype)
        self.mass = self.mass + mass
        self.energy = self.energy + mass * norms.centre + torch.mv(weights, norms.centred)
        self.total.addmm_(weights, rows)
        self.mass_squared = self.mass_squared + weights.square_().sum(1)

    def merge(self, other: "Partial") -> "Partial":
        """The posterior sums over the references of both parts, which must be disjoint and share their anchor."""
        peak = torch.maximum(self.peak, other.peak)
        a, b = torch.exp(self.peak - _finite(peak)), torch.exp(other.peak - _finite(peak))
        narrow = self.total.dtype
        return Partial(
            peak=peak,
            mass=a * self.mass + b * other.mass,
            mass_squared=a**2 * self.mass_squared + b**2 * other.mass_squared,
            energy=a * self.energy + b * other.energy,
            total=a.to(narrow)[:, None] * self.total + b.to(narrow)[:, None] * other.total,
            log_prior=torch.logaddexp(self.log_prior, other.log_prior),
        )

    def _raise_to(self, peak: Tensor) -> None:
        keep = torch.exp(self.peak - _finite(peak))
        self.peak = peak
        self.mass = self.mass * keep
        self.mass_squared = self.mass_squared * keep**2
        self.energy = self.energy * keep
        self.total.mul_(keep.to(self.total.dtype)[:, None])

    def _add_to(self, queries: Tensor, logits: Tensor, rows: Tensor, norms: Norms) -> None:
        weights = logits[queries].sub_(_finite(self.peak[queries]).to(logits.dtype)[:, None]).exp_()
        mass = weights.sum(1).to(self.mass.dtype)
        self.mass = self.mass.index_add(0, queries, mass)
        self.energy = self.energy.index_add(0, queries, mass * norms.centre + torch.mv(weights, norms.centred))
        self.total.index_add_(0, queries, weights @ rows)
        self.mass_squared = self.mass_squared.index_add(0, queries, weights.square_().sum(1).to(mass.dtype))


def _finite(peak: Tensor) -> Tensor:
    # exp(-inf - -inf) would be nan; with 0 in place of an empty peak it is the 0 that is meant.
    return torch.where(torch.isneginf(peak), torch.zeros_like(peak), peak)
