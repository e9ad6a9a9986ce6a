r"""References sharded over processes: every row sees the samples of all ranks, and each rank holds only its own.

The posterior's sums merge associatively (see `_engine/online_softmax`), so each rank computes them over its shard for the
rows of all ranks, and sends each row's sums back:

1. all-gather: rows with their noise scales, anchors and the indices of their sources;
2. every rank: partial sums of all rows over its own shard, at the cost of (rows of all ranks) x (its shard);
3. all-to-all: the partial sums of a row return to the rank that asked, which merges those of all ranks with the share of
   the row's own source.

Rows are sent with their anchors, so logits of different shards are relative to the same number and stay accurate at low
noise. Per row, 2 d numbers go out to every rank and d come back from each.

A rank knows only its own samples: their pixels, labels and weights. So the rank with a row's sample compares the two and
counts the draws of all ranks; it sends the results to the rank that asked, with the sums. It also sends the prior of the
row's own sample, which the asking rank then subtracts from the logits; during summation only a lower bound on it is known.
"""

import math
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from stablefield._distributed import Ranks
from stablefield._shapes import whole_number
from stablefield.targets._checks import Check, require
from stablefield.targets._draws import Draws, Shares
from stablefield.targets._engine.assembly import summed
from stablefield.targets._engine.online_softmax import OnlineSoftmax
from stablefield.targets._engine.query import Host, Plan, Query
from stablefield.targets._pool import OTHER_LABEL, WITHOUT_WEIGHT, Pool
from stablefield.targets._pool_arguments import sample_weights
from stablefield.targets._references import Batch, Selection
from stablefield.targets._subset import drawn_seed, drawn_subset
from stablefield.targets._verification import compared

__all__ = ["ShardedPool"]

_DTYPES = (torch.float32, torch.float64)


