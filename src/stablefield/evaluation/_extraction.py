"""A pass over images: batches go through extractors, and what metrics need of the features is kept.

A batch is a pair: images, uint8 (B, C, H, W), and their numbers, integers (B,), unique over all processes. The images
are seen once, by all extractors in turn, and never held together.

What is kept lies in torchmetrics metrics: `update` takes a batch, `merge_state` joins another metric's state, and the
result is that of all processes where torch.distributed is running (torchmetrics gathers the states). Every process must
ask for the result, those that saw no batch included. Needs torchmetrics: `pip install stablefield[evaluate]`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield._distributed import Ranks
from stablefield._shapes import check_tensor, whole_number
from stablefield.evaluation._extractor import Extractor
from stablefield.evaluation._features import (
    Statistics,
    checked,
    empty_moments,
    in_float64,
    join_moments,
    moments_of,
    unpack,
)
from stablefield.evaluation._metric import Features, Metric

try:
    import torchmetrics
except ImportError as error:
    raise ImportError(
        "features of images are kept by torchmetrics: pip install 'stablefield[evaluate]'.", name="torchmetrics"
    ) from error

__all__ = [
    "Batch", "ExtractorPass", "StreamingFeatures", "StreamingStatistics", "extract", "image_batches", "pass_for",
]  # fmt: skip

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class ExtractorPass:
    """An extractor, and what to keep of the features it gives."""

    extractor: Extractor
    """From images to features."""
    rows: bool = True
    """Keep the features themselves: 4 d bytes an image."""
    moments: bool = True
    """Keep mean and covariance: 8 d^2 bytes in all."""


def pass_for(extractor: Extractor, metrics: Sequence[Metric]) -> ExtractorPass:
    """A pass that keeps what these metrics need."""
    rows, moments = any(metric.rows for metric in metrics), any(metric.moments for metric in metrics)
    return ExtractorPass(extractor=extractor, rows=rows, moments=moments)


def image_batches(
    images: NDArray[np.uint8], rows: NDArray[np.int64], batch: int, ranks: Ranks | None = None
) -> Iterator[Batch]:
    """Batches of the images `rows` of an array (n, C, H, W): this process's share.

    Batches are cut before they are shared out, so that the number of processes changes no batch.
    """
    starts = range(0, len(rows), batch)
    for start in starts if ranks is None else ranks.share(starts):
        part = rows[start : start + batch]
        numbers = torch.arange(start, start + len(part))
        yield torch.from_numpy(np.ascontiguousarray(images[part])), numbers


def extract(
    batches: Iterable[Batch],
    passes: Sequence[ExtractorPass],
    what: str = "image",
    *,
    at_once: int | None = None,
    local: bool = False,
) -> list[Features]:
    """Send all batches through all extractors.

    Where torch.distributed is running, every process calls this with its own batches, and gets the features of all, unless
    `local` says otherwise.

    Args:
        batches: images with their numbers.
        passes: extractors, and what to keep of each.
        what: what to call an image in an error, such as "sample".
        at_once: images that an extractor sees at a time; a network at 299 x 299 takes some 10 MB for each.
        local: whether the features are those of this process's batches alone; the others need not call it then.

    Returns:
        One `Features` per pass.

    Raises:
        ValueError: if an extractor refuses images, or returns NaN or infinite numbers; the image's number is named.
    """
    rows = [StreamingFeatures(one.extractor.dim, local=local) if one.rows else None for one in passes]
    moments = [StreamingStatistics(one.extractor.dim, local=local) if one.moments else None for one in passes]
    for images, numbers in batches:
        for one, row, moment in zip(passes, rows, moments, strict=True):
            parts = images.split(at_once or max(1, len(images)))
            features = torch.cat([one.extractor(part).float() for part in parts])
            _check_finite(features, numbers, one.extractor, what)
            if row is not None:
                row.update(features, numbers)
            if moment is not None:
                moment.update(features)
    return [_kept(*pair) for pair in zip(rows, moments, strict=True)]


def _kept(rows: "StreamingFeatures | None", moments: "StreamingStatistics | None") -> Features:
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


class _Streaming(torchmetrics.Metric):
    """State over batches and processes.

    Args:
        dim: number of features d.
        local: this process measures for itself, also where torch.distributed is running; the others need not.
    """

    full_state_update = False

    def __init__(self, dim: int, *, local: bool = False) -> None:
        super().__init__(distributed_available_fn=_no if local else None)
        whole_number("dim", dim, 1)
        self.dim = dim

    def _checked(self, features: Tensor) -> Tensor:
        features = checked("features", features, least=0)
        if features.shape[1] != self.dim:
            raise ValueError(f"features has {features.shape[1]} features per row, this stream was made for {self.dim}.")
        return features if features.device.type != "mps" else in_float64(features)


class StreamingStatistics(_Streaming):
    """Mean and covariance of features over batches and processes, in float64; arguments as for `_Streaming`.

    Holds (d + 2) d numbers (34 MB at d = 2048), whatever the number of samples. A sampler that pads its last batch must
    not feed the padding: rows are counted as they come.
    """

    moments: Tensor

    def __init__(self, dim: int, *, local: bool = False) -> None:
        super().__init__(dim, local=local)
        self.add_state("moments", default=empty_moments(dim), dist_reduce_fx=_join_all)

    def update(self, features: Tensor) -> None:
        """Take in the features of a batch, shape (B, dim); B may be 0.

        Raises:
            ValueError: if the shape or dtype is wrong, or a row holds NaN or infinite numbers.
        """
        features = self._checked(features)
        if len(features) > 0:
            self.moments = join_moments(self.moments, moments_of(features.to(self.moments.device)))

    def compute(self) -> Tensor:
        """The packed moments of all batches, shape (dim + 2, dim); `statistics` unpacks them."""
        return self.moments

    def statistics(self) -> Statistics:
        """Statistics of all batches of all processes.

        Raises:
            ValueError: if there are fewer than 2 rows in all.
        """
        if not self.update_called:
            self.update(torch.empty(0, self.dim))
        return unpack(self.compute())


class StreamingFeatures(_Streaming):
    """The features themselves over batches and processes, for metrics that need every row.

    Each row comes with the number of its sample. The result is in the order of those numbers, each number once: neither
    the number of processes nor a sampler's padding changes it. Arguments as for `_Streaming`.
    """

    rows: list[Tensor]
    numbers: list[Tensor]

    def __init__(self, dim: int, *, local: bool = False) -> None:
        super().__init__(dim, local=local)
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.add_state("numbers", default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, numbers: Tensor) -> None:
        """Take in the features (B, dim) of the samples `numbers` (B,), integers; B may be 0.

        Raises:
            ValueError: as `StreamingStatistics.update`, or if `numbers` is not one integer per row.
        """
        features = self._checked(features)
        check_tensor("numbers", numbers)
        if numbers.shape != features.shape[:1] or numbers.is_floating_point():
            raise ValueError(
                f"numbers has shape {tuple(numbers.shape)} and dtype {numbers.dtype}: "
                f"pass one integer per row of features, shape ({len(features)},)."
            )
        self.rows.append(features.float().to(self.device))
        self.numbers.append(numbers.long().to(self.device))

    def compute(self) -> tuple[Tensor, Tensor]:
        """All rows (n, dim), float32, and their numbers (n,), sorted and each number once."""
        rows, numbers = _whole(self.rows), _whole(self.numbers)
        order = torch.argsort(numbers, stable=True)
        numbers = numbers[order]
        first = torch.ones_like(numbers, dtype=torch.bool)
        first[1:] = numbers[1:] != numbers[:-1]
        return rows[order[first]], numbers[first]

    def features(self) -> Tensor:
        """The features of all samples of all processes in the order of their numbers, shape (n, dim), float32."""
        if not self.update_called:
            self.update(torch.empty(0, self.dim), torch.empty(0, dtype=torch.long))
        return self.compute()[0]


def _join_all(stacked: Tensor) -> Tensor:
    """Join the moments of all processes, shape (processes, d + 2, d), as a balanced tree."""
    parts = list(stacked)
    while len(parts) > 1:
        parts = [
            join_moments(*pair) if len(pair) == 2 else pair[0]
            for pair in (parts[i : i + 2] for i in range(0, len(parts), 2))
        ]
    return parts[0]


def _whole(state: list[Tensor] | Tensor) -> Tensor:
    """A list state is a list before it is synchronised, and one tensor after."""
    return state if isinstance(state, Tensor) else torch.cat(state)


def _no() -> bool:
    return False
