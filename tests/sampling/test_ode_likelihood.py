"""Claims on the likelihood by the probability-flow ODE, held against closed-form densities."""

import math

import pytest
import torch
from torch import Tensor

import stablefield.sampling as sampling

GRID = torch.tensor([80.0, 0.05], dtype=torch.float64)


def bits(log_prob: Tensor) -> Tensor:
    return -log_prob / (2 * math.log(2))


def test_likelihood_of_a_mixture_is_its_closed_form_to_a_thousandth_of_a_bit(mixture, generator):
    x = mixture.sample(64, 0.05, generator)
    # At 80 the data's mean, 0.3 off the prior's, is still worth 6e-3 bits to single rows; at 2000 it is not.
    got = sampling.log_likelihood(mixture, x, torch.tensor([2000.0, 0.05], dtype=torch.float64), exact=True)
    error = got.bits_per_dimension(bin_width=1.0) - bits(mixture.log_prob(x, 0.05))
    assert error.abs().max() < 1e-3


def test_likelihood_of_a_mixture_from_noise_level_80_is_as_close_on_average(mixture, generator):
    x = mixture.sample(256, 0.05, generator)
    got = sampling.log_likelihood(mixture, x, GRID, exact=True)
    assert (got.bits_per_dimension(bin_width=1.0) - bits(mixture.log_prob(x, 0.05))).mean().abs() < 1e-3


def test_likelihood_of_a_single_normal_is_its_closed_form_at_tight_tolerance(normal, generator):
    """Against the density that the solver's own prior implies: the flow is linear, so the model is a normal as well."""
    x = normal.sample(16, 0.05, generator)
    std = math.sqrt(80**2 + 0.6**2)
    got = sampling.log_likelihood(normal, x, GRID, exact=True, prior_std=std, rtol=1e-9, atol=1e-9)
    shrink = math.sqrt((0.36 + 0.05**2) / (0.36 + 80**2))
    latents = normal.means + (x - normal.means) / shrink
    torch.testing.assert_close(got.latents, latents, rtol=1e-6, atol=1e-6)
    expected = -0.5 * (latents / std).square().sum(1) - 2 * math.log(std) - math.log(2 * math.pi) - 2 * math.log(shrink)
    torch.testing.assert_close(got.log_prob, expected, rtol=0, atol=1e-6)


def test_hutchinsons_estimate_is_unbiased_and_its_error_falls_with_the_probes(mixture, generator):
    x = mixture.sample(1, 0.05, generator)
    rows = x.expand(4000, 2).contiguous()
    exact = sampling.log_likelihood(mixture, x, GRID, exact=True).log_prob
    # Signs in 2 dimensions: e^T J e = tr J +- 2 J_12, so a row is right in its mean over signs only.
    one = sampling.log_likelihood(mixture, rows, GRID, generator=generator).log_prob - exact
    four = sampling.log_likelihood(mixture, rows, GRID, probes=4, generator=generator).log_prob - exact
    assert one.std() > 0.01
    assert one.mean().abs() < 4 * one.std() / math.sqrt(4000) + 1e-4
    assert (four.std() / one.std()).item() == pytest.approx(0.5, abs=0.05)


def test_8_bit_images_add_the_log_of_their_bin_width():
    """All 256 values of u / 127.5 - 1 under a uniform density over their bins: exactly 8 bits."""
    log_prob = torch.tensor([-5 * math.log(256 / 127.5)], dtype=torch.float64)
    got = sampling.Likelihood(log_prob=log_prob, latents=torch.zeros(1, 5))
    assert got.bits_per_dimension().item() == pytest.approx(8.0, abs=1e-12)
    assert got.bits_per_dimension(1 / 128).item() == pytest.approx(8.0 + math.log2(128 / 127.5), abs=1e-12)


