r"""The two halves of the U-Net: an encoder that pushes skips, and a decoder that pops them.

Both go through the resolutions $R, R/2, R/4 \ldots$. The encoder goes down: one convolution, then at each level `blocks`
residual blocks, preceded (except at the first level) by one that halves the image and keeps its width. It pushes each
output. With a residual input path, the image itself, convolved and halved once per level, joins the features after each
halving; both the features and the path continue from the sum $(x + r) / \sqrt 2$.

The decoder goes up: at the lowest level one block with attention and one without, at each further level one that doubles the
image; then `blocks + 1` residual blocks, each of which takes the features and one popped skip, in that order.

References:
    Ronneberger, Fischer, Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015; Song et
    al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021, appendix H.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from stablefield.networks._blocks import UNetBlock
from stablefield.networks._layers import Conv2d, group_norm
from stablefield.networks._resample import ConvDown2d

__all__ = ["Decoder", "Encoder"]


class Encoder(nn.ModuleDict):
    """From the image to the lowest level.

    Args:
        channels: of the image.
        base_channels: width of the first convolution.
        resolutions: height and width of each level, from the full resolution down.
        widths: channels of each level.
        blocks: residual blocks per level.
        attention: heights of the levels whose blocks attend.
        residual_taps: of the filter on the residual input path; None for no such path.
        block: makes a residual block of (in_channels, out_channels).
        generator: draws the weights of the convolutions.
    """

    def __init__(
        self,
        channels: int,
        base_channels: int,
        resolutions: Sequence[tuple[int, int]],
        widths: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        residual_taps: Sequence[float] | None,
        block: Callable[..., UNetBlock],
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.resolutions, self.blocks = tuple(resolutions), blocks
        self.residual_input = residual_taps is not None
        width, residual_width = base_channels, channels
        self[_name(resolutions[0], "conv")] = Conv2d(channels, width, 3, generator=generator)
        self.skip_widths = [width]
        for level, side in enumerate(resolutions):
            if level > 0:
                self[_name(side, "down")] = block(width, width, down=True)
                self.skip_widths.append(width)
                if residual_taps is not None:
                    path = ConvDown2d(residual_width, width, 3, residual_taps, generator)
                    self[_name(side, "aux_residual")] = path
                    residual_width = width
            for i in range(blocks):
                self[_name(side, f"block{i}")] = block(width, widths[level], attention=side[0] in attention)
                width = widths[level]
                self.skip_widths.append(width)

    def forward(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Map images (N, C, H, W) to the features of the lowest level, and the skips in the order of pushing."""
        residual = x
        x = self[_name(self.resolutions[0], "conv")](x)
        skips = [x]
        for level, side in enumerate(self.resolutions):
            if level > 0:
                x = self[_name(side, "down")](x, embedding)
                if self.residual_input:
                    x = residual = (x + self[_name(side, "aux_residual")](residual)) * math.sqrt(0.5)
                skips.append(x)
            for i in range(self.blocks):
                x = self[_name(side, f"block{i}")](x, embedding)
                skips.append(x)
        return x, skips


class Decoder(nn.ModuleDict):
    """From the lowest level to an image.

    Args:
        channels: of the image.
        resolutions: height and width of each level, from the full resolution down.
        widths: channels of each level.
        blocks: residual blocks per level of the encoder.
        attention: heights of the levels whose last block attends; the first block of the lowest level always does.
        skip_widths: channels of the skips, in the order of pushing.
        block: makes a residual block of (in_channels, out_channels).
        generator: draws the weights of the convolution.
    """

    def __init__(
        self,
        channels: int,
        resolutions: Sequence[tuple[int, int]],
        widths: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        skip_widths: Sequence[int],
        block: Callable[..., UNetBlock],
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.resolutions, self.blocks = tuple(resolutions), blocks
        remaining = list(skip_widths)
        width = remaining[-1]
        for side, level_width in zip(reversed(resolutions), reversed(widths), strict=True):
            if side == resolutions[-1]:
                self[_name(side, "in0")] = block(width, width, attention=True)
                self[_name(side, "in1")] = block(width, width)
            else:
                self[_name(side, "up")] = block(width, width, up=True)
            for i in range(blocks + 1):
                attends = side[0] in attention and i == blocks
                self[_name(side, f"block{i}")] = block(width + remaining.pop(), level_width, attention=attends)
                width = level_width
        self[_name(resolutions[0], "aux_norm")] = group_norm(width)
        self[_name(resolutions[0], "aux_conv")] = Conv2d(width, channels, 3, gain=1e-5, generator=generator)

    def forward(self, x: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        """Map the features of the lowest level and the skips, which are consumed, to images (N, C, H, W)."""
        for side in reversed(self.resolutions):
            for part in ("in0", "in1") if side == self.resolutions[-1] else ("up",):
                x = self[_name(side, part)](x, embedding)
            for i in range(self.blocks + 1):
                x = self[_name(side, f"block{i}")](torch.cat([x, skips.pop()], dim=1), embedding)
        x = nn.functional.silu(self[_name(self.resolutions[0], "aux_norm")](x))
        return self[_name(self.resolutions[0], "aux_conv")](x)


def _name(side: tuple[int, int], part: str) -> str:
    return f"{side[0]}x{side[1]}_{part}"
