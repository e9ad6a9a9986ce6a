"""Held-out samples: those that a run does not train on, and how often it looks at its loss on them (see `_held_out_loss`).

They are a share of the data, chosen by the seed, or other data.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stablefield._shapes import number
from stablefield.data._image_set import ImageSet
from stablefield.training._recipe import Recipe
from stablefield.training._records import from_record
from stablefield.training._seeding import Purpose, generator_for

__all__ = ["LEVELS", "HeldOut", "most_samples"]

LEVELS = 8
"""Bins of noise levels of a look."""
ROWS = 128
"""Noisy rows in each of them, at most, of training samples and of held-out ones."""
POPULATION = 16_384
"""Training samples whose posterior is the floor, at most."""
COST = 0.02
"""Share of the network's evaluations that looks take."""
# Looks of a run, at least and at most; a short run may take more than its share for them.
_FEWEST, _MOST = 5, 40
# Bytes of the noisy rows on the device, and of the population.
_KEPT = 2**28
# A training step evaluates the network on its rows, and twice as much again backwards.
_TRAINED = 3


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What a run holds out, and how often it looks; in config.json.

    Attributes:
        count: number of held-out samples.
        every: steps between looks.
        rows: noisy rows per bin of noise levels, of training samples and of held-out ones.
        share: the held-out share of the data; None for other data.
        data: path or name of other data, as the caller gave it.
        sha256: checksum of their values.
    """

    count: int
    every: int
    rows: int
    share: float | None = None
    data: str = ""
    sha256: str = ""

    @classmethod
    def part(cls, share: float, data: ImageSet, recipe: Recipe) -> "HeldOut":
        """A share of the data, at least 2 samples.

        Raises:
            ValueError: if the share is not between 0 and 1, or leaves nothing to train on.
        """
        number("held_out", share)
        if not 0 < share < 1:
            raise ValueError(f"held_out={share:g}: pass a share between 0 and 1, such as 0.05, or other data.")
        count = max(2, round(share * len(data)))
        if count > len(data) - 2:
            raise ValueError(
                f"held_out={share:g} of {len(data)} samples leaves {max(0, len(data) - count)} to train on: pass less, or "
                "other data."
            )
        return cls(count=count, rows=_rows(data.shape), every=1, share=float(share)).paced(recipe)

    @classmethod
    def other(cls, others: ImageSet, data: ImageSet, recipe: Recipe) -> "HeldOut":
        """Other data.

        Raises:
            ValueError: if they do not fit the training data, or are the training data.
        """
        if others.shape != data.shape:
            theirs, own = (" x ".join(map(str, shape)) for shape in (others.shape, data.shape))
            raise ValueError(f"held_out has samples of {theirs}, the training data of {own}: prepare them alike.")
        if (others.scaling is None) != (data.scaling is None):
            raise ValueError("held_out and the training data: one has images and one floats; prepare them alike.")
        theirs, own = others.autoencoder, data.autoencoder
        if theirs is not None and own is not None and theirs.differs(own):
            raise ValueError(
                f"held_out={others.name} are latents of the autoencoder {theirs.sha256:.12}, the training data of "
                f"{own.sha256:.12}: encode both with one."
            )
        if others.manifest["sha256"] == data.manifest["sha256"]:
            raise ValueError(f"held_out={others.name} is the training data itself: pass a share of it, such as 0.05.")
        if recipe.conditional and others.labels is None:
            raise ValueError(
                f"held_out={others.name} has no labels, and the network is conditioned on classes: pass data with labels; "
                "of an array, make an image set with stablefield.data.make_image_set(images, labels, origin)."
            )
        if len(others) < 2:
            raise ValueError("held_out has 1 sample: pass at least 2.")
        sha256 = str(others.manifest["sha256"])
        return cls(count=len(others), rows=_rows(data.shape), every=1, data=others.place, sha256=sha256).paced(recipe)

    @classmethod
    def of(cls, record: object) -> "HeldOut":
        """The same from its record.

        Raises:
            ValueError: if the record has other entries.
        """
        try:
            found = from_record(cls, record)
        except ValueError as error:
            raise ValueError(f"its held_out is not a record of held-out samples: {error}") from error
        if found.count < 2 or not 2 <= found.rows <= 2**16 or found.every < 1 or not 0 < (found.share or 0.5) < 1:
            raise ValueError("its held_out holds a number that is out of range")
        return found

    def record(self) -> dict[str, Any]:
        """The attributes as JSON values."""
        return dataclasses.asdict(self)

    def paced(self, recipe: Recipe) -> "HeldOut":
        """With looks as often as is cheap in a run of this recipe: a multiple of its `log_every`."""
        cheap = self.evaluations / (COST * _TRAINED * recipe.batch)
        steps = min(max(cheap, recipe.steps / _MOST), recipe.steps / _FEWEST)
        parts = math.ceil(steps / recipe.log_every)
        if recipe.log_every * parts * _FEWEST > recipe.steps:
            parts = max(1, recipe.steps // (recipe.log_every * _FEWEST))
        return dataclasses.replace(self, every=recipe.log_every * parts)

    @property
    def evaluations(self) -> int:
        """Rows through the network at a look."""
        return 2 * LEVELS * self.rows

    def cost(self, recipe: Recipe) -> float:
        """The share of the network's evaluations in training that looks take."""
        return self.evaluations / (_TRAINED * recipe.batch * min(self.every, recipe.steps))

    def population(self, data: ImageSet) -> int:
        """Training samples whose posterior is the floor: all of the run's data but those held out, or as many as fit."""
        return min(len(data) - (0 if self.share is None else self.count), most_samples(data))

    def describe(self, recipe: Recipe, data: ImageSet | None = None) -> str:
        """What is held out, and what looks cost, in words; with the data also of how many of them the floor is."""
        what = (
            f"{self.count:,} of {self.data}" if self.share is None else f"{self.count:,} ({self.share:g} of the data)"
        )
        text = f"{what}, never trained on; a look every {self.every:,} steps costs {self.cost(recipe):.1%} of training"
        if data is None:
            return text
        trained, sampled = len(data) - (0 if self.share is None else self.count), self.population(data)
        few = (
            f"; the floor is that of {sampled:,} of the {trained:,} training samples, lower on average than that of all"
        )
        return text + (few if sampled < trained else "")

    def split(self, size: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row numbers to train on and to hold out, in order, of data of this size: all and none without a share."""
        if self.share is None:
            return np.arange(size), np.arange(0)
        order = torch.randperm(size, generator=generator_for(seed, Purpose.HELD_OUT)).numpy()
        return np.sort(order[self.count :]), np.sort(order[: self.count])


def _rows(shape: tuple[int, ...]) -> int:
    """Rows per bin: noisy rows, samples and posterior means of two sets fit the memory that is set aside."""
    return max(2, min(ROWS, _KEPT // (5 * 4 * LEVELS * math.prod(shape))))


def most_samples(data: ImageSet) -> int:
    """Samples of the data at a look, at most: `POPULATION`, or as many as fit the memory that is set aside."""
    return max(2, min(POPULATION, _KEPT // data.images[:1].nbytes))
