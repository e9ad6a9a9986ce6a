"""A pass over images: batches go through extractors, and what metrics need of the features is kept.

A batch is a pair: images, uint8 (B, C, H, W), and their numbers, integers (B,), unique over all processes. The images
are seen once, by all extractors in turn, and never held together. Needs torchmetrics: `pip install stablefield[evaluate]`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield.evaluation.extractor import Extractor
from stablefield.evaluation.processes import Processes
from stablefield.evaluation.statistics import Statistics
from stablefield.evaluation.streaming import StreamingFeatures, StreamingStatistics

__all__ = ["Batch", "Features", "Lens", "extract", "set_batches"]

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Lens:
    """An extractor, and what is to be kept of what it sees."""

    extractor: Extractor
    """From images to features."""
    rows: bool = True
    """Keep the features themselves: 4 d bytes an image."""
    moments: bool = True
    """Keep mean and covariance: 8 d^2 bytes in all."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """What was kept."""

    count: int
    """Number of images, over all processes."""
    rows: Tensor | None = None
    """Features in the order of the images' numbers, shape (n, d), float32; None if not asked for."""
    statistics: Statistics | None = None
    """Mean and covariance; None if not asked for."""


def set_batches(
    images: NDArray[np.uint8], rows: NDArray[np.int64], batch: int, processes: Processes | None = None
) -> Iterator[Batch]:
    """Batches of the images `rows` of an array (n, C, H, W): this process's share.

    Batches are cut before they are shared out, so that the number of processes changes no batch.
    """
    parts = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    numbers = np.split(np.arange(len(rows)), range(batch, len(rows), batch))
    everything = list(zip(parts, numbers, strict=True))
    for part, places in everything if processes is None else processes.share(everything):
        yield torch.from_numpy(np.ascontiguousarray(images[part])), torch.from_numpy(places)


def extract(
    batches: Iterable[Batch],
    lenses: Sequence[Lens],
    what: str = "image",
    *,
    at_once: int | None = None,
    source_only: bool = False,
) -> list[Features]:
    """Send all batches through all extractors.

    Where torch.distributed is running, every process calls this with its own batches, and gets the features of all, unless
    one measures `source_only`.

    Args:
        batches: images with their numbers.
        lenses: extractors, and what to keep of each.
        what: what to call an image in an error, such as "sample".
        at_once: images that an extractor sees at a time; a network at 299 x 299 takes some 10 MB for each.
        source_only: whether the features are those of this process's batches, which the others may know nothing of.

    Returns:
        One `Features` per lens.

    Raises:
        ValueError: if an extractor refuses images, or returns NaN or infinite numbers; the image's number is named.
    """
    rows = [StreamingFeatures(lens.extractor.dim, source_only=source_only) if lens.rows else None for lens in lenses]
    moments = [
        StreamingStatistics(lens.extractor.dim, source_only=source_only) if lens.moments else None for lens in lenses
    ]
    for images, numbers in batches:
        for lens, row, moment in zip(lenses, rows, moments, strict=True):
            parts = images.split(at_once or max(1, len(images)))
            features = torch.cat([lens.extractor(part).float() for part in parts])
            _check_finite(features, numbers, lens.extractor, what)
            if row is not None:
                row.update(features, numbers)
            if moment is not None:
                moment.update(features)
    return [_kept(*pair) for pair in zip(rows, moments, strict=True)]


def _kept(rows: StreamingFeatures | None, moments: StreamingStatistics | None) -> Features:
    features = None if rows is None else rows.features()
    statistics = None if moments is None else moments.statistics()
    count = len(features) if features is not None else statistics.count if statistics is not None else 0
    return Features(count=count, rows=features, statistics=statistics)


def _check_finite(features: Tensor, numbers: Tensor, extractor: Extractor, what: str) -> None:
    bad = ~torch.isfinite(features).all(dim=1).cpu()
    if bad.any():
        raise ValueError(
            f"{extractor.name} gives NaN or infinite features for {int(bad.sum())} of a batch of {len(bad)}, the first for "
            f"{what} {int(numbers[bad][0])}: look at that image, and at the weights and the precision of the extractor."
        )
