"""The averaged weights follow their rules: half-life, power function, and averages made afterwards."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from stablefield.training._ema import (
    LENGTHS,
    ema_decay,
    follower,
    power_decay,
    power_exponent,
    power_length,
    update_ema,
)
from stablefield.training._post_hoc import Profile, combine, mixture, snapshot_steps, take_snapshot


def test_weight_of_the_past_halves_over_the_half_life() -> None:
    decay = ema_decay(50, images_seen=10**9, half_life=1000, ramp_share=0.05)
    assert decay ** (1000 / 50) == pytest.approx(0.5)


def test_half_life_is_a_share_of_the_images_seen_at_first() -> None:
    assert ema_decay(10, images_seen=2000, half_life=1e9, ramp_share=0.05) == pytest.approx(0.5 ** (10 / 100))
    assert ema_decay(10, images_seen=0, half_life=1e9, ramp_share=0.05) == 0


def test_average_equals_the_explicit_weighted_sum() -> None:
    model = torch.nn.Linear(3, 2).double()
    average = follower(model)
    expected = model.weight.detach().clone()
    for k in range(5):
        with torch.no_grad():
            model.weight.add_(k + 1.0)
        update_ema(average, model, 0.9)
        expected = 0.9 * expected + 0.1 * model.weight.detach()
    torch.testing.assert_close(average.weight, expected)
    assert not average.weight.requires_grad


@pytest.mark.parametrize(("length", "exponent"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_those_of_the_paper(length: float, exponent: float) -> None:
    assert power_exponent(length) == pytest.approx(exponent, abs=0.005)


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_length_is_the_standard_deviation_of_the_profile(length: float) -> None:
    exponent = power_exponent(length)
    assert power_length(exponent) == pytest.approx(length)
    tau = (np.arange(400_000) + 0.5) / 400_000
    weight = (exponent + 1) * tau**exponent / 400_000
    mean = (weight * tau).sum()
    assert math.sqrt((weight * (tau - mean) ** 2).sum()) == pytest.approx(length, rel=1e-3)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.3, float("nan")])
def test_length_out_of_range_is_refused(length: float) -> None:
    with pytest.raises(ValueError, match="length of an average"):
        power_exponent(length)


def track(lengths: list[float], steps: int) -> dict[float, list[float]]:
    """Averages of a path with noise and drift, over all steps, by the recursion in float64."""
    rng = np.random.default_rng(0)
    path = np.cumsum(rng.normal(size=steps)) / 10 + np.linspace(0, 5, steps)
    found: dict[float, list[float]] = {}
    for length in lengths:
        exponent, value = power_exponent(length), 0.0
        found[length] = []
        for step in range(1, steps + 1):
            decay = power_decay(step, exponent)
            value = decay * value + (1 - decay) * path[step - 1]
            found[length].append(value)
    return found


def test_recursion_follows_the_power_function() -> None:
    steps, exponent = 2000, power_exponent(0.1)
    weights = np.zeros(steps)
    for step in range(1, steps + 1):
        decay = power_decay(step, exponent)
        weights *= decay
        weights[step - 1] += 1 - decay
    assert weights.sum() == pytest.approx(1)
    tau = np.arange(1, steps + 1) / steps
    np.testing.assert_allclose(weights[200:], (exponent + 1) * tau[200:] ** exponent / steps, rtol=0.05)


def test_products_of_profiles_are_those_of_numerical_integration() -> None:
    from stablefield.training._post_hoc import _products

    a, b = Profile(700, 0.05), Profile(1000, 0.15)
    tau = (np.arange(1_000_000) + 0.5) / 1000
    densities = []
    for profile in (a, b):
        exponent = power_exponent(profile.length)
        inside = tau < profile.step
        densities.append(inside * (exponent + 1) * (tau / profile.step) ** exponent / profile.step)
    for first, p in zip(densities, (a, b), strict=True):
        for second, q in zip(densities, (a, b), strict=True):
            assert _products([p], [q])[0, 0] == pytest.approx((first * second).sum() / 1000, rel=1e-4)


@pytest.mark.parametrize("wanted", [0.03, 0.07, 0.12, 0.2])
def test_average_made_afterwards_equals_the_one_tracked_all_along(wanted: float) -> None:
    steps, taken = 4000, range(250, 4001, 250)
    tracked = track([*LENGTHS, wanted], steps)
    profiles = [Profile(step, length) for step in taken for length in LENGTHS]
    coefficients, error = mixture(profiles, Profile(steps, wanted))
    assert coefficients.sum() == pytest.approx(1)
    made = sum(c * tracked[p.length][p.step - 1] for c, p in zip(coefficients, profiles, strict=True))
    spread = float(np.std(tracked[LENGTHS[0]]))
    assert error < 0.1
    assert abs(made - tracked[wanted][-1]) < 0.02 * spread


def test_wanted_average_that_is_a_snapshot_is_that_snapshot() -> None:
    profiles = [Profile(step, length) for step in (100, 200, 300) for length in LENGTHS]
    coefficients, error = mixture(profiles, Profile(200, 0.1))
    assert error < 1e-5
    np.testing.assert_allclose(coefficients, [0, 0, 0, 1, 0, 0], atol=1e-4)


def test_snapshots_on_disk_combine_to_the_coefficients_sum(tmp_path: Path) -> None:
    modules = {}
    for step in (10, 20):
        pair = [(length, torch.nn.Linear(2, 2)) for length in LENGTHS]
        modules[step] = pair
        take_snapshot(tmp_path / "ema", step, pair)
    assert snapshot_steps(tmp_path / "ema") == [10, 20]
    made, error = combine(tmp_path / "ema", 0.08)
    profiles = [Profile(step, length) for step in (10, 20) for length in LENGTHS]
    coefficients, expected_error = mixture(profiles, Profile(20, 0.08))
    assert error == expected_error
    everything = [module.weight.detach().double() for step in (10, 20) for _, module in modules[step]]
    expected = sum(c * w for c, w in zip(coefficients, everything, strict=True))
    torch.testing.assert_close(made["weight"], expected.float())
    assert set(made) == {"weight", "bias"}


def test_no_snapshots_and_steps_beyond_them_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ema_snapshot_every=STEPS"):
        combine(tmp_path / "ema", 0.1)
    take_snapshot(tmp_path / "ema", 10, [(length, torch.nn.Linear(2, 2)) for length in LENGTHS])
    take_snapshot(tmp_path / "ema", 20, [(length, torch.nn.Linear(2, 2)) for length in LENGTHS])
    for step in (0, 9, 11, 19, 21):
        with pytest.raises(ValueError, match=f"^step={step} has no snapshot: pass 10 or 20, or leave it out"):
            combine(tmp_path / "ema", 0.1, step)
    combine(tmp_path / "ema", 0.1, 10)


def test_among_many_snapshots_an_error_names_the_nearest(tmp_path: Path) -> None:
    for step in range(10, 101, 10):
        take_snapshot(tmp_path / "ema", step, [(0.1, torch.nn.Linear(1, 1))])
    with pytest.raises(
        ValueError, match="pass 30, 40, 50, 60, 70 or 80, the nearest of the 10 from 10 to 100, or leave"
    ):
        combine(tmp_path / "ema", 0.1, 56)
