"""Resize rules: how an image reaches the size that a network was trained at.

The rule is part of the metric: the same samples get another Frechet distance with another rule (Parmar, Zhang, Zhu,
"On Aliased Resizing and Surprising Subtleties in GAN Evaluation", CVPR 2022). Reference implementations differ:

- The original FID feeds 0..255 images of any size to the TensorFlow graph of 2015, which resizes inside by TensorFlow
  1's bilinear kernel: output pixel i reads input position i * in / out (no offset of half a pixel), no
  antialiasing. The published numbers of diffusion models follow it, through TensorFlow itself or through PyTorch ports
  that copy the kernel.
- pytorch-fid uses torch's bilinear kernel instead, which aligns pixel centres and scales by (x - 127.5) / 127.5.
- clean-fid's own mode uses Pillow's bicubic kernel, which antialiases.

`TensorFlowBilinear` is therefore the rule of FID here; `AntialiasedBicubic` is clean-fid's. A rule takes floating point
images (B, C, H, W) on any scale and returns them as (B, C, size, size), not rounded.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["AntialiasedBicubic", "KeepSize", "Resize", "TensorFlowBilinear"]


class Resize(Protocol):
    """A named map from images of any size to images of one size."""

    @property
    def rule(self) -> str:
        """The name that goes into the protocol record."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Resize floating point images of shape (B, C, H, W)."""
        ...


@dataclass(frozen=True)
class KeepSize:
    """No resizing."""

    @property
    def rule(self) -> str:  # noqa: D102
        return "none"

    def __call__(self, images: Tensor) -> Tensor:  # noqa: D102
        return images


@dataclass(frozen=True)
class TensorFlowBilinear:
    """TensorFlow 1's bilinear kernel (align_corners and half_pixel_centers both false), as the FID graph applies it.

    Output pixel i lies at p = i * in / out and is x[floor(p)] + (p - floor(p)) * (x[floor(p) + 1] - x[floor(p)]), the
    last pixel standing for those beyond it; columns first, then rows, with positions in float32 as in TensorFlow's
    kernel.

    References:
        Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter, "GANs Trained by a Two Time-Scale Update Rule Converge to a
        Local Nash Equilibrium", NeurIPS 2017 (the graph that FID is defined by).
    """

    size: int

    @property
    def rule(self) -> str:  # noqa: D102
        return f"tensorflow1-bilinear-{self.size}x{self.size}"

    def __call__(self, images: Tensor) -> Tensor:  # noqa: D102
        return _interpolate(_interpolate(images, self.size, dim=3), self.size, dim=2)


@dataclass(frozen=True)
class AntialiasedBicubic:
    """Pillow's bicubic kernel (a = -0.5, widened when it shrinks), by torch's own implementation of it.

    The rule of clean-fid, and of the usual preparation of images for DINOv2.
    """

    size: int

    @property
    def rule(self) -> str:  # noqa: D102
        return f"antialiased-bicubic-{self.size}x{self.size}"

    def __call__(self, images: Tensor) -> Tensor:  # noqa: D102
        return functional.interpolate(
            images, (self.size, self.size), mode="bicubic", align_corners=False, antialias=True
        )


def _interpolate(images: Tensor, size: int, dim: int) -> Tensor:
    length = images.shape[dim]
    if length == size:
        return images
    # float32 whatever the images' dtype: at 32 to 299 pixels the weights differ in the sixth digit otherwise.
    scale = torch.tensor(length, dtype=torch.float32) / torch.tensor(size, dtype=torch.float32)
    position = torch.arange(size, dtype=torch.float32) * scale
    low = position.long().clamp(max=length - 1)
    high = (low + 1).clamp(max=length - 1)
    shape = (-1, *(1,) * (images.ndim - 1 - dim))
    weight = (position - low).to(images.device, images.dtype).reshape(shape)
    low, high = low.to(images.device), high.to(images.device)
    start, end = images.index_select(dim, low), images.index_select(dim, high)
    return start + (end - start) * weight
