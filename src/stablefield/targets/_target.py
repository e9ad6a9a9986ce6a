r"""The results: a target in every parameterisation, and the posterior behind it.

Every common regression target is affine in the target for x0, so one of them serves all:

| view     |                                                                       |
|----------|-----------------------------------------------------------------------|
| noise    | $\hat\varepsilon = (x_t - \alpha \hat x_0) / \sigma$                  |
| score    | $-\hat\varepsilon / \sigma$                                           |
| v        | $\alpha \hat\varepsilon - \sigma \hat x_0$                            |
| velocity | $\dot\alpha \hat x_0 + \dot\sigma \hat\varepsilon$                    |
"""

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from stablefield._shapes import per_row
from stablefield.diffusion._process import Process, rates
from stablefield.targets._perturbation_kernel import GaussianKernel, PerturbationKernel

__all__ = ["Posterior", "Target"]


@dataclass(frozen=True)
class Posterior:
    """The posterior of x0 over a reference set, for a batch of B rows.

    Attributes:
        mean: posterior mean of x0; shape, dtype and device of x_t.
        variance: trace of the posterior covariance, sum_k w_k |y_k|^2 - |mean|^2, in squared units of the data, shape (B,).
            In expectation, this is the variance that the mean removes from the single-sample target. Never below 0; its
            error is some ulps of itself plus some ulps of D min(D, 30 sigma / alpha) times the weight of references other
            than the source, for references within D of their middle. 0 if float32 cannot resolve those weights.
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
class Target:
    """A regression target in every parameterisation.

    It keeps x0, x_t and t of the call without copying, and computes views on access: access them before you change any of
    these in place. Views are constants, without gradients; only those of a `DenoisingTarget`, the target of the usual loop,
    have gradients to x0, t and the process, as in that loop.

    Attributes:
        x0: the target for x0, shape (B, ...).
        variance: variance removed, sum_k w_k |y_k|^2 - |x0|^2, shape (B,); 0 for rows that use only their source.
        ess: effective sample size of the references, shape (B,).
        source_weight: posterior weight of the row's own source, shape (B,).
        source: the clean samples that made x_t, shape (B, ...).
        x_t: the noisy samples, shape (B, ...).
        process: the process that made x_t.
        t: times, shape (B,).
        kernel: the noise kernel.
        given_noise: the noise in x_t, shape (B, ...), if the call received it.
        single: whether every row uses only its source by rule, as with a `DenoisingTarget`.
    """

    x0: Tensor
    variance: Tensor
    ess: Tensor
    source_weight: Tensor
    source: Tensor
    x_t: Tensor
    process: Process
    t: Tensor
    kernel: PerturbationKernel = field(default_factory=GaussianKernel)
    given_noise: Tensor | None = None
    single: bool = False

    def __getitem__(self, rows: slice) -> "Target":
        """The target of a part of the batch."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return replace(self, **{name: value[rows] for name, value in values.items() if isinstance(value, Tensor)})

    def _gradients(self) -> torch.set_grad_enabled:
        # A view of a mean mixes it, a constant, with what it was made from: gradients would reach one and not the other.
        return torch.set_grad_enabled(self.single and torch.is_grad_enabled())

    @property
    def source_noise(self) -> Tensor:
        """The noise that made x_t from the source, shape (B, ...); if sigma is 0 and it is unknown, its mean, 0."""
        if self.given_noise is not None:
            return self.given_noise
        with torch.no_grad():
            alpha, sigma = (per_row(scale(self.t), self.source) for scale in (self.process.alpha, self.process.sigma))
            noise = torch.addcmul(self.x_t, alpha, self.source, value=-1).div_(sigma)
            return noise.masked_fill_(sigma == 0, 0)

    @property
    def noise(self) -> Tensor:
        """The target for the noise, (x_t - alpha x0) / sigma.

        Computed as a correction of the source's noise: exactly that noise if the source has all the weight, and without the
        cancellation that a small sigma would magnify.
        """
        with self._gradients():
            ratio = self.process.alpha(self.t) / self.process.sigma(self.t)
            gap = self.source - self.x0
            # If sigma is 0, the ratio is infinite and the gap 0: no correction, rather than nan.
            noise = self.source_noise
            return torch.where(gap == 0, noise, noise + per_row(ratio, self.x0) * gap)

    @property
    def score(self) -> Tensor:
        """The target for the score, grad log p(x_t) = -noise / sigma. Not finite if sigma is 0: draw t above 0.

        Raises:
            ValueError: for a kernel other than the Gaussian, whose score is not affine in x0.
        """
        if not isinstance(self.kernel, GaussianKernel):
            raise ValueError(f"the score of {self.kernel} is not affine in x0: regress on x0 (or noise, v) instead.")
        with self._gradients():
            return -self.noise / per_row(self.process.sigma(self.t), self.x0)

    @property
    def v(self) -> Tensor:
        """The target for v-prediction, alpha noise - sigma x0 (Salimans, Ho, ICLR 2022)."""
        with self._gradients():
            alpha, sigma = self.process.alpha(self.t), self.process.sigma(self.t)
            return per_row(alpha, self.x0) * self.noise - per_row(sigma, self.x0) * self.x0

    @property
    def velocity(self) -> Tensor:
        """The target for the velocity dx_t / dt = alpha' x0 + sigma' noise, towards noise.

        For time that runs from noise to data, as in torchcfm, negate it.
        """
        alpha_dot, sigma_dot = rates(self.process, self.t)  # which may be computed by differentiation
        with self._gradients():
            return per_row(alpha_dot, self.x0) * self.x0 + per_row(sigma_dot, self.x0) * self.noise
