"""Samples of a run as a source for `evaluate`: a seed gives the same image for any batch size and number of processes."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield._commit import running_commit
from stablefield._cost import wait_for
from stablefield._distributed import Ranks
from stablefield._progress import Progress
from stablefield._shapes import whole_number
from stablefield.data._image_set import ImageSet
from stablefield.evaluation._sample_source import SampleSource, SamplingRecord
from stablefield.sampling._seeded_images import chunks_of
from stablefield.training._sampler import RunSampler

__all__ = ["RunSource"]

# Network evaluations to time, without the first.
_TIMED = 4


class RunSource(SampleSource):
    """Samples drawn from a run.

    Args:
        sampler: the run's model with a solver; draws classes in the proportions of the training data, unless it names some.
        name: name of the run in a report, such as its folder.
        samples: number of samples per repeat.
        seed: seed of the first sample of the first repeat; the others count up from it.

    Attributes:
        config: the run's configuration.

    Raises:
        ValueError: if `samples` is 0, or a repeat needs seeds above 2^32 - 1.
    """

    def __init__(self, sampler: RunSampler, name: str, samples: int = 5000, seed: int = 0) -> None:
        samples, seed = whole_number("samples", samples, 1), whole_number("seed", seed, 0)
        sampler = sampler.in_proportion()
        self._sampler, self._seed = sampler, seed
        config = sampler.config
        self.name, self.count, self.class_names = name, samples, config.class_names
        self.shape, self.floating, self.autoencoder = sampler.shape, sampler.floating, sampler.autoencoder
        self.config, self.mirrored = config, config.recipe.mirror
        encoder = config.autoencoder or sampler.autoencoder
        self.encoder = None if encoder is None else encoder.sha256
        self._evaluations, self._drawn = 0.0, 0
        self._start(0)

    def check(self, name: str, images: ImageSet) -> None:
        """Check that real data are no latents of another autoencoder, or in other units, than the samples.

        Raises:
            ValueError: if they are.
        """
        if self.floating and self.config.scaling is None:
            # Only an imported network is such a run.
            remedy = "so its samples are latents as the network sees them: name the autoencoder that decodes them"
            if images.scaling is None:
                raise ValueError(
                    f"vae is missing: {name}={images.name} holds images, and the run was imported without one, {remedy}."
                )
            if images.autoencoder is not None:
                raise ValueError(
                    f"vae is missing: {name}={images.name} holds latents in the units of their autoencoder, and the run was "
                    f"imported without one, {remedy}."
                )
        super().check(name, images)

    def seeds(self, repeat: int) -> str:
        """The seeds of a repeat, such as "0-4999"."""
        start = self._start(repeat)
        return f"{start}-{start + self.count - 1}"

    def batches(
        self, repeat: int, ranks: Ranks, progress: Callable[[Progress], object] | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's samples of a repeat: images, uint8 (B, C, H, W), and their numbers (B,)."""
        start, sampler = self._start(repeat), self._sampler
        seeds = range(start, start + self.count)
        stage = "samples" if repeat == 0 else f"samples, repeat {repeat + 1}"

        def report(own: Progress) -> None:
            if progress is not None:
                # The other processes progress at about the same pace.
                done = min(self.count, ranks.world_size * own.done)
                progress(Progress(stage=stage, done=done, total=self.count))

        for samples in sampler.draw(seeds, ranks, None if progress is None else report):
            yield torch.from_numpy(samples.images), torch.tensor(samples.seeds) - start
            self._evaluations += samples.nfe * len(samples)
            self._drawn += len(samples)

    def labels(self, repeat: int, numbers: Tensor) -> Tensor | None:
        """Classes of samples of a repeat, by their numbers (B,); None for a run without classes."""
        return self._sampler.labels(self._start(repeat) + numbers)

    def held_out(self, images: ImageSet) -> NDArray[np.int64] | None:
        """Indices of the run's training images that it held out; None without them, or if `images` are others."""
        config = self._sampler.config
        if config.held_out is None or config.held_out.share is None:
            return None
        if images.manifest["sha256"] != config.manifest.get("sha256"):
            return None
        return config.held_out.split(len(images), config.recipe.seed)[1]

    def seconds(self) -> float:
        """Estimate how long one process takes for the samples of a repeat, from a few trial evaluations."""
        sampler, options = self._sampler, self._sampler.options
        chunks = chunks_of(range(self.count), options.batch, coupled=options.solver.coupled)
        marks: list[float] = []

        def mark(_: Progress) -> None:
            wait_for(sampler.device)
            marks.append(time.perf_counter())
            if len(marks) > _TIMED:
                raise _EnoughError

        began = time.perf_counter()
        with suppress(_EnoughError):
            next(sampler.draw(chunks[0].wanted, Ranks(), mark))
            marks.append(time.perf_counter())
        # The very first evaluation is slower than the rest; the intervals include the solver's own work.
        steady = marks[1:] if len(marks) > 2 else marks
        each = (steady[-1] - steady[0]) / max(1, len(steady) - 1)
        one = marks[0] - began + each * options.calls
        return one * sum(len(chunk.seeds) for chunk in chunks) / len(chunks[0].seeds)

    def record(self, ranks: Ranks) -> SamplingRecord:
        """The protocol of the sampling."""
        evaluations, drawn = ranks.total(self._evaluations, self._drawn, purpose="to count their network evaluations")
        options = self._sampler.options
        return SamplingRecord(
            sampler=self._sampler.describe(),
            steps=options.steps_taken,
            nfe=evaluations / drawn,
            ema=self._sampler.ema,
            commit=running_commit(),
        )

    def _start(self, repeat: int) -> int:
        """The first seed of a repeat."""
        start = self._seed + repeat * self.count
        if start + self.count > 2**32:
            last = start + self.count - 1
            raise ValueError(
                f"seed={self._seed}: the last sample's seed, {last}, is above 2^32 - 1; pass a smaller seed."
            )
        return start


class _EnoughError(Exception):
    """Ends the sampling after the timed evaluations."""
