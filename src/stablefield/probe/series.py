"""A quantity measured at several noise levels, with its standard error."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Series", "interpolate"]

# What stands for 0 on a logarithmic axis, as a share of the largest value.
_NOTHING = 1e-12
# Logarithms of noise levels closer than this are of one level: float32 may have rounded it.
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

        If every sample of the data is a source (`complete`), only the noise is random, and the error is that of the
        spread over the draws of each source. Else the sources are a sample, and the error is that of the spread of the
        sources' means, which holds both. NaN where there are too few values to tell.
        """
        draws, sources, _ = values.shape
        if complete:
            error = (values.var(0).mean(0) / (draws * sources)).sqrt()
        else:
            error = (values.mean(0).var(0) / sources).sqrt()
        return cls(values.mean((0, 1)), error)

    @classmethod
    def of_sets(cls, values: Tensor, weight: Tensor) -> "Series":
        """The weighted mean over independent sets of `values`, shape (sets, L), with weights (sets,).

        The error is that of a ratio estimator: rows that share their references are one unit.
        """
        share = (weight / weight.sum())[:, None]
        mean = (share * values).sum(0)
        sets = len(values)
        error = ((share * (values - mean)) ** 2).sum(0).sqrt() * (sets / max(sets - 1, 0.5)) ** 0.5
        return cls(mean, error if sets > 1 else torch.full_like(error, torch.nan))


def interpolate(at: Tensor, noise_level: Tensor, value: Tensor) -> Tensor:
    """`value` (L,) at the noise levels `at`, along straight lines on logarithmic axes.

    Below the lowest level it is taken for 0, above the highest for constant, as variances are.

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
