r"""The excess: how much farther each reference is from the noisy row than the anchor is, and the logits that it gives.

$$ \Delta_k = |x_t - \alpha y_k|^2 - |x_t - \alpha a|^2 $$

One matrix product gives it for all pairs,

$$ \Delta_k = \alpha^2 |y_k|^2 - 2 \alpha \langle x_t, y_k \rangle - (\alpha^2 |a|^2 - 2 \alpha \langle x_t, a \rangle), $$

finite at $\alpha = 0$, with a rounding error of some ulps of $\alpha^2 |y|^2$, which a small $\sigma$ magnifies to any
size. With an anchor near the row (the source or, if unknown, the nearest reference),

$$ \Delta_k = \langle \alpha (a - y_k),\; \alpha (a - y_k) + 2 n \rangle, \qquad n = x_t - \alpha a, $$

does not cancel. That form is used for just the pairs for which rounding could show: rows of small noise and, of their
references, those that are near enough to have weight. They are few, as a rule; where they are many (many near-duplicates),
one float64 product repairs them all. On a GPU that product serves every row of small noise, since to count pairs there is to
wait for it; rows below a noise band are not here at all.

Data far from zero are moved first: with the origin $o$ of `Norms` in place of 0, by $x_t - \alpha o$ and $y - o$.

The anchor itself, if it is a reference, has excess 0 exactly and is no part of the chunks: its share is `Excess.own`. Sums
over the others are taken about it in the end (see `Excess.about_anchor`), so that small differences keep their digits and
sums about any origin merge. Of rows of small noise the squared distances from it come of the excess itself,

$$ |y_k - a|^2 = (\Delta_k + 2 \alpha \langle y_k - a, n \rangle) / \alpha^2 , $$

which does not cancel where near-duplicates lie far from the origin.
"""

from functools import cached_property

import torch
from torch import Tensor

from stablefield.targets.factor import Factor, Operand, factor_size, factors
from stablefield.targets.kernel import Kernel
from stablefield.targets.online_softmax import Energy, OnlineSoftmax
from stablefield.targets.product import ULPS
from stablefield.targets.query import Query
from stablefield.targets.reference_matrix import (
    Norms,
    ReferenceMatrix,
    in_blocks,
    inner_products,
    row_blocks,
    squared_norms,
)

__all__ = ["Anchor", "Excess", "certain", "find_anchor"]

# The bound on the rounding error of a logit, and so of a weight, above which its pair is computed again; measured errors
# are about a quarter of it.
_TOLERANCE = 1e-3
# That above which the nearest reference may be so far from the one that is found that it is no anchor.
_BLURRED = 1e4
# A logit this far below the largest is a weight that float32 does not see.
_NEGLIGIBLE = 18.0
# Distances that the search for anchors keeps, so that they are computed once: 128 MB in float32.
_KEPT = 2**25
# Share of pairs to be repaired above which a float64 product for all is the cheaper repair, on a CPU.
_DENSE = 1 / 16
# What a rounding error of float32 becomes in float64.
_WIDER = 2.0**-29
# Elements of a temporary of the repair.
_PAIR_BUDGET = 2**22


class Anchor:
    """A clean sample for each row; near it where the noise is small.

    Args:
        rows: the samples as they are, shape (B, d), in the dtype of the computation.
        place: the index of the reference that it is, shape (B,), -1 for none; None if no row's anchor is a reference.
        distances: what the search for the anchors has computed already, shape (B, n), see `find_anchor`.
    """

    def __init__(self, rows: Tensor, place: Tensor | None, distances: Tensor | None = None) -> None:
        self.rows = rows
        self.place = place
        self.distances = distances


