r"""Logits: the log of each reference's posterior weight, up to a constant: relative to an anchor of the row.

With $\Delta_k = |x_t - \alpha y_k|^2 - |x_t - \alpha a|^2$, the squared distance of a reference relative to that of the
anchor $a$, the logit is $-\Delta_k / 2\sigma^2$ plus the log prior (for a Gaussian kernel). One matrix product gives it for
all pairs,

$$ \Delta_k = \alpha^2 |y_k|^2 - 2 \alpha \langle x_t, y_k \rangle - (\alpha^2 |a|^2 - 2 \alpha \langle x_t, a \rangle), $$

finite at $\alpha = 0$, but with a rounding error of some ulps of $\alpha^2 |y|^2$, which a small $\sigma$ magnifies
without limit. With an anchor near the row (the source or, if unknown, the nearest reference),

$$ \Delta_k = \langle \alpha (a - y_k),\; \alpha (a - y_k) + 2 n \rangle, \qquad n = x_t - \alpha a, $$

does not cancel. This form repairs only the pairs that rounding could affect: of the rows with low noise, those whose
references are near enough to have weight. They are usually few; if they are many (many near-duplicates), one float64 product
repairs them all. On a GPU that product serves every row with low noise, because counting pairs would wait for the GPU.

Data far from zero are shifted first, to $x_t - \alpha o$ and $y - o$ with the origin $o$ of `Norms`.

The anchor itself, if it is a reference, has logit 0 exactly and is excluded from the chunks: see `Logits.own`. At the end,
sums over the others are made relative to the anchor (`Logits.relative_to_anchor`), so that small differences keep their
digits and sums over matrices with different origins merge. For rows with low noise the squared distances from the anchor
come from

$$ |y_k - a|^2 = (\Delta_k + 2 \alpha \langle y_k - a, n \rangle) / \alpha^2 , $$

which does not cancel even for near-duplicates far from the origin.
"""

from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from stablefield.targets._engine.columns import Columns
from stablefield.targets._engine.matmul import ULPS, Chunk, Operand, chunks
from stablefield.targets._engine.online_softmax import ChunkLogits, OnlineSoftmax
from stablefield.targets._engine.query import Host, Plan, Query
from stablefield.targets._engine.reference_matrix import in_blocks, inner_products, row_blocks, squared_norms

__all__ = ["Anchor", "Logits", "SmallNoise", "find_anchor", "noise_is_large"]

# Pairs whose logit, and so whose weight, may have a larger rounding error than this are computed again; measured errors are
# about a quarter of the bound.
_TOLERANCE = 1e-3
# Above this error, the reference found as nearest may be too far from the true nearest one to be an anchor.
_BLURRED = 1e4
# Float32 does not resolve the weight of a logit this far below the largest.
_NEGLIGIBLE = 18.0
# Distances that the search for anchors keeps, to compute them only once: 128 MB in float32.
_KEPT = 2**25
# Share of pairs to repair above which one float64 product for all is cheaper, on a CPU.
_DENSE = 1 / 16
# Ratio of the rounding errors of float64 and float32.
_WIDER = 2.0**-29
# Elements of a temporary of the repair.
_PAIR_BUDGET = 2**22


@dataclass(frozen=True)
class SmallNoise:
    """The rows whose noise is so low that rounding of the product form affects their logits.

    Attributes:
        error: bound on the rounding error of a logit, shape (B,).
        mask: which rows they are, bool (B,).
        rows: their indices; all rows or none if the host may not read which.
        on_host: the mask on the host; None if it has to be read.
    """

    error: Tensor
    mask: Tensor
    rows: Tensor
    on_host: Tensor | None = None

    @classmethod
    def of(cls, query: Query, plan: Plan) -> "SmallNoise":
        """Those of `query`."""
        dtype, device, norms = query.x_t.dtype, query.x_t.device, plan.matrix.norms(query.x_t.dtype)
        ulps = ULPS * torch.finfo(dtype).eps
        error = ulps * norms.largest * (query.alpha / query.sigma) ** 2
        if plan.host is Host.NEVER:
            # float64 repairs the losses of float32; there is nothing wider for float64 data, and MPS has no float64.
            all_rows = plan.float64 and dtype != torch.float64 and device.type != "mps"
            return cls(error, error > _TOLERANCE, torch.arange(len(query.x_t) if all_rows else 0, device=device))
        if query.levels is None or norms.bound is None:
            mask = error > _TOLERANCE
            return cls(error, mask, mask.nonzero()[:, 0])
        # The host knows the noise levels, so it need not wait for the device.
        mask = ulps * norms.bound * query.levels.square() > _TOLERANCE
        rows = mask.nonzero()[:, 0]
        return cls(error, mask.to(device, non_blocking=True), rows.to(device, non_blocking=True), mask)

    def at(self, rows: Tensor | slice, host: Tensor | slice) -> "SmallNoise":
        """Those among the rows at `rows` (b,); `host` are the same rows, on the host."""
        mask = self.mask[rows]
        known = mask if self.on_host is None else self.on_host[host]
        some = known.nonzero()[:, 0].to(mask.device, non_blocking=True)
        return SmallNoise(self.error[rows], mask, some, None if self.on_host is None else known)


