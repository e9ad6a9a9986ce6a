r"""The order of a data set's rows in training: a function of (seed, step), with no state to save.

Epoch e deals $\lfloor n / B \rfloor$ batches of B rows from one random permutation of the n rows, drawn from (seed, e)
alone; the n mod B rows that are left over sit that epoch out. Step s is batch s mod $\lfloor n / B \rfloor$ of epoch
$\lfloor s / \lfloor n / B \rfloor \rfloor$. Any step can be computed at any time, so a resumed run
continues where it stopped, and every process of a run can compute the same global batch by itself.

Why the remainder is dropped: a batch that straddled two permutations could hold a sample twice. Within one permutation the
rows of a batch are distinct and exchangeable, which is what makes a stable target over the batch unbiased.

The permutation sorts n raw 64-bit outputs of PCG64. NumPy promises that bit stream for good, but not the one of
`Generator.permutation`: a run may be resumed under another version of NumPy.
"""

import numpy as np
from numpy.typing import NDArray

from stablefield._shapes import whole_number

__all__ = ["IndexStream"]


class IndexStream:
    """Batches of row numbers: `batch_at(step)` depends on (seed, step) alone.

    The latest epoch's permutation is cached (8 n bytes), so steps within an epoch cost O(B).

    Args:
        size: number of rows n in the data set.
        batch: rows per batch B, over all processes together.
        seed: any whole number from 0.

    Raises:
        ValueError: if `size` or `batch` is below 1, `batch` is above `size`, or `seed` is negative.
    """

    def __init__(self, size: int, batch: int, seed: int) -> None:
        size, batch, seed = (
            whole_number("size", size),
            whole_number("batch", batch),
            whole_number("seed", seed, most=2**256),
        )
        if size < 1 or batch < 1:
            raise ValueError(f"size={size}, batch={batch}: both must be at least 1.")
        if batch > size:
            raise ValueError(
                f"batch={batch} is above the {size} images of the data set, and a batch holds no image twice: "
                f"pass a batch of at most {size}."
            )
        if seed < 0:
            raise ValueError(f"seed={seed}: pass a whole number from 0.")
        self.size = size
        self.batch = batch
        self.seed = seed
        self.batches_per_epoch = size // batch
        self._last: tuple[int, NDArray[np.int64]] | None = None

    def __repr__(self) -> str:
        return f"IndexStream(size={self.size}, batch={self.batch}, seed={self.seed})"

    def batch_at(self, step: int) -> NDArray[np.int64]:
        """Row numbers of the batch of `step`.

        Args:
            step: which batch, counted from 0.

        Returns:
            Distinct row numbers, shape (B,), int64, a fresh array.

        Raises:
            ValueError: if `step` is negative.
        """
        step = whole_number("step", step)
        if step < 0:
            raise ValueError(f"step={step}: steps are counted from 0.")
        epoch, position = divmod(step, self.batches_per_epoch)
        return self._permutation(epoch)[position * self.batch : (position + 1) * self.batch].copy()

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if self._last is None or self._last[0] != epoch:
            # A spawn key, not a list [seed, epoch]: lists of words can coincide (seed 2^32 + 5 and seed 5).
            bits = np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(epoch,)))
            self._last = epoch, np.argsort(bits.random_raw(self.size), kind="stable").astype(np.int64)
        return self._last[1]
