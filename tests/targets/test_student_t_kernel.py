"""The Student-t kernel of PFGM++: its density, its posterior, its noise, and its Gaussian limit."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import special, stats

import stablefield as sf


@pytest.mark.parametrize("dof", [0.5, 1.0, 3.0, 64.0, 2048.0])
@pytest.mark.parametrize("dim", [1, 3, 20])
def test_the_density_is_the_multivariate_t(dof: float, dim: int, rng: torch.Generator) -> None:
    x = 3 * torch.randn(6, dim, generator=rng, dtype=torch.float64)
    sigma = torch.tensor([0.01, 0.1, 1.0, 2.0, 10.0, 100.0], dtype=torch.float64)
    found = sf.StudentTKernel(dof).log_density(x.square().sum(1), sigma, dim)
    for row in range(6):
        shape = np.eye(dim) * sigma[row].item() ** 2
        expected = stats.multivariate_t.logpdf(x[row].numpy(), np.zeros(dim), shape, df=dof)
        assert found[row].item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_ratio_is_the_difference_of_densities(rng: torch.Generator) -> None:
    for kernel in (sf.StudentTKernel(3.0), sf.GaussianKernel()):
        q, anchor = torch.rand(2, 5, 7, generator=rng, dtype=torch.float64) * 9
        anchor = anchor[:, :1]
        sigma = torch.rand(5, 1, generator=rng, dtype=torch.float64) + 0.5
        found = kernel.log_ratio(q - anchor, anchor, sigma, 4)
        expected = kernel.log_density(q, sigma, 4) - kernel.log_density(anchor, sigma, 4)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("with_source", [True, False])
@pytest.mark.parametrize("dof", [1.0, 8.0, 128.0])
def test_the_posterior_is_bayes_rule_with_that_density(dof: float, with_source: bool, rng: torch.Generator) -> None:
    y = torch.randn(9, 4, generator=rng, dtype=torch.float64)
    kernel, alpha, sigma = sf.StudentTKernel(dof), 0.8, 0.9
    x_t = alpha * y[:5] + sigma * kernel.noise(y[:5], rng)
    source = torch.arange(5) if with_source else None
    found = sf.posterior(x_t, alpha, sigma, y, source, kernel=kernel, chunk_size=4)
    density = np.stack(
        [
            stats.multivariate_t.logpdf(x_t.numpy() - alpha * k, np.zeros(4), np.eye(4) * sigma**2, df=dof)
            for k in y.numpy()
        ],
        1,
    )
    weights = torch.from_numpy(special.softmax(density, 1))
    torch.testing.assert_close(found.mean, weights @ y, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.ess, 1 / weights.square().sum(1), rtol=1e-9, atol=0)
    evidence = torch.from_numpy(special.logsumexp(density, 1) - np.log(9))
    torch.testing.assert_close(found.log_evidence, evidence, rtol=1e-9, atol=1e-10)
    if with_source:
        torch.testing.assert_close(found.source_weight, weights.diagonal(), rtol=1e-9, atol=1e-12)


def test_it_tends_to_the_gaussian_kernel_with_one_over_its_degrees_of_freedom(rng: torch.Generator) -> None:
    y = torch.randn(9, 4, generator=rng, dtype=torch.float64)
    x_t = y[:5] + 0.9 * torch.randn(5, 4, generator=rng, dtype=torch.float64)
    limit = sf.posterior(x_t, 1.0, 0.9, y)
    gaps = []
    for dof in (1e2, 1e3, 1e4, 1e5):
        found = sf.posterior(x_t, 1.0, 0.9, y, kernel=sf.StudentTKernel(dof))
        gaps.append(max((found.mean - limit.mean).abs().max(), (found.log_evidence - limit.log_evidence).abs().max()))
    order = torch.log10(torch.stack(gaps[:-1]) / torch.stack(gaps[1:]))
    torch.testing.assert_close(order, torch.ones(3, dtype=torch.float64), rtol=0, atol=0.1)


@pytest.mark.parametrize("dof", [1.0, 4.0, 50.0])
def test_its_noise_has_that_distribution(dof: float, rng: torch.Generator) -> None:
    noise = sf.StudentTKernel(dof).noise(torch.empty(4000, 2, 3, dtype=torch.float64), rng)
    assert noise.shape == (4000, 2, 3)
    # Each coordinate is a Student t, and |noise|^2 / N has an F distribution: one radius per row, not per coordinate.
    assert stats.kstest(noise[:, 1, 2].numpy(), stats.t(dof).cdf).pvalue > 1e-3
    radius = noise.square().sum((1, 2)) / 6
    assert stats.kstest(radius.numpy(), stats.f(6, dof).cdf).pvalue > 1e-3


def test_its_noise_has_the_dtype_asked_for_and_depends_on_the_generator_alone() -> None:
    kernel = sf.StudentTKernel(3.0)

    def draw(seed: int) -> torch.Tensor:
        return kernel.noise(torch.empty(5, 4, dtype=torch.bfloat16), torch.Generator().manual_seed(seed))

    assert draw(1).dtype == torch.bfloat16
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_a_target_takes_the_kernel_and_refuses_its_score(rng: torch.Generator, exact: Callable) -> None:
    kernel = sf.StudentTKernel(6.0)
    x0 = torch.randn(7, 5, generator=rng, dtype=torch.float64)
    noise = kernel.noise(x0, rng)
    process = sf.EDM()
    target = sf.StableTarget(process, references=sf.InBatch(), kernel=kernel)(
        x0, process.perturb(x0, 0.8, noise), 0.8, noise=noise
    )
    truth = exact(process.perturb(x0, 0.8, noise), 1.0, 0.8, x0, log_kernel=kernel.log_density)
    torch.testing.assert_close(target.x0, truth.mean, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(target.noise, noise + (x0 - truth.mean) / 0.8, rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="not affine in x0"):
        _ = target.score


@pytest.mark.parametrize("dof", [0.0, -1.0, float("nan")])
def test_degrees_of_freedom_are_positive(dof: float) -> None:
    with pytest.raises(ValueError, match=r"StudentTKernel\(dof=.*must be positive"):
        sf.StudentTKernel(dof)
