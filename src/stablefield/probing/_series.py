"""A quantity measured at several noise levels, with its standard error."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Series", "interpolate"]

# Represents 0 on a logarithmic axis, as a share of the largest value.
_NOTHING = 1e-12
# Logarithms of noise levels closer than this count as one level: float32 may have rounded it.
_SAME = 1e-6


@dataclass(frozen=True)
class Series:
    """Means and standard errors of a quantity, one per noise level.

    Attributes:
        mean: shape (L,), float64.
        error: standard errors of the means, shape (L,), float64.
    """

    mean: Tensor
    error: Tensor

    @classmethod
    def of_sources(cls, values: Tensor, *, complete: bool) -> "Series":
        """The mean over sources and noise draws of `values`, shape (draws, sources, L).

        If every sample of the data is a source (`complete`), only the noise is random, and the error comes from the spread
        over the draws of each source. Otherwise the sources are a sample, and the error comes from the spread of their
        means, which covers both. NaN if there are too few values.
        """
        draws, sources, _ = values.shape
        per_mean = values.var(0).mean(0) / draws if complete else values.mean(0).var(0)
        error = (per_mean / sources).sqrt()
        return cls(values.mean((0, 1)), error)

    @classmethod
    def of_sets(cls, values: Tensor, others: Tensor, weight: Tensor) -> "Series":
        """The best combination of two unbiased estimates over independent sets; rows of a set share references.

        The difference of the two has mean 0, so it is a control variate: subtract it with the factor that minimises the
        variance between sets.

        Args:
            values: one estimate, shape (sets, L).
            others: the other, shape (sets, L).
            weight: rows in each set, shape (sets,).
        """
        share = (weight / weight.sum())[:, None]
        sets = len(values)
        first, gap = values - (share * values).sum(0), values - others
        centred = gap - (share * gap).sum(0)
        spread = (share**2 * centred**2).sum(0)
        factor = torch.where(spread > 0, (share**2 * centred * first).sum(0) / spread, 0)
        best = values - factor * gap
        mean = (share * best).sum(0)
        # One degree of freedom for the mean, one for the factor.
        error = ((share * (best - mean)) ** 2).sum(0).sqrt() * (sets / max(sets - 2, 1)) ** 0.5
        return cls(mean.clamp(min=0), error if sets > 2 else torch.full_like(error, torch.nan))


def interpolate(at: Tensor, noise_level: Tensor, value: Tensor) -> Tensor:
    """`value` (L,) at the noise levels `at`, interpolated linearly on logarithmic axes.

    Below the lowest level it is 0, above the highest constant, like a variance.

    Args:
        at: noise levels, any shape, positive.
        noise_level: where `value` is known, increasing, shape (L,).
        value: not negative, shape (L,).
    """
    at = at.to(value)
    if not bool((value > 0).any()):
        return torch.zeros_like(at)
    x, y = noise_level.log(), value.clamp(min=float(value.max()) * _NOTHING).log()
    wanted = at.log()
    below = wanted < x[0] - _SAME
    if len(x) == 1:
        return torch.where(below, 0, value[0])
    wanted = wanted.clamp(x[0], x[-1])
    right = torch.searchsorted(x, wanted).clamp(1, len(x) - 1)
    part = (wanted - x[right - 1]) / (x[right] - x[right - 1])
    return torch.where(below, 0, torch.exp(torch.lerp(y[right - 1], y[right], part)))
