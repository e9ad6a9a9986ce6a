"""Verification that the rows of a batch are the samples of a pool that they claim to be.

A row that is a different sample would be missing among its references, which silently biases the target.
"""

import torch
from torch import Tensor

from stablefield.targets._engine.reference_matrix import ReferenceMatrix, in_blocks, largest_magnitude
from stablefield.targets._references import Stored

__all__ = ["compared", "verified_samples"]


def compared(
    x0: Tensor, index: Tensor, matrix: ReferenceMatrix, rounded: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compare each row of `x0` with its sample.

    Args:
        x0: the rows, shape (B, ...).
        index: the claimed sample of each, shape (B,).
        matrix: the samples.
        rounded: whether the matrix may have rounded them to the dtype in which it stores them.

    Returns:
        The largest difference, whether it is a different sample, and whether they differ by more than rounding in float32,
        shape (B,) each; and the samples, shape (B, d).
    """
    dtype, given, narrow = matrix.dtype_with(x0), x0.flatten(1), torch.finfo(torch.float32).eps
    eps = max(torch.finfo(x0.dtype).eps, matrix.eps if rounded else narrow)
    samples = matrix.rows(index, dtype)

    def gap_and_size(some: slice) -> Tensor:
        return torch.stack([largest_magnitude(samples[some] - given[some]), largest_magnitude(samples[some])])

    gap, size = in_blocks(gap_and_size, given).unbind(0)
    size = size + matrix.holds_bytes
    # Rounding, including that of decoding bytes, and a hundredth of the data's spread for different arithmetic.
    allowed = 4 * eps * size + torch.finfo(dtype).tiny + 0.01 * matrix.spread
    return gap, ~(gap <= allowed), gap > 4 * narrow * size, samples


def verified_samples(x0: Tensor, stored: Stored, places: Tensor, flipped: Tensor | None = None) -> Tensor | None:
    """Verify that each row is its claimed sample, and return the samples as stored.

    Args:
        x0: the rows that use references, shape (B, ...).
        stored: the claimed sample of each.
        places: indices of the rows in the user's batch, shape (B,).
        flipped: which rows are flipped samples, bool (B,), if those are stored, too.

    Returns:
        The samples, shape (B, d), float32, or float64 if either is; None if the rows are the same up to rounding in float32.

    Raises:
        ValueError: if a row is a different sample. Its source would not be among the references, which silently biases the
            target.
    """
    index = stored.index
    gap, wrong, moved, samples = compared(x0, index, stored.matrix)
    if flipped is not None and stored.flipped is not None:
        other = compared(x0, index, stored.flipped)
        gap, wrong, moved = (torch.where(flipped, b, a) for a, b in zip((gap, wrong, moved), other, strict=False))
        samples = torch.where(flipped[:, None], other[3], samples)
    # One value to read for both.
    seen = int((2 * wrong.int() + moved.int()).max()) if len(x0) else 0
    if seen >= 2:
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"row {int(places[row])} of x0 is not sample {int(index[row])} of the Pool (largest difference "
            f"{gap[row].item():.3g}): pass flip= for mirrored rows, source_only= for rows with another augmentation, or "
            "the right index."
        )
    return samples if seen else None