class ShardedPool:
    """References sharded over the ranks of a process group: rank r holds one part, every row sees all parts.

    Sample i of the whole set is sample i - start of the rank's shard, in the order of the ranks; `index` counts in the whole
    set. All ranks must call the target equally often; their batches may differ in size, and a rank without rows in the noise
    band still serves the others.

    Args:
        data: this rank's samples, shape (n_r, ...), as for `Pool`: a tensor on the device of the batches, or a numpy array
            (also memory-mapped). At least one.
        labels: condition of each of them, integers of shape (n_r,), or None; on all ranks or on none.
        mirrored: use the mirror image of each reference, too, as `Pool` does; rows must be flipped with probability 1/2.
        unlabelled_size: for rows without a label, the number of references, drawn from all ranks' samples, as for `Pool`.
        resampled: whether rows are drawn anew from their samples' distributions, as for `Pool`.
        weights: how likely each of them is to be drawn, shape (n_r,), as for `Pool`, on one scale for all ranks; on all
            ranks or on none. They may all be 0 on some ranks.
        process_group: the ranks; the default group if None.
        timeout: how long to wait for the others before giving up. This makes a new group with the same ranks, so all ranks
            must construct the pool. None: the timeout of `process_group` itself.
        device: the device of the batches, if `data` are a numpy array; the CPU if not given.

    Raises:
        ValueError: if torch.distributed has no process group, or the ranks' samples do not fit together.
        RankError: if a rank does not answer.
    """

    def __init__(
        self,
        data: Tensor | NDArray[Any],
        labels: Tensor | None = None,
        *,
        mirrored: bool = False,
        unlabelled_size: int | None = None,
        resampled: bool = False,
        weights: Tensor | NDArray[Any] | None = None,
        process_group: dist.ProcessGroup | None = None,
        timeout: timedelta | None = None,
        device: torch.device | None = None,
    ) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "torch.distributed has no process group: call torch.distributed.init_process_group first, "
                "or use a Pool in a single process."
            )
        self.pool = Pool(data, labels=labels, mirrored=mirrored, resampled=resampled)
        given = None if weights is None else sample_weights(weights, len(data))
        device = device or (data.device if isinstance(data, Tensor) else torch.device("cpu"))
        if timeout is not None:
            made = dist.new_group(dist.get_process_group_ranks(process_group), timeout=timeout)
            process_group = cast("dist.ProcessGroup", made)  # an int for those outside, and all are inside
        self._ranks = Ranks.of(process_group)
        shape = [len(data), *data.shape[1:]]
        if unlabelled_size is not None:
            unlabelled_size = whole_number("unlabelled_size", unlabelled_size, 1)
            if labels is None:
                raise ValueError(f"unlabelled_size is {unlabelled_size}, but there are no labels: pass labels with it.")
        kind = [labels is not None, mirrored, given is not None, resampled, unlabelled_size or 0]
        mine = torch.tensor([len(shape), *kind, *shape, *[0] * (12 - len(shape))], device=device)
        parts = self._ranks.all_gather(mine, "to compare their shards")
        first = parts[0]
        for rank, part in enumerate(parts):
            same = [*range(6), *range(7, len(first))]
            if not torch.equal(part[same], first[same]):
                raise ValueError(
                    f"the shards of rank 0 and rank {rank} do not fit: samples of shape "
                    f"{tuple(first[7 : 6 + int(first[0])].tolist())} and {tuple(part[7 : 6 + int(part[0])].tolist())}, "
                    "or labels, mirrored, weights, resampled or unlabelled_size on only one of them. Pass parts of one data "
                    "set to all ranks."
                )
        counts = [int(part[6]) for part in parts]
        self.total = sum(counts)
        if unlabelled_size is not None and unlabelled_size > self.total:
            raise ValueError(
                f"unlabelled_size is {unlabelled_size}: pass at most the {self.total} samples of all ranks, or None for all."
            )
        self.unlabelled_size = unlabelled_size
        self.start = sum(counts[: self._ranks.rank])
        self._weights, self._least_prior = (None, 0.0) if given is None else self._on_one_scale(given, device)
        known = torch.ones(len(data), device="cpu") if self._weights is None else self._weights
        self._shares = Shares.gathered(self._ranks, labels, known, device)
        self._exchanges: dict[torch.device, _Exchange] = {}
        self._counts = False

    def __repr__(self) -> str:
        return f"ShardedPool(<{len(self.pool.data)} of {self.total} samples, from {self.start}>)"

    def _on_one_scale(self, weights: Tensor, device: torch.device) -> tuple[Tensor, float]:
        """The weights with 1 for the largest of all ranks, and the log of the smallest of all ranks that is not 0."""
        positive = torch.where(weights > 0, weights, torch.inf)
        ends = torch.stack([weights.max(), positive.min()]).to(device)
        parts = torch.stack(self._ranks.all_gather(ends, "to compare their weights"))
        largest, smallest = float(parts[:, 0].max()), float(parts[:, 1].min())
        if not largest > 0:
            raise ValueError(
                "the weights are all 0 on all ranks: give each sample that can be drawn a positive weight."
            )
        # Divide first, as a single process would, so that equal weights stay equal.
        weights = weights / largest
        return weights, math.log(smallest) - math.log(largest)

    @property
    def labels(self) -> Tensor | None:
        """Condition of each of this rank's samples."""
        return self.pool.labels

    def checks(self, batch: Batch, count: bool) -> list[Check]:
        """Conditions on the values of a call, as described at `References`.

        The ranks that hold the samples make the comparisons with them later.

        Raises:
            ValueError: if `index` is missing, or shapes or labels do not fit.
        """
        self._counts = count
        rule = f"the ranks hold samples 0 to {self.total - 1} together"
        index = self._index(batch)
        checks = self.pool.index_checks(index, batch.source_only, self.total, rule)
        if not count or not self.pool.mirrored:
            return checks
        # Each rank counts its own rows, of its own samples, of which it can tell the symmetric ones.
        place = index - self.start
        counted = (place >= 0) & (place < len(self.pool.data))
        counted = counted if batch.source_only is None else counted & ~batch.source_only
        even = self.pool.flip_check(place.clamp(0, len(self.pool.data) - 1), batch, counted)
        return checks if even is None else [*checks, even]

    def select(self, batch: Batch, generator: torch.Generator | None, host: Host) -> Selection:
        """The shard and the exchange with the other ranks, as described at `References`.

        Draws nothing but, with `unlabelled_size`, a seed; that of rank 0 is used.

        Raises:
            ValueError: if `index` is missing, or devices, shapes or labels do not fit.
        """
        index, device = self._index(batch), batch.x0.device
        if host is Host.NEVER:
            raise ValueError(f"{self} cannot be compiled or captured: its ranks wait for each other's rows.")
        exchange = self._exchange(device)
        exchange = exchange if self._counts else replace(exchange, draws=None)
        if self.unlabelled_size is not None:
            exchange = replace(exchange, seed=drawn_seed(generator))
        # The ranks that hold the samples compare rows with them.
        return Selection(
            matrix=self.pool.matrix(device),
            source=index,
            labels=exchange.reference_labels,
            mirrored=self.pool.mirrored,
            resampled=self.pool.resampled,
            ranks=exchange,
        )

    def _exchange(self, device: torch.device) -> "_Exchange":
        """The exchange for batches on `device`; made once, so that a step moves no data."""
        if device not in self._exchanges:
            labels, weights = self.pool.labels, self._weights
            labels = None if labels is None else labels.to(device, torch.long)
            if labels is not None:
                self.pool.matrix(device).by_label(labels)
            weights = None if weights is None else weights.to(device)
            log_prior = None if weights is None else weights.log()
            draws = None
            if self._shares.own > 0:
                draws = Draws(self._shares, weights, labels, self.start, len(self.pool.data), self.total, device)
            self._exchanges[device] = _Exchange(
                ranks=self._ranks,
                start=self.start,
                total=self.total,
                reference_labels=labels,
                log_prior=log_prior,
                least_prior=self._least_prior,
                draws=draws,
                unlabelled_size=self.unlabelled_size,
                resampled=self.pool.resampled,
            )
        return self._exchanges[device]

    def _index(self, batch: Batch) -> Tensor:
        return self.pool.checked_index(batch, "ShardedPool", "in the data of all ranks")


