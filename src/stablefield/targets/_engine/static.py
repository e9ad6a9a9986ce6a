r"""The posterior with static shapes: for compilers, and for CUDA graphs.

What is computed may not depend on values here (see `Host.NEVER`), so nothing is skipped and no value is checked: call the
same thing once outside the compiled function to have its arguments checked. Rows of small noise, whose logits float32 would
lose to cancellation, cannot be told from others; unless noise is known to be large enough for all, float64 makes all logits.

To a compiler it is one operator, `torch.ops.stablefield.posterior`: what it does inside, such as the switches for full
precision, is neither traced nor taken apart.
"""

import torch
from torch import Tensor

from stablefield.targets._engine.assembly import Posterior, summed
from stablefield.targets._engine.logits import noise_is_large
from stablefield.targets._engine.query import Host, Plan, Query
from stablefield.targets._engine.reference_matrix import ReferenceMatrix
from stablefield.targets.kernel import GaussianKernel, StudentTKernel

__all__ = ["compute", "posterior_of"]


def posterior_of(query: Query, plan: Plan) -> Posterior:
    """The posterior of a query as it is given: summed here or, where the host may read no value, by the operator.

    Raises:
        ValueError: if the query does not fit the plan; and where no value may be read, if references lie in a numpy array,
            or the kernel is not one of this library's.
    """
    if plan.host is not Host.NEVER:
        return summed(query.checked(plan), plan).posterior()
    matrix, kernel = plan.matrix, plan.kernel
    if not isinstance(matrix.data, Tensor):
        raise ValueError(
            f"the references are a numpy array of shape {tuple(matrix.data.shape)}: a compiled or captured function needs "
            "them in a tensor on the device of the batch."
        )
    # By type: what a subclass changes would not reach the operator.
    if type(kernel) is StudentTKernel:
        dof = kernel.dof
    elif type(kernel) is GaussianKernel:
        dof = 0.0
    else:
        raise ValueError(
            f"kernel is {kernel}: GaussianKernel and StudentTKernel can be compiled or captured, others not."
        )
    dtype = matrix.dtype_with(query.x_t)
    norms = matrix.known_norms(dtype)
    float64 = norms is None or norms.bound is None or not noise_is_large(plan.least_level, norms.bound, dtype)
    found = torch.ops.stablefield.posterior(
        query.x_t,
        query.alpha,
        query.sigma,
        matrix.data,
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
    )
    mean, variance, ess, source_weight, log_evidence = found
    return Posterior(mean, variance, ess, None if query.source is None else source_weight, log_evidence)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `torch.ops.stablefield.posterior` does: mean, variance, ESS, source weight (empty if unknown), log evidence."""
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
    query = Query(
        x_t=x_t,
        alpha=alpha,
        sigma=sigma,
        source=source,
        anchor=anchor,
        # As a `Pool` stores it: an eager call looks first whether that differs.
        stored=None if source is None or anchor is None else matrix.rows(source, dtype),
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
