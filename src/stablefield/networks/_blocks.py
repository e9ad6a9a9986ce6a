r"""The residual block of the U-Net, and its self-attention.

With an embedding $e$ of noise level and labels, and $s(x)$ the skip path,

$$ g = \text{conv}_0(\text{silu}(\text{norm}_0(x))) + A e + b, \qquad
   h = \text{conv}_1(\text{dropout}(\text{silu}(\text{norm}_1(g)))), \qquad
   y = (h + s(x)) / \sqrt 2, $$

A block with attention returns $(y + \text{proj}(\text{attention}(\text{qkv}(\text{norm}_2(y))))) / \sqrt 2$ instead of $y$.
A block that changes the resolution does so directly before $\text{conv}_0$ and in $s$. The factors preserve the variance of
a sum of two independent parts.

References:
    Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021, appendix H;
    Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022,
    appendix F.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stablefield.networks._dropout import dropout
from stablefield.networks._layers import Conv2d, Linear, group_norm
from stablefield.networks._resample import DownConv2d, UpConv2d

__all__ = ["UNetBlock", "self_attention"]


class UNetBlock(nn.Module):
    """A residual block with an embedding added to its channels.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        embedding_width: width of the embedding.
        down: halve the image.
        up: double the image; not both.
        taps: of the resampling filter, if the block resamples.
        attention: whether self-attention follows.
        dropout: probability of dropping a value before the second convolution.
        generator: draws the weights; torch's global generator if not given.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_width: int,
        *,
        down: bool = False,
        up: bool = False,
        taps: Sequence[float] = (1, 1),
        attention: bool = False,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.dropout = dropout

        def convolution(kernel_size: int) -> Conv2d:
            if down:
                return DownConv2d(in_channels, out_channels, kernel_size, taps, generator)
            if up:
                return UpConv2d(in_channels, out_channels, kernel_size, taps, generator)
            return Conv2d(in_channels, out_channels, kernel_size, generator=generator)

        self.norm0 = group_norm(in_channels)
        self.conv0 = convolution(3)
        self.affine = Linear(embedding_width, out_channels, generator=generator)
        self.norm1 = group_norm(out_channels)
        self.conv1 = Conv2d(out_channels, out_channels, 3, gain=1e-5, generator=generator)
        self.skip = convolution(1) if down or up or in_channels != out_channels else None
        self.norm2 = group_norm(out_channels) if attention else None
        self.qkv = self.proj = None
        if attention:
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1, gain=math.sqrt(0.2), generator=generator)
            self.proj = Conv2d(out_channels, out_channels, 1, gain=1e-5, generator=generator)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map `x` (N, in, H, W) and `embedding` (N, width) to (N, out, H', W')."""
        silu = nn.functional.silu
        h = self.conv0(silu(self.norm0(x))) + self.affine(embedding)[:, :, None, None]
        h = dropout(silu(self.norm1(h)), self.dropout, self.training)
        x = (self.conv1(h) + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        if self.norm2 is not None and self.qkv is not None and self.proj is not None:
            x = (self.proj(self_attention(self.qkv(self.norm2(x)))) + x) * math.sqrt(0.5)
        return x


def self_attention(qkv: Tensor) -> Tensor:
    r"""Attention of every pixel to every pixel, one head: $v \, \text{softmax}(q^\top k / \sqrt C)^\top$.

    Computed in float32 (float64 for float64 input), even under autocast: logits in half precision lose the small differences
    that the softmax magnifies.

    Args:
        qkv: shape (N, 3C, H, W); channel 3c + j is channel c of the query, key, value for j = 0, 1, 2.

    Returns:
        Shape (N, C, H, W), in the dtype of `qkv`.
    """
    N, C3, H, W = qkv.shape
    with _no_autocast(qkv.device.type):
        wide = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
        # (3, N, 1, HW, C), contiguous: the fused kernels need a head axis and adjacent channels of a pixel.
        parts = wide.reshape(N, C3 // 3, 3, H * W).permute(2, 0, 3, 1)[:, :, None].contiguous()
        mixed = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
    return mixed[:, 0].transpose(1, 2).reshape(N, C3 // 3, H, W).to(qkv.dtype)


def _no_autocast(device_type: str) -> torch.autocast:
    # The meta device has no autocast to switch off, and the context rejects its name. Compare names: asking torch whether a
    # device has autocast breaks the graph of a compiled network (torch 2.11).
    return torch.autocast("cpu" if device_type == "meta" else device_type, enabled=False)
