"""Atomic writes: a file is there whole, under its name, or not at all."""

import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["sync", "write_atomically"]


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Windows syncs no folders."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under a temporary name beside `path`, and give it its name when it is on the disk.

    Raises:
        OSError: if it cannot be written; nothing is left behind, and a file of that name stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that write the same file each have their own.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # of a kill, or no file at all, which must not be written to
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
