"""Claims on the stochastic samplers: the mixture's moments within Monte Carlo error, every step against its formula."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import stablefield.sampling as sampling

FIRST, LAST = 10.0, 0.05
ROWS = 20_000
# Largest |z| allowed of 8 statistics: exact draws pass it in 99.95 % of all runs (8 * 6.3e-5), and the seeds are fixed.
BOUND = 4.0


def z_scores(mixture, x: Tensor, sigma: float) -> Tensor:
    """Of the mean, the covariance and the weights of the modes, each in units of its own Monte Carlo error.

    The weights by the modes' posterior probabilities, whose mean under the mixture is exactly its weights.
    """
    variance = mixture.scales**2 + sigma**2
    gap = x[:, None] - mixture.means
    d = x.shape[1]
    modes = torch.softmax(mixture.weights.log() - gap.square().sum(-1) / (2 * variance) - d / 2 * variance.log(), 1)
    centred = x - mixture.mean
    upper = torch.triu_indices(d, d)
    products = (centred[:, :, None] * centred[:, None, :])[:, upper[0], upper[1]]
    covariance = (mixture.covariance + sigma**2 * torch.eye(d, dtype=x.dtype))[upper[0], upper[1]]
    observed = torch.cat([x, products, modes], 1)
    expected = torch.cat([mixture.mean, covariance, mixture.weights])
    return (observed.mean(0) - expected) / (observed.std(0) / math.sqrt(len(x)))


def levels(steps: int) -> Tensor:
    return sampling.ve_sigmas(steps + 1, sigma_min=LAST, sigma_max=FIRST)[:-1]


CORRECTED = {"corrector_steps": 1, "snr": 0.05}
SAMPLERS = {
    "heun with churn": (partial(sampling.heun, s_churn=20.0), 60),
    "euler_maruyama": (sampling.euler_maruyama, 300),
    "ancestral": (sampling.ancestral, 300),
    "dpmpp_2m_sde": (sampling.dpmpp_2m_sde, 100),
    "dpmpp_2m_sde, eta 0.5": (partial(sampling.dpmpp_2m_sde, eta=0.5), 100),
    "pc ve reverse": (partial(sampling.predictor_corrector, process="ve", **CORRECTED), 120),
    "pc ve ancestral": (partial(sampling.predictor_corrector, process="ve", predictor="ancestral", **CORRECTED), 120),
    "pc vp reverse": (partial(sampling.predictor_corrector, process="vp", **CORRECTED), 120),
    "pc vp ancestral": (partial(sampling.predictor_corrector, process="vp", predictor="ancestral", **CORRECTED), 120),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_mean_covariance_and_mode_weights_within_monte_carlo_error(name, mixture, generator):
    sampler, steps = SAMPLERS[name]
    x = sampler(mixture, mixture.sample(ROWS, FIRST, generator), levels(steps), generator=generator)
    assert z_scores(mixture, x, LAST).abs().max() < BOUND


def test_the_bound_holds_for_exact_draws_and_not_for_slightly_wrong_ones(mixture, generator):
    exact = mixture.sample(ROWS, LAST, generator)
    assert z_scores(mixture, exact, LAST).abs().max() < BOUND
    assert z_scores(mixture, exact * 1.03, LAST).abs().max() > BOUND
    assert z_scores(mixture, exact + 0.04, LAST).abs().max() > BOUND
    # The sampler with a tenth less noise than is right.
    with pytest.warns(UserWarning, match="too small for a state"):  # it begins at the last level
        less = sampling.ancestral(mixture, exact, levels(2), noise=lambda x: x.new_zeros(x.shape))
    assert z_scores(mixture, less, LAST).abs().max() > BOUND


@pytest.mark.parametrize("process", ["ve", "vp"])
def test_the_corrector_alone_brings_any_start_to_the_marginal(process, mixture, generator):
    """One tiny predictor step, then Langevin steps at a noise level where the modes overlap."""
    grid = torch.tensor([1.001, 1.0], dtype=torch.float64)
    x = sampling.predictor_corrector(
        mixture,
        torch.ones(8_000, 2, dtype=torch.float64),
        grid,
        process=process,
        corrector_steps=600,
        snr=0.07,
        generator=generator,
    )
    assert z_scores(mixture, x, 1.0).abs().max() < BOUND


def test_the_corrector_with_each_rows_own_norms_is_right_in_many_dimensions(generator):
    """A normal with standard deviation 1 in R^256 at noise level 1: variance 2 per dimension."""

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return x / (1 + sigma[:, None] ** 2)

    grid = torch.tensor([1.001, 1.0], dtype=torch.float64)
    start = torch.randn(200, 256, generator=generator, dtype=torch.float64)
    x = sampling.predictor_corrector(
        denoiser, start, grid, corrector_steps=400, snr=0.07, average_norms=False, generator=generator
    )
    error = 2 * math.sqrt(2 / x.numel())
    # Unadjusted Langevin with epsilon = 2 r^2 variance has the stationary variance / (1 - r^2); a step size ~ 1 / |x|^2
    # multiplies the stationary density by |x|^2, which is (d + 2) / d in the second moment.
    expected = 2 / (1 - 0.07**2) * 258 / 256
    assert abs(x.square().mean().item() - expected) < 4 * error


@pytest.mark.parametrize("dim", [2, 32])
def test_the_default_corrector_samples_a_normal_of_the_right_variance_in_few_dimensions(dim, generator):
    """Standard normal data. Score and noise have norms of one law up to scale, so the variance follows a recursion."""

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return x / (1 + sigma[:, None] ** 2)

    grid, snr = torch.logspace(math.log10(20), 0, 100, dtype=torch.float64), 0.16
    variance = expected = 1 + 20.0**2
    for before, after in zip(grid[:-1].square().tolist(), grid[1:].square().tolist(), strict=True):
        expected = (1 - (before - after) / (1 + before)) ** 2 * expected + before - after
        step = 2 * snr**2 * (1 + after) ** 2 / expected
        expected = (1 - step / (1 + after)) ** 2 * expected + 2 * step
    x = math.sqrt(variance) * torch.randn(32_000 // dim, dim, generator=generator, dtype=torch.float64)
    error = math.sqrt(2 / x.numel())
    got = sampling.predictor_corrector(denoiser, x, grid, snr=snr, generator=generator).square().mean().item()
    assert got == pytest.approx(expected, rel=4 * error)
    assert got / 2 == pytest.approx(1, abs=0.05 + 4 * error)
    own = sampling.predictor_corrector(denoiser, x, grid, snr=snr, average_norms=False, generator=generator)
    # What the docstring says of each row's own norms; in 2 dimensions the tail is heavy.
    least, most = {2: (3.0, 10.0), 32: (1.05, 1.12)}[dim]
    assert least < own.square().mean().item() / 2 < most


class Tape:
    """Noise that is remembered, for a second evaluation of the formulas."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator, self.drawn = generator, list[Tensor]()

    def __call__(self, x: Tensor) -> Tensor:
        self.drawn.append(torch.randn(x.shape, dtype=x.dtype, generator=self.generator))
        return self.drawn[-1]


