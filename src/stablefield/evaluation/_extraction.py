"""Features of many images: send batches through extractors, and keep the features that the metrics need.

A batch is a pair: images, uint8 (B, C, H, W), and their numbers, integers (B,), unique over all processes. All extractors
see each batch once, in turn, and no array holds all images. Rows of features come back in the order of their numbers, each
number once: neither the number of processes nor a sampler's padding changes them. Moments count every row, so a sampler
that pads its last batch must leave out the padding if a metric needs moments.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield._distributed import Ranks
from stablefield._modules import varies
from stablefield._progress import Progress
from stablefield._warning import warn
from stablefield.evaluation._extractor import Extractor
from stablefield.evaluation._features import empty_moments, join_moments, moments_of
from stablefield.evaluation._metric import Features, Metric

__all__ = ["Batch", "ExtractorPass", "extract", "image_batches", "joined", "pass_for"]

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class ExtractorPass:
    """An extractor, and which of its results to keep."""

    extractor: Extractor
    """Maps images to features."""
    rows: bool = True
    """Keep the features themselves: 4 d bytes per image, or 8 d of float64 data."""
    moments: bool = True
    """Keep mean and covariance: 8 d^2 bytes in all."""


def pass_for(extractor: Extractor, metrics: Sequence[Metric]) -> ExtractorPass:
    """A pass that keeps the results these metrics need."""
    rows, moments = any(metric.rows for metric in metrics), any(metric.moments for metric in metrics)
    return ExtractorPass(extractor=extractor, rows=rows, moments=moments)


def image_batches(
    images: NDArray[Any],
    rows: NDArray[np.int64],
    batch: int,
    ranks: Ranks | None = None,
    progress: Callable[[Progress], object] | None = None,
    stage: str = "",
) -> Iterator[Batch]:
    """Batches of the images `rows` of an array (n, C, H, W): this process's share.

    The cut into batches precedes the split over processes, so the number of processes changes no batch. Calls `progress`
    after the use of each batch.
    """
    ranks = ranks or Ranks()
    done = 0
    for start in ranks.share(range(0, len(rows), batch)):
        part = rows[start : start + batch]
        yield torch.from_numpy(np.ascontiguousarray(images[part])), torch.arange(start, start + len(part))
        done += len(part)
        if progress is not None:
            # The other processes progress at about the same pace.
            progress(Progress(stage=stage, done=min(done * ranks.world_size, len(rows)), total=len(rows)))


def extract(
    batches: Iterable[Batch],
    passes: Sequence[ExtractorPass],
    what: str = "image",
    *,
    at_once: int | None = None,
    ranks: Ranks | None = None,
) -> list[Features]:
    """Send all batches through all extractors.

    Args:
        batches: images with their numbers.
        passes: extractors, and what to keep of each.
        what: name of an image in an error, such as "sample".
        at_once: images per call of an extractor; a network at 299 x 299 takes some 10 MB for each.
        ranks: the processes that share the images: each calls this with its own batches, perhaps none, and gets the
            features of all images. None for this process alone.

    Returns:
        One `Features` per pass.

    Raises:
        ValueError: if an extractor rejects images, or returns another shape than it declares, or NaN or infinite numbers;
            names the image's number.

    Warns:
        UserWarning: if an extractor seems to be in training mode.
    """
    kept = [_Kept(one) for one in passes]
    for k, (images, numbers) in enumerate(batches):
        parts = images.split(at_once or max(1, len(images)))
        for one in kept:
            features = torch.cat([one.extractor(part) for part in parts]).cpu()
            features = features if features.dtype == torch.float64 else features.float()
            _check(features, numbers, one.extractor, what)
            one.add(features, numbers)
            if k == 0 and varies(one.extractor):
                warn(
                    f"{one.extractor.name}: a network that it calls is in training mode, so its dropout or batch "
                    "normalisation makes the features of an image depend on chance or on the other images: call eval() of "
                    "the network.",
                )
    return [one.features(ranks or Ranks()) for one in kept]


def _check(features: Tensor, numbers: Tensor, extractor: Extractor, what: str) -> None:
    if features.shape != (len(numbers), extractor.dim):
        raise ValueError(
            f"{extractor.name} gives features of shape {tuple(features.shape)} for {len(numbers)} images, but has "
            f"dim={extractor.dim}: return one row of that many features per image."
        )
    bad = ~torch.isfinite(features).all(dim=1)
    if bad.any():
        raise ValueError(
            f"{extractor.name} gives NaN or infinite features for {int(bad.sum())} of a batch of {len(bad)}, the first for "
            f"{what} {int(numbers[bad][0])}: check that image, and the extractor's weights and precision."
        )


class _Kept:
    """Collects one pass's results over the batches, on the CPU."""

    def __init__(self, wanted: ExtractorPass) -> None:
        self.extractor, self._wanted = wanted.extractor, wanted
        dim = wanted.extractor.dim
        self._rows, self._numbers = [torch.empty(0, dim)], [torch.empty(0, dtype=torch.long)]
        self._moments = empty_moments(dim)

    def add(self, features: Tensor, numbers: Tensor) -> None:
        if self._wanted.rows:
            self._rows.append(features)
            self._numbers.append(numbers.long())
        if self._wanted.moments and len(features):
            self._moments = join_moments(self._moments, moments_of(features))

    def features(self, ranks: Ranks) -> Features:
        """The features of all processes."""
        rows = moments = None
        purpose = "to exchange their features"
        if self._wanted.rows:
            own = torch.cat(self._rows)
            if ranks.total(float(own.dtype == torch.float64), purpose=purpose)[0] > 0:
                own = own.double()  # also where a process had no images
            rows, numbers = (ranks.all_gather_rows(kept, purpose) for kept in (own, torch.cat(self._numbers)))
            order = torch.argsort(numbers, stable=True)
            numbers = numbers[order]
            first = torch.ones_like(numbers, dtype=torch.bool)
            first[1:] = numbers[1:] != numbers[:-1]
            rows = rows[order[first]]
        if self._wanted.moments:
            moments = joined(list(ranks.all_gather_rows(self._moments[None], purpose)))
        return Features(rows=rows, moments=moments)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The packed moments of all parts, joined as a balanced tree."""
    while len(parts) > 1:
        parts = [
            join_moments(*pair) if len(pair) == 2 else pair[0]
            for pair in (parts[i : i + 2] for i in range(0, len(parts), 2))
        ]
    return parts[0]