def noise_is_large(level: float, largest: float, dtype: torch.dtype) -> bool:
    """Whether logits need no repair at noise levels of at least `level`, for references of squared norm up to `largest`."""
    return ULPS * torch.finfo(dtype).eps * largest <= _TOLERANCE * level**2


@dataclass(frozen=True)
class Anchor:
    """A clean sample for each row; near it if the noise is low.

    Attributes:
        rows: the samples, shape (B, d), in the dtype of the computation.
        place: the anchor's index among the references, shape (B,), -1 for none; None if no row's anchor is a reference.
        distances: alpha^2 (|y_k|^2 - centre) - 2 alpha <x_t, y_k> from the origin for all pairs, shape (B, n), if the search
            has computed them all and they are few enough to keep.
    """

    rows: Tensor
    place: Tensor | None
    distances: Tensor | None = None


class Logits:
    """The logits of references relative to one anchor per row.

    Args:
        query: the rows.
        plan: the plan of the call.
        anchor: their anchors.
        small: the rows with low noise.

    Attributes:
        anchor: the anchors.
        anchor_square: |x_t - alpha a|^2, shape (B,), float64.
    """

    def __init__(self, query: Query, plan: Plan, anchor: Anchor, small: SmallNoise) -> None:
        norms = plan.matrix.norms(query.x_t.dtype)
        x, alpha, near = query.x_t, query.alpha, anchor.rows
        self.anchor = anchor
        self._query, self._plan, self._small, self._norms = query, plan, small, norms
        self._origin = None if norms.origin is None else norms.origin.to(alpha.dtype)
        # Keep the noise itself only on demand: on a CPU, allocating a large tensor takes longer than computing with it.
        self.anchor_square = in_blocks(lambda some: squared_norms(self._noise_of(some)), x)
        if norms.origin is not None:
            x, near = _less(x, alpha, norms.origin[None]), near - norms.origin
        self._near, self._near_square = near, squared_norms(near)
        offset = alpha * (alpha * self._near_square - 2 * inner_products(x, near))
        # Subtract the part common to all references in float64, so that the rest keeps its digits.
        self._offset = (offset - alpha**2 * norms.centre).to(x.dtype)[:, None]
        self._alpha_square = (alpha**2).to(x.dtype)[:, None]
        self._factor = (-2 * alpha).to(x.dtype)[:, None]
        self._x = x
        # Whether to repair pairs one by one, or rows with low noise by a float64 product from the start.
        self._by_pairs = plan.host is Host.READS or (x.dtype == torch.float64 and plan.host is Host.WAITS)

    @cached_property
    def _operand(self) -> Operand:
        return Operand(self._x)

    @cached_property
    def noise(self) -> Tensor:
        """x_t - alpha a, shape (B, d)."""
        return self._noise_of(slice(None))

    def _noise_of(self, some: slice) -> Tensor:
        x, alpha, anchor = self._query.x_t[some], self._query.alpha[some], self.anchor.rows[some]
        if self._origin is None:
            return torch.addcmul(x, anchor, alpha.to(x.dtype)[:, None], value=-1)
        return _less(x, alpha, anchor)

    @cached_property
    def own(self) -> Tensor:
        """The logit of the anchor as a reference, shape (B,), float64; -inf if it is not a reference."""
        place, query = self.anchor.place, self._query
        if query.source_prior is not None:
            return query.source_prior
        logit = torch.zeros_like(self.anchor_square)
        if place is None:
            return logit.fill_(-torch.inf)
        if query.log_prior is not None:
            logit = query.log_prior[place.clamp(min=0)]
        return logit.masked_fill(place < 0, -torch.inf)

    def at(self, rows: Tensor | slice) -> "Logits":
        """Those of the rows at `rows` (b,), indices on the host, which may use all references that they meet."""
        host, rows = rows, rows.to(self._x.device, non_blocking=True) if isinstance(rows, Tensor) else rows
        found = copy(self)
        for name in ("_operand", "noise", "own"):
            found.__dict__.pop(name, None)
        place = self.anchor.place
        found.anchor = Anchor(self.anchor.rows[rows], None if place is None else place[rows])
        found._query, found._small = self._query.at(rows), self._small.at(rows, host)
        found._x = found._query.x_t if self._norms.origin is None else self._x[rows]
        for name in ("anchor_square", "_offset", "_factor", "_alpha_square"):
            setattr(found, name, getattr(self, name)[rows])
        return found

    def of_chunk(self, chunk: Chunk, where: Columns, reached: Tensor) -> ChunkLogits:
        """The logits of a chunk, -inf for references that a row may not use and for its anchor.

        Args:
            chunk: the c references.
            where: their columns of the matrix.
            reached: a logit that each row is known to reach, shape (B,), or -inf.
        """
        x, small, place = self._query.x_t, self._small.rows, self.anchor.place
        wide = 0 if self._by_pairs else len(small)
        if wide == len(x):
            distances = self._wide(chunk, small).to(x.dtype)
        elif self.anchor.distances is None:
            distances = chunk.inner(self._operand).mul_(self._factor)
            distances.addcmul_(self._alpha_square, where.of(self._norms.centred, len(x))).sub_(self._offset)
        else:
            assert isinstance(where.where, slice)
            distances = self.anchor.distances[:, where.where] - self._offset
        if 0 < wide < len(x):
            distances.index_copy_(0, small, self._wide(chunk, small).to(x.dtype))
        prior, allowed = self._query.prior(where), self._query.allowed(where)
        logits = self._with_prior(distances, prior)
        if allowed is not None:
            logits.masked_fill_(~allowed, -torch.inf)
        if place is not None:
            column = where.of_source(place)
            inside = (column >= 0) & (column < len(chunk))
            if self._plan.host is Host.READS:
                own = inside.nonzero()[:, 0]
                if len(own):
                    logits[own, column[own]] = -torch.inf
            else:
                column = column.clamp(0, len(chunk) - 1)[:, None]
                logits.scatter_(1, column, logits.gather(1, column).masked_fill_(inside[:, None], -torch.inf))
        largest = logits.amax(1)
        if len(small) and self._by_pairs:
            self._repair(logits, largest, distances, chunk, prior, reached)
        # Keep the distances only if needed.
        kept = distances if len(small) else None
        log_prior = self._query.prior_weight(where, allowed, prior)
        return ChunkLogits(chunk, logits, largest, log_prior, partial(self._energy, where, kept))

    def _energy(
        self, where: Columns, distances: Tensor | None, weights: Tensor, mass: Tensor, rows: Tensor | None
    ) -> Tensor:
        """The weighted sum of |y|^2 or, for rows with low noise, of the relative distances, shape (b,)."""
        centred = where.of(self._norms.centred, len(self._query.x_t))
        if centred.ndim == 1:
            squares = torch.mv(weights, centred)
        else:
            squares = (weights * (centred if rows is None else centred[rows])).sum(1)
        energy = mass * self._norms.centre + squares
        if distances is None:
            return energy
        if rows is not None:
            some = self._small.mask[rows].nonzero()[:, 0]
            exact = (weights[some] * distances[rows[some]]).sum(1)
            return energy.index_copy(0, some, exact.to(mass.dtype))
        some = self._small.rows
        if len(some) < len(weights):
            exact = (weights[some] * distances[some]).sum(1)
            return energy.index_copy(0, some, exact.to(mass.dtype))
        return torch.where(self._small.mask, (weights * distances).sum(1).to(mass.dtype), energy)

    def relative_to_anchor(self, sums: OnlineSoftmax) -> OnlineSoftmax:
        """Make the accumulated sums over all references except the anchors relative to the anchors."""
        small, rows = self._small.rows, slice(None)
        if self._plan.host is Host.READS:
            some = sums.mass.nonzero()[:, 0]
            rows = some if len(some) < len(self._near) else rows
        total, energy, mass = sums.total[rows], sums.energy[rows], sums.mass[rows]
        near, alpha = self._near[rows], self._query.alpha[rows]
        total.addcmul_(near, mass.to(total.dtype)[:, None], value=-1)
        squares = energy
        if len(small):
            squares = (energy + 2 * alpha * inner_products(total, self.noise[rows])) / alpha**2
        if len(small) < len(self._near) or self._plan.host is Host.NEVER:
            plain = energy - 2 * inner_products(total, near) - mass * self._near_square[rows]
            squares = torch.where(self._small.mask[rows], squares, plain) if len(small) else plain
        if isinstance(rows, Tensor):
            sums.total.index_copy_(0, rows, total)
            squares = sums.energy.index_copy(0, rows, squares)
        sums.energy = squares
        return sums

    def _with_prior(self, distances: Tensor, prior: Tensor | None, at: Tensor | slice = slice(None)) -> Tensor:
        logits = self._log_ratio(distances, at)
        return logits if prior is None else logits + (prior if prior.ndim == 1 else prior[at]).to(logits.dtype)

    def _log_ratio(self, distances: Tensor, at: Tensor | slice) -> Tensor:
        square, sigma = self.anchor_square[at, None], self._query.sigma[at, None]
        return self._plan.kernel.log_ratio(distances, square, sigma, self._query.x_t.shape[1])

    def _repair(
        self, logits: Tensor, largest: Tensor, distances: Tensor, chunk: Chunk, prior: Tensor | None, reached: Tensor
    ) -> None:
        """Recompute, in place, the pairs that rounding may have changed and that could have weight."""
        error = self._small.error
        # A near pair could have weight beside a logit that is certainly reached, rounding errors included.
        least = torch.maximum(largest - error, reached) - error - _NEGLIGIBLE
        some = (self._small.mask & (largest >= least) & ~torch.isneginf(largest)).nonzero()[:, 0]
        if not len(some):
            return
        old = logits[some]
        near = (old >= least[some].to(old.dtype)[:, None]) & ~old.isneginf()
        many = old.device.type == "cpu" and old.dtype == torch.float32 and int(near.sum()) > _DENSE * near.numel()
        # If float64 has too few digits, only the pairwise form works.
        if many and bool((error[some] * _WIDER <= _TOLERANCE).all()):
            exact = self._wide(chunk, some).to(old.dtype)
            distances[some] = exact
            new = self._with_prior(exact, prior, some).masked_fill_(old.isneginf(), -torch.inf)
        else:
            i, k = near.nonzero(as_tuple=True)
            exact = self._pairs(chunk, some[i], k)
            distances[some[i], k] = exact
            ratio = self._log_ratio(exact[:, None], some[i])[:, 0]
            if prior is not None:
                ratio = ratio + (prior[k] if prior.ndim == 1 else prior[some[i], k]).to(ratio.dtype)
            new = old.index_put((i, k), ratio)
        logits[some] = new
        largest[some] = new.amax(1)

    def _pairs(self, chunk: Chunk, i: Tensor, k: Tensor) -> Tensor:
        """The relative distance of row i[p] and reference k[p] of the chunk, without cancellation, shape (P,)."""
        anchor, alpha = self.anchor.rows, self._query.alpha.to(self._near.dtype)[:, None]
        step = max(1, _PAIR_BUDGET // anchor.shape[1])
        found: list[Tensor] = []
        for part_i, part_k in zip(i.split(step), k.split(step), strict=True):
            gap = (anchor[part_i] - chunk.at(part_k, part_i)).mul_(alpha[part_i])
            found.append(self.noise[part_i].mul_(2).add_(gap).mul_(gap).sum(1))
        return torch.cat(found)

    def _wide(self, chunk: Chunk, some: Tensor) -> Tensor:
        # In float64 the product form has spare digits, so the order of the terms does not matter.
        alpha = self._query.alpha[some, None]
        x, anchor = self._query.x_t[some].double(), self.anchor.rows[some].double()
        if self._origin is not None:
            x, anchor = x - alpha * self._origin, anchor - self._origin
        offset = alpha * (alpha * anchor.square().sum(1, keepdim=True) - 2 * (x * anchor).sum(1, keepdim=True))
        products, squares = chunk.wide_inner(x * (-2 * alpha), some)
        return products.add_(alpha**2 * squares - offset)


def find_anchor(query: Query, plan: Plan, small: SmallNoise) -> Anchor:
    """A clean sample for each row: its source, else the nearest reference if noise is low, else the origin."""
    matrix, dtype, rough = plan.matrix, query.x_t.dtype, small.rows
    if query.source is not None:
        rows = matrix.rows(query.source, dtype) if query.anchor is None else query.anchor
        return Anchor(rows, query.source)
    origin = matrix.norms(dtype).origin
    anchor = torch.zeros_like(query.x_t) if origin is None else origin.repeat(len(query.x_t), 1)
    if not len(rough):
        return Anchor(anchor, None)
    keep = len(query.x_t) * len(matrix) <= _KEPT
    rows = torch.arange(len(query.x_t), device=rough.device) if keep else rough
    nearest, distances = _nearest(query, rows, plan, keep)
    nearest = nearest[rough] if keep else nearest
    if plan.host is not Host.NEVER and dtype == torch.float32 and query.x_t.device.type != "mps":
        blurred = (small.error[rough] > _BLURRED).nonzero()[:, 0]
        if len(blurred):
            nearest[blurred] = _nearest(query, rough[blurred], plan, keep=False, wide=True)[0]
    anchor[rough] = matrix.rows(nearest.clamp(min=0), dtype)
    place = torch.full((len(anchor),), -1, device=rough.device)
    place[rough] = nearest
    return Anchor(anchor, place, distances)


def _nearest(query: Query, rows: Tensor, plan: Plan, keep: bool, wide: bool = False) -> tuple[Tensor, Tensor | None]:
    """The reference of largest weight for each of `rows` (-1 if none is allowed), and, if kept, the distances of all pairs.

    An anchor need not be exactly the nearest, so the plain product form suffices; in float64 if `wide`.
    """
    narrow, matrix = query.x_t.dtype, plan.matrix
    norms, dtype = matrix.norms(narrow), torch.float64 if wide else narrow
    x, alpha = query.x_t[rows].to(dtype), query.alpha[rows]
    if norms.origin is not None:
        x = _less(x, alpha, norms.origin[None])
    scaled = Operand(x * (-2 * alpha).to(dtype)[:, None])
    alpha_square = (alpha[:, None] ** 2).to(dtype)
    best = torch.full((len(rows),), torch.inf, dtype=dtype, device=rows.device)
    index = torch.full_like(rows, -1)
    kept = torch.empty(len(rows), len(matrix), dtype=dtype, device=rows.device) if keep else None
    for where, chunk in chunks(matrix, None, len(rows), narrow):
        if wide:
            references = chunk.wide
            distance = torch.addmm(alpha_square * references.square().sum(1), scaled.rows, references.T)
        else:
            distance = chunk.inner(scaled).addcmul_(alpha_square, norms.centred[where])
        if kept is not None:
            kept[:, where] = distance
        columns = Columns(where)
        prior, allowed = query.prior(columns), query.allowed(columns, rows)
        if prior is not None:
            distance -= ((2 * query.sigma[rows, None] ** 2) * (prior if prior.ndim == 1 else prior[rows])).to(dtype)
        if allowed is not None:
            distance.masked_fill_(~allowed, torch.inf)
        value, place = distance.min(1)
        index = torch.where(value < best, place + where.start, index)
        best = torch.minimum(best, value)
    return index, kept


def _less(x: Tensor, alpha: Tensor, y: Tensor) -> Tensor:
    """The rows x - alpha y, rounded once, for rows y of shape (B, d) or (1, d)."""
    found = torch.empty_like(x)
    for some in row_blocks(x):
        found[some] = x[some].to(alpha.dtype) - alpha[some, None] * (y[some] if len(y) > 1 else y).to(alpha.dtype)
    return found