def published_step(
    denoiser, x: Tensor, s: float, s_next: float, process: str, predictor: str, z: list[Tensor]
) -> Tensor:
    """Algorithms 2 to 5 of Song et al. (2021) for one step in the paper's symbols, appendix G's sqrt(d) for |z|."""
    snr, rows = 0.16, len(x)

    def score(state: Tensor, level: float) -> Tensor:
        alpha = 1.0 if process == "ve" else math.sqrt(1 / (1 + level**2))
        std = alpha * level
        return (alpha * denoiser(state / alpha, torch.full((rows,), level, dtype=x.dtype)) - state) / std**2

    if process == "ve":
        state, alpha_i, back = x, 1.0, 1.0
        var, var_next = s**2, s_next**2
        std = math.sqrt(var - var_next) * (1.0 if predictor == "reverse_diffusion" else math.sqrt(var_next / var))
        state = state + (var - var_next) * score(state, s) + std * z[0]
    else:
        bar, bar_next = 1 / (1 + s**2), 1 / (1 + s_next**2)  # cumulative products of 1 - beta
        beta = 1 - bar / bar_next
        state, alpha_i, back = math.sqrt(bar) * x, 1 - beta, math.sqrt(bar_next)
        if predictor == "reverse_diffusion":
            state = (2 - math.sqrt(1 - beta)) * state + beta * score(state, s) + math.sqrt(beta) * z[0]
        else:
            state = (state + beta * score(state, s)) / math.sqrt(1 - beta) + math.sqrt(beta) * z[0]
    g = score(state, s_next)
    moved = []
    for row in range(rows):
        step = 2 * alpha_i * (snr * math.sqrt(2) / g[row].norm()) ** 2
        moved.append(state[row] + step * g[row] + torch.sqrt(2 * step) * z[1][row])
    return torch.stack(moved) / back


