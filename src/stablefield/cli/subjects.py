"""What is measured: samples drawn from a run, or images that were found."""

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stablefield.cli.drawing import Model
from stablefield.cli.evaluation_flags import EvaluationFlags
from stablefield.cli.sources import open_data
from stablefield.cli.work import Work
from stablefield.evaluation.commit import running_commit
from stablefield.evaluation.cost import wait_for
from stablefield.evaluation.feature_pass import Batch, set_batches
from stablefield.evaluation.measurement import Making
from stablefield.evaluation.processes import Processes
from stablefield.evaluation.reference import told
from stablefield.sampling.samples import chunks_of

__all__ = ["DEFAULT_SAMPLES", "FoundImages", "RunSamples"]

DEFAULT_SAMPLES = 5000
"""Of a run, unless told otherwise."""


# Evaluations of the network that are timed, the first of which does not count.
_TIMED = 4


class _EnoughError(Exception):
    """Ends a drawing of which enough has been seen."""


class RunSamples:
    """Samples drawn from a run."""

    def __init__(self, flags: EvaluationFlags, device: torch.device, processes: Processes) -> None:
        folder = Path(flags.subject)
        self._flags, self._device, self._processes = flags, device, processes
        self._model: Model = flags.drawing.open(folder, device)
        config = self._model.own.config
        self.shape = (config.shape[0], config.shape[1], config.shape[2])
        self.data_name = flags.real.data or config.data
        self.opening: Mapping[str, Any] = config.opening
        self.count = DEFAULT_SAMPLES if flags.samples is None else flags.samples
        last = flags.first_seed + flags.repeats * self.count
        if last > 2**32:
            raise ValueError(f"--first-seed {flags.first_seed}: seeds up to {last} are needed, and end at 2^32 - 1.")
        self.class_names = config.class_names
        self._evaluations = self._chunks = 0
        named = config.data == "digits" or config.data.startswith("hf:")
        if not flags.real.data and not named and not Path(config.data).exists():
            raise ValueError(
                f"--data is missing: the run's own data, {config.data}, are not there; name where they are now."
            )

    @property
    def seeds(self) -> tuple[str, ...]:
        """The seeds of every repeat."""
        return tuple(f"{start}-{start + self.count - 1}" for start in self._starts())

    def _starts(self) -> list[int]:
        first = self._flags.first_seed
        return [first + repeat * self.count for repeat in range(self._flags.repeats)]

    def batches(self, repeat: int, work: Work) -> Iterator[Batch]:
        """This process's samples of a repeat."""
        flags = self._flags.drawing
        start = self._starts()[repeat]
        seeds = range(start, start + self.count)
        chunks = self._processes.share(chunks_of(seeds, flags.batch, coupled=flags.coupled))
        stage = "samples" if self._flags.repeats == 1 else f"samples, repeat {repeat + 1}"
        many = self._processes.count
        done = size = 0

        def progress(share: float) -> None:
            work(stage, min(self.count, many * (done + share * size)), self.count)

        drawing = flags.drawing(self._model, self._device, progress)
        for chunk in chunks:
            size = len(chunk.places)
            yield drawing(chunk), torch.tensor(chunk.wanted) - start
            done += size
        self._evaluations += drawing.evaluations
        self._chunks += drawing.chunks

    def labels(self, repeat: int, numbers: torch.Tensor) -> torch.Tensor | None:
        """Classes of samples of a repeat, by their numbers (B,); None for a run without classes."""
        return self._flags.drawing.labels(self._starts()[repeat] + numbers, self._model.own.config)

    def seconds(self) -> float:
        """About how long drawing the samples of a repeat takes, from the first evaluations of a chunk, thrown away."""
        flags = self._flags.drawing
        chunks = chunks_of(range(self.count), flags.batch, coupled=flags.coupled)
        marks: list[float] = []

        def mark(_: float) -> None:
            wait_for(self._device)
            marks.append(time.perf_counter())
            if len(marks) > _TIMED:
                raise _EnoughError

        began = time.perf_counter()
        with suppress(_EnoughError):
            flags.drawing(self._model, self._device, mark)(chunks[0])
            marks.append(time.perf_counter())
        # The first evaluation of all is slower than those that follow; the solver's own work is between them.
        steady = marks[1:] if len(marks) > 2 else marks
        each = (steady[-1] - steady[0]) / max(1, len(steady) - 1)
        one = marks[0] - began + each * flags.calls
        rows = sum(len(chunk.seeds) for chunk in chunks) / len(chunks[0].seeds)
        return one * rows / self._processes.count

    def making(self) -> Making:
        """How the samples were made."""
        flags = self._flags.drawing
        evaluations, chunks = self._processes.total(self._evaluations, self._chunks)
        return Making(
            sampler=flags.describe(self._model.own.config),
            steps=flags.steps_taken,
            nfe=evaluations / chunks,
            ema=self._model.ema,
            commit=running_commit(),
        )


class FoundImages:
    """Images that were found."""

    def __init__(self, flags: EvaluationFlags, processes: Processes) -> None:
        self._flags, self._processes = flags, processes
        if not (Path(flags.subject).exists() or flags.subject == "digits" or flags.subject.startswith("hf:")):
            raise ValueError(
                f"RUN_OR_IMAGES is {flags.subject}, and there is no such file or folder: name a run (a folder with "
                "config.json) or images."
            )
        if not flags.real.data:
            raise ValueError("--data is missing: name the real images to measure against, such as --data digits.")
        self._images = open_data(flags.subject, split=flags.images_split)
        self.shape = self._images.shape
        self.data_name = flags.real.data
        self.opening: Mapping[str, Any] = {}
        self.class_names: tuple[str, ...] | None = None
        n = len(self._images)
        self.count = n // flags.repeats if flags.samples is None else flags.samples
        if self.count * flags.repeats > n or self.count < 1:
            raise ValueError(
                f"--samples {flags.samples} in {flags.repeats} repeats take {self.count * flags.repeats} images, and "
                f"{flags.subject} has {n}: every repeat takes images of its own."
            )
        # Sets are often sorted by class: repeats, and parts, are drawn at random.
        everything = np.random.default_rng(flags.first_seed).permutation(n)
        self._rows = [np.sort(everything[r * self.count : (r + 1) * self.count]) for r in range(flags.repeats)]
        self.seeds: tuple[str, ...] = ()

    def batches(self, repeat: int, work: Work) -> Iterator[Batch]:
        """This process's images of a repeat."""
        batches = set_batches(self._images.images, self._rows[repeat], self._flags.feature_batch, self._processes)
        stage = self._images.name if self._flags.repeats == 1 else f"{self._images.name}, repeat {repeat + 1}"
        return told(batches, stage, self.count, work, self._processes.count)

    def labels(self, repeat: int, numbers: torch.Tensor) -> None:  # noqa: ARG002
        """Nothing is known."""
        return

    def seconds(self) -> float:
        """Nothing is drawn."""
        return 0.0

    def making(self) -> Making:
        """Nothing is known."""
        return Making()
