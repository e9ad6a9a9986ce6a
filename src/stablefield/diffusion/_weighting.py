r"""Loss weights: how much an error in x0 counts at each noise level.

The objective is $w(s)\, |D(x; s) - \hat x_0|^2$ with the noise level $s = \sigma / \alpha$. Losses in other
parameterisations are weightings of this one: $1/s^2$ is the error in the noise, $1 + 1/s^2$ that in v, and
$(1 + 1/s)^2$ that in a rectified flow's velocity.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stablefield._shapes import check_numbers, check_tensor

__all__ = ["EDMWeighting", "FlowWeighting", "SNRWeighting", "Weighting"]


class Weighting(Protocol):
    """A loss weight as a function of the noise level."""

    def __call__(self, noise_level: Tensor) -> Tensor:
        """Weights of the shape of `noise_level` (sigma / alpha, positive)."""
        ...


@dataclass(frozen=True)
class EDMWeighting:
    """(s^2 + sigma_data^2) / (s sigma_data)^2: at the start, EDM's loss is near 1 at every noise level.

    With sigma_data = 1 it is 1 + 1/s^2, the error in v.

    Args:
        sigma_data: standard deviation of the data.

    References:
        Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022, table 1.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_numbers(self, "sigma_data")
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(f"EDMWeighting(sigma_data={self.sigma_data}): pass a positive number.")

    def __call__(self, noise_level: Tensor) -> Tensor:
        check_tensor("noise_level", noise_level, real=True)
        return 1 / self.sigma_data**2 + 1 / noise_level**2


@dataclass(frozen=True)
class SNRWeighting:
    """clamp(SNR, minimum, maximum)^power with SNR = 1 / s^2.

    The plain 1/s^2 (power 1) is the error in the noise; `minimum=1` is the truncated SNR of progressive distillation;
    `maximum=5` is min-SNR-5; `power=0` weights all levels equally.

    Args:
        power: exponent of the clamped ratio.
        minimum: lower bound on the signal-to-noise ratio.
        maximum: upper bound; inf for none.

    References:
        Salimans, Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", ICLR 2022, section 4.
        Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", ICCV 2023, equation 6.
    """

    power: float = 1.0
    minimum: float = 0.0
    maximum: float = math.inf

    def __post_init__(self) -> None:
        check_numbers(self, "power", "minimum", "maximum")
        if not (0 <= self.minimum < self.maximum and math.isfinite(self.power)):
            raise ValueError(
                f"SNRWeighting(power={self.power}, minimum={self.minimum}, maximum={self.maximum}): "
                "0 <= minimum < maximum must hold."
            )

    def __call__(self, noise_level: Tensor) -> Tensor:
        check_tensor("noise_level", noise_level, real=True)
        return torch.clamp(1 / noise_level**2, self.minimum, self.maximum) ** self.power


@dataclass(frozen=True)
class FlowWeighting:
    """(1 + 1/s)^2: the error in the velocity of a rectified flow, since velocity = (x_t - x0) / t and s = t / (1 - t).

    References:
        Liu, Gong, Liu, "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow", ICLR 2023,
        equation 1.
    """

    def __call__(self, noise_level: Tensor) -> Tensor:
        check_tensor("noise_level", noise_level, real=True)
        return (1 + 1 / noise_level) ** 2