@pytest.mark.parametrize("process", ["ve", "vp"])
@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral"])
def test_predictor_and_corrector_are_the_published_ones(process, predictor, mixture, generator):
    x, tape = mixture.sample(6, 3.0, generator), Tape(generator)
    grid = torch.tensor([3.0, 1.2], dtype=torch.float64)
    got = sampling.predictor_corrector(
        mixture, x, grid, process=process, predictor=predictor, average_norms=False, noise=tape
    )
    expected = published_step(mixture, x, 3.0, 1.2, process, predictor, tape.drawn)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_averaged_norms_give_every_row_the_same_langevin_step(mixture, generator):
    x, tape = mixture.sample(6, 3.0, generator), Tape(generator)
    grid = torch.tensor([3.0, 1.2], dtype=torch.float64)
    source_only = sampling.predictor_corrector(mixture, x, grid, corrector_steps=0, noise=lambda _: torch.zeros_like(x))
    predicted = source_only + math.sqrt(9 - 1.44) * (
        first := torch.randn(6, 2, dtype=torch.float64, generator=generator)
    )
    second = torch.randn(6, 2, dtype=torch.float64, generator=generator)
    draws = iter([first, second])
    got = sampling.predictor_corrector(mixture, x, grid, noise=lambda _: next(draws))
    g = (mixture(predicted, torch.full((6,), 1.2, dtype=torch.float64)) - predicted) / 1.44
    step = 2 * (0.16 * second.norm(dim=1).mean() / g.norm(dim=1).mean()) ** 2
    torch.testing.assert_close(got, predicted + step * g + torch.sqrt(2 * step) * second, rtol=1e-12, atol=1e-12)
    assert not tape.drawn


def test_an_ancestral_step_is_the_gaussian_posterior_by_bayes_rule(mixture, generator):
    """Precisions add: x' ~ N(x0, s'^2) before, and x = x' + N(0, s^2 - s'^2) was seen."""
    x, tape = mixture.sample(5, 2.0, generator), Tape(generator)
    got = sampling.ancestral(mixture, x, torch.tensor([2.0, 0.9], dtype=torch.float64), noise=tape)
    x0 = mixture(x, torch.full((5,), 2.0, dtype=torch.float64))
    prior, seen = 1 / 0.9**2, 1 / (2.0**2 - 0.9**2)
    expected = (prior * x0 + seen * x) / (prior + seen) + tape.drawn[0] / math.sqrt(prior + seen)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_an_euler_maruyama_step_is_drift_and_brownian_motion_in_the_clock_of_the_variance(mixture, generator):
    x, tape = mixture.sample(5, 2.0, generator), Tape(generator)
    got = sampling.euler_maruyama(mixture, x, torch.tensor([2.0, 0.9], dtype=torch.float64), noise=tape)
    score = (mixture(x, torch.full((5,), 2.0, dtype=torch.float64)) - x) / 4.0
    dv = 2.0**2 - 0.9**2
    torch.testing.assert_close(got, x + dv * score + math.sqrt(dv) * tape.drawn[0], rtol=1e-12, atol=1e-12)


