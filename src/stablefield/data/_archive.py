"""A .zip archive, read entry by entry and never unpacked to disk.

It reads stored and deflated entries only: Python's `zipfile` cannot decompress the other methods piece by piece, and 4 kB of
bzip2 may expand to 4 GB. Errors name the archive.
"""

import io
import stat
import zipfile
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, Self

from stablefield._regular_file import open_regular

__all__ = ["Archive", "EntryFile", "Readable", "is_archive"]

READ = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
FOREIGN_SYSTEM = 3
"""The `create_system` of entries whose attributes hold a Unix mode."""


def is_archive(path: Path) -> bool:
    """Whether the file at `path` is a .zip archive, or begins like one."""
    with open_regular(path) as file:
        head = file.read(4)
        try:
            return zipfile.is_zipfile(file) or head == b"PK\x03\x04"
        except Exception:
            return head == b"PK\x03\x04"


class Readable(Protocol):
    """A stream of bytes, read from start to end."""

    def read(self, size: int = -1, /) -> bytes:
        """Read up to `size` bytes, or all that are left."""
        ...


class EntryFile(io.RawIOBase):
    """The bytes of one entry from its start on; made by `Archive.open`.

    Args:
        name: archive and entry, for messages.
        size: its size in bytes, according to the archive.
        file: the open entry; closing this object closes it.
    """

    def __init__(self, name: str, size: int, file: IO[bytes]) -> None:
        super().__init__()
        self.name = name
        self.size = size
        self._file = file

    def readable(self) -> bool:
        """Always."""
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to `size` bytes, or all that are left.

        Raises:
            ValueError: if the archive is damaged.
        """
        try:
            return self._file.read(-1 if size is None else size)
        except Exception as error:
            raise ValueError(
                f"{self.name} is cut short or damaged ({_short(error)}): make the archive again."
            ) from error

    def close(self) -> None:
        """Close the entry, not the archive."""
        self._file.close()
        super().close()


class Archive:
    """An open archive; a context manager.

    Args:
        path: the file.

    Raises:
        ValueError: if it is not a regular file, cannot be read, or is not a complete archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open_regular(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
        try:
            self._archive = zipfile.ZipFile(self._file)
        except Exception as error:
            # Damage raises a dozen kinds of error: struct.error, UnicodeDecodeError, NotImplementedError, ...
            self._file.close()
            raise ValueError(
                f"{path} is not a complete .zip archive, cut short or damaged ({_short(error)}): copy or make it again."
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._archive.close()
        self._file.close()

    @property
    def entries(self) -> list[zipfile.ZipInfo]:
        """What is in the archive, in its order."""
        return self._archive.infolist()

    def open(self, entry: zipfile.ZipInfo) -> EntryFile:
        """Open an entry for reading its bytes once.

        Raises:
            ValueError: if it cannot be read, or is not a file.
        """
        name = f"{self.path}: the entry {entry.filename!r}"
        mode = entry.external_attr >> 16 if entry.create_system == FOREIGN_SYSTEM else 0
        if entry.flag_bits & 1:
            raise ValueError(f"{name} is encrypted: unpack the archive and use the folder.")
        if entry.compress_type not in READ:
            raise ValueError(
                f"{name} is compressed by method {entry.compress_type}, neither stored nor deflated: make the archive again."
            )
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise ValueError(f"{name} is a link or a device: only regular files are read; make the archive again.")
        try:
            return EntryFile(name, entry.file_size, self._archive.open(entry))
        except Exception as error:
            raise ValueError(f"{name} is cut short or damaged ({_short(error)}): make the archive again.") from error


def _short(error: Exception) -> str:
    """The error's text, shortened because some of Python's errors quote many bytes."""
    text = str(error) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
