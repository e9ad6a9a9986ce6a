"""Sums: the softmax sums of a query over a matrix, chunk by chunk."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from stablefield.targets.excess import Anchor, Excess
from stablefield.targets.factor import factor_size, factors
from stablefield.targets.kernel import Kernel
from stablefield.targets.online_softmax import OnlineSoftmax
from stablefield.targets.query import Query
from stablefield.targets.reference_matrix import ReferenceMatrix, squared_norms

__all__ = ["accumulate", "accumulate_all"]


def accumulate(
    query: Query, matrix: ReferenceMatrix, excess: Excess, partial: OnlineSoftmax, chunk_size: int | None = None
) -> OnlineSoftmax:
    """The references of `matrix` with `partial`, which holds nothing but the anchors of `excess`, if that: see `Excess.own`.

    Returns:
        The sums of both.

    Raises:
        ValueError: if `chunk_size` is below 1.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: it must be at least 1, or None to have it chosen.")
    x = query.x_t
    size = min(chunk_size or factor_size(matrix, len(x), x.dtype), len(matrix))
    norms = matrix.norms(x.dtype)
    among = len(matrix) if query.watched else None
    others = OnlineSoftmax.empty(x.shape[0], x.shape[1], x.dtype, x.device, level=partial.peak)
    uniform = query.log_prior is None and query.labels is None
    if uniform:
        others.add_prior(_prior_weight(query, slice(0, len(matrix)), None))
    for where, factor in factors(matrix, size, len(x), x.dtype):
        allowed, part = query.allowed(where), norms.at(where)
        logits, largest, energy = excess.logits(factor, part, where, allowed, others.peak)
        if not uniform:
            others.add_prior(_prior_weight(query, where, allowed))
        others.add(logits, largest, factor, energy, among)
    return excess.about_anchor(others).with_anchors(partial)


def accumulate_all(
    query: Query,
    anchor: Anchor,
    matrix: ReferenceMatrix,
    excess: Excess,
    kernel: Kernel,
    partial: OnlineSoftmax,
    mirrored: bool,
    chunk_size: int | None = None,
) -> OnlineSoftmax:
    """As `accumulate`, with the mirror images of the references, too, if the set is `mirrored`.

    Args:
        query: the rows.
        anchor: their anchors, those of `excess`.
        matrix: the references.
        excess: what makes the logits of the references as they are.
        kernel: the noise kernel.
        partial: what has been summed before, shape (B,) and (B, d); changed in place.
        mirrored: whether the mirror image (last axis) of each reference is a reference, too.
        chunk_size: references per matrix product; chosen by memory if not given.

    Raises:
        ValueError: if `chunk_size` is below 1.
    """
    partial = accumulate(query, matrix, excess, partial, chunk_size)
    if mirrored and query.source_prior is not None and anchor.place is not None:
        partial = partial.merge(_own_image(query, anchor, matrix, excess, kernel))
    return partial.merge(_mirrored(query, anchor, matrix, kernel, partial.peak, chunk_size)) if mirrored else partial


def _mirrored(
    query: Query, anchor: Anchor, matrix: ReferenceMatrix, kernel: Kernel, level: Tensor, chunk_size: int | None = None
) -> OnlineSoftmax:
    """Softmax sums of `query` over the mirror images (last axis) of the references of `matrix`.

    They are those of the mirrored row over the references as they are, mirrored back. The anchor is the same but for the
    mirror, so they merge with the sums over the references themselves.

    Args:
        query: the rows.
        anchor: their anchors.
        matrix: the references.
        kernel: the noise kernel.
        level: a logit that each row is known to reach, shape (B,).
        chunk_size: references per matrix product; chosen by memory if not given.
    """
    image = replace(query, x_t=_mirror(query.x_t, matrix), source=None)
    excess = Excess(image, Anchor(_mirror(anchor.rows, matrix), None), matrix, kernel)
    x = image.x_t
    partial = OnlineSoftmax.empty(x.shape[0], x.shape[1], x.dtype, x.device, level=level)
    partial = accumulate(image, matrix, excess, partial, chunk_size)
    partial.total = _mirror(partial.total, matrix)
    return partial


def _own_image(query: Query, anchor: Anchor, matrix: ReferenceMatrix, excess: Excess, kernel: Kernel) -> OnlineSoftmax:
    """The share of the mirror images of the sources that are references for their own rows alone, shape (B,) and (B, d)."""
    assert query.source_prior is not None
    assert anchor.place is not None
    rows = _mirror(anchor.rows, matrix)
    # |x - alpha m|^2 - |x - alpha a|^2 for the image m of the anchor a, in a form that does not cancel.
    alpha = query.alpha.to(rows.dtype)[:, None]
    gap = alpha * (anchor.rows - rows)
    noise = torch.addcmul(query.x_t, alpha, anchor.rows, value=-1)
    further = (gap * (gap + 2 * noise)).sum(1, dtype=query.sigma.dtype)[:, None]
    logit = kernel.log_ratio(further, excess.anchor_square[:, None], query.sigma[:, None], rows.shape[1])[:, 0]
    logit = (logit + query.source_prior).masked_fill(anchor.place >= 0, -torch.inf).to(query.sigma)
    image = OnlineSoftmax.of_anchors(logit, rows)
    # Sums are about the anchor, of which this is the image.
    away = rows - anchor.rows
    return replace(image, energy=image.mass * squared_norms(away), total=image.mass.to(away.dtype)[:, None] * away)


def _mirror(rows: Tensor, matrix: ReferenceMatrix) -> Tensor:
    return rows.reshape(len(rows), *matrix.data.shape[1:]).flip(-1).reshape(rows.shape)


def _prior_weight(query: Query, where: slice, allowed: Tensor | None) -> Tensor:
    """Log of the summed prior weights of the allowed references of a chunk, shape (B,) or ()."""
    if query.log_prior is None:
        if allowed is None:
            return query.sigma.new_full((), math.log(where.stop - where.start))
        return allowed.sum(1).to(query.sigma).log()
    log_prior = query.log_prior[where]
    return (log_prior if allowed is None else torch.where(allowed, log_prior, -torch.inf)).logsumexp(-1)
