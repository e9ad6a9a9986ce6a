"""Feature arrays: what every metric of this package is a function of.

A feature array has shape (n, d): one row per image, any floating dtype. Metrics compute in float64, whatever the dtype
they are given, since differences of large sums are their business.
"""

import torch
from torch import Tensor

from stablefield.shapes import check_tensor

__all__ = ["checked", "checked_pair", "in_float64"]


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
