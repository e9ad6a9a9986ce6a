"""How long an evaluation will take, from calls on few images and features that are thrown away.

What a metric is called with is made up, but of the size of the features, and the call is the metric's own: what it does
beside its distances counts, too. `Metric.cost` says how its time grows with the number of images.
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

# Rows of each side: more than a processor's caches hold the distances of.
_ROWS = 1024
# Features that a metric of moments is timed with at most; a Frechet distance takes the cube of their number.
_WIDEST = 512


@dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """Seconds that the parts of an evaluation will take, about."""

    sampling: float
    """Drawing the samples; 0 where they are there."""
    features: float
    """The extractors."""
    metrics: float
    """The metrics."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.sampling + self.features + self.metrics


def feature_seconds(wanted: ExtractorPass, images: Tensor, device: torch.device) -> float:
    """Time of one image in an extractor, with what is kept of its features.

    Args:
        wanted: the extractor, and what is kept.
        images: a batch, uint8, shape (B, C, H, W).
        device: where the extractor is.
    """
    batch = (images, torch.arange(len(images)))
    seconds = 0.0
    for _ in range(2):  # the first call of a network is slower than those that follow
        began = time.perf_counter()
        extract([batch], [wanted])
        wait_for(device)
        seconds = time.perf_counter() - began
    return seconds / len(images)


def metric_seconds(
    extractor: Extractor, metrics: Sequence[Metric], samples: int, references: int, held_out: int, repeats: int
) -> float:
    """Time of all repeats of the metrics on an extractor's features.

    Args:
        extractor: whose features.
        metrics: of them.
        samples: of each repeat.
        references: real images.
        held_out: images that were not trained on.
        repeats: how many.
    """
    least = max([2, *(metric.least for metric in metrics)])
    n, m = (max(least, min(_ROWS, count)) for count in (samples, references))
    some = min(held_out, _ROWS)
    found = 0.0
    for metric in metrics:
        dim = extractor.dim if metric.rows else min(extractor.dim, _WIDEST)
        short, real = metric.shortened(), _made_up(m, dim)
        control = torch.rand(some, dim) if some else None
        times: list[float] = []
        for _ in range(2):
            given = MetricInput(samples=_made_up(n, dim), references=real, extractor=extractor, held_out=control)
            began = time.perf_counter()
            short(given)
            times.append(time.perf_counter() - began)
        # The first call also finds what depends on the references alone, which the others keep.
        seconds = (max(0.0, times[0] - times[1]), repeats * times[1])
        whole, timed = metric.cost(samples, references, held_out, extractor.dim), short.cost(n, m, some, dim)
        found += sum(s * full / part for s, full, part in zip(seconds, whole, timed, strict=True) if part)
    return found


def _made_up(count: int, dim: int) -> Features:
    rows = torch.rand(count, dim, generator=torch.Generator().manual_seed(0))
    return Features(rows=rows, moments=moments_of(rows))
