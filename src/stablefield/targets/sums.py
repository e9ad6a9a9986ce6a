"""Sums: the softmax sums of a query over a bank, chunk by chunk."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from stablefield.targets.bank import Bank
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
    uniform = query.log_prior is None and query.group is None
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

    def mirror(rows: Tensor) -> Tensor:
        return rows.reshape(len(rows), *bank.data.shape[1:]).flip(-1).reshape(rows.shape)

    image = replace(query, x_t=mirror(query.x_t), source=None)
    excess = Excess(image, Anchor(mirror(anchor.rows), None), bank, kernel)
    x = image.x_t
    partial = Partial.empty(x.shape[0], x.shape[1], x.dtype, x.device, level=level)
    partial = accumulate(image, bank, excess, partial, chunk_size)
    partial.total = mirror(partial.total)
    return partial


def _prior_weight(query: Query, where: slice, allowed: Tensor | None) -> Tensor:
    """Log of the summed prior weights of the allowed references of a chunk, shape (B,) or ()."""
    if query.log_prior is None:
        if allowed is None:
            return query.sigma.new_full((), math.log(where.stop - where.start))
        return allowed.sum(1).to(query.sigma).log()
    log_prior = query.log_prior[where]
    return (log_prior if allowed is None else torch.where(allowed, log_prior, -torch.inf)).logsumexp(-1)
