"""Observers: who looks at a model in training, and what they report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stablefield.diffusion._preconditioning import Denoiser
from stablefield.sampling._seeded_images import chunks_of, draw
from stablefield.sampling._solvers import SolverOptions

if TYPE_CHECKING:  # it imports torchmetrics, which a run that does not measure itself can do without
    from stablefield.evaluation._self_check import Reading, SelfCheck

__all__ = ["FrechetObserver", "samples"]

STEPS = 18


def samples(
    denoiser: Denoiser,
    shape: Sequence[int],
    seeds: Sequence[int],
    device: torch.device,
    labels: Tensor | None = None,
    sigmas: Tensor | None = None,
) -> Tensor:
    """Images of `seeds` by Heun's method, uint8, shape (len(seeds), C, H, W).

    Args:
        denoiser: D(x, sigma, class_labels=None).
        shape: of one image, (C, H, W).
        seeds: image k is a function of seeds[k].
        device: where to compute.
        labels: classes of the images, shape (len(seeds),); None for a network without classes.
        sigmas: the grid; EDM's of 18 steps by default.
    """
    options = SolverOptions(steps=STEPS)
    classes = None if labels is None else labels.to(device)
    ((_, images, _),) = draw(
        lambda _: denoiser if classes is None else lambda x, sigma: denoiser(x, sigma, classes),
        options,
        options.sigmas() if sigmas is None else sigmas,
        chunks_of(seeds, len(seeds)),
        shape=shape,
        device=device,
    )
    return images


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
