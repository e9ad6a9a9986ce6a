r"""References sharded over processes: every row sees the samples of all ranks, and no rank holds more than its own.

The posterior's sums merge associatively (see `partial`), so each rank computes them over its shard for the rows of all
ranks, and sends each row's sums home:

1. all-gather: rows with their noise scales, anchors and places of their sources;
2. every rank: partial sums of all rows over its own shard, at the cost of (rows of all ranks) x (its shard);
3. all-to-all: the partial sums of a row return to the rank that asked, which merges those of all ranks with the share of
   the row's own source.

Anchors travel with their rows, so logits of different shards are relative to the same number and keep their accuracy at
small noise. Per row, 2 d numbers go out to every rank and d come back from each.
"""

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from stablefield.reading import readable
from stablefield.targets.bank import Bank
from stablefield.targets.check import Check, row_numbers, value_check
from stablefield.targets.excess import Anchor, Excess
from stablefield.targets.kernel import Kernel
from stablefield.targets.partial import Partial
from stablefield.targets.query import Query
from stablefield.targets.ranks import Ranks
from stablefield.targets.references import Pool, Selection, own_gap
from stablefield.targets.sums import accumulate_all

__all__ = ["ShardedPool"]

_DTYPES = (torch.float32, torch.float64)


class ShardedPool:
    """References sharded over the ranks of a process group: rank r holds one part, every row sees all parts.

    Sample i of the whole set is sample i - start of the rank's shard, in the order of the ranks; `index` counts in the whole
    set. All ranks must call the target equally often, also with batches of different sizes; a rank without rows in the noise
    band still serves the others.

    Args:
        data: this rank's samples, shape (n_r, ...), as for `Pool`: a tensor on the device of the batches, or a numpy array
            (also memory-mapped). At least one.
        group: condition of each of them, integers of shape (n_r,), or None; on all ranks or on none.
        mirrored: use the mirror image of each reference, too, as `Pool` does.
        process_group: the ranks; the default group if None.
        timeout: how long to wait for the others before giving up. A new group with the same ranks is made for it, so all
            ranks must construct the pool. None: the waits of `process_group` itself.
        device: where batches are, if `data` are a numpy array; the CPU if not given.

    Raises:
        ValueError: if torch.distributed has no process group, or the ranks' samples do not fit together.
        RankError: if a rank does not answer.
    """

    def __init__(
        self,
        data: Tensor | NDArray[Any],
        group: Tensor | None = None,
        *,
        mirrored: bool = False,
        process_group: dist.ProcessGroup | None = None,
        timeout: timedelta | None = None,
        device: torch.device | None = None,
    ) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "torch.distributed has no process group: call torch.distributed.init_process_group first, "
                "or use a Pool in a single process."
            )
        self.pool = Pool(data, group=group, mirrored=mirrored)
        device = device or (data.device if isinstance(data, Tensor) else torch.device("cpu"))
        if timeout is not None:
            made = dist.new_group(dist.get_process_group_ranks(process_group), timeout=timeout)
            process_group = cast("dist.ProcessGroup", made)  # an int for those outside, and all are inside
        self._ranks = Ranks(process_group)
        shape = [len(data), *data.shape[1:]]
        mine = torch.tensor([len(shape), group is not None, mirrored, *shape, *[0] * (12 - len(shape))], device=device)
        parts = self._ranks.gather_equal(mine, "to compare their shards")
        first = parts[0]
        for rank, part in enumerate(parts):
            same = [0, 1, 2, *range(4, 15)]
            if not torch.equal(part[same], first[same]):
                raise ValueError(
                    f"the shards of rank 0 and rank {rank} do not fit: samples of shape "
                    f"{tuple(first[4 : 3 + int(first[0])].tolist())} and {tuple(part[4 : 3 + int(part[0])].tolist())}, "
                    "or group or mirrored on one of them only. Pass parts of one data set to all ranks."
                )
        counts = [int(part[3]) for part in parts]
        self.total = sum(counts)
        self.start = sum(counts[: self._ranks.rank])

    def __repr__(self) -> str:
        return f"ShardedPool(<{len(self.pool.data)} of {self.total} samples, from {self.start}>)"

    @property
    def group(self) -> Tensor | None:
        """Condition of each of this rank's samples."""
        return self.pool.group

    def checks(
        self,
        x0: Tensor,
        group: Tensor | None,
        reference_group: Tensor | None,  # noqa: ARG002
        index: Tensor | None,
        alone: Tensor | None,
        count: bool,  # noqa: ARG002
    ) -> list[Check]:
        """What the values of a call must meet, as described at `References`.

        Raises:
            ValueError: if `index` is missing, or shapes or groups do not fit.
        """
        index = self._fitting(x0, group, index)
        there = (index >= 0) & (index < self.total)
        if alone is not None:
            there = there | alone
        return [value_check(there, "index", index, f"the ranks hold samples 0 to {self.total - 1} together")]

    def select(
        self,
        x0: Tensor,
        group: Tensor | None,
        index: Tensor | None,
        generator: torch.Generator | None,  # noqa: ARG002
    ) -> Selection:
        """The shard and how to ask the others, as described at `References`; nothing is drawn.

        Raises:
            ValueError: if `index` is missing, or devices, shapes or groups do not fit.
        """
        index = self._fitting(x0, group, index)
        if not readable(x0.device):
            raise ValueError(f"{self} cannot be compiled or captured: its ranks wait for each other's rows.")
        own_group = None if self.pool.group is None else self.pool.group.to(x0.device)
        # Rows are compared with their samples where these are.
        exchange = _Exchange(self._ranks, self.start, own_group)
        return Selection(self.pool.bank(x0.device), index, own_group, self.pool.mirrored, exchange)

    def _fitting(self, x0: Tensor, group: Tensor | None, index: Tensor | None) -> Tensor:
        if index is None:
            raise ValueError("index is missing: a ShardedPool needs the place of each row in the data of all ranks.")
        if x0.shape[1:] != self.pool.data.shape[1:]:
            raise ValueError(
                f"rows of x0 have shape {tuple(x0.shape[1:])}, the pool's {tuple(self.pool.data.shape[1:])}: "
                "they must agree."
            )
        if group is not None and self.pool.group is None:
            raise ValueError(
                "group is given, but the ShardedPool has none: pass ShardedPool(..., group=...), one integer per sample."
            )
        return row_numbers("index", index, x0).long()


