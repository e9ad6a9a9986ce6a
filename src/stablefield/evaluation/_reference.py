"""Reference images: the features of real images, or of a subset, computed once and cached.

A file of the cache folder is safetensors with the packed `moments` of features (see `_features`) or the `rows` themselves.
Its metadata hold the record of the set (extractor, its hash, resize rule, pixels' checksum, split, count), the commit, one
number for each of the first images' features, and a checksum over all of it. The file's name comes from the record, and a
file serves only that record: other weights, another resize rule or another set is an error, since the number would be wrong
without looking wrong; so is a wrong checksum. An extractor whose hash stayed the same when its features changed is found by
the first images, which are extracted each time. Another commit is a warning.
`measure_reference` names a bad file in a warning and recomputes it. You may delete the files at any time.

A subset is a random draw without replacement from the whole set with a fixed seed, in the set's order: sets are often sorted
by class, so the first rows would be biased.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

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
from stablefield.evaluation._metric import Features

__all__ = [
    "DamagedCacheWarning", "ProtocolWarning", "ReferenceSet", "is_kept", "load_tensor", "measure_reference", "save_tensor",
]  # fmt: skip

Kind = Literal["rows", "moments"]

_SUBSET_SEED = 0
# Images whose features are compared with the cached ones, and by how much these may differ: between devices and batches
# float32 and TensorFloat-32 differ by less than a thousandth.
FIRST, _TOLERANCE = 8, 5e-3


class ProtocolWarning(UserWarning):
    """Cached features of real images come from another commit of the code."""


class DamagedCacheWarning(UserWarning):
    """A file of cached features is unusable and is recomputed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceSet:
    """Real images to measure against, without features.

    Raises:
        ValueError: if `count` is below 2 or above the number of images.
    """

    images: ImageSet
    """All images."""
    split: str
    """Name of their split of the data."""
    count: int | None = None
    """Number of images to use; all if None."""
    chosen: NDArray[np.int64] | None = None
    """Indices of the images to use instead, in increasing order."""
    choice: str = ""
    """What is chosen, for the record."""
    mirrored: bool = False
    """Whether the mirror images of those to use count, too."""

    def __post_init__(self) -> None:
        if self.count is not None and not 2 <= self.count <= len(self.images):
            raise ValueError(
                f"references={self.count}: {self.images.name} has {len(self.images)} images; pass 2 to "
                f"{len(self.images)}."
            )

    def __len__(self) -> int:
        return self._plain * (2 if self.mirrored else 1)

    @property
    def _plain(self) -> int:
        """How many there are without mirror images."""
        if self.chosen is not None:
            return len(self.chosen)
        return len(self.images) if self.count is None else self.count

    @property
    def rows(self) -> NDArray[np.int64]:
        """Indices of the images to use, shape (count,), in increasing order."""
        if self.chosen is not None:
            return self.chosen
        n = len(self.images)
        if self._plain == n:
            return np.arange(n)
        return np.sort(np.random.default_rng(_SUBSET_SEED).choice(n, self._plain, replace=False))

    def batches(
        self,
        batch: int,
        ranks: Ranks | None = None,
        progress: Callable[[Progress], object] | None = None,
        stage: str = "",
    ) -> Iterator[Batch]:
        """This process's share of the images to use, and then of their mirror images; arguments as for `image_batches`."""
        yield from image_batches(self.images.images, self.rows, batch, ranks, progress, stage)
        if not self.mirrored:
            return
        for rows, numbers in image_batches(np.arange(len(self.images)), self.rows, batch, ranks, progress, stage):
            # Latents of mirrored images are drawn, in each batch from another seed.
            mirrored = self.images.mirror_images(rows.numpy(), int(numbers[0]))
            yield torch.from_numpy(mirrored), self._plain + numbers

    def record(self, extractor: Extractor) -> dict[str, Any]:
        """All that the features depend on: the fields of `Protocol` for real images."""
        n, count, choice = len(self.images), self._plain, self.choice or f"seed {_SUBSET_SEED}"
        if self.chosen is not None:
            choice += f", indices {hashlib.sha256(self.chosen.astype(np.int64).tobytes()).hexdigest():.8}"
        return {
            "extractor": extractor.name,
            "extractor_sha256": extractor.sha256,
            "resize": extractor.resize,
            "reference": self.images.name,
            "reference_sha256": str(self.images.manifest["sha256"]),
            "reference_count": len(self),
            "split": (self.split if count == n else f"{self.split}, {count} of {n} ({choice})")
            + (", with the mirror images" if self.mirrored else ""),
        }


