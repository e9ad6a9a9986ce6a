"""Latents of a step: fresh draws of the rows, and draws of the references.

A loop that draws its latents anew in each step has rows that are no samples of any stored set. Its references are draws of
their own, with the row itself in place of its sample ("Latents" in the theory). All draws are functions of (seed, step), or,
for references that are the whole set, of (seed, epoch): they are drawn once an epoch.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield.data._image_set import ImageSet
from stablefield.targets._moments import Moments
from stablefield.targets._pool import Pool
from stablefield.training._seeding import Purpose, seed_for

__all__ = ["LatentMoments"]

# Streams of one step, and of one epoch.
_ROWS, _REFERENCES, _EPOCH = 0, 1, 3


class Pair(NamedTuple):
    """Means and standard deviations of latents, tensors (n, ...) on one device."""

    mean: Tensor
    std: Tensor

    def at(self, index: Tensor) -> "Pair":
        """Those at `index` (m,), in float32."""
        return Pair(self.mean[index].float(), self.std[index].float())


@dataclass(frozen=True)
class LatentMoments:
    """Moments of latents on a device, as the network sees them.

    Attributes:
        plain: of n images.
        flipped: of their mirror images; None without them.
        seed: the run's.
    """

    plain: Pair
    flipped: Pair | None
    seed: int

    @classmethod
    def load(
        cls,
        data: ImageSet,
        index: slice | NDArray[np.int64],
        device: torch.device,
        *,
        mirrored: bool,
        seed: int,
    ) -> "LatentMoments":
        """The moments of some rows of encoded images."""

        def loaded(flipped: bool) -> Pair:
            if isinstance(index, slice):
                mean, std = data.scaled_moments(index, flipped=flipped)
            else:
                # Read in the order of the file, which is fastest on a disk.
                order = np.argsort(index, kind="stable")
                there = np.argsort(order, kind="stable")
                mean, std = (found[there] for found in data.scaled_moments(index[order], flipped=flipped))
            return Pair(torch.from_numpy(mean).to(device), torch.from_numpy(std).to(device))

        return cls(loaded(False), loaded(True) if mirrored else None, seed)

    def take(self, index: Tensor) -> "LatentMoments":
        """The moments of the images at `index` (m,)."""
        flipped = None if self.flipped is None else Pair(self.flipped.mean[index], self.flipped.std[index])
        return LatentMoments(Pair(self.plain.mean[index], self.plain.std[index]), flipped, self.seed)

    def rows(self, places: Tensor, flips: Tensor | None, step: int, image: Tensor, images: int) -> Tensor:
        """Fresh latents of rows of the batch of `step`, float32 (b, ...).

        Args:
            places: the row of the moments for each row, shape (b,).
            flips: which rows are mirrored, bool (b,); None for none.
            step: the step.
            image: which of the batch's images each row is of, shape (b,); the rows of an image share its draw.
            images: images in the batch.
        """
        mean, std = self.plain.at(places)
        if flips is not None and self.flipped is not None:
            chosen, other = flips.reshape(-1, *(1,) * (mean.ndim - 1)), self.flipped.at(places)
            mean, std = torch.where(chosen, other.mean, mean), torch.where(chosen, other.std, std)
        noise = torch.randn((images, *mean.shape[1:]), generator=self._generator(step, _ROWS), device=mean.device)
        return torch.addcmul(mean, std, noise[image])

    def pool(self, labels: Tensor | None, step: int) -> Pool:
        """References for `step`: a draw of each image."""
        pool = self.empty_pool(labels)
        for number, (pair, draw) in enumerate(self._with(pool)):
            generator = self._generator(step, _REFERENCES + number)
            noise = torch.randn(draw.shape, generator=generator, device=draw.device)
            draw.copy_(torch.addcmul(pair.mean.float(), pair.std.float(), noise))
        return pool

    def empty_pool(self, labels: Tensor | None) -> Pool:
        """References that are not drawn yet."""
        flipped = None if self.flipped is None else torch.zeros_like(self.flipped.mean)
        return Pool(torch.zeros_like(self.plain.mean), labels=labels, flipped=flipped, resampled=True)

    def refresh(self, pool: Pool, epoch: int) -> None:
        """Draw the references of `empty_pool` for an epoch, block by block."""
        for number, (pair, draw) in enumerate(self._with(pool)):
            Moments(*pair).draw(draw, seed_for(self.seed, Purpose.LATENTS, epoch, _EPOCH + number))

    def _with(self, pool: Pool) -> list[tuple[Pair, Tensor]]:
        """The moments, each with the tensor of its draws in a pool."""
        both = ((self.plain, pool.data), (self.flipped, pool.flipped))
        return [(pair, draw) for pair, draw in both if pair is not None and isinstance(draw, Tensor)]

    def _generator(self, step: int, stream: int) -> torch.Generator:
        seed = seed_for(self.seed, Purpose.LATENTS, step, stream)
        return torch.Generator(self.plain.mean.device).manual_seed(seed)
