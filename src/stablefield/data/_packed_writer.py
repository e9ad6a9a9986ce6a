"""Write a packed image set (format: see `_packed`) image by image, in constant memory.

The header precedes the pixels, but states their number and checksum. So the writer leaves room for it, and fills it at the
end; the rest stays spaces, which JSON ignores.
"""

import hashlib
import json
import math
import os
import secrets
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from stablefield._atomic_file import sync
from stablefield._regular_file import JSON_LIMIT
from stablefield._shapes import check_kind, flag, shape_of, whole_number
from stablefield.data._image_set import labels_sha256

__all__ = ["METADATA_KEY", "PackedWriter", "room_for"]

METADATA_KEY = "stablefield.images"
ROOM = 2**16
"""Bytes for a header without class names."""


def room_for(manifest: dict[str, Any]) -> int:
    """Bytes to reserve for a header whose manifest holds at least these entries."""
    return ROOM + len(json.dumps(json.dumps(manifest)))


class PackedWriter:
    """A packed file being written; a context manager that leaves the complete file, or none.

    Args:
        destination: the file to make; missing folders are created.
        shape: shape of one image, (C, H, W).
        overwrite: replace an existing file.
        room: bytes to reserve for the header, whose manifest is known only at the end (see `room_for`).

    Raises:
        ValueError: if `destination` is a folder, or exists and `overwrite` is not set, or `room` is above the limit.
    """

    def __init__(
        self,
        destination: str | Path,
        shape: tuple[int, ...],
        *,
        overwrite: bool = False,
        room: int = ROOM,
    ) -> None:
        check_kind("destination", destination, (str, Path), "the path of the file to make")
        shape = cast(tuple[int, int, int], shape_of("shape", shape))
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shape is {shape}: pass that of one image, (C, H, W).")
        flag("overwrite", overwrite)
        whole_number("room", room, 0)
        self.path = Path(destination)
        self.shape = shape
        self.count = 0
        if self.path.is_dir():
            raise ValueError(
                f"destination {self.path} is a folder: name the file to make, {self.path / 'images.stablefield'}."
            )
        if self.path.exists() and not overwrite:
            raise ValueError(f"destination {self.path} exists: pass another name, or overwrite=True.")
        if room > JSON_LIMIT:
            raise ValueError(
                f"the manifest takes {room:,} bytes, above {JSON_LIMIT:,}: shorten the names of the classes."
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._digest = hashlib.sha256()
        self._header_size = -(-room // 4096) * 4096 - 8
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        self._file = self._temporary.open("xb")
        self._file.seek(8 + self._header_size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        finally:
            self._temporary.unlink(missing_ok=True)

    @property
    def sha256(self) -> str:
        """Checksum of the pixels written so far."""
        return self._digest.hexdigest()

    def append(self, images: NDArray[np.uint8]) -> None:
        """Append images of shape (k, C, H, W).

        Raises:
            ValueError: if dtype or shape do not fit the file.
        """
        check_kind("images", images, np.ndarray, "a numpy array of uint8, shape (k, C, H, W)")
        if images.dtype != np.uint8 or images.shape[1:] != self.shape:
            raise ValueError(
                f"images has dtype {images.dtype} and shape {images.shape}: this file takes uint8 images of shape "
                f"{self.shape}."
            )
        images = np.ascontiguousarray(images)
        self._digest.update(images.data)
        self._file.write(images.data)
        self.count += len(images)

    def finish(self, labels: NDArray[np.int64] | None, manifest: dict[str, Any]) -> Path:
        """Write labels and header, sync, and give the file its name.

        Args:
            labels: one per image written, or None.
            manifest: JSON values; `count`, `shape` and the checksums are set to what was written.

        Returns:
            The path.

        Raises:
            ValueError: if nothing was written, labels do not fit, or the manifest needs more than the reserved room.
        """
        check_kind("manifest", manifest, dict, "a dictionary of JSON values")
        if labels is not None:
            check_kind("labels", labels, np.ndarray, "a numpy array of class numbers, shape (n,), or None")
        if self.count == 0 or (labels is not None and labels.shape != (self.count,)):
            raise ValueError(
                f"{self.count} images were written with labels of shape {None if labels is None else labels.shape}: "
                "write at least one image, and pass one label per image."
            )
        manifest = manifest | {
            "count": self.count,
            "shape": list(self.shape),
            "sha256": self.sha256,
            "labels_sha256": labels_sha256(labels),
        }
        size = self.count * math.prod(self.shape)
        header: dict[str, Any] = {
            "__metadata__": {METADATA_KEY: json.dumps(manifest)},
            "images": {"dtype": "U8", "shape": [self.count, *self.shape], "data_offsets": [0, size]},
        }
        if labels is not None:
            header["labels"] = {"dtype": "I64", "shape": [self.count], "data_offsets": [size, size + 8 * self.count]}
            self._file.write(np.ascontiguousarray(labels, "<i8").data)
        text = json.dumps(header).encode()
        if len(text) > self._header_size:
            raise ValueError(
                f"the manifest takes {len(text)} bytes, but only {self._header_size} are free: shorten it."
            )
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._header_size) + text.ljust(self._header_size))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self.path)
        sync(self.path.parent)
        return self.path
