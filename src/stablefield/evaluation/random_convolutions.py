"""A small fixed random convolution net: features without weights to fetch.

Three 3x3 convolutions of stride 2 with leaky rectifiers, and the mean of every channel over the image after each of
them. Random features separate distributions well enough for tests and for quick looks, and their numbers compare with
nobody else's: the name and the hash say so.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stablefield.evaluation.extractor import check_images, full_precision, three_channels

__all__ = ["RandomConvolutions"]

_WIDTHS = (16, 32, 64)


class RandomConvolutions:
    """Features of a random convolution net with fixed weights; d = 112.

    Weights are uniform with variance 2 / fan-in, made from the raw 64-bit output of numpy's PCG64, which is the same on
    every machine and in every version, and so is `sha256`.

    Args:
        seed: which net.
        device: where it runs.

    Raises:
        ValueError: on a call, if images are not uint8 (B, C, H, W) with 1 or 3 channels.
    """

    def __init__(self, seed: int = 0, *, device: str | torch.device = "cpu") -> None:
        self._seed, self._device = seed, torch.device(device)
        bits = np.random.PCG64(seed)
        weights: list[np.ndarray] = []
        for inputs, outputs in zip((3, *_WIDTHS), _WIDTHS, strict=False):
            raw = np.asarray(bits.random_raw(outputs * inputs * 9)) >> np.uint64(40)
            # 24 bits over 2^23: every number is a float32 exactly; uniform on [-1, 1) has variance 1/3.
            uniform = raw.astype(np.float32) / np.float32(2**23) - np.float32(1)
            weights.append((uniform * np.float32((6 / (inputs * 9)) ** 0.5)).reshape(outputs, inputs, 3, 3))
        self._sha256 = hashlib.sha256(b"".join(weight.astype("<f4").tobytes() for weight in weights)).hexdigest()
        self._weights = [torch.from_numpy(weight).to(self._device) for weight in weights]

    @property
    def name(self) -> str:  # noqa: D102
        return f"random convolutions (seed {self._seed})"

    @property
    def dim(self) -> int:  # noqa: D102
        return sum(_WIDTHS)

    @property
    def sha256(self) -> str:  # noqa: D102
        return self._sha256

    @property
    def resize(self) -> str:  # noqa: D102
        return "none"

    def __call__(self, images: Tensor) -> Tensor:  # noqa: D102
        check_images(images)
        with full_precision(self._device):
            x = three_channels(images.to(self._device)).float() / 127.5 - 1
            means: list[Tensor] = []
            for weight in self._weights:
                x = functional.leaky_relu(functional.conv2d(x, weight, stride=2, padding=1), 0.2)
                means.append(x.mean(dim=(2, 3)))
            return torch.cat(means, dim=1)
