"""The assembly: a posterior from a query and its plan, in one place for all who ask.

`posterior`, `StableTarget`, the operator for torch.compile and the shards of a `ShardedPool` all call `summed`.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stablefield.targets._engine.logits import Anchor, Logits, SmallNoise, find_anchor
from stablefield.targets._engine.matmul import chunk_size, chunks, full_precision
from stablefield.targets._engine.online_softmax import OnlineSoftmax
from stablefield.targets._engine.query import Host, Plan, Query
from stablefield.targets._engine.reference_matrix import ReferenceMatrix
from stablefield.targets._engine.rows import squared_norms

__all__ = ["Posterior", "Summed", "summed"]


@dataclass(frozen=True)
class Posterior:
    """The posterior of x0 over a reference set, for a batch of B rows.

    Attributes:
        mean: posterior mean of x0; shape, dtype and device of x_t.
        variance: trace of the posterior covariance, sum_k w_k |y_k|^2 - |mean|^2, in squared units of the data, shape (B,).
            In expectation, this is the variance that the mean removes from the single-sample target. Never below 0; its
            error is some ulps of itself, and of D min(D, 30 sigma / alpha) times the weight that is not the source's, for
            references within D of their middle. 0 where the others weigh less than float32 sees beside the source.
        ess: effective sample size 1 / sum_k w_k^2, between 1 and n, shape (B,).
        source_weight: posterior weight of the row's own source, shape (B,); None if no source was given.
        log_evidence: log density of x_t under the mixture of the kernels around the allowed references, with the prior
            weights normalised over them, in nats, shape (B,).
    """

    mean: Tensor
    variance: Tensor
    ess: Tensor
    source_weight: Tensor | None
    log_evidence: Tensor


@dataclass(frozen=True)
class Summed:
    """The softmax sums of a query over all references of its plan, relative to the query's anchors."""

    query: Query
    plan: Plan
    logits: Logits
    softmax: OnlineSoftmax

    def posterior(self) -> Posterior:
        """What the sums come to; their `total` becomes the mean in place.

        Raises:
            ValueError: if no reference may serve a row.
        """
        query, softmax = self.query, self.softmax
        prior = query.source_prior
        # A source serves its row (its label was checked), unless its prior excludes it; only else are the sums checked.
        certain = query.source is not None and (query.log_prior is None or prior is not None)
        if not certain and self.plan.host is not Host.NEVER and bool(torch.isneginf(softmax.peak).any()):
            row = int(torch.isneginf(softmax.peak).nonzero()[0, 0])
            label = "" if query.labels is None else f" (label {int(query.labels[row])})"
            raise ValueError(
                f"no reference may serve row {row}{label}: give references of its label, or label -1 to use all of them."
            )
        assert query.like is not None
        narrow, own = query.x_t.dtype, None
        gap = softmax.total.div_(softmax.mass.to(narrow)[:, None])
        variance = (softmax.energy / softmax.mass - squared_norms(gap)).clamp(min=0)
        if query.source is not None:
            if prior is None:
                prior = torch.zeros_like(softmax.peak) if query.log_prior is None else query.log_prior[query.source]
            own = (torch.exp(prior - softmax.peak) / softmax.mass).to(narrow)
        at_anchor = self.plan.kernel.log_density(self.logits.anchor_square, query.sigma, query.x_t.shape[1])
        return Posterior(
            mean=gap.add_(self.logits.anchor.rows).reshape(query.like.shape).to(query.like.dtype),
            variance=variance.to(narrow),
            ess=(softmax.mass**2 / softmax.mass_squared).to(narrow),
            source_weight=own,
            log_evidence=(at_anchor + softmax.peak + torch.log(softmax.mass) - softmax.log_prior).to(narrow),
        )


def summed(query: Query, plan: Plan) -> Summed:
    """Sum over the references of `plan`, here or with the other ranks, and their mirror images if the set has them."""
    with full_precision(query.x_t.device):
        small = SmallNoise.of(query, plan)
        anchor = find_anchor(query, plan, small)
        logits = Logits(query, plan, anchor, small)
        if plan.least_prior is None:
            start = logits.own_share()
        else:
            start = OnlineSoftmax.empty(query.x_t, torch.full_like(query.alpha, plan.least_prior))
        if plan.ranks is not None:
            return Summed(query, plan, logits, start.merge(plan.ranks.sums(query, plan)))
        softmax = _over_matrix(query, plan, logits, start)
        if plan.mirrored:
            if query.source_prior is not None and anchor.place is not None:
                softmax = softmax.merge(_own_image(query, plan, logits))
            # Sums over mirror images are those of the mirrored row over the references as they are, mirrored back.
            image = replace(query, x_t=_mirror(query.x_t, plan.matrix), source=None)
            mirrored = Logits(image, plan, Anchor(_mirror(anchor.rows, plan.matrix), None), small)
            images = _over_matrix(image, plan, mirrored, OnlineSoftmax.empty(image.x_t, softmax.peak))
            images.total = _mirror(images.total, plan.matrix)
            softmax = softmax.merge(images)
        return Summed(query, plan, logits, softmax)


def _over_matrix(query: Query, plan: Plan, logits: Logits, start: OnlineSoftmax) -> OnlineSoftmax:
    """The sums over the plan's matrix, chunk by chunk, and `start`, which holds nothing but anchors, if that."""
    x, matrix = query.x_t, plan.matrix
    size = min(plan.chunk_size or chunk_size(matrix, len(x), x.dtype), len(matrix))
    norms = matrix.norms(x.dtype)
    among = len(matrix) if plan.host is Host.READS else None
    others = OnlineSoftmax.empty(x, start.peak)
    uniform = query.log_prior is None and query.labels is None
    if uniform:
        others.add_prior(_prior_weight(query, slice(0, len(matrix)), None))
    for where, chunk in chunks(matrix, size, len(x), x.dtype):
        allowed = query.allowed(where)
        values, largest, energy = logits.of_chunk(chunk, norms.at(where), where, allowed, others.peak)
        if not uniform:
            others.add_prior(_prior_weight(query, where, allowed))
        others.add(values, largest, chunk, energy, among)
    return logits.relative_to_anchor(others).with_anchors(start)


def _own_image(query: Query, plan: Plan, logits: Logits) -> OnlineSoftmax:
    """The share of the mirror images of the sources that are references for their own rows alone."""
    anchor = logits.anchor
    assert query.source_prior is not None
    assert anchor.place is not None
    rows = _mirror(anchor.rows, plan.matrix)
    # |x - alpha m|^2 - |x - alpha a|^2 for the image m of the anchor a, in a form that does not cancel.
    gap = query.alpha.to(rows.dtype)[:, None] * (anchor.rows - rows)
    distance = (gap * (gap + 2 * logits.noise)).sum(1, dtype=query.sigma.dtype)[:, None]
    square, sigma = logits.anchor_square[:, None], query.sigma[:, None]
    logit = plan.kernel.log_ratio(distance, square, sigma, rows.shape[1])[:, 0]
    logit = (logit + query.source_prior).masked_fill(anchor.place >= 0, -torch.inf).to(query.sigma)
    image, away = OnlineSoftmax.of_anchors(logit, rows), rows - anchor.rows
    # Sums are relative to the anchor, of which this is the image.
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
