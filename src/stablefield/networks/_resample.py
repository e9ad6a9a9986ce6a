r"""Halve and double feature maps, with or without a convolution.

The filter is separable: $w = f f^\top / (\sum f)^2$ for a row of taps $f$ of even length. With
$p = (\text{len} - 1) // 2$,

$$ \text{down}(x)_{ij} = \sum_{ab} w_{ab}\, x_{2i + a - p,\, 2j + b - p}, \qquad
   \text{up}(x)_{ij} = 4 \sum_{kl} w_{i + p - 2k,\, j + p - 2l}\, x_{kl}, $$

for each channel separately, with zeros outside the image: `up` is four times the transpose of `down`. Taps (1, 1) average
2x2 pixels and repeat them; (1, 3, 3, 1) are smoother.

References:
    Karras, Laine, Aittala, Hellsten, Lehtinen, Aila, "Analyzing and Improving the Image Quality of StyleGAN",
    CVPR 2020, section 4; Song et al., "Score-Based Generative Modeling through Stochastic Differential
    Equations", ICLR 2021, appendix H.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stablefield.networks._layers import Conv2d

__all__ = ["ConvDown2d", "DownConv2d", "UpConv2d", "downsample", "resampling_filter", "upsample"]


def resampling_filter(taps: Sequence[float]) -> Tensor:
    """The normalised filter of `taps`, float32 of shape (1, 1, len, len), with sum 1.

    Raises:
        ValueError: if the number of taps is odd, or they sum to 0.
    """
    row = torch.tensor(tuple(taps), dtype=torch.float32)
    if len(taps) == 0 or len(taps) % 2 or sum(taps) == 0:
        raise ValueError(f"taps is {tuple(taps)}: pass an even number of taps with a sum other than 0.")
    return (row.outer(row) / row.sum() ** 2)[None, None]


def downsample(x: Tensor, weight: Tensor, padding: int | None = None) -> Tensor:
    """Halve the sides of `x` (N, C, H, W) with the filter `weight` (1, 1, len, len).

    Args:
        x: feature map.
        weight: filter, as `resampling_filter` makes it.
        padding: zeros on each side; by default as many as give exactly half the side.
    """
    padding = _padding(weight) if padding is None else padding
    return nn.functional.conv2d(x, _per_channel(weight, x), stride=2, padding=padding, groups=x.shape[1])


def upsample(x: Tensor, weight: Tensor) -> Tensor:
    """Double the sides of `x` (N, C, H, W) with the filter `weight` (1, 1, len, len)."""
    weight = _per_channel(4 * weight, x)
    return nn.functional.conv_transpose2d(x, weight, stride=2, padding=_padding(weight), groups=x.shape[1])


class DownConv2d(Conv2d):
    """Halve the image, then convolve it.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd side of the kernel.
        taps: of the resampling filter.
        generator: draws the weights; torch's global generator if not given.
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        taps: Sequence[float],
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, generator=generator)
        self.register_buffer("resample_filter", resampling_filter(taps))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Map (N, in, H, W) to (N, out, H / 2, W / 2)."""
        return super().forward(downsample(input, self.resample_filter))


class UpConv2d(Conv2d):
    """Double the image, then convolve it; arguments as in `DownConv2d`."""

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        taps: Sequence[float],
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, generator=generator)
        self.register_buffer("resample_filter", resampling_filter(taps))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Map (N, in, H, W) to (N, out, 2 H, 2 W)."""
        return super().forward(upsample(input, self.resample_filter))


class ConvDown2d(Conv2d):
    """Convolve the image, then halve it; arguments as in `DownConv2d`.

    All zero padding for the two steps goes around the input, so that beyond the border the filter reads values of the
    convolution instead of zeros.
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        taps: Sequence[float],
        generator: torch.Generator | None = None,
    ) -> None:
        weight = resampling_filter(taps)
        super().__init__(in_channels, out_channels, kernel_size, extra_padding=_padding(weight), generator=generator)
        self.register_buffer("resample_filter", weight)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Map (N, in, H, W) to (N, out, H / 2, W / 2)."""
        return downsample(super().forward(input), self.resample_filter, padding=0)


def _padding(weight: Tensor) -> int:
    return (weight.shape[-1] - 1) // 2


def _per_channel(weight: Tensor, x: Tensor) -> Tensor:
    return weight.to(x.dtype).expand(x.shape[1], -1, -1, -1)
