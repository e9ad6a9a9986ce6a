"""The assembly of a posterior from a query and its plan, in one place for all callers.

`posterior`, `StableTarget`, the operator for torch.compile and the shards of a `ShardedPool` all call `summed`.

While torch compiles or captures, the operations may not depend on values: nothing is skipped and no value is checked (make
the same call once outside to check its arguments). Rows with low noise, whose logits float32 would lose to cancellation,
cannot be selected; unless noise is known to be high enough for all rows, all logits are computed in float64. To a compiler
it is one operator, `torch.ops.stablefield.posterior`, whose inside, such as the switches for full precision, is not traced.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stablefield.targets._engine.columns import Columns
from stablefield.targets._engine.logits import Anchor, Logits, SmallNoise, find_anchor, noise_is_large
from stablefield.targets._engine.matmul import chunks, full_precision, grouped_chunks
from stablefield.targets._engine.online_softmax import OnlineSoftmax
from stablefield.targets._engine.query import Host, Plan, Query
from stablefield.targets._engine.reference_matrix import ReferenceMatrix, squared_norms
from stablefield.targets._perturbation_kernel import GaussianKernel, StudentTKernel
from stablefield.targets._target import Posterior

__all__ = ["Summed", "compute", "posterior_of", "summed"]


# Multiplications below which one product of all rows with all references is as fast as anything else.
_FEW = 2**26


@dataclass(frozen=True)
class Summed:
    """The softmax sums of a query over all references of its plan, relative to the query's anchors."""

    query: Query
    plan: Plan
    logits: Logits
    softmax: OnlineSoftmax

    def posterior(self) -> Posterior:
        """The posterior from the sums; turns their `total` into the mean in place.

        Raises:
            ValueError: if no reference may serve a row.
        """
        query, softmax = self.query, self.softmax
        # A row with a known source has at least one reference, unless its log prior is -inf: check only the other cases.
        certain = query.source is not None and (query.log_prior is None or query.source_prior is not None)
        if not certain and self.plan.host is not Host.NEVER and bool(torch.isneginf(softmax.peak).any()):
            row = int(torch.isneginf(softmax.peak).nonzero()[0, 0])
            label = "" if query.labels is None else f" (label {int(query.labels[row])})"
            raise ValueError(
                f"no reference may serve row {row}{label}: pass references of its label, or label -1 to use all of them."
            )
        assert query.like is not None
        narrow, own = query.x_t.dtype, None
        gap = softmax.total.div_(softmax.mass.to(narrow)[:, None])
        variance = (softmax.energy / softmax.mass - squared_norms(gap)).clamp(min=0)
        if query.source is not None:  # it is the anchor
            own = (torch.exp(self.logits.own - softmax.peak) / softmax.mass).to(narrow)
        at_anchor = self.plan.kernel.log_density(self.logits.anchor_square, query.sigma, query.x_t.shape[1])
        return Posterior(
            mean=gap.add_(self.logits.anchor.rows).reshape(query.like.shape).to(query.like.dtype),
            variance=variance.to(narrow),
            ess=(softmax.mass**2 / softmax.mass_squared).to(narrow),
            source_weight=own,
            log_evidence=(at_anchor + softmax.peak + torch.log(softmax.mass) - softmax.log_prior).to(narrow),
        )


def posterior_of(query: Query, plan: Plan, least_level: float = 0.0) -> Posterior:
    """The posterior of a query as given: summed here or, if the host may not read values, by the operator.

    The caller uses no results of rows below the noise level `least_level`.

    Raises:
        ValueError: if the query does not fit the plan; and if values may not be read, if references are in a numpy array, or
            the kernel is not one of this library's.
    """
    if plan.host is not Host.NEVER:
        return summed(query.checked(plan), plan).posterior()
    matrix, kernel = plan.matrix, plan.kernel
    if plan.flipped is not None or query.log_likelihood is not None:
        given = "approximate_log_likelihood" if plan.flipped is None else "a Pool with flipped samples"
        raise ValueError(
            f"{given} cannot be compiled or captured: keep the target out of the compiled part: "
            "torch.compiler.disable(target.__call__)."
        )
    if matrix.resident is None:
        raise ValueError(
            f"the references, of shape {tuple(matrix.data.shape)}, are in a numpy array or in the host's memory: a compiled "
            "or captured function needs them in a tensor on the device of the batch."
        )
    # By exact type: the changes of a subclass would not reach the operator.
    if type(kernel) is StudentTKernel:
        dof = kernel.dof
    elif type(kernel) is GaussianKernel:
        dof = 0.0
    else:
        raise ValueError(
            f"kernel is {kernel}: pass GaussianKernel or StudentTKernel; others cannot be compiled or captured."
        )
    dtype = matrix.dtype_with(query.x_t)
    norms = matrix.known_norms(dtype)
    float64 = norms is None or norms.bound is None or not noise_is_large(least_level, norms.bound, dtype)
    found = torch.ops.stablefield.posterior(
        query.x_t,
        query.alpha,
        query.sigma,
        matrix.resident,
        None if norms is None else norms.squares,
        None if norms is None else norms.origin,
        query.anchor,
        query.source,
        query.labels,
        query.reference_labels,
        query.log_prior,
        dof,
        plan.mirrored,
        plan.chunk_size,
        float64,
        plan.resampled,
    )
    mean, variance, ess, source_weight, log_evidence = found
    return Posterior(mean, variance, ess, None if query.source is None else source_weight, log_evidence)


