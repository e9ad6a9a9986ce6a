"""Open untrusted files: regular files and nothing else.

Opening a FIFO may wait forever, a device may never run out of bytes, and a check of a path proves nothing about the file
opened there a moment later. So this opens without waiting, and then checks the kind of the open file.
"""

import errno
import hashlib
import os
import stat
import struct
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

__all__ = [
    "JSON_LIMIT",
    "NotRegularError",
    "UnreadFileError",
    "check_safetensors",
    "open_regular",
    "read_limited",
    "reason",
    "sha256",
]

JSON_LIMIT = 2**22
"""The longest JSON text that is read, in bytes: parsing it takes a second, and up to thirty times as much memory."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
# Neither wait for a writer, nor make a terminal the controlling one; flags that a system lacks are omitted.
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_BINARY", "O_CLOEXEC"))


class UnreadFileError(ValueError):
    """A file that is not read because of its kind or content.

    Attributes:
        reason: why, without the path, for a message that already names it.
    """

    def __init__(self, path: Path, fault: str) -> None:
        super().__init__(f"{path} {fault}.")
        self.reason = f"it {fault}"


class NotRegularError(UnreadFileError):
    """A path that is not a regular file."""

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__(path, f"is {kind}: only regular files are read; remove it, or put a regular file there")


def reason(error: Exception) -> str:
    """An error's text for a message that already names the file: without the path and the final full stop."""
    return error.reason if isinstance(error, UnreadFileError) else str(error).removesuffix(".")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading its bytes, or a link that ends at one.

    Args:
        path: the file.

    Returns:
        The open file, buffered, at its start.

    Raises:
        NotRegularError: if it is anything else (folder, FIFO, device, socket), at once and without opening a device.
        OSError: if it does not exist or may not be read.
    """
    _refuse(path, os.stat(path).st_mode)
    try:
        descriptor = os.open(path, _FLAGS)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):  # became a socket, or a device without a driver, since the check
            _not_regular(path, "a socket or a device")
        raise
    try:
        # The path may have changed since the first check; this check of the open file is safe.
        _refuse(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_limited(path: Path, remedy: str = "") -> bytes:
    """The bytes of a regular file of at most `JSON_LIMIT` bytes.

    Args:
        path: the file.
        remedy: what to do about a longer one, for its error.

    Raises:
        UnreadFileError: if it is longer, or not a regular file.
        OSError: if it cannot be read.
    """
    with open_regular(path) as file:
        content = file.read(JSON_LIMIT + 1)
    if len(content) > JSON_LIMIT:
        raise UnreadFileError(path, f"has more than {JSON_LIMIT:,} bytes{remedy and f': {remedy}'}")
    return content


def sha256(path: Path) -> str:
    """The checksum of a file's bytes, 64 hexadecimal digits.

    Raises:
        ValueError: if it is no regular file.
        OSError: if it cannot be read.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(cast("BufferedReader", file), "sha256").hexdigest()


def check_safetensors(path: Path) -> None:
    """Check that a file may be passed to safetensors, which would parse headers of up to 100 MB, in 20 s and 4.5 GB.

    Args:
        path: the file; safetensors itself finds out whether it is complete.

    Raises:
        UnreadFileError: if it is not a regular file, or claims a header longer than `JSON_LIMIT`.
        OSError: if it cannot be read.
    """
    with open_regular(path) as file:
        head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if length > JSON_LIMIT:
        raise UnreadFileError(path, f"claims a header of {length:,} bytes, above the limit of {JSON_LIMIT:,}")


def _refuse(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        _not_regular(path, _KINDS.get(stat.S_IFMT(mode), "no file"))


def _not_regular(path: Path, kind: str) -> NoReturn:
    link = "a link to " if path.is_symlink() else ""
    raise NotRegularError(path, f"{link}{kind}")
