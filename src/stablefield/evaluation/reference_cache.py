"""Cached reference statistics: a safetensors file with the protocol record inside.

The file holds `mean` (d,) and `covariance` (d, d), float64, and in its metadata the count, the record of what they
are statistics of, and a checksum over all of it. It is read only for that record: other weights, another resize rule or
another reference set is an error, since the number would be wrong without looking wrong, and so is a checksum that does not
agree. Another commit, or the same thing under another name, is a warning.
"""

import hashlib
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor

from stablefield.atomic_file import write_atomically
from stablefield.evaluation.protocol import REFERENCE_FIELDS, Protocol, ProtocolWarning, differences
from stablefield.evaluation.statistics import Statistics
from stablefield.regular_file import check_safetensors, reason

__all__ = ["load_features", "load_statistics", "save_features", "save_statistics"]

_NAMES = ("extractor", "reference")


def save_statistics(path: str | Path, statistics: Statistics, protocol: Protocol) -> None:
    """Write reference statistics; readers see the old file or the new one, never a part.

    Args:
        path: the file; its folder is made if need be.
        statistics: of the features of all `protocol.reference_count` reference images.
        protocol: what they are of; only the part of it that concerns the reference set is kept.

    Raises:
        ValueError: if the count disagrees with the record.
        ImportError: if safetensors is not installed.
    """
    tensors = {"mean": statistics.mean.double(), "covariance": statistics.covariance.double()}
    _save(Path(path), tensors, statistics.count, protocol)


def save_features(path: str | Path, features: Tensor, protocol: Protocol) -> None:
    """Write the features of a reference set, shape (n, d), as float32; otherwise as `save_statistics`."""
    _save(Path(path), {"features": features.float()}, len(features), protocol)


def _save(path: Path, tensors: dict[str, Tensor], count: int, protocol: Protocol) -> None:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise _missing() from error
    if count != protocol.reference_count:
        raise ValueError(
            f"statistics are of {count} rows, protocol.reference_count is {protocol.reference_count}: "
            "they must be of the whole reference set, each image once."
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"count": str(count), "protocol": protocol.of_reference().to_json()}
    content = save(tensors, metadata=metadata | {"sha256": _checksum(tensors, metadata)})
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def load_statistics(path: str | Path, expected: Protocol) -> Statistics:
    """Read reference statistics that `expected` is to be measured against.

    Args:
        path: the file.
        expected: the protocol of the measurement to come.

    Raises:
        ValueError: if there is no such file, it is damaged, or it was made with other weights, another resize rule or
            of another reference set, split or count.
        ImportError: if safetensors is not installed.

    Warns:
        ProtocolWarning: if the commit, or the name of the extractor or of the reference set, differs.
    """
    path = Path(path)
    (mean, covariance), count = _load(path, ("mean", "covariance"), expected)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{path} contradicts its own record: delete it and compute the statistics again.")
    return Statistics(count=count, mean=mean, covariance=covariance)


def load_features(path: str | Path, expected: Protocol) -> Tensor:
    """Read the features of a reference set, shape (n, d), float32; errors and warnings as `load_statistics`."""
    path = Path(path)
    (features,), count = _load(path, ("features",), expected)
    if features.ndim != 2 or len(features) != count:
        raise ValueError(f"{path} contradicts its own record: delete it and compute the features again.")
    return features


def _load(path: Path, names: tuple[str, ...], expected: Protocol) -> tuple[list[Tensor], int]:
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
    if found != _checksum(dict(zip(names, tensors, strict=True)), metadata):
        what = "has no checksum" if found is None else "is damaged: its checksum does not agree with what it holds"
        raise ValueError(f"{path} {what}; delete it and compute the statistics again.")
    _compare(path, protocol, expected)
    if count != protocol.reference_count:
        raise ValueError(f"{path} contradicts its own record: delete it and compute the statistics again.")
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise ValueError(f"{path} holds NaN or infinite numbers: delete it and compute the statistics again.")
    return tensors, count


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Of all that a file holds: names, types, shapes and bytes of the tensors, and the rest of the metadata."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _compare(path: Path, cached: Protocol, expected: Protocol) -> None:
    found = differences(cached, expected.of_reference())
    refused = [
        str(difference)
        for difference in found
        if difference.field in REFERENCE_FIELDS and difference.field not in _NAMES
    ]
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
