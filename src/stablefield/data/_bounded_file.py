"""A file as a decoder of images may read it: no more bytes than were agreed.

Decoders keep what they read (text, colour profiles, whole files), as long as the file says it is, and read the same bytes
twice where it says so. An entry of an archive cannot go back without being unpacked again from its start: of such a stream
what was read is kept, so only as much may be read as may be kept.
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
        limit: how many bytes may be read in all; it may be raised as more is known of the file.
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
        """Where the next byte comes from."""
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Go to a place; nothing is read for it."""
        if whence == os.SEEK_CUR:
            offset += self._place
        elif whence == os.SEEK_END:
            offset += self._file.size if isinstance(self._file, EntryFile) else self._file.seek(0, os.SEEK_END)
        if offset < 0:
            raise ValueError("a place before the start of the file is asked for")
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
                f"more than {self.limit:,} bytes would have to be read, too many for an image of its size: save it again"
            )
        return data


def _pieces(file: BinaryIO | EntryFile, size: int) -> bytes:
    """Read up to `size` bytes without reserving room for them before they are there."""
    found: list[bytes] = []
    while size > 0:
        piece = file.read(min(size, PIECE))
        if not piece:
            break
        found.append(piece)
        size -= len(piece)
    return found[0] if len(found) == 1 else b"".join(found)
