"""A file of results: JSON, every number with its protocol.

{"format": 1, "subject": "runs/digits-stf", "results": [{"values": [...], "protocol": {...}, ...}, ...]}
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from stablefield.evaluation.result import Result
from stablefield.regular_file import open_regular, reason

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
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"format": _FORMAT, "subject": subject, "results": [result.to_dict() for result in results]}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        unfinished.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def read_results(path: str | Path) -> tuple[str, list[Result]]:
    """Read the subject and the results of a file.

    Raises:
        ValueError: if there is no such file, it is of another format, or a record is not valid.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            record = json.loads(file.read())
        if record["format"] != _FORMAT:
            raise ValueError(f"its format is {record['format']}, this version reads {_FORMAT}")
        return str(record["subject"]), [Result.from_dict(result) for result in record["results"]]
    # Besides what is missing or of another type: numbers beyond float64, and lists within lists a thousand deep.
    except (OSError, KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        told = (error.strerror or error) if isinstance(error, OSError) else reason(error)
        raise ValueError(f"{path} holds no results ({told}): name a file that `stablefield evaluate` wrote.") from error
