r"""The posterior with fixed shapes: for compilers, and for CUDA graphs.

What is computed may not depend on values here (see `reading`), so nothing is skipped and no value is checked: call the same
thing once outside the compiled function to have its arguments checked. Rows of small noise, whose logits float32 would lose
to cancellation, cannot be told from others; unless noise is known to be large enough for all, float64 makes all logits.

To a compiler it is one operator, `torch.ops.stablefield.posterior`: what it does inside, such as the switches for full
precision, is neither traced nor taken apart.
"""

from dataclasses import replace

import torch
from torch import Tensor

from stablefield.shapes import row_values
from stablefield.targets.excess import Anchor, Excess, certain, find_anchor
from stablefield.targets.kernel import GaussianKernel, Kernel, StudentTKernel
from stablefield.targets.outcome import Posterior, finish
from stablefield.targets.precision import full_precision
from stablefield.targets.query import Query
from stablefield.targets.reference_matrix import ReferenceMatrix
from stablefield.targets.sums import accumulate_all

__all__ = ["compute", "static_posterior"]


def static_posterior(
    x_t: Tensor,
    alpha: float | Tensor,
    sigma: float | Tensor,
    matrix: ReferenceMatrix,
    source: Tensor | None = None,
    labels: Tensor | None = None,
    reference_labels: Tensor | None = None,
    log_prior: Tensor | None = None,
    *,
    kernel: Kernel,
    anchor: Tensor | None = None,
    mirrored: bool = False,
    chunk_size: int | None = None,
    least_level: float = 0.0,
) -> Posterior:
    """The posterior as `posterior` has it, by operations that do not depend on values.

    Args:
        x_t: noisy samples, shape (B, ...).
        alpha: scale of the data, a float or shape (B,).
        sigma: scale of the noise, a float or shape (B,).
        matrix: the references, a tensor.
        source: index of each row's own reference, shape (B,), or None.
        labels: condition of each row, shape (B,), or None.
        reference_labels: condition of each reference, shape (n,), or None.
        log_prior: log prior weight of each reference, shape (n,), or None.
        kernel: the noise kernel.
        anchor: the sources themselves, shape (B, ...), if they are known.
        mirrored: whether the mirror image of each reference is a reference, too.
        chunk_size: references per matrix product; chosen by memory if None.
        least_level: a noise level below which no row's result is used.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, references lie in a numpy array, or the kernel is not one of
            this library's.
    """
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
    dtype = matrix.dtype_with(x_t)
    norms = matrix.known_norms(dtype)
    wide = norms is None or norms.bound is None or not certain(least_level, norms.bound, dtype)
    found = torch.ops.stablefield.posterior(
        x_t,
        row_values("alpha", alpha, x_t),
        row_values("sigma", sigma, x_t),
        matrix.data,
        None if norms is None else norms.squares,
        None if norms is None else norms.origin,
        anchor,
        source,
        labels,
        reference_labels,
        log_prior,
        dof,
        mirrored,
        chunk_size,
        wide,
    )
    mean, variance, ess, source_weight, log_evidence = found
    return Posterior(mean, variance, ess, None if source is None else source_weight, log_evidence)


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
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `torch.ops.stablefield.posterior` does: mean, variance, ESS, source weight (empty if unknown), log evidence."""
    matrix = ReferenceMatrix(references)
    dtype = matrix.dtype_with(x_t)
    matrix.set_norms(dtype, squares, origin)
    kernel: Kernel = StudentTKernel(dof) if dof else GaussianKernel()
    query = Query.checked(
        x_t, alpha, sigma, matrix, source, labels, reference_labels, log_prior, static=True, wide=wide
    )
    with full_precision(x_t.device):
        rows = None if anchor is None else anchor.reshape(query.x_t.shape).to(dtype)
        if rows is not None and source is not None:
            # As `StableTarget` does elsewhere: the sample as it is stored, and the same noise.
            stored = matrix.rows(source, dtype)
            moved = torch.addcmul(query.x_t, query.alpha.to(dtype)[:, None], stored - rows)
            query, rows = replace(query, x_t=moved), stored
        found = find_anchor(query, matrix) if rows is None else Anchor(rows, source)
        excess = Excess(query, found, matrix, kernel)
        partial = accumulate_all(query, found, matrix, excess, kernel, excess.own, mirrored, chunk_size)
        result = finish(partial, query, excess, kernel)
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
