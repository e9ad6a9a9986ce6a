"""A Gaussian mixture whose denoiser, score and density are known in closed form at every noise level."""

import math

import pytest
import torch
from torch import Tensor


class GaussianMixture:
    """sum_k w_k N(mean_k, scale_k^2 I); with noise sigma the k-th variance is scale_k^2 + sigma^2."""

    def __init__(self, means: Tensor, scales: Tensor, weights: Tensor) -> None:
        self.means, self.scales, self.weights = means.double(), scales.double(), weights.double()

    def _log_parts(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of weights times densities, and variances, (K, B) each: fast, since samplers call it often."""
        if bool((sigma == sigma[0]).all()):
            sigma = sigma[:1]  # one level for all rows, as samplers have it: a third of the time
        variance = self.scales[:, None] ** 2 + sigma.double() ** 2
        x, d = x.double(), x.shape[1]
        square = (x * x).sum(1) - 2 * self.means @ x.T + self.means.square().sum(1, keepdim=True)
        log = self.weights.log()[:, None] - square / (2 * variance) - d / 2 * torch.log(2 * math.pi * variance)
        return log, variance

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        log, variance = self._log_parts(x, sigma)
        # The mean of mode k is (1 - kept) mean_k + kept x.
        share, kept = torch.softmax(log, 0), self.scales[:, None] ** 2 / variance
        if kept.shape[1] == 1:
            return share.T @ ((1 - kept) * self.means) + (kept.T @ share).T * x.double()
        return (share * (1 - kept)).T @ self.means + (share * kept).sum(0)[:, None] * x.double()

    def log_prob(self, x: Tensor, sigma: float) -> Tensor:
        return self._log_parts(x, x.new_full((len(x),), sigma))[0].logsumexp(0)

    def sample(self, rows: int, sigma: float, generator: torch.Generator) -> Tensor:
        k = torch.multinomial(self.weights, rows, replacement=True, generator=generator)
        std = (self.scales[k] ** 2 + sigma**2).sqrt()[:, None]
        return self.means[k] + std * torch.randn(rows, self.means.shape[1], generator=generator, dtype=torch.float64)

    @property
    def mean(self) -> Tensor:
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        centred = self.means - self.mean
        within = (self.weights @ self.scales**2) * torch.eye(self.means.shape[1], dtype=torch.float64)
        return within + (self.weights[:, None, None] * centred[:, :, None] * centred[:, None, :]).sum(0)


@pytest.fixture
def mixture() -> GaussianMixture:
    means = torch.tensor([[-1.0, -0.5], [1.0, -0.6], [0.2, 1.1]])
    return GaussianMixture(means, torch.tensor([0.25, 0.35, 0.3]), torch.tensor([0.5, 0.3, 0.2]))


@pytest.fixture
def normal() -> GaussianMixture:
    """A single Gaussian: mean (0.7, -0.4), standard deviation 0.6."""
    return GaussianMixture(torch.tensor([[0.7, -0.4]]), torch.tensor([0.6]), torch.tensor([1.0]))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20)
