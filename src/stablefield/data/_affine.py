r"""Affine warps of images, antialiased: the image is warped at twice its resolution.

Three linear steps, each row of a batch by its own map:

1. Double: insert $\sum_j c_j (x_{-j} + x_{1+j})$ between two pixels of a row, with the eight-point weights of Deslauriers
and
   Dubuc; keep the pixels themselves. Columns likewise.
2. Warp: cubic interpolation of the doubled image at the doubled grid of the output.
3. Halve by lifting: with $d$ the odd samples less their prediction from the even ones by the rule of step 1, each even
   sample becomes $s + \frac12 \sum_j c_j (d_{-j} + d_{1+j})$. This low-pass filter removes the finest frequency of the
   doubled grid, which would alias where a map shrinks the image (by up to two).

Step 3 undoes step 1 exactly, because the details $d$ of a doubled image are zero. A map of the pixel grid onto itself (a
shift by whole pixels, a quarter turn of a square) therefore moves pixels without changing them.

Beyond its border an image continues by reflection, without repeating the border pixel. Near sharp edges, values may exceed
the range of the input by some percent; they are not clipped.

References:
    Deslauriers, Dubuc, "Symmetric iterative interpolation processes", Constructive Approximation 5, 1989; Sweldens, "The
    lifting scheme: A construction of second generation wavelets", SIAM Journal on Mathematical Analysis 29, 1998; Keys,
    "Cubic convolution interpolation for digital image processing", IEEE Transactions on ASSP 29, 1981.
"""

import torch
from torch import Tensor

__all__ = ["warp"]

# Weights of the 1st, 2nd, 3rd and 4th neighbour on each side of a midpoint: exact for polynomials of degree 7.
_MIDPOINT = (1225 / 2048, -245 / 2048, 49 / 2048, -5 / 2048)
_REACH = len(_MIDPOINT)
# Samples of the doubled grid beyond the border that halving reads: two midpoint rules, one after the other.
_MARGIN = 2 * (2 * _REACH - 1)


def warp(images: Tensor, transform: Tensor) -> Tensor:
    """Move the content of images by affine maps.

    Args:
        images: shape (B, C, H, W), floating point, H and W at least 4.
        transform: shape (B, 2, 3), on the device of the images: moves the content at (x, y) to `transform @ (x, y, 1)`, in
            pixels from the centre of the image, x to the right and y down.

    Returns:
        Shape (B, C, H, W), in the dtype of `images`; computed in float32, or float64 for float64 images.

    Raises:
        ValueError: if shapes, dtype or device do not fit, or an image is smaller than 4x4.
    """
    if images.ndim != 4 or not images.is_floating_point() or min(images.shape[-2:]) < _REACH:
        raise ValueError(
            f"images has shape {tuple(images.shape)} and dtype {images.dtype}: warp takes floating point images "
            f"(B, C, H, W) of at least {_REACH}x{_REACH} pixels."
        )
    if transform.shape != (images.shape[0], 2, 3) or transform.device != images.device:
        raise ValueError(
            f"transform has shape {tuple(transform.shape)} on {transform.device}: pass one map per image, "
            f"shape {(images.shape[0], 2, 3)} on {images.device}."
        )
    dtype = torch.promote_types(images.dtype, torch.float32)
    doubled = _double(_double(images.to(dtype)).mT).mT
    sources = _sources(transform.to(dtype), images.shape[-2], images.shape[-1])
    moved = _cubic(doubled, sources)
    return _halve(_halve(moved).mT).mT.to(images.dtype)


def _sources(transform: Tensor, height: int, width: int) -> Tensor:
    """The source of each sample of the doubled output grid with its margin; -1 and 1 are the border pixels."""

    def positions(side: int) -> Tensor:
        doubled = torch.arange(-_MARGIN, 2 * side - 1 + _MARGIN, dtype=transform.dtype, device=transform.device)
        return (doubled - (side - 1)) / 2

    # Written out because a matrix product could be rounded to TF32.
    (a, b, shift_x), (c, d, shift_y) = (row[:, :, None, None].unbind(1) for row in transform.unbind(1))
    x = positions(width)[None, None, :] - shift_x
    y = positions(height)[None, :, None] - shift_y
    determinant = a * d - b * c
    source_x = (d * x - b * y) / determinant
    source_y = (a * y - c * x) / determinant
    return torch.stack([source_x * (2 / (width - 1)), source_y * (2 / (height - 1))], dim=-1)


def _cubic(image: Tensor, sources: Tensor) -> Tensor:
    """Keys' cubic interpolation of `image` at `sources`, mirrored at the border.

    Torch's own cubic kernel (a = -3/4) does not reproduce straight lines: it would move edges by up to 1/20 of a sample.
    Between x_0 and x_1, at t, Keys' interpolation is the linear one of x less t (1 - t) / 2 times the linear one of the
    second differences of x; in two dimensions it is the product of the two rules.
    """
    along_y = _second_difference(image.mT).mT
    stack = torch.cat([image, _second_difference(image), along_y, _second_difference(along_y)], dim=1)
    linear = torch.nn.functional.grid_sample(stack, sources, "bilinear", "reflection", align_corners=True).chunk(4, 1)
    x, y = (
        _bump(at, side - 1) for at, side in zip(sources.unbind(-1), (image.shape[-1], image.shape[-2]), strict=True)
    )
    return linear[0] - x * linear[1] - y * linear[2] + x * y * linear[3]


def _bump(source: Tensor, last: int) -> Tensor:
    """The factor t (1 - t) / 2 at the positions `source` (B, H, W), -1 to 1, on an axis with samples from 0 to `last`."""
    t = ((source + 1) / 2 * last).frac().abs()
    return (t * (1 - t) / 2)[:, None]


def _second_difference(x: Tensor) -> Tensor:
    wide = torch.nn.functional.pad(x, (1, 1, 0, 0), mode="reflect")
    return wide[..., :-2] - 2 * x + wide[..., 2:]


def _midpoints(x: Tensor) -> Tensor:
    """Values between the samples of the last axis that have four neighbours on each side, (..., n) to (..., n - 7)."""
    count = x.shape[-1] - 2 * _REACH + 1
    left = (x.narrow(-1, _REACH - 1 - j, count) for j in range(_REACH))
    right = (x.narrow(-1, _REACH + j, count) for j in range(_REACH))
    terms = [weight * (before + after) for weight, before, after in zip(_MIDPOINT, left, right, strict=True)]
    # The outermost, smallest terms first.
    return torch.stack(terms[::-1]).sum(0)


def _double(x: Tensor) -> Tensor:
    """Put midpoints between the samples of the last axis, (..., n) to (..., 2n - 1)."""
    between = _midpoints(torch.nn.functional.pad(x, (_REACH - 1, _REACH - 1, 0, 0), mode="reflect"))
    doubled = x.new_empty(*x.shape[:-1], 2 * x.shape[-1] - 1)
    doubled[..., 0::2] = x
    doubled[..., 1::2] = between
    return doubled


def _halve(x: Tensor) -> Tensor:
    """Low-pass and take every second sample of the last axis, (..., 2n - 1 + 2 margins) to (..., n)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    details = odd[..., _REACH - 1 : 1 - _REACH] - _midpoints(even)
    return even[..., 2 * _REACH - 1 : 1 - 2 * _REACH] + _midpoints(details) / 2
