"""A recipe: everything that decides what a run does, as one frozen value.

Its attribute docstrings are the help of the command's flags.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from stablefield.diffusion.noise_levels import LogNormal, LogUniform, Uniform
from stablefield.diffusion.preconditioning import EDMPreconditioning, VEPreconditioning, VPPreconditioning
from stablefield.diffusion.process import EDM, VE, VP, Cosine, RectifiedFlow
from stablefield.diffusion.weighting import EDMWeighting, FlowWeighting, SNRWeighting
from stablefield.networks.mlp import MLP

__all__ = ["DIGITS", "Perceptron", "Recipe"]


@dataclass(frozen=True, kw_only=True)
class Perceptron:
    """A residual perceptron, for images of about 8 x 8 pixels."""

    width: int = 512
    """Width of the hidden layers."""
    depth: int = 4
    """Number of residual blocks."""
    dropout: float = 0.0
    """Share of hidden values dropped in training."""

    def build(self, shape: tuple[int, ...], classes: int, generator: torch.Generator) -> nn.Module:
        """The network for samples of `shape` (C, H, W)."""
        return MLP(shape, self.width, self.depth, self.dropout, classes, generator)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a training run does."""

    target: Literal["stf", "dsm"] = "stf"
    """What to regress on: the stable target, or the single sample of denoising score matching."""
    references: int | Literal["all"] = "all"
    """References of the stable target per batch: a number from the batch size to the size of the data, or all of it."""
    noise_band: float = 0.0
    """Noise level (sigma / alpha) below which the single sample is used."""
    steps: int = 4000
    """Optimiser steps."""
    batch: int = 128
    """Images per step."""
    seed: int = 0
    """Decides weights, batches, noise and references."""
    learning_rate: float = 1e-3
    """Of Adam, after the ramp."""
    ramp_images: int = 20_000
    """Images over which the learning rate rises linearly from 0."""
    decay_share: float = 0.3
    """Last share of the steps over which the learning rate falls linearly to 0."""
    clip: float = 1.0
    """Norm to which gradients are clipped."""
    ema_half_life: float = 50_000
    """Half-life of the averaged weights, in images."""
    ema_ramp: float = 0.05
    """Upper bound of the half-life as a share of the images seen."""
    conditional: bool = False
    """Tell the network the class."""
    label_dropout: float = 0.1
    """Share of labels hidden from a conditional network, for guidance."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    sample_every: int = 1000
    """Steps between sample grids; 0 for none but the last."""
    checkpoint_every: int = 2000
    """Steps between checkpoints; the last step always leaves one."""
    network: Perceptron = field(default_factory=Perceptron)
    """The network."""
    process: EDM | VE | VP | Cosine | RectifiedFlow = field(default_factory=EDM)
    """How data become noise."""
    noise_levels: LogNormal | LogUniform | Uniform = field(default_factory=LogNormal)
    """Which noise levels are trained."""
    weighting: EDMWeighting | SNRWeighting | FlowWeighting = field(default_factory=EDMWeighting)
    """How much each noise level counts."""
    preconditioning: EDMPreconditioning | VPPreconditioning | VEPreconditioning = field(
        default_factory=EDMPreconditioning
    )
    """Scalings around the network."""

    def __post_init__(self) -> None:
        positive = ("steps", "batch", "learning_rate", "clip", "ema_half_life", "log_every", "checkpoint_every")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be positive.")
        for name in ("seed", "ramp_images", "sample_every", "noise_band"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must not be negative.")
        for name in ("decay_share", "ema_ramp", "label_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it is a share, 0 to 1.")
        if self.references != "all" and self.references < 1:
            raise ValueError(f"--references is {self.references}: it must be at least 1, or all.")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        ramp = min(1.0, (step + 1) * self.batch / self.ramp_images) if self.ramp_images else 1.0
        left = (self.steps - step) / (self.decay_share * self.steps) if self.decay_share else 1.0
        return self.learning_rate * min(ramp, left, 1.0)


DIGITS = Recipe()
"""The built-in digits: a few minutes on two CPU cores."""
