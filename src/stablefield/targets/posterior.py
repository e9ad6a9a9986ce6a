r"""The posterior of the clean sample over a reference set: the heart of the library.

Given $x_t = \alpha x_0 + \sigma \varepsilon$ and references $y_1 \dots y_n$ with prior weights $\pi_k$,

$$ w_k \propto \pi_k \exp\left( -\frac{|x_t - \alpha y_k|^2}{2 \sigma^2} \right), \qquad
   E[x_0 \mid x_t] \approx \sum_k w_k y_k . $$

If the references are exchangeable and $x_t$ was made from one of them, the mean is the expectation of that source given
$x_t$ and the set: an unbiased regression target with less variance than the source itself (Rao-Blackwell).

It is one softmax cross-attention with queries $x_t$ and keys = values = references, at the cost of two matrix products
of 2 B n d flops and memory O((B + chunk) d + B chunk); `excess` says how its logits keep their accuracy. On a CPU, rows
for which a chunk has no weight that the dtype sees are left out of the second product: all rows of small noise.

References:
    Xu, Tong, Jaakkola, "Stable Target Field for Reduced Variance Score Estimation in Diffusion Models", ICLR 2023,
    equations 6 to 8.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stablefield.targets.bank import Bank, squared_norms
from stablefield.targets.excess import Anchor, Excess, find_anchor, watched
from stablefield.targets.factor import factor_size, factors
from stablefield.targets.kernel import GaussianKernel, Kernel
from stablefield.targets.partial import Partial
from stablefield.targets.precision import full_precision
from stablefield.targets.query import Query, checked_bank

__all__ = ["Posterior", "accumulate", "finish", "mirrored_sums", "posterior"]


@dataclass(frozen=True)
class Posterior:
    """The posterior of x0 over a reference set, for a batch of B rows.

    Attributes:
        mean: posterior mean of x0; shape, dtype and device of x_t.
        variance: trace of the posterior covariance, sum_k w_k |y_k|^2 - |mean|^2, in squared units of the data, shape (B,).
            In expectation, this is the variance that the mean removes from the single-sample target. A difference of two
            squares, so its absolute error is about eps |y|^2 in the dtype of the computation; never below 0.
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


@torch.no_grad()
def posterior(
    x_t: Tensor,
    alpha: float | Tensor,
    sigma: float | Tensor,
    references: Tensor,
    source: Tensor | None = None,
    group: Tensor | None = None,
    reference_group: Tensor | None = None,
    log_prior: Tensor | None = None,
    chunk_size: int | None = None,
    kernel: Kernel | None = None,
) -> Posterior:
    """Posterior of the clean sample, given noisy ones and a reference set.

    Computed without gradients, in float32 (float64 if x_t or the references are), outside autocast and without TF32.

    Args:
        x_t: noisy samples, shape (B, ...), floating point.
        alpha: scale of the data in x_t, a float or shape (B,).
        sigma: standard deviation of the noise in x_t, a float or shape (B,), positive.
        references: clean samples, shape (n, ...), floating point, or uint8 images that mean references / 127.5 - 1.
        source: index of the reference that made each row, integers of shape (B,). Gives `source_weight`, and saves the
            search for an anchor where the noise is small.
        group: condition of each row, integers of shape (B,): row i uses reference k only if their groups are equal; a row
            with group -1 (label dropped for guidance) uses all references.
        reference_group: condition of each reference, integers of shape (n,); needed with `group`.
        log_prior: log prior weight of each reference, shape (n,), not necessarily normalised; uniform if not given.
        chunk_size: references per matrix product; chosen by memory if not given. It changes the result by rounding alone.
        kernel: the noise kernel; Gaussian if not given.

    Returns:
        The posterior for each row.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, sigma is not positive, alpha is not finite, data are not
            finite, a source is out of range or of another group than its row, or no reference may serve a row.
    """
    bank = checked_bank(x_t, references)
    query = Query.checked(x_t, alpha, sigma, bank, source, group, reference_group, log_prior)
    kernel = kernel or GaussianKernel()
    with full_precision(x_t.device):
        excess = Excess(query, find_anchor(query, bank), bank, kernel)
        return finish(accumulate(query, bank, excess, excess.own, chunk_size), query, excess, kernel)


def accumulate(query: Query, bank: Bank, excess: Excess, partial: Partial, chunk_size: int | None = None) -> Partial:
    """Add the references of `bank` to the softmax sums `partial`, with logits relative to the anchors of `excess`.

    Returns:
        `partial`, changed in place. The anchors themselves are not added, see `Excess.own`.

    Raises:
        ValueError: if `chunk_size` is below 1.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: it must be at least 1, or None to have it chosen.")
    x = query.x_t
    size = min(chunk_size or factor_size(bank, len(x), x.dtype), len(bank))
    norms = bank.norms(x.dtype)
    among = len(bank) if watched(x.device) else None
    uniform = query.log_prior is None and query.group is None
    if uniform:
        partial.add_prior(_prior_weight(query, slice(0, len(bank)), None))
    for where, factor in factors(bank, size, len(x), x.dtype):
        allowed, part = query.allowed(where), norms.at(where)
        logits, largest = excess.logits(factor, part, where, allowed, partial.peak)
        if not uniform:
            partial.add_prior(_prior_weight(query, where, allowed))
        partial.add(logits, largest, factor, part, among)
    return partial


def mirrored_sums(
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


def finish(partial: Partial, query: Query, excess: Excess, kernel: Kernel) -> Posterior:
    """Turn the sums over all references into the posterior.

    Raises:
        ValueError: if no reference may serve a row.
    """
    served = ~torch.isneginf(partial.peak)
    if not bool(served.all()):
        row = int((~served).nonzero()[0, 0])
        of_group = "" if query.group is None else f" (group {int(query.group[row])})"
        raise ValueError(
            f"no reference may serve row {row}{of_group}: give references of its group, or group -1 to use all of them."
        )
    narrow = query.x_t.dtype
    mean = partial.total / partial.mass.to(narrow)[:, None]
    variance = (partial.energy / partial.mass - squared_norms(mean)).clamp(min=0)
    own = None
    if query.source is not None:
        prior = torch.zeros_like(partial.peak) if query.log_prior is None else query.log_prior[query.source]
        own = (torch.exp(prior - partial.peak) / partial.mass).to(narrow)
    at_anchor = kernel.log_density(excess.anchor_square, query.sigma, query.x_t.shape[1])
    return Posterior(
        mean=mean.reshape(query.like.shape).to(query.like.dtype),
        variance=variance.to(narrow),
        ess=(partial.mass**2 / partial.mass_squared).to(narrow),
        source_weight=own,
        log_evidence=(at_anchor + partial.peak + torch.log(partial.mass) - partial.log_prior).to(narrow),
    )


def _prior_weight(query: Query, where: slice, allowed: Tensor | None) -> Tensor:
    """Log of the summed prior weights of the allowed references of a chunk, shape (B,) or ()."""
    if query.log_prior is None:
        count = torch.full((), where.stop - where.start) if allowed is None else allowed.sum(1)
        return count.to(query.sigma).log()
    log_prior = query.log_prior[where]
    return (log_prior if allowed is None else torch.where(allowed, log_prior, -torch.inf)).logsumexp(-1)