@dataclass(frozen=True)
class _Exchange:
    """The exchange of a rank with the others.

    Attributes:
        ranks: the ranks.
        start: index of this rank's first sample in the whole set.
        total: number of samples of the whole set.
        reference_labels: condition of each sample of the shard, or None.
        log_prior: log prior weight of each sample of the shard on one scale for all ranks, float64, or None.
        least_prior: the smallest log prior weight of a sample of any rank that can be drawn.
        draws: counts the rows, or None.
        unlabelled_size: number of references of rows without a label, drawn from the whole set; None for all.
        seed: of that draw.
        resampled: whether the rows are other draws than the samples.
    """

    ranks: Ranks
    start: int
    total: int
    reference_labels: Tensor | None
    log_prior: Tensor | None
    least_prior: float
    draws: Draws | None
    unlabelled_size: int | None
    resampled: bool
    seed: int = 0

    def sums(self, query: Query, plan: Plan) -> OnlineSoftmax:
        """Softmax sums of the rows of this rank over the references of all ranks, without the rows' own sources.

        Args:
            query: the rows of this rank; `source` counts in the whole set, and `anchor` holds the sources.
            plan: the plan of the call, whose matrix is the shard.

        Returns:
            The sums, with logits relative to that of the row's own source, which thus has logit 0.

        Raises:
            ValueError: if a row's source is not the sample at its index, or has another label, or weight 0.
            RankError: if a rank has died or does not answer in time.
        """
        assert query.source is not None
        assert query.anchor is not None
        assert query.places is not None
        x, sources, places, wide = query.x_t, query.source, query.places, query.alpha.dtype
        labels = torch.full_like(sources, -1) if query.labels is None else query.labels
        scalars = torch.stack([query.alpha, query.sigma, sources.to(wide), labels.to(wide)], 1)
        vectors = torch.cat([x, query.anchor], 1)
        counts, seed, scalars, vectors = self._gathered(scalars, vectors, query.labels is not None)
        part, status, frequent = self._over_shard(scalars, vectors, query, plan, seed)
        parts = torch.stack([part.peak, part.mass, part.mass_squared, part.energy, part.log_prior], 1)
        returned = self.ranks.return_rows(torch.cat([parts, status], 1).to(wide), counts)
        totals = self.ranks.return_rows(part.total, counts)
        # From the rank that has the row's sample; the others send zeros.
        gap, wrong, mislabelled, source_prior = torch.stack([one[:, 5:] for one in returned]).sum(0).unbind(1)

        def other(row: int) -> str:
            return (
                f"row {int(places[row])} of x0 is not sample {int(sources[row])} of the pool (largest difference "
                f"{gap[row].item():.3g}): pass flip= for mirrored rows, source_only= for rows with another augmentation, or "
                "the right index. Shards in half precision need rows with the same rounding: take x0 from them."
            )

        # One wait for all checks.
        require(
            Check(wrong == 0, other),
            Check(mislabelled == 0, lambda row: f"labels[{int(places[row])}] is {int(labels[row])}: {OTHER_LABEL}."),
            Check(
                ~source_prior.isneginf(),
                lambda row: f"index[{int(places[row])}] is {int(sources[row])}: {WITHOUT_WEIGHT}.",
            ),
            *frequent,
        )
        merged = OnlineSoftmax.empty(x)
        for one, total in zip(returned, totals, strict=True):
            peak, mass, mass_squared, energy, log_prior = one[:, :5].unbind(1)
            merged = merged.merge(OnlineSoftmax(peak, mass, mass_squared, energy, total, log_prior))
        return replace(merged, peak=merged.peak - source_prior, log_prior=merged.log_prior - source_prior)

    def _gathered(self, scalars: Tensor, vectors: Tensor, grouped: bool) -> tuple[list[int], int, Tensor, Tensor]:
        """Number of rows of each rank, the seed of rank 0, and the rows of all."""
        kind = [vectors.shape[1], _DTYPES.index(vectors.dtype), grouped]
        head = torch.tensor([len(vectors), self.seed, *kind], device=vectors.device)
        heads = self.ranks.all_gather(head, "to compare their batches")
        for rank, other in enumerate(heads):
            if not torch.equal(other[2:], heads[0][2:]):
                raise ValueError(
                    f"the batches of rank 0 and rank {rank} do not fit: pass x0 and x_t with the same dtype, and labels on "
                    "all ranks or on none."
                )
        counts, seed = [int(other[0]) for other in heads], int(heads[0][1])
        if sum(counts) == 0:
            return counts, seed, scalars, vectors
        purpose = "to exchange their rows"
        scalars = self.ranks.all_gather_rows(scalars, purpose, counts)
        return counts, seed, scalars, self.ranks.all_gather_rows(vectors, purpose, counts)

    def _over_shard(
        self, scalars: Tensor, vectors: Tensor, query: Query, plan: Plan, seed: int
    ) -> tuple[OnlineSoftmax, Tensor, list[Check]]:
        """Sums of the rows of all ranks over this shard, the status of each row's source, and the checks of all draws.

        The status, (B, 4), is 0 for sources elsewhere: the difference of source and sample, whether it is too large, whether
        the label differs from the row's, and the log prior weight.
        """
        x, rows = (part.contiguous() for part in vectors.chunk(2, 1))
        alpha, sigma, source, labels = scalars.unbind(1)
        place = source.long() - self.start
        here = (place >= 0) & (place < len(plan.matrix))
        place = torch.where(here, place, -1)
        seen = None if query.labels is None else labels.long()
        # Round the row's own to the dtype of the logits like all others.
        log_prior = None if self.log_prior is None else self.log_prior.to(x.dtype).to(alpha.dtype)
        asked = Query(
            x_t=x,
            alpha=alpha,
            sigma=sigma,
            source=place,
            anchor=rows,
            labels=seen,
            reference_labels=None if seen is None else self.reference_labels,
            log_prior=log_prior,
        )
        # The asking rank adds each row's own source, so references of negligible weight beside it are skipped here.
        plan = replace(plan, ranks=None, least_prior=self.least_prior)
        softmax = self._summed(asked, plan, seed)
        own = place.clamp(min=0)
        gap, wrong, _, _ = compared(rows, own, plan.matrix, rounded=False)
        if self.resampled:
            wrong = torch.zeros_like(wrong)
        mislabelled = torch.zeros_like(wrong)
        if seen is not None and self.reference_labels is not None:
            mislabelled = (seen != -1) & (seen != self.reference_labels[own])
        prior = torch.zeros_like(alpha) if log_prior is None else log_prior[own]
        status = torch.stack([gap.to(alpha.dtype), wrong.to(alpha.dtype), mislabelled.to(alpha.dtype), prior], 1)
        frequent = [] if self.draws is None else self.draws.add(own, here, seen, source)
        return softmax, torch.where(here[:, None], status, 0), frequent

    def _summed(self, asked: Query, plan: Plan, seed: int) -> OnlineSoftmax:
        """Softmax sums of the rows of all ranks over this shard: all of it, or a subset for rows without a label."""
        if self.unlabelled_size is None or asked.labels is None:
            return summed(asked, plan).softmax
        softmax = OnlineSoftmax.empty(asked.x_t)
        free = asked.labels == -1
        labelled, free = (~free).nonzero()[:, 0], free.nonzero()[:, 0]
        if len(labelled):
            softmax.put(labelled, summed(asked.part(labelled), plan).softmax)
        if not len(free):
            return softmax
        # All ranks draw the same.
        chosen = drawn_subset(self.total, self.unlabelled_size, seed).to(free.device) - self.start
        chosen = chosen[(chosen >= 0) & (chosen < len(plan.matrix))]
        rows = asked.part(free)
        assert rows.source is not None
        place = torch.full((len(plan.matrix) + 1,), -1, device=free.device)  # the last for sources elsewhere
        place[chosen] = torch.arange(len(chosen), device=free.device)
        source, prior = place[rows.source], rows.log_prior
        # The asking rank adds a row's own sample that was not drawn; its mirror image is added here.
        own = torch.zeros_like(rows.alpha) if prior is None else prior[rows.source.clamp(min=0)]
        own = own.masked_fill((rows.source < 0) | (source >= 0), -torch.inf)
        if len(chosen):
            prior = None if prior is None else prior[chosen]
        else:  # a reference without weight, to have one
            chosen, prior = chosen.new_zeros(1), own.new_full((1,), -torch.inf)
        some = replace(rows, source=source, labels=None, reference_labels=None, log_prior=prior, source_prior=own)
        softmax.put(free, summed(some, replace(plan, matrix=plan.matrix.take(chosen))).softmax)
        return softmax
