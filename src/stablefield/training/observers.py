"""Observers: who looks at a model in training, and what they report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stablefield.diffusion.preconditioning import Denoiser
from stablefield.sampling.grids import edm_sigmas
from stablefield.sampling.ode import heun
from stablefield.training.model import draw

if TYPE_CHECKING:  # it imports torchmetrics, which a run that does not measure itself can do without
    from stablefield.evaluation.self_check import Reading, SelfCheck

__all__ = ["FrechetObserver", "samples"]

STEPS = 18


def samples(
    denoiser: Denoiser,
    shape: Sequence[int],
    seeds: Sequence[int],
    device: torch.device,
    labels: Tensor | None = None,
) -> Tensor:
    """Images of `seeds`, of the classes `labels`, by Heun's method in 18 steps, uint8, shape (len(seeds), C, H, W)."""
    sigmas = edm_sigmas(STEPS)
    told = None if labels is None else labels.to(device)
    images = draw(
        lambda x, _: heun(lambda x, sigma: denoiser(x, sigma, told), x, sigmas), shape, seeds, float(sigmas[0]), device
    )
    return torch.from_numpy(images)


class FrechetObserver:
    """Measures few samples every so often, and says how noisy that is.

    Args:
        check: measures them.
        every: steps between looks.
        shape: of one image.
        device: where to compute.
        tell: called with the step and the reading.
    """

    def __init__(
        self,
        check: SelfCheck,
        every: int,
        shape: Sequence[int],
        device: torch.device,
        tell: Callable[[int, Reading], None] | None = None,
    ) -> None:
        self._check, self._every, self._shape, self._device, self._tell = check, every, shape, device, tell

    @property
    def every(self) -> int:
        """Steps between looks."""
        return self._every

    def __call__(self, step: int, denoiser: Denoiser) -> dict[str, float]:
        """Measure the model."""
        reading = self._check.read(lambda seeds: samples(denoiser, self._shape, seeds, self._device))
        if self._tell is not None:
            self._tell(step, reading)
        return {"frechet": reading.value, "frechet_error": reading.standard_error, "frechet_floor": reading.floor}