@dataclass(frozen=True)
class _Exchange:
    """How a rank asks the others.

    Attributes:
        ranks: the ranks.
        start: where this rank's shard begins in the whole set.
        reference_group: condition of each sample of the shard, or None.
    """

    ranks: Ranks
    start: int
    reference_group: Tensor | None

    def sums(
        self, query: Query, anchor: Anchor, bank: Bank, kernel: Kernel, mirrored: bool, chunk_size: int | None
    ) -> Partial:
        """Softmax sums of the rows of this rank over the references of all ranks, without the rows' own sources.

        Args:
            query: the rows of this rank; `source` counts in the whole set.
            anchor: their sources, with the same places.
            bank: the shard.
            kernel: the noise kernel.
            mirrored: whether mirror images are references, too.
            chunk_size: references per matrix product.

        Raises:
            ValueError: if a row's source is not the sample that its index says.
            RankError: if a rank has died or does not answer in time.
        """
        assert query.source is not None
        x = query.x_t
        wide = query.alpha.dtype
        group = torch.full_like(query.source, -1) if query.group is None else query.group
        scalars = torch.stack([query.alpha, query.sigma, query.source.to(wide), group.to(wide)], 1)
        counts, scalars, vectors = self._gathered(scalars, torch.cat([x, anchor.rows], 1), query.group is not None)
        partial, gap, wrong = self._over_shard(scalars, vectors, query, bank, kernel, mirrored, chunk_size)
        status = torch.stack([gap.to(wide), wrong.to(wide)], 1)
        parts = torch.stack([partial.peak, partial.mass, partial.mass_squared, partial.energy, partial.log_prior], 1)
        home = self.ranks.send_home(torch.cat([parts.to(wide), status], 1), counts)
        totals = self.ranks.send_home(partial.total, counts)
        for part in home:
            if bool((part[:, 6] > 0).any()):
                row = int(part[:, 6].nonzero()[0, 0])
                raise ValueError(
                    f"row {row} of the rows in the noise band is not sample {int(query.source[row])} of the pool (largest "
                    f"difference {part[row, 5].item():.3g}): pass flip= for mirrored rows, alone= for rows with another "
                    "augmentation of their own, or the right index. Shards in half precision need rows that were rounded "
                    "alike: take x0 from them."
                )
        merged = Partial.empty(*_shape(x), x.dtype, x.device)
        for part, total in zip(home, totals, strict=True):
            peak, mass, mass_squared, energy, log_prior = part[:, :5].unbind(1)
            merged = merged.merge(Partial(peak, mass, mass_squared, energy, total, log_prior))
        return merged

    def _gathered(self, scalars: Tensor, vectors: Tensor, grouped: bool) -> tuple[list[int], Tensor, Tensor]:
        head = torch.tensor(
            [len(vectors), vectors.shape[1], _DTYPES.index(vectors.dtype), grouped], device=vectors.device
        )
        heads = self.ranks.gather_equal(head, "to compare their batches")
        for rank, other in enumerate(heads):
            if not torch.equal(other[1:], heads[0][1:]):
                raise ValueError(
                    f"the batches of rank 0 and rank {rank} do not fit: pass x0 and x_t of one dtype, and group on all "
                    "ranks or on none."
                )
        counts = [int(other[0]) for other in heads]
        if sum(counts) == 0:
            return counts, scalars, vectors
        return counts, self.ranks.gather(scalars, counts), self.ranks.gather(vectors, counts)

    def _over_shard(
        self,
        scalars: Tensor,
        vectors: Tensor,
        query: Query,
        bank: Bank,
        kernel: Kernel,
        mirrored: bool,
        chunk_size: int | None,
    ) -> tuple[Partial, Tensor, Tensor]:
        """Sums of the rows of all ranks over this shard, and for each row how far its source is off, and whether too far."""
        x, rows = (part.contiguous() for part in vectors.chunk(2, 1))
        alpha, sigma, source, group = scalars.unbind(1)
        place = source.long() - self.start
        here = (place >= 0) & (place < len(bank))
        place = torch.where(here, place, -1)
        asked = replace(
            query,
            x_t=x,
            alpha=alpha,
            sigma=sigma,
            source=place,
            group=None if query.group is None else group.long(),
            reference_group=None if query.group is None else self.reference_group,
            like=x,
        )
        anchor = Anchor(rows, place)
        excess = Excess(asked, anchor, bank, kernel)
        # Every row's own source is a reference of some rank, so no row is without one: what weighs nothing beside it is
        # left out here.
        partial = Partial.empty(*_shape(x), x.dtype, x.device, level=torch.zeros_like(alpha))
        partial = accumulate_all(asked, anchor, bank, excess, kernel, partial, mirrored, chunk_size)
        gap, wrong = own_gap(rows, bank.rows(place.clamp(min=0), bank.dtype_with(rows)), bank, rounded=False)
        return partial, torch.where(here, gap, 0), here & wrong


def _shape(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.shape[1]
