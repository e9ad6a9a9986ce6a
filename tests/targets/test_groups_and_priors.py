"""Groups select references, log_prior weighs them, log_evidence is the density of the mixture."""

from collections.abc import Callable

import pytest
import torch
from scipy import special, stats
from torch import Tensor

import stablefield as sf


def case(rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_t, references, labels, reference_labels): nine rows, fourteen references, three groups and dropped labels."""
    y = torch.randn(14, 5, generator=rng, dtype=torch.float64)
    reference_labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0])
    labels = torch.tensor([0, 1, 2, -1, 0, 1, 2, -1, 0])
    x_t = y[:9] + 0.9 * torch.randn(9, 5, generator=rng, dtype=torch.float64)
    return x_t, y, labels, reference_labels


def test_groups_are_separate_posteriors_and_dropped_labels_use_all(rng: torch.Generator) -> None:
    x_t, y, labels, reference_labels = case(rng)
    found = sf.posterior(x_t, 1.0, 0.9, y, labels=labels, reference_labels=reference_labels)
    for row, g in enumerate(labels.tolist()):
        members = torch.ones(14, dtype=torch.bool) if g == -1 else reference_labels == g
        source_only = sf.posterior(x_t[row : row + 1], 1.0, 0.9, y[members])
        for name in ("mean", "variance", "ess", "log_evidence"):
            torch.testing.assert_close(getattr(found, name)[row], getattr(source_only, name)[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8])
def test_groups_may_be_integers_of_any_width(rng: torch.Generator, dtype: torch.dtype) -> None:
    x_t, y, _, reference_labels = case(rng)
    labels = torch.tensor([0, 1, 2, 0, 0, 1, 2, 2, 0])
    wide = sf.posterior(x_t, 1.0, 0.9, y, labels=labels, reference_labels=reference_labels)
    narrow = sf.posterior(x_t, 1.0, 0.9, y, labels=labels.to(dtype), reference_labels=reference_labels.to(dtype))
    assert torch.equal(wide.mean, narrow.mean)


def test_the_unsigned_class_255_is_a_class_and_not_a_dropped_label(rng: torch.Generator) -> None:
    x_t, y, _, reference_labels = case(rng)
    wide = torch.where(reference_labels == 2, 255, reference_labels)
    labels = torch.full((9,), 255)
    found = sf.posterior(x_t, 1.0, 0.9, y, labels=labels.byte(), reference_labels=wide.byte())
    truth = sf.posterior(x_t, 1.0, 0.9, y, labels=labels, reference_labels=wide)
    assert torch.equal(found.mean, truth.mean)


def test_in_batch_groups_use_rows_of_the_true_class_whose_label_was_dropped(rng: torch.Generator) -> None:
    x_t, y, labels, reference_labels = case(rng)
    x0, truth_group = y[:9], reference_labels[:9]
    labels = torch.where(labels == -1, -1, truth_group)
    target = sf.StableTarget(sf.EDM(), references=sf.InBatch())
    with_truth = target(x0, x_t, 0.9, labels, reference_labels=truth_group)
    without = target(x0, x_t, 0.9, labels)
    for row, g in enumerate(labels.tolist()):
        everyone = torch.ones(9, dtype=torch.bool)
        for found, members in ((with_truth, truth_group == g), (without, labels == g)):
            allowed = everyone if g == -1 else members
            source_only = sf.posterior(x_t[row : row + 1], 1.0, 0.9, x0[allowed])
            torch.testing.assert_close(found.x0[row], source_only.mean[0], rtol=1e-11, atol=1e-12)


def test_pool_groups_hold_for_the_drawn_subset(rng: torch.Generator) -> None:
    _, y, _, reference_labels = case(rng)
    index = torch.tensor([13, 2, 4])
    x_t = y[index] + torch.randn(3, 5, generator=rng, dtype=torch.float64)
    for labels in (torch.tensor([0, 2, -1]), torch.full((3,), -1)):
        target = sf.StableTarget(sf.EDM(), references=sf.Pool(y, labels=reference_labels))
        found = target(y[index], x_t, 1.0, labels, index)
        for row in range(3):
            g = int(labels[row])
            members = reference_labels == g if g >= 0 else torch.ones(14, dtype=torch.bool)
            source_only = sf.posterior(x_t[row : row + 1], 1.0, 1.0, y[members])
            torch.testing.assert_close(found.x0[row], source_only.mean[0], rtol=1e-11, atol=1e-12)
    drawn = sf.StableTarget(sf.EDM(), references=sf.Pool(y, 8, reference_labels))
    found = drawn(y[index], x_t, 1.0, torch.tensor([0, 2, 1]), index, generator=rng)
    assert (found.source_weight > 0).all()


def test_log_prior_is_repetition_of_references(rng: torch.Generator) -> None:
    x_t, y, labels, reference_labels = case(rng)
    count = torch.randint(1, 6, (14,), generator=rng)
    weighted = sf.posterior(
        x_t, 1.0, 0.9, y, labels=labels, reference_labels=reference_labels, log_prior=count.double().log() + 3.0
    )
    repeated = sf.posterior(
        x_t,
        1.0,
        0.9,
        y.repeat_interleave(count, 0),
        labels=labels,
        reference_labels=reference_labels.repeat_interleave(count),
    )
    for name in ("mean", "variance", "log_evidence"):
        torch.testing.assert_close(getattr(weighted, name), getattr(repeated, name), rtol=1e-11, atol=1e-12)
    plain = sf.posterior(x_t, 1.0, 0.9, y, labels=labels, reference_labels=reference_labels)
    assert (plain.mean - weighted.mean).abs().max() > 0.05


@pytest.mark.parametrize("sigma", [0.05, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_log_prior_of_minus_infinity_is_removal(rng: torch.Generator, sigma: float, dtype: torch.dtype) -> None:
    y = torch.randn(14, 5, generator=rng, dtype=dtype)
    x_t = y[:9] + sigma * torch.randn(9, 5, generator=rng, dtype=dtype)
    keep = torch.arange(14) % 3 != 0
    log_prior = torch.where(keep, 0.0, -torch.inf)
    a, b = sf.posterior(x_t, 1.0, sigma, y, log_prior=log_prior), sf.posterior(x_t, 1.0, sigma, y[keep])
    tight = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
    for name in ("mean", "ess", "log_evidence"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), **tight)


def test_excluding_the_nearest_reference_keeps_the_accuracy_of_the_rest(rng: torch.Generator, exact: Callable) -> None:
    # Leave-one-out at small noise: the rest are forty sigma away, and two of them 1.5 sigma apart.
    for sigma in (0.002, 0.02, 0.1, 1.0):
        y = torch.rand(8, 3072, generator=rng) * 2 - 1
        step = torch.nn.functional.normalize(torch.randn(2, 3072, generator=rng), dim=1) * sigma
        y[1] = y[0] + 40 * step[0]
        y[2] = y[1] + 1.5 * step[1]
        x_t = y[:1] + sigma * torch.randn(1, 3072, generator=rng)
        log_prior = torch.zeros(8)
        log_prior[0] = -torch.inf
        truth = exact(x_t, 1.0, sigma, y, log_prior=log_prior)
        found = sf.posterior(x_t, 1.0, sigma, y, log_prior=log_prior)
        assert found.ess.item() == pytest.approx(truth.ess.item(), rel=5e-3), f"at sigma {sigma}"


@pytest.mark.parametrize("with_source", [True, False])
def test_a_prior_that_outweighs_the_distance_keeps_the_accuracy(
    rng: torch.Generator, exact: Callable, with_source: bool
) -> None:
    # The source has a prior weight of e^-60, two near-duplicates eight sigma away have nearly all of the posterior.
    for sigma in (0.002, 0.02, 0.1, 1.0):
        y = torch.rand(8, 3072, generator=rng) * 2 - 1
        step = torch.nn.functional.normalize(torch.randn(2, 3072, generator=rng), dim=1) * sigma
        y[1] = y[0] + 8 * step[0]
        y[2] = y[1] + 1.5 * step[1]
        x_t = y[:1] + sigma * torch.randn(1, 3072, generator=rng)
        log_prior = torch.zeros(8)
        log_prior[0] = -60
        truth = exact(x_t, 1.0, sigma, y, log_prior=log_prior)
        found = sf.posterior(x_t, 1.0, sigma, y, torch.tensor([0]) if with_source else None, log_prior=log_prior)
        assert found.ess.item() == pytest.approx(truth.ess.item(), rel=5e-3), f"at sigma {sigma}"


@pytest.mark.parametrize("constant", [1e2, -1e3, 1e6])
def test_a_constant_in_log_prior_does_not_matter(rng: torch.Generator, constant: float) -> None:
    y = torch.randn(6, 3, generator=rng)
    x_t = y[:2] + torch.randn(2, 3, generator=rng)
    log_prior = torch.randn(6, generator=rng, dtype=torch.float64)
    plain = sf.posterior(x_t, 1.0, 1.0, y, torch.arange(2), log_prior=log_prior)
    moved = sf.posterior(x_t, 1.0, 1.0, y, torch.arange(2), log_prior=log_prior + constant)
    for name in ("mean", "ess", "source_weight", "log_evidence"):
        torch.testing.assert_close(getattr(moved, name), getattr(plain, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("constant", [0.1, 10.1, 1000.123])
def test_the_only_reference_has_weight_one_whatever_its_prior(constant: float) -> None:
    one = torch.tensor([constant], dtype=torch.float64)
    found = sf.posterior(torch.zeros(1, 2), 1.0, 1.0, torch.ones(1, 2), torch.tensor([0]), log_prior=one)
    assert found.source_weight is not None
    assert found.source_weight.item() == 1


@pytest.mark.parametrize("with_source", [True, False])
def test_log_evidence_is_the_density_of_the_mixture(rng: torch.Generator, with_source: bool) -> None:
    x_t, y, labels, reference_labels = case(rng)
    log_prior = torch.randn(14, generator=rng, dtype=torch.float64)
    source = None
    if with_source:
        source = torch.arange(9)
        labels = torch.where(labels == -1, -1, reference_labels[:9])
    for alpha, sigma in ((1.0, 0.9), (0.6, 0.1), (0.1, 4.0)):
        found = sf.posterior(x_t, alpha, sigma, y, source, labels, reference_labels, log_prior)
        for row in range(9):
            members = (reference_labels == labels[row]) if labels[row] >= 0 else torch.ones(14, dtype=torch.bool)
            prior = special.log_softmax(log_prior[members].numpy())
            density = [
                stats.multivariate_normal.logpdf(x_t[row].numpy(), alpha * mean, sigma**2)
                for mean in y[members].numpy()
            ]
            expected = special.logsumexp(prior + density)
            assert found.log_evidence[row].item() == pytest.approx(expected, rel=1e-10)
