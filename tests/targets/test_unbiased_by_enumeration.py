"""The target's expectation given x_t is the posterior mean of the prior: by enumeration of all joint draws.

A joint draw is a tuple of references and the place of the source among them. For a fixed x_t each draw has the weight
P(references, place) N(x_t; alpha source, sigma^2), normalised: Bayes' rule. Nothing is sampled.
"""

from collections.abc import Iterable, Iterator
from itertools import combinations, permutations, product

import pytest
import torch
from torch import Tensor

import stablefield as sf
from stablefield.diffusion._objective import Draws as DrawnRows

ATOMS = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64)
PRIOR = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
DATA = torch.tensor([-1.0, -0.4, 0.3, 1.1, 2.0], dtype=torch.float64)
ALPHA, SIGMA = 0.9, 0.8
X_T = torch.tensor([-1.3, -0.2, 0.1, 0.9, 2.5], dtype=torch.float64)

Draws = Iterable[tuple[Tensor, Tensor]]


def likelihood(atoms: Tensor, alpha: float = ALPHA, sigma: float = SIGMA) -> Tensor:
    """N(x_t; alpha atom, sigma^2) up to a constant, shape (len(X_T), len(atoms))."""
    return torch.exp(-((X_T[:, None] - alpha * atoms) ** 2) / (2 * sigma**2))


def true_mean(atoms: Tensor, prior: Tensor, alpha: float = ALPHA, sigma: float = SIGMA) -> Tensor:
    """E[x0 | x_t] under the prior itself, shape (len(X_T),)."""
    joint = prior * likelihood(atoms, alpha, sigma)
    return (joint * atoms).sum(1) / joint.sum(1)


def uniform(n: int) -> Tensor:
    return torch.full((n,), 1 / n, dtype=torch.float64)


def expectation(draws: Draws) -> Tensor:
    """Mean of the targets of all draws (density (5,), target (5,)), each weighted with its joint density."""
    total, mass = torch.zeros_like(X_T), torch.zeros_like(X_T)
    for density, target in draws:
        total, mass = total + density * target, mass + density
    return total / mass


def stable(references: Tensor, place: int | None) -> Tensor:
    source = None if place is None else torch.full((len(X_T),), place)
    return sf.posterior(X_T[:, None], ALPHA, SIGMA, references[:, None], source=source).mean[:, 0]


def assert_unbiased(draws: Draws, truth: Tensor) -> None:
    torch.testing.assert_close(expectation(draws), truth, rtol=0, atol=1e-13)


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_unbiased_with_references_drawn_with_replacement(n: int, anchored: bool) -> None:
    near = likelihood(ATOMS)

    def draws() -> Iterator[tuple[Tensor, Tensor]]:
        for members in product(range(3), repeat=n):
            k = torch.tensor(members)
            for place in range(n):
                yield PRIOR[k].prod() / n * near[:, k[place]], stable(ATOMS[k], place if anchored else None)

    assert_unbiased(draws(), true_mean(ATOMS, PRIOR))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_unbiased_with_references_drawn_without_replacement(n: int) -> None:
    near = likelihood(DATA)

    def draws() -> Iterator[tuple[Tensor, Tensor]]:
        for members in permutations(range(5), n):
            k = torch.tensor(members)
            for place in range(n):
                yield near[:, k[place]], stable(DATA[k], place)

    assert_unbiased(draws(), true_mean(DATA, uniform(5)))


@pytest.mark.parametrize("row", [0, 1, 2])
def test_unbiased_for_each_row_of_a_batch_that_is_its_own_reference_set(row: int) -> None:
    process = sf.VP()
    target = sf.StableTarget(process, references=sf.InBatch())
    t = process.time(torch.tensor([SIGMA / ALPHA], dtype=torch.float64)).expand(3)
    alpha, sigma = process.alpha(t)[0].item(), process.sigma(t)[0].item()
    near = likelihood(ATOMS, alpha, sigma)

    def draws() -> Iterator[tuple[Tensor, Tensor]]:
        for members in product(range(3), repeat=3):
            k = torch.tensor(members)
            found = []
            for x in X_T:
                x_t = alpha * ATOMS[k][:, None] + 0.3
                x_t[row] = x
                found.append(target(ATOMS[k][:, None], x_t, t).x0[row, 0])
            yield PRIOR[k].prod() * near[:, k[row]], torch.stack(found)

    assert_unbiased(draws(), true_mean(ATOMS, PRIOR, alpha, sigma))


