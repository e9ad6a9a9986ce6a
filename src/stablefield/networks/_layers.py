r"""Layers of the U-Net with their initial weights: Xavier uniform times a gain, biases zero.

A weight is drawn from $U(-a, a)$, $a = g \sqrt{6 / (\text{fan in} + \text{fan out})}$. The gain $g$ is 1 except for layers
that end a residual branch, which start near zero so that every block starts as its skip path.

References:
    Glorot, Bengio, "Understanding the difficulty of training deep feedforward neural networks", AISTATS 2010,
    equation 16.
"""

import torch
from torch import nn

__all__ = ["Conv2d", "Linear", "group_norm"]


class Linear(nn.Linear):
    """A linear layer, initialised from a generator.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether there is one.
        gain: factor on the initial weights; 0 draws nothing.
        generator: draws the weights; torch's global generator if not given.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        gain: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        _initialise(self, gain, generator)

    def reset_parameters(self) -> None:
        """Do nothing: the constructor draws the weights once it knows the generator."""


class Conv2d(nn.Conv2d):
    """A convolution of stride 1 that keeps the size of the image, initialised from a generator.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd side of the kernel.
        extra_padding: zeros added on each side beyond those that keep the size.
        gain: factor on the initial weights.
        generator: draws the weights; torch's global generator if not given.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        extra_padding: int = 0,
        gain: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2 + extra_padding)
        _initialise(self, gain, generator)

    def reset_parameters(self) -> None:
        """Do nothing: the constructor draws the weights once it knows gain and generator."""


def group_norm(channels: int) -> nn.GroupNorm:
    """Normalisation over min(32, channels / 4) groups, with 1e-6 added to the variance.

    Raises:
        ValueError: if the channels do not divide into the groups.
    """
    groups = min(32, channels // 4)
    if groups < 1 or channels % groups:
        raise ValueError(
            f"a feature map of {channels} channels does not divide into min(32, {channels} // 4) = {groups} groups: "
            "make base_channels a multiple of 32, or of 4 if no feature map exceeds 128 channels."
        )
    return nn.GroupNorm(groups, channels, eps=1e-6)


def _initialise(layer: nn.Linear | nn.Conv2d, gain: float, generator: torch.Generator | None) -> None:
    if gain:
        nn.init.xavier_uniform_(layer.weight, gain=gain, generator=generator)
    else:
        nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
