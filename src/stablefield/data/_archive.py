"""A .zip archive, read entry by entry and never unpacked to disk.

Entries that are stored or deflated are read: what the other methods give cannot be had piece by piece from Python's
`zipfile`, and 4 kB of bzip2 may stand for 4 GB. Whatever else is wrong with an archive is said with its name.
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
"""The system that entries come from whose attributes hold a mode of Unix."""


def is_archive(path: Path) -> bool:
    """Whether the file at `path` is a .zip archive, or begins like one."""
    with open_regular(path) as file:
        head = file.read(4)
        try:
            return zipfile.is_zipfile(file) or head == b"PK\x03\x04"
        except Exception:
            return head == b"PK\x03\x04"


class Readable(Protocol):
    """Whatever gives bytes from its start to its end."""

    def read(self, size: int = -1, /) -> bytes:
        """Read up to `size` bytes, or all that are left."""
        ...


class EntryFile(io.RawIOBase):
    """The bytes of one entry from its start on; made by `Archive.open`.

    Args:
        name: archive and entry, for messages.
        size: how many bytes the archive says that there are.
        file: the entry, open; closed with this.
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
        ValueError: if it is no regular file, cannot be read, or is not a whole archive.
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
                f"{path} is not a whole .zip archive, cut short or damaged ({_short(error)}): copy or make it again."
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
    """What is wrong, without the bytes that some of Python's errors quote at length."""
    text = str(error) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
