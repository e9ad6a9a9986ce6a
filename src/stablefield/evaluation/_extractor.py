"""Extractors: maps from images to features.

An extractor turns uint8 images (B, C, H, W) into features (B, d), one row per image, each row a function of its own
image alone. It declares its name, the sha256 of its weights and its resize rule, because a distance between features means
nothing without them.
"""

import hashlib
import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stablefield._precision import CUDA_PRODUCTS, CUDNN_CONVOLUTIONS
from stablefield._shapes import check_tensor, shape_of
from stablefield.data._image_set import ImageSet

__all__ = [
    "Extractor",
    "RandomConvolutions",
    "RawPixels",
    "RawValues",
    "check_images",
    "full_precision",
    "raw",
    "three_channels",
]

_WIDTHS = (16, 32, 64)


class Extractor(Protocol):
    """The interface of a feature network.

    Attributes:
        name: its name in a table.
        dim: number of features d per image.
        sha256: hash of the weights, 64 hexadecimal digits (without weights, the hash of no bytes).
        resize: name of the resize rule, for the protocol record.
    """

    name: str
    dim: int
    sha256: str
    resize: str

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, dim) of uint8 images (B, C, H, W), C 1 or 3; or of float data (B, ...)."""
        ...


class RawPixels:
    """The pixels themselves, x / 127.5 - 1, flattened: d = C * H * W.

    Args:
        shape: (C, H, W) of the images.

    Raises:
        ValueError: if `shape` is not three positive numbers, or, on a call, images have another shape or dtype.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        sizes = shape_of("shape", shape)
        if len(sizes) != 3 or min(sizes) < 1:
            raise ValueError(f"shape is {shape}: pass channels, height and width, such as (3, 32, 32).")
        self._shape = sizes
        self.name, self.resize = "pixels", "none"
        self.dim, self.sha256 = math.prod(sizes), hashlib.sha256(b"").hexdigest()

    def __call__(self, images: Tensor) -> Tensor:
        check_images(images)
        if images.shape[1:] != self._shape:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, but these raw pixels take images (B, *{self._shape}): "
                "compare images of one size, or make RawPixels with the other shape."
            )
        return images.flatten(1).float() / 127.5 - 1


class RawValues:
    """The values themselves of data that are not 8-bit images, in their own units, flattened.

    Args:
        shape: shape of one sample, such as (d,), (C, L) or (C, H, W).

    Raises:
        ValueError: if `shape` is not of positive numbers, or, on a call, the samples have another shape or are not floats.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        sizes = shape_of("shape", shape)
        if min(sizes, default=0) < 1:
            raise ValueError(f"shape is {shape}: pass the shape of one sample, such as (4, 32, 32).")
        self._shape = sizes
        self.name, self.resize = "values", "none"
        self.dim, self.sha256 = math.prod(sizes), hashlib.sha256(b"").hexdigest()

    def __call__(self, images: Tensor) -> Tensor:
        check_tensor("images", images, floating=True, numbers=True)
        if images.shape[1:] != self._shape:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, but these raw values take samples (B, *{self._shape}): compare "
                "samples of one shape, or make RawValues with the other."
            )
        values = images.flatten(1)
        # float64 far from 0, such as coordinates or times, would lose its digits.
        return values if values.dtype == torch.float64 else values.float()


def raw(images: ImageSet) -> RawPixels | RawValues:
    """The pixels of images, or the values of float data, as features."""
    return RawPixels(images.shape) if images.scaling is None else RawValues(images.shape)


class RandomConvolutions:
    """Features of a small random convolution net with fixed weights, without a download; d = 112.

    Three 3x3 convolutions of stride 2 with leaky rectifiers, and the mean of every channel over the image after each of
    them. Random features separate distributions well enough for tests and quick checks, but their numbers compare with no
    published ones: the name and the hash say so.

    Weights are uniform with variance 2 / fan-in, made from the raw 64-bit output of numpy's PCG64. Both the weights and
    `sha256` are the same on every machine and in every version.

    Args:
        seed: seed of the weights.
        device: where it runs.

    Raises:
        ValueError: on a call, if images are not uint8 (B, C, H, W) with 1 or 3 channels.
    """

    def __init__(self, seed: int = 0, *, device: str | torch.device = "cpu") -> None:
        self._device = torch.device(device)
        bits = np.random.PCG64(seed)
        weights: list[np.ndarray] = []
        for inputs, outputs in zip((3, *_WIDTHS), _WIDTHS, strict=False):
            raw = np.asarray(bits.random_raw(outputs * inputs * 9)) >> np.uint64(40)
            # 24 bits over 2^23: every number is a float32 exactly; uniform on [-1, 1) has variance 1/3.
            uniform = raw.astype(np.float32) / np.float32(2**23) - np.float32(1)
            weights.append((uniform * np.float32((6 / (inputs * 9)) ** 0.5)).reshape(outputs, inputs, 3, 3))
        self.name, self.resize, self.dim = f"random convolutions (seed {seed})", "none", sum(_WIDTHS)
        self.sha256 = hashlib.sha256(b"".join(weight.astype("<f4").tobytes() for weight in weights)).hexdigest()
        self._weights = [torch.from_numpy(weight).to(self._device) for weight in weights]

    def __call__(self, images: Tensor) -> Tensor:
        check_images(images)
        with full_precision(self._device):
            x = three_channels(images.to(self._device)).float() / 127.5 - 1
            means: list[Tensor] = []
            for weight in self._weights:
                x = functional.leaky_relu(functional.conv2d(x, weight, stride=2, padding=1), 0.2)
                means.append(x.mean(dim=(2, 3)))
            return torch.cat(means, dim=1)


def check_images(images: Tensor) -> None:
    """Check that `images` are uint8 of shape (B, C, H, W) with 1 or 3 channels and at least one pixel.

    Raises:
        ValueError: if not.
    """
    check_tensor("images", images, numbers=True)
    if images.dtype != torch.uint8:
        raise ValueError(
            f"images have dtype {images.dtype}: pass uint8, 0 to 255, as in image files (from x in [-1, 1]: "
            "(127.5 * (x + 1)).round().clamp(0, 255).to(torch.uint8)). Networks for images do not measure other data: "
            "RawValues measures the values themselves."
        )
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape[2:]:
        raise ValueError(
            f"images have shape {tuple(images.shape)}: pass (B, C, H, W) with 1 or 3 channels "
            "(from (B, H, W, C): images.permute(0, 3, 1, 2))."
        )


def three_channels(images: Tensor) -> Tensor:
    """Repeat a grey channel three times; leave colour images alone."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


@contextmanager
def full_precision(device: torch.device) -> Generator[None]:
    """Run a network in plain float32 without gradients: no autocast, no TensorFloat-32.

    TensorFloat-32 convolutions, torch's default on recent GPUs, change features in the third digit.
    """
    with CUDNN_CONVOLUTIONS, CUDA_PRODUCTS, torch.inference_mode(), torch.autocast(device.type, enabled=False):
        yield
