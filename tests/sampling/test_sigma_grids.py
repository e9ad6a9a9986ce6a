"""Claims on the grids of noise levels, each formula written out a second time."""

import math

import pytest
import torch

import stablefield.sampling as sampling

GRIDS = [sampling.edm_sigmas, sampling.ve_sigmas, sampling.vp_sigmas, sampling.cosine_sigmas]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 18, 1000])
def test_n_steps_are_n_positive_falling_levels_and_a_0(grid, steps):
    sigmas = grid(steps)
    assert sigmas.shape == (steps + 1,)
    assert sigmas.dtype == torch.float64
    assert sigmas[-1] == 0
    assert (sigmas[:-1] > 0).all()
    assert (sigmas.diff() < 0).all()
    assert grid(steps, dtype=torch.float32).dtype == torch.float32
    torch.testing.assert_close(grid(steps, dtype=torch.float32), sigmas.float())


@pytest.mark.parametrize("grid", [sampling.edm_sigmas, sampling.ve_sigmas, sampling.cosine_sigmas])
def test_the_ends_are_exactly_those_asked_for(grid):
    sigmas = grid(9, sigma_min=0.03, sigma_max=70.0)
    assert sigmas[0].item() == 70.0
    assert sigmas[-2].item() == 0.03


def test_edm_grid_is_uniform_in_the_rho_th_root():
    roots = sampling.edm_sigmas(10, rho=5.0)[:-1] ** (1 / 5)
    expected = [80 ** (1 / 5) + i / 9 * (0.002 ** (1 / 5) - 80 ** (1 / 5)) for i in range(10)]
    torch.testing.assert_close(roots, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_ve_grid_is_geometric():
    sigmas = sampling.ve_sigmas(10)[:-1]
    ratio = (0.02 / 100) ** (1 / 9)
    torch.testing.assert_close(
        sigmas[1:] / sigmas[:-1], torch.full((9,), ratio, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_vp_grid_is_the_ratio_of_the_processs_sigma_and_alpha_at_uniform_times():
    sigmas = sampling.vp_sigmas(7, epsilon=0.01)
    for i in range(7):
        t = 1 + i / 6 * (0.01 - 1)
        alpha = math.exp(-0.25 * t**2 * (20 - 0.1) - 0.5 * t * 0.1)
        assert sigmas[i].item() == pytest.approx(math.sqrt(1 - alpha**2) / alpha, rel=1e-10)
    assert sampling.vp_sigmas(2)[0].item() == pytest.approx(152.2, abs=0.1)


def test_cosine_grid_is_uniform_in_angle():
    angles = torch.atan(sampling.cosine_sigmas(11)[:-1])
    steps = angles.diff()
    torch.testing.assert_close(steps, steps[:1].expand(10), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: sampling.edm_sigmas(0), "steps=0"),
        (lambda: sampling.ve_sigmas(-3), "steps=-3"),
        (lambda: sampling.edm_sigmas(5, sigma_min=0.0), "sigma_min=0.0"),
        (lambda: sampling.edm_sigmas(5, sigma_min=2.0, sigma_max=1.0), "sigma_max=1.0"),
        (lambda: sampling.edm_sigmas(5, rho=0.0), "rho=0.0"),
        (lambda: sampling.ve_sigmas(5, sigma_max=math.inf), "sigma_max=inf"),
        (lambda: sampling.cosine_sigmas(5, sigma_min=math.nan), "sigma_min=nan"),
        (lambda: sampling.vp_sigmas(5, epsilon=0.0), "epsilon=0.0"),
        (lambda: sampling.vp_sigmas(5, beta_min=-1.0), "beta_min=-1.0"),
    ],
)
def test_nonsense_is_refused_by_name(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.parametrize(
    ("grid", "change", "message"),
    [
        (sampling.vp_sigmas, {"beta_max": 1e30}, r"beta_max=1e\+30.*noise levels reach inf.*use less noise"),
        (sampling.edm_sigmas, {"rho": 1e30}, r"rho=1e\+30, steps=18: two neighbours are the noise level"),
        (sampling.edm_sigmas, {"rho": 1e-3}, r"rho=0.001: sigma_max=80.0 to the power 1 / rho is too large"),
        (sampling.edm_sigmas, {"dtype": torch.int64}, r"dtype=torch.int64: pass a floating point dtype"),
        (sampling.ve_sigmas, {"sigma_max": 1e6, "dtype": torch.float16}, r"noise levels reach 1e\+06, too much for"),
        (sampling.cosine_sigmas, {"steps": 1000, "dtype": torch.bfloat16}, r"does not decrease: take fewer steps"),
        (sampling.ve_sigmas, {"steps": 10**12}, r"steps=1000000000000: a grid has at most 1,000,000 steps"),
        (sampling.ve_sigmas, {"steps": 2.5}, r"steps=2.5: pass a whole number"),
    ],
)
def test_a_grid_that_is_none_is_refused(grid, change, message):
    with pytest.raises(ValueError, match=message):
        grid(**{"steps": 18} | change)


@pytest.mark.parametrize("grid", [sampling.edm_sigmas, sampling.ve_sigmas, sampling.vp_sigmas, sampling.cosine_sigmas])
@pytest.mark.parametrize(
    "change", [{"steps": "18"}, {"steps": True}, {"dtype": "float32"}, {"device": 3}, {"steps": None}]
)
def test_an_argument_of_a_grid_of_another_type_is_named(grid, change):
    with pytest.raises(TypeError, match=rf"^{next(iter(change))} is .*: pass .*\.$"):
        grid(**{"steps": 18} | change)
