r"""Weight files: the content of a `.pkl`, `.pt`, `.pth`, `.ckpt` or `.safetensors` file as inert values.

| kind | recognised by | where the tensors' bytes are |
|---|---|---|
| safetensors | a JSON header | after the header |
| `torch.save`, since 2020 | a zip archive with `data.pkl` | one stored entry each, `data/KEY` |
| `torch.save`, before | a pickle of a magic number, three more pickles | after the pickles |
| `pickle.dump` of modules | any other pickle | within the pickle: each storage is a file of the kind above |

The size of the file bounds all sizes: nothing is decompressed, and a storage must have as many bytes in the file as it
states. A constant bounds the lists of an archive's members and of a header's tensors: an entry of a few dozen bytes becomes
a kilobyte when it is read. So reading a file takes at most eight times its size and 256 MiB of memory (measured: seven
times for weights of 16 bits, 227 MiB for a million empty sets), and at most seconds.
"""

import mmap
import os
import struct
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, BinaryIO, cast

from torch import Tensor

from stablefield._regular_file import open_regular
from stablefield.interop._inert import Name, RefusedError, Storage, plain_text
from stablefield.interop._pickles import MAX_OPCODES, ByteStream, interpret

__all__ = ["MAX_TENSORS", "read_weight_file"]

MAX_TENSORS = 10_000
"""Tensors of a network; the largest published one has fewer than two thousand."""

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
# Opcodes of a storage saved within a pickle; it needs a few dozen.
_SMALL = 2_000
# Bytes of an archive's list of members, and of the header of a safetensors file: some 400 a tensor.
_MAX_LIST = 4 * 2**20


def read_weight_file(path: str | Path) -> object:
    """Read the file's content without executing anything in it.

    Args:
        path: a file of one of the kinds above.

    Returns:
        Plain values, `Node` and `TensorView` objects; for safetensors a dict of names to tensors.

    Raises:
        RefusedError: naming the content that is not supported.
        ValueError: if there is no such file, it may not be read, or it is not a regular file.
    """
    path = Path(path)
    shown = plain_text(str(path), 400)
    if sys.byteorder != "little":
        raise ValueError(
            f"file {shown} cannot be read on this machine: use one with the byte order of weights, little."
        )
    try:
        with open_regular(path) as file:
            head = file.read(9)
            if len(head) < 9:
                raise RefusedError("it is too short to hold weights; it may have been cut off.")
            if head[:2] == b"PK":
                return _read_archive(file)
            # Mapped, not read: a read beyond the end returns only the bytes left, whatever length the file claims.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                header = struct.unpack("<Q", head[:8])[0]
                if head[8:9] == b"{" and header < len(content):
                    return _read_safetensors(path, header)
                if head[:1] != b"\x80":
                    raise RefusedError("it is neither safetensors, nor a file of torch.save, nor a pickle.")
                return _read_pickle(content, len(content))
    except RefusedError as error:
        raise RefusedError(f"{plain_text(path.name)} is refused: {error}") from error
    except FileNotFoundError:
        raise ValueError(f"file {shown} does not exist: name a .pkl, .pt, .pth or .safetensors file.") from None
    except OSError as error:
        raise ValueError(f"file {shown} cannot be read ({error.strerror}): name another.") from error


def _read_pickle(stream: ByteStream, size: int) -> object:
    reopened = 0

    def reopen(data: bytes) -> object:
        nonlocal reopened
        reopened += len(data)
        if reopened > size:
            raise RefusedError("its storages are larger than the file: it repeats one.")
        inner = BytesIO(data)
        if interpret(inner, max_opcodes=_SMALL) != _LEGACY_MAGIC:
            raise RefusedError("a storage within the pickle is not of a kind that torch writes.")
        return _read_legacy(inner, size, max_opcodes=_SMALL)

    first = interpret(stream, reopen=reopen)
    return _read_legacy(stream, size) if first == _LEGACY_MAGIC and isinstance(first, int) else first


