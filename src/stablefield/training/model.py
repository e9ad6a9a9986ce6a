"""The model of a run: from its configuration to a denoiser, and from a denoiser to pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield.diffusion.preconditioning import Denoiser
from stablefield.sampling.noise import SampleNoise
from stablefield.training.checkpoint import load_weights
from stablefield.training.run_folder import RunConfig
from stablefield.training.seeding import Purpose, generator_for

__all__ = ["build_denoiser", "draw", "load_denoiser", "to_uint8"]


def build_denoiser(config: RunConfig) -> Denoiser:
    """The denoiser of a run with its initial weights, a function of the seed."""
    recipe = config.recipe
    generator = generator_for(recipe.seed, Purpose.WEIGHTS)
    return Denoiser(recipe.network.build(config.shape, config.classes, generator), recipe.preconditioning)


def load_denoiser(config: RunConfig, checkpoint: Path, *, ema: bool = True) -> Denoiser:
    """The denoiser of a checkpoint, in evaluation mode: its averaged weights, or the raw ones."""
    denoiser = build_denoiser(config)
    load_weights(checkpoint, denoiser, ema=ema)
    return denoiser.eval().requires_grad_(False)


def draw(
    sampler: Callable[[Tensor, SampleNoise], Tensor],
    shape: Sequence[int],
    seeds: Sequence[int],
    sigma_max: float,
    device: torch.device,
) -> NDArray[np.uint8]:
    """Images of `seeds`, shape (len(seeds), C, H, W).

    Args:
        sampler: takes the state at sigma_max and the noise of its rows to the clean images.
        shape: of one image, (C, H, W).
        seeds: image k is a function of seeds[k].
        sigma_max: first noise level.
        device: where to compute.
    """
    noise = SampleNoise(list(seeds))
    latents = noise.latents(shape, device=device, dtype=torch.float64)
    return to_uint8(sampler(latents * sigma_max, noise))


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Images in [-1, 1] to 0..255, clipped and rounded."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
