"""Claims on loss weights: each is the error in another parameterisation, which the views of a target spell out."""

import math

import numpy as np
import pytest
import torch

import stablefield as sf

PROCESSES = [sf.EDM(), sf.VE(), sf.VP(), sf.Cosine(), sf.RectifiedFlow()]
PRESERVING = [sf.VP(), sf.Cosine()]
LEVELS = torch.tensor([1e-3, 0.02, 0.3, 0.9, 1.0, 2.5, 11.0, 80.0], dtype=torch.float64)


def two_targets(process, levels=LEVELS):
    """Two values for x0 at the same (x_t, t), as targets, whose views can then be compared."""
    g = torch.Generator().manual_seed(0)
    source, noise, guess = torch.randn(3, len(levels), 2, 3, generator=g, dtype=torch.float64)
    t, one = process.time(levels), torch.ones_like(levels)

    def target(x0):
        return sf.Target(
            x0=x0,
            variance=0 * one,
            ess=one,
            source_weight=one,
            source=source,
            x_t=process.perturb(source, t, noise),
            process=process,
            t=t,
            given_noise=noise,
        )

    return target(source), target(guess)


def squared_error(a, b, view):
    return (getattr(a, view) - getattr(b, view)).square().flatten(1).sum(1)


def ratio(process, view):
    """Squared error of a view over the squared error in x0 that causes it."""
    a, b = two_targets(process)
    return squared_error(a, b, view) / squared_error(a, b, "x0")


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_plain_snr_times_the_error_in_x0_is_the_error_in_the_noise(process):
    torch.testing.assert_close(sf.SNRWeighting()(LEVELS), ratio(process, "noise"), rtol=1e-8, atol=0)


@pytest.mark.parametrize("process", PRESERVING, ids=repr)
def test_edm_weighting_of_unit_data_times_the_error_in_x0_is_the_error_in_v(process):
    torch.testing.assert_close(sf.EDMWeighting(sigma_data=1.0)(LEVELS), ratio(process, "v"), rtol=1e-8, atol=0)
    # Not so on a process that does not preserve the variance, nor for other data.
    assert not torch.allclose(sf.EDMWeighting(sigma_data=1.0)(LEVELS), ratio(sf.EDM(), "v"), rtol=1e-2)
    assert not torch.allclose(sf.EDMWeighting()(LEVELS), ratio(process, "v"), rtol=1e-2)


def test_flow_weighting_times_the_error_in_x0_is_the_error_in_a_rectified_flows_velocity():
    torch.testing.assert_close(sf.FlowWeighting()(LEVELS), ratio(sf.RectifiedFlow(), "velocity"), rtol=1e-8, atol=0)
    assert not torch.allclose(sf.FlowWeighting()(LEVELS), ratio(sf.VP(), "velocity"), rtol=1e-2)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_weight_1_is_the_error_in_x0(process):
    torch.testing.assert_close(sf.SNRWeighting(power=0.0)(LEVELS), ratio(process, "x0"), rtol=1e-12, atol=0)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_truncated_snr_is_the_larger_of_the_errors_in_x0_and_in_the_noise(process):
    larger = torch.maximum(ratio(process, "x0"), ratio(process, "noise"))
    torch.testing.assert_close(sf.SNRWeighting(minimum=1.0)(LEVELS), larger, rtol=1e-8, atol=0)


def test_min_snr_5_is_the_snr_and_never_more_than_5():
    expected = [min(1 / s**2, 5.0) for s in LEVELS.tolist()]
    np.testing.assert_allclose(sf.SNRWeighting(maximum=5.0)(LEVELS), expected, rtol=1e-12)
    assert len(set(expected)) > 3


