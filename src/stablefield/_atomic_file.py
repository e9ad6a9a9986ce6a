"""Atomic writes: a file appears under its name complete, or not at all."""

import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["sync", "write_atomically"]


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk. Windows cannot sync folders."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under a temporary name beside `path`, and rename it to `path` when it is on disk.

    Raises:
        OSError: if it cannot be written; leaves nothing behind, and an existing file unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes that write the same file use different temporary files.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # left by a kill, or a link or FIFO that must not be written to
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
