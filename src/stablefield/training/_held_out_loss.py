"""The loss on held-out samples, measured on the way: an observer of the training loop.

At every look the averaged weights are measured on the same noisy rows, of training samples and of held-out ones with the
same noise (`ExcessLoss`), so readings differ by the weights alone. The floor is what a perfect network would keep of the
training loss; it is computed once.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield.data._image_set import ImageSet
from stablefield.diffusion._preconditioning import Denoiser
from stablefield.probing._excess_loss import ExcessLoss
from stablefield.training._held_out import LEVELS, HeldOut, most_samples
from stablefield.training._latents import LatentMoments
from stablefield.training._recipe import Recipe
from stablefield.training._seeding import Purpose, seed_for

__all__ = ["HeldOutLoss"]


class HeldOutLoss:
    """Measures a model on training samples and on held-out ones, at fixed noise; an observer of the loop.

    Args:
        held_out: what is held out.
        recipe: of the run.
        data: all of the run's data.
        others: other data that are held out; None for a share.
        labelled: whether the network sees classes.
        device: where to compute.

    Attributes:
        population: training samples whose posterior is the floor.

    Raises:
        ValueError: if the data have nothing to measure, such as samples that are all equal.
    """

    def __init__(
        self,
        held_out: HeldOut,
        recipe: Recipe,
        data: ImageSet,
        others: ImageSet | None,
        *,
        labelled: bool,
        device: torch.device,
    ) -> None:
        self._every = held_out.every
        rows, own = held_out.split(len(data), recipe.seed)
        seed = seed_for(recipe.seed, Purpose.HELD_OUT)
        most, self._trained = most_samples(data), len(rows)
        rows = _drawn(rows, most, seed)
        values, labels = _samples(data, rows, labelled=labelled)
        self.population = len(values)
        if recipe.mirror:
            values = torch.cat([values, _mirrored(data, rows, values, seed)])
            labels = None if labels is None else torch.cat([labels, labels])
        held, held_labels = (
            _samples(data, own, labelled=labelled)
            if others is None
            else _samples(others, _drawn(np.arange(len(others)), most, seed), labelled=labelled)
        )
        self._excess = ExcessLoss(
            values,
            process=recipe.process,
            noise_levels=recipe.noise_levels,
            weighting=recipe.weighting,
            prediction="denoiser",
            held_out=held,
            labels=labels,
            held_out_labels=held_labels,
            levels=LEVELS,
            rows=held_out.rows,
            seed=seed,
            device=device,
        )
        self.floor = self._logged_floor(recipe, values, labels, held_out.rows, seed, device)

    @property
    def every(self) -> int:
        """Steps between looks."""
        return self._every

    def __call__(self, step: int, denoiser: Denoiser) -> dict[str, float]:  # noqa: ARG002
        """Measure the model: the losses, each also minus the floor, with standard errors.

        `floor_samples` is there if the floor is not that of all training samples.
        """
        found = self._excess(denoiser)
        loss, floor, held_out, gap = (found.total(name) for name in ("loss", "floor", "held_out", "gap"))
        return {
            "fixed_loss": loss.value,
            "fixed_loss_error": loss.error,
            "fixed_loss_minus_floor": loss.value - floor.value,
            "held_out_loss": held_out.value,
            "held_out_loss_error": held_out.error,
            "held_out_loss_minus_floor": held_out.value - floor.value,
            "held_out_gap": gap.value,
            "held_out_gap_error": gap.error,
            "floor": floor.value,
            "floor_error": floor.error,
            **({"floor_samples": self.population} if self.population < self._trained else {}),
        }

    def _logged_floor(
        self, recipe: Recipe, values: Tensor, labels: Tensor | None, rows: int, seed: int, device: torch.device
    ) -> float | None:
        """The floor of the loss that the training logs; None with augmentation, which changes the data."""
        if recipe.augmentation:
            return None
        floor = self._excess(_identity).total("floor").value
        if labels is None or not recipe.label_dropout:
            return floor
        # Rows whose label the network does not see have all classes for their posterior.
        whole = ExcessLoss(
            values,
            process=recipe.process,
            noise_levels=recipe.noise_levels,
            weighting=recipe.weighting,
            levels=LEVELS,
            rows=rows,
            seed=seed,
            device=device,
        )
        hidden = recipe.label_dropout
        return (1 - hidden) * floor + hidden * whole(_identity).total("floor").value


def _drawn(rows: NDArray[np.int64], most: int, seed: int) -> NDArray[np.int64]:
    if len(rows) <= most:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))


def _samples(data: ImageSet, rows: NDArray[np.int64], *, labelled: bool) -> tuple[Tensor, Tensor | None]:
    labels = torch.from_numpy(data.labels[rows]) if labelled and data.labels is not None else None
    return torch.from_numpy(np.ascontiguousarray(data.scaled(rows))), labels


def _mirrored(data: ImageSet, rows: NDArray[np.int64], values: Tensor, seed: int) -> Tensor:
    """The mirror images of some rows; of latents of images a draw of the mirrored images' ones."""
    if data.moments is None:
        return values.flip(-1)
    pool = LatentMoments.load(data, rows, torch.device("cpu"), mirrored=True, seed=seed).pool(None, 0)
    assert isinstance(pool.flipped, Tensor)
    return pool.flipped


def _identity(x: Tensor, *_: object) -> Tensor:
    return x
