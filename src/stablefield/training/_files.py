"""Safetensors files."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from stablefield._regular_file import check_safetensors

__all__ = ["read_tensors", "tensor_shapes", "write_tensors"]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, of tensors on any device and in any layout.

    Raises:
        OSError: if it cannot be written: safetensors reports a full disk as an error of its own.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    content = {name: value.detach().contiguous().cpu() for name, value in tensors.items()}
    # safetensors lets nobody but the owner read its files; a file that is opened here gets what the umask allows.
    path.open("wb").close()
    mode = path.stat().st_mode & 0o777
    try:
        save_file(content, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    path.chmod(mode)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ValueError: if it is no regular file, or no safetensors file.
        OSError: if it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_safetensors(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}.") from error


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, by name; the tensors are not read.

    Raises:
        ValueError: if it is no regular file, or no safetensors file.
        OSError: if it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    check_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}.") from error
