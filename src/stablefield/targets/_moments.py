"""Moments of latents: the mean and standard deviation of each sample's latent, from which latents are drawn anew."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield._shapes import check_kind

__all__ = ["Moments", "check_distances"]

# Numbers that are drawn at a time: 16 MB in float32.
_BLOCK = 2**22
# A draw is refused with a probability of at most e^-36: see `Moments.distance`.
_FAR = 36.0
# Relative error of rounding to bfloat16.
_ROUNDING = 2.0**-8


@dataclass(frozen=True)
class Moments:
    """Independent normal distributions of n latents.

    Args:
        mean: shape (n, ...), floating point: a tensor or a numpy array.
        std: of the same kind and shape, not negative.

    Raises:
        TypeError: if they are neither tensors nor arrays.
        ValueError: if kinds, shapes, dtypes or devices differ, or are not floating point.
    """

    mean: Tensor | NDArray[Any]
    std: Tensor | NDArray[Any]

    def __post_init__(self) -> None:
        for name, value in (("mean", self.mean), ("std", self.std)):
            check_kind(name, value, (Tensor, np.ndarray), "a tensor or a numpy array of shape (n, ...)")
            floats = value.is_floating_point() if isinstance(value, Tensor) else value.dtype.kind == "f"
            if not floats or value.ndim < 2 or not len(value):
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}: pass floating point numbers of shape "
                    "(n, ...), with at least one sample."
                )
        same = type(self.mean) is type(self.std) or not (isinstance(self.mean, Tensor) or isinstance(self.std, Tensor))
        if not same or self.mean.shape != self.std.shape:
            raise ValueError(
                f"mean is a {type(self.mean).__name__} of shape {tuple(self.mean.shape)}, std a {type(self.std).__name__} "
                f"of shape {tuple(self.std.shape)}: pass two of the same kind and shape."
            )
        if isinstance(self.mean, Tensor) and isinstance(self.std, Tensor) and self.mean.device != self.std.device:
            raise ValueError(f"mean is on {self.mean.device}, std on {self.std.device}: move one of them.")

    @property
    def device(self) -> torch.device:
        """Where the latents are drawn: the tensors' device, the CPU for arrays."""
        return self.mean.device if isinstance(self.mean, Tensor) else torch.device("cpu")

    @torch.no_grad()
    def draw(self, out: Tensor, seed: int) -> None:
        """Write a latent of each sample to `out` (n, ...); the same for the same seed.

        Raises:
            ValueError: if a mean or a standard deviation is not finite, or one of the latter is negative.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        n, step = len(out), max(1, _BLOCK // max(1, out[0].numel()))
        for start in range(0, n, step):
            where = slice(start, min(start + step, n))
            mean, std = _floats(self.mean[where]), _floats(self.std[where])
            if not bool((mean.isfinite() & std.isfinite() & (std >= 0)).all()):
                raise ValueError(
                    f"the moments of samples {where.start} to {where.stop - 1} hold NaN, inf or a negative std: clean them."
                )
            noise = torch.randn(mean.shape, generator=generator, device=self.device)
            out[where].copy_(torch.addcmul(mean, std, noise))

    def distance(self, x0: Tensor, index: Tensor) -> Tensor:
        """How far rows x0 (B, ...) are from the means of the samples at `index` (B,).

        Returns:
            Shape (4, B): the squared distance; those which a draw exceeds, or stays below, with a probability of at most
            e^-36; and the trace of the variance.
        """
        mean, std = (_floats(_taken(value, index)).to(x0.device) for value in (self.mean, self.std))
        gap = (x0.float() - mean).flatten(1)
        # Besides the draw's variance, that of rounding to bfloat16.
        variance = std.flatten(1).square() + (_ROUNDING * mean.flatten(1)).square()
        # Laurent and Massart, "Adaptive estimation of a quadratic functional by model selection", 2000, lemma 1.
        spread, largest = variance.square().sum(1).sqrt(), variance.amax(1)
        most = variance.sum(1) + 2 * spread * _FAR**0.5 + 2 * largest * _FAR
        # In the other direction rounding cannot be counted on: it may move a draw towards its mean.
        drawn = std.flatten(1).square()
        trace = drawn.sum(1)
        least = (trace - 2 * drawn.square().sum(1).sqrt() * _FAR**0.5).clamp(min=0).sqrt()
        rounded = 2 * _ROUNDING * mean.flatten(1).norm(dim=1)
        least = (least - rounded).clamp(min=0) / (1 + 2 * _ROUNDING)
        return torch.stack([gap.square().sum(1), most, least.square(), trace])


def check_distances(distances: Tensor, index: Tensor, dim: int) -> None:
    """Check that rows can be draws of the samples at `index` (B,), by their `Moments.distance` (4, B).

    Raises:
        ValueError: if a row is too far from its sample's mean, or too near.
    """
    square, most, least, variance = distances
    far, near = ~(square <= most), square < least
    wrong = far | near
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        away, std = (float(value[row] / dim) ** 0.5 for value in (square, variance))
        remedy = (
            "pass the right index, and flip= for flipped samples."
            if bool(far[row])
            else "a draw is not so near. If x0 holds the means themselves (latent_dist.mode()), they are samples: use "
            "Pool(mean). If they are draws, mean + std * noise, scale std like mean, by the same scaling_factor."
        )
        raise ValueError(
            f"a row of x0 with index {int(index[row])} is {away:.3g} from that sample's mean, whose std is {std:.3g} (root "
            f"mean squares): {remedy}"
        )


def _floats(value: Tensor | NDArray[Any]) -> Tensor:
    return (value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))).float()


def _taken(value: Tensor | NDArray[Any], index: Tensor) -> Tensor | NDArray[Any]:
    return value[index.to(value.device)] if isinstance(value, Tensor) else value[index.cpu().numpy()]
