"""The allocator of the process: what a training step frees, the next one will want again.

A step on a CPU makes and frees some gigabytes of activations. glibc gives large blocks back to the system at once, which
clears every page of them before it hands them out again. On some machines that is a tenth of the time of a step of a U-Net
and most of its variation; on others it does not show.
"""

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# From malloc.h; 32 MB is the largest threshold that it takes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Have freed memory kept for the next allocation, for this whole process; where glibc serves it, else nothing changes.

    For programs, not for libraries: other allocators of the process keep theirs, too. Blocks above 32 MB are still given
    back. The peak of memory stays what it was but for fragments.

    Returns:
        Whether it was done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 2**25)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
