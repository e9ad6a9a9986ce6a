"""Wrap diffusers' `UNet2DModel` as a network for a `Denoiser`, for training and sampling.

It imports diffusers only when you make a network, so you can import this module without it.
"""

import math
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from stablefield._shapes import per_row
from stablefield.networks._embedding import class_numbers

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

__all__ = ["DiffusersUNet"]


class DiffusersUNet(nn.Module):
    """A `UNet2DModel` with the call signature of stablefield's networks.

    The noise label becomes the model's timestep: unchanged for a positional embedding, as its exponential for a Fourier one,
    which takes the logarithm itself. A model with a Fourier embedding also divides its output by the timestep; this is
    undone, because a preconditioning has its own output scale. With classes, the last entry of the model's class embedding
    means no class, so `num_class_embeds` is the number of classes plus one.

    Args:
        unet: the model; its output has as many channels as its input.

    Raises:
        ValueError: if the model embeds timesteps with a table, embeds classes without one, or changes the number of
            channels.
    """

    float32_labels = True

    def __init__(self, unet: "UNet2DModel") -> None:
        super().__init__()
        config: Any = unet.config
        if config.time_embedding_type not in ("positional", "fourier"):
            raise ValueError(
                f"unet has time_embedding_type {config.time_embedding_type}: noise levels are continuous, so it must be "
                "positional or fourier."
            )
        if config.class_embed_type is not None:
            raise ValueError(
                f"unet has class_embed_type {config.class_embed_type}: pass num_class_embeds=classes + 1 and no type."
            )
        if config.in_channels != config.out_channels:
            raise ValueError(
                f"unet maps {config.in_channels} channels to {config.out_channels}: a denoiser keeps their number."
            )
        self.unet = unet
        self.classes = max(0, (config.num_class_embeds or 0) - 1)
        self._takes_logarithm = config.time_embedding_type == "fourier"

    @classmethod
    def sized(
        cls,
        resolution: int | tuple[int, int],
        channels: int,
        widths: tuple[int, ...] = (64, 128, 128),
        blocks: int = 2,
        classes: int = 0,
        attention: tuple[bool, ...] | None = None,
        groups: int = 32,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Self:
        """A model of the usual shape.

        Args:
            resolution: side of square images, or height and width.
            channels: of the images.
            widths: channels of each level, multiples of `groups`.
            blocks: residual blocks per level.
            classes: number of classes; 0 for none.
            attention: which levels attend; only the lowest if not given.
            groups: of the normalisations.
            dropout: share of values dropped within a block in training.
            generator: draws the initial weights; torch's global one if not given.

        Raises:
            ImportError: if diffusers is not installed.
        """
        try:
            from diffusers.models.unets.unet_2d import UNet2DModel
        except ImportError as error:
            raise ImportError('DiffusersUNet needs diffusers: pip install "stablefield[diffusers]".') from error
        attends = attention or (*(False,) * (len(widths) - 1), True)
        down = tuple("AttnDownBlock2D" if attending else "DownBlock2D" for attending in attends)
        up = tuple("AttnUpBlock2D" if attending else "UpBlock2D" for attending in reversed(attends))
        # diffusers draws weights only from the global generator.
        with torch.random.fork_rng(devices=[], enabled=generator is not None):
            if generator is not None:
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
            unet = UNet2DModel(
                sample_size=resolution,
                in_channels=channels,
                out_channels=channels,
                block_out_channels=widths,
                down_block_types=down,
                up_block_types=up,
                layers_per_block=blocks,
                norm_num_groups=groups,
                dropout=dropout,
                num_class_embeds=classes + 1 if classes else None,
            )
        return cls(unet)

    def forward(self, x: Tensor, noise_label: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Map (B, C, H, W) to the same shape.

        Args:
            x: scaled noisy images.
            noise_label: shape (B,).
            class_labels: integers (B,), -1 for no class; None for no class in any row.

        Raises:
            ValueError: if labels are given to a model without classes, or one is out of range.
        """
        time = noise_label.exp() if self._takes_logarithm else noise_label
        if not self.classes:
            if class_labels is not None:
                raise ValueError("class_labels were given to a UNet2DModel without classes: build it with them.")
            return self._whole(self.unet(x, time).sample, time)
        seen, valid = class_numbers(class_labels, self.classes, x)
        out = self._whole(self.unet(x, time, class_labels=seen).sample, time)
        # Where values may not be read, a wrong label makes its row nan.
        return out if valid is None else torch.where(per_row(valid, out).bool(), out, math.nan)

    def _whole(self, out: Tensor, time: Tensor) -> Tensor:
        """The output before the model's division by the timestep."""
        return out * per_row(time, out) if self._takes_logarithm else out
