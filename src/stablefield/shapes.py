"""Rows and their scalars: how a number per row meets a batch of images.

Throughout the library a batch has shape (B, ...) and whatever belongs to a row (time, noise level, weight) has shape
(B,) or is one float for all rows.
"""

import torch
from torch import Tensor

__all__ = ["per_row", "row_values"]


def row_values(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """Return `value`, a float or a tensor of shape () or (B,), as a tensor of shape (B,) on the device of `x`.

    Args:
        name: what to call the value in an error.
        value: a float, or a tensor of shape () or (B,).
        x: the batch it belongs to, shape (B, ...).

    Raises:
        ValueError: if the shape is neither () nor (B,), or a tensor lies on another device.
    """
    if not isinstance(value, Tensor):
        return torch.full(
            (x.shape[0],), float(value), dtype=torch.float64 if _has_float64(x) else x.dtype, device=x.device
        )
    if value.ndim == 0:
        return value.to(x.device).expand(x.shape[0])
    if value.shape != x.shape[:1]:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but the batch has {x.shape[0]} rows: "
            f"pass one number, or one per row (shape ({x.shape[0]},))."
        )
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, but the batch is on {x.device}: move one of them.")
    return value


def per_row(value: Tensor, x: Tensor) -> Tensor:
    """Shape `value` (B,) as (B, 1, ..., 1) in the dtype of `x` (B, ...), to broadcast against it."""
    return value.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def _has_float64(x: Tensor) -> bool:
    return x.device.type != "mps"
