"""Memory: what is free for new tensors, on a device or within the limits of a container, and sizes as text."""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from stablefield._reading import readable

__all__ = ["free_bytes", "size_text"]

# Assumed to be free if the system does not report it: 4 GB.
_UNKNOWN = 2**32
# Groups of version 1 report a limit above this if there is none.
_NONE = 2**60


def free_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Memory that new tensors on `device` could take, in bytes; 4 GB if the system does not report it.

    On a GPU it is the driver's free memory plus the memory that torch keeps unused; during capture of a CUDA graph, when the
    driver must not be queried, all memory that torch does not use. On MPS it is the rest of the recommended size. On a CPU
    it is the system's available memory, or the rest within the control groups of this process if that is less (the limits of
    containers and batch systems, which the system's own figure ignores).

    Args:
        device: of the tensors.
        root: of the system's files.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if readable(device):
            return torch.cuda.mem_get_info(device)[0] + unused
        return torch.cuda.get_device_properties(device).total_memory - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    available = _available(root)
    return min([_UNKNOWN if available is None else available, *(group.left() for group in _limited(root))])


def _available(root: Path) -> int | None:
    reported = _entry(root / "proc/meminfo", "MemAvailable:")
    if reported is not None:
        return reported * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, AttributeError):
        return None


@dataclass(frozen=True)
class _Group:
    """A control group with a memory limit.

    Args:
        folder: of its files.
        limit: bytes.
        usage: the file with the number of bytes in use.
        cache: the entry of memory.stat for bytes in use by the file cache, which can be reclaimed.
    """

    folder: Path
    limit: int
    usage: str
    cache: str

    def left(self) -> int:
        used = _number(self.folder / self.usage) or 0
        cached = _entry(self.folder / "memory.stat", self.cache) or 0
        return max(0, min(self.limit, self.limit - used + cached))


@cache
def _limited(root: Path) -> list[_Group]:
    """The control groups of this process, and their parents, that have a limit (looked up once)."""
    groups = root / "sys/fs/cgroup"
    # Version 2, alone or mounted beside version 1; then version 1.
    found = _along(groups, "", False) + _along(groups / "unified", "", False) + _along(groups / "memory", "", True)
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            found += _along(groups, path, False) + _along(groups / "unified", path, False)
        elif "memory" in controllers.split(","):
            found += _along(groups / "memory", path, True)
    return list(dict.fromkeys(found))


def _along(mount: Path, path: str, first: bool) -> list[_Group]:
    # In a container the path may be the host's, while the mount begins at the container's group.
    group = mount / path.lstrip("/")
    inside = [folder for folder in (group, *group.parents) if folder.is_relative_to(mount)]
    limits = ("memory.limit_in_bytes",) if first else ("memory.max", "memory.high")
    others = ("memory.usage_in_bytes", "total_inactive_file") if first else ("memory.current", "inactive_file")
    read = [(folder, _number(folder / name)) for folder in inside for name in limits]
    return [_Group(folder, limit, *others) for folder, limit in read if limit is not None and limit < _NONE]


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text("utf-8", "surrogateescape").split("\n")
    except OSError:
        return []


def _number(file: Path) -> int | None:
    text = "".join(_lines(file)).strip()
    return int(text) if text.isdecimal() else None


def _entry(file: Path, name: str) -> int | None:
    for line in _lines(file):
        words = line.split()
        if words[:1] == [name] and len(words) > 1 and words[1].isdecimal():
            return int(words[1])
    return None


def size_text(size: float) -> str:
    """A number of bytes as text: 1536 is "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
