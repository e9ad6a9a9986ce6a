"""The model of a run: from its configuration to a denoiser, and from a denoiser to pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield.diffusion.preconditioning import Denoiser
from stablefield.sampling.noise import SampleNoise
from stablefield.training.checkpoint import load_weights
from stablefield.training.run_folder import RunConfig, RunFolder
from stablefield.training.seeding import Purpose, generator_for

__all__ = ["OpenModel", "build_denoiser", "draw", "load_denoiser", "open_model", "to_uint8"]


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


@dataclass(frozen=True, kw_only=True)
class OpenModel:
    """A model of a run, ready to be used.

    Attributes:
        denoiser: in evaluation mode.
        config: of its run.
        step: how long it was trained.
        ema: which average of the weights it is, for the protocol.
    """

    denoiser: Denoiser
    config: RunConfig
    step: int
    ema: str


def open_model(path: Path, ema: str = "half-life", device: torch.device | str = "cpu") -> OpenModel:
    """Open the newest checkpoint of a run.

    Args:
        path: the run's folder.
        ema: "half-life" for the averaged weights, "none" for those of the last step.
        device: where to put the denoiser.

    Raises:
        ValueError: if there is no run or no checkpoint, or `ema` is not one of the run.
    """
    folder = RunFolder.open(path)
    config = folder.config()
    newest = folder.newest()
    if newest is None:
        raise ValueError(f"{path} has no checkpoint yet: let it train for longer.")
    if ema not in ("half-life", "none"):
        raise ValueError(f"--ema {ema}: this run has half-life, and none for the weights of the last step.")
    denoiser = load_denoiser(config, newest[0], ema=ema != "none").to(device)
    return OpenModel(denoiser=denoiser, config=config, step=newest[1].step, ema=ema)


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
