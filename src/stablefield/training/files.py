"""Files that are there whole or not at all: written under a temporary name, synced, and renamed."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

__all__ = ["sync", "write_tensors", "write_whole"]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, of tensors on any device and in any layout.

    Raises:
        OSError: if it cannot be written: safetensors reports a full disk as an error of its own.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    content = {name: value.detach().contiguous().cpu() for name, value in tensors.items()}
    try:
        save_file(content, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


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
