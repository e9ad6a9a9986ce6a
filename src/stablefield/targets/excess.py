r"""The excess: how much farther each reference is from the noisy row than the anchor is.

$$ \Delta_k = |x_t - \alpha y_k|^2 - |x_t - \alpha a|^2 $$

One matrix product gives it for all pairs,

$$ \Delta_k = \alpha^2 |y_k|^2 - 2 \alpha \langle x_t, y_k \rangle - (\alpha^2 |a|^2 - 2 \alpha \langle x_t, a \rangle), $$

finite at $\alpha = 0$, with a rounding error of some ulps of $\alpha^2 |y|^2$, which a small $\sigma$ magnifies to any
size. With an anchor near the row (the source or, if unknown, the nearest reference),

$$ \Delta_k = \langle \alpha (a - y_k),\; \alpha (a - y_k) + 2 n \rangle, \qquad n = x_t - \alpha a, $$

does not cancel. That form is used for just the pairs for which rounding could show: rows of small noise and, of their
references, the few that are near enough to have weight.
"""

import torch
from torch import Tensor

from stablefield.targets.bank import Bank, squared_norms
from stablefield.targets.query import Query

__all__ = ["Excess", "find_anchor"]

# The rounding error of a logit above which its pair is computed again.
_TOLERANCE = 1e-4
# A logit this far below the largest is a weight that float32 does not see.
_NEGLIGIBLE = 18.0
# Elements of a temporary of the repair.
_PAIR_BUDGET = 2**22


class Excess:
    """The excess of references over one anchor per row.

    Args:
        query: the rows.
        anchor: a clean sample for each row, shape (B, d); near it where the noise is small.

    Attributes:
        anchor_square: |x_t - alpha a|^2, shape (B,), float64.
    """

    def __init__(self, query: Query, anchor: Tensor) -> None:
        x, alpha = query.x_t, query.alpha
        self._query = query
        self._anchor = anchor
        self._noise = x - alpha.to(x.dtype)[:, None] * anchor
        self.anchor_square = squared_norms(self._noise)
        self._offset = alpha * (alpha * squared_norms(anchor) - 2 * (x * anchor).sum(1, dtype=alpha.dtype))
        self._scaled = x * (-2 * alpha).to(x.dtype)[:, None]

    def over(self, rows: Tensor, squares: Tensor, where: slice, allowed: Tensor | None) -> Tensor:
        """Excess of a chunk of references, shape (B, c).

        Args:
            rows: the references, shape (c, d).
            squares: their squared norms, shape (c,).
            where: their place in the bank.
            allowed: which pairs count at all, shape (B, c), or None for all.
        """
        query = self._query
        constant = query.alpha[:, None] ** 2 * squares - self._offset[:, None]
        excess = torch.addmm(constant.to(rows.dtype), self._scaled, rows.T)
        self._repair(excess, rows, _logit_error(query, squares.max()), allowed)
        if query.source is not None:
            own = ((query.source >= where.start) & (query.source < where.stop)).nonzero()[:, 0]
            excess[own, query.source[own] - where.start] = 0
        return excess

    def _repair(self, excess: Tensor, rows: Tensor, error: Tensor, allowed: Tensor | None) -> None:
        query = self._query
        rough = (error > _TOLERANCE).nonzero()[:, 0]
        if not len(rough):
            return
        logits = excess[rough] * (-0.5 / query.sigma[rough] ** 2).to(excess.dtype)[:, None]
        if allowed is not None:
            logits.masked_fill_(~allowed[rough], -torch.inf)
        # What is certain to be reached by some reference, rounding error included; the source's own logit is 0.
        reached = logits.amax(1) - error[rough]
        if query.source is not None:
            reached = reached.clamp(min=0)
        near = logits >= (reached - error[rough] - _NEGLIGIBLE).to(logits.dtype)[:, None]
        if allowed is not None:
            near &= allowed[rough]
        i, k = near.nonzero(as_tuple=True)
        alpha = query.alpha.to(rows.dtype)
        step = max(1, _PAIR_BUDGET // rows.shape[1])
        for part_i, part_k in zip(rough[i].split(step), k.split(step), strict=True):
            gap = (self._anchor[part_i] - rows[part_k]).mul_(alpha[part_i, None])
            excess[part_i, part_k] = self._noise[part_i].mul_(2).add_(gap).mul_(gap).sum(1)


def find_anchor(query: Query, bank: Bank) -> Tensor:
    """A clean sample for each row, shape (B, d): its source; else the nearest reference where noise is small, else 0."""
    dtype = query.x_t.dtype
    if query.source is not None:
        return bank.rows(query.source, dtype)
    anchor = torch.zeros_like(query.x_t)
    rough = (_logit_error(query, bank.squares(dtype).max()) > _TOLERANCE).nonzero()[:, 0]
    if len(rough):
        anchor[rough] = bank.rows(_nearest(query, rough, bank), dtype)
    return anchor


def _logit_error(query: Query, square: Tensor) -> Tensor:
    # A few ulps of the largest term, for squared norms up to `square`; measured errors of sgemm stay below half of it.
    return 4 * torch.finfo(query.x_t.dtype).eps * square * (query.alpha / query.sigma) ** 2


def _nearest(query: Query, rows: Tensor, bank: Bank) -> Tensor:
    # Near enough is good enough for an anchor, so the plain product form serves.
    x, alpha = query.x_t[rows], query.alpha[rows]
    best = torch.full((len(rows),), torch.inf, dtype=x.dtype, device=x.device)
    index = torch.zeros(len(rows), dtype=torch.long, device=x.device)
    scaled = x * (-2 * alpha).to(x.dtype)[:, None]
    for where, chunk in bank.chunks(bank.chunk_size(len(rows)), x.dtype):
        squares = (alpha[:, None] ** 2 * bank.squares(x.dtype)[where]).to(x.dtype)
        distance = torch.addmm(squares, scaled, chunk.T)
        allowed = query.allowed(where, rows)
        if allowed is not None:
            distance.masked_fill_(~allowed, torch.inf)
        value, place = distance.min(1)
        index = torch.where(value < best, place + where.start, index)
        best = torch.minimum(best, value)
    return index
