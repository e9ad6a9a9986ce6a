r"""Exponential moving average of the weights, by EDM's half-life rule.

After a batch of B images, $\bar\theta \leftarrow \beta \bar\theta + (1 - \beta) \theta$ with
$\beta = 2^{-B / h}$ and $h = \min(\text{half-life}, \text{share} \cdot \text{images seen})$: early in training the average
is short, so that the initial weights are forgotten.

References:
    Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022,
    appendix F.2.
"""

import copy
from typing import TypeVar

import torch
from torch import nn

__all__ = ["ema_decay", "follower", "update_ema"]

Module = TypeVar("Module", bound=nn.Module)


def ema_decay(batch: int, images_seen: int, half_life: float, ramp_share: float) -> float:
    """The decay of one step of `batch` images, when `images_seen` have been seen before it; 0 at the start."""
    length = min(half_life, ramp_share * images_seen)
    return 0.5 ** (batch / length) if length > 0 else 0.0


def follower(model: Module) -> Module:
    """A copy of `model` to hold the average: no gradients, evaluation mode."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move `average` towards `model`; buffers are copied."""
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)
    for mean, value in zip(average.buffers(), model.buffers(), strict=True):
        mean.copy_(value)
