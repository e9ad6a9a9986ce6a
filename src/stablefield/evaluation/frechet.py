r"""The Frechet distance between Gaussians fitted to features.

$$ d^2 = |\mu_1 - \mu_2|^2 + \mathrm{Tr}\, C_1 + \mathrm{Tr}\, C_2 - 2\, \mathrm{Tr} (C_1 C_2)^{1/2}. $$

With any factors $C_i = A_i^T A_i$, the last trace is the sum of the singular values of $A_1 A_2^T$, since the squares
of those are the eigenvalues of $C_1 C_2$. Singular values come with an error of one rounding of the largest of them, where
the eigenvalues of the product, or a matrix square root of it, lose half the digits as soon as a covariance is singular,
which it is whenever there are fewer samples than features. From features the factors are the centred features
themselves.

The number that the literature reports, FID among others, is $d^2$, and so is `value` here. It is biased upwards by an
amount that falls about as one over the number of samples: compare only at equal numbers.

References:
    Dowson, Landau, "The Frechet distance between multivariate normal distributions", J. Multivariate Analysis 1982.
    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", NeurIPS 2017.
    Chong, Forsyth, "Effectively Unbiased FID and Inception Score and Where to Find Them", CVPR 2020 (the bias).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield.evaluation.features import checked, checked_pair, in_float64
from stablefield.shapes import array_of_numbers, check_kind, whole_number

__all__ = [
    "FrechetDistance",
    "Gaussian",
    "distance_between",
    "fit_features",
    "fit_moments",
    "frechet_distance",
    "frechet_distance_from_features",
]


@dataclass(frozen=True, kw_only=True)
class FrechetDistance:
    """A squared Frechet distance and its two parts."""

    value: float
    """d^2 = mean_term + covariance_term, never negative."""
    mean_term: float
    """Squared distance of the means."""
    covariance_term: float
    """Tr C1 + Tr C2 - 2 Tr (C1 C2)^(1/2)."""


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


def distance_between(a: Gaussian, b: Gaussian) -> FrechetDistance:
    """Squared Frechet distance between two Gaussians of one dimension d.

    Raises:
        ValueError: if their dimensions differ.
    """
    check_kind("a", a, Gaussian, "what fit_features or fit_moments returns")
    check_kind("b", b, Gaussian, "what fit_features or fit_moments returns")
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"mean1 has shape {tuple(a.mean.shape)}, mean2 {tuple(b.mean.shape)}: pass means (d,) and covariances (d, d), "
            "both of one d, from the same extractor."
        )
    mean_term = float((a.mean - b.mean).square().sum())
    cross = torch.linalg.svdvals(a.factor @ b.factor.T).sum()
    # Never below 0 but by the rounding of traces that cancel.
    covariance_term = max(0.0, float(a.trace + b.trace - 2 * cross))
    return FrechetDistance(value=mean_term + covariance_term, mean_term=mean_term, covariance_term=covariance_term)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> FrechetDistance:
    """Squared Frechet distance between two Gaussians.

    Args:
        mean1: shape (d,).
        cov1: symmetric and positive semidefinite, singular or not, shape (d, d).
        mean2: as `mean1`.
        cov2: as `cov1`.

    Raises:
        ValueError: if shapes do not agree, numbers are not finite, or a covariance is not symmetric or has an
            eigenvalue that is negative beyond rounding.
    """
    return distance_between(fit_moments(mean1, cov1, 1), fit_moments(mean2, cov2, 2))


def frechet_distance_from_features(a: Tensor, b: Tensor) -> FrechetDistance:
    """Squared Frechet distance between the Gaussians of two feature arrays (covariances divided by n - 1).

    Args:
        a: features, shape (n, d), n >= 2; n < d is fine.
        b: features, shape (m, d), m >= 2.

    Raises:
        ValueError: if an array is no valid feature array, has fewer than 2 rows, or the feature dimensions disagree.
    """
    a, b = checked_pair(("a", "b"), a, b, 2, "one row has no covariance")
    return distance_between(fit_features(a), fit_features(b))


def _factor(name: str, cov: Tensor) -> Tensor:
    """A with A^T A = cov, shape (d, d)."""
    scale = cov.abs().max()
    if (cov - cov.T).abs().max() > 1e-6 * scale:
        raise ValueError(f"{name} is not symmetric (off by {(cov - cov.T).abs().max():.3g}): pass a covariance matrix.")
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    if values[0] < -1e-4 * scale:
        raise ValueError(f"{name} has the eigenvalue {values[0]:.3g}: a covariance matrix has none below 0.")
    return values.clamp(min=0).sqrt()[:, None] * vectors.T