def measure_reference(
    reference: ReferenceSet,
    wanted: ExtractorPass,
    *,
    batch: int,
    cache: Path | None = None,
    commit: str = "",
    ranks: Ranks | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> Features:
    """Features of a reference set, from the cache if possible.

    Args:
        reference: the images.
        wanted: the extractor, and which of its results to keep.
        batch: images at a time.
        cache: folder of cached features; None for no cache.
        commit: commit of the running code, for the record.
        ranks: the processes that share the work; each calls this. None for this process alone.
        progress: called after every batch.

    Raises:
        ValueError: if the extractor rejects the images or returns NaN.
        ImportError: if there is a cache, and safetensors is not installed.

    Warns:
        ProtocolWarning: if cached features come from another commit of the code.
        DamagedCacheWarning: if cached features are damaged; names the file, which is recomputed.
    """
    ranks = ranks or Ranks()
    record = reference.record(wanted.extractor)
    paths = _paths(cache, record, wanted)
    found: dict[Kind, tuple[Tensor, str]] = {}
    if is_kept(reference, wanted, cache):
        first = _fingerprint(reference, wanted.extractor)
        try:
            found = {kind: load_tensor(path, kind, record, first) for kind, path in paths.items()}
        except ValueError as error:
            warnings.warn(f"{error} It is recomputed now.", DamagedCacheWarning, stacklevel=2)
    if ranks.all(bool(found), "to look for cached features"):
        for made in {made for _, made in found.values()} - {commit}:
            text = f"cached features of {reference.images.name} in {cache}: made by another commit, {made!r} not {commit!r}."
            warnings.warn(text, ProtocolWarning, stacklevel=2)
        kept = {kind: tensor for kind, (tensor, _) in found.items()}
        return Features(rows=kept.get("rows"), moments=kept.get("moments"))
    stage = f"{wanted.extractor.name}: {reference.images.name}"
    batches = reference.batches(batch, ranks, progress, stage)
    (features,) = extract(batches, [wanted], "reference image", ranks=ranks)
    # A failed write to the cache costs time, not a result.
    with suppress(OSError):
        first = _fingerprint(reference, wanted.extractor) if paths and ranks.first else []
        for kind, path in paths.items() if ranks.first else ():
            tensor = features.rows if kind == "rows" else features.moments
            if tensor is not None:
                save_tensor(path, kind, tensor, record, commit, first)
    return features


def _fingerprint(reference: ReferenceSet, extractor: Extractor) -> list[float]:
    """One number for each of the first images: the product of its features with a fixed vector."""
    rows = reference.rows[:FIRST]
    batches = image_batches(reference.images.images, rows, FIRST)
    (features,) = extract(batches, [ExtractorPass(extractor=extractor, moments=False)], "reference image")
    direction = np.random.default_rng(0).standard_normal(extractor.dim) / extractor.dim**0.5
    return (features.matrix().double() @ torch.from_numpy(direction)).tolist()


def is_kept(reference: ReferenceSet, wanted: ExtractorPass, cache: Path | None) -> bool:
    """Whether the cache has files for a reference set, intact or not; arguments as for `measure_reference`."""
    paths = _paths(cache, reference.record(wanted.extractor), wanted)
    return bool(paths) and all(path.exists() for path in paths.values())


def save_tensor(
    path: Path, kind: Kind, tensor: Tensor, record: Mapping[str, Any], commit: str = "", first: Sequence[float] = ()
) -> None:
    """Write the features of a reference set; readers see the old file or the new one, never a part.

    Args:
        path: the file; creates its folder.
        kind: kind of the tensor.
        tensor: the packed moments, or the rows, of the whole set.
        record: all that they depend on, see `ReferenceSet.record`.
        commit: commit of the code that computed them.
        first: one number for each of the first images' features.
    """
    from safetensors.torch import save

    kept = tensor.contiguous()
    metadata = {"record": json.dumps(record), "commit": commit, "first": json.dumps(list(first))}
    content = save({kind: kept}, metadata=metadata | {"sha256": _checksum(kept, metadata)})
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def load_tensor(path: Path, kind: Kind, record: Mapping[str, Any], first: Sequence[float] = ()) -> tuple[Tensor, str]:
    """Read a tensor that `save_tensor` wrote, and its commit; arguments as there, for the new measurement.

    Raises:
        ValueError: if the file is missing or damaged, has another record, or the first images had other features.
    """
    from safetensors import SafetensorError, safe_open

    try:
        check_safetensors(path)
        with safe_open(path, framework="pt") as file:
            metadata, tensor = dict(file.metadata() or {}), file.get_tensor(kind)
        checksum = metadata.pop("sha256", "none")
        found, made = json.loads(metadata["record"]), metadata["commit"]
        before = np.array(json.loads(metadata["first"]), np.float64)
    except (SafetensorError, KeyError, ValueError, TypeError, OSError, RecursionError) as error:
        raise ValueError(
            f"{path} holds no reference statistics ({reason(error)}): delete it and compute them again."
        ) from error
    again = "delete it and compute the statistics again."
    if checksum != _checksum(tensor, metadata):
        raise ValueError(f"{path} is damaged: its checksum ({checksum:.12}) does not match its content; {again}")
    if found != record:
        names = ", ".join(name for name in record if not isinstance(found, dict) or found.get(name) != record[name])
        raise ValueError(f"{path} holds other reference statistics than this measurement needs ({names}): {again}")
    now = np.array(first, np.float64)
    if before.shape != now.shape or (np.abs(before - now) > _TOLERANCE * np.abs(now).max(initial=0)).any():
        raise ValueError(
            f"{path} holds other features of the first images than {record['extractor']} gives now, under the same sha256: "
            f"give an extractor the hash of its weights and of its preprocessing, or evaluate with cache=False; {again}"
        )
    count = len(tensor) if kind == "rows" else tensor.flatten()[:1].sum()
    if tensor.ndim != 2 or count != record["reference_count"] or not torch.isfinite(tensor).all():
        raise ValueError(f"{path} contradicts its own record, or holds NaN or infinite numbers: {again}")
    return tensor, made


def _paths(cache: Path | None, record: Mapping[str, Any], wanted: ExtractorPass) -> dict[Kind, Path]:
    """The files for the wanted features; empty without a cache.

    Raises:
        ImportError: if there is a cache, and safetensors is not installed.
    """
    if cache is None:
        return {}
    if find_spec("safetensors") is None:
        raise ImportError(
            "cached features of images need safetensors: pip install 'stablefield[evaluate]', or pass cache=False.",
            name="safetensors",
        )
    # Without the commit: features of an earlier one serve, with a warning.
    key = hashlib.sha256(json.dumps(record).encode()).hexdigest()[:20]
    kinds: dict[Kind, bool] = {"moments": wanted.moments, "rows": wanted.rows}
    return {kind: cache / f"reference-{key}.{kind}.safetensors" for kind, needed in kinds.items() if needed}


def _checksum(tensor: Tensor, metadata: Mapping[str, str]) -> str:
    """The checksum of a file's content: type, shape and bytes of the tensor, and the other metadata."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
