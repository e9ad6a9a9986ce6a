"""The batch of a call of a target: its rows, which of them use references, and flips undone."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stablefield.targets._engine.query import Host

__all__ = ["Batch", "Scales", "flipped", "noisiest", "put", "sent"]


@dataclass(frozen=True)
class Scales:
    """What decides which rows use references, where the host may read it; on the batch's device in a compiled function.

    Attributes:
        alpha: scale of the data, shape (B,).
        sigma: scale of the noise, shape (B,).
        source_only: rows that use their source alone, bool (B,), or None.
    """

    alpha: Tensor
    sigma: Tensor
    source_only: Tensor | None

    @property
    def noise_level(self) -> Tensor:
        """The noise level of each row."""
        return self.sigma / self.alpha


@dataclass(frozen=True)
class Batch:
    """The rows of a call."""

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

    def flipped(self, flip: Tensor | None) -> "Batch":
        """The batch with its samples flipped, as `flipped` describes."""
        return replace(self, x0=flipped(self.x0, flip), x_t=flipped(self.x_t, flip))

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


def noisiest(level: Tensor, use: Tensor, capacity: int | None, generator: torch.Generator | None, host: Host) -> Tensor:
    """The places of the rows for which `use` is set, or of the `capacity` noisiest of them.

    Where the host may read no value, there are as many places whatever the values are, and others may be among them.
    """
    if host is not Host.NEVER:
        rows = use.nonzero()[:, 0]
        if capacity is None or len(rows) <= capacity:
            return rows
        return rows[_descending(level[rows], generator)[:capacity].sort().values]
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

    The host does not wait: CUDA takes up to 64 kB from ordinary memory with the command, which are 8,192 rows.
    """
    return rows.to(device, non_blocking=True)


def put(old: Tensor, rows: Tensor, keep: Tensor, new: Tensor, host: Host) -> Tensor:
    """Put `new` into `old` at `rows`, but for those to `keep`."""
    whole = len(rows) == len(old)
    if whole and host is Host.READS and not bool(keep.any()):
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
