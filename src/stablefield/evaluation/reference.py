"""The reference set: real images, or as many of them as are wanted, as an extractor sees them, measured once and kept.

What is kept lies in the cache folder under a name made from the protocol record of the set (extractor, its hash, resize
rule, pixels' checksum, split, count), and is checked against that record and its own checksum when it is used again; a file
that does not pass is named in a warning and made anew. The files may be deleted at any time. Rows of a subset are drawn
without replacement from the whole set with a fixed seed, and kept in its order: sets are often sorted by class, so the
first rows would not do.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stablefield.data.image_set import ImageSet
from stablefield.evaluation.extractor import Extractor
from stablefield.evaluation.feature_pass import Batch, Features, Lens, extract, set_batches
from stablefield.evaluation.frechet import Gaussian, fit_moments
from stablefield.evaluation.neighbours import Neighbours
from stablefield.evaluation.processes import Processes
from stablefield.evaluation.protocol import Protocol, ProtocolWarning
from stablefield.evaluation.reference_cache import load_features, load_statistics, save_features, save_statistics

__all__ = ["DamagedCacheWarning", "Progress", "Reference", "ReferenceSet", "is_kept", "measure_reference", "told"]

Progress = Callable[[str, float, float], object]
"""Told what is being done, how much of it is done, and how much there is."""

_SUBSET_SEED = 0


class DamagedCacheWarning(UserWarning):
    """A file of kept features cannot be used and is made anew."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A reference set as one extractor sees it."""

    name: str
    """What the set is called."""
    sha256: str
    """Checksum of the whole set's pixels, from its manifest."""
    split: str
    """Which part of the data, and which subset of that."""
    features: Features
    """What was kept of its features."""
    near: Neighbours = field(default_factory=Neighbours)
    """Of its rows."""

    @cached_property
    def gaussian(self) -> Gaussian | None:
        """The Gaussian of its moments, if those were kept."""
        moments = self.features.statistics
        return None if moments is None else fit_moments(moments.mean, moments.covariance, 2)


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceSet:
    """Real images to measure against, before an extractor has seen them.

    Raises:
        ValueError: if more images are wanted than there are, or fewer than 2.
    """

    images: ImageSet
    """All of them."""
    split: str
    """Which part of the data they are."""
    count: int | None = None
    """How many to use; all if None."""

    def __post_init__(self) -> None:
        if self.count is not None and not 2 <= self.count <= len(self.images):
            raise ValueError(
                f"{self.count} reference images are wanted, and {self.images.name} has {len(self.images)}: "
                "ask for 2 to as many as there are."
            )

    def __len__(self) -> int:
        return len(self.images) if self.count is None else self.count

    @property
    def rows(self) -> NDArray[np.int64]:
        """Which images, shape (count,), in increasing order."""
        n = len(self.images)
        if len(self) == n:
            return np.arange(n)
        return np.sort(np.random.default_rng(_SUBSET_SEED).choice(n, len(self), replace=False))

    @property
    def part(self) -> str:
        """The split, and which subset of it, in words."""
        if len(self) == len(self.images):
            return self.split
        return f"{self.split}, {len(self)} of {len(self.images)} (seed {_SUBSET_SEED})"

    def protocol(self, extractor: Extractor, commit: str | None = None) -> Protocol:
        """The record of its features, made by the code of `commit`."""
        return Protocol(
            metric="reference statistics",
            extractor=extractor.name,
            extractor_sha256=extractor.sha256,
            resize=extractor.resize,
            sample_count=len(self),
            reference=self.images.name,
            reference_sha256=str(self.images.manifest["sha256"]),
            reference_count=len(self),
            split=self.part,
            commit=commit,
        )


def measure_reference(
    reference: ReferenceSet,
    lens: Lens,
    *,
    batch: int,
    cache: Path | None = None,
    commit: str | None = None,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> Reference:
    """Features of a reference set, from the cache if they are there.

    Args:
        reference: the images.
        lens: the extractor, and what is needed of its features.
        batch: images at a time.
        cache: folder of kept features; None neither reads nor writes any.
        commit: of the code that runs, for the record of what is kept.
        processes: those that share the work; each calls this. Without them this process does it alone.
        progress: told of every batch.

    Raises:
        ValueError: if the extractor refuses the images or returns NaN.

    Warns:
        ProtocolWarning: if features were kept by the code of another commit.
        DamagedCacheWarning: if kept features are damaged; the file is named, and made anew.
    """
    processes = processes or Processes()
    protocol = reference.protocol(lens.extractor, commit)
    found = _read(cache, protocol, lens) if cache is not None and is_kept(reference, lens, cache) else None
    if not processes.all(found is not None) or found is None:
        rows = reference.rows
        batches = set_batches(reference.images.images, rows, batch, processes)
        what = f"{lens.extractor.name}: {reference.images.name}"
        watched = told(batches, what, len(rows), progress, processes.count)
        (found,) = extract(watched, [lens], "reference image", source_only=processes.count == 1)
        if cache is not None and processes.first:
            _write(cache, protocol, found)
    return Reference(name=protocol.reference, sha256=protocol.reference_sha256, split=protocol.split, features=found)


def is_kept(reference: ReferenceSet, lens: Lens, cache: Path | None) -> bool:
    """Whether the features of a reference set lie in the cache, sound or not; arguments as of `measure_reference`."""
    if cache is None:
        return False
    moments, rows = _paths(cache, reference.protocol(lens.extractor))
    return all(path.exists() for path, wanted in ((moments, lens.moments), (rows, lens.rows)) if wanted)


def told(
    batches: Iterator[Batch], what: str, total: int, progress: Progress | None, processes: int = 1
) -> Iterator[Batch]:
    """The same batches; `progress` hears of each once it has been used."""
    done = 0
    for images, numbers in batches:
        yield images, numbers
        done += len(numbers)
        if progress is not None:
            # The other processes are about as far.
            progress(what, min(done * processes, total), total)


def _paths(cache: Path, protocol: Protocol) -> tuple[Path, Path]:
    # Without the commit: features of an earlier one are used, with a warning.
    record = replace(protocol.of_reference(), commit=None).to_json()
    key = hashlib.sha256(record.encode()).hexdigest()[:20]
    return cache / f"reference-{key}.moments.safetensors", cache / f"reference-{key}.features.safetensors"


def _read(cache: Path, protocol: Protocol, lens: Lens) -> Features | None:
    moments, rows = _paths(cache, protocol)
    try:
        statistics = load_statistics(moments, protocol) if lens.moments else None
        with warnings.catch_warnings():
            if lens.moments:
                # Both files were written together: one warning is enough.
                warnings.simplefilter("ignore", ProtocolWarning)
            features = load_features(rows, protocol) if lens.rows else None
    except ValueError as error:
        warnings.warn(f"{error} It is made anew now.", DamagedCacheWarning, stacklevel=3)
        return None
    return Features(count=protocol.reference_count, rows=features, statistics=statistics)


def _write(cache: Path, protocol: Protocol, features: Features) -> None:
    moments, rows = _paths(cache, protocol)
    # A cache that cannot be written costs time, not a result.
    with suppress(OSError):
        if features.statistics is not None:
            save_statistics(moments, features.statistics, protocol)
        if features.rows is not None:
            save_features(rows, features.rows, protocol)
