"""Opening files that others made: regular files and nothing else.

A FIFO is waited for without an end, a device may never run out of bytes, and one look at a path proves nothing about what
is opened there a moment later. So the file is opened without waiting, and what came of it is asked what it is.
"""

import errno
import hashlib
import os
import stat
import struct
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

__all__ = ["JSON_LIMIT", "NotRegularError", "UnreadFileError", "check_safetensors", "open_regular", "reason", "sha256"]

JSON_LIMIT = 2**22
"""The longest text of JSON that is read, in bytes: its lists and names take a second, and up to thirty times as much memory.
"""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
# Neither wait for a writer, nor take a terminal as the process's own; the names that a system lacks mean nothing there.
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_BINARY", "O_CLOEXEC"))


class UnreadFileError(ValueError):
    """A file that is not read, for what it is.

    Attributes:
        reason: why, without the path, for a message that has named it.
    """

    def __init__(self, path: Path, said: str) -> None:
        super().__init__(f"{path} {said}.")
        self.reason = f"it {said}"


class NotRegularError(UnreadFileError):
    """A path at which there is no regular file."""

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__(path, f"is {kind}: only regular files are read; take it away, or put a regular file there")


def reason(error: Exception) -> str:
    """What an error says, for a message that has named the file: without the path, and without a full stop at its end."""
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
        if error.errno in (errno.ENXIO, errno.ENODEV):  # became a socket, or a device without a driver, since the look
            _not_regular(path, "a socket or a device")
        raise
    try:
        # It may have been put there since the look; this cannot be deceived.
        _refuse(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def sha256(path: Path) -> str:
    """The checksum of a file's bytes, 64 hexadecimal digits.

    Raises:
        ValueError: if it is no regular file.
        OSError: if it cannot be read.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(cast("BufferedReader", file), "sha256").hexdigest()


def check_safetensors(path: Path) -> None:
    """Make sure that a file may be given to safetensors, which parses headers of up to 100 MB: in 20 s and 4.5 GB.

    Args:
        path: the file; whether it is a whole safetensors file, the library finds out.

    Raises:
        UnreadFileError: if it is no regular file, or says that its header is longer than `JSON_LIMIT`.
        OSError: if it cannot be read.
    """
    with open_regular(path) as file:
        head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if length > JSON_LIMIT:
        raise UnreadFileError(path, f"says that its header has {length:,} bytes; at most {JSON_LIMIT:,} are read")


def _refuse(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        _not_regular(path, _KINDS.get(stat.S_IFMT(mode), "no file"))


def _not_regular(path: Path, kind: str) -> NoReturn:
    link = "a link to " if path.is_symlink() else ""
    raise NotRegularError(path, f"{link}{kind}")
