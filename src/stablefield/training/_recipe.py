"""A recipe: all settings of a run, as one frozen value.

Its attribute docstrings are the help texts of the command's flags. `_recipes` holds the named recipes.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, Self, TypeAlias

import torch
from torch import nn

from stablefield.data._augmentation import LABEL_WIDTH
from stablefield.diffusion._noise_levels import LogNormal, LogUniform, Uniform
from stablefield.diffusion._objective import check_draws
from stablefield.diffusion._preconditioning import EDMPreconditioning, NamedPreconditioning
from stablefield.diffusion._process import EDM, VE, VP, Cosine, RectifiedFlow
from stablefield.diffusion._weighting import EDMWeighting, FlowWeighting, SNRWeighting
from stablefield.networks._diffusers_unet import DiffusersUNet
from stablefield.networks._mlp import MLP
from stablefield.networks._sit import SIT_SIZES, SiT
from stablefield.networks._song_unet import SongUNet
from stablefield.training._records import check_fields

__all__ = ["DiffusersUNetConfig", "MLPConfig", "Recipe", "SiTConfig", "SongUNetConfig"]

Shape: TypeAlias = tuple[int, ...]

# More than anybody trains, and small enough to reject a hostile file in seconds.
_MOST_BLOCKS = 1000
_MOST_LEVELS = 12
# Parts of `sample_every` after which early sample grids are drawn, and the first step with one.
_EARLY, _EARLIEST = (16, 4, 2, 8), 10

# A number of `Recipe` is not negative, unless its name asks for more here.
_POSITIVE = frozenset(
    (
        "steps",
        "batch",
        "draws_per_image",
        "gradient_accumulation_steps",
        "learning_rate",
        "max_grad_norm",
        "ema_half_life",
        "log_every",
        "checkpoint_every",
        "keep_last",
    )
)
_SHARES = frozenset(("decay_share", "ema_ramp", "label_dropout", "augmentation"))


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """The network of a recipe: a residual perceptron (`stablefield.networks.MLP`), for vectors and 8 x 8 pixels."""

    width: int = 512
    """Width of the hidden layers."""
    depth: int = 4
    """Number of residual blocks."""
    dropout: float = 0.0
    """Share of hidden values dropped in training."""

    def __post_init__(self) -> None:
        check_fields(self, "network.")
        _require_at_most("depth", self.depth, _MOST_BLOCKS)

    def build(self, shape: Shape, classes: int, augment_dim: int, generator: torch.Generator) -> nn.Module:
        """The network for samples of any `shape`, such as (C, H, W) or (d,).

        Raises:
            ValueError: if augment_dim is not 0.
        """
        if augment_dim:
            raise ValueError("augmentation needs a U-Net that is conditioned on it: use 0 with a perceptron.")
        return MLP(shape, self.width, self.depth, self.dropout, classes, generator)


@dataclass(frozen=True, kw_only=True)
class SongUNetConfig:
    """The network of a recipe: DDPM++ or NCSN++ (`stablefield.networks.SongUNet`)."""

    architecture: Literal["ddpmpp", "ncsnpp"] = "ddpmpp"
    """DDPM++ (positional noise embedding) or NCSN++ (Fourier embedding, wide resampling, residual input)."""
    base_channels: int = 128
    """Unit of width."""
    multipliers: tuple[int, ...] = (2, 2, 2)
    """Width of each level in that unit, from the full resolution down."""
    blocks: int = 4
    """Residual blocks per level."""
    dropout: float = 0.13
    """Share of values dropped within a block in training."""

    def __post_init__(self) -> None:
        check_fields(self, "network.")
        _require_at_most("blocks", self.blocks, _MOST_BLOCKS)
        _require_at_most("multipliers", len(self.multipliers), _MOST_LEVELS, "levels")

    def build(self, shape: Shape, classes: int, augment_dim: int, generator: torch.Generator) -> nn.Module:
        """The network for images of `shape` (C, H, W).

        Raises:
            ValueError: if the images cannot be halved as often as there are levels.
        """
        _require_halves(shape, len(self.multipliers))
        make = SongUNet.ncsnpp if self.architecture == "ncsnpp" else SongUNet.ddpmpp
        network = make(
            shape[1:],
            shape[0],
            self.base_channels,
            self.multipliers,
            self.blocks,
            augment_dim,
            classes,
            self.dropout,
            generator=generator,
        )
        return network.to(memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]


@dataclass(frozen=True, kw_only=True)
class DiffusersUNetConfig:
    """The network of a recipe: diffusers' UNet2DModel (`stablefield.networks.DiffusersUNet`).

    The exported pipeline opens without stablefield's code.
    """

    widths: tuple[int, ...] = (64, 128, 128)
    """Channels of each level, from the full resolution down; multiples of the groups."""
    blocks: int = 2
    """Residual blocks per level."""
    attention: tuple[bool, ...] | None = None
    """Which levels have attention; by default the lowest alone."""
    groups: int = 32
    """Groups of the normalisations."""
    dropout: float = 0.0
    """Share of values dropped within a block in training."""

    def __post_init__(self) -> None:
        check_fields(self, "network.")
        _require_at_most("blocks", self.blocks, _MOST_BLOCKS)
        _require_at_most("widths", len(self.widths), _MOST_LEVELS, "levels")

    def build(self, shape: Shape, classes: int, augment_dim: int, generator: torch.Generator) -> nn.Module:
        """The network for images of `shape` (C, H, W).

        Raises:
            ValueError: if the images cannot be halved as often as there are levels; if augment_dim
                is not 0; or the widths do not fit attention or groups.
            ImportError: if diffusers is not installed.
        """
        if augment_dim:
            raise ValueError("augmentation needs a U-Net that is conditioned on it: use 0 with a UNet2DModel.")
        if self.attention is not None and len(self.attention) != len(self.widths):
            raise ValueError(
                f"network.attention has {len(self.attention)} values, network.widths {len(self.widths)}: pass one each."
            )
        if self.groups < 1 or any(width < 1 or width % self.groups for width in self.widths):
            raise ValueError(f"network.widths is {self.widths}: each must be a multiple of the {self.groups} groups.")
        _require_halves(shape, len(self.widths))
        return DiffusersUNet.sized(
            shape[1] if shape[1] == shape[2] else (shape[1], shape[2]),
            shape[0],
            self.widths,
            self.blocks,
            classes,
            self.attention,
            self.groups,
            self.dropout,
            generator,
        ).to(memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]


@dataclass(frozen=True, kw_only=True)
class SiTConfig:
    """The network of a recipe: the transformer SiT (`stablefield.networks.SiT`)."""

    patch_size: int = 2
    """Side of a patch, in pixels; it divides height and width of the images."""
    width: int = 128
    """Width of the vectors; a multiple of 4 and of the heads."""
    depth: int = 6
    """Number of blocks."""
    heads: int = 4
    """Heads of the attention."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's perceptron, in units of the width."""
    learn_sigma: bool = False
    """Double the output's channels, as the published weights do; the second half is not used."""
    checkpointing: bool = False
    """Compute the blocks again in the backward pass, to save memory."""

    def __post_init__(self) -> None:
        check_fields(self, "network.")
        _require_at_most("depth", self.depth, _MOST_BLOCKS)

    @classmethod
    def sized(cls, size: str, patch_size: int = 2) -> Self:
        """The settings of a named size, as in `SiT.sized`: S, B, L, XL, or XXS or XS for a CPU.

        Raises:
            ValueError: if there is no such size.
        """
        if size not in SIT_SIZES:
            raise ValueError(f"size={size!r:.40}: pass one of {', '.join(SIT_SIZES)}.")
        width, depth, heads = SIT_SIZES[size]
        return cls(patch_size=patch_size, width=width, depth=depth, heads=heads)

    def build(self, shape: Shape, classes: int, augment_dim: int, generator: torch.Generator) -> nn.Module:
        """The network for images of `shape` (C, H, W).

        Raises:
            ValueError: if the images do not divide into patches, the width not into heads, or augment_dim is not 0.
        """
        if augment_dim:
            raise ValueError("augmentation needs a U-Net that is conditioned on it: use 0 with a SiT.")
        _require_sides("SiT", shape)
        _, height, width = shape
        if self.patch_size > 0 and (height % self.patch_size or width % self.patch_size):
            common = math.gcd(height, width)
            divisors = (side for side in range(1, common + 1) if common % side == 0)
            raise ValueError(
                f"images {height} high and {width} wide do not divide into patches of side {self.patch_size}: "
                f"pass network.patch_size={min(divisors, key=lambda side: abs(side - self.patch_size))}, or "
                f"resolution={_near(shape, self.patch_size)}."
            )
        return SiT(
            (height, width),
            self.patch_size,
            shape[0],
            self.width,
            self.depth,
            self.heads,
            classes,
            self.learn_sigma,
            mlp_ratio=self.mlp_ratio,
            checkpointing=self.checkpointing,
            generator=generator,
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a training run."""

    target: Literal["stf", "dsm"] = "stf"
    """Regression target: the stable target, or the single sample of denoising score matching."""
    references: int | Literal["auto", "all", "sharded"] = "auto"
    """References of the stable target per step: a number from the batch size to the size of the data; all; sharded, which
    is all, split over several processes; or auto: all if the data fit on one device, sharded if they fit on all devices
    together, else 4096 read with each batch."""
    noise_band: float | Literal["auto"] = "auto"
    """Noise level (sigma / alpha) below which training uses the single sample; auto finds by a short probe of the data
    where the references have no weight yet. Any value is unbiased."""
    steps: int = 4000
    """Optimiser steps."""
    batch: int = 128
    """Noisy images per step, over all processes together."""
    draws_per_image: int = 1
    """Noisy images made from each image of a batch."""
    antithetic: bool = False
    """Make the draws of an image in pairs of opposite noise, which lowers the variance of the gradient once the network has
    learned the images; needs an even number of draws per image."""
    gradient_accumulation_steps: int = 1
    """Number of parts into which a process splits its share of the batch, to save memory."""
    seed: int = 0
    """Seed of weights, batches, noise and references."""
    learning_rate: float = 1e-3
    """Adam's learning rate, after the ramp."""
    ramp_images: int = 20_000
    """Noisy images over which the learning rate rises linearly from 0, so each draw of an image counts; 0 for no ramp."""
    decay_share: float = 0.3
    """Last share of the steps over which the learning rate falls linearly to 0."""
    max_grad_norm: float = 1.0
    """Norm to which gradients are clipped; inf for no clipping."""
    nan_to_num: bool = False
    """Set gradients that are NaN to 0 and infinite ones to 1e5; losses must still be finite."""
    ema_half_life: float = 50_000
    """Half-life of the averaged weights, in noisy images, so each draw of an image counts."""
    ema_ramp: float = 0.05
    """Upper bound of the half-life as a share of the noisy images seen, so that early weights do not stay in the averages.
    At 0 there is no averaging at all: to leave the bound out, pass 1, which is next to none."""
    ema_snapshot_every: int = 0
    """Steps between snapshots of two power-function averages, for `stablefield ema`; 0 for none."""
    augmentation: float = 0.0
    """Probability of the non-leaking augmentation, which also conditions the network; 0 for none."""
    mirror: bool = False
    """Double the data by their mirror images, left and right swapped; of encoded images, by those of the mirrored ones."""
    latent_scaling: Literal["measured", "autoencoder"] = "measured"
    """Scaling of encoded images: the measured mean and standard deviation of each channel, or the autoencoder's own factor
    and shift, which published networks expect."""
    importance_sampling: bool = False
    """Draw noise levels with large gradients more often, with importance weights, which keep the loss unbiased."""
    conditional: bool = False
    """Condition the network on the class."""
    label_dropout: float = 0.1
    """Share of labels hidden from a conditional network, for guidance."""
    precision: Literal["float32", "bf16"] = "float32"
    """Precision of the network; targets, losses, weights and averages are always float32."""
    compile: bool = False
    """Compile the network, and on a GPU replay each step as CUDA graphs: slower to start, then faster there."""
    exact: bool = False
    """Sum the gradients of several processes after the backward pass, in an order that is fixed for every network and
    version of torch; by default torch's DistributedDataParallel sums them during the pass."""
    fsdp: bool = False
    """Split weights, gradients, moments and averages over several processes by torch's FSDP2, so that each holds a part: for
    a network that one device does not hold."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    sample_every: int = 1000
    """Steps between sample grids, of which the first come earlier, from a sixteenth of that on; 0 for none but the last."""
    checkpoint_every: int = 2000
    """Steps between checkpoints; the last step always leaves one."""
    keep_last: int = 2
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep the checkpoints at multiples of this many steps; 0 for none."""
    network: MLPConfig | SongUNetConfig | DiffusersUNetConfig | SiTConfig = field(default_factory=MLPConfig)
    """The network."""
    process: EDM | VE | VP | Cosine | RectifiedFlow = field(default_factory=EDM)
    """How data become noise."""
    noise_levels: LogNormal | LogUniform | Uniform = field(default_factory=LogNormal)
    """Distribution of the training noise levels."""
    weighting: EDMWeighting | SNRWeighting | FlowWeighting = field(default_factory=EDMWeighting)
    """Weight of each noise level in the loss."""
    preconditioning: NamedPreconditioning = field(default_factory=EDMPreconditioning)
    """Scalings around the network."""

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.references, int) and self.references < 1:
            raise ValueError(f"references is {self.references}: it must be at least 1, or all, or auto.")
        for name, value in vars(self).items():
            if not isinstance(value, int | float):
                continue
            if name in _POSITIVE and not value > 0:
                raise ValueError(f"{name} is {value}: it must be positive.")
            if name in _SHARES and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}: pass a share, 0 to 1.")
            if not value >= 0:
                raise ValueError(f"{name} is {value}: it must not be negative.")
        if self.batch % self.draws_per_image:
            raise ValueError(
                f"batch is {self.batch}: it must be a multiple of draws_per_image={self.draws_per_image}, such as "
                f"{-(-self.batch // self.draws_per_image) * self.draws_per_image}."
            )
        check_draws(self.draws_per_image, self.antithetic)
        if self.fsdp and self.exact:
            raise ValueError(
                "fsdp=True and exact=True: FSDP2 sums gradients in its own order; leave one of the two out."
            )
        if self.fsdp and self.compile:
            raise ValueError(
                "fsdp=True and compile=True: FSDP2 gathers weights between the blocks of a network, where compiled code "
                "cannot stop; leave one of the two out."
            )
        if self.mirror and self.augmentation:
            raise ValueError(
                f"mirror=True and augmentation={self.augmentation:g}: the augmentation mirrors images itself."
            )

    @property
    def augment_dim(self) -> int:
        """Width of the augmentation labels; 0 for none."""
        return LABEL_WIDTH if self.augmentation else 0

    @property
    def images_per_step(self) -> int:
        """Different images in a batch."""
        return self.batch // self.draws_per_image

    @property
    def batch_in_words(self) -> str:
        """A batch, such as "128 images", or "128 rows of 32 images" with several draws of each image."""
        draws = f" rows of {self.images_per_step:,}" if self.draws_per_image > 1 else ""
        return f"{self.batch:,}{draws} images"

    @property
    def early_grids(self) -> frozenset[int]:
        """The steps before the first `sample_every` with a sample grid, when samples change most: at most four."""
        if not self.sample_every:
            return frozenset()
        first = min(self.sample_every, self.steps)
        # No more than there are later: pictures take time.
        parts = _EARLY[: max(1, self.steps // self.sample_every - 1)]
        return frozenset(first // part for part in parts if first // part >= _EARLIEST)

    def draws_grid(self, step: int) -> bool:
        """Whether a sample grid is drawn after `step` steps; there is always one after the last."""
        every = self.sample_every
        return step == self.steps or (every > 0 and step % every == 0) or step in self.early_grids

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        ramp = min(1.0, (step + 1) * self.batch / self.ramp_images) if self.ramp_images else 1.0
        left = (self.steps - step) / (self.decay_share * self.steps) if self.decay_share else 1.0
        return self.learning_rate * min(ramp, left, 1.0)


def _require_at_most(name: str, count: int, most: int, of: str = "blocks") -> None:
    if count > most:
        raise ValueError(f"network.{name} has {count} {of}: pass at most {most}.")


def _require_sides(network: str, shape: Shape) -> None:
    if len(shape) != 3:
        raise ValueError(
            f"samples of shape {shape} do not fit a {network}, which takes (C, H, W): take a perceptron, "
            "network=MLPConfig()."
        )


def _require_halves(shape: Shape, levels: int) -> None:
    _require_sides("U-Net", shape)
    _, height, width = shape
    halvings = 2 ** (levels - 1)
    if height % halvings or width % halvings:
        fitting = math.gcd(height, width)
        raise ValueError(
            f"images {height} high and {width} wide do not fit a U-Net of {levels} levels, which takes sides that are "
            f"multiples of {halvings}: pass resolution={_near(shape, halvings)}, or at most "
            f"{(fitting & -fitting).bit_length()} levels."
        )


def _near(shape: Shape, unit: int) -> int | tuple[int, int]:
    """The largest size within a shape whose sides are multiples of `unit`, as an argument `resolution`."""
    height, width = (max(unit, side // unit * unit) for side in shape[1:])
    return height if height == width else (height, width)
