r"""DDPM++ and NCSN++: the U-Nets of score-based diffusion, in the configuration that EDM trains.

An encoder of levels at resolutions $R, R/2, R/4 \ldots$ and a decoder that mirrors it, joined by skip connections. Level $l$
is `multipliers[l] * base_channels` wide and has `blocks` residual blocks in the encoder, `blocks + 1` in the decoder, each
of which takes one skip. The embedding of noise level, class and augmentation enters every block:

$$ e = \text{silu}(W_1\, \text{silu}(W_0 (\phi(c) + W_L \sqrt L\, \text{onehot} + b_L + W_A a) + b_0) + b_1). $$

| | noise embedding | resampling taps | residual input path |
|---|---|---|---|
| DDPM++ | positional, B wide | (1, 1) | no |
| NCSN++ | random Fourier, 2B wide | (1, 3, 3, 1) | yes: the input, convolved and halved, joins each lower level |

Names and values of the state match the published checkpoints (below their `model.`), so that weights trained elsewhere load
and give the same outputs.

References:
    Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, "Score-Based Generative Modeling through Stochastic Differential
    Equations", ICLR 2021, appendix H; Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based
    Generative Models", NeurIPS 2022, appendix F.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from stablefield._shapes import (
    check_generator,
    check_kind,
    check_tensor,
    flag,
    number,
    row_values,
    shape_of,
    whole_number,
)
from stablefield.networks._blocks import UNetBlock
from stablefield.networks._embedding import FourierEmbedding, PositionalEmbedding, class_vectors
from stablefield.networks._layers import Linear
from stablefield.networks._levels import Decoder, Encoder

__all__ = ["SongUNet"]


class SongUNet(nn.Module):
    """The U-Net of DDPM++ and NCSN++; `SongUNet.ddpmpp` and `SongUNet.ncsnpp` set the first three options.

    For RGB images of 32 x 32 pixels, with EDM's preconditioning, in a loop of your own:

        network = sf.networks.SongUNet.ddpmpp(32, 3, base_channels=128, multipliers=(2, 2, 2))
        denoiser = sf.Denoiser(network, preconditioning=sf.EDMPreconditioning(sigma_data=0.5))
        x0 = denoiser(x, sigma)  # x (B, 3, 32, 32), sigma (B,)

    Args:
        resolution: height and width of the images in pixels, or the side of square ones; multiples of 2^(levels - 1).
        channels: of the images.
        fourier: random Fourier embedding of the noise level, instead of a positional one.
        residual_input: let the input join each lower level of the encoder.
        taps: of the resampling filter.
        base_channels: unit of width B; the embedding is 4B wide.
        multipliers: width of each level in units of B, from the full resolution down.
        blocks: residual blocks per level of the encoder.
        attention: heights of the levels whose blocks attend (in the decoder, the last block of the level). By default the
            highest level of at most 16 x 16 pixels: 16 for images of 32 or 64 pixels, 14 for 28, 8 for 8. The lowest level
            always attends once.
        augment_dim: width of the augmentation labels; 0 for none.
        classes: number of classes; 0 for none.
        dropout: probability of dropping a value within a block, in training mode.
        generator: draws the weights; torch's global generator if not given. Dropout draws from the global generator, as
            everywhere in torch.

    Raises:
        ValueError: if a size is below 1, `resolution` cannot be halved that often, `attention` names a resolution that
            the network does not have, or a width does not divide into the groups of its normalisation.
    """

    float32_labels = True

    def __init__(
        self,
        resolution: int | Sequence[int],
        channels: int,
        *,
        fourier: bool,
        residual_input: bool,
        taps: Sequence[float],
        base_channels: int = 128,
        multipliers: Sequence[int] = (2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] | None = None,
        augment_dim: int = 0,
        classes: int = 0,
        dropout: float = 0.13,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_generator("generator", generator)
        flag("fourier", fourier)
        flag("residual_input", residual_input)
        check_kind("taps", taps, (tuple, list), "the taps of a filter, such as (1, 3, 3, 1)")
        for k, tap in enumerate(taps):
            number(f"taps[{k}]", tap)
        multipliers = shape_of("multipliers", multipliers)
        attention = None if attention is None else shape_of("attention", attention)
        size = _height_and_width(resolution)
        _check_sizes(size, channels, base_channels, multipliers, blocks, augment_dim, classes, dropout)
        resolutions = [(size[0] >> level, size[1] >> level) for level in range(len(multipliers))]
        heights = [height for height, _ in resolutions]
        if attention is None:
            attention = [height for height, width in resolutions if height * width <= 256][:1]
        elif not set(attention) <= set(heights):
            raise ValueError(f"attention is {tuple(attention)}: choose among the network's resolutions, {heights}.")
        self.size, self.channels = size, channels
        self.augment_dim, self.classes = augment_dim, classes
        widths = [base_channels * multiplier for multiplier in multipliers]
        noise_width, embedding_width = base_channels * (2 if fourier else 1), 4 * base_channels

        self.map_noise = (
            FourierEmbedding(noise_width, generator=generator) if fourier else PositionalEmbedding(noise_width)
        )
        self.map_label = Linear(classes, noise_width, generator=generator) if classes else None
        self.map_augment = Linear(augment_dim, noise_width, bias=False, generator=generator) if augment_dim else None
        self.map_layer0 = Linear(noise_width, embedding_width, generator=generator)
        self.map_layer1 = Linear(embedding_width, embedding_width, generator=generator)

        block = partial(UNetBlock, embedding_width=embedding_width, taps=taps, dropout=dropout, generator=generator)
        residual_taps = taps if residual_input else None
        self.enc = Encoder(
            channels, base_channels, resolutions, widths, blocks, attention, residual_taps, block, generator
        )
        self.dec = Decoder(channels, resolutions, widths, blocks, attention, self.enc.skip_widths, block, generator)

    @classmethod
    def ddpmpp(
        cls,
        resolution: int | Sequence[int],
        channels: int,
        base_channels: int = 128,
        multipliers: Sequence[int] = (2, 2, 2),
        blocks: int = 4,
        augment_dim: int = 0,
        classes: int = 0,
        dropout: float = 0.13,
        *,
        attention: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Self:
        """DDPM++; arguments as in the class, defaults as published for CIFAR-10 (there with `augment_dim` 9)."""
        return cls(
            resolution,
            channels,
            fourier=False,
            residual_input=False,
            taps=(1, 1),
            base_channels=base_channels,
            multipliers=multipliers,
            blocks=blocks,
            attention=attention,
            augment_dim=augment_dim,
            classes=classes,
            dropout=dropout,
            generator=generator,
        )

    @classmethod
    def ncsnpp(
        cls,
        resolution: int | Sequence[int],
        channels: int,
        base_channels: int = 128,
        multipliers: Sequence[int] = (2, 2, 2),
        blocks: int = 4,
        augment_dim: int = 0,
        classes: int = 0,
        dropout: float = 0.13,
        *,
        attention: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Self:
        """NCSN++; arguments as in the class, defaults as published for CIFAR-10 (there with `augment_dim` 9)."""
        return cls(
            resolution,
            channels,
            fourier=True,
            residual_input=True,
            taps=(1, 3, 3, 1),
            base_channels=base_channels,
            multipliers=multipliers,
            blocks=blocks,
            attention=attention,
            augment_dim=augment_dim,
            classes=classes,
            dropout=dropout,
            generator=generator,
        )

    def forward(
        self,
        x: Tensor,
        noise_label: Tensor | float,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Evaluate the network.

        Args:
            x: images, shape (N, channels, height, width), in the dtype of the weights.
            noise_label: the preconditioning's function of the noise level; shape (N,), or one number.
            class_labels: integers (N,), -1 for no class, or one-hot vectors (N, classes); None: no class for any row.
            augment_labels: shape (N, augment_dim); None means zeros.

        Returns:
            Shape (N, channels, height, width).

        Raises:
            ValueError: if shapes, dtypes or devices do not agree, labels are out of range, or the network was made without
                the given kind of labels.
        """
        check_tensor("x", x, floating=True, batch=True)
        for name, value in (("class_labels", class_labels), ("augment_labels", augment_labels)):
            if value is not None:
                check_tensor(name, value)
        if x.shape[1:] != (self.channels, *self.size):
            raise ValueError(
                f"x has shape {tuple(x.shape)}: this network takes images of shape "
                f"(N, {self.channels}, {self.size[0]}, {self.size[1]})."
            )
        embedding = self._embed(x, noise_label, class_labels, augment_labels)
        features, skips = self.enc(x, embedding)
        return self.dec(features, skips, embedding)

    def _embed(
        self, x: Tensor, noise_label: Tensor | float, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        dtype = self.map_layer0.weight.dtype
        labels = row_values("noise_label", noise_label, x).to(torch.promote_types(dtype, torch.float32))
        embedding = self.map_noise(labels).to(dtype)
        if self.map_label is not None:
            # A row without a class is a zero vector but still receives the bias, as in the published training.
            hot = class_vectors(class_labels, self.classes, x).to(dtype)
            embedding = embedding + self.map_label(hot * math.sqrt(self.classes))
        elif class_labels is not None:
            raise ValueError(
                "class_labels were given to a network without classes: build it with classes=L or pass None."
            )
        if augment_labels is not None:
            if self.map_augment is None:
                raise ValueError("augment_labels were given to a network without them: build it with augment_dim=9.")
            if augment_labels.shape != (x.shape[0], self.augment_dim) or augment_labels.device != x.device:
                raise ValueError(
                    f"augment_labels has shape {tuple(augment_labels.shape)} on {augment_labels.device}: "
                    f"pass {(x.shape[0], self.augment_dim)} on {x.device}."
                )
            embedding = embedding + self.map_augment(augment_labels.to(dtype))
        silu = nn.functional.silu
        return silu(self.map_layer1(silu(self.map_layer0(embedding))))


def _height_and_width(resolution: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(resolution, int | np.integer):
        return int(resolution), int(resolution)
    remedy = "the side of square images, or their height and width"
    check_kind("resolution", resolution, Sequence, remedy)
    if len(resolution) != 2:
        raise ValueError(f"resolution is {resolution}: pass {remedy}.")
    return resolution[0], resolution[1]


def _check_sizes(
    size: tuple[int, int],
    channels: int,
    base_channels: int,
    multipliers: Sequence[int],
    blocks: int,
    augment_dim: int,
    classes: int,
    dropout: float,
) -> None:
    resolution = size[0] if size[0] == size[1] else size
    sizes = {"resolution": min(size), "channels": channels, "base_channels": base_channels, "blocks": blocks}
    for name, count in {**sizes, "augment_dim": augment_dim, "classes": classes}.items():
        whole_number(name, count)
    number("dropout", dropout)
    for name, count in sizes.items():
        if count < 1:
            raise ValueError(f"{name} is {count}: it must be at least 1.")
    if min(augment_dim, classes) < 0:
        raise ValueError(f"augment_dim is {augment_dim}, classes is {classes}: pass 0 for none.")
    if len(multipliers) == 0 or min(multipliers) < 1:
        raise ValueError(f"multipliers is {tuple(multipliers)}: pass one number of at least 1 per level.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}: it must be at least 0 and below 1.")
    factor = 2 ** (len(multipliers) - 1)
    if size[0] % factor or size[1] % factor:
        raise ValueError(
            f"resolution is {resolution}: {len(multipliers)} levels halve it {len(multipliers) - 1} times, so it must be "
            f"a multiple of {factor}; resize the images or pass fewer multipliers."
        )
