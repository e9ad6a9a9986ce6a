import itertools

import numpy as np
import pytest
import torch

from stablefield.evaluation._kid import kernel_distance


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def brute_force(x: np.ndarray, y: np.ndarray) -> float:
    d, m = x.shape[1], len(x)

    def k(u: np.ndarray, v: np.ndarray) -> float:
        return (sum(u[c] * v[c] for c in range(d)) / d + 1) ** 3

    total = 0.0
    for i, j in itertools.product(range(m), range(m)):
        if i != j:
            total += (k(x[i], x[j]) + k(y[i], y[j])) / (m * (m - 1))
        total -= 2 * k(x[i], y[j]) / m**2
    return total


def test_every_subset_is_the_double_loop_over_its_rows() -> None:
    a, b = torch.randn(14, 3, dtype=torch.float64, generator=rng()), torch.randn(17, 3, generator=rng(1)).double() + 0.5
    got = kernel_distance(a, b, generator=rng(5), subsets=4, subset_size=6)
    draws = rng(5)
    values = []
    for _ in range(4):
        x, y = (side[torch.randperm(len(side), generator=draws)[:6]].numpy() for side in (a, b))
        values.append(brute_force(x, y))
    assert got.mean == pytest.approx(np.mean(values), abs=1e-12)
    assert got.standard_deviation == pytest.approx(np.std(values, ddof=1), abs=1e-12)
    assert got.standard_error == pytest.approx(np.std(values, ddof=1) * np.sqrt((6 / 14) / (8 / 14) + 1 / 4), abs=1e-12)


def test_same_generator_same_number() -> None:
    a, b = torch.randn(2, 50, 4, generator=rng())
    first, second, other = (kernel_distance(a, b, generator=rng(seed), subsets=3) for seed in (1, 1, 2))
    assert first == second
    assert first.mean != other.mean
    assert first.subset_size == 25


def test_unbiased_and_hence_about_zero_between_equal_distributions() -> None:
    generator = rng()
    values = np.array(
        [
            kernel_distance(*torch.randn(2, 40, 6, generator=generator), generator=generator, subsets=5).mean
            for _ in range(300)
        ]
    )
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values))
    assert (values < 0).mean() > 0.3


def test_the_expected_value_of_shifted_points_is_the_closed_form() -> None:
    # x ~ N(0, 1), y ~ N(s, 1), d = 1: E(xy + 1)^3 over pairs by moments of normals.
    s, generator = 0.7, rng(3)

    def expected(p: float, q: float) -> float:
        third = (p**3 + 3 * p) * (q**3 + 3 * q)
        return third + 3 * (p**2 + 1) * (q**2 + 1) + 3 * p * q + 1

    truth = expected(0, 0) + expected(s, s) - 2 * expected(0, s)
    values = [
        kernel_distance(
            torch.randn(200, 1, generator=generator),
            torch.randn(200, 1, generator=generator) + s,
            generator=generator,
            subsets=4,
        ).mean
        for _ in range(300)
    ]
    assert abs(np.mean(values) - truth) < 4 * np.std(values) / np.sqrt(len(values))
    assert truth > 2


def test_standard_error_is_the_spread_over_fresh_samples() -> None:
    generator = rng(7)
    results = [
        kernel_distance(
            torch.randn(400, 4, generator=generator),
            1.3 * torch.randn(400, 4, generator=generator) + 0.5,
            generator=generator,
            subsets=30,
            subset_size=100,
        )
        for _ in range(150)
    ]
    fresh = np.std([result.mean for result in results], ddof=1)
    claimed = np.sqrt(np.mean([result.standard_error**2 for result in results]))
    assert claimed == pytest.approx(fresh, rel=0.2)


def test_too_few_rows_for_two_subsets_are_refused_with_the_number_needed() -> None:
    a = torch.zeros(30, 2)
    with pytest.raises(
        ValueError, match=r"subset_size is 20, but the smaller side has 30 rows: at least 40 are needed"
    ):
        kernel_distance(a, torch.zeros(60, 2), generator=rng(), subset_size=20)
    with pytest.raises(ValueError, match="a has 3 rows, but at least 4 are needed"):
        kernel_distance(a[:3], a, generator=rng())
    with pytest.raises(ValueError, match="subsets is 1"):
        kernel_distance(a, a, generator=rng(), subsets=1)
