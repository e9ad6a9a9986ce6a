r"""Averages of the weights.

By EDM's half-life rule: after a batch of B images, $\bar\theta \leftarrow \beta \bar\theta + (1 - \beta) \theta$ with
$\beta = 2^{-B / h}$ and $h = \min(\text{half-life}, \text{share} \cdot \text{images seen})$: early in training the average
is short, so that the initial weights are forgotten.

By a power function: after step t, $\beta = (1 - 1/t)^{\gamma + 1}$, which weighs the weights of step $\tau$ by
$(\gamma + 1) \tau^\gamma / t^{\gamma + 1}$. Its profile keeps its shape as training goes on, so snapshots of two such
averages can be combined into one of any other length afterwards (see `post_hoc`). Its *length* is the standard deviation of
the profile as a share of t, which determines $\gamma$.

References:
    Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022,
    appendix F.2.
    Karras, Aittala, Lehtinen, Hellsten, Aila, Laine, "Analyzing and Improving the Training Dynamics of Diffusion Models",
    CVPR 2024, section 3.1.
"""

import copy
import math
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from stablefield._shapes import number
from stablefield.training._fully_sharded import own_part

__all__ = ["LENGTHS", "ema_decay", "follower", "power_decay", "power_exponent", "power_length", "update_ema"]

LENGTHS = (0.05, 0.10)
"""Lengths of the two averages of which snapshots are kept."""

Module = TypeVar("Module", bound=nn.Module)


def ema_decay(batch: int, images_seen: int, half_life: float, ramp_share: float) -> float:
    """The decay of one step of `batch` images, when `images_seen` have been seen before it; 0 at the start."""
    length = min(half_life, ramp_share * images_seen)
    return 0.5 ** (batch / length) if length > 0 else 0.0


def power_exponent(length: float) -> float:
    """The exponent gamma of the power-function average of a relative length, the inverse of `power_length`.

    Raises:
        ValueError: if `length` is not above 0 and below 0.2887 (gamma above 0).
    """
    number("length", length)
    longest = power_length(0.0)
    if not 0 < length < longest:
        raise ValueError(
            f"the length of an average is {length}: it is a share of the run, above 0 and below {longest:.4f}."
        )
    # length^2 (gamma + 2)^2 (gamma + 3) = gamma + 1, whose largest real root is the one above 0.
    inverse = length**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots[np.abs(roots.imag) < 1e-9].real.max())


def power_length(exponent: float) -> float:
    """Standard deviation of the profile tau^gamma on [0, 1]."""
    return math.sqrt((exponent + 1) / (exponent + 3)) / (exponent + 2)


def power_decay(step: int, exponent: float) -> float:
    """The decay of the power-function average after step `step`, counted from 1; 0 at the first."""
    return (1 - 1 / step) ** (exponent + 1)


def follower(model: Module) -> Module:
    """A copy of `model` to hold the average: no gradients, evaluation mode."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move `average` towards `model`, of a sharded one this process's part; buffers are copied."""
    means, values = ([own_part(each) for each in module.parameters()] for module in (average, model))
    get_ema_multi_avg_fn(decay)(means, values, 1)
    for mean, value in zip(average.buffers(), model.buffers(), strict=True):
        mean.copy_(value)
