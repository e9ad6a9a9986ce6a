import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stablefield.data._digits import open_digits
from stablefield.evaluation._extractor import RandomConvolutions
from stablefield.evaluation._fid import frechet_distance, frechet_distance_from_features


def random_orthogonal(d: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator)).Q


def random_covariance(d: int, generator: torch.Generator) -> torch.Tensor:
    root = torch.randn(3 * d, d, dtype=torch.float64, generator=generator)
    return root.T @ root / (3 * d)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_one_dimension_is_the_difference_of_means_and_of_deviations_squared() -> None:
    one = torch.ones(1, dtype=torch.float64)
    got = frechet_distance(0.5 * one, 4.0 * one[None], -1.0 * one, 0.25 * one[None])
    assert got.value == pytest.approx(1.5**2 + (2.0 - 0.5) ** 2, abs=1e-13)
    assert got.mean_term == pytest.approx(2.25, abs=1e-13)
    assert got.covariance_term == pytest.approx(2.25, abs=1e-13)


@pytest.mark.parametrize("d", [2, 17, 64])
def test_commuting_covariances_give_the_sum_over_their_common_axes(d: int) -> None:
    generator = rng(d)
    axes = random_orthogonal(d, generator)
    a, b = torch.rand(2, d, dtype=torch.float64, generator=generator) + 0.1
    mean1, mean2 = torch.randn(2, d, dtype=torch.float64, generator=generator)
    expected = (mean1 - mean2).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    got = frechet_distance(mean1, axes @ torch.diag(a) @ axes.T, mean2, axes @ torch.diag(b) @ axes.T)
    assert got.value == pytest.approx(expected.item(), abs=1e-11)


def test_shifted_gaussians_are_their_shift_squared_apart() -> None:
    cov = random_covariance(32, rng())
    shift = torch.linspace(-1, 1, 32, dtype=torch.float64)
    got = frechet_distance(torch.zeros(32), cov, shift, cov)
    assert got.value == pytest.approx(shift.square().sum().item(), abs=1e-12)
    x = torch.randn(100, 32, dtype=torch.float64, generator=rng(1))
    assert frechet_distance_from_features(x, x + shift).value == pytest.approx(shift.square().sum().item(), abs=1e-12)


@pytest.mark.parametrize("d", [3, 20, 100])
def test_agrees_with_scipys_matrix_square_root_on_well_conditioned_covariances(d: int) -> None:
    generator = rng(d)
    cov1, cov2 = random_covariance(d, generator), 2 * random_covariance(d, generator)
    mean1, mean2 = torch.randn(2, d, dtype=torch.float64, generator=generator)
    root = scipy.linalg.sqrtm((cov1 @ cov2).numpy())
    expected = np.square((mean1 - mean2).numpy()).sum() + (cov1.trace() + cov2.trace()).item() - 2 * np.trace(root).real
    assert frechet_distance(mean1, cov1, mean2, cov2).value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("n", "m"), [(500, 400), (500, 20), (15, 20)])
def test_features_and_their_statistics_give_one_distance(n: int, m: int) -> None:
    d, generator = 30, rng(n)
    a = torch.randn(n, d, dtype=torch.float64, generator=generator)
    b = 1.5 * torch.randn(m, d, dtype=torch.float64, generator=generator) + 0.3
    direct = frechet_distance_from_features(a, b)
    by_statistics = frechet_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
    # Eigenvalues that are 0 come out as 1e-16, their roots as 1e-8: the loss of the way through covariances.
    assert by_statistics.value == pytest.approx(direct.value, abs=1e-12 if min(n, m) > d else 1e-6)


def test_rank_one_covariances_have_the_closed_form() -> None:
    # Two rows at +-u have covariance 2 u u^T: Tr(C1 C2)^(1/2) = 2 |<u, v>|.
    u, v = torch.randn(2, 40, dtype=torch.float64, generator=rng())
    a, b = torch.stack([u, -u]), torch.stack([v, -v])
    expected = 2 * (u @ u + v @ v - 2 * (u @ v).abs())
    assert frechet_distance_from_features(a, b).value == pytest.approx(expected.item(), abs=1e-11)
    zero = torch.zeros(40, dtype=torch.float64)
    assert frechet_distance(zero, a.T.cov(), zero, b.T.cov()).value == pytest.approx(expected.item(), abs=1e-6)