@pytest.mark.parametrize("row", [0, 1, 2, 3])
def test_unbiased_with_references_from_a_batch_that_holds_each_image_equally_often(row: int) -> None:
    """Two images, which may be the same atom, with two rows each, through the objective that repeats them."""
    process = sf.EDM()
    target = sf.StableTarget(process, references=sf.InBatch(), validate_args=False)
    objective = sf.Objective(process, target=target, draws_per_image=2)
    t = torch.full((4,), SIGMA, dtype=torch.float64)
    near = likelihood(ATOMS, 1.0, SIGMA)

    def draws() -> Iterator[tuple[Tensor, Tensor]]:
        for members in product(range(3), repeat=2):
            k = torch.tensor(members).repeat_interleave(2)
            found = []
            for x in X_T:
                noise = torch.full((4, 1), 0.3, dtype=torch.float64)
                noise[row] = (x - ATOMS[k[row]]) / SIGMA
                found.append(objective.example(ATOMS[k][:, None], DrawnRows(t, noise, None, None)).target.x0[row, 0])
            yield PRIOR[list(members)].prod() * near[:, k[row]], torch.stack(found)

    assert_unbiased(draws(), true_mean(ATOMS, PRIOR, 1.0, SIGMA))


def test_references_from_a_batch_with_each_image_k_times_are_those_of_the_images(rng: torch.Generator) -> None:
    """Images of two classes, dropped labels, flips and rows with their source only: against the set without copies."""
    process, k = sf.EDM(), 3
    images = torch.randn(8, 1, 2, 3, generator=rng, dtype=torch.float64)
    classes = torch.arange(8) % 2
    x0, truth = images.repeat_interleave(k, 0), classes.repeat_interleave(k)
    flip = (torch.rand(8, generator=rng) < 0.5).repeat_interleave(k)
    alone = (torch.arange(8) == 5).repeat_interleave(k)
    seen = torch.where(torch.rand(8 * k, generator=rng) < 0.3, -1, truth)
    shown = torch.where(flip[:, None, None, None], x0.flip(-1), x0)
    x_t = process.perturb(shown, 1.5, generator=rng)
    stable = sf.StableTarget(process, references=sf.InBatch())
    found = stable(shown, x_t, 1.5, seen, reference_labels=truth, flip=flip, source_only=alone).x0
    unflipped = torch.where(flip[:, None, None, None], x_t.flip(-1), x_t)
    others = torch.arange(8) != 5
    plain = sf.posterior(unflipped, 1.0, 1.5, images[others], None, seen, classes[others]).mean
    expected = torch.where(flip[:, None, None, None], plain.flip(-1), plain)
    expected = torch.where(alone[:, None, None, None], shown, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_unbiased_over_all_sets_that_a_pool_can_draw(size: int) -> None:
    # Two sources of a batch, perhaps the same sample, and all equally likely completions of the set by other samples.
    near = likelihood(DATA)

    def draws() -> Iterator[tuple[Tensor, Tensor]]:
        for first, second in product(range(5), repeat=2):
            own = sorted({first, second})
            completions = list(combinations([k for k in range(5) if k not in own], size - len(own)))
            for others in completions:
                members = [*own, *others]
                yield near[:, first] / len(completions), stable(DATA[members], members.index(first))

    assert_unbiased(draws(), true_mean(DATA, uniform(5)))


@pytest.mark.parametrize(("band", "averages"), [(0.79, True), (0.8, True), (0.81, False)])
def test_unbiased_on_both_sides_of_the_noise_band(band: float, averages: bool) -> None:
    target = sf.StableTarget(sf.EDM(), references=sf.InBatch(), noise_band=band)
    near = likelihood(ATOMS, 1.0, 0.8)
    t = torch.full((2,), 0.8, dtype=torch.float64)
    largest = []

    def draws() -> Iterator[tuple[Tensor, Tensor]]:
        for members in product(range(3), repeat=2):
            k = torch.tensor(members)
            found = [target(ATOMS[k][:, None], torch.stack([x, ATOMS[k[1]]])[:, None], t) for x in X_T]
            largest.extend(f.ess[0].item() for f in found)
            yield PRIOR[k].prod() * near[:, k[0]], torch.stack([f.x0[0, 0] for f in found])

    assert_unbiased(draws(), true_mean(ATOMS, PRIOR, 1.0, 0.8))
    assert (max(largest) > 1.5) == averages


# Two classes, one atom in both: (value, class, joint probability).
VALUE = torch.tensor([-1.0, 0.3, 0.3, 2.0], dtype=torch.float64)
LABEL = torch.tensor([0, 0, 1, 1])
SHARE = torch.tensor([0.2, 0.3, 0.1, 0.4], dtype=torch.float64)


def labelled_draws(labels: int, restricted: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """All draws of three labelled references and a source that a row of `labels` can have come from (-1: any)."""
    near = likelihood(VALUE)
    for members in product(range(4), repeat=3):
        k = torch.tensor(members)
        groups = (torch.full((5,), labels), LABEL[k]) if restricted else (None, None)
        for place in range(3):
            if labels in (-1, int(LABEL[k[place]])):
                found = sf.posterior(X_T[:, None], ALPHA, SIGMA, VALUE[k][:, None], torch.full((5,), place), *groups)
                yield SHARE[k].prod() * near[:, k[place]], found.mean[:, 0]


@pytest.mark.parametrize("label", [0, 1])
def test_unbiased_given_the_class_when_the_row_uses_references_of_its_class(label: int) -> None:
    own = label == LABEL
    assert_unbiased(labelled_draws(label, restricted=True), true_mean(VALUE[own], SHARE[own]))


def test_unbiased_without_the_class_when_the_row_uses_references_of_all_classes() -> None:
    assert_unbiased(labelled_draws(-1, restricted=True), true_mean(VALUE, SHARE))


# The four violations: each moves the expectation by far more than the 1e-13 to which the rule holds.


@pytest.mark.parametrize("label", [0, 1])
def test_biased_when_references_of_another_class_are_mixed_in(label: int) -> None:
    own = label == LABEL
    bias = expectation(labelled_draws(label, restricted=False)) - true_mean(VALUE[own], SHARE[own])
    assert bias.abs().min() > 0.02


@pytest.mark.parametrize(("n", "expected"), [(1, 0.550), (2, 0.248), (3, 0.182)])
def test_biased_when_the_source_is_left_out(n: int, expected: float) -> None:
    # Figures of an independent enumeration at alpha = 1, sigma = 0.8, x_t = 0.1, where the truth is 0.178257.
    x_t = torch.tensor([[0.1]], dtype=torch.float64)
    mean = 0.0
    for members in product(range(3), repeat=n):
        k = torch.tensor(members)
        mean += float(PRIOR[k].prod() * sf.posterior(x_t, 1.0, 0.8, ATOMS[k][:, None]).mean[0, 0])
    assert mean == pytest.approx(expected, abs=5e-4)
    assert abs(mean - 0.178257) > 0.003


def test_biased_when_neighbours_are_picked_without_importance_weights() -> None:
    # The source and the two data nearest to x_t: the set depends on x_t, so its members are not exchangeable.
    near = likelihood(DATA)
    nearest = (X_T[:, None] - ALPHA * DATA).abs().argsort(1)[:, :2]

    def draws() -> Iterator[tuple[Tensor, Tensor]]:
        for k in range(5):
            sets = [sorted({k, *nearest[row].tolist()}) for row in range(5)]
            found = [stable(DATA[members], members.index(k))[row] for row, members in enumerate(sets)]
            yield near[:, k], torch.stack(found)

    bias = expectation(draws()) - true_mean(DATA, uniform(5))
    assert bias.abs().max() > 0.05


def test_biased_when_the_source_is_held_twice() -> None:
    near = likelihood(ATOMS)

    def draws() -> Iterator[tuple[Tensor, Tensor]]:
        for members in product(range(3), repeat=2):
            k = torch.tensor(members)
            yield PRIOR[k].prod() * near[:, k[0]], stable(ATOMS[k[[0, 0, 1]]], 0)

    bias = expectation(draws()) - true_mean(ATOMS, PRIOR)
    assert bias.abs().min() > 0.004
    assert bias.abs().max() > 0.02


@pytest.mark.parametrize("given", ["labels", "source_only", "nothing"])
def test_masked_data_are_unbiased_given_the_mask_as_the_label_or_with_the_source_only(given: str) -> None:
    """Rows of one or two numbers, padded with zeros; each row of x_t has noise in its own numbers only."""
    data = torch.tensor([[-1.0, 0.5], [0.3, 2.0], [0.8, 0.0], [1.5, 0.0]], dtype=torch.float64)
    masks = torch.tensor([0, 0, 1, 1])
    references = sf.Pool(data, labels=masks if given == "labels" else None)
    target = sf.StableTarget(sf.EDM(), references=references, validate_args=False)
    worst = 0.0
    for mask, x_t in ((0, [0.2, 0.7]), (1, [1.1, 0.0])):
        members = (masks == mask).nonzero()[:, 0]
        x = torch.tensor([x_t], dtype=torch.float64)
        density = torch.exp(-(x - data[members]).square().sum(1) / (2 * SIGMA**2))[:, None]
        options = {
            "labels": {"labels": masks[members]},
            "source_only": {"source_only": torch.ones(2, dtype=torch.bool)},
            "nothing": {},
        }[given]
        found = target(data[members], x.repeat(2, 1), SIGMA, index=members, **options).x0
        gap = (density * (found - data[members])).sum(0) / density.sum()
        worst = max(worst, float(gap.abs().max()))
    assert (worst < 1e-13) == (given != "nothing")
    assert given != "nothing" or worst > 0.1


@pytest.mark.parametrize("given", ["labels", "source_only", "nothing"])
def test_a_condition_of_each_row_is_exact_with_the_source_only_and_biased_with_nothing(given: str) -> None:
    """The network sees the first number of each sample without noise, as in inpainting."""
    data = torch.cartesian_prod(torch.tensor([-1.0, 1.0]), torch.tensor([-0.5, 0.2, 2.0])).double()
    data[:3, 1] += 0.4  # the second number depends on the first
    labels = (data[:, 0] > 0).long()
    target = sf.StableTarget(
        sf.EDM(), references=sf.Pool(data, labels=labels if given == "labels" else None), validate_args=False
    )
    x = torch.tensor([[0.3, 0.9]], dtype=torch.float64)
    members = (labels == 1).nonzero()[:, 0]
    density = torch.exp(-(x - data[members]).square().sum(1) / (2 * SIGMA**2))
    truth = density @ data[members] / density.sum()
    options = {
        "labels": {"labels": labels[members]},
        "source_only": {"source_only": torch.ones(3, dtype=torch.bool)},
        "nothing": {},
    }[given]
    found = density @ target(data[members], x.repeat(3, 1), SIGMA, index=members, **options).x0 / density.sum()
    assert (float((found - truth).abs().max()) < 1e-13) == (given != "nothing")
    assert given != "nothing" or float((found - truth).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("loss", "kept"),
    [
        (lambda gap: gap.square(), True),
        (lambda gap: 3 * gap.square(), True),
        (lambda gap: gap.abs(), False),
        (lambda gap: torch.nn.functional.huber_loss(gap, torch.zeros_like(gap), delta=0.1, reduction="none"), False),
    ],
    ids=["squared", "weighted", "absolute", "Huber"],
)
def test_squared_errors_alone_keep_their_optimum(loss, kept: bool) -> None:
    """70 samples at -1 and 30 at 1 at a noise level where nothing can be told: the best constant by a fine grid."""
    data = torch.cat([-torch.ones(70), torch.ones(30)]).double()[:, None]
    generator = torch.Generator().manual_seed(0)
    x_t = data + 1e4 * torch.randn(100, 1, generator=generator, dtype=torch.float64)
    stable = sf.StableTarget(sf.EDM(), references=sf.Pool(data))(data, x_t, 1e4, index=torch.arange(100)).x0
    guesses = torch.linspace(-1.5, 1.5, 3001, dtype=torch.float64)
    of_single, of_stable = (guesses[loss(guesses - target).mean(0).argmin()] for target in (data, stable))
    assert float(of_stable) == pytest.approx(-0.4, abs=2e-3)
    assert (abs(float(of_single - of_stable)) < 3e-3) == kept