def test_dpmpp_2m_sde_is_the_published_formula_over_two_steps(mixture, generator):
    """SDE-DPM-Solver++(2M) of Lu et al. (2022) for alpha = 1 in terms of sigma, h and r."""
    grid = [4.0, 1.5, 0.6]
    x, tape = mixture.sample(5, 4.0, generator), Tape(generator)
    got = sampling.dpmpp_2m_sde(mixture, x, torch.tensor(grid, dtype=torch.float64), noise=tape)
    d0 = mixture(x, torch.full((5,), 4.0, dtype=torch.float64))
    h0, h1 = math.log(4.0 / 1.5), math.log(1.5 / 0.6)
    x1 = 1.5 / 4.0 * math.exp(-h0) * x + (1 - math.exp(-2 * h0)) * d0
    x1 = x1 + 1.5 * math.sqrt(1 - math.exp(-2 * h0)) * tape.drawn[0]
    d1 = mixture(x1, torch.full((5,), 1.5, dtype=torch.float64))
    r = h0 / h1
    x2 = 0.6 / 1.5 * math.exp(-h1) * x1 + (1 - math.exp(-2 * h1)) * d1
    x2 = x2 + 0.5 * (1 - math.exp(-2 * h1)) * (d1 - d0) / r + 0.6 * math.sqrt(1 - math.exp(-2 * h1)) * tape.drawn[1]
    torch.testing.assert_close(got, x2, rtol=1e-12, atol=1e-12)


def test_dpmpp_2m_sde_at_eta_0_is_dpmpp_2m_and_its_first_step_at_eta_1_is_ancestral(mixture, generator):
    x = mixture.sample(5, FIRST, generator)
    assert torch.equal(sampling.dpmpp_2m_sde(mixture, x, levels(7), eta=0.0), sampling.dpmpp_2m(mixture, x, levels(7)))
    z = torch.randn(x.shape, dtype=x.dtype, generator=generator)
    one = torch.tensor([2.0, 0.9], dtype=torch.float64)
    torch.testing.assert_close(
        sampling.dpmpp_2m_sde(mixture, x, one, noise=lambda _: z),
        sampling.ancestral(mixture, x, one, noise=lambda _: z),
        rtol=1e-12,
        atol=1e-12,
    )


STOCHASTIC: dict[str, Callable[..., Tensor]] = {
    "heun": partial(sampling.heun, s_churn=3.0),
    "euler_maruyama": sampling.euler_maruyama,
    "ancestral": sampling.ancestral,
    "dpmpp_2m_sde": sampling.dpmpp_2m_sde,
    "pc ve": partial(sampling.predictor_corrector, average_norms=False),
    "pc vp": partial(sampling.predictor_corrector, process="vp", predictor="ancestral", average_norms=False),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_seeds_belong_to_samples_whatever_the_batch(name, mixture):
    grid = sampling.edm_sigmas(8)

    def images(seeds: list[int]) -> Tensor:
        noise = sampling.SampleNoise(seeds)
        x = grid[0] * noise.latents((2,), dtype=torch.float64)
        return STOCHASTIC[name](mixture, x, grid, noise=noise)

    together = images([7, 3, 11, 5])
    for row, seed in enumerate([7, 3, 11, 5]):
        torch.testing.assert_close(images([seed])[0], together[row], rtol=0, atol=1e-12)
    torch.testing.assert_close(images([5, 11]), together[[3, 2]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_generator_makes_runs_repeatable_and_noise_matters(name, mixture, generator):
    x, grid = mixture.sample(4, FIRST, generator), levels(5)
    run = partial(STOCHASTIC[name], mixture, x, grid)
    first = run(generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, run(generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(first, run(generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize(
    ("name", "evaluations"),
    [("euler_maruyama", 8), ("ancestral", 8), ("dpmpp_2m_sde", 8), ("pc ve", 15), ("pc vp", 15), ("heun", 15)],
)
def test_a_step_to_0_returns_the_denoisers_output_and_evaluations_add_up(name, evaluations, mixture, generator):
    denoiser, outputs = sampling.counted(mixture), list[Tensor]()
    x = STOCHASTIC[name](
        denoiser,
        mixture.sample(4, 80.0, generator),
        sampling.edm_sigmas(8),
        generator=generator,
        callback=lambda *call: outputs.append(call[2]),
    )
    torch.testing.assert_close(x, outputs[-1], rtol=0, atol=1e-14)
    assert len(outputs) == 8
    assert denoiser.nfe == evaluations
