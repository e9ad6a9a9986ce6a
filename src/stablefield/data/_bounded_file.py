"""A file that limits how many bytes an image decoder may read.

Decoders keep what they read (text, colour profiles, whole files), however long the file claims it is, and read the same
bytes twice if it says so. Going back in an entry of an archive would unpack it again from its start, so `BoundedFile` keeps
what it has read of one, and the limit bounds that memory, too.
"""

import io
import os
from typing import BinaryIO

from stablefield.data._archive import EntryFile

__all__ = ["BoundedFile"]

PIECE = 2**20


class BoundedFile(io.RawIOBase):
    """Another file's bytes, up to a limit.

    Args:
        file: the file, at its start; it is not closed.
        limit: how many bytes may be read in total; raise it when more is known about the file.
    """

    def __init__(self, file: BinaryIO | EntryFile, limit: int) -> None:
        super().__init__()
        self._file = file
        self.limit = limit
        self._read = 0
        self._place = 0
        self._kept = bytearray()

    def seekable(self) -> bool:
        """Always."""
        return True

    def readable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The position of the next byte."""
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Go to a position, without reading."""
        if whence == os.SEEK_CUR:
            offset += self._place
        elif whence == os.SEEK_END:
            offset += self._file.size if isinstance(self._file, EntryFile) else self._file.seek(0, os.SEEK_END)
        if offset < 0:
            raise ValueError("a position before the start of the file was requested")
        self._place = offset
        return offset

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to `size` bytes, or all that are left.

        Raises:
            ValueError: if more than the limit would have been read.
        """
        left = self.limit - self._read
        wanted = left + 1 if size is None or size < 0 else min(size, left + 1)
        if isinstance(self._file, EntryFile):
            end = self._place + wanted
            self._kept += _pieces(self._file, min(end, self.limit + 1) - len(self._kept))
            data = bytes(self._kept[self._place : end])
        else:
            self._file.seek(min(self._place, 2**62))
            data = _pieces(self._file, wanted)
        self._place += len(data)
        self._read += len(data)
        if max(self._read, len(self._kept)) > self.limit:
            raise ValueError(
                f"decoding needs more than {self.limit:,} bytes, too many for an image of its size: save it again"
            )
        return data


def _pieces(file: BinaryIO | EntryFile, size: int) -> bytes:
    """Read up to `size` bytes without allocating memory for them in advance."""
    found: list[bytes] = []
    while size > 0:
        piece = file.read(min(size, PIECE))
        if not piece:
            break
        found.append(piece)
        size -= len(piece)
    return found[0] if len(found) == 1 else b"".join(found)
