"""Sums: the softmax sums of a query over a bank, chunk by chunk."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from stablefield.targets.bank import Bank, squared_norms
from stablefield.targets.excess import Anchor, Excess
from stablefield.targets.factor import factor_size, factors
from stablefield.targets.kernel import Kernel
from stablefield.targets.partial import Partial
from stablefield.targets.query import Query

__all__ = ["accumulate", "accumulate_all"]


def accumulate(query: Query, bank: Bank, excess: Excess, partial: Partial, chunk_size: int | None = None) -> Partial:
    """The references of `bank` with `partial`, which holds nothing but the anchors of `excess`, if that: see `Excess.own`.

    Returns:
        The sums of both.

    Raises:
        ValueError: if `chunk_size` is below 1.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: it must be at least 1, or None to have it chosen.")
    x = query.x_t
    size = min(chunk_size or factor_size(bank, len(x), x.dtype), len(bank))
    norms = bank.norms(x.dtype)
    among = len(bank) if query.watched else None
    others = Partial.empty(x.shape[0], x.shape[1], x.dtype, x.device, level=partial.peak)
    uniform = query.log_prior is None and query.labels is None
    if uniform:
        others.add_prior(_prior_weight(query, slice(0, len(bank)), None))
    for where, factor in factors(bank, size, len(x), x.dtype):
        allowed, part = query.allowed(where), norms.at(where)
        logits, largest, energy = excess.logits(factor, part, where, allowed, others.peak)
        if not uniform:
            others.add_prior(_prior_weight(query, where, allowed))
        others.add(logits, largest, factor, energy, among)
    return excess.about_anchor(others).with_anchors(partial)


def accumulate_all(
    query: Query,
    anchor: Anchor,
    bank: Bank,
    excess: Excess,
    kernel: Kernel,
    partial: Partial,
    mirrored: bool,
    chunk_size: int | None = None,
) -> Partial:
    """As `accumulate`, with the mirror images of the references, too, if the set is `mirrored`.

    Args:
        query: the rows.
        anchor: their anchors, those of `excess`.
        bank: the references.
        excess: what makes the logits of the references as they are.
        kernel: the noise kernel.
        partial: what has been summed before, shape (B,) and (B, d); changed in place.
        mirrored: whether the mirror image (last axis) of each reference is a reference, too.
        chunk_size: references per matrix product; chosen by memory if not given.

    Raises:
        ValueError: if `chunk_size` is below 1.
    """
    partial = accumulate(query, bank, excess, partial, chunk_size)
    if mirrored and query.source_prior is not None and anchor.place is not None:
        partial = partial.merge(_own_image(query, anchor, bank, excess, kernel))
    return partial.merge(_mirrored(query, anchor, bank, kernel, partial.peak, chunk_size)) if mirrored else partial


def _mirrored(
    query: Query, anchor: Anchor, bank: Bank, kernel: Kernel, level: Tensor, chunk_size: int | None = None
) -> Partial:
    """Softmax sums of `query` over the mirror images (last axis) of the references of `bank`.

    They are those of the mirrored row over the references as they are, mirrored back. The anchor is the same but for the
    mirror, so they merge with the sums over the references themselves.

    Args:
        query: the rows.
        anchor: their anchors.
        bank: the references.
        kernel: the noise kernel.
        level: a logit that each row is known to reach, shape (B,).
        chunk_size: references per matrix product; chosen by memory if not given.
    """
    image = replace(query, x_t=_mirror(query.x_t, bank), source=None)
    excess = Excess(image, Anchor(_mirror(anchor.rows, bank), None), bank, kernel)
    x = image.x_t
    partial = Partial.empty(x.shape[0], x.shape[1], x.dtype, x.device, level=level)
    partial = accumulate(image, bank, excess, partial, chunk_size)
    partial.total = _mirror(partial.total, bank)
    return partial


def _own_image(query: Query, anchor: Anchor, bank: Bank, excess: Excess, kernel: Kernel) -> Partial:
    """The share of the mirror images of the sources that are references for their own rows alone, shape (B,) and (B, d)."""
    assert query.source_prior is not None
    assert anchor.place is not None
    rows = _mirror(anchor.rows, bank)
    # |x - alpha m|^2 - |x - alpha a|^2 for the image m of the anchor a, in a form that does not cancel.
    alpha = query.alpha.to(rows.dtype)[:, None]
    gap = alpha * (anchor.rows - rows)
    noise = torch.addcmul(query.x_t, alpha, anchor.rows, value=-1)
    further = (gap * (gap + 2 * noise)).sum(1, dtype=query.sigma.dtype)[:, None]
    logit = kernel.log_ratio(further, excess.anchor_square[:, None], query.sigma[:, None], rows.shape[1])[:, 0]
    logit = (logit + query.source_prior).masked_fill(anchor.place >= 0, -torch.inf).to(query.sigma)
    image = Partial.of_anchors(logit, rows)
    # Sums are about the anchor, of which this is the image.
    away = rows - anchor.rows
    return replace(image, energy=image.mass * squared_norms(away), total=image.mass.to(away.dtype)[:, None] * away)


def _mirror(rows: Tensor, bank: Bank) -> Tensor:
    return rows.reshape(len(rows), *bank.data.shape[1:]).flip(-1).reshape(rows.shape)


def _prior_weight(query: Query, where: slice, allowed: Tensor | None) -> Tensor:
    """Log of the summed prior weights of the allowed references of a chunk, shape (B,) or ()."""
    if query.log_prior is None:
        if allowed is None:
            return query.sigma.new_full((), math.log(where.stop - where.start))
        return allowed.sum(1).to(query.sigma).log()
    log_prior = query.log_prior[where]
    return (log_prior if allowed is None else torch.where(allowed, log_prior, -torch.inf)).logsumexp(-1)