def test_float32_images_and_probes_of_seeds(generator):
    """An affine denoiser of pixels that are N(0, 0.25) each: signs give the exact trace of a diagonal matrix."""

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return x * (0.25 / (0.25 + sigma**2)).reshape(-1, 1, 1, 1)

    x = 0.5 * torch.randn(2, 3, 4, 4, generator=generator)
    grid = sampling.edm_sigmas(18)
    counter = sampling.counted(denoiser)
    got = sampling.log_likelihood(counter, x, grid, prior_std=math.hypot(80, 0.5), noise=sampling.SampleNoise([3, 4]))
    variance = 0.25 + 0.002**2
    expected = -0.5 * x.double().square().flatten(1).sum(1) / variance - 24 * math.log(2 * math.pi * variance)
    assert got.latents.dtype == torch.float32
    assert got.latents.shape == x.shape
    assert (got.bits_per_dimension() * 48 - (-expected / math.log(2) + 48 * math.log2(127.5))).abs().max() / 48 < 1e-3
    assert 50 < counter.nfe < 300


def test_the_exact_trace_is_that_of_a_full_matrix(generator):
    """Correlated data: the Jacobian is not diagonal, and x -> D(x) is linear with a known determinant."""
    root = torch.tensor([[0.8, 0.0, 0.0], [0.5, 0.4, 0.0], [-0.3, 0.2, 0.6]], dtype=torch.float64)
    covariance = root @ root.T

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        noisy = covariance + sigma[0] ** 2 * torch.eye(3, dtype=x.dtype)
        return x @ torch.linalg.solve(noisy, covariance)

    x = torch.randn(8, 3, generator=generator, dtype=torch.float64) @ root.T
    got = sampling.log_likelihood(denoiser, x, GRID, exact=True)
    noisy = covariance + 0.05**2 * torch.eye(3, dtype=torch.float64)
    expected = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=torch.float64), noisy).log_prob(x)
    assert ((got.log_prob - expected) / (3 * math.log(2))).abs().max() < 1e-3


def test_a_denoiser_without_gradients_is_refused(mixture, generator):
    with pytest.raises(ValueError, match="carries no gradient"):
        sampling.log_likelihood(torch.no_grad()(mixture.__call__), mixture.sample(2, 0.05, generator), GRID)


def test_likelihood_works_inside_no_grad_and_inference_mode(mixture, generator):
    x = mixture.sample(2, 0.05, generator)
    plain = sampling.log_likelihood(mixture, x, GRID, exact=True).log_prob
    with torch.no_grad():
        assert torch.equal(sampling.log_likelihood(mixture, x, GRID, exact=True).log_prob, plain)
    with torch.inference_mode():
        assert torch.equal(sampling.log_likelihood(mixture, x, GRID, exact=True).log_prob, plain)


@pytest.mark.parametrize("arguments", [{"probes": 0}, {"prior_std": 0.0}, {"rtol": 0.0}, {"atol": -1.0}])
def test_nonsense_is_refused_by_name(arguments, mixture, generator):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
        sampling.log_likelihood(mixture, mixture.sample(2, 0.05, generator), GRID, **arguments)


def test_probes_beside_the_exact_trace_are_refused(mixture, generator):
    x = mixture.sample(2, 0.05, generator)
    with pytest.raises(ValueError, match=r"^log_likelihood: probes=100 does nothing with exact=True: leave one"):
        sampling.log_likelihood(mixture, x, GRID, exact=True, probes=100)


def test_a_source_of_signs_beside_the_exact_trace_is_refused(mixture, generator):
    x = mixture.sample(2, 0.05, generator)
    with pytest.raises(ValueError, match=r"^log_likelihood: generator does nothing with exact=True, which draws no"):
        sampling.log_likelihood(mixture, x, GRID, exact=True, generator=generator)
    with pytest.raises(ValueError, match=r"^log_likelihood: noise does nothing with exact=True"):
        sampling.log_likelihood(mixture, x, GRID, exact=True, noise=sampling.SampleNoise([0, 1]))