def summed(query: Query, plan: Plan) -> Summed:
    """Sum over the references of `plan`, here or with the other ranks, and their mirror images if the set has them."""
    with full_precision(query.x_t.device):
        small = SmallNoise.of(query, plan)
        anchor = find_anchor(query, plan, small)
        logits = Logits(query, plan, _without(anchor, query.flipped), small)
        if plan.ranks is not None:
            softmax = OnlineSoftmax.empty(query.x_t, logits.own).merge(plan.ranks.sums(query, plan))
            return Summed(query, plan, logits, softmax.with_anchors(logits.own))
        if plan.least_prior is None:
            softmax = _over_matrix(query, plan, logits, logits.own).with_anchors(logits.own)
        else:
            softmax = _over_matrix(query, plan, logits, torch.full_like(query.alpha, plan.least_prior))
        if plan.flipped is not None and query.flipped is not None:
            other = replace(plan, matrix=plan.flipped)
            over = Logits(query, other, _without(anchor, ~query.flipped), SmallNoise.of(query, other))
            if query.partner is not None:
                softmax = softmax.merge(_own_partner(query, plan, logits, anchor.place, query.partner))
            softmax = softmax.merge(_over_matrix(query, other, over, softmax.peak))
        if plan.mirrored:
            if query.source_prior is not None and anchor.place is not None:
                image = _mirror(anchor.rows, plan.matrix)
                softmax = softmax.merge(_own_partner(query, plan, logits, anchor.place, image))
            softmax = softmax.merge(_over_images(query, plan, anchor, small, softmax.peak))
        return Summed(query, plan, logits, softmax)


def _over_matrix(query: Query, plan: Plan, logits: Logits, level: Tensor) -> OnlineSoftmax:
    """The sums over the plan's matrix without the anchors, chunk by chunk, for rows known to reach `level` (B,)."""
    x, matrix = query.x_t, plan.matrix
    softmax = OnlineSoftmax.empty(x, level)
    if _by_label(query, plan, logits, softmax):
        return logits.relative_to_anchor(softmax)
    among = len(matrix) if plan.host is Host.READS else None
    for where, chunk in chunks(matrix, plan.chunk_size, len(x), x.dtype):
        softmax.add(logits.of_chunk(chunk, Columns(where), softmax.peak), among)
    return logits.relative_to_anchor(softmax)


def _by_label(query: Query, plan: Plan, logits: Logits, softmax: OnlineSoftmax) -> bool:
    """Add to `softmax` the sums over the references of each row's label; False if all have to be compared with all rows."""
    matrix, dtype = plan.matrix, query.x_t.dtype
    if query.labels is None or query.reference_labels is None or plan.host is Host.NEVER:
        return False
    if logits.anchor.distances is not None or query.log_likelihood is not None:  # computed for all pairs
        return False
    if len(query.x_t) * len(matrix) * matrix.dim < _FEW:
        return False
    # A GPU would have to be waited for: its pools have computed it once.
    find = matrix.by_label if plan.host is Host.READS else matrix.known_by_label
    index = find(query.reference_labels)
    if index is None:
        return False
    labels = query.labels.cpu() if query.known_labels is None else query.known_labels
    size = plan.chunk_size or matrix.chunk_size(int(labels.unique(return_counts=True)[1].max()))
    found = index.parts(labels, matrix.dim, size)
    if found is None:
        return False
    order = found.order.to(query.x_t.device, non_blocking=True)
    logits, ordered = logits.at(found.order), softmax.at(order)
    among = len(matrix) if plan.host is Host.READS else None
    for part in found.parts:
        some, sums, count = logits.at(part.rows), ordered.at(part.rows), part.rows.stop - part.rows.start
        if part.runs is None:
            products = ((Columns(where), chunk) for where, chunk in chunks(matrix, plan.chunk_size, count, dtype))
        else:
            products = grouped_chunks(matrix, index.columns(part, size), count, dtype)
        for columns, chunk in products:
            sums.add(some.of_chunk(chunk, columns, sums.peak), among)
        ordered.put(part.rows, sums)
    softmax.put(order, ordered)
    return True