def _read_legacy(stream: ByteStream, size: int, max_opcodes: int = MAX_OPCODES) -> object:
    """The rest of a file of the older kind, after its magic number."""
    storages: dict[str, Storage] = {}
    if interpret(stream, max_opcodes=_SMALL) != _LEGACY_VERSION:
        raise RefusedError("it has an unknown version of torch's older format.")
    system = interpret(stream, max_opcodes=_SMALL)
    if not isinstance(system, dict) or cast("dict[object, object]", system).get("little_endian") is not True:
        raise RefusedError("it was written on a machine with the other byte order.")
    value = interpret(stream, persistent=lambda reference: _storage(reference, storages, size), max_opcodes=max_opcodes)
    keys = interpret(stream, max_opcodes=max_opcodes)
    # Texts only: comparing or printing deeply nested pairs would traverse them all.
    names = [key for key in cast("list[object]", keys) if isinstance(key, str)] if isinstance(keys, list) else []
    if names != keys or set(names) != set(storages):
        raise RefusedError("its list of storages does not match its tensors: the file is damaged.")
    for key in names:
        storage = storages[key]
        header = stream.read(8)
        if len(header) < 8 or struct.unpack("<q", header)[0] != storage.count:
            raise RefusedError("a storage does not have the length that its tensors state: the file is damaged.")
        storage.fill(stream.read(storage.count * storage.dtype.itemsize))
    return value


def _storage(reference: object, storages: dict[str, Storage], size: int) -> Storage | Name:
    """The storage of a persistent id, still without its bytes."""
    match reference:
        case ("module", Name() as name, *_):
            return name  # the older format puts a class's source text beside its name
        case ("storage", Name(dtype=dtype), str(key), str(), int(count), *rest) if dtype is not None:
            if rest not in ([], [None]):
                raise RefusedError("a storage is part of another one, as only in very old files.")
            if not 0 <= count * dtype.itemsize <= size:
                raise RefusedError(f"it claims a storage of {count:,} numbers, but the file has {size:,} bytes.")
            storage = storages.setdefault(key, Storage(dtype, count))
            if (storage.dtype, storage.count) != (dtype, count):
                raise RefusedError(f"it describes the storage {plain_text(key)} in two ways: the file is damaged.")
            return storage
        case _:
            raise RefusedError("it refers to something outside the pickle that is not a storage.")


@dataclass
class _Listed:
    """A file that reads at most `limit` bytes at once, because `zipfile` would read a list of any length."""

    file: BinaryIO
    limit: int

    def read(self, n: int = -1, /) -> bytes:
        return self.file.read(n if 0 <= n < self.limit else self.limit)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def seekable(self) -> bool:
        return True


def _read_archive(file: BinaryIO) -> object:
    size, storages, total = os.fstat(file.fileno()).st_size, dict[str, Storage](), 0
    listed = _Listed(file, _MAX_LIST)
    try:
        with zipfile.ZipFile(cast("IO[bytes]", listed)) as archive:
            listed.limit = size
            pickles = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise RefusedError("it is a zip archive, but not one that torch.save writes: it has no data.pkl.")
            root = pickles[0].removesuffix("data.pkl")
            if root + "byteorder" in archive.namelist() and _entry(archive, root + "byteorder", size) != b"little":
                raise RefusedError("it was written on a machine with the other byte order.")
            program = BytesIO(_entry(archive, pickles[0], size))
            value = interpret(program, persistent=lambda reference: _storage(reference, storages, size))
            for key, storage in storages.items():
                total += storage.count * storage.dtype.itemsize
                if total > size:
                    raise RefusedError("its storages together are larger than the file: entries overlap.")
                storage.fill(_entry(archive, f"{root}data/{key}", size))
            return value
    except RefusedError:
        raise
    except (zipfile.BadZipFile, struct.error, ValueError, KeyError, RuntimeError, EOFError, OSError) as error:
        raise RefusedError(f"it is not a complete zip archive ({plain_text(str(error))}).") from error


def _entry(archive: zipfile.ZipFile, name: str, size: int) -> bytes:
    entry = archive.getinfo(name)
    # torch stores entries uncompressed, so a compressed one is not from torch and may be a bomb.
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size or entry.flag_bits & 1:
        raise RefusedError(f"the entry {plain_text(name)} of the archive is compressed, which torch.save never does.")
    return archive.read(entry)


def _read_safetensors(path: Path, header: int) -> Mapping[str, Tensor]:
    """A safetensors file; the library checks its header against the size of the file."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError('reading .safetensors files needs safetensors: pip install "stablefield[train]".') from error
    if header > _MAX_LIST:
        raise RefusedError(f"its header has {header:,} bytes, far more than a network needs.")
    try:
        with safe_open(path, "pt") as content:
            names = content.keys()
            if len(names) > MAX_TENSORS:
                raise RefusedError(f"it has {len(names):,} tensors; a network has no more than {MAX_TENSORS:,}.")
            return {name: content.get_tensor(name) for name in names}
    except RefusedError:
        raise
    # The library checks sizes first, but finds axes that torch cannot have only when it makes the tensor.
    except (SafetensorError, TypeError, RuntimeError, ValueError) as error:
        raise RefusedError(f"it is not a complete safetensors file ({plain_text(str(error))}).") from error
