"""Extractors: maps from images to features.

An extractor turns uint8 images (B, C, H, W) into features (B, d), one row per image, each row a function of its own
image alone. It states its name, the sha256 of its weights and its resize rule, because a distance between features
means nothing without them.
"""

import hashlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from stablefield.shapes import check_tensor, shape_of

__all__ = ["Extractor", "RawPixels", "check_images", "full_precision", "three_channels"]


class Extractor(Protocol):
    """What a metric needs of a feature network."""

    @property
    def name(self) -> str:
        """What to call it in a table."""
        ...

    @property
    def dim(self) -> int:
        """Number of features d per image."""
        ...

    @property
    def sha256(self) -> str:
        """Hash of the weights, 64 hexadecimal digits (the hash of no bytes where there are none)."""
        ...

    @property
    def resize(self) -> str:
        """Name of the resize rule, for the protocol record."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, dim) of uint8 images (B, C, H, W), C 1 or 3."""
        ...


class RawPixels:
    """The pixels themselves, x / 127.5 - 1, flattened: d = C * H * W.

    Args:
        shape: (C, H, W) of the images.

    Raises:
        ValueError: if `shape` is not three positive numbers, or, on a call, images are of another shape or dtype.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        sizes = shape_of("shape", shape)
        if len(sizes) != 3 or min(sizes) < 1:
            raise ValueError(f"shape is {shape}: pass channels, height and width, such as (3, 32, 32).")
        self._shape = sizes

    @property
    def name(self) -> str:  # noqa: D102
        return "pixels"

    @property
    def dim(self) -> int:  # noqa: D102
        channels, height, width = self._shape
        return channels * height * width

    @property
    def sha256(self) -> str:  # noqa: D102
        return hashlib.sha256(b"").hexdigest()

    @property
    def resize(self) -> str:  # noqa: D102
        return "none"

    def __call__(self, images: Tensor) -> Tensor:  # noqa: D102
        check_images(images)
        if images.shape[1:] != self._shape:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, but these raw pixels are of images (B, *{self._shape}): "
                "compare images of one size, or make RawPixels of the other shape."
            )
        return images.flatten(1).float() / 127.5 - 1


def check_images(images: Tensor) -> None:
    """Make sure that `images` are uint8 of shape (B, C, H, W) with 1 or 3 channels and at least one pixel.

    Raises:
        ValueError: if they are not.
    """
    check_tensor("images", images, numbers=True)
    if images.dtype != torch.uint8:
        raise ValueError(
            f"images have dtype {images.dtype}: pass uint8, 0 to 255 (of images x in [-1, 1]: "
            "(127.5 * (x + 1)).round().clamp(0, 255).to(torch.uint8)), since that is what a saved image holds."
        )
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape[2:]:
        raise ValueError(
            f"images have shape {tuple(images.shape)}: pass (B, C, H, W) with 1 or 3 channels "
            "(of arrays (B, H, W, C): images.permute(0, 3, 1, 2))."
        )


def three_channels(images: Tensor) -> Tensor:
    """Repeat a grey channel three times; leave colour images alone."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


@contextmanager
def full_precision(device: torch.device) -> Generator[None]:
    """Run a network in plain float32 without gradients: no autocast, no TensorFloat-32.

    TensorFloat-32 convolutions, torch's default on recent GPUs, change features in the third digit.
    """
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # pyright: ignore[reportAttributeAccessIssue]
    before = [setting.fp32_precision for setting in settings]
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        try:
            for setting in settings:
                setting.fp32_precision = "ieee"
            yield
        finally:
            for setting, value in zip(settings, before, strict=True):
                setting.fp32_precision = value
