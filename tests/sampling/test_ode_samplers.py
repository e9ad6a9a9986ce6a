"""Claims on the solvers of the probability-flow ODE, held against closed forms, SciPy and measured orders."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import stablefield.sampling as sampling

FIRST, LAST = 5.0, 0.1


def start(rows: int, generator: torch.Generator, sigma: float = FIRST) -> Tensor:
    return sigma * torch.randn(rows, 2, generator=generator, dtype=torch.float64)


def geometric(steps: int, first: float = FIRST, last: float = LAST) -> Tensor:
    return sampling.ve_sigmas(steps + 1, sigma_min=last, sigma_max=first)[:-1]


def solution(denoiser, x: Tensor, first: float = FIRST, last: float = LAST) -> Tensor:
    """SciPy's eighth-order solver in the clock of sigma: no code in common with the samplers."""

    def slope(sigma: float, values: np.ndarray) -> np.ndarray:
        state = torch.tensor(values).reshape(x.shape)
        return ((state - denoiser(state, torch.full((len(x),), sigma, dtype=x.dtype))) / sigma).flatten().numpy()

    solved = solve_ivp(slope, (first, last), x.flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-12)
    return torch.tensor(solved.y[:, -1]).reshape(x.shape)


def fitted_order(sampler, denoiser, x: Tensor, exact: Tensor) -> float:
    steps = np.array([32, 64, 128, 256])
    errors = [(sampler(denoiser, x, geometric(int(n))) - exact).square().mean().sqrt().item() for n in steps]
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize(
    ("sampler", "order"),
    [(sampling.euler, 1), (sampling.heun, 2), (sampling.dpmpp_2m, 2)],
    ids=["euler", "heun", "dpmpp_2m"],
)
def test_order_of_convergence_on_a_mixture(sampler, order, mixture, generator):
    x = start(32, generator)
    assert fitted_order(sampler, mixture, x, solution(mixture, x)) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(
    ("sampler", "order"),
    [(sampling.euler, 1), (sampling.heun, 2), (sampling.dpmpp_2m, 2)],
    ids=["euler", "heun", "dpmpp_2m"],
)
def test_order_of_convergence_to_the_closed_form_of_a_single_normal(sampler, order, normal, generator):
    x = start(8, generator)
    variance, mean = normal.scales**2, normal.means
    exact = mean + (x - mean) * torch.sqrt((variance + LAST**2) / (variance + FIRST**2))
    assert fitted_order(sampler, normal, x, exact) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
def test_rk45_respects_its_tolerance(tolerance, mixture, generator):
    x = start(32, generator, 80.0)
    exact = solution(mixture, x, 80.0, 0.002)
    grid = torch.tensor([80.0, 0.002], dtype=torch.float64)
    got = sampling.rk45(mixture, x, grid, rtol=tolerance, atol=tolerance)
    assert (got - exact).square().mean().sqrt() < 10 * tolerance


def test_rk45_is_scipys_solver_in_the_clock_of_the_ve_process(mixture, generator):
    x = start(16, generator)

    def slope(log_sigma: float, values: np.ndarray) -> np.ndarray:
        state = torch.tensor(values).reshape(x.shape)
        return (state - mixture(state, torch.full((16,), math.exp(log_sigma), dtype=x.dtype))).flatten().numpy()

    span = (math.log(FIRST), math.log(LAST))
    expected = solve_ivp(slope, span, x.flatten().numpy(), method="RK45", rtol=1e-5, atol=1e-5)
    denoiser = sampling.counted(mixture)
    got = sampling.rk45(denoiser, x, torch.tensor([FIRST, 1.0, LAST], dtype=torch.float64))
    assert denoiser.nfe == expected.nfev
    torch.testing.assert_close(got, torch.tensor(expected.y[:, -1]).reshape(x.shape), rtol=1e-10, atol=1e-10)


