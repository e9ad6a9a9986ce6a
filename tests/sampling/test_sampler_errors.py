"""Claims on bad input: every sampler refuses it by name, and none hangs."""

import math
import sys
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import stablefield as sf
import stablefield.sampling as sampling

SAMPLERS = {
    "euler": sampling.euler,
    "heun": sampling.heun,
    "dpmpp_2m": sampling.dpmpp_2m,
    "dpmpp_2m_sde": sampling.dpmpp_2m_sde,
    "euler_maruyama": sampling.euler_maruyama,
    "ancestral": sampling.ancestral,
    "predictor_corrector": sampling.predictor_corrector,
    "rk45": sampling.rk45,
    "log_likelihood": sampling.log_likelihood,
}
GRID = torch.tensor([5.0, 2.0, 0.5])


def identity(x: Tensor, sigma: Tensor) -> Tensor:
    return x * 0.5


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([5.0, 2.0, 2.0], r"sigmas\[1\]=2 is followed by 2"),
        ([0.5, 2.0, 5.0], r"sigmas\[0\]=0.5 is followed by 2"),
        ([[5.0, 2.0]], r"sigmas has shape \(1, 2\)"),
        ([5.0], r"sigmas has shape \(1,\)"),
        ([5.0, -1.0], "sigmas holds -1"),
        ([5.0, math.nan, 1.0], "sigmas holds NaN"),
        ([math.inf, 1.0], "sigmas holds NaN or infinite"),
        ([5.0, 0.0, 0.0], r"sigmas\[1\]=0 is followed by 0"),
    ],
)
def test_a_grid_that_is_none_is_refused(name, sigmas, message):
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        SAMPLERS[name](identity, torch.zeros(2, 3), torch.tensor(sigmas))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_hint_on_a_list_is_code_that_runs(name):
    with pytest.raises(TypeError, match=rf"^{name}: sigmas is a list: pass a tensor \(torch\.tensor\(sigmas\), or"):
        SAMPLERS[name](identity, torch.zeros(2, 3), [5.0, 2.0])


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.uint8), "x has dtype torch.uint8"),
        (torch.zeros(2, 3, dtype=torch.float16), "x has dtype torch.float16"),
        (torch.zeros(3), r"x has shape \(3,\)"),
        (torch.zeros(0, 3), r"x has shape \(0, 3\)"),
        (torch.full((2, 3), math.nan), "x holds NaN"),
    ],
)
def test_a_state_that_is_none_is_refused(name, x, message):
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        SAMPLERS[name](identity, x, GRID)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_denoiser_that_breaks_down_is_named_with_its_noise_level(name, value):
    calls = 0

    def breaks(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x * torch.where(sigma < 3.0, value, 0.5)[:, None] if name != "log_likelihood" else x * value

    with pytest.raises(
        ValueError, match=rf"{name}: the denoiser returned NaN or infinite values at sigma=([0-2]\.|2 )"
    ):
        SAMPLERS[name](breaks, torch.ones(2, 3), GRID)
    assert calls < 50


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_denoiser_that_returns_another_shape_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name}: the denoiser returned shape \(2, 1\)"):
        SAMPLERS[name](lambda x, _: x[:, :1], torch.ones(2, 3), GRID)


def test_a_state_that_overflows_is_told_from_a_denoiser_that_breaks():
    def huge(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.where(sigma[:, None] > 3, -3e38, 3e38).expand_as(x)

    for levels in ([5.0, 2.0, 0.5], [5.0, 2.0, 0.5, 0.1]):
        with pytest.raises(ValueError, match=r"euler: the state is NaN or infinite at sigma=0.5: the solver diverged"):
            sampling.euler(huge, torch.ones(2, 3), torch.tensor(levels))


def test_rk45_gives_up_on_a_denoiser_too_rough_to_solve(generator):
    def noisy(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator)

    with pytest.raises(ValueError, match=r"rk45: (no solution to rtol=1e-05, atol=1e-05 within 500|stopped at sigma)"):
        sampling.rk45(noisy, torch.ones(2, 3), GRID, max_nfe=500)
    with pytest.raises(ValueError, match="rk45: no solution to rtol=1e-05, atol=1e-05 within 20 evaluations"):
        sampling.rk45(noisy, torch.ones(2, 3), GRID, max_nfe=20)


@pytest.mark.parametrize("name", ["rk45", "log_likelihood"])
def test_the_adaptive_solver_needs_two_positive_levels(name):
    with pytest.raises(ValueError, match=f"{name}: .*one positive noise level"):
        SAMPLERS[name](identity, torch.ones(2, 3), torch.tensor([5.0, 0.0]))


@pytest.mark.parametrize("name", ["rk45", "log_likelihood"])
def test_without_scipy_the_error_says_what_to_install(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)
    with pytest.raises(ImportError, match=rf"{name} needs SciPy: pip install"):
        SAMPLERS[name](identity, torch.ones(2, 3), GRID)


def test_the_samplers_are_imported_without_scipy():
    """In a process of its own: this one has imported SciPy for its tests."""
    import subprocess

    code = "import sys; sys.modules['scipy'] = None; import stablefield.sampling"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(sampling.heun, s_churn=-1.0), "s_churn=-1.0"),
        (partial(sampling.heun, s_churn=3.0, s_min=50.0, s_max=0.05), r"s_min=50.0 is above s_max=0.05, so no noise"),
        (partial(sampling.heun, s_noise=math.nan), "s_noise=nan"),
        (partial(sampling.dpmpp_2m_sde, eta=-0.5), "eta=-0.5"),
        (partial(sampling.predictor_corrector, process="sub-vp"), "process='sub-vp'"),
        (partial(sampling.predictor_corrector, predictor="euler"), "predictor='euler'"),
        (partial(sampling.predictor_corrector, snr=0.0), "snr=0.0"),
        (partial(sampling.predictor_corrector, corrector_steps=-1), "corrector_steps=-1"),
        (partial(sampling.rk45, rtol=0.0), "rtol=0.0"),
        (partial(sampling.ancestral, noise=torch.randn_like, generator=torch.Generator()), "both given"),
        (partial(sampling.ancestral, noise=lambda x: x[:1]), r"noise returned shape \(1, 3\)"),
    ],
)
def test_options_out_of_range_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(identity, torch.ones(2, 3), GRID)


