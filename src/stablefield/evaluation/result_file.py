"""A file of results: JSON, every number with its protocol.

{"format": 1, "subject": "runs/digits-stf", "results": [{"values": [...], "protocol": {...}, ...}, ...], "checksum": "..."}

The checksum covers the other entries, not their layout.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stablefield.atomic_file import write_atomically
from stablefield.evaluation.result import Result
from stablefield.regular_file import JSON_LIMIT, open_regular, reason

__all__ = ["read_results", "write_results"]

_FORMAT = 1


def write_results(path: str | Path, subject: str, results: Sequence[Result]) -> Path:
    """Write results; readers see the old file or the new one, never a part.

    Args:
        path: the file; its folder is made if need be.
        subject: what was measured.
        results: at least one.

    Returns:
        The path.
    """
    path = Path(path)
    record: dict[str, Any] = {"format": _FORMAT, "subject": subject, "results": [one.to_dict() for one in results]}
    record["checksum"] = _checksum(record)
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))
    return path


def read_results(path: str | Path) -> tuple[str, list[Result]]:
    """Read the subject and the results of a file.

    Raises:
        ValueError: if there is no such file, it is damaged or of another format, or a record is not valid.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            text = file.read(JSON_LIMIT + 1)
        if len(text) > JSON_LIMIT:
            raise ValueError(f"it has more than {JSON_LIMIT:,} bytes")
        record = json.loads(text)
        if record["format"] != _FORMAT:
            raise ValueError(f"its format is {record['format']}, this version reads {_FORMAT}")
        found = record.pop("checksum", None)
        # Files from before they carried one have these entries and no other.
        if found != _checksum(record) and (found is not None or set(record) != {"format", "subject", "results"}):
            raise ValueError("it is damaged: its checksum is not that of its content")
        return str(record["subject"]), [Result.from_dict(result) for result in record["results"]]
    # Besides what is missing or of another type: numbers beyond float64, and lists within lists a thousand deep.
    except (OSError, KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        told = (error.strerror or error) if isinstance(error, OSError) else reason(error)
        raise ValueError(f"{path} holds no results ({told}): name a file that `stablefield evaluate` wrote.") from error


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
