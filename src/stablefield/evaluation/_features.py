r"""Feature arrays, their moments and the Gaussian of these: what every metric of this package is a function of.

A feature array has shape (n, d): one row per image, any floating dtype. Metrics compute in float64, whatever the dtype
they are given, since differences of large sums are their business.

The moments of two parts are joined exactly by (Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for
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

from stablefield._shapes import array_of_numbers, check_tensor, whole_number

__all__ = [
    "Gaussian", "checked", "checked_pair", "empty_moments", "fit_features", "fit_moments", "in_float64", "join_moments",
    "moments_of", "unpack",
]  # fmt: skip


def checked(name: str, features: Tensor, least: int = 1, reason: str = "there is nothing to measure") -> Tensor:
    """Return `features`, detached, after making sure that a metric can use them.

    Args:
        name: what to call the array in an error.
        features: shape (n, d), floating point.
        least: the smallest n that will do.
        reason: why fewer rows will not do; ends the sentence "... at least `least` are needed, because".

    Raises:
        ValueError: if the array is not (n, d) with d >= 1, not floating point, has fewer than `least` rows, or holds
            NaN or infinite numbers (the first such row is named).
    """
    check_tensor(name, features, numbers=True)
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name} has shape {tuple(features.shape)}: pass one row of features per image, shape (n, d).")
    if not features.is_floating_point():
        raise ValueError(f"{name} has dtype {features.dtype}: pass floating point features, not images or integers.")
    if len(features) < least:
        raise ValueError(
            f"{name} has {len(features)} rows, but at least {least} are needed, because {reason}: use more samples."
        )
    features = features.detach()
    finite = torch.isfinite(features).all(dim=1)
    if not finite.all():
        bad = torch.nonzero(~finite).flatten()
        raise ValueError(
            f"{name} holds NaN or infinite numbers in {len(bad)} of {len(features)} rows, the first is row {int(bad[0])}: "
            "look at the image of that row and at the precision that the extractor runs in."
        )
    return features


def checked_pair(
    names: tuple[str, str], a: Tensor, b: Tensor, least: int = 1, reason: str = "there is nothing to measure"
) -> tuple[Tensor, Tensor]:
    """Return both arrays, each `checked`, after making sure that they have one feature dimension and one device.

    Raises:
        ValueError: as `checked`; or if the feature dimensions or devices disagree.
    """
    a, b = checked(names[0], a, least, reason), checked(names[1], b, least, reason)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{names[0]} has {a.shape[1]} features per row, {names[1]} has {b.shape[1]}: "
            "take both from the same extractor, on images of the same size."
        )
    if a.device != b.device:
        raise ValueError(f"{names[0]} is on {a.device}, {names[1]} on {b.device}: move one of them.")
    return a, b


def in_float64(x: Tensor) -> Tensor:
    """Return `x` in float64, on the CPU where its own device has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()


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


def unpack(moments: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count, mean (d,) and unbiased covariance (d, d), divided by count - 1, of packed moments.

    Raises:
        ValueError: if they are of fewer than 2 rows.
    """
    count = round(moments[0, 0].item())
    if count < 2:
        raise ValueError(f"statistics of {count} rows: at least 2 are needed, because one row has no covariance.")
    scatter = moments[2:] / (count - 1)
    return count, moments[1].clone(), (scatter + scatter.T) / 2


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """A Gaussian in the form that distances are taken in, float64; made once where it is measured against often."""

    mean: Tensor
    """Shape (d,)."""
    factor: Tensor
    """A with A^T A the covariance, shape (r, d), any r."""
    trace: Tensor
    """Trace of the covariance, a scalar."""


def fit_moments(mean: Tensor, cov: Tensor, number: int = 1) -> Gaussian:
    """The Gaussian of a mean and a covariance.

    Args:
        mean: shape (d,).
        cov: symmetric and positive semidefinite, singular or not, shape (d, d).
        number: which of two it is, for the errors.

    Raises:
        ValueError: if shapes do not agree, numbers are not finite, or the covariance is not symmetric or has an
            eigenvalue that is negative beyond rounding.
    """
    whole_number("number", number)
    mean, cov = array_of_numbers(f"mean{number}", mean), array_of_numbers(f"cov{number}", cov)
    if mean.device != cov.device:
        raise ValueError(f"mean{number} is on {mean.device}, cov{number} on {cov.device}: move one of them.")
    mean, cov = in_float64(mean.detach()), in_float64(cov.detach())
    if mean.ndim != 1 or len(mean) == 0 or cov.shape != (len(mean), len(mean)):
        raise ValueError(
            f"mean{number} has shape {tuple(mean.shape)}, cov{number} {tuple(cov.shape)}: pass means (d,) and covariances "
            "(d, d), both of one d."
        )
    if not (torch.isfinite(mean).all() and torch.isfinite(cov).all()):
        raise ValueError(
            f"mean{number} or cov{number} holds NaN or infinite numbers: look for the features they are of."
        )
    return Gaussian(mean=mean, factor=_factor(f"cov{number}", cov), trace=cov.trace())


def fit_features(features: Tensor) -> Gaussian:
    """The Gaussian of a feature array, shape (n, d), n >= 2 and perhaps below d (covariance divided by n - 1).

    Raises:
        ValueError: if the array is no valid feature array or has fewer than 2 rows.
    """
    x = in_float64(checked("features", features, 2, "one row has no covariance"))
    mean = x.mean(dim=0)
    factor = (x - mean) / (len(x) - 1) ** 0.5
    trace = factor.square().sum()
    # R of QR has the same Gram matrix with d rows instead of n.
    factor = torch.linalg.qr(factor, mode="r").R if len(x) > x.shape[1] else factor
    return Gaussian(mean=mean, factor=factor, trace=trace)


def _factor(name: str, cov: Tensor) -> Tensor:
    """A with A^T A = cov, shape (d, d)."""
    scale = cov.abs().max()
    if (cov - cov.T).abs().max() > 1e-6 * scale:
        raise ValueError(f"{name} is not symmetric (off by {(cov - cov.T).abs().max():.3g}): pass a covariance matrix.")
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    if values[0] < -1e-4 * scale:
        raise ValueError(f"{name} has the eigenvalue {values[0]:.3g}: a covariance matrix has none below 0.")
    return values.clamp(min=0).sqrt()[:, None] * vectors.T
