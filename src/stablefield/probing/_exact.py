r"""The exact posterior over a population, and how far it is from the prior.

The divergence is that of Kullback and Leibler, the f-divergence with $f(u) = u \log u$:

$$ D_f(p(x_0 | x_t) \,\|\, p(x_0)) = \sum_k w_k \log \frac{w_k}{1/n} = \log n - H(w), $$

$\log n$ nats if one sample has all the weight and 0 if all have the same. Its mean over $x_t$ is the mutual information of
$x_0$ and $x_t$. It follows from sums that the posterior keeps anyway: with logits $l_k$ relative to the anchor, $\sum_k w_k
\log w_k = \sum_k w_k l_k - \log \sum_k e^{l_k}$, and the mean logit is a difference of first and second moments.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield.targets._engine.assembly import Summed, summed
from stablefield.targets._engine.query import Plan, Query, host_access
from stablefield.targets._engine.reference_matrix import ReferenceMatrix
from stablefield.targets._perturbation_kernel import GaussianKernel
from stablefield.targets._target import Posterior

__all__ = ["Exact", "ExactPosterior"]


@dataclass(frozen=True)
class Exact:
    """The posterior for a batch of B rows.

    Attributes:
        posterior: mean, variance, ESS and source weight.
        divergence: D_f of the weights from the prior, f(u) = u log u, in nats, shape (B,), float64.
    """

    posterior: Posterior
    divergence: Tensor


class ExactPosterior:
    """The posterior over a fixed set whose norms are computed once.

    Args:
        data: the samples, shape (N, ...), floating point, or uint8 images that mean data / 127.5 - 1.
        labels: class of each, integers of shape (N,): rows then use only their own class.
    """

    def __init__(self, data: Tensor, labels: Tensor | None = None) -> None:
        self._matrix = ReferenceMatrix(data)
        self._labels = labels

    @property
    def matrix(self) -> ReferenceMatrix:
        """The samples."""
        return self._matrix

    def among(self, index: Tensor, sets: int = 1) -> "ExactPosterior":
        """The posterior over only the samples at `index` (n,), or over several sets of them, each for its own rows.

        The sets are consecutive parts of equal size.
        """
        part = ExactPosterior.__new__(ExactPosterior)
        part._matrix = self._matrix.take(index)
        part._labels = None if self._labels is None else self._labels[index]
        if sets > 1:
            # A set is a class of its own, or several.
            own = torch.arange(len(index), device=index.device) // (len(index) // sets)
            part._labels = own if part._labels is None else own * (int(part._labels.max()) + 1) + part._labels
        return part

    @torch.no_grad()
    def __call__(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, source: Tensor) -> Exact:
        """The posterior of rows made from samples of the set.

        Args:
            x_t: noisy rows, shape (B, ...).
            alpha: scale of the data, shape (B,).
            sigma: scale of the noise, shape (B,).
            source: which sample made each row, shape (B,).

        Raises:
            ValueError: as `stablefield.posterior`.
        """
        plan = Plan(matrix=self._matrix, host=host_access(x_t.device), kernel=GaussianKernel())
        query = Query(
            x_t=x_t,
            alpha=alpha,
            sigma=sigma,
            source=source,
            labels=None if self._labels is None else self._labels[source],
            reference_labels=self._labels,
        )
        sums = summed(query.checked(plan), plan)
        divergence = _divergence(sums)
        return Exact(sums.posterior(), divergence)


def _divergence(sums: Summed) -> Tensor:
    # E_w |x_t - alpha y|^2 - |x_t - alpha a|^2, by moments relative to the anchor; exactly 0 where it has all the weight.
    query, softmax = sums.query, sums.softmax
    along = (softmax.total * sums.logits.noise).sum(1, dtype=softmax.mass.dtype)
    distance = query.alpha * (query.alpha * softmax.energy - 2 * along) / softmax.mass
    mean_logit = -distance / (2 * query.sigma**2)
    return (mean_logit - softmax.peak - softmax.mass.log() + softmax.log_prior).clamp(min=0)