class Excess:
    """The excess of references over one anchor per row.

    Args:
        query: the rows.
        anchor: their anchors.
        matrix: the references.
        kernel: what makes weights of the excess.

    Attributes:
        anchor: the anchors' rows, shape (B, d).
        anchor_square: |x_t - alpha a|^2, shape (B,), float64.
    """

    def __init__(self, query: Query, anchor: Anchor, matrix: ReferenceMatrix, kernel: Kernel) -> None:
        norms = matrix.norms(query.x_t.dtype)
        x, alpha, near = query.x_t, query.alpha, anchor.rows
        self._origin = None if norms.origin is None else norms.origin.to(alpha.dtype)
        self._query = query
        self._given = x
        self.anchor = near
        # The noise itself is kept only if it is asked for: a large new tensor takes a CPU longer than what is done with it.
        self.anchor_square = in_blocks(lambda some: squared_norms(self._noise_of(some)), x)
        if norms.origin is not None:
            x, near = _less(x, alpha, norms.origin[None]), near - norms.origin
        self._place = anchor.place
        self._distances = anchor.distances
        self._kernel = kernel
        self._x, self._near = x, near
        self._square = squared_norms(near)
        along = inner_products(x, near)
        offset = alpha * (alpha * self._square - 2 * along)
        # What all references have in common is taken off in float64, so that the rest keeps its digits.
        self._offset = (offset - alpha**2 * norms.centre).to(x.dtype)[:, None]
        self._alpha_square = (alpha**2).to(x.dtype)[:, None]
        self._factor = (-2 * alpha).to(x.dtype)[:, None]
        self._operand = Operand(x)
        self._error = _logit_error(query, norms.largest)
        # Asked once for all chunks.
        self._rough, self._rows = _rough_rows(query, norms, self._error)
        self._by_pairs = query.watched or (x.dtype == torch.float64 and not query.static)

    @cached_property
    def noise(self) -> Tensor:
        """x_t - alpha a, shape (B, d)."""
        return self._noise_of(slice(None))

    def _noise_of(self, some: slice) -> Tensor:
        x, alpha, anchor = self._given[some], self._query.alpha[some], self.anchor[some]
        if self._origin is None:
            return torch.addcmul(x, anchor, alpha.to(x.dtype)[:, None], value=-1)
        return _less(x, alpha, anchor)

    @property
    def own(self) -> OnlineSoftmax:
        """The share of the anchors that are references, about themselves."""
        place, query = self._place, self._query
        logit = torch.zeros_like(self.anchor_square)
        if query.source_prior is not None:
            logit = query.source_prior
        elif place is None:
            logit.fill_(-torch.inf)
        else:
            if query.log_prior is not None:
                logit = query.log_prior[place.clamp(min=0)]
            logit = logit.masked_fill(place < 0, -torch.inf)
        return OnlineSoftmax.of_anchors(logit, self.anchor)

    def logits(
        self, factor: Factor, norms: Norms, where: slice, allowed: Tensor | None, reached: Tensor
    ) -> tuple[Tensor, Tensor, Energy]:
        """Log weights of a chunk relative to the anchor, with the prior, and the largest of each row.

        Args:
            factor: the c references.
            norms: their squared norms.
            where: their place in the matrix.
            allowed: which pairs count at all, shape (B, c), or None for all.
            reached: a logit that the row is known to reach, shape (B,), -inf where none is.

        Returns:
            Shapes (B, c), -inf for what is not allowed and for the anchor itself, and (B,); and what `OnlineSoftmax.add`
            asks for the energy of the chunk.
        """
        place, query = self._place, self._query
        repaired = len(self._rows) if not self._by_pairs else 0
        if repaired == len(query.x_t):
            excess = self._wide(factor.wide, self._rows).to(query.x_t.dtype)
        elif self._distances is None:
            excess = factor.inner(self._operand).mul_(self._factor)
            excess.addcmul_(self._alpha_square, norms.centred).sub_(self._offset)
        else:
            excess = self._distances[:, where] - self._offset
        if 0 < repaired < len(query.x_t):
            excess.index_copy_(0, self._rows, self._wide(factor.wide, self._rows).to(excess.dtype))
        logits = self._log_ratio(excess, where)
        if allowed is not None:
            logits.masked_fill_(~allowed, -torch.inf)
        if place is not None:
            inside = (place >= where.start) & (place < where.stop)
            if query.watched:
                own = inside.nonzero()[:, 0]
                if len(own):
                    logits[own, place[own] - where.start] = -torch.inf
            else:
                column = (place - where.start).clamp(0, len(factor) - 1)[:, None]
                logits.scatter_(1, column, logits.gather(1, column).masked_fill_(inside[:, None], -torch.inf))
        largest = logits.amax(1)
        if len(self._rows) and self._by_pairs:
            self._repair(logits, largest, excess, factor, where, reached)
        # What is not needed is not kept.
        gaps = excess if len(self._rows) else None
        return logits, largest, lambda weights, mass, queries: self._energy(weights, mass, queries, norms, gaps)

    def _energy(
        self, weights: Tensor, mass: Tensor, queries: Tensor | None, norms: Norms, excess: Tensor | None
    ) -> Tensor:
        """The weighted sum of |y|^2 or, of rows of small noise, of the excess, shape (b,): see `about_anchor`."""
        energy = mass * norms.centre + torch.mv(weights, norms.centred)
        if excess is None:
            return energy
        if queries is not None:
            some = self._rough[queries].nonzero()[:, 0]
            exact = (weights[some] * excess[queries[some]]).sum(1)
            return energy.index_copy(0, some, exact.to(mass.dtype))
        if len(self._rows) < len(weights):
            exact = (weights[self._rows] * excess[self._rows]).sum(1)
            return energy.index_copy(0, self._rows, exact.to(mass.dtype))
        return torch.where(self._rough, (weights * excess).sum(1).to(mass.dtype), energy)

    def about_anchor(self, partial: OnlineSoftmax) -> OnlineSoftmax:
        """Take the sums over all references but the anchors, as they have been added up, about the anchors, in place."""
        rows = slice(None)
        if self._query.watched:
            some = partial.mass.nonzero()[:, 0]
            rows = some if len(some) < len(self.anchor) else rows
        total, energy, mass = partial.total[rows], partial.energy[rows], partial.mass[rows]
        near, alpha = self._near[rows], self._query.alpha[rows]
        total.addcmul_(near, mass.to(total.dtype)[:, None], value=-1)
        squares = (
            (energy + 2 * alpha * inner_products(total, self.noise[rows])) / alpha**2 if len(self._rows) else energy
        )
        if len(self._rows) < len(self.anchor) or self._query.static:
            plain = energy - 2 * inner_products(total, near) - mass * self._square[rows]
            squares = torch.where(self._rough[rows], squares, plain) if len(self._rows) else plain
        if isinstance(rows, Tensor):
            partial.total.index_copy_(0, rows, total)
            squares = partial.energy.index_copy(0, rows, squares)
        partial.energy = squares
        return partial

    def _log_ratio(self, excess: Tensor, where: slice, at: Tensor | slice = slice(None)) -> Tensor:
        square, sigma = self.anchor_square[at, None], self._query.sigma[at, None]
        logits = self._kernel.log_ratio(excess, square, sigma, self._query.x_t.shape[1])
        prior = self._query.prior(where)
        return logits if prior is None else logits + prior

    def _repair(
        self, logits: Tensor, largest: Tensor, excess: Tensor, factor: Factor, where: slice, reached: Tensor
    ) -> None:
        # Near is what could have weight beside a logit that is certain to be reached, rounding errors included.
        least = torch.maximum(largest - self._error, reached) - self._error - _NEGLIGIBLE
        some = (self._rough & (largest >= least) & ~torch.isneginf(largest)).nonzero()[:, 0]
        if not len(some):
            return
        old = logits[some]
        near = (old >= least[some].to(old.dtype)[:, None]) & ~old.isneginf()
        count = int(near.sum())
        many = old.device.type == "cpu" and old.dtype == torch.float32 and count > _DENSE * near.numel()
        # Beyond the digits of float64, only pairs will do.
        if many and bool((self._error[some] * _WIDER <= _TOLERANCE).all()):
            exact = self._wide(factor.wide, some).to(old.dtype)
            excess[some] = exact
            new = self._log_ratio(exact, where, some).masked_fill_(old.isneginf(), -torch.inf)
        else:
            i, k = near.nonzero(as_tuple=True)
            prior = self._query.prior(where)
            exact = self._pairs(factor, some[i], k)
            excess[some[i], k] = exact
            square, sigma = self.anchor_square[some[i], None], self._query.sigma[some[i], None]
            ratio = self._kernel.log_ratio(exact[:, None], square, sigma, self._query.x_t.shape[1])[:, 0]
            new = old.index_put((i, k), ratio if prior is None else ratio + prior[k])
        logits[some] = new
        largest[some] = new.amax(1)

    def _pairs(self, factor: Factor, i: Tensor, k: Tensor) -> Tensor:
        """The excess of row i[p] and reference k[p] of the chunk, shape (P,)."""
        alpha = self._query.alpha.to(self._x.dtype)[:, None]
        step = max(1, _PAIR_BUDGET // self._x.shape[1])
        return torch.cat(
            [
                _uncancelled((self.anchor[part_i] - factor.at(part_k)).mul_(alpha[part_i]), self.noise[part_i])
                for part_i, part_k in zip(i.split(step), k.split(step), strict=True)
            ]
        )

    def _wide(self, wide: Tensor, some: Tensor) -> Tensor:
        # In float64 the product form has digits to spare, so the order of the terms does not matter.
        alpha = self._query.alpha[some, None]
        x, anchor = self._query.x_t[some].double(), self.anchor[some].double()
        if self._origin is not None:
            x, anchor = x - alpha * self._origin, anchor - self._origin
        offset = alpha * (alpha * anchor.square().sum(1, keepdim=True) - 2 * (x * anchor).sum(1, keepdim=True))
        return torch.addmm(alpha**2 * wide.square().sum(1) - offset, x * (-2 * alpha), wide.T)


def find_anchor(query: Query, matrix: ReferenceMatrix) -> Anchor:
    """A clean sample for each row: its source; else the nearest reference where noise is small, else the origin.

    Its distances, if the search has computed them all and they are few enough to keep, are
    alpha^2 (|y_k|^2 - centre) - 2 alpha <x_t, y_k> for all pairs, from the origin.
    """
    dtype = query.x_t.dtype
    if query.source is not None:
        return Anchor(matrix.rows(query.source, dtype), query.source)
    origin = matrix.norms(dtype).origin
    anchor = torch.zeros_like(query.x_t) if origin is None else origin.repeat(len(query.x_t), 1)
    error = _logit_error(query, matrix.norms(dtype).largest)
    rough = _all_or_none(query) if query.static else (error > _TOLERANCE).nonzero()[:, 0]
    if not len(rough):
        return Anchor(anchor, None)
    keep = len(query.x_t) * len(matrix) <= _KEPT
    rows = torch.arange(len(query.x_t), device=rough.device) if keep else rough
    nearest, distances = _nearest(query, rows, matrix, keep)
    nearest = nearest[rough] if keep else nearest
    if not query.static and dtype == torch.float32 and query.x_t.device.type != "mps":
        blurred = (error[rough] > _BLURRED).nonzero()[:, 0]
        if len(blurred):
            nearest[blurred] = _nearest(query, rough[blurred], matrix, keep=False, wide=True)[0]
    anchor[rough] = matrix.rows(nearest.clamp(min=0), dtype)
    place = torch.full((len(anchor),), -1, device=rough.device)
    place[rough] = nearest
    return Anchor(anchor, place, distances)


def certain(level: float, largest: float, dtype: torch.dtype) -> bool:
    """Whether logits need no repair at noise levels from `level` on, for references of squared norm up to `largest`."""
    return ULPS * torch.finfo(dtype).eps * largest <= _TOLERANCE * level**2


def _all_or_none(query: Query) -> Tensor:
    # float64 repairs what float32 has lost; data that are float64 themselves are as exact as they are, and MPS has none.
    wide = query.wide and query.x_t.dtype != torch.float64 and query.x_t.device.type != "mps"
    return torch.arange(len(query.x_t) if wide else 0, device=query.x_t.device)


def _rough_rows(query: Query, norms: Norms, error: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows have so small a noise that rounding would show, bool (B,), and their places (all or none if static)."""
    if query.static:
        return error > _TOLERANCE, _all_or_none(query)
    if query.levels is None or norms.bound is None:
        rough = error > _TOLERANCE
        return rough, rough.nonzero()[:, 0]
    # Without a look at the device.
    factor = ULPS * torch.finfo(query.x_t.dtype).eps * norms.bound
    rough = factor * query.levels.square() > _TOLERANCE
    return rough.to(error.device, non_blocking=True), rough.nonzero()[:, 0].to(error.device, non_blocking=True)


def _uncancelled(gap: Tensor, noise: Tensor) -> Tensor:
    return noise.mul(2).add_(gap).mul_(gap).sum(1)


def _logit_error(query: Query, square: Tensor) -> Tensor:
    return ULPS * torch.finfo(query.x_t.dtype).eps * square * (query.alpha / query.sigma) ** 2


def _less(x: Tensor, alpha: Tensor, y: Tensor) -> Tensor:
    """The rows x - alpha y, rounded once, for rows y of shape (B, d) or (1, d)."""
    found = torch.empty_like(x)
    for some in row_blocks(x):
        found[some] = x[some].to(alpha.dtype) - alpha[some, None] * (y[some] if len(y) > 1 else y).to(alpha.dtype)
    return found


def _scaled(x: Tensor, alpha: Tensor) -> Tensor:
    return x * (-2 * alpha).to(x.dtype)[:, None]


def _nearest(
    query: Query, rows: Tensor, matrix: ReferenceMatrix, keep: bool, wide: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The reference of largest weight for each of `rows` (-1 if none is allowed), and, if kept, the distances of all pairs.

    Near enough is good enough for an anchor, so the plain product form serves; in float64 if `wide`.
    """
    narrow = query.x_t.dtype
    norms, dtype = matrix.norms(narrow), torch.float64 if wide else narrow
    x = query.x_t[rows].to(dtype)
    if norms.origin is not None:
        x = _less(x, query.alpha[rows], norms.origin[None])
    scaled = Operand(_scaled(x, query.alpha[rows]))
    alpha_square, centred = (query.alpha[rows, None] ** 2).to(dtype), norms.centred
    best = torch.full((len(rows),), torch.inf, dtype=dtype, device=rows.device)
    index = torch.full_like(rows, -1)
    kept = torch.empty(len(rows), len(matrix), dtype=dtype, device=rows.device) if keep else None
    for where, factor in factors(matrix, factor_size(matrix, len(rows), narrow), len(rows), narrow):
        if wide:
            rows_wide = factor.wide
            distance = torch.addmm(alpha_square * rows_wide.square().sum(1), scaled.rows, rows_wide.T)
        else:
            distance = factor.inner(scaled).addcmul_(alpha_square, centred[where])
        if kept is not None:
            kept[:, where] = distance
        prior, allowed = query.prior(where), query.allowed(where, rows)
        if prior is not None:
            distance -= (2 * query.sigma[rows, None] ** 2).to(dtype) * prior
        if allowed is not None:
            distance.masked_fill_(~allowed, torch.inf)
        value, place = distance.min(1)
        index = torch.where(value < best, place + where.start, index)
        best = torch.minimum(best, value)
    return index, kept