def test_rk45_ends_a_grid_with_0_by_one_denoising(mixture, generator):
    x = start(4, generator)
    state = sampling.rk45(mixture, x, torch.tensor([FIRST, LAST], dtype=torch.float64))
    got = sampling.rk45(mixture, x, torch.tensor([FIRST, LAST, 0.0], dtype=torch.float64))
    assert torch.equal(got, mixture(state, torch.full((4,), LAST, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("sampler", "evaluations"), [(sampling.euler, 18), (sampling.heun, 35), (sampling.dpmpp_2m, 18)]
)
def test_evaluations_of_18_steps(sampler, evaluations, mixture, generator):
    denoiser = sampling.counted(mixture)
    sampler(denoiser, start(3, generator, 80.0), sampling.edm_sigmas(18))
    assert denoiser.nfe == evaluations


@pytest.mark.parametrize("sampler", [sampling.euler, sampling.heun, sampling.dpmpp_2m])
def test_a_grid_is_used_as_given_without_a_last_0(sampler, mixture, generator):
    seen: list[float] = []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma[0].item())
        return mixture(x, sigma)

    x, grid = start(3, generator), [5.0, 2.0, 0.7]
    got = sampler(denoiser, x, torch.tensor(grid, dtype=torch.float64))
    visited = [5.0, 2.0, 2.0, 0.7] if sampler is sampling.heun else [5.0, 2.0]
    assert seen == visited
    # With a 0 behind it the same loop goes on: its state at 0.7 is what came back.
    calls: list[tuple[int, Tensor, Tensor]] = []
    with_zero = torch.tensor([*grid, 0.0], dtype=torch.float64)
    end = sampler(mixture, x, with_zero, callback=lambda *call: calls.append(call))
    assert torch.equal(calls[2][1], got)
    torch.testing.assert_close(end, mixture(got, torch.full((3,), 0.7, dtype=torch.float64)), rtol=0, atol=1e-14)


def test_dpmpp_2m_is_the_published_algorithm_over_three_steps(mixture, generator):
    """Algorithm 2 of Lu et al. (2022) in its own variables alpha, sigma, lambda, r and h, for a VP process."""
    levels = [4.0, 1.5, 0.8, 0.3]
    alphas = [1 / math.sqrt(1 + level**2) for level in levels]
    sigmas = [level / math.sqrt(1 + level**2) for level in levels]
    lambdas = [math.log(a / s) for a, s in zip(alphas, sigmas, strict=True)]
    x = start(5, generator, levels[0])

    def model(state: Tensor, i: int) -> Tensor:
        return mixture(state / alphas[i], torch.full((5,), levels[i], dtype=torch.float64))

    state = alphas[0] * x
    older = model(state, 0)
    state = sigmas[1] / sigmas[0] * state - alphas[1] * math.expm1(-(lambdas[1] - lambdas[0])) * older
    for i in (2, 3):
        newer = model(state, i - 1)
        h = lambdas[i] - lambdas[i - 1]
        r = (lambdas[i - 1] - lambdas[i - 2]) / h
        combined = (1 + 1 / (2 * r)) * newer - 1 / (2 * r) * older
        state = sigmas[i] / sigmas[i - 1] * state - alphas[i] * math.expm1(-h) * combined
        older = newer
    got = sampling.dpmpp_2m(mixture, x, torch.tensor(levels, dtype=torch.float64))
    torch.testing.assert_close(got, state / alphas[-1], rtol=1e-12, atol=1e-12)


def test_heun_without_churn_is_deterministic_and_draws_nothing(mixture, generator):
    def no_noise(x: Tensor) -> Tensor:
        raise AssertionError("noise was drawn")

    x, grid = start(4, generator), sampling.edm_sigmas(6, sigma_max=FIRST)
    first = sampling.heun(mixture, x, grid, noise=no_noise)
    assert torch.equal(first, sampling.heun(mixture, x, grid))
    assert not torch.equal(first, sampling.heun(mixture, x, grid, s_churn=3.0, generator=generator))


def test_churn_raises_the_noise_level_inside_its_band_only_and_by_at_most_root_2(mixture, generator):
    def raised(s_churn: float) -> list[float]:
        seen: list[float] = []

        def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
            seen.append(sigma[0].item())
            return mixture(x, sigma)

        grid = torch.tensor([5.0, 2.0, 0.5, 0.0], dtype=torch.float64)
        sampling.heun(denoiser, start(2, generator), grid, s_churn=s_churn, s_min=1.0, s_max=3.0, generator=generator)
        return seen

    assert raised(0.3) == pytest.approx([5.0, 2.0, 2.0 * 1.1, 0.5, 0.5], rel=1e-14)
    assert raised(1e3) == pytest.approx([5.0, 2.0, 2.0 * math.sqrt(2), 0.5, 0.5], rel=1e-14)


@pytest.mark.parametrize("sampler", [sampling.euler, sampling.heun, sampling.dpmpp_2m, sampling.rk45])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_of_the_state_is_kept_and_given_to_the_denoiser(sampler, dtype, mixture, generator):
    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        assert x.dtype == sigma.dtype == dtype
        assert sigma.shape == (3,)
        assert not torch.is_grad_enabled()
        return mixture(x, sigma).to(torch.float16)

    x = start(3, generator).to(dtype)
    tolerances = {"rtol": 1e-2, "atol": 1e-2} if sampler is sampling.rk45 else {}
    got = sampler(denoiser, x, torch.tensor([5.0, 2.0, 0.5, 0.0]), **tolerances)
    assert got.dtype == dtype
    assert got.shape == x.shape


@pytest.mark.parametrize("sampler", [sampling.euler, sampling.heun, sampling.dpmpp_2m, sampling.ancestral])
def test_the_callback_sees_every_step_from_the_first_state_on(sampler, mixture, generator):
    x, calls = start(3, generator), []
    grid = sampling.edm_sigmas(5, sigma_max=FIRST)
    sampler(mixture, x, grid, callback=lambda *call: calls.append(call))
    assert [step for step, _, _ in calls] == [0, 1, 2, 3, 4]
    assert torch.equal(calls[0][1], x)
    assert torch.equal(calls[0][2], mixture(x, torch.full((3,), FIRST, dtype=torch.float64)))


def test_a_state_may_be_an_image(generator):
    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.full_like(x, 0.25)  # of data that are all 0.25

    x = 80 * torch.randn(2, 3, 4, 4, generator=generator)
    for sampler in (sampling.euler, sampling.heun, sampling.dpmpp_2m, sampling.rk45, sampling.predictor_corrector):
        got = sampler(denoiser, x, sampling.edm_sigmas(8))
        torch.testing.assert_close(got, torch.full_like(x, 0.25), rtol=0, atol=1e-5)
