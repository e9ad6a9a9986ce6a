"""Subsets for rows without a label, flipped samples, rows drawn anew and likelihoods of conditions, by enumeration.

As in `test_unbiased_by_enumeration`: over all sources and all sets that can be drawn, each with its probability, the mean of
the targets at a fixed x_t is the posterior mean of the prior.
"""

from collections.abc import Iterator
from itertools import combinations, product

import pytest
import torch
from torch import Tensor

import stablefield as sf
from stablefield.targets import _pool as pools
from stablefield.targets._engine.label_index import LabelIndex

DATA = torch.tensor([[-1.0, 0.2], [0.1, 0.4], [0.8, -0.5], [1.5, 1.0]], dtype=torch.float64)
FLIPPED = torch.tensor([[0.3, -1.2], [0.5, 0.6], [-0.9, 0.7], [1.1, 1.4]], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 5.0, 2.0, 0.5], dtype=torch.float64)
LABELS = torch.tensor([0, 0, 1, 1])
X_T = torch.tensor([[-0.4, 0.3], [0.6, 0.1], [1.2, -1.0]], dtype=torch.float64)
SIGMA = 0.8

Draw = tuple[float, Tensor, Tensor]


def density(samples: Tensor) -> Tensor:
    """N(x_t; sample, sigma^2) up to a constant, shape (3, n)."""
    return torch.exp(-(X_T[:, None] - samples).square().sum(2) / (2 * SIGMA**2))


def truth(samples: Tensor, prior: Tensor) -> Tensor:
    joint = density(samples) * prior
    return joint @ samples / joint.sum(1, keepdim=True)


def expectation(draws: Iterator[Draw]) -> Tensor:
    """Mean of the targets (3, 2) of draws (probability, source (2,), targets), given each x_t."""
    total, mass = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    for probability, source, found in draws:
        weight = probability * density(source[None])
        total, mass = total + weight * found, mass + weight
    return total / mass


