r"""Non-leaking augmentation: images are transformed, and the network receives the parameters.

Six transformations, in this order: a horizontal and a vertical flip, a scaling by $2^{a w}$, a rotation by an angle
$\theta$, a scaling by $2^{b w'}$ along an axis at the angle $\varphi$ and by $2^{-b w'}$ across it, and a shift by
$(c\, w_x W, c\, w_y H)$; $w, w', w_x, w_y \sim N(0, 1)$. Angles are counterclockwise, shifts go right and down. Each image
gets the horizontal flip with probability 1/2, and each other transformation with probability $p$ (the vertical flip with $p
/ 2$). The network receives nine numbers,

$$ (\text{flip}_x,\ \text{flip}_y,\ w,\ \cos\theta - 1,\ \sin\theta,\ w' \cos\varphi,\ w' \sin\varphi,\ w_x,\ w_y), $$

with zeros for transformations that were not drawn. Sampling passes all zeros, so that no transformation leaks into samples.

Flips are isometries that only move pixels. Where nothing else was drawn, a stable target stays exact by symmetry: its
references are the flipped data. A row with any other transformation is `own`: only its own image, transformed in the same
way, can be its reference. Such a row is resampled once, by one affine map (see `stablefield.data._affine`).

References:
    Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022,
    appendix F; Jun et al., "Distribution Augmentation for Generative Modeling", ICML 2020 (the conditioning).
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from stablefield.data._affine import warp

__all__ = ["LABEL_WIDTH", "Augmentation", "AugmentationParameters", "flip"]

LABEL_WIDTH = 9
"""Width of the augmentation label, a network's `augment_dim`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AugmentationParameters:
    """The drawn parameters of each of B rows; zeros mean no transformation."""

    flips: Tensor
    """(B, 2) boolean: mirrored horizontally (left and right exchanged), vertically (top and bottom exchanged)."""

    scale: Tensor
    """(B,) w of the scaling; above 0 enlarges the content."""

    angle: Tensor
    """(B,) of the rotation in radians, counterclockwise."""

    anisotropy: Tensor
    """(B,) w of the scaling along an axis."""

    axis: Tensor
    """(B,) angle of that axis in radians, counterclockwise from horizontal."""

    shift: Tensor
    """(B, 2) w of the shift to the right, down."""

    def __len__(self) -> int:
        return len(self.flips)

    def __getitem__(self, rows: slice | Tensor) -> "AugmentationParameters":
        """The parameters of some rows: a slice, or an index or boolean tensor."""
        return AugmentationParameters(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def to(self, device: torch.device | str) -> "AugmentationParameters":
        """The parameters on another device."""
        return AugmentationParameters(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    @property
    def own(self) -> Tensor:
        """(B,) boolean: whether the row has a transformation besides flips, and so only itself as reference."""
        return (self.scale != 0) | (self.angle != 0) | (self.anisotropy != 0) | (self.shift != 0).any(-1)

    @property
    def labels(self) -> Tensor:
        """(B, 9) float32: the network's input."""
        columns = [
            self.scale,
            self.angle.cos() - 1,
            self.angle.sin(),
            self.anisotropy * self.axis.cos(),
            self.anisotropy * self.axis.sin(),
        ]
        return torch.cat([self.flips.float(), torch.stack(columns, dim=-1), self.shift], dim=-1)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The published pipeline and its strengths; a strength of 0 turns a transformation off."""

    probability: float = 0.12
    """Probability of each transformation but the horizontal flip."""

    flip_x: bool = True
    """Mirror left and right, with probability 1/2 whatever `probability` is."""

    flip_y: bool = True
    """Mirror top and bottom, with half of `probability`."""

    scale: float = 0.2
    """Standard deviation of the scaling, in octaves."""

    rotation: float = math.pi
    """Largest angle in radians: angles are uniform between minus and plus this."""

    anisotropy: float = 0.2
    """Standard deviation of the scaling along an axis, in octaves."""

    axis_probability: float = 0.5
    """Probability that this axis has a uniformly random angle; else it is horizontal."""

    shift: float = 0.125
    """Standard deviation of the shift, in sides of the image."""

    def __post_init__(self) -> None:
        for name in ("probability", "axis_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: a probability lies between 0 and 1.")
        for name in ("scale", "rotation", "anisotropy", "shift"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: a strength is finite and at least 0 (none).")

    def draw(
        self, batch: int, generator: torch.Generator, device: torch.device | str | None = None
    ) -> AugmentationParameters:
        """Draw the parameters of `batch` rows.

        A row takes the same numbers from the generator whatever the settings are, and, for a generator on the CPU, whatever
        `batch` is: the first rows of a larger draw equal those of a smaller one.

        Args:
            batch: how many rows.
            generator: the source of randomness.
            device: where to put them; by default the generator's device. The CPU is best, for images on any device: `apply`
                then knows which rows to resample without waiting for that device.

        Raises:
            ValueError: if `batch` is negative.
        """
        if batch < 0:
            raise ValueError(f"batch is {batch}: it must be at least 0.")
        # Uniform numbers only: torch draws them one by one, but normal ones in blocks that depend on the batch.
        dtype = torch.float32 if generator.device.type == "mps" else torch.float64
        u = torch.rand(batch, 14, generator=generator, device=generator.device, dtype=dtype)
        use_flip_y, use_scale, use_rotation, use_anisotropy, use_shift = (u[:, 2:7] < self.probability).unbind(-1)
        angles = 2 * u[:, 7:9] - 1
        normal = torch.special.ndtri(u[:, 9:].clamp_min(torch.finfo(dtype).eps / 4))

        def where(drawn: Tensor, strength: float, value: Tensor) -> Tensor:
            return torch.where(drawn, value, 0).float() if strength else torch.zeros_like(value).float()

        turn_axis = use_anisotropy & (u[:, 13] < self.axis_probability)
        flips = torch.stack([(u[:, 0] < 0.5) & self.flip_x, (u[:, 1] < 0.5) & use_flip_y & self.flip_y], dim=-1)
        parameters = AugmentationParameters(
            flips=flips,
            scale=where(use_scale, self.scale, normal[:, 0]),
            angle=where(use_rotation, self.rotation, self.rotation * angles[:, 0]),
            anisotropy=where(use_anisotropy, self.anisotropy, normal[:, 1]),
            axis=where(turn_axis, self.anisotropy, math.pi * angles[:, 1]),
            shift=where(use_shift[:, None], self.shift, normal[:, 2:4]),
        )
        return parameters if device is None else parameters.to(device)

    def transform(self, parameters: AugmentationParameters, height: int, width: int) -> Tensor:
        """The affine maps of all but the flips, as `stablefield.data._affine.warp` takes them.

        Args:
            parameters: of B rows.
            height: of the images in pixels.
            width: of the images in pixels.

        Returns:
            Shape (B, 2, 3), in pixels from the centre of the image.
        """
        p = parameters
        scale = torch.exp2(self.scale * p.scale)
        cos, sin = scale * p.angle.cos(), scale * p.angle.sin()
        # Stretching by e^r along n and e^-r across is cosh(r) + sinh(r) (2 n n' - 1). The y axis points down.
        stretch = math.log(2) * self.anisotropy * p.anisotropy
        along, across = torch.sinh(stretch) * (2 * p.axis).cos(), -torch.sinh(stretch) * (2 * p.axis).sin()
        a, b, d = torch.cosh(stretch) + along, across, torch.cosh(stretch) - along
        sides = torch.tensor([width, height], dtype=p.shift.dtype, device=p.shift.device)
        shift_x, shift_y = (self.shift * p.shift * sides).unbind(-1)
        rows = [a * cos - b * sin, a * sin + b * cos, shift_x, b * cos - d * sin, b * sin + d * cos, shift_y]
        return torch.stack(rows, dim=-1).reshape(-1, 2, 3)

    def apply(self, images: Tensor, parameters: AugmentationParameters) -> Tensor:
        """Transform images.

        Args:
            images: shape (B, C, H, W), floating point; if a row is resampled, H and W must be at least 4.
            parameters: of the same B rows, from `draw`, on the device of the images or on the CPU.

        Returns:
            New images of the same shape, dtype and device. Rows that are not `own` keep their values bit for bit; the
            others may exceed the range of the input by some percent near sharp edges.

        Raises:
            ValueError: if shapes or dtype do not fit.
        """
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(
                f"images has shape {tuple(images.shape)} and dtype {images.dtype}: augmentation takes floating point "
                "images (B, C, H, W) (uint8 images: x / 127.5 - 1)."
            )
        if len(parameters) != len(images):
            raise ValueError(f"parameters has {len(parameters)} rows for {len(images)} images: draw as many as images.")
        flipped = flip(images, parameters.flips)
        rows = parameters.own.nonzero()[:, 0]
        if len(rows) > 0:
            transform = self.transform(parameters[rows], images.shape[-2], images.shape[-1]).to(images.device)
            rows = rows.to(images.device)
            flipped[rows] = warp(flipped[rows], transform)
        return flipped


def flip(images: Tensor, flips: Tensor) -> Tensor:
    """Mirror images; mirroring twice restores them.

    Args:
        images: shape (B, ..., H, W).
        flips: boolean (B, 2): mirror left and right, top and bottom.

    Returns:
        New images of the same shape and dtype.

    Raises:
        ValueError: if there is not one pair of booleans per image.
    """
    if flips.shape != (len(images), 2) or flips.dtype != torch.bool:
        raise ValueError(
            f"flips has shape {tuple(flips.shape)} and dtype {flips.dtype}: pass booleans of shape {(len(images), 2)}."
        )
    horizontal, vertical = flips.to(images.device).reshape(-1, 2, *(1,) * (images.ndim - 1)).unbind(1)
    images = torch.where(horizontal, images.flip(-1), images)
    return torch.where(vertical, images.flip(-2), images)
