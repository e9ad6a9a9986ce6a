"""Chunks: how many references one matrix product takes at a time.

On a CPU the chunk is as large as its cache: the pass that decodes it, the two products and the softmax between them then
find it there. On a GPU larger chunks are faster, up to where launching a kernel no longer shows. Both are bounded by a
share of the memory that is free. The size of the chunks changes a result by rounding alone.
"""

import math

import torch

from stablefield.memory import free_bytes

__all__ = ["chunk_rows"]

# Numbers in a chunk on a CPU: 8 MB in float32, a share of the cache of one socket. Fewer starve the matrix products.
_CACHED = 2**21
# Numbers in a chunk that stays bytes: 12 MB. Smaller ones cost more calls, and larger ones leave the cache.
_CACHED_BYTES = 3 * 2**22
# Numbers in a chunk elsewhere: 1 GB in float32.
_RESIDENT = 2**28
# References per chunk below which the pass over the sums, B d numbers per chunk, costs as much as the products.
_FEWEST = 128
# By what share of its size a chunk may be larger than the cache asks for.
_SLACK = 0.1
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
    # Equal parts, up to a tenth larger rather than one more: a last chunk of few references costs as many passes as others.
    parts = max(1, math.ceil(n / wanted - _SLACK))
    return max(1, min(-(-n // parts), free_bytes(device) // (4 * _SHARE) // widest))
