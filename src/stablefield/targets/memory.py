r"""Memory at hand, and the chunk that fits it: how many references one matrix product takes at a time.

On a CPU the chunk is as large as its cache: the pass that decodes it, the two products and the softmax between them then
find it there. On a GPU larger chunks are faster, up to where launching a kernel no longer shows. Both are bounded by a
share of the memory that is free. The size of the chunks changes a result by rounding alone.
"""

import os
from pathlib import Path

import torch

from stablefield.reading import readable

__all__ = ["chunk_rows", "free_bytes"]

# Numbers in a chunk on a CPU: 8 MB in float32, a share of the cache of one socket. Fewer starve the matrix products.
_CACHED = 2**21
# Numbers in a chunk that stays bytes: 12 MB. Smaller ones cost more calls, and larger ones leave the cache.
_CACHED_BYTES = 3 * 2**22
# Numbers in a chunk elsewhere: 1 GB in float32.
_RESIDENT = 2**28
# References per chunk below which the pass over the sums, B d numbers per chunk, costs as much as the products.
_FEWEST = 128
# Share of the free memory for one of the temporaries, of which there are about four.
_SHARE = 16


def chunk_rows(batch: int, dim: int, n: int, device: torch.device, decoded: bool = True) -> int:
    """How many of `n` references of `dim` numbers (or bytes, if not decoded) a chunk should hold, for `batch` rows.

    Neither (batch, chunk) nor (chunk, dim) float32 numbers exceed a sixteenth of the free memory, if more than one
    reference fits at all.
    """
    widest = max(batch, dim, 1)
    cached = _CACHED if decoded else _CACHED_BYTES
    wanted = max(_FEWEST, (cached if device.type == "cpu" else _RESIDENT) // widest)
    if wanted >= n and n * widest <= cached:
        return max(1, n)
    return max(1, min(n, wanted, free_bytes(device) // (4 * _SHARE) // widest))


def free_bytes(device: torch.device) -> int:
    """Memory that new tensors on `device` could take, in bytes; 4 GB where the system does not tell."""
    if device.type == "cuda" and not readable(device):
        # While a graph is captured, the driver is not to be asked.
        return torch.cuda.get_device_properties(device).total_memory - torch.cuda.memory_allocated(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    found = [value for value in (_available(), _left_in_group()) if value is not None]
    return min(found, default=2**32)


def _available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _left_in_group() -> int | None:
    # A container's own limit, which the system's figure does not know.
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text("ascii").strip() for name in ("memory.max", "memory.current"))
        return max(0, int(limit) - int(used))
    except (OSError, ValueError):
        return None
