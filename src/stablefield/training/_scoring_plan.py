"""The plan of a comparison's scores: how many, on how many samples, and the record of their settings.

A score is expensive: 1,000 samples by Heun's method in 18 steps are 35,000 rows through the network, as many as in some
hundred training steps. So `plan_scoring` chooses the number of scores and samples such that scoring takes no longer than
training where possible.

A record beside the scores keeps their settings: numbers of other extractors or other numbers of samples never stand under
one name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stablefield._regular_file import reason
from stablefield.data._image_set import ImageSet
from stablefield.evaluation._extractor import Extractor
from stablefield.training._recipe import Recipe
from stablefield.training._records import read_record, write_record
from stablefield.training._run_config import RunConfig
from stablefield.training._scores import LEVELS, read_scores

__all__ = [
    "GRADIENTS",
    "NFE",
    "ROWS",
    "SAMPLER",
    "Scoring",
    "check_settings",
    "keep_settings",
    "plan_scoring",
    "rows_of",
    "settings_of",
]

GRADIENTS = 16
"""Batches for the variance of the gradient."""
ROWS = 1024
"""Noisy rows per noise level for the distance to the posterior mean."""
NFE = 35
"""Network evaluations per sample."""
SAMPLER = f"heun, 18 steps, NFE {NFE}"
"""The sampler of the samples."""
# Fewest samples whose Frechet distance shows a much better target, and most by default.
_FEWEST, _MOST = 200, 1000
# Most scores by default.
_MOST_SCORES = 8
# A gradient costs three evaluations.
_BACKWARD = 3
# The record of the settings in a run's folder.
_SETTINGS = "scoring.json"
# Bytes for the posterior means.
_KEPT = 2**28


@dataclass(frozen=True)
class Scoring:
    """The number of scores of a run, and their cost.

    Attributes:
        count: scores over training, the last one at its end.
        every: steps between scores.
        samples: samples per score.
        rows: rows through the network per score; a gradient's rows count three times.
        training: rows through the network for the whole training, counted the same way.
    """

    count: int
    every: int
    samples: int
    rows: int
    training: int


def plan_scoring(recipe: Recipe, images: int, *, evaluations: int | None = None, samples: int | None = None) -> Scoring:
    """Plan scores that take no longer than the training, unless the arguments ask for more; at least one, at the end.

    Args:
        recipe: the run's recipe.
        images: number of images in the data, the most samples by default.
        evaluations: most scores; 1 to 8 if None.
        samples: samples per score; 200 to 1,000 if None.
    """
    training = _BACKWARD * recipe.steps * recipe.batch
    fixed = 2 * _BACKWARD * GRADIENTS * recipe.batch + len(LEVELS) * min(ROWS, images)
    if samples is None:
        affordable = (training // (_MOST_SCORES if evaluations is None else evaluations) - fixed) // NFE
        samples = min(max(_FEWEST, min(_MOST, affordable)), images)
    one = fixed + NFE * samples
    if evaluations is None:
        evaluations = max(1, min(_MOST_SCORES, training // one))
    every = math.ceil(recipe.steps / evaluations)
    return Scoring(math.ceil(recipe.steps / every), every, samples, one, training)


def rows_of(data: ImageSet) -> int:
    """Noisy rows per noise level for these data: as many as fit the memory set aside."""
    return min(len(data), ROWS, max(64, _KEPT // (4 * len(LEVELS) * math.prod(data.shape))))


def settings_of(config: RunConfig, data: ImageSet, extractor: Extractor, samples: int) -> dict[str, Any]:
    """What a run's scores depend on besides its training, as JSON values.

    Args:
        config: the run's configuration.
        data: the images.
        extractor: maps images to features.
        samples: samples per score.
    """
    return {
        "extractor": extractor.name,
        "sha256": extractor.sha256,
        "resize": extractor.resize,
        "features": extractor.dim,
        "samples": samples,
        "seeds": "from 0",
        "sampler": SAMPLER,
        "classes": "in the proportions of the data" if config.classes else "none",
        "levels": list(LEVELS),
        "rows": rows_of(data),
        "gradients": GRADIENTS,
        **({"optimum": "with the mirror images"} if config.recipe.mirror else {}),
        **({"gradients' noise levels": "as the run fits them"} if config.recipe.importance_sampling else {}),
    }


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Check that the scores in a run's folder, if any, have these settings.

    Raises:
        ValueError: if the scores have other settings, or their record is missing or damaged.
    """
    path = folder / _SETTINGS
    if not read_scores(folder):
        return
    try:
        found = read_record(path, frozenset())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be used: {reason(error)}. It keeps the settings of this run's scores: pass another out=FOLDER "
            "for this comparison."
        ) from error
    names = dict.fromkeys([*settings, *found])
    other = [
        f"{name} {found.get(name, 'unknown')!s:.40} there, {settings.get(name, 'unknown')!s:.40} here"
        for name in names
        if name not in found or name not in settings or found[name] != settings[name]
    ]
    if other:
        raise ValueError(
            f"{folder} holds scores of other settings: {'; '.join(other)}. Pass another out=FOLDER for this comparison, or "
            "the same settings."
        )


def keep_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Record the settings of the scores in a run's folder, before the first one.

    Raises:
        ValueError: if it cannot be written.
    """
    if read_scores(folder):
        return
    try:
        write_record(folder / _SETTINGS, settings)
    except OSError as error:
        raise ValueError(
            f"{folder / _SETTINGS} cannot be written ({error.strerror}): free some space, or pass another out=FOLDER for "
            "this comparison."
        ) from error
