r"""A packed image set: one file that is mapped into memory instead of read.

It is a valid safetensors file: 8 bytes, the little-endian length N of the header; N bytes of JSON, padded with spaces; then
the tensors `images`, uint8 (n, C, H, W), and, if there are labels, `labels`, int64 (n,), without a gap. The header's
`__metadata__` holds the set's manifest, as JSON, under `stablefield.images`. Whatever reads safetensors reads it.

`PackedWriter` takes images as they come, in constant memory, and the file appears under its name when it is whole and on
the disk (temporary name beside it, fsync, rename). Opening checks every length and offset against the size of the file,
and reads the labels alone; the checksums are taken again only when asked for.

References:
    Hugging Face, "safetensors: Simple, safe way to store and distribute tensors", format description, 2022.
"""

import json
import math
import struct
from pathlib import Path
from typing import Any, cast

import numpy as np

from stablefield.data.image_set import ImageSet, chunks, labels_sha256
from stablefield.data.packed_writer import METADATA_KEY, PackedWriter, room_for
from stablefield.shapes import check_kind, flag

__all__ = ["is_packed", "open_packed", "pack"]

HEADER_LIMIT = 100_000_000
"""The longest header that safetensors itself accepts, in bytes."""


def pack(images: ImageSet, destination: str | Path, *, overwrite: bool = False) -> Path:
    """Write an image set as one memory-mappable file.

    Args:
        images: the set; it is read in pieces of 16 MiB.
        destination: the file to make; folders on the way are made.
        overwrite: replace a file of that name.

    Returns:
        The path of the file; `open_packed` reads it.

    Raises:
        ValueError: if the file exists and `overwrite` is not set, or the pixels are not those of the set's checksum.
        OSError: if the disk is full or may not be written to; nothing is left behind.
    """
    check_kind("images", images, ImageSet, "an ImageSet, as open_images returns")
    flag("overwrite", overwrite)
    with PackedWriter(destination, images.shape, overwrite=overwrite, room=room_for(images.manifest)) as writer:
        for chunk in chunks(images.images):
            writer.append(chunk)
        if writer.sha256 != images.manifest["sha256"]:
            raise ValueError(
                f"{images.name}: the pixels have checksum {writer.sha256}, but the manifest says "
                f"{images.manifest['sha256']}: the data have changed since they were opened; open them again."
            )
        return writer.finish(images.labels, images.manifest)


def open_packed(path: str | Path, *, verify: bool = False) -> ImageSet:
    """Map a packed file into memory.

    Args:
        path: a file that `pack` made.
        verify: read all of it and compare the checksums too.

    Returns:
        The set; its images are a read-only memory map.

    Raises:
        ValueError: if the file is not a packed image set, is cut short or inconsistent, or does not verify.
    """
    check_kind("path", path, (str, Path), "the path of a file that pack made")
    flag("verify", verify)
    path = Path(path)
    header, start = _read_header(path)
    manifest = _manifest(path, header)
    names = sorted(header)
    if names not in (["__metadata__", "images"], ["__metadata__", "images", "labels"]):
        raise _damaged(path, f"it holds {', '.join(names)}, where images and perhaps labels belong")
    end = 0
    for name, dtype, ndim, item in (("images", "U8", 4, 1), ("labels", "I64", 1, 8)):
        if name in header:
            end = _check_tensor(path, name, header[name], (dtype, ndim, item), end)
    if start + end != path.stat().st_size:
        raise _damaged(path, f"it has {path.stat().st_size:,} bytes, and its header speaks of {start + end:,}")
    shape = tuple(header["images"]["shape"])
    labels = None
    if "labels" in header:
        labels = np.fromfile(path, "<i8", shape[0], offset=start + header["labels"]["data_offsets"][0]).astype(np.int64)
    images = np.memmap(path, np.uint8, "r", start, shape)
    for key, value in (("count", shape[0]), ("shape", list(shape[1:])), ("labels_sha256", labels_sha256(labels))):
        if manifest.get(key) != value:
            raise _damaged(path, f"its manifest says {key} = {manifest.get(key)}, but it holds {value}")
    class_names = manifest.get("class_names")
    opened = ImageSet(
        images=images,
        labels=labels,
        class_names=None if class_names is None else tuple(class_names),
        name=str(manifest.get("name", path.stem)),
        manifest=manifest,
    )
    if verify:
        opened.verify()
    return opened


def is_packed(path: Path) -> bool:
    """Whether the file at `path` begins like a safetensors file; whether it is whole, `open_packed` finds out."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and 2 <= struct.unpack("<Q", head[:8])[0] <= HEADER_LIMIT and head[8:] == b"{"


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header's JSON object, and where the tensors start in the file."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= length <= HEADER_LIMIT:
                raise ValueError(f"{path} is not a packed image set: make one with `stablefield data pack SRC DEST`.")
            text = file.read(length)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(text) < length:
        raise _damaged(path, f"its header should have {length:,} bytes, {len(text):,} are there")
    try:
        header = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a packed image set (its header is not JSON).") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a packed image set (its header is not a JSON object).")
    return cast("dict[str, Any]", header), 8 + length


def _manifest(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or METADATA_KEY not in metadata:
        raise ValueError(
            f"{path} is a safetensors file, but not a packed image set: make one with `stablefield data pack SRC DEST`."
        )
    try:
        manifest = json.loads(cast("dict[str, str]", metadata)[METADATA_KEY])
    except (TypeError, json.JSONDecodeError, RecursionError) as error:
        raise _damaged(path, "its manifest is not JSON") from error
    if not isinstance(manifest, dict):
        raise _damaged(path, "its manifest is not a JSON object")
    return cast("dict[str, Any]", manifest)


def _check_tensor(path: Path, name: str, entry: Any, wanted: tuple[str, int, int], start: int) -> int:
    """Hold a tensor's header entry against dtype, number of axes and item size; return where its bytes end."""
    dtype, ndim, item = wanted
    if not isinstance(entry, dict):
        raise _damaged(path, f"{name} is described by {entry!r}")
    found = cast("dict[str, Any]", entry)
    shape, offsets = found.get("shape"), found.get("data_offsets")
    whole = all(
        isinstance(part, list) and all(type(v) is int and v >= 0 for v in cast("list[Any]", part))
        for part in (shape, offsets)
    )
    if not whole or found.get("dtype") != dtype or len(cast("list[int]", shape)) != ndim:
        raise _damaged(path, f"{name} is described as dtype {found.get('dtype')}, shape {shape}, offsets {offsets}")
    end = start + item * math.prod(cast("list[int]", shape))
    if offsets != [start, end]:
        raise _damaged(path, f"{name} of shape {shape} lies at {offsets}, where [{start}, {end}] was expected")
    return end


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is a damaged or foreign file: {what}. Pack it again from its source.")
