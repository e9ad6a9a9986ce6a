"""Estimates the time of an evaluation, from trial calls on few images and features.

The trial calls a metric itself, on random features of the right size, so all its work counts. `Metric.cost` tells how its
time grows with the number of images.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield._cost import wait_for
from stablefield.evaluation._extraction import ExtractorPass, extract
from stablefield.evaluation._extractor import Extractor
from stablefield.evaluation._features import moments_of
from stablefield.evaluation._metric import Features, Metric, MetricInput

__all__ = ["TimeEstimate", "feature_seconds", "metric_seconds"]

# Rows per side, whose distances exceed a processor's caches.
_ROWS = 1024
# Most features to time a metric of moments with; a Frechet distance takes the cube of their number.
_WIDEST = 512


@dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """Estimated seconds of the parts of an evaluation."""

    sampling: float
    """Drawing the samples; 0 for given images."""
    features: float
    """The extractors."""
    metrics: float
    """The metrics."""

    @property
    def total(self) -> float:
        """All parts together."""
        return self.sampling + self.features + self.metrics


def feature_seconds(wanted: ExtractorPass, images: Tensor, device: torch.device) -> float:
    """Time per image in an extractor, with the work to keep its results.

    Args:
        wanted: the extractor, and which of its results to keep.
        images: a batch, uint8, shape (B, C, H, W).
        device: the extractor's device.
    """
    batch = (images, torch.arange(len(images)))
    seconds = 0.0
    for _ in range(2):  # a network's first call is slower than later ones
        began = time.perf_counter()
        extract([batch], [wanted])
        wait_for(device)
        seconds = time.perf_counter() - began
    return seconds / len(images)


def metric_seconds(
    extractor: Extractor,
    metrics: Sequence[Metric],
    samples: int,
    references: int,
    held_out: int,
    repeats: int,
    *,
    mirrored: bool = False,
) -> float:
    """Time of all repeats of the metrics on an extractor's features.

    Args:
        extractor: the extractor of the features.
        metrics: the metrics on them.
        samples: samples per repeat.
        references: number of real images.
        held_out: number of images outside the training data.
        repeats: number of repeats.
        mirrored: whether the second half of the real images are the mirror images of the first.
    """
    least = max([2, *(metric.least for metric in metrics)])
    n, m = (max(least, min(_ROWS, count)) for count in (samples, references))
    m += m % 2 * mirrored
    some = min(held_out, _ROWS)
    found = 0.0
    for metric in metrics:
        dim = extractor.dim if metric.rows else min(extractor.dim, _WIDEST)
        short, real = metric.shortened(), _made_up(m, dim)
        control = torch.rand(some, dim) if some else None
        times: list[float] = []
        for _ in range(2):
            given = MetricInput(
                samples=_made_up(n, dim),
                references=real,
                extractor=extractor,
                held_out=control,
                mirrored=mirrored,
            )
            began = time.perf_counter()
            short(given)
            times.append(time.perf_counter() - began)
        # The first call also computes values of the references alone, which later calls reuse.
        seconds = (max(0.0, times[0] - times[1]), repeats * times[1])
        whole, timed = metric.cost(samples, references, held_out, extractor.dim), short.cost(n, m, some, dim)
        found += sum(s * full / part for s, full, part in zip(seconds, whole, timed, strict=True) if part)
    return found


def _made_up(count: int, dim: int) -> Features:
    rows = torch.rand(count, dim, generator=torch.Generator().manual_seed(0))
    return Features(rows=rows, moments=moments_of(rows))
