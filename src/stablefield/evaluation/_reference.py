"""Reference images: real images, or as many of them as are wanted, as an extractor sees them, measured once and kept.

What is kept lies in the cache folder, in safetensors files that hold `mean` (d,) and `covariance` (d, d) in float64, or
`features` (n, d) in float32, and in their metadata the count, the protocol record of the set (extractor, its hash, resize
rule, pixels' checksum, split, count) and a checksum over all of it. The name of a file is made from that record, and a file
is read only for it: other weights, another resize rule or another set is an error, since the number would be wrong without
looking wrong, and so is a checksum that does not agree. Another commit, or the same thing under another name, is a warning.
A file that does not pass is named in a warning and made anew. The files may be deleted at any time.

Rows of a subset are drawn without replacement from the whole set with a fixed seed, and kept in its order: sets are often
sorted by class, so the first rows would not do.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield._atomic_file import write_atomically
from stablefield._distributed import Ranks
from stablefield._progress import Progress
from stablefield._regular_file import check_safetensors, reason
from stablefield.data._image_set import ImageSet
from stablefield.evaluation._extraction import Batch, ExtractorPass, extract, image_batches
from stablefield.evaluation._extractor import Extractor
from stablefield.evaluation._features import Statistics
from stablefield.evaluation._metric import Features
from stablefield.evaluation._protocol import (
    REFERENCE_FIELDS,
    DamagedCacheWarning,
    Protocol,
    ProtocolWarning,
    differences,
)

__all__ = [
    "ReferenceSet", "is_kept", "load_tensors", "measure_reference", "reporting", "save_tensors",
]  # fmt: skip

_SUBSET_SEED = 0
_MOMENTS, _ROWS = ("mean", "covariance"), ("features",)
# Fields that may differ between what is kept and what is wanted, with a warning.
_NAMES = ("extractor", "reference")


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
                f"references={self.count}: {self.images.name} has {len(self.images)} images; ask for 2 to as many as there "
                "are."
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

    def protocol(self, extractor: Extractor, commit: str | None = None) -> Protocol:
        """The record of its features, made by the code of `commit`."""
        n = len(self.images)
        part = self.split if len(self) == n else f"{self.split}, {len(self)} of {n} (seed {_SUBSET_SEED})"
        return Protocol(
            metric="reference statistics",
            extractor=extractor.name,
            extractor_sha256=extractor.sha256,
            resize=extractor.resize,
            sample_count=len(self),
            reference=self.images.name,
            reference_sha256=str(self.images.manifest["sha256"]),
            reference_count=len(self),
            split=part,
            commit=commit,
        )


def measure_reference(
    reference: ReferenceSet,
    wanted: ExtractorPass,
    *,
    batch: int,
    cache: Path | None = None,
    commit: str | None = None,
    ranks: Ranks | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> Features:
    """Features of a reference set, from the cache if they are there.

    Args:
        reference: the images.
        wanted: the extractor, and what is needed of its features.
        batch: images at a time.
        cache: folder of kept features; None neither reads nor writes any.
        commit: of the code that runs, for the record of what is kept.
        ranks: the processes that share the work; each calls this. Without them this process does it alone.
        progress: called after every batch.

    Raises:
        ValueError: if the extractor refuses the images or returns NaN.

    Warns:
        ProtocolWarning: if features were kept by the code of another commit.
        DamagedCacheWarning: if kept features are damaged; the file is named, and made anew.
    """
    ranks = ranks or Ranks()
    protocol = reference.protocol(wanted.extractor, commit)
    found = _read(cache, protocol, wanted) if cache is not None and is_kept(reference, wanted, cache) else None
    if not ranks.all(found is not None, "to look for kept features") or found is None:
        rows = reference.rows
        batches = image_batches(reference.images.images, rows, batch, ranks)
        stage = f"{wanted.extractor.name}: {reference.images.name}"
        reported = reporting(batches, stage, len(rows), progress, ranks.world_size)
        (found,) = extract(reported, [wanted], "reference image", local=ranks.world_size == 1)
        if cache is not None and ranks.first:
            _write(cache, protocol, found)
    return found


def is_kept(reference: ReferenceSet, wanted: ExtractorPass, cache: Path | None) -> bool:
    """Whether the features of a reference set lie in the cache, sound or not; arguments as of `measure_reference`."""
    if cache is None:
        return False
    moments, rows = _paths(cache, reference.protocol(wanted.extractor))
    return all(path.exists() for path, needed in ((moments, wanted.moments), (rows, wanted.rows)) if needed)


def reporting(
    batches: Iterator[Batch],
    stage: str,
    total: int,
    progress: Callable[[Progress], object] | None,
    processes: int = 1,
) -> Iterator[Batch]:
    """The same batches; `progress` is called once each has been used."""
    done = 0
    for images, numbers in batches:
        yield images, numbers
        done += len(numbers)
        if progress is not None:
            # The other processes are about as far.
            progress(Progress(stage=stage, done=min(done * processes, total), total=total))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], count: int, protocol: Protocol) -> None:
    """Write what was found of a reference set; readers see the old file or the new one, never a part.

    Args:
        path: the file; its folder is made if need be.
        tensors: mean and covariance, or features.
        count: images that they are of: all `protocol.reference_count` of them.
        protocol: what they are of; only the part of it that concerns the reference set is kept.

    Raises:
        ValueError: if the count disagrees with the record.
        ImportError: if safetensors is not installed.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise _missing() from error
    if count != protocol.reference_count:
        raise ValueError(
            f"statistics are of {count} rows, protocol.reference_count is {protocol.reference_count}: "
            "they must be of the whole reference set, each image once."
        )
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"count": str(count), "protocol": protocol.of_reference().to_json()}
    content = save(kept, metadata=metadata | {"sha256": _checksum(kept, metadata)})
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def load_tensors(path: Path, names: Sequence[str], expected: Protocol) -> list[Tensor]:
    """Read what `save_tensors` has written.

    Args:
        path: the file.
        names: of the tensors; their first dimensions agree, and are the count for "features".
        expected: the protocol of the measurement to come.

    Raises:
        ValueError: if there is no such file, it is damaged, or it was made with other weights, another resize rule or
            of another reference set, split or count.
        ImportError: if safetensors is not installed.

    Warns:
        ProtocolWarning: if the commit, or the name of the extractor or of the reference set, differs.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise _missing() from error
    if not path.is_file():
        raise ValueError(f"there is no file {path}: compute the reference statistics first.")
    try:
        check_safetensors(path)
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = [file.get_tensor(name) for name in names]
        found = metadata.pop("sha256", None)
        count, protocol = int(metadata["count"]), Protocol.from_json(metadata["protocol"])
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise ValueError(
            f"{path} holds no reference statistics ({reason(error)}): delete it and compute them again."
        ) from error
    again = "delete it and compute the statistics again."
    if found != _checksum(dict(zip(names, tensors, strict=True)), metadata):
        what = "has no checksum" if found is None else "is damaged: its checksum does not agree with what it holds"
        raise ValueError(f"{path} {what}; {again}")
    _compare(path, protocol, expected)
    shapes = [tuple(tensor.shape) for tensor in tensors]
    fits = len(shapes[0]) == 2 and shapes[0][0] == count if tuple(names) == _ROWS else shapes[1:] == [shapes[0] * 2]
    if count != protocol.reference_count or not fits:
        raise ValueError(f"{path} contradicts its own record: {again}")
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise ValueError(f"{path} holds NaN or infinite numbers: {again}")
    return tensors


def _paths(cache: Path, protocol: Protocol) -> tuple[Path, Path]:
    # Without the commit: features of an earlier one are used, with a warning.
    record = replace(protocol.of_reference(), commit=None).to_json()
    key = hashlib.sha256(record.encode()).hexdigest()[:20]
    return cache / f"reference-{key}.moments.safetensors", cache / f"reference-{key}.features.safetensors"


def _read(cache: Path, protocol: Protocol, wanted: ExtractorPass) -> Features | None:
    path, rows_path = _paths(cache, protocol)
    statistics = rows = None
    try:
        if wanted.moments:
            mean, covariance = load_tensors(path, _MOMENTS, protocol)
            statistics = Statistics(count=protocol.reference_count, mean=mean, covariance=covariance)
        with warnings.catch_warnings():
            if wanted.moments:
                # Both files were written together: one warning is enough.
                warnings.simplefilter("ignore", ProtocolWarning)
            if wanted.rows:
                (rows,) = load_tensors(rows_path, _ROWS, protocol)
    except ValueError as error:
        warnings.warn(f"{error} It is made anew now.", DamagedCacheWarning, stacklevel=3)
        return None
    return Features(count=protocol.reference_count, rows=rows, statistics=statistics)


def _write(cache: Path, protocol: Protocol, features: Features) -> None:
    path, rows_path = _paths(cache, protocol)
    found = features.statistics
    # A cache that cannot be written costs time, not a result.
    with suppress(OSError):
        if found is not None:
            tensors = {"mean": found.mean.double(), "covariance": found.covariance.double()}
            save_tensors(path, tensors, found.count, protocol)
        if features.rows is not None:
            save_tensors(rows_path, {"features": features.rows.float()}, len(features.rows), protocol)


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Of all that a file holds: names, types, shapes and bytes of the tensors, and the rest of the metadata."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _compare(path: Path, cached: Protocol, expected: Protocol) -> None:
    found = differences(cached, expected.of_reference())
    refused = [str(one) for one in found if one.field in REFERENCE_FIELDS and one.field not in _NAMES]
    if refused:
        raise ValueError(
            f"{path} holds other reference statistics than this measurement needs ({'; '.join(refused)}): "
            "compute them for it, in a file of their own."
        )
    if found:
        listed = "; ".join(str(difference) for difference in found)
        warnings.warn(f"{path} was made under a slightly different protocol: {listed}.", ProtocolWarning, stacklevel=4)


def _missing() -> ImportError:
    return ImportError(
        "cached reference statistics need safetensors: pip install 'stablefield[evaluate]'.", name="safetensors"
    )