def test_zero_covariances_leave_the_means() -> None:
    zero = torch.zeros(4, 4, dtype=torch.float64)
    assert frechet_distance(torch.zeros(4), zero, torch.ones(4), zero).value == 4.0


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 12),
    m=st.integers(2, 12),
    d=st.integers(1, 40),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    seed=st.integers(0, 10**6),
)
def test_singular_cases_are_finite_non_negative_and_symmetric(n: int, m: int, d: int, scale: float, seed: int) -> None:
    generator = rng(seed)
    a = scale * torch.randn(n, d, generator=generator)
    b = (
        a[:1] + 0.0 * torch.randn(m, d, generator=generator)
        if seed % 3 == 0
        else a[:1] + torch.randn(m, d, generator=generator)
    )
    for forth, back in (
        (frechet_distance_from_features(a, b).value, frechet_distance_from_features(b, a).value),
        (
            frechet_distance(a.mean(0), a.T.cov().reshape(d, d), b.mean(0), b.T.cov().reshape(d, d)).value,
            frechet_distance(b.mean(0), b.T.cov().reshape(d, d), a.mean(0), a.T.cov().reshape(d, d)).value,
        ),
    ):
        assert np.isfinite(forth)
        assert forth >= 0
        assert back == pytest.approx(forth, rel=1e-9, abs=1e-9 * scale**2)
    assert 0 <= frechet_distance_from_features(a, a).value <= 1e-11 * scale**2 * n * d


def test_float32_features_are_measured_in_float64() -> None:
    # Sixteenths, so that adding 4096 is exact in float32, where a mean or a square of the sums would not be.
    x, y = (16 * torch.randn(2, 200, 8, generator=rng())).round() / 16
    exact = frechet_distance_from_features(x.double(), y.double())
    assert frechet_distance_from_features(x + 4096, y + 4096).value == pytest.approx(exact.value, abs=1e-9)


def test_bias_falls_as_one_over_the_number_of_samples() -> None:
    # Between equal distributions the distance is all bias, and halves as n doubles.
    generator = rng()
    values = [
        np.mean([frechet_distance_from_features(*torch.randn(2, n, 10, generator=generator)).value for _ in range(40)])
        for n in (400, 800)
    ]
    assert values[0] / values[1] == pytest.approx(2.0, rel=0.1)


def test_bad_statistics_are_refused_with_the_remedy() -> None:
    good_mean, good = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match=r"cov2 \(2, 2\): pass means \(d,\) and covariances"):
        frechet_distance(good_mean, good, good_mean, torch.eye(2))
    with pytest.raises(ValueError, match="cov1 is not symmetric"):
        frechet_distance(good_mean, good + torch.triu(torch.ones(3, 3), 1), good_mean, good)
    with pytest.raises(ValueError, match="cov2 has the eigenvalue -1"):
        frechet_distance(good_mean, good, good_mean, -good)
    with pytest.raises(ValueError, match="mean1 or cov1 holds NaN"):
        frechet_distance(torch.full((3,), torch.nan), good, good_mean, good)


def test_two_halves_of_a_set_are_as_far_apart_as_their_sizes_say() -> None:
    """To second order in the errors of mean and covariance, in the axes of the covariance with eigenvalues l_i,

    E d^2 = (1/n + 1/m) (sum_i l_i + 1/2 sum_ij Var(x_i x_j) / (l_i + l_j)),

    the second term being the Bures metric's (Bhatia, Jain, Lim, "On the Bures-Wasserstein distance between positive
    definite matrices", 2019) at the sampling variance of a covariance.
    """
    features = RandomConvolutions()(torch.from_numpy(open_digits().images)).double()
    values, axes = torch.linalg.eigh(features.T.cov())
    x = (features - features.mean(0)) @ axes
    spread = (x.square().T @ x.square()) / len(x) - (x.T @ x / len(x)).square()
    expected = (values.sum() + 0.5 * (spread / (values[:, None] + values)).sum()).item()
    generator = rng(4)
    found = []
    for _ in range(6):
        order = torch.randperm(len(features), generator=generator)
        a, b = features[order[:898]], features[order[898:]]
        found.append(frechet_distance_from_features(a, b).value / (1 / len(a) + 1 / len(b)))
    assert np.mean(found) == pytest.approx(expected, rel=0.1)
