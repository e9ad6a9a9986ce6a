r"""The posterior of the clean sample over a reference set (the stable target field): the heart of the library.

Given $x_t = \alpha x_0 + \sigma \varepsilon$ and references $y_1 \dots y_n$ with prior weights $\pi_k$,

$$ w_k = \frac{\pi_k\, p_{t|0}(x_t \mid y_k)}{\sum_j \pi_j\, p_{t|0}(x_t \mid y_j)}
       \propto \pi_k \exp\left( -\frac{|x_t - \alpha y_k|^2}{2 \sigma^2} \right), \qquad
   E[x_0 \mid x_t] \approx \sum_k w_k y_k . $$

If the references are exchangeable and $x_t$ was made from one of them, the mean is the expectation of that source given
$x_t$ and the set: an unbiased regression target with less variance than the source itself (Rao-Blackwell).

For one alpha and one sigma, and uniform prior weights, it computes

    weights = torch.softmax(-torch.cdist(x_t, alpha * y).square() / (2 * sigma**2), dim=1)
    mean = weights @ y

with the accuracy of this in float64. It is one softmax cross-attention with queries $x_t$ and keys = values = references, at
the cost of two matrix products of 2 B n d flops and memory O((B + chunk) d + B chunk). A row with a label is multiplied with
the references of its label only (`_engine/label_index.py`). `_engine/logits.py` computes the
distances and explains how they stay accurate, `_perturbation_kernel.py` makes exponents of them, `_engine/online_softmax.py`
sums the weights, chunk by chunk, and `_engine/assembly.py` puts these together. On a CPU,
the second product skips rows for which a chunk has no weight that the dtype resolves: all rows of low noise.

References:
    Xu, Tong, Jaakkola, "Stable Target Field for Reduced Variance Score Estimation in Diffusion Models", ICLR 2023,
    equations 6 to 8.
"""

import torch
from torch import Tensor

from stablefield._shapes import check_tensor, row_values, whole_number
from stablefield.targets._engine.assembly import posterior_of
from stablefield.targets._engine.query import Plan, Query, checked_matrix, host_access
from stablefield.targets._perturbation_kernel import GaussianKernel, PerturbationKernel
from stablefield.targets._target import Posterior

__all__ = ["Posterior", "posterior"]


@torch.no_grad()
def posterior(
    x_t: Tensor,
    alpha: float | Tensor,
    sigma: float | Tensor,
    references: Tensor,
    source: Tensor | None = None,
    labels: Tensor | None = None,
    reference_labels: Tensor | None = None,
    log_prior: Tensor | None = None,
    chunk_size: int | None = None,
    kernel: PerturbationKernel | None = None,
) -> Posterior:
    """Posterior of the clean sample, given noisy ones and a reference set.

    Computed without gradients, in float32 (float64 if x_t or the references are), outside autocast and without TF32. Weights
    are accurate to 1e-3 for the given numbers, even for data far from zero, from which a common origin is subtracted. This
    cannot undo earlier rounding: at an offset of 10,000 a float32 in x_t is off by up to 5e-4, noise that `sigma` does not
    include. It does no harm while it is small compared with sigma; otherwise shift the data, or convert them to float64,
    before you add noise. Where values are not read (on a GPU, compiled), data may reach as far as 1e6 sigma / alpha.

    Under `torch.compile` and in the capture of a CUDA graph it is one operator with static shapes, and checks no values.

    Args:
        x_t: noisy samples, shape (B, ...), floating point.
        alpha: scale of the data in x_t, a float or shape (B,).
        sigma: standard deviation of the noise in x_t, a float or shape (B,), positive.
        references: clean samples, shape (n, ...), floating point, or uint8 images that mean references / 127.5 - 1.
        source: index of the reference that made each row, integers of shape (B,). Gives `source_weight`, and saves the
            search for an anchor at low noise.
        labels: condition of each row, integers of shape (B,): row i uses reference k only if their labels are equal; a row
            with label -1 (dropped for guidance) uses all references.
        reference_labels: condition of each reference, integers of shape (n,); needed with `labels`.
        log_prior: log prior weight of each reference, shape (n,), not necessarily normalised; uniform if not given.
        chunk_size: references per matrix product; chosen by memory if not given. It changes the result only by rounding.
        kernel: the perturbation kernel p_{t|0}; Gaussian if not given.

    Returns:
        The posterior for each row.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, sigma is not positive, alpha is not finite, data are not
            finite, a source is out of range or has a different label from its row, or a row has no reference.
    """
    check_tensor("x_t", x_t)
    check_tensor("references", references)
    given = {"source": source, "labels": labels, "reference_labels": reference_labels, "log_prior": log_prior}
    for name, value in given.items():
        if value is not None:
            check_tensor(name, value)
    if log_prior is not None and (log_prior.is_complex() or log_prior.dtype == torch.bool):
        raise ValueError(f"log_prior has dtype {log_prior.dtype}: pass logarithms of weights, real numbers.")
    if chunk_size is not None:
        whole_number("chunk_size", chunk_size)
    if kernel is not None and (isinstance(kernel, type) or not hasattr(kernel, "log_ratio")):
        raise TypeError(f"kernel is {kernel!r:.80}: pass GaussianKernel() or StudentTKernel(dof).")
    matrix = checked_matrix(x_t, references)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: pass at least 1, or None to choose it automatically.")
    if x_t.device.type == "meta":
        raise ValueError("x_t is on the device meta, which holds no numbers: move the data to cpu or cuda.")
    plan = Plan(matrix=matrix, host=host_access(x_t.device), kernel=kernel or GaussianKernel(), chunk_size=chunk_size)
    query = Query(
        x_t=x_t,
        alpha=row_values("alpha", alpha, x_t),
        sigma=row_values("sigma", sigma, x_t),
        source=source,
        labels=labels,
        reference_labels=reference_labels,
        log_prior=log_prior,
    )
    return posterior_of(query, plan)