@pytest.mark.parametrize("sigma_data", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_edm_weighting_times_the_error_in_x0_is_the_error_of_the_edm_network(process, sigma_data):
    a, b = two_targets(process)
    s = LEVELS[:, None, None]
    x = (process.perturb(a.source, a.t, a.source_noise)) / process.alpha(a.t)[:, None, None]
    c_skip = sigma_data**2 / (s**2 + sigma_data**2)
    c_out = s * sigma_data / torch.sqrt(s**2 + sigma_data**2)
    network_a, network_b = ((target.x0 - c_skip * x) / c_out for target in (a, b))
    error = (network_a - network_b).square().flatten(1).sum(1)
    weight = sf.EDMWeighting(sigma_data=sigma_data)(LEVELS)
    torch.testing.assert_close(weight * squared_error(a, b, "x0"), error, rtol=1e-8, atol=0)


@pytest.mark.parametrize("sigma_data", [0.1, 0.5, 1.0, 2.0])
def test_edm_weighting_is_the_formula_of_the_table_and_the_inverse_square_of_c_out(sigma_data):
    s = np.logspace(-5, 4, 37)
    weight = sf.EDMWeighting(sigma_data=sigma_data)(torch.from_numpy(s))
    np.testing.assert_allclose(weight, (s**2 + sigma_data**2) / (s * sigma_data) ** 2, rtol=1e-12)
    out = sf.EDMPreconditioning(sigma_data=sigma_data)(torch.from_numpy(s)).c_out
    np.testing.assert_allclose(weight * out**2, np.ones_like(s), rtol=1e-12)


def test_vp_and_ve_preconditioning_with_the_plain_snr_and_flow_with_its_own_weigh_all_network_errors_alike():
    plain = sf.SNRWeighting()
    pairs = (
        (plain, sf.VPPreconditioning()),
        (plain, sf.VEPreconditioning()),
        (plain, sf.DDPMPreconditioning()),
        (sf.FlowWeighting(), sf.FlowPreconditioning()),
    )
    for weighting, preconditioning in pairs:
        weight, scalings = weighting(LEVELS), preconditioning(LEVELS)
        torch.testing.assert_close(weight * scalings.c_out**2, torch.ones_like(LEVELS), rtol=1e-12, atol=0)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_power_acts_on_the_clamped_snr(power):
    weight = sf.SNRWeighting(power=power, minimum=0.5, maximum=8.0)(LEVELS)
    np.testing.assert_allclose(weight, [min(max(s**-2, 0.5), 8.0) ** power for s in LEVELS.tolist()], rtol=1e-12)


@pytest.mark.parametrize(
    "weighting",
    [
        sf.EDMWeighting(),
        sf.SNRWeighting(),
        sf.SNRWeighting(minimum=1.0),
        sf.SNRWeighting(power=0.0),
        sf.FlowWeighting(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_keep_shape_and_dtype_and_are_finite_and_positive_at_the_ends_of_training(weighting, dtype):
    # The most extreme noise levels of EDM's distribution at float64's resolution of a probability.
    s = torch.tensor([[1.7e-5, 1.0], [152.0, 5200.0]], dtype=dtype)
    weight = weighting(s)
    assert weight.shape == s.shape
    assert weight.dtype == dtype
    assert (weight.isfinite() & (weight > 0)).all()
    torch.testing.assert_close(weight.double(), weighting(s.double()), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: sf.EDMWeighting(sigma_data=0.0), "sigma_data=0.0"),
        (lambda: sf.EDMWeighting(sigma_data=-0.5), "sigma_data=-0.5"),
        (lambda: sf.EDMWeighting(sigma_data=math.inf), "sigma_data=inf"),
        (lambda: sf.EDMWeighting(sigma_data=math.nan), "sigma_data=nan"),
        (lambda: sf.SNRWeighting(minimum=-1.0), "minimum=-1.0"),
        (lambda: sf.SNRWeighting(minimum=5.0, maximum=5.0), "maximum=5.0"),
        (lambda: sf.SNRWeighting(minimum=math.nan), "minimum=nan"),
        (lambda: sf.SNRWeighting(maximum=math.nan), "maximum=nan"),
        (lambda: sf.SNRWeighting(power=math.nan), "power=nan"),
        (lambda: sf.SNRWeighting(power=math.inf), "power=inf"),
    ],
)
def test_parameters_without_a_weighting_are_refused_by_name(make, named):
    with pytest.raises(ValueError, match=named):
        make()
