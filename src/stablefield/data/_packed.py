r"""A packed image set: one file to map into memory instead of reading it.

It is a valid safetensors file: 8 bytes, the little-endian length N of the header; N bytes of JSON, padded with spaces; then
the tensors `images`, uint8 (n, C, H, W), and, if there are labels, `labels`, int64 (n,), without a gap. The header's
`__metadata__` holds the set's manifest, as JSON, under `stablefield.images`. Whatever reads safetensors reads it.

`PackedWriter` takes images as they come, in constant memory, and the file appears under its name when it is complete and on
disk (temporary name beside it, fsync, rename). Opening checks every length and offset against the size of the file, and
reads only the labels; it verifies the checksum of the pixels only on request.

`open_tensors` also maps the float data of any safetensors file with a tensor `data` or `latents`, and perhaps `labels`.

References:
    Hugging Face, "safetensors: Simple, safe way to store and distribute tensors", format description, 2022.
"""

import json
import math
import os
import reprlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from stablefield._regular_file import JSON_LIMIT, open_regular
from stablefield._shapes import check_kind, flag
from stablefield.data._image_set import (
    ImageSet,
    Origin,
    check_class_names,
    check_label_count,
    labels_sha256,
    make_image_set,
)
from stablefield.data._packed_writer import METADATA_KEY, PackedWriter, room_for
from stablefield.data._raw_array import mapped
from stablefield.data._scaling import check_floats, chunks

__all__ = ["found_tensor", "is_packed", "open_packed", "open_tensors", "pack", "read_header"]

_FLOATS = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
_WHOLE = {"I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "U8": np.dtype("u1")}

SAFETENSORS_LIMIT = 100_000_000
"""The longest header that safetensors itself accepts, in bytes."""

# Lists and objects in a header, each of which takes far more memory than its text. A header of the longest length that
# names skipped files such as "a[1].png" has fewer brackets.
_NESTED = 500_000


def pack(images: ImageSet, destination: str | Path, *, overwrite: bool = False) -> Path:
    """Write an image set as one memory-mappable file.

    Args:
        images: the set; it is read in pieces of 16 MiB.
        destination: the file to make; missing folders are created.
        overwrite: replace an existing file.

    Returns:
        The path of the file; `open_packed` reads it.

    Raises:
        ValueError: if the file exists and `overwrite` is not set, or the pixels do not have the set's checksum.
        OSError: if the disk is full or not writable; leaves nothing behind.
    """
    check_kind("images", images, ImageSet, "an ImageSet, as open_images returns")
    flag("overwrite", overwrite)
    if images.scaling is not None:
        raise ValueError(
            f"{images.name} holds {images.images.dtype} data: pack takes images; a .npy file opens as fast."
        )
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
        path: a file made by `pack`.
        verify: also read all of it and compare the checksums.

    Returns:
        The set; its images are a read-only memory map.

    Raises:
        ValueError: if the file is not a packed image set, is cut short or inconsistent, or does not verify.
    """
    check_kind("path", path, (str, Path), "the path of a file that pack made")
    flag("verify", verify)
    path = Path(path)
    try:
        with open_regular(path) as file:
            opened = _opened(path, file)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    if verify:
        opened.verify()
    return opened


def open_tensors(path: Path) -> ImageSet:
    """Open a safetensors file: a packed image set, or float data under `data` or `latents`, with or without `labels`.

    Raises:
        ValueError: as for `open_packed`; or if the file holds neither, or the data's dtype or shape does not fit, or they
            hold NaN or infinite values.
    """
    try:
        with open_regular(path) as file:
            header, start = read_header(path, file)
            names = [name for name in ("data", "latents") if name in header]
            if names:
                return _float_set(path, file, header, start, names)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    return open_packed(path)


def _float_set(path: Path, file: BinaryIO, header: dict[str, Any], start: int, names: list[str]) -> ImageSet:
    if len(names) > 1:
        raise ValueError(f"{path} holds both data and latents: save one of them.")
    size = file.seek(0, os.SEEK_END) - start
    dtype, shape, begin = found_tensor(path, names[0], header[names[0]], _FLOATS, size)
    check_floats(f"{path}: {names[0]}", dtype, shape)
    labels = None
    if "labels" in header:
        whole, count, place = found_tensor(path, "labels", header["labels"], _WHOLE, size)
        if count != shape[:1]:
            raise ValueError(
                f"{path} has labels of shape {count} for {shape[0]:,} samples: save one class number per sample, "
                f"shape ({shape[0]},)."
            )
        check_label_count(shape[0], path)
        file.seek(start + place)
        labels = np.frombuffer(file.read(whole.itemsize * shape[0]), whole)
    values = mapped(file, path, start + begin, shape, dtype=dtype)
    return make_image_set(values, labels, Origin(name=path.stem, source=f"tensor {names[0]} of {path.name}"))


def found_tensor(
    path: Path, name: str, entry: Any, kinds: dict[str, np.dtype[Any]], size: int
) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Dtype, shape and first byte of a tensor, from its entry in the header of a file with `size` bytes of tensors."""
    found = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
    shape, offsets = found.get("shape"), found.get("data_offsets")
    lists = [cast("list[Any]", part) for part in (shape, offsets) if isinstance(part, list)]
    if len(lists) < 2 or len(lists[1]) != 2 or any(type(v) is not int or v < 0 for part in lists for v in part):
        raise ValueError(f"{path} is damaged: {name} is described as {reprlib.repr(entry)}; save it again.")
    kind = kinds.get(str(found.get("dtype")))
    if kind is None:
        raise ValueError(f"{path}: {name} has dtype {reprlib.repr(found.get('dtype'))}: save it as {', '.join(kinds)}.")
    begin, end = lists[1]
    if end - begin != kind.itemsize * math.prod(lists[0]) or end > size:
        raise ValueError(
            f"{path} is cut short or damaged: {name} of shape {lists[0]} has offsets {[begin, end]} in {size:,} bytes; save "
            "it again."
        )
    return kind, tuple(lists[0]), begin


def is_packed(path: Path) -> bool:
    """Whether the file at `path` begins like a safetensors file; `open_packed` finds out whether it is intact."""
    with open_regular(path) as file:
        head = file.read(9)
    return len(head) == 9 and 2 <= struct.unpack("<Q", head[:8])[0] <= SAFETENSORS_LIMIT and head[8:] == b"{"


def _opened(path: Path, file: BinaryIO) -> ImageSet:
    header, start = read_header(path, file)
    manifest = _manifest(path, header)
    names = sorted(header)
    if names not in (["__metadata__", "images"], ["__metadata__", "images", "labels"]):
        raise _damaged(path, f"it holds {reprlib.repr(names)} instead of images and perhaps labels")
    end = 0
    for name, dtype, ndim, item in (("images", "U8", 4, 1), ("labels", "I64", 1, 8)):
        if name in header:
            end = _check_tensor(path, name, header[name], (dtype, ndim, item), end)
    size = file.seek(0, os.SEEK_END)
    if start + end != size:
        raise _damaged(path, f"it has {size:,} bytes, but its header states {start + end:,}")
    shape = tuple(header["images"]["shape"])
    if math.prod(shape) == 0:
        raise _damaged(path, f"its images have shape {shape}")
    labels = None
    if "labels" in header:
        count = header["labels"]["shape"][0]
        check_label_count(count, path)
        file.seek(start + header["labels"]["data_offsets"][0])
        labels = np.frombuffer(file.read(8 * count), "<i8").astype(np.int64)
    images = mapped(file, path, start, shape)
    for key, value in (("count", shape[0]), ("shape", list(shape[1:])), ("labels_sha256", labels_sha256(labels))):
        if manifest.get(key) != value:
            raise _damaged(path, f"its manifest says {key} = {reprlib.repr(manifest.get(key))}, but it holds {value}")
    class_names = None if manifest["class_names"] is None else tuple(manifest["class_names"])
    check_class_names(f"{path}: class_names", class_names)
    try:
        return ImageSet(
            images=images,
            labels=labels,
            class_names=class_names,
            name=manifest["name"],
            manifest=manifest,
        )
    except ValueError as error:
        raise _damaged(path, str(error)) from error


def read_header(path: Path, file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header's JSON object, and where the tensors begin."""
    head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if not 2 <= length <= SAFETENSORS_LIMIT:
        raise ValueError(f"{path} is not a packed image set: make one with `stablefield data pack SRC DEST`.")
    if length > JSON_LIMIT:
        raise ValueError(f"{path} is not a packed image set: its header has {length:,} bytes, above {JSON_LIMIT:,}.")
    text = file.read(length)
    if len(text) < length:
        raise _damaged(path, f"its header should have {length:,} bytes, but has {len(text):,}")
    nested = text.count(b"[") + text.count(b"{")
    if nested > _NESTED:
        raise _damaged(path, f"its header has {nested:,} lists and objects, above {_NESTED:,}")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
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
    except (TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, "its manifest is not JSON") from error
    if not isinstance(manifest, dict):
        raise _damaged(path, "its manifest is not a JSON object")
    # An entry that an older or foreign writer left out has its default in `Origin`.
    found = Origin(name=path.stem, source="").manifest(0) | cast("dict[str, Any]", manifest)
    for key, fits in _MANIFEST.items():
        if not fits(found.get(key)):
            raise _damaged(path, f"its manifest says {key} = {reprlib.repr(found.get(key))}")
    return found


def _is_text(value: object) -> bool:
    if not isinstance(value, str):
        return False
    # JSON may hold lone surrogates, which no terminal or file accepts.
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, cast("list[object]", value)))


