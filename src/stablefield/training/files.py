"""Files that are there whole or not at all: written under a temporary name, synced, and renamed."""

import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["sync", "write_whole"]


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under a temporary name beside `path`, and give it its name when it is on the disk.

    Raises:
        OSError: if it cannot be written; nothing is left behind, and a file of that name stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
