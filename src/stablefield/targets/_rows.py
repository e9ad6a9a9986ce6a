"""The rows of a batch that use references: which they are, and how they are taken out of the batch and put back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield.targets._engine.query import Host
from stablefield.targets._references import Batch

__all__ = ["Rows", "flipped_rows", "mirrored", "noisiest", "put", "sent"]


@dataclass(frozen=True)
class Rows:
    """The rows that use references.

    Attributes:
        batch: themselves, shape (b, ...).
        rows: their indices in the user's batch, shape (b,), on the host.
        among: their indices among the rows that select the references, shape (b,).
        samples: their samples as stored, shape (b, d), if that may have rounded them.
    """

    batch: Batch
    rows: Tensor
    among: Tensor
    samples: Tensor | None

    def at(self, some: Tensor) -> "Rows":
        """Those at `some`, indices on the host."""
        there = sent(some, self.batch.x0.device)
        samples = None if self.samples is None else self.samples[there]
        return Rows(self.batch.at(there), self.rows[some], self.among[there], samples)


def flipped_rows(mirror: Tensor | None, x0: Tensor) -> Tensor:
    """Which rows are flipped samples, bool (B,).

    Raises:
        ValueError: if `flip` has several columns.
    """
    if mirror is None:
        return torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
    if mirror.shape[1] != 1:
        raise ValueError(
            f"flip has shape {tuple(mirror.shape)}: the Pool has one flipped sample for each, so pass shape ({len(x0)},)."
        )
    return mirror[:, 0]


def noisiest(level: Tensor, use: Tensor, capacity: int | None, generator: torch.Generator | None, host: Host) -> Tensor:
    """The indices of the rows for which `use` is set, or of the `capacity` noisiest of them.

    If the host may not read values, the number of indices is fixed, and other rows may be among them.
    """
    if host is not Host.NEVER:
        rows = use.nonzero()[:, 0]
        if capacity is None or len(rows) <= capacity:
            return rows
        return rows[_descending(level[rows], generator)[:capacity].sort().values]
    if capacity is None or len(level) <= capacity:
        return torch.arange(len(level), device=level.device)
    # Compilers accept no generator, and any tie-breaking that does not depend on the data will do.
    return _descending(torch.where(use, level, -1), None)[:capacity]


def _descending(level: Tensor, generator: torch.Generator | None) -> Tensor:
    """The order of descending levels, with ties in random order, because their positions may depend on the data."""
    device = level.device if generator is None else generator.device
    order = torch.randperm(len(level), generator=generator, device=device).to(level.device)
    return order[level[order].sort(descending=True, stable=True).indices]


def sent(rows: Tensor, device: torch.device) -> Tensor:
    """Send row indices, integers (b,), from the host to `device`.

    The host does not wait: CUDA copies up to 64 kB of pageable memory with the command, which is 8,192 rows.
    """
    return rows.to(device, non_blocking=True)


def put(old: Tensor, rows: Tensor, keep: Tensor, new: Tensor, host: Host) -> Tensor:
    """Put `new` into `old` at `rows`, except those to `keep`."""
    whole = len(rows) == len(old)
    if whole and host is Host.READS and not bool(keep.any()):
        return new.to(old.dtype)
    keep = keep.reshape(-1, *(1,) * (old.ndim - 1))
    value = torch.where(keep, old if whole else old[rows], new).to(old.dtype)
    return value if whole else old.index_copy(0, rows, value)


def mirrored(x: Tensor, flip: Tensor | None) -> Tensor:
    """Mirror the rows of `x` (B, ...) for which column j of `flip` (B, m) is set along axis -1-j: its own inverse."""
    if flip is None:
        return x
    for column in range(flip.shape[1]):
        x = torch.where(flip[:, column].reshape(-1, *(1,) * (x.ndim - 1)), x.flip(-1 - column), x)
    return x