def stable(pool: sf.Pool) -> sf.StableTarget:
    return sf.StableTarget(sf.EDM(), references=pool, validate_args=False)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_unbiased_over_the_subsets_that_rows_without_a_label_use(
    size: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = WEIGHTS if weighted else None
    prior = WEIGHTS / WEIGHTS.sum() if weighted else torch.full((4,), 0.25, dtype=torch.float64)
    target = stable(sf.Pool(DATA, labels=LABELS, unlabelled_size=size, weights=weights))
    drawn: list[int] = []
    monkeypatch.setattr(pools, "drawn_subset", lambda *_: torch.tensor(drawn))
    found: dict[int, list[Draw]] = {-1: [], 1: []}
    for source, chosen in product(range(4), combinations(range(4), size)):
        drawn[:] = chosen
        # Rows with and without a label in one batch, in turns.
        index = torch.tensor([source] * 6)
        own = int(LABELS[source])
        labels = torch.tensor([-1, own] * 3)
        means = target(DATA[index], X_T.repeat_interleave(2, 0), SIGMA, labels, index).x0
        found[-1].append((float(prior[source]), DATA[source], means[::2]))
        if own == 1:
            found[1].append((float(prior[source]), DATA[source], means[1::2]))
    torch.testing.assert_close(expectation(iter(found[-1])), truth(DATA, prior), rtol=0, atol=1e-12)
    # Rows with a label use all references of it, whatever was drawn.
    torch.testing.assert_close(expectation(iter(found[1])), truth(DATA[2:], prior[2:]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_unbiased_over_the_subsets_of_their_label_that_rows_use(
    size: int, weighted: bool, flipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = torch.tensor([1, 0, 1, 1])
    weights = WEIGHTS if weighted else None
    prior = WEIGHTS / WEIGHTS.sum() if weighted else torch.full((4,), 0.25, dtype=torch.float64)
    other = FLIPPED if flipped else None
    target = stable(sf.Pool(DATA, labels=labels, label_size=size, weights=weights, flipped=other))
    members = [0, 2, 3]
    drawn: list[int] = []
    monkeypatch.setattr(LabelIndex, "drawn", lambda *_: torch.tensor(drawn))
    found: list[Draw] = []
    free: list[Draw] = []
    for source, chosen, flip in product(members, combinations(members, size), (False, True) if flipped else (False,)):
        drawn[:] = chosen
        index = torch.tensor([source] * 6)
        x0 = (FLIPPED if flip else DATA)[index]
        given = torch.tensor([flip] * 6) if flipped else None
        means = target(x0, X_T.repeat_interleave(2, 0), SIGMA, torch.tensor([1, -1] * 3), index, flip=given).x0
        found.append((float(prior[source]), x0[0], means[::2]))
        free.append((float(prior[source]), x0[0], means[1::2]))
    samples, shares = DATA[members], prior[members]
    if flipped:
        samples, shares = torch.cat([samples, FLIPPED[members]]), shares.repeat(2)
    torch.testing.assert_close(expectation(iter(found)), truth(samples, shares), rtol=0, atol=1e-12)
    # Rows without a label use all samples, the other label's, too.
    every, all_shares = (DATA, prior) if not flipped else (torch.cat([DATA, FLIPPED]), prior.repeat(2))
    torch.testing.assert_close(free[0][2], truth(every, all_shares), rtol=0, atol=1e-12)


def test_references_of_a_label_are_drawn_uniformly_and_without_replacement(rng: torch.Generator) -> None:
    labels = torch.tensor([5] * 6 + [2] * 3 + [7] * 4)[torch.randperm(13, generator=rng)]
    index, counts = LabelIndex(labels), torch.zeros(13)
    for seed in range(4000):
        chosen = index.drawn(torch.tensor([5, 2, 5, -1, 9]), 4, seed)
        assert len(chosen.unique()) == len(chosen) == 7
        counts[chosen] += 1
    assert counts[labels == 7].sum() == 0
    assert (counts[labels == 2] == 4000).all()
    # 5 standard deviations of a binomial count.
    assert ((counts[labels == 5] - 4000 * 4 / 6).abs() < 5 * (4000 * (4 / 6) * (2 / 6)) ** 0.5).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label", [None, -1, 1])
@pytest.mark.parametrize("size", [None, 2, 3])
def test_unbiased_over_flipped_samples(
    size: int | None, label: int | None, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = WEIGHTS if weighted else None
    prior = WEIGHTS / WEIGHTS.sum() if weighted else torch.full((4,), 0.25, dtype=torch.float64)
    pool = sf.Pool(DATA, size, None if label is None else LABELS, flipped=FLIPPED, weights=weights)
    target = stable(pool)
    drawn: list[int] = []

    def others(n: int, own: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
        return torch.tensor(drawn, dtype=torch.long)

    monkeypatch.setattr("stablefield.targets._subset.others", others)
    monkeypatch.setattr(pools, "others", others)

    def draws() -> Iterator[Draw]:
        for source, flip in product(range(4), (False, True)):
            if label == 1 and LABELS[source] != 1:
                continue
            if size is None:
                sets = [()]
            elif weighted:
                sets = list(combinations(range(4), size))
            else:
                sets = list(combinations([k for k in range(4) if k != source], size - 1))
            for chosen in sets:
                drawn[:] = chosen
                index = torch.tensor([source] * 3)
                x0 = (FLIPPED if flip else DATA)[index]
                labels = None if label is None else torch.tensor([label] * 3)
                found = target(x0, X_T, SIGMA, labels, index, flip=torch.tensor([flip] * 3)).x0
                yield float(prior[source]) / len(sets), x0[0], found

    members = LABELS == 1 if label == 1 else torch.ones(4, dtype=torch.bool)
    samples = torch.cat([DATA[members], FLIPPED[members]])
    torch.testing.assert_close(expectation(draws()), truth(samples, prior[members].repeat(2)), rtol=0, atol=1e-12)


# Each sample is one of two values, equally likely: a draw of its latent.
VALUES = torch.stack([DATA[:3], DATA[:3] + torch.tensor([[0.5, -0.3], [-0.2, 0.6], [0.4, 0.1]], dtype=torch.float64)])


def resampled_draws(stored: tuple[int, ...], weights: Tensor, flipped: bool) -> Iterator[Draw]:
    """All sources and their draws, for the draws that the pool has stored."""
    data = torch.stack([VALUES[which, k] for k, which in enumerate(stored[:3])])
    other = torch.stack([VALUES[which, k].flip(-1) for k, which in enumerate(stored[3:])]) if flipped else None
    target = stable(sf.Pool(data, resampled=True, weights=weights, flipped=other))
    for source, which, flip in product(range(3), range(2), (False, True) if flipped else (False,)):
        index = torch.tensor([source] * 3)
        x0 = VALUES[which, index].flip(-1) if flip else VALUES[which, index]
        given = torch.tensor([flip] * 3) if flipped else None
        yield float(weights[source]), x0[0], target(x0, X_T, SIGMA, index=index, flip=given).x0


@pytest.mark.parametrize("flipped", [False, True])
def test_unbiased_over_the_draws_of_rows_that_are_drawn_anew(flipped: bool) -> None:
    weights = WEIGHTS[:3]
    atoms = torch.cat([VALUES, VALUES.flip(-1)]) if flipped else VALUES
    expected = truth(atoms.flatten(0, 1), weights.repeat(len(atoms)))
    sets = list(product(range(2), repeat=6 if flipped else 3))
    every = (draw for stored in sets for draw in resampled_draws(stored, weights, flipped))
    torch.testing.assert_close(expectation(every), expected, rtol=0, atol=1e-12)
    # Not for one stored set: what is stored has to be drawn anew now and then.
    fixed = expectation(resampled_draws(sets[0], weights, flipped)) - expected
    assert fixed.abs().max() > 0.01


# p(condition | sample) of three conditions.
CONDITIONS = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4], [0.0, 0.5, 0.5]], dtype=torch.float64)


@pytest.mark.parametrize("kind", ["plain", "weighted", "mirrored", "flipped", "size", "labels"])
@pytest.mark.parametrize("condition", [0, 1, 2])
def test_unbiased_given_conditions_of_known_likelihood(
    condition: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = WEIGHTS / WEIGHTS.sum() if kind == "weighted" else torch.full((4,), 0.25, dtype=torch.float64)
    pool = sf.Pool(
        DATA,
        2 if kind == "size" else None,
        LABELS if kind == "labels" else None,
        mirrored=kind == "mirrored",
        flipped=FLIPPED if kind == "flipped" else None,
        weights=WEIGHTS if kind == "weighted" else None,
    )
    target = stable(pool)
    drawn: list[int] = []
    monkeypatch.setattr("stablefield.targets._subset.others", lambda *_: torch.tensor(drawn, dtype=torch.long))

    def log_likelihood(rows: Tensor, references: Tensor) -> Tensor:
        # Up to a constant for each row.
        return CONDITIONS[references, condition].log()[None] + rows[:, None].double()

    def draws() -> Iterator[Draw]:
        for source, flip in product(range(4), (False, True) if kind in ("mirrored", "flipped") else (False,)):
            label = int(LABELS[source])
            if not CONDITIONS[source, condition] or (kind == "labels" and label == 0):
                continue
            for chosen in [(k,) for k in range(4) if k != source] if kind == "size" else [()]:
                drawn[:] = chosen
                index = torch.tensor([source] * 3)
                x0 = DATA[index]
                if flip:
                    x0 = FLIPPED[index] if kind == "flipped" else x0.flip(-1)
                found = target(
                    x0,
                    X_T,
                    SIGMA,
                    torch.tensor([label] * 3) if kind == "labels" else None,
                    index,
                    flip=torch.tensor([flip] * 3) if kind in ("mirrored", "flipped") else None,
                    approximate_log_likelihood=log_likelihood,
                )
                share = 1 / 3 if kind == "size" else 1.0
                yield float(prior[source] * CONDITIONS[source, condition]) * share, x0[0], found.x0

    samples, shares = DATA, prior * CONDITIONS[:, condition]
    if kind == "labels":
        samples, shares = DATA[2:], shares[2:]
    if kind in ("mirrored", "flipped"):
        samples, shares = torch.cat([DATA, FLIPPED if kind == "flipped" else DATA.flip(-1)]), shares.repeat(2)
    torch.testing.assert_close(expectation(draws()), truth(samples, shares), rtol=0, atol=1e-12)


def test_a_wrong_likelihood_makes_the_target_wrong() -> None:
    target = stable(sf.Pool(DATA))

    def draws(power: float) -> Iterator[Draw]:
        for source in range(4):
            index = torch.tensor([source] * 3)
            found = target(
                DATA[index],
                X_T,
                SIGMA,
                index=index,
                approximate_log_likelihood=lambda rows, k: (power * CONDITIONS[k, 1].log()).expand(len(rows), -1),
            )
            yield float(CONDITIONS[source, 1]), DATA[source], found.x0

    right = truth(DATA, CONDITIONS[:, 1])
    torch.testing.assert_close(expectation(draws(1.0)), right, rtol=0, atol=1e-12)
    assert (expectation(draws(3.0)) - right).abs().max() > 0.05
