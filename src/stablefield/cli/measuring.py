"""What `stablefield evaluate` does: samples of a run, or images from anywhere, through extractors, against real images."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.markup import escape
from torch import Tensor

from stablefield.cli.console import console
from stablefield.cli.evaluation_flags import EvaluationFlags, MetricName
from stablefield.cli.forecast import feature_seconds, metric_seconds
from stablefield.cli.sample import own_device
from stablefield.cli.settling import pick_device
from stablefield.cli.sources import open_data
from stablefield.cli.subjects import DEFAULT_SAMPLES, FoundImages, RunSamples
from stablefield.cli.words import duration
from stablefield.cli.work import Work
from stablefield.data.collector import cache_folder
from stablefield.data.image_set import ImageSet
from stablefield.evaluation.commit import running_commit
from stablefield.evaluation.extractor import Extractor, RawPixels
from stablefield.evaluation.feature_pass import Batch, Lens, extract, set_batches
from stablefield.evaluation.measurement import Measurement, check_counts, lens_for
from stablefield.evaluation.metric import (
    ClassifierScore,
    Coverage,
    Density,
    Frechet,
    Kernel,
    Metric,
    Nearest,
    Precision,
    Recall,
    Value,
)
from stablefield.evaluation.processes import Processes
from stablefield.evaluation.protocol import ProtocolWarning
from stablefield.evaluation.reference import (
    DamagedCacheWarning,
    Reference,
    ReferenceSet,
    is_kept,
    measure_reference,
)
from stablefield.evaluation.result import Result

__all__ = ["Measured", "measure"]

_METRICS: dict[MetricName, Metric] = {
    "frechet": Frechet(),
    "kernel": Kernel(),
    "precision": Precision(),
    "recall": Recall(),
    "density": Density(),
    "coverage": Coverage(),
}
_SHOWN = 64
_REMEDY = " To make it anew: --no-cache, or delete the file."


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came out, in the first process; nothing in the others."""

    results: list[Result]
    """One per number."""
    images: NDArray[np.uint8]
    """Some of the samples that this process saw, shape (n, C, H, W)."""
    labels: NDArray[np.int64] | None = None
    """Their classes, shape (n,); None for a run without classes and for images that were found."""
    class_names: tuple[str, ...] | None = None
    """What the classes are called, if that is known."""


def measure(flags: EvaluationFlags, processes: Processes) -> Measured:
    """Measure what the flags say, together with the other processes.

    Raises:
        ValueError: if the flags do not fit the run, the images or the data.
        ImportError: if the extractor's package is missing.
    """
    # As far as the flags tell it, before anything is opened.
    samples = DEFAULT_SAMPLES if flags.is_run and flags.samples is None else flags.samples
    check_counts(_everything(flags), samples, flags.real.references)
    device = pick_device(own_device(flags.device))
    source = RunSamples(flags, device, processes) if flags.is_run else FoundImages(flags, processes)
    check_counts(_everything(flags), source.count, flags.real.references)
    with Work() as work:
        measurements = _Plan(flags, source, device, processes, work).measurements()
        lenses = [measurement.lens for measurement in measurements]
        repeats: list[list[list[Value]]] = []
        shown: list[tuple[Tensor, Tensor | None]] = []
        for repeat in range(flags.repeats):
            batches = _remembered(source, repeat, work, shown)
            features = extract(batches, lenses, "sample", at_once=flags.feature_batch)
            if processes.first:
                work("metrics", repeat, flags.repeats)
                repeats.append([m.values(f) for m, f in zip(measurements, features, strict=True)])
        making = source.making()
    images = (
        torch.cat([batch for batch, _ in shown])[:_SHOWN].numpy() if shown else np.zeros((0, *source.shape), np.uint8)
    )
    told = [labels for _, labels in shown if labels is not None]
    labels = torch.cat(told)[:_SHOWN].numpy() if told else None
    if not processes.first:
        return Measured(results=[], images=images)
    results = [
        result
        for place, measurement in enumerate(measurements)
        for result in measurement.results([values[place] for values in repeats], source.count, source.seeds, making)
    ]
    return Measured(
        results=results,
        images=images,
        labels=labels,
        class_names=source.class_names,
    )


def _everything(flags: EvaluationFlags) -> tuple[Metric, ...]:
    """The metrics that are asked for, of whatever extractor."""
    others: dict[str, Metric] = {"nearest": Nearest(), "classifier-score": ClassifierScore()}
    return tuple({**_METRICS, **others}[name] for name in flags.metrics)


def _remembered(
    source: RunSamples | FoundImages, repeat: int, work: Work, shown: list[tuple[Tensor, Tensor | None]]
) -> Iterator[Batch]:
    """The batches of a repeat; the first images are kept to be looked at, with their classes."""
    for images, numbers in source.batches(repeat, work):
        if sum(len(batch) for batch, _ in shown) < _SHOWN:
            shown.append((images, source.labels(repeat, numbers)))
        yield images, numbers


