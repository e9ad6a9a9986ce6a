r"""Count, mean and covariance of features: what a Frechet distance is a function of.

Two parts of a sample are joined exactly by (Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for
Computing Sample Variances", COMPSTAT 1982)

$$ n = n_a + n_b, \quad \delta = m_b - m_a, \quad m = m_a + \tfrac{n_b}{n} \delta, \quad
   S = S_a + S_b + \tfrac{n_a n_b}{n}\, \delta \delta^T, $$

with m the means and S the sums of centred outer products. No difference of large sums is ever taken, so the result
keeps its digits however far the features lie from the origin, and does not depend on the batches but for rounding.

Moments are packed in one float64 tensor of shape (d + 2, d): the count in the first entry of row 0, the mean in row 1,
S below. One tensor, because the parts join only together.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield.evaluation.features import checked, in_float64

__all__ = ["Statistics", "empty_moments", "join_moments", "moments_of", "statistics_of", "unpack"]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Mean and unbiased covariance (divided by count - 1) of features, in float64."""

    count: int
    """Number of rows they are of."""
    mean: Tensor
    """Shape (d,)."""
    covariance: Tensor
    """Shape (d, d)."""


def statistics_of(features: Tensor) -> Statistics:
    """Statistics of a feature array that is whole in memory.

    Args:
        features: shape (n, d), n >= 2.

    Raises:
        ValueError: if there are fewer than 2 rows, or the array is no valid feature array.
    """
    return unpack(moments_of(checked("features", features, 2, "one row has no covariance")))


def empty_moments(dim: int) -> Tensor:
    """Packed moments of no rows, shape (dim + 2, dim)."""
    return torch.zeros(dim + 2, dim, dtype=torch.float64)


def moments_of(features: Tensor) -> Tensor:
    """Packed moments of (n, d) features, n >= 1, shape (d + 2, d)."""
    x = in_float64(features)
    mean = x.mean(dim=0)
    centred = x - mean
    count = torch.zeros_like(mean)
    count[0] = len(x)
    return torch.cat([count[None], mean[None], centred.T @ centred])


def join_moments(a: Tensor, b: Tensor) -> Tensor:
    """Packed moments of the rows of both; either may be empty."""
    count_a, count_b = a[0, 0], b[0, 0]
    count = count_a + count_b
    # Two empty parts: any divisor will do.
    part = count_b / count.clamp(min=1)
    delta = b[1] - a[1]
    joined = torch.empty_like(a)
    joined[0] = a[0] + b[0]
    joined[1] = a[1] + part * delta
    joined[2:] = a[2:] + b[2:] + torch.outer(delta, delta) * (count_a * part)
    return joined


def unpack(moments: Tensor) -> Statistics:
    """Mean and covariance of packed moments.

    Raises:
        ValueError: if they are of fewer than 2 rows.
    """
    count = round(moments[0, 0].item())
    if count < 2:
        raise ValueError(f"statistics of {count} rows: at least 2 are needed, because one row has no covariance.")
    scatter = moments[2:] / (count - 1)
    return Statistics(count=count, mean=moments[1].clone(), covariance=(scatter + scatter.T) / 2)
