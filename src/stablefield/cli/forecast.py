"""How long metrics will take, from calls on few rows that are thrown away.

What a metric is called with is made up, but of the size of the features, and the call is the metric's own: what it does
beside its distances counts, too.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stablefield.evaluation.cost import wait_for
from stablefield.evaluation.extractor import Extractor
from stablefield.evaluation.feature_pass import Features, Lens, extract
from stablefield.evaluation.metric import ClassifierScore, Frechet, Kernel, Metric, Nearest, Recall, Sides
from stablefield.evaluation.reference import Reference
from stablefield.evaluation.streaming import StreamingStatistics

__all__ = ["feature_seconds", "metric_seconds", "seconds_of"]

# Rows of each side: more than a processor's caches hold the distances of.
_ROWS = 1024
# Features of which a Frechet distance is timed at most; it takes the cube of their number.
_WIDEST = 512
_SUBSETS = 2


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Time of a call, once it has been called."""
    call()
    wait_for(device)
    began = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - began


def feature_seconds(lens: Lens, images: Tensor, device: torch.device) -> float:
    """Time of one image in an extractor, with what is kept of its features.

    Args:
        lens: the extractor, and what is kept.
        images: a batch, uint8, shape (B, C, H, W).
        device: where the extractor is.
    """
    batch = (images, torch.arange(len(images)))
    return seconds_of(lambda: extract([batch], [lens], source_only=True), device) / len(images)


def metric_seconds(
    extractor: Extractor, metrics: Sequence[Metric], samples: int, real: int, held_out: int, repeats: int
) -> float:
    """Time of all repeats of the metrics on an extractor's features.

    Args:
        extractor: whose features.
        metrics: of them.
        samples: of each repeat.
        real: reference images.
        held_out: images that were not trained on.
        repeats: how many.
    """
    least = max([2, *(metric.least for metric in metrics)])
    n, m = (max(least, min(_ROWS, count)) for count in (samples, real))
    found = 0.0
    reference = _reference(m, extractor.dim)
    for metric in metrics:
        dim, cubes, subsets = extractor.dim, 1.0, 1.0
        rows, others = n, m
        side = reference
        if isinstance(metric, Frechet) and dim > _WIDEST:
            cubes, dim = (dim / _WIDEST) ** 3, _WIDEST
            side = _reference(m, dim)
        if isinstance(metric, Kernel):
            size = min(metric.subset_size, samples // 2, real // 2)
            subsets = metric.subsets / _SUBSETS
            metric = dataclasses.replace(metric, subsets=_SUBSETS, subset_size=size)
            rows = others = 2 * size
            side = _reference(others, dim)
        some = min(held_out, _ROWS)
        control = torch.rand(some, dim) if isinstance(metric, Nearest) and some else None
        times: list[float] = []
        for _ in range(2):
            sides = Sides(samples=_features(rows, dim), reference=side, held_out=control)
            began = time.perf_counter()
            metric(sides, extractor)
            times.append(time.perf_counter() - began)
        # The first call also finds what depends on the reference alone, which the others keep.
        once, each = max(0.0, times[0] - times[1]), times[1]
        if isinstance(metric, Frechet | Kernel):
            found += (once if isinstance(metric, Frechet) else 0.0) * cubes + repeats * each * cubes * subsets
        elif isinstance(metric, ClassifierScore):
            found += repeats * each * samples / rows
        elif isinstance(metric, Recall):
            found += repeats * each * samples * (samples + real) / (rows * (rows + others))
        elif isinstance(metric, Nearest):
            found += repeats * each * (samples + held_out) * real / ((rows + some) * others)
        else:
            found += once * (real / others) ** 2 + repeats * each * samples * real / (rows * others)
    return found


def _features(count: int, dim: int) -> Features:
    rows = torch.rand(count, dim, generator=torch.Generator().manual_seed(0))
    moments = StreamingStatistics(dim, source_only=True)
    moments.update(rows)
    return Features(count=count, rows=rows, statistics=moments.statistics())


def _reference(count: int, dim: int) -> Reference:
    return Reference(name="", sha256="", split="", features=_features(count, dim))