def _is_counts(value: object) -> bool:
    entries = cast("dict[object, object]", value) if isinstance(value, dict) else {None: None}
    return all(_is_text(key) and _is_count(number) for key, number in entries.items())


_MANIFEST: dict[str, Callable[[object], bool]] = {
    "name": _is_text,
    "source": _is_text,
    "classes": _is_count,
    "class_names": lambda value: value is None or _is_texts(value),
    "resized": _is_text,
    "conversions": _is_counts,
    "skipped": _is_count,
    "skipped_files": _is_texts,
    "sha256": _is_text,
}
"""Checks of the entries that are read later."""


def _check_tensor(path: Path, name: str, entry: Any, wanted: tuple[str, int, int], start: int) -> int:
    """Check a tensor's header entry against dtype, number of axes and item size; return where its bytes end."""
    dtype, ndim, item = wanted
    if not isinstance(entry, dict):
        raise _damaged(path, f"{name} is described by {reprlib.repr(entry)}")
    found = cast("dict[str, Any]", entry)
    shape, offsets = found.get("shape"), found.get("data_offsets")
    whole = all(
        isinstance(part, list) and all(type(v) is int and v >= 0 for v in cast("list[Any]", part))
        for part in (shape, offsets)
    )
    if not whole or found.get("dtype") != dtype or len(cast("list[int]", shape)) != ndim:
        raise _damaged(path, f"{name} is described as {reprlib.repr(found)}")
    end = start + item * math.prod(cast("list[int]", shape))
    if offsets != [start, end]:
        raise _damaged(path, f"{name} of shape {shape} has offsets {offsets} instead of [{start}, {end}]")
    return end


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is a damaged or foreign file: {what}. Pack it again from its source.")
