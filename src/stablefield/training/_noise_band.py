"""The noise band of a run: the noise level from which its targets are stable, if the recipe leaves it open."""

import numpy as np
import torch
from numpy.typing import NDArray

from stablefield.data._image_set import ImageSet
from stablefield.targets._band import pick_noise_band
from stablefield.targets._pool import Pool
from stablefield.training._latents import LatentMoments
from stablefield.training._placement import can_be_resident
from stablefield.training._recipe import Recipe

__all__ = ["resolve_band"]

# Latents of images that a probe looks at, at most.
_PROBED = 2**16


def resolve_band(
    recipe: Recipe, data: ImageSet, device: torch.device, training: NDArray[np.int64] | None = None
) -> tuple[float, str]:
    """Resolve the noise band `auto` on these data, and describe the result in words.

    Args:
        recipe: the recipe, with resolved references.
        data: the run's data.
        device: where to compute.
        training: the rows of the data to train on; None for all.
    """
    if recipe.target == "dsm":
        return 0.0, "none, the single sample is used everywhere"
    if recipe.noise_band != "auto":
        return recipe.noise_band, f"from {recipe.noise_band:g}, as given"
    labels = torch.from_numpy(data.labels) if recipe.conditional and data.labels is not None else None
    if data.moments is None:
        pool, total = _stored_pool(data, recipe, device, labels, training), None
    else:
        pool, total = _drawn_pool(data, recipe, labels, training)
    found = pick_noise_band(pool, total=total, device=device)
    if found.level == float("inf"):
        return found.level, "none: every sample is its own only reference"
    return found.level, (
        f"from {found.level:.3g}: below it references take less than {found.tolerance:.0%} of the weight, by "
        f"{found.rows:,} probed"
    )


def _stored_pool(
    data: ImageSet,
    recipe: Recipe,
    device: torch.device,
    labels: torch.Tensor | None,
    training: NDArray[np.int64] | None,
) -> Pool:
    """The training set, or as much of it as fits."""
    size = recipe.references if isinstance(recipe.references, int) else None
    rows: slice | NDArray[np.int64] = slice(None) if training is None else training
    if (data.scaling is not None or training is not None) and size is not None and not can_be_resident(data, device):
        # A copy of all data may not fit; as many samples as there are references have the same noise band.
        every = np.arange(len(data)) if training is None else training
        rows, size = np.sort(np.random.default_rng(recipe.seed).choice(every, size, replace=False)), None
    if labels is not None and not isinstance(rows, slice):
        labels = labels[torch.from_numpy(rows)]
    return Pool(data.scaled(rows), size, labels, mirrored=recipe.mirror)


def _drawn_pool(
    data: ImageSet, recipe: Recipe, labels: torch.Tensor | None, training: NDArray[np.int64] | None
) -> tuple[Pool, int]:
    """A draw of as many latents of images as a probe looks at, and the number of references that they stand for."""
    every = np.arange(len(data)) if training is None else training
    total = recipe.references if isinstance(recipe.references, int) else len(every)
    rows = np.sort(np.random.default_rng(recipe.seed).choice(every, min(total, _PROBED), replace=False))
    cpu = torch.device("cpu")
    moments = LatentMoments.load(data, rows, cpu, mirrored=recipe.mirror, seed=recipe.seed)
    return moments.pool(None if labels is None else labels[torch.from_numpy(rows)], 0), total
