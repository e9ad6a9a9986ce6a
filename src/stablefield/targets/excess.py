r"""The excess: how much farther each reference is from the noisy row than the anchor is.

$$ \Delta_k = |x_t - \alpha y_k|^2 - |x_t - \alpha a|^2 $$

One matrix product gives it for all pairs,

$$ \Delta_k = \alpha^2 |y_k|^2 - 2 \alpha \langle x_t, y_k \rangle - (\alpha^2 |a|^2 - 2 \alpha \langle x_t, a \rangle), $$

finite at $\alpha = 0$, with a rounding error of some ulps of $\alpha^2 |y|^2$, which a small $\sigma$ magnifies to any
size. With an anchor near the row (the source or, if unknown, the nearest reference),

$$ \Delta_k = \langle \alpha (a - y_k),\; \alpha (a - y_k) + 2 n \rangle, \qquad n = x_t - \alpha a, $$

does not cancel. That form is used for just the pairs for which rounding could show: rows of small noise and, of their
references, those that are near enough to have weight. They are few, as a rule; where they are many (data far from zero,
many near-duplicates), one float64 product repairs them all.
"""

import torch
from torch import Tensor

from stablefield.targets.bank import Bank, squared_norms
from stablefield.targets.kernel import Kernel
from stablefield.targets.query import Query

__all__ = ["Excess", "find_anchor"]

# The bound on the rounding error of a logit above which its pair is computed again; measured errors are about a tenth of it.
_TOLERANCE = 4e-4
# A logit this far below the largest is a weight that float32 does not see.
_NEGLIGIBLE = 18.0
# Distances that the search for anchors keeps, so that they are computed once: 128 MB in float32.
_KEPT = 2**25
# Share of pairs to be repaired above which a float64 product for all is the cheaper repair, on a CPU.
_DENSE = 1 / 16
# Elements of a temporary of the repair.
_PAIR_BUDGET = 2**22


