"""Float32 is good enough: near-duplicates at small noise, image-like data at all noise levels, data far from zero."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import stablefield as sf

SIGMAS = [0.002, 0.006, 0.02, 0.06, 0.1, 0.3, 1.0, 3.0, 10.0, 50.0]


def planted(sigma: float, rng: torch.Generator, distance: float = 1.5) -> Tensor:
    """48 references in 3,072 dimensions: eight sources, a near-duplicate `distance` sigma from each, and 32 others."""
    y = torch.rand(48, 3072, generator=rng) * 2 - 1
    y[8:16] = y[:8] + distance * sigma * torch.nn.functional.normalize(torch.randn(8, 3072, generator=rng), dim=1)
    return y


def weights_of(mean: Tensor, y: Tensor) -> Tensor:
    """The weights that make `mean` of `y`, by least squares in float64."""
    return torch.linalg.lstsq(y.double().T, mean.double().T).solution.T


@pytest.mark.parametrize("with_source", [True, False])
@pytest.mark.parametrize("preserving", [True, False])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_near_duplicates_get_their_weights(
    sigma: float, preserving: bool, with_source: bool, rng: torch.Generator, exact: Callable
) -> None:
    y = planted(sigma, rng)
    alpha = torch.full((8,), (1 + sigma**2) ** -0.5 if preserving else 1.0)
    scale = alpha * sigma
    x_t = alpha[:, None] * y[:8] + scale[:, None] * torch.randn(8, 3072, generator=rng)
    truth = exact(x_t, alpha, scale, y)
    found = sf.posterior(x_t, alpha, scale, y, torch.arange(8) if with_source else None)
    # The case is one: the near-duplicate has a share of the weight, unless the noise covers all references.
    assert truth.weights[torch.arange(8), torch.arange(8, 16)].max() > (0.02 if sigma >= 10 else 0.1)
    assert (weights_of(found.mean, y) - truth.weights).abs().max() < 1e-3
    torch.testing.assert_close(found.ess.double(), truth.ess, rtol=2e-3, atol=0)
    if with_source:
        assert found.source_weight is not None
        assert (found.source_weight.double() - truth.weights.diagonal()).abs().max() < 1e-3


@pytest.mark.parametrize("sigma", [0.002, 0.02, 0.1, 1.0])
def test_the_target_gives_near_duplicates_their_weights(sigma: float, rng: torch.Generator, exact: Callable) -> None:
    y = planted(sigma, rng)
    index = torch.arange(8)
    x_t = y[:8] + sigma * torch.randn(8, 3072, generator=rng)
    truth = exact(x_t, 1.0, sigma, y)
    for mirrored in (False, True):
        # A mirror image of this data is nobody's near-duplicate, so it changes nothing here.
        pool = sf.Pool(y, mirrored=mirrored)
        target = sf.StableTarget(sf.EDM(), references=pool)(y[:8], x_t, sigma, index=index)
        assert (target.source_weight.double() - truth.weights.diagonal()).abs().max() < 1e-3
        assert (weights_of(target.x0, y) - truth.weights).abs().max() < 1e-3


@pytest.mark.parametrize("sigma", [0.002, 0.02, 0.1])
def test_mirror_images_of_near_symmetric_samples_get_their_weights(
    sigma: float, rng: torch.Generator, exact: Callable
) -> None:
    # A sample 1.5 sigma from its own mirror image: the near-duplicate is in the mirrored half.
    y = torch.rand(12, 3072, generator=rng) * 2 - 1
    even, odd = (y + y.flip(-1)) / 2, y - y.flip(-1)
    y = even + 0.75 * sigma * torch.nn.functional.normalize(odd, dim=1)
    index = torch.arange(6)
    x_t = y[:6] + sigma * torch.randn(6, 3072, generator=rng)
    truth = exact(x_t, 1.0, sigma, torch.cat([y, y.flip(-1)]))
    target = sf.StableTarget(sf.EDM(), references=sf.Pool(y, mirrored=True))(y[:6], x_t, sigma, index=index)
    assert truth.ess.max() > 1.5
    assert (target.source_weight.double() - truth.weights.diagonal()).abs().max() < 1e-3
    torch.testing.assert_close(target.ess.double(), truth.ess, rtol=2e-3, atol=0)


@pytest.mark.parametrize("with_source", [True, False])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 50.0])
def test_the_mean_over_images_is_that_of_float64(
    sigma: float, with_source: bool, rng: torch.Generator, exact: Callable, smooth_images: Callable
) -> None:
    y = smooth_images(256, rng)
    x_t = y[:12] + sigma * torch.randn(12, 3, 32, 32, generator=rng)
    truth = exact(x_t, 1.0, sigma, y)
    found = sf.posterior(x_t, 1.0, sigma, y, torch.arange(12) if with_source else None)
    error = (found.mean.flatten(1).double() - truth.mean).norm(dim=1) / truth.mean.norm(dim=1)
    assert error.max() < 1e-5
    torch.testing.assert_close(found.ess.double(), truth.ess, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.log_evidence.double(), truth.log_evidence, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.variance.double(), truth.variance, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("offset", [10.0, 300.0])
def test_data_far_from_zero_keep_their_accuracy(offset: float, rng: torch.Generator, exact: Callable) -> None:
    y = torch.randn(40, 256, generator=rng) + offset
    for sigma in (0.5, 5.0, 50.0):
        x_t = y[:8] + sigma * torch.randn(8, 256, generator=rng)
        truth = exact(x_t, 1.0, sigma, y)
        for source in (None, torch.arange(8)):
            found = sf.posterior(x_t, 1.0, sigma, y, source)
            torch.testing.assert_close(found.ess.double(), truth.ess, rtol=2e-3, atol=0)
            torch.testing.assert_close(found.mean.double(), truth.mean, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dof", [1.0, 2.0, 8.0, 128.0])
@pytest.mark.parametrize("with_source", [True, False])
def test_heavy_tailed_noise_keeps_the_accuracy(
    dof: float, with_source: bool, rng: torch.Generator, exact: Callable
) -> None:
    # One row in many has noise ten times its scale: references tens of sigma away then have weight.
    kernel = sf.StudentTKernel(dof)
    for sigma in (0.002, 0.02, 0.1, 1.0):
        y = torch.rand(48, 3072, generator=rng) * 2 - 1
        step = torch.nn.functional.normalize(torch.randn(24, 3072, generator=rng), dim=1)
        y[8:32] = y[:8].repeat(3, 1) + sigma * torch.tensor([1.5, 4.0, 8.0]).repeat_interleave(8)[:, None] * step
        x_t = y[:8] + sigma * kernel.noise(y[:8], rng)
        truth = exact(x_t, 1.0, sigma, y, log_kernel=kernel.log_density)
        found = sf.posterior(x_t, 1.0, sigma, y, torch.arange(8) if with_source else None, kernel=kernel)
        torch.testing.assert_close(
            found.ess.double(), truth.ess, rtol=3e-3, atol=0, msg=lambda m, s=sigma: f"sigma {s}: {m}"
        )


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.5, 3.0])
@pytest.mark.parametrize("with_source", [True, False])
def test_rows_with_many_near_references_far_from_zero_keep_their_accuracy(
    sigma: float, with_source: bool, rng: torch.Generator, exact: Callable
) -> None:
    y = 100 + 2 * sigma * torch.randn(200, 64, generator=rng) / 8
    x_t = y[:32] + sigma * torch.randn(32, 64, generator=rng)
    truth = exact(x_t, 1.0, sigma, y)
    found = sf.posterior(x_t, 1.0, sigma, y, torch.arange(32) if with_source else None)
    assert truth.ess.median() > 5
    torch.testing.assert_close(found.ess.double(), truth.ess, rtol=3e-3, atol=0)
    torch.testing.assert_close(found.mean.double(), truth.mean, rtol=1e-6, atol=1e-3 * sigma)