def _over_images(query: Query, plan: Plan, anchor: Anchor, small: SmallNoise, level: Tensor) -> OnlineSoftmax:
    """The sums over mirror images: those of the mirrored rows over the unmirrored references, mirrored back."""
    image = replace(query, x_t=_mirror(query.x_t, plan.matrix), source=None)
    logits = Logits(image, plan, Anchor(_mirror(anchor.rows, plan.matrix), None), small)
    softmax = _over_matrix(image, plan, logits, level)
    softmax.total = _mirror(softmax.total, plan.matrix)
    return softmax


def _without(anchor: Anchor, elsewhere: Tensor | None) -> Anchor:
    """The anchors, of which those `elsewhere`, bool (B,), are no references of this matrix."""
    if elsewhere is None or anchor.place is None:
        return anchor
    return replace(anchor, place=anchor.place.masked_fill(elsewhere, -1))


def _own_partner(query: Query, plan: Plan, logits: Logits, place: Tensor | None, rows: Tensor) -> OnlineSoftmax:
    """The share of the mirrored or flipped samples (B, d) of those sources that are references only for their own rows."""
    assert query.source_prior is not None
    assert place is not None
    anchor = logits.anchor
    # |x - alpha m|^2 - |x - alpha a|^2 for the partner m of the anchor a, in a form that does not cancel.
    gap = query.alpha.to(rows.dtype)[:, None] * (anchor.rows - rows)
    distance = (gap * (gap + 2 * logits.noise)).sum(1, dtype=query.sigma.dtype)[:, None]
    square, sigma = logits.anchor_square[:, None], query.sigma[:, None]
    logit = plan.kernel.log_ratio(distance, square, sigma, rows.shape[1])[:, 0]
    logit = (logit + query.source_prior).masked_fill(place >= 0, -torch.inf).to(query.sigma)
    # Sums are relative to the anchor; this is its partner. No caller has a use for the evidence of such rows.
    away, mass = rows - anchor.rows, (~torch.isneginf(logit)).to(logit.dtype)
    return OnlineSoftmax(
        peak=logit,
        mass=mass,
        mass_squared=mass,
        energy=mass * squared_norms(away),
        total=mass.to(away.dtype)[:, None] * away,
        log_prior=torch.full_like(logit, -torch.inf),
    )


def _mirror(rows: Tensor, matrix: ReferenceMatrix) -> Tensor:
    return rows.reshape(len(rows), *matrix.data.shape[1:]).flip(-1).reshape(rows.shape)


def compute(
    x_t: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    references: Tensor,
    squares: Tensor | None,
    origin: Tensor | None,
    anchor: Tensor | None,
    source: Tensor | None,
    labels: Tensor | None,
    reference_labels: Tensor | None,
    log_prior: Tensor | None,
    dof: float,
    mirrored: bool,
    chunk_size: int | None,
    float64: bool,
    resampled: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Implement `torch.ops.stablefield.posterior`: mean, variance, ESS, source weight (empty if unknown), log evidence."""
    matrix = ReferenceMatrix(references)
    dtype = matrix.dtype_with(x_t)
    matrix.set_norms(dtype, squares, origin)
    plan = Plan(
        matrix=matrix,
        host=Host.NEVER,
        kernel=StudentTKernel(dof) if dof else GaussianKernel(),
        mirrored=mirrored,
        chunk_size=chunk_size,
        float64=float64,
    )
    stored = None
    if source is not None and anchor is not None:
        # As a `Pool` stores it; an eager call first checks whether it differs.
        stored = anchor.flatten(1).to(references.dtype) if resampled else matrix.rows(source, dtype)
    query = Query(
        x_t=x_t,
        alpha=alpha,
        sigma=sigma,
        source=source,
        anchor=anchor,
        stored=stored,
        labels=labels,
        reference_labels=reference_labels,
        log_prior=log_prior,
    )
    result = summed(query.checked(plan), plan).posterior()
    own = result.ess.new_zeros(0) if result.source_weight is None else result.source_weight
    return result.mean, result.variance, result.ess, own, result.log_evidence


_posterior = torch.library.custom_op("stablefield::posterior", compute, mutates_args=())


@_posterior.register_fake
def _(
    x_t: Tensor,
    alpha: Tensor,  # noqa: ARG001
    sigma: Tensor,  # noqa: ARG001
    references: Tensor,
    squares: Tensor | None,  # noqa: ARG001
    origin: Tensor | None,  # noqa: ARG001
    anchor: Tensor | None,  # noqa: ARG001
    source: Tensor | None,
    *rest: object,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = ReferenceMatrix(references).dtype_with(x_t)
    batch = x_t.shape[0]  # not len(): it may be a symbol
    row = x_t.new_empty(batch, dtype=dtype)
    own = row.new_empty(0 if source is None else batch)
    mean = torch.empty(x_t.shape, dtype=x_t.dtype, device=x_t.device)
    return mean, row, torch.empty_like(row), own, torch.empty_like(row)
