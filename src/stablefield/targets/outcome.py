"""The outcome: what the softmax sums over all references come to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield.targets.excess import Excess
from stablefield.targets.kernel import Kernel
from stablefield.targets.online_softmax import OnlineSoftmax
from stablefield.targets.query import Query
from stablefield.targets.reference_matrix import squared_norms

__all__ = ["Posterior", "finish"]


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


def finish(partial: OnlineSoftmax, query: Query, excess: Excess, kernel: Kernel) -> Posterior:
    """Turn the sums over all references into the posterior; their `total` becomes the mean in place.

    Raises:
        ValueError: if no reference may serve a row.
    """
    served = ~torch.isneginf(partial.peak)
    # A source serves its row (its label has been found to fit), unless its prior excludes it: no look is needed to know it.
    unsure = query.source is None or (query.log_prior is not None and query.source_prior is None)
    if unsure and not query.static and not bool(served.all()):
        row = int((~served).nonzero()[0, 0])
        of_group = "" if query.labels is None else f" (label {int(query.labels[row])})"
        raise ValueError(
            f"no reference may serve row {row}{of_group}: give references of its label, or label -1 to use all of them."
        )
    narrow = query.x_t.dtype
    gap = partial.total.div_(partial.mass.to(narrow)[:, None])
    variance = (partial.energy / partial.mass - squared_norms(gap)).clamp(min=0)
    own = None
    if query.source is not None:
        prior = query.source_prior
        if prior is None:
            prior = torch.zeros_like(partial.peak) if query.log_prior is None else query.log_prior[query.source]
        own = (torch.exp(prior - partial.peak) / partial.mass).to(narrow)
    at_anchor = kernel.log_density(excess.anchor_square, query.sigma, query.x_t.shape[1])
    return Posterior(
        mean=gap.add_(excess.anchor).reshape(query.like.shape).to(query.like.dtype),
        variance=variance.to(narrow),
        ess=(partial.mass**2 / partial.mass_squared).to(narrow),
        source_weight=own,
        log_evidence=(at_anchor + partial.peak + torch.log(partial.mass) - partial.log_prior).to(narrow),
    )