class Excess:
    """The excess of references over one anchor per row.

    Args:
        query: the rows.
        anchor: a clean sample for each row, shape (B, d); near it where the noise is small.
        kernel: what makes weights of the excess, to tell which pairs have any.
        distances: what the search for the anchors has computed already, shape (B, n), see `find_anchor`.

    Attributes:
        anchor_square: |x_t - alpha a|^2, shape (B,), float64.
    """

    def __init__(self, query: Query, anchor: Tensor, kernel: Kernel, distances: Tensor | None = None) -> None:
        x, alpha = query.x_t, query.alpha
        self._query = query
        self._anchor = anchor
        self._kernel = kernel
        self._distances = distances
        self._noise = x - alpha.to(x.dtype)[:, None] * anchor
        self.anchor_square = squared_norms(self._noise)
        self._offset = alpha * (alpha * squared_norms(anchor) - 2 * (x * anchor).sum(1, dtype=alpha.dtype))
        self._scaled = _scaled(query)

    def over(self, rows: Tensor, squares: Tensor, where: slice, allowed: Tensor | None) -> Tensor:
        """Excess of a chunk of references, shape (B, c).

        Args:
            rows: the references, shape (c, d).
            squares: their squared norms, shape (c,).
            where: their place in the bank.
            allowed: which pairs count at all, shape (B, c), or None for all.
        """
        query = self._query
        if self._distances is None:
            constant = query.alpha[:, None] ** 2 * squares - self._offset[:, None]
            excess = torch.addmm(constant.to(rows.dtype), self._scaled, rows.T)
        else:
            excess = self._distances[:, where] - self._offset.to(rows.dtype)[:, None]
        self._repair(excess, rows, where, _logit_error(query, squares.max()), allowed)
        if query.source is not None:
            own = ((query.source >= where.start) & (query.source < where.stop)).nonzero()[:, 0]
            excess[own, query.source[own] - where.start] = 0
        return excess

    def logits(self, excess: Tensor, where: slice, rows: Tensor | slice = slice(None)) -> Tensor:
        """Log weights of a chunk for all rows, or for `rows`, with the prior, relative to the anchor; like `excess`."""
        square, sigma = self.anchor_square[rows, None], self._query.sigma[rows, None]
        logits = self._kernel.log_ratio(excess, square, sigma, self._anchor.shape[1])
        prior = self._query.prior(where)
        return logits if prior is None else logits + prior

    def _repair(self, excess: Tensor, rows: Tensor, where: slice, error: Tensor, allowed: Tensor | None) -> None:
        query = self._query
        rough = (error > _TOLERANCE).nonzero()[:, 0]
        if not len(rough):
            return
        logits = self.logits(excess[rough], where, rough)
        if allowed is not None:
            logits.masked_fill_(~allowed[rough], -torch.inf)
        # What is certain to be reached by some reference, rounding error included; the source's own logit is its prior.
        reached = logits.amax(1) - error[rough]
        if query.source is not None:
            own = torch.zeros_like(reached) if query.log_prior is None else query.log_prior[query.source[rough]]
            reached = torch.maximum(reached, own)
        near = (logits >= (reached - error[rough] - _NEGLIGIBLE).to(logits.dtype)[:, None]) & ~logits.isneginf()
        if rows.device.type == "cpu" and rows.dtype == torch.float32 and int(near.sum()) > _DENSE * near.numel():
            excess[rough] = self._wide(rows, rough).to(excess.dtype)
            return
        i, k = near.nonzero(as_tuple=True)
        alpha = query.alpha.to(rows.dtype)
        step = max(1, _PAIR_BUDGET // rows.shape[1])
        for part_i, part_k in zip(rough[i].split(step), k.split(step), strict=True):
            gap = (self._anchor[part_i] - rows[part_k]).mul_(alpha[part_i, None])
            excess[part_i, part_k] = self._noise[part_i].mul_(2).add_(gap).mul_(gap).sum(1)

    def _wide(self, rows: Tensor, rough: Tensor) -> Tensor:
        # In float64 the product form has digits to spare, so the order of the terms does not matter.
        wide = rows.double()
        alpha = self._query.alpha[rough, None]
        x, anchor = self._query.x_t[rough].double(), self._anchor[rough].double()
        offset = alpha * (alpha * anchor.square().sum(1, keepdim=True) - 2 * (x * anchor).sum(1, keepdim=True))
        return torch.addmm(alpha**2 * wide.square().sum(1) - offset, x * (-2 * alpha), wide.T)


def find_anchor(query: Query, bank: Bank) -> tuple[Tensor, Tensor | None]:
    """A clean sample for each row: its source; else the nearest reference where noise is small, else 0.

    Returns:
        The anchors, shape (B, d), and alpha^2 |y_k|^2 - 2 alpha <x_t, y_k> for all pairs, shape (B, n), if the search has
        computed it and it is small enough to keep.
    """
    dtype = query.x_t.dtype
    if query.source is not None:
        return bank.rows(query.source, dtype), None
    anchor = torch.zeros_like(query.x_t)
    rough = (_logit_error(query, bank.squares(dtype).max()) > _TOLERANCE).nonzero()[:, 0]
    if not len(rough):
        return anchor, None
    keep = len(query.x_t) * len(bank) <= _KEPT
    rows = torch.arange(len(query.x_t), device=rough.device) if keep else rough
    nearest, distances = _nearest(query, rows, bank, keep)
    anchor[rough] = bank.rows(nearest[rough] if keep else nearest, dtype)
    return anchor, distances


def _logit_error(query: Query, square: Tensor) -> Tensor:
    # A few ulps of the largest term, for squared norms up to `square`; measured errors of sgemm stay below half of it.
    return 4 * torch.finfo(query.x_t.dtype).eps * square * (query.alpha / query.sigma) ** 2


def _scaled(query: Query) -> Tensor:
    return query.x_t * (-2 * query.alpha).to(query.x_t.dtype)[:, None]


def _nearest(query: Query, rows: Tensor, bank: Bank, keep: bool) -> tuple[Tensor, Tensor | None]:
    """The reference of largest weight for each of `rows`, and the distances of all pairs if they are to be kept.

    Near enough is good enough for an anchor, so the plain product form serves.
    """
    dtype = query.x_t.dtype
    alpha, scaled = query.alpha[rows], _scaled(query)[rows]
    best = torch.full((len(rows),), torch.inf, dtype=dtype, device=rows.device)
    index = torch.zeros_like(rows)
    kept = torch.empty(len(rows), len(bank), dtype=dtype, device=rows.device) if keep else None
    for where, chunk in bank.chunks(bank.chunk_size(len(rows)), dtype):
        distance = torch.addmm((alpha[:, None] ** 2 * bank.squares(dtype)[where]).to(dtype), scaled, chunk.T)
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
