r"""Partial posteriors: softmax sums over some of the references, which merge into those over all of them.

For one query and references $k$ in a part, with logits $l_k$ relative to a fixed anchor, a partial posterior holds

$$ m = \max_k l_k, \quad Z = \sum_k e^{l_k - m}, \quad Z_2 = \sum_k e^{2 (l_k - m)}, \quad
   E = \sum_k e^{l_k - m} |y_k|^2, \quad S = \sum_k e^{l_k - m} y_k . $$

Two parts with the same anchor merge by rescaling both to the larger maximum; the operation is associative and
commutative, over chunks, mirrored sets or processes. The scalars are kept in float64, S in the dtype of the data.

References:
    Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv 1805.02867, section 3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Partial"]


@dataclass
class Partial:
    """Sums over a part of the references for B queries.

    Attributes:
        peak: largest logit m, shape (B,); -inf where no reference has been allowed so far.
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
    def empty(cls, batch: int, dim: int, dtype: torch.dtype, device: torch.device) -> "Partial":
        """The neutral element: no reference seen."""
        wide = torch.float32 if device.type == "mps" else torch.float64
        nothing = torch.full((batch,), -torch.inf, dtype=wide, device=device)
        zero = torch.zeros(batch, dtype=wide, device=device)
        total = torch.zeros(batch, dim, dtype=dtype, device=device)
        return cls(nothing, zero, zero.clone(), zero.clone(), total, nothing.clone())

    def add(self, logits: Tensor, rows: Tensor, squares: Tensor, log_prior: Tensor) -> None:
        """Add a chunk of c references.

        Args:
            logits: shape (B, c), -inf where a reference may not be used; overwritten.
            rows: the references, shape (c, d).
            squares: their squared norms, shape (c,).
            log_prior: log of the summed prior weights of the allowed references of this chunk, shape (B,) or ().
        """
        old = self.peak
        self.peak = torch.maximum(old, logits.amax(1).to(old.dtype))
        base = _finite(self.peak)
        keep = torch.exp(old - base)
        weights = logits.sub_(base.to(logits.dtype)[:, None]).exp_()
        wide = self.mass.dtype
        self.mass = self.mass * keep + weights.sum(1, dtype=wide)
        self.energy = self.energy * keep + torch.mv(weights.to(wide), squares)
        self.total.mul_(keep.to(self.total.dtype)[:, None]).addmm_(weights, rows)
        self.mass_squared = self.mass_squared * keep**2 + weights.square_().sum(1, dtype=wide)
        self.log_prior = torch.logaddexp(self.log_prior, log_prior.to(wide))

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


def _finite(peak: Tensor) -> Tensor:
    # exp(-inf - -inf) would be nan; with 0 in place of an empty peak it is the 0 that is meant.
    return torch.where(torch.isneginf(peak), torch.zeros_like(peak), peak)