class Dropping(torch.nn.Module):
    """A denoiser that drops values in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:  # noqa: ARG002
        return self.drop(0.5 * x)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda one: one,
        sampling.counted,
        lambda one: sampling.autoguidance(one, identity, 2.0),
        partial,
        lambda one: one.forward,
        lambda one: lambda x, sigma: one(x, sigma),
        lambda one: sampling.counted(lambda x, sigma: 2 * one(x, sigma)),
    ],
)
def test_a_denoiser_that_drops_values_at_random_is_warned_of(wrap):
    x = 5 * torch.ones(2, 1, 4, 4)
    denoiser = Dropping()
    with pytest.warns(UserWarning, match=r"training mode.* call denoiser\.eval\(\)") as seen:
        sampling.euler(wrap(denoiser), x, GRID)
    assert seen[0].filename == __file__
    sampling.euler(wrap(denoiser.eval()), x, GRID)  # a warning would be an error
    network = sf.networks.SongUNet.ddpmpp(4, 1, 8, (1,), blocks=1)
    with pytest.warns(UserWarning, match="training mode"):
        sampling.euler(wrap(sf.Denoiser(network)), x, GRID)
    sampling.euler(wrap(sf.Denoiser(sf.networks.SongUNet.ddpmpp(4, 1, 8, (1,), blocks=1, dropout=0.0))), x, GRID)


@pytest.mark.parametrize(
    "sampler",
    [sampling.euler, sampling.heun, sampling.dpmpp_2m, sampling.ancestral, sampling.euler_maruyama, sampling.rk45],
)
def test_noise_that_is_not_scaled_to_the_first_level_is_warned_of(sampler):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 8, generator=generator, dtype=torch.float64)

    def denoiser(x, sigma):
        return x / (1 + sigma[:, None] ** 2)

    with pytest.warns(
        UserWarning, match=r"x has a root mean square of .* pass sigmas\[0\] times standard normal"
    ) as seen:
        sampler(denoiser, noise, GRID)
    assert seen[0].filename == __file__
    sampler(denoiser, 5 * noise, GRID)  # a warning would be an error
    sampler(denoiser, 5 * noise - 3, GRID)
    sampler(denoiser, 0.5 * noise, torch.tensor([0.5, 0.1]))
    sampling.log_likelihood(denoiser, 0.1 * noise, GRID)  # from data to noise
    padded = 5 * torch.cat([noise, torch.zeros(4, 40)], 1).double()  # as of molecules with few atoms
    sampler(denoiser, padded, GRID)


def test_a_denoiser_that_normalises_by_its_batch_is_warned_of():
    norm = nn.BatchNorm1d(3)
    with pytest.warns(UserWarning, match="training mode, so its dropout or batch normalisation"):
        sampling.euler(lambda x, sigma: norm(x), 5 * torch.randn(4, 3), GRID)
    norm.eval()
    sampling.euler(lambda x, sigma: norm(x), 5 * torch.randn(4, 3), GRID)


def test_a_network_of_diffusers_is_asked_for_its_dropout_without_a_warning_of_its_own():
    pytest.importorskip("diffusers")
    x = 5 * torch.ones(2, 1, 8, 8)
    network = sf.networks.DiffusersUNet.sized(8, 1, (8, 8), 1, groups=4)
    sampling.euler(sf.Denoiser(network), x, GRID)
    network = sf.networks.DiffusersUNet.sized(8, 1, (8, 8), 1, groups=4, dropout=0.1)
    with pytest.warns(UserWarning, match="training mode"):
        sampling.euler(sf.Denoiser(network), x, GRID)
