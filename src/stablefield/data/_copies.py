"""Copies: samples with the same values, found by a digest of each, so that one pass over a data set is enough."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablefield._warning import warn

__all__ = ["copies", "digests", "warn_of_copies"]

# Bytes of the samples that are read at once.
_READ = 2**24
# Share of held-out samples that may be training samples, too: the usual test sets hold some.
_FEW = 0.01


def digests(samples: NDArray[Any], rows: NDArray[np.int64] | None = None, *, flipped: bool = False) -> Iterator[bytes]:
    """A digest of the values of each sample; floats of any precision with the same values have the same one.

    Args:
        samples: shape (n, ...), perhaps mapped from a file.
        rows: which of them, in this order; all if None.
        flipped: whether to take their mirror images, along the last axis.
    """
    count = len(samples) if rows is None else len(rows)
    step = max(1, _READ // max(1, samples[:1].nbytes))
    for start in range(0, count, step):
        part = samples[start : start + step] if rows is None else samples[rows[start : start + step]]
        part = np.ascontiguousarray(part[..., ::-1] if flipped else part)
        if part.dtype.kind == "f":
            part = part.astype(np.float64) + 0.0  # -0.0 becomes 0.0
        for sample in part.reshape(len(part), -1):
            yield hashlib.blake2b(sample.data, digest_size=16).digest()


def copies(
    samples: NDArray[Any],
    among: NDArray[Any],
    rows: NDArray[np.int64] | None = None,
    among_rows: NDArray[np.int64] | None = None,
    *,
    mirrored: bool = False,
) -> int:
    """How many of the samples equal one among others, which are read once and not kept.

    Args:
        samples: shape (k, ...).
        among: the others, shape (n, ...).
        rows: which samples; all if None.
        among_rows: which others; all if None.
        mirrored: whether the mirror images of the others count as well.
    """
    wanted = Counter(digests(samples, rows))
    found = sum(wanted.pop(digest, 0) for digest in digests(among, among_rows))
    if mirrored and wanted:
        found += sum(wanted.pop(digest, 0) for digest in digests(among, among_rows, flipped=True))
    return found


def warn_of_copies(copied: int, count: int, which: str, remedy: str) -> None:
    """Warn if at least 1 % of the held-out samples are training samples, too.

    Args:
        copied: how many are.
        count: how many held-out samples there are.
        which: the argument or the split that they come from.
        remedy: what to do.
    """
    if copied and copied >= _FEW * count:
        warn(
            f"{which}: {copied:,} of {count:,} held-out samples equal training samples, so they say nothing about samples "
            f"that the model has not seen: {remedy}."
        )