class _Plan:
    """What is asked of every extractor: the chosen one, pixels for memorisation, the classifier."""

    def __init__(
        self,
        flags: EvaluationFlags,
        source: RunSamples | FoundImages,
        device: torch.device,
        processes: Processes,
        work: Work,
    ) -> None:
        self._flags, self._source, self._device = flags, source, device
        self._processes, self._work = processes, work
        self._split = flags.real.split
        self._data = self._real(source.data_name, self._split)
        if source.shape != self._data.shape:
            _, height, width = source.shape
            remedy = (
                f"; --resolution {height} brings the real ones there, if the channels agree" if height == width else ""
            )
            raise ValueError(
                f"the samples are {_size(source.shape)} (C x H x W), the images of --data {source.data_name} "
                f"{_size(self._data.shape)}: measure images of one size{remedy}."
            )
        self._wanted = ReferenceSet(images=self._data, split=self._split, count=flags.real.references)
        self._commit = running_commit()
        real = flags.real
        self._cache = None if real.no_cache else real.cache or cache_folder() / "references"

    def measurements(self) -> list[Measurement]:
        """All of them, with their references measured."""
        flags, data = self._flags, self._data
        chosen = tuple(_METRICS[name] for name in flags.metrics if name in _METRICS)
        scores: tuple[Metric, ...] = (ClassifierScore(),) if "classifier-score" in flags.metrics else ()
        near: tuple[Metric, ...] = (Nearest(),) if "nearest" in flags.metrics else ()
        check_counts(chosen + scores, self._source.count, len(self._wanted))
        training, held_out = data, None
        if near:
            training = data if self._split == "train" else self._real(self._source.data_name, "train")
            check_counts(near, self._source.count, len(training))
            held_out = self._held_out()
        found: list[Measurement] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ProtocolWarning)
            warnings.simplefilter("always", DamagedCacheWarning)
            extractor = flags.extractor.open(data.shape, self._device) if chosen else None
            classifier = flags.extractor.open_classifier(self._device)
            pixels = RawPixels(data.shape)
            # Pixels are at hand anyway: nothing to keep.
            whole = ReferenceSet(images=training, split="train")
            seen = [
                (looking, metrics, reference, cache)
                for looking, metrics, reference, cache in (
                    (extractor, chosen, self._wanted, self._cache),
                    (pixels, near, whole, None),
                    (classifier, scores, self._wanted, self._cache),
                )
                if looking is not None and metrics
            ]
            if self._processes.first:
                self._foretell(seen, held_out)
            for looking, metrics, reference, cache in seen:
                measured = self._measured(reference, lens_for(looking, metrics), cache)
                control = self._pixels_of(held_out, pixels) if looking is pixels else None
                found.append(Measurement(extractor=looking, metrics=metrics, reference=measured, held_out=control))
        remedies = {str(w.message): "" if w.category is DamagedCacheWarning else _REMEDY for w in caught}
        for message, remedy in remedies.items():
            console.print(f"[yellow]warning:[/] {escape(message)}{remedy}")
        return found

    def _foretell(
        self,
        seen: Sequence[tuple[Extractor, tuple[Metric, ...], ReferenceSet, Path | None]],
        held_out: ImageSet | None,
    ) -> None:
        """Say how long this will take from here, from a batch or two that are thrown away."""
        source, repeats = self._source, self._flags.repeats
        drawing = repeats * source.seconds()
        looking = comparing = 0.0
        images = torch.from_numpy(np.array(self._data.images[: self._flags.feature_batch]))
        for extractor, metrics, reference, cache in seen:
            lens = lens_for(extractor, metrics)
            control = len(held_out) if held_out is not None and isinstance(metrics[0], Nearest) else 0
            once = (0 if is_kept(reference, lens, cache) else len(reference)) + control
            looking += (repeats * source.count + once) * feature_seconds(lens, images, self._device)
            comparing += metric_seconds(extractor, metrics, source.count, len(reference), control, repeats)
        looking /= self._processes.count
        parts = [
            f"{duration(seconds)} of {what}"
            for seconds, what in ((drawing, "drawing"), (looking, "features"), (comparing, "metrics"))
            if seconds >= 1
        ]
        known = f": {', '.join(parts)}" if len(parts) > 1 else ""
        console.print(f"takes about {duration(drawing + looking + comparing)} from here{known}")

    def _real(self, name: str, split: str) -> ImageSet:
        """Real images, brought to their size as the run's were in training unless the flags say otherwise."""
        real, opening = self._flags.real, self._source.opening
        if real.resolution is None and opening:
            return open_data(name, split=split, **opening)
        return open_data(name, real.resolution, real.resize, split)

    def _measured(self, reference: ReferenceSet, lens: Lens, cache: Path | None) -> Reference:
        return measure_reference(
            reference,
            lens,
            batch=self._flags.feature_batch,
            cache=cache,
            commit=self._commit,
            processes=self._processes,
            progress=self._work,
        )

    def _held_out(self) -> ImageSet | None:
        """Real images that were not trained on; None where there are none."""
        name = self._flags.real.held_out
        try:
            images = self._real(name or self._source.data_name, "train" if name else "test")
        except ValueError:
            if name:
                raise
            return None
        if images.shape != self._data.shape:
            raise ValueError(
                f"--held-out {name or self._source.data_name} has images of {_size(images.shape)}, --data of "
                f"{_size(self._data.shape)}: pass images of one size, or --resolution."
            )
        return images

    def _pixels_of(self, images: ImageSet | None, extractor: RawPixels) -> Tensor | None:
        """The pixels of all images, (h, d)."""
        if images is None:
            return None
        rows = np.arange(len(images))
        batches = set_batches(images.images, rows, self._flags.feature_batch, self._processes)
        (features,) = extract(batches, [Lens(extractor=extractor, moments=False)], "held-out image")
        return features.rows


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
