"""The feed: for each step the rows of the batch and the references, as a function of (seed, step).

References are decoupled from the batch. If the data are *resident* (see `_placement`), all pixels are on the device as
uint8, and the references are the whole set or a number of samples drawn anew for each step. If they are *sharded*, a part of
them is on the device, and the batch is read from the mapped file, one step ahead. If they are *loaded*, the references are
read with the batch. Float data are scaled on the way to the device (`ImageSet.scaled`). Latents of images are drawn from
their moments (`_latents`): those of the batch in each step, and those of the references with them, or once an epoch if the
references are the whole set.

The set of references is chosen for the whole batch, so all processes and all parts of a step share it.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield._distributed import Ranks
from stablefield.data._image_set import ImageSet
from stablefield.data._index_stream import IndexStream
from stablefield.targets._pool import Pool, choose
from stablefield.targets._sharded import ShardedPool
from stablefield.training._latents import LatentMoments
from stablefield.training._placement import Placement
from stablefield.training._recipe import Recipe
from stablefield.training._seeding import Purpose, generator_for

__all__ = ["Feed", "Rows"]


@dataclass(frozen=True)
class Rows:
    """A step's rows and references.

    Attributes:
        pixels: uint8, shape (b, C, H, W), or scaled float data (b, ...): the requested part of the batch. Latents of images
            are those of the mirrored images where the caller asked for them.
        labels: classes of these rows, shape (b,), or None.
        index: their indices in `pool`, shape (b,); in the whole training set, for a sharded one.
        pool: the references.
    """

    pixels: Tensor
    labels: Tensor | None
    index: Tensor
    pool: Pool | ShardedPool


class Feed:
    """Rows and references of any step.

    Args:
        data: the images.
        recipe: its batch, seed, target and references (resolved: a number, "all" or "sharded") count.
        device: of the rows and references.
        labelled: whether the network sees classes, which then also limit the references.
        placement: of the pixels. If sharded, all processes of the default group must make their feeds together.
        rows: the rows of `data` that are the training set, in order; None for all. No other row is read.

    Attributes:
        labelled: whether rows come with labels.
        drawn: whether rows are latents of images, drawn anew in each step.

    Raises:
        ValueError: if all data should be references but are not resident, or if they are sharded and the batch has fewer
            rows than parts.
    """

    def __init__(
        self,
        data: ImageSet,
        recipe: Recipe,
        device: torch.device,
        *,
        labelled: bool,
        placement: Placement,
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        self._data, self._recipe, self._device, self._training = data, recipe, device, rows
        self._size = len(data) if rows is None else len(rows)
        self._stream = IndexStream(self._size, recipe.images_per_step, recipe.seed)
        self._labels: Tensor | None = None
        if labelled and data.labels is not None:
            self._labels = torch.from_numpy(data.labels if rows is None else data.labels[rows]).to(device)
        self.labelled = self._labels is not None
        # DSM uses no references: take the resident data, or else only the batch.
        resident, sharded = placement == "resident", placement == "sharded"
        self.drawn = data.moments is not None
        self._moments: LatentMoments | None = None
        self._epoch: int | None = None
        self._whole = resident and (recipe.target == "dsm" or recipe.references in ("all", "sharded"))
        self._number = recipe.images_per_step if recipe.target == "dsm" or sharded else recipe.references
        if not self._whole and not isinstance(self._number, int):
            raise ValueError(
                f"references={self._number} needs all data on {device}, but they do not fit there: train on a device with "
                "more memory, or start a run with a number of references."
            )
        self._pool: Pool | None = None
        self._shard: ShardedPool | None = None
        if resident and self.drawn:
            self._moments = self._loaded_moments(slice(None))
            if self._whole:
                # The single-sample target looks at no references.
                dsm, mean = recipe.target == "dsm", self._moments.plain.mean
                self._pool = Pool(mean, labels=self._labels) if dsm else self._moments.empty_pool(self._labels)
        elif resident:
            self._pool = self._wrap(self._pixels(slice(None)), self._labels)
        elif sharded:
            ranks = Ranks.launched(device)
            rank, processes = ranks.rank, ranks.world_size
            parts = processes * recipe.gradient_accumulation_steps
            if recipe.batch < parts:
                # A process without rows would not call the target, but all must call it equally often.
                raise ValueError(
                    f"batch={recipe.batch} is below the {parts} parts into which the processes split it: with sharded "
                    f"references, pass batch={parts} or more, or a smaller gradient_accumulation_steps."
                )
            part = slice(self._size * rank // processes, self._size * (rank + 1) // processes)
            labels = None if self._labels is None else self._labels[part]
            self._shard = ShardedPool(self._pixels(part), labels, mirrored=recipe.mirror)
        self._worker = None if resident else ThreadPoolExecutor(1, thread_name_prefix="stablefield-feed")
        self._ahead: tuple[int, Future[tuple[Pool, LatentMoments | None]]] | None = None
        self._chosen: tuple[int, Tensor, Tensor] | None = None
        self._subset: tuple[int, Pool, LatentMoments | None] | None = None

    def rows(self, step: int, part: slice, flips: Tensor | None = None) -> Rows:
        """The rows `part` of the batch of `step`, with the references of that step.

        Args:
            step: the step.
            part: of the rows.
            flips: which rows of the part are mirrored, bool (b,); counts only for latents of images.
        """
        # The host does not wait for a copy of so few bytes.
        index = self._index(step).to(self._device, non_blocking=True)
        if self._whole and self._pool is not None:
            pool, places, moments = self._pool, index, self._moments
            epoch = step // self._stream.batches_per_epoch
            if moments is not None and pool.resampled and self._epoch != epoch:
                moments.refresh(pool, epoch)
                self._epoch = epoch
        else:
            places = self._choice(step)[1].to(self._device)
            pool, moments = self._pool_of(step)
        places = places[part]
        labels = None if self._labels is None else self._labels[index[part]]
        if moments is not None:
            images = self._recipe.images_per_step
            image = torch.arange(images, device=self._device).repeat_interleave(self._recipe.draws_per_image)[part]
            return Rows(moments.rows(places, flips, step, image, images), labels, places, pool)
        pixels = pool.data[places]
        assert isinstance(pixels, Tensor)
        if self._shard is not None:
            return Rows(pixels, labels, index[part], self._shard)
        return Rows(pixels, labels, places, pool)

    @property
    def whole(self) -> Pool | None:
        """The references of every step, if they are the whole set and never change."""
        return self._pool if self._whole and not self.drawn else None

    def close(self) -> None:
        """End the thread that reads ahead, if there is one."""
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)

    def _pixels(self, part: slice) -> Tensor:
        images = self._data.scaled(self._in_data(part))
        # Copy if the file is mapped: the map is read-only, and every step may need every row.
        view = self._training is None and self._data.scaling is None
        if view and not (self._data.file is None and images.flags.writeable):
            images = np.array(images)
        return torch.from_numpy(images).to(self._device)

    def _in_data(self, index: slice | NDArray[np.int64]) -> slice | NDArray[np.int64]:
        """Row numbers in the data for row numbers in the training set."""
        return index if self._training is None else self._training[index]

    def _wrap(self, pixels: Tensor, labels: Tensor | None) -> Pool:
        return Pool(pixels, labels=labels, mirrored=self._recipe.mirror)

    def _index(self, step: int) -> Tensor:
        """Places in the training set of the rows of `step`, those of an image one after the other; on the CPU."""
        return torch.from_numpy(self._stream.batch_at(step)).repeat_interleave(self._recipe.draws_per_image)

    def _choice(self, step: int) -> tuple[Tensor, Tensor]:
        """Indices in the training set of the references of `step`, and the batch's indices among them; on the CPU."""
        if self._chosen is None or self._chosen[0] != step:
            self._chosen = (step, *self._choose(step))
        return self._chosen[1:]

    def _choose(self, step: int) -> tuple[Tensor, Tensor]:
        index = self._index(step)
        generator = generator_for(self._recipe.seed, Purpose.REFERENCES, step)
        assert isinstance(self._number, int)
        return choose(self._size, index, self._number, generator)

    def _pool_of(self, step: int) -> tuple[Pool, LatentMoments | None]:
        """The references of a step, and the moments of the same images if they are drawn."""
        if self._subset is not None and self._subset[0] == step:
            return self._subset[1:]
        moments = None
        if self._moments is not None:
            chosen = self._choice(step)[0].to(self._device)
            moments = self._moments.take(chosen)
            pool = moments.pool(None if self._labels is None else self._labels[chosen], step)
        elif self._pool is not None:
            pool = self._pool.subset(self._choice(step)[0].to(self._device))
        else:
            assert self._worker is not None
            ahead, self._ahead = self._ahead, None
            now = ahead[1] if ahead is not None and ahead[0] == step else self._worker.submit(self._read, step)
            pool, moments = now.result()
            self._ahead = (step + 1, self._worker.submit(self._read, step + 1))
        self._subset = (step, pool, moments)
        return pool, moments

    def _loaded_moments(self, index: slice | NDArray[np.int64]) -> LatentMoments:
        recipe = self._recipe
        rows = self._in_data(index)
        return LatentMoments.load(self._data, rows, self._device, mirrored=recipe.mirror, seed=recipe.seed)

    def _read(self, step: int) -> tuple[Pool, LatentMoments | None]:
        chosen = self._choose(step)[0]
        labels = None if self._labels is None else self._labels[chosen.to(self._device)]
        if self.drawn:
            moments = self._loaded_moments(chosen.numpy())
            return moments.pool(labels, step), moments
        # Read in the order of the file, which is fastest on a disk.
        order = np.argsort(chosen.numpy(), kind="stable")
        rows = self._data.scaled(self._in_data(chosen.numpy()[order]))
        pixels = np.empty_like(rows, order="C")
        pixels[order] = rows
        return self._wrap(torch.from_numpy(pixels).to(self._device), labels), None
