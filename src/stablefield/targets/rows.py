"""The rows of a call of a target: what is checked of their shapes, which of them use references, and flips undone."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stablefield.reading import readable, watched
from stablefield.shapes import check_tensor, per_row

__all__ = [
    "Batch",
    "Known",
    "as_stored",
    "check_pair",
    "flipped",
    "noisiest",
    "noisiest_of_a_fixed_number",
    "put",
    "row_flags",
    "sent",
]


@dataclass(frozen=True)
class Known:
    """What decides which rows use references, on the host; on the batch's device in a compiled function.

    Attributes:
        alpha: scale of the data, shape (B,).
        sigma: scale of the noise, shape (B,).
        source_only: rows that the caller keeps from references, bool (B,), or None.
    """

    alpha: Tensor
    sigma: Tensor
    source_only: Tensor | None

    @property
    def level(self) -> Tensor:
        """The noise level of each row."""
        return self.sigma / self.alpha

    def levels_at(self, rows: Tensor) -> Tensor:
        """Alpha over sigma of `rows`, float64."""
        return self.alpha[rows].double() / self.sigma[rows].double()


@dataclass(frozen=True)
class Batch:
    """The rows of a call with flips undone."""

    x0: Tensor
    x_t: Tensor
    alpha: Tensor
    sigma: Tensor
    labels: Tensor | None
    reference_labels: Tensor | None
    index: Tensor | None

    @property
    def truth(self) -> Tensor | None:
        """The condition of each source, where that of the row may have been dropped."""
        return self.labels if self.reference_labels is None else self.reference_labels

    def at(self, rows: Tensor) -> "Batch":
        """Some of the rows."""
        return Batch(
            self.x0[rows],
            self.x_t[rows],
            self.alpha[rows],
            self.sigma[rows],
            None if self.labels is None else self.labels[rows],
            None if self.reference_labels is None else self.reference_labels[rows],
            None if self.index is None else self.index[rows],
        )


def as_stored(batch: Batch, samples: Tensor) -> Batch:
    """The batch with its `samples` (B, d) as the pool holds them in place of the clean samples, and the same noise.

    A pool in half precision, or of bytes, holds samples that were rounded. Beside them a source that was not would be
    favoured: its distance to x_t alone would be free of rounding.
    """
    stored = samples.view(batch.x0.shape)
    moved = torch.addcmul(batch.x_t.to(stored.dtype), per_row(batch.alpha, stored), stored - batch.x0)
    return replace(batch, x0=stored, x_t=moved)


def noisiest(level: Tensor, use: Tensor, capacity: int | None, generator: torch.Generator | None) -> Tensor:
    """The rows for which `use` is set, or the `capacity` noisiest of them, in their order."""
    rows = use.nonzero()[:, 0]
    if capacity is None or len(rows) <= capacity:
        return rows
    return rows[_descending(level[rows], generator)[:capacity].sort().values]


def noisiest_of_a_fixed_number(level: Tensor, use: Tensor, capacity: int | None) -> Tensor:
    """`capacity` rows, if there are as many, and among them the noisiest for which `use` is set."""
    if capacity is None or len(level) <= capacity:
        return torch.arange(len(level), device=level.device)
    # No compiler takes a generator, and none is needed: ties must be broken independently of the data, in any way.
    return _descending(torch.where(use, level, -1), None)[:capacity]


def _descending(level: Tensor, generator: torch.Generator | None) -> Tensor:
    """The order of descending levels, equal ones in random order: their places may depend on the data."""
    device = level.device if generator is None else generator.device
    order = torch.randperm(len(level), generator=generator, device=device).to(level.device)
    return order[level[order].sort(descending=True, stable=True).indices]


def sent(rows: Tensor, device: torch.device) -> Tensor:
    """Bring places of rows, integers (b,), from the host to `device`.

    A GPU is not waited for: CUDA takes up to 64 kB from ordinary memory with the command, which are 8,192 rows.
    """
    return rows.to(device, non_blocking=True)


def put(old: Tensor, rows: Tensor, keep: Tensor, new: Tensor) -> Tensor:
    """Put `new` into `old` at `rows`, but for those to `keep`."""
    whole = len(rows) == len(old)
    if whole and readable(old.device) and watched(old.device) and not bool(keep.any()):
        return new.to(old.dtype)
    keep = keep.reshape(-1, *(1,) * (old.ndim - 1))
    value = torch.where(keep, old if whole else old[rows], new).to(old.dtype)
    return value if whole else old.index_copy(0, rows, value)


def flipped(x: Tensor, flip: Tensor | None) -> Tensor:
    """Mirror the rows of `x` (B, ...) for which column j of `flip` (B, m) is set along axis -1-j: its own inverse."""
    if flip is None:
        return x
    for column in range(flip.shape[1]):
        x = torch.where(flip[:, column].reshape(-1, *(1,) * (x.ndim - 1)), x.flip(-1 - column), x)
    return x


def row_flags(name: str, value: Tensor, x0: Tensor, columns: bool = False) -> Tensor:
    """Check that the argument `name` is one bool per row of `x0` (B, ...), or one per row and axis if `columns`.

    Returns:
        Shape (B,), or (B, m) if `columns`.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if its shape or dtype does not fit.
    """
    check_tensor(name, value)
    if value.dtype != torch.bool or value.shape[:1] != x0.shape[:1] or value.ndim > 1 + columns:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}: it needs one bool per row, shape ({len(x0)},)"
            + (f" or ({len(x0)}, m)." if columns else ".")
        )
    if not columns:
        return value
    flags = value.reshape(len(x0), -1)
    if flags.shape[1] >= x0.ndim:
        raise ValueError(
            f"{name} has {flags.shape[1]} columns, but rows of shape {tuple(x0.shape[1:])} have fewer axes."
        )
    return flags


def check_pair(x0: Tensor, x_t: Tensor, noise: Tensor | None) -> None:
    """Check that the samples of a call are floating point and of one shape and device.

    Raises:
        TypeError: if one is no tensor.
        ValueError: if shapes, dtypes or devices do not fit.
    """
    for name, value in (("x0", x0), ("x_t", x_t), ("noise", noise)):
        if value is not None:
            check_tensor(name, value)
    if not x0.is_floating_point():
        raise ValueError(f"x0 has dtype {x0.dtype}: it must be floating point (uint8 images: x0 / 127.5 - 1).")
    if x0.ndim < 2 or len(x0) == 0:
        raise ValueError(f"x0 has shape {tuple(x0.shape)}: it needs at least one row and one data dimension, (B, ...).")
    if not x_t.is_floating_point():
        raise ValueError(f"x_t has dtype {x_t.dtype}: noisy samples are floating point.")
    for name, value in (("x_t", x_t), ("noise", noise)):
        if value is None:
            continue
        if value.shape != x0.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, x0 has {tuple(x0.shape)}: they must be equal.")
        if value.device != x0.device:
            raise ValueError(f"{name} is on {value.device}, x0 is on {x0.device}: move one of them.")
        if not value.is_floating_point():
            raise ValueError(f"{name} has dtype {value.dtype}: noise is floating point.")
