"""Blocks of steps whose targets a CPU computes in one call, and how many rows of a batch a target computes.

Targets do not depend on the network, so they need not wait for it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stablefield.diffusion._objective import Draws
from stablefield.training._feed import Feed
from stablefield.training._recipe import Recipe

__all__ = ["Inputs", "band_capacity", "joined", "steps_together"]

# Of a block: rows in the noise band, steps, and bytes of its rows.
_ROWS, _STEPS, _BYTES = 64, 16, 32 << 20


class Inputs(NamedTuple):
    """What `Objective.example` makes an example of, for rows with the same references."""

    x0: Tensor
    draws: Draws
    labels: Tensor | None
    index: Tensor
    flips: Tensor | None
    source_only: Tensor | None


def joined(inputs: Sequence[Inputs]) -> Inputs:
    """The rows of several inputs as one; either all or none of them have labels and the like."""
    draws = [one.draws for one in inputs]
    return Inputs(
        torch.cat([one.x0 for one in inputs]),
        Draws(
            torch.cat([one.t for one in draws]),
            torch.cat([one.noise for one in draws]),
            _together([one.hidden for one in draws]),
            _together([one.weight for one in draws]),
        ),
        _together([one.labels for one in inputs]),
        torch.cat([one.index for one in inputs]),
        _together([one.flips for one in inputs]),
        _together([one.source_only for one in inputs]),
    )


def steps_together(recipe: Recipe, shape: Sequence[int], device: torch.device, feed: Feed) -> int:
    """Steps whose targets are computed in one call, from each multiple of this number on; 1 on a GPU.

    A product of all references with the few rows of a batch that are in the noise band takes nearly as long as one with
    several times as many rows, because reading the references takes most of the time. So rows of several batches share a
    call: about 64 rows in the band, of at most 16 batches and 32 MiB.

    The number depends on the recipe and the data alone, so a resumed run repeats each call. Importance sampling draws noise
    levels by what earlier steps have found: there the number is 1.

    Args:
        recipe: with its references and noise band resolved.
        shape: of one image or other sample.
        device: where targets are computed.
        feed: of the run's data.
    """
    if device.type != "cpu" or recipe.target == "dsm" or recipe.importance_sampling or feed.whole is None:
        return 1
    rows = max(1.0, recipe.batch * _band_share(recipe))
    fitting = _BYTES // (4 * recipe.batch * math.prod(shape))
    return max(1, min(math.ceil(_ROWS / rows), _STEPS, fitting))


def band_capacity(recipe: Recipe) -> int | None:
    """Rows that a recorded target computes in each part of a batch: as many as the noise band ever holds; None for all.

    It is the expected number and six standard deviations, which not one batch in ten million exceeds. Even then the target
    stays unbiased, because noise levels alone choose the rows.
    """
    share = _band_share(recipe)
    rows = -(-recipe.batch // recipe.gradient_accumulation_steps)
    # An antithetic pair is in the band with both of its rows or with none.
    draws = rows * share + 6 * math.sqrt((2 if recipe.antithetic else 1) * rows * share * (1 - share))
    capacity = 8 * math.ceil((draws + 1) / 8)
    return None if capacity >= rows else capacity


def _band_share(recipe: Recipe) -> float:
    """The expected share of a batch's rows that are in the noise band."""
    assert recipe.noise_band != "auto"
    middles = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    levels = recipe.process.noise_level(recipe.noise_levels.quantile(middles, recipe.process))
    return float((levels >= recipe.noise_band).double().mean())


def _together(values: Sequence[Tensor | None]) -> Tensor | None:
    tensors = [value for value in values if value is not None]
    return torch.cat(tensors) if tensors else None
