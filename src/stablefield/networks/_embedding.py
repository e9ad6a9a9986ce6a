r"""Embeddings of a network's other inputs: noise labels and class labels.

A noise label $c$ becomes sines and cosines, $(\sin \omega_k c \ldots, \cos \omega_k c \ldots)$, with frequencies that are

- positional: $\omega_k = 10^{-4 k / (K - 1)}$, $k = 0 \ldots K - 1$, for labels in the hundreds;
- random Fourier: $\omega_k = 2 \pi f_k$, $f_k \sim N(0, 16^2)$ drawn once, for labels of order one.

A class becomes a one-hot vector, and no class the zero vector.

References:
    Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.5; Tancik et al., "Fourier Features Let
    Networks Learn High Frequency Functions in Low Dimensional Domains", NeurIPS 2020.
"""

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from stablefield._shapes import check_tensor, is_integer

__all__ = ["FourierEmbedding", "PositionalEmbedding", "class_numbers", "class_vectors"]


class _Frequencies(nn.Module):
    """Sines and cosines at the frequencies `freqs`, which stay in float32 or better if the weights are cast to 16 bits."""

    freqs: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.freqs
        super()._apply(fn, recurse)
        if self.freqs.dtype.itemsize < 4:
            self.freqs = exact.to(self.freqs.device)
        return self


class PositionalEmbedding(_Frequencies):
    """Sines and cosines at a geometric sequence of frequencies from 1 down to 1e-4.

    Args:
        width: of the embedding, even and at least 4.

    Raises:
        ValueError: if the width is odd or below 4.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        count = _frequency_count(width)
        freqs = torch.pow(1e-4, torch.arange(count, dtype=torch.float64) / (count - 1)).float()
        self.register_buffer("freqs", freqs, persistent=False)

    def forward(self, noise_label: Tensor) -> Tensor:
        """Map labels (N,) to (N, width), in float32 or the labels' dtype if that is wider."""
        return _waves(noise_label, self.freqs)


class FourierEmbedding(_Frequencies):
    """Sines and cosines at random frequencies, which are part of the state and never trained.

    Args:
        width: of the embedding, even and at least 4.
        scale: standard deviation of the frequencies.
        generator: draws them; torch's global generator if not given.

    Raises:
        ValueError: if the width is odd or below 4.
    """

    def __init__(self, width: int, scale: float = 16.0, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.register_buffer("freqs", scale * torch.randn(_frequency_count(width), generator=generator))

    def forward(self, noise_label: Tensor) -> Tensor:
        """Map labels (N,) to (N, width), in float32 or the labels' dtype if that is wider."""
        # Published weights were trained with 2 pi f rounded to float32 before the product with the label, so the rounding
        # is part of the frequency.
        return _waves(noise_label, 2 * math.pi * self.freqs)


def class_vectors(labels: Tensor | None, classes: int, x: Tensor) -> Tensor:
    """One-hot vectors of class labels.

    Args:
        labels: integers (N,) from 0 to classes - 1, or -1 for no class; or one-hot vectors (N, classes), floating
            point, a zero row for no class; or None: no class for any row.
        classes: the number of classes.
        x: the images (N, ...) of the labels.

    Returns:
        Shape (N, classes), on the device of `x`; zero rows for no class.

    Raises:
        ValueError: if shape, dtype or device are wrong, or an integer is out of range. The range is checked only on the CPU;
            elsewhere, where a check would make the host wait, a row out of range becomes nan.
    """
    if labels is None:
        return x.new_zeros(x.shape[0], classes)
    labels = _placed(labels, x)
    if labels.is_floating_point():
        if labels.shape != (x.shape[0], classes):
            raise ValueError(
                f"class_labels has shape {tuple(labels.shape)}: floating point labels are one-hot vectors, here of "
                f"shape {(x.shape[0], classes)}; pass class numbers as integers of shape ({x.shape[0]},)."
            )
        return labels
    valid = _valid(labels, classes, x, f", or one-hot vectors of shape {(x.shape[0], classes)} in floating point")
    hot = labels[:, None] == torch.arange(classes, device=labels.device)
    return torch.where(valid[:, None], hot.to(x.dtype), math.nan)


def class_numbers(labels: Tensor | None, classes: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows of a table that has one row per class and a last one for no class.

    Args:
        labels: integers (N,) from 0 to classes - 1, or -1 for no class; None: no class for any row.
        classes: the number of classes.
        x: the images (N, ...) of the labels.

    Returns:
        The rows (N,), always within the table, and which labels are valid (N,), None if all are.

    Raises:
        ValueError: as `class_vectors`.
    """
    if labels is None:
        return torch.full(x.shape[:1], classes, dtype=torch.long, device=x.device), None
    labels = _placed(labels, x)
    valid = _valid(labels, classes, x)
    return torch.where(valid & (labels >= 0), labels, classes).long(), valid


def _placed(labels: Tensor, x: Tensor) -> Tensor:
    """The labels, which are on the device of the images, signed: torch takes a uint8 of 255 for -1."""
    if labels.device != x.device:
        raise ValueError(f"class_labels is on {labels.device}, but the images are on {x.device}: move one of them.")
    check_tensor("class_labels", labels)
    return labels.long() if is_integer(labels.dtype) and not labels.dtype.is_signed else labels


def _valid(labels: Tensor, classes: int, x: Tensor, other: str = "") -> Tensor:
    """Which labels are class numbers or -1; on the CPU all of them."""
    if labels.shape != x.shape[:1] or not is_integer(labels.dtype):
        raise ValueError(
            f"class_labels has shape {tuple(labels.shape)} and dtype {labels.dtype}: pass integers of shape "
            f"({x.shape[0]},){other}."
        )
    valid = (labels >= -1) & (labels < classes)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and not valid.all():
        raise ValueError(
            f"class_labels holds {labels[~valid][0].item()}: classes are 0 to {classes - 1}, and -1 is no class."
        )
    return valid


def _frequency_count(width: int) -> int:
    if width < 4 or width % 2:
        raise ValueError(f"the noise embedding is {width} wide: it must be even and at least 4; change base_channels.")
    return width // 2


def _waves(noise_label: Tensor, frequencies: Tensor) -> Tensor:
    dtype = torch.promote_types(noise_label.dtype, torch.float32)
    angles = noise_label.to(dtype)[:, None] * frequencies.to(dtype)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
