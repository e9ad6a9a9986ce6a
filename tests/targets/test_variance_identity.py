"""Var(DSM | x_t) = Var(STF | x_t) + E[V | x_t], with V the `variance` of the posterior: by enumeration."""

from itertools import pairwise, product

import pytest
import torch

import stablefield as sf

ATOMS = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64)
PRIOR = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def moments(n: int, x_t: float, sigma: float) -> tuple[float, float, float]:
    """Mean and variance of the stable target given x_t, and the mean of V, over all draws of n references."""
    x = torch.tensor([[x_t]], dtype=torch.float64)
    near = torch.exp(-((x_t - ATOMS) ** 2) / (2 * sigma**2))
    density, mean, removed = [], [], []
    for tuple_ in product(range(3), repeat=n):
        k = torch.tensor(tuple_)
        found = sf.posterior(x, 1.0, sigma, ATOMS[k][:, None])
        density.append(PRIOR[k].prod() * near[k].mean())  # the source is at each place with probability 1 / n
        mean.append(found.mean[0, 0])
        removed.append(found.variance[0])
    p = torch.stack(density)
    p, m, v = p / p.sum(), torch.stack(mean), torch.stack(removed)
    average = (p * m).sum()
    return average.item(), (p * (m - average) ** 2).sum().item(), (p * v).sum().item()


# Figures of an independent enumeration.
PINNED = {2: (0.12976, 0.17082), 4: (0.04968, 0.25089), 6: (0.03010, 0.27047)}


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_variance_of_dsm_is_that_of_stf_plus_what_v_reports(n):
    average, stf, removed = moments(n, 0.1, 0.8)
    assert average == pytest.approx(0.178257, abs=5e-7)
    assert stf + removed == pytest.approx(0.30058, abs=5e-6)
    if n == 1:
        assert removed == 0
    if n in PINNED:
        assert (stf, removed) == pytest.approx(PINNED[n], abs=6e-6)


@pytest.mark.parametrize(("x_t", "sigma"), [(-2.0, 0.3), (1.2, 0.5), (0.4, 3.0)])
def test_the_identity_holds_at_other_places_and_noise_levels(x_t, sigma):
    _, dsm, nothing = moments(1, x_t, sigma)
    _, stf, removed = moments(4, x_t, sigma)
    assert nothing == 0
    assert stf + removed == pytest.approx(dsm, rel=1e-11)


def test_the_variance_of_the_target_falls_as_references_are_added():
    variances = [moments(n, 0.1, 0.8)[1] for n in (1, 2, 3, 4, 5, 6)]
    assert all(later < 0.9 * earlier for earlier, later in pairwise(variances))


def test_the_trained_target_reports_the_same_variance_as_its_posterior():
    x0 = torch.tensor([[-1.0, 0.2], [0.5, 0.7], [2.0, -0.4]], dtype=torch.float64)
    x_t = x0 + torch.tensor([[0.3, -0.2], [-0.9, 0.4], [0.1, 1.0]], dtype=torch.float64)
    target = sf.StableTarget(sf.EDM(), references=sf.InBatch())(x0, x_t, 0.9)
    weights = torch.exp(-(torch.cdist(x_t, x0) ** 2) / (2 * 0.9**2))
    weights /= weights.sum(1, keepdim=True)
    by_hand = torch.stack([(weights[i] * (x0 - weights[i] @ x0).square().sum(1)).sum() for i in range(3)])
    torch.testing.assert_close(target.variance, by_hand)
    torch.testing.assert_close(target.source_weight, weights.diagonal())
