"""Memory: how much of it new tensors could take, on a device or within the limits of a container."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from stablefield.reading import readable

__all__ = ["free_bytes"]

_UNKNOWN = 2**32
"""Taken for free where the system does not tell: 4 GB."""


def free_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Memory that new tensors on `device` could take, in bytes; 4 GB where the system does not tell.

    On a CPU it is what the system calls available, or what the control groups of this process leave if that is less (the
    limits of containers and of batch systems, which the system's own figure does not know).

    Args:
        device: where the tensors would be.
        root: where the system's files are.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if readable(device):
            return torch.cuda.mem_get_info(device)[0] + unused
        # While a graph is captured, the driver is not to be asked.
        return torch.cuda.get_device_properties(device).total_memory - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    found = [value for value in (_available(root), *_left_in_groups(root)) if value is not None]
    return min(found, default=_UNKNOWN)


def _available(root: Path) -> int | None:
    try:
        return _entry(root / "proc/meminfo", "MemAvailable:") * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, AttributeError):
        return None


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each control group of this process leaves, if it has a limit: its own, and those around it."""
    try:
        lines = (root / "proc/self/cgroup").read_text("ascii").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            mount = root / "sys/fs/cgroup/memory"
        else:
            continue
        # In a container the path may be that of its host, while the mount begins at the container's group.
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            left = _left(folder, *names)
            if left is not None:
                yield left
            if folder == mount:
                break


def _left(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    try:
        most, used = (int((folder / name).read_text("ascii")) for name in (limit, usage))
        # Files that were read count as used, and give way to whoever needs the memory.
        return max(0, most - used + _entry(folder / "memory.stat", cache))
    except (OSError, ValueError):
        return None


def _entry(file: Path, name: str) -> int:
    for line in file.read_text("ascii").splitlines():
        words = line.split()
        if words[:1] == [name]:
            return int(words[1])
    raise ValueError(f"{file} has no {name}")
