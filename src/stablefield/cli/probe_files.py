"""The folder of a probe, and its numbers in files."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stablefield.cli.console import console, relative

__all__ = ["make_folder", "print_written", "write_csv", "write_json"]


def make_folder(path: Path) -> Path:
    """Make the folder that --out means, and return it.

    Raises:
        ValueError: if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {path} cannot be written ({error.strerror}): name another folder.") from error
    return path


def write_json(path: Path, record: dict[str, Any]) -> Path:
    """Write a record, whose numbers are finite, and return the path."""
    path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def write_csv(path: Path, table: tuple[tuple[str, ...], Sequence[Sequence[float | None]]]) -> Path:
    """Write a head and its rows, None as an empty cell, and return the path."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table[0])
    writer.writerows([["" if cell is None else cell for cell in row] for row in table[1]])
    path.write_text(text.getvalue(), encoding="utf-8")
    return path


def print_written(folder: Path, written: Sequence[Path]) -> None:
    """Say which files the folder holds now."""
    console.print(f"written to {relative(folder)}: {', '.join(path.name for path in written)}")
