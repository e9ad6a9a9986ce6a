"""Batches whose rows lie together bias a drawn set of references, by enumeration; and a pool notices them, and no others."""

import warnings
from collections.abc import Iterator
from itertools import combinations

import pytest
import torch
from torch import Tensor

import stablefield as sf
from stablefield.targets import _pool as pools
from stablefield.targets import _subset as subsets
from stablefield.targets._spread import Spread

DATA = torch.tensor([[-1.0, 0.2], [0.1, 0.4], [0.8, -0.5], [1.5, 1.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 0, 1, 1])
X_T = torch.tensor([[-0.4, 0.3], [0.6, 0.1]], dtype=torch.float64)
SIGMA = 0.8
RANDOM, BY_CLASS = list(combinations(range(4), 2)), [(0, 1), (2, 3)]


def bias(batches: list[tuple[int, int]], seen: str, weights: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> float:
    """The largest error of E[target | x_t], over equally likely batches, their rows and the drawn references."""
    pool = sf.Pool(DATA, 3 if weights is None else 2, None if seen == "none" else LABELS, weights=weights)
    stable = sf.StableTarget(sf.EDM(), references=pool, validate_args=False)
    worst = 0.0
    for label in (0, 1) if seen == "seen" else (None,):
        total, truth = torch.zeros(2, 2, 2, dtype=torch.float64)
        mass = torch.zeros(2, 1, dtype=torch.float64)
        for batch in batches:
            drawn = list(combinations(range(4), 2))
            if weights is None:
                drawn = [(k,) for k in range(4) if k not in batch]
            for (source, mate), others in ((rows, others) for rows in (batch, batch[::-1]) for others in drawn):
                if label is not None and LABELS[source] != label:
                    continue
                for module in (pools, subsets):
                    monkeypatch.setattr(module, "others", lambda *_, others=others: torch.tensor(others))
                index = torch.tensor([source, source, mate])
                labels = {"none": None, "seen": LABELS[index], "dropped": torch.full((3,), -1)}[seen]
                x_t = torch.cat([X_T, DATA[mate : mate + 1] + 0.3])
                found = stable(DATA[index], x_t, SIGMA, labels, index).x0[:2]
                near = torch.exp(-(X_T - DATA[source]).square().sum(1, keepdim=True) / (2 * SIGMA**2)) / len(drawn)
                total, truth, mass = total + near * found, truth + near * DATA[source], mass + near
        worst = max(worst, float(((total - truth) / mass).abs().max()))
    return worst


@pytest.mark.parametrize(
    ("batches", "seen", "weighted", "biased"),
    [
        (RANDOM, "none", False, False),
        (RANDOM, "seen", False, False),
        (RANDOM, "dropped", False, False),
        (BY_CLASS, "none", False, True),
        (BY_CLASS, "dropped", False, True),
        (BY_CLASS, "seen", False, False),
        (BY_CLASS, "none", True, False),
        (BY_CLASS, "dropped", True, False),
    ],
)
def test_only_rows_that_meet_the_whole_batch_are_biased_and_weights_mend_it(
    batches: list[tuple[int, int]], seen: str, weighted: bool, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = bias(batches, seen, torch.ones(4) if weighted else None, monkeypatch)
    assert found > 0.05 if biased else found < 1e-12


N, ROWS = 2000, 32
CLASSES = torch.arange(N) // 200
MIXED = torch.randperm(N, generator=torch.Generator().manual_seed(3))


def of_one_class(labels: Tensor, rng: torch.Generator) -> Iterator[Tensor]:
    """Batches of one class; every sample comes equally often."""
    while True:
        parts = [part for k in range(10) for part in mixed((labels == k).nonzero()[:, 0], rng).split(ROWS)]
        yield from (parts[k] for k in torch.randperm(len(parts), generator=rng))


def mixed(values: Tensor, rng: torch.Generator) -> Tensor:
    return values[torch.randperm(len(values), generator=rng)]


def buffered(size: int, rng: torch.Generator) -> Iterator[Tensor]:
    """A shuffle buffer over the samples in their order."""
    stream = iter(torch.arange(N).repeat(50).tolist())
    held = [next(stream) for _ in range(size)]
    while True:
        batch = []
        for _ in range(ROWS):
            place = int(torch.randint(size, (), generator=rng))
            batch.append(held[place])
            held[place] = next(stream)
        yield torch.tensor(batch)


def epochs(values: Tensor, rng: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from mixed(values, rng).split(ROWS)


def warned(
    batches: Iterator[Tensor],
    rng: torch.Generator,
    labels: Tensor | None = None,
    dropped: float = 0.0,
    steps: int = 70,
    **options: object,
) -> list[str]:
    """The warnings of a run."""
    data = torch.randn(N, 3, generator=rng)
    stable = sf.StableTarget(sf.EDM(), references=sf.Pool(data, labels=labels, **{"size": 64, **options}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            index = next(batches)
            seen = None
            if labels is not None:
                seen = torch.where(torch.rand(len(index), generator=rng) < dropped, -1, labels[index])
            stable(data[index], sf.EDM().perturb(data[index], 1.0, generator=rng), 1.0, seen, index, generator=rng)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("loader", ["one class", "in order", "a small buffer"])
def test_batches_that_lie_together_are_warned_of_once(loader: str, rng: torch.Generator) -> None:
    batches = {
        "one class": lambda: of_one_class(CLASSES, rng),
        "in order": lambda: iter(torch.arange(N).repeat(5).split(ROWS)),
        "a small buffer": lambda: buffered(300, rng),
    }[loader]
    found = warned(batches(), rng)
    assert len(found) == 1
    for part in ("no random subsets of the Pool", "size=64", r"weights=torch.ones(2000)", "in random order"):
        assert part in found[0]
    for options in ({"weights": torch.ones(N)}, {"size": None}, {"size": N}):
        assert warned(batches(), rng, **options) == []


def test_batches_of_one_class_of_mixed_data_show_where_a_label_is_dropped(rng: torch.Generator) -> None:
    labels = CLASSES[MIXED]
    assert warned(of_one_class(labels, rng), rng, labels) == []
    found = warned(of_one_class(labels, rng), rng, labels, dropped=0.1)
    assert len(found) == 1
    assert "in the order of the labels" in found[0]
    # Rows that see their label: batches in the order of the pool, within each label.
    assert len(warned(iter(torch.arange(N).split(ROWS)), rng, labels, steps=60)) == 1


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(
    "loader", ["epochs", "with replacement", "pairs", "a rank's share", "two batches", "one batch"]
)
def test_random_batches_are_not_warned_of(loader: str, labelled: bool, rng: torch.Generator) -> None:
    def pairs() -> Iterator[Tensor]:
        for index in epochs(torch.arange(N), rng):
            yield index[: ROWS // 2].repeat(2)

    batches = {
        "epochs": epochs(torch.arange(N), rng),
        "with replacement": iter(lambda: torch.randint(N, (ROWS,), generator=rng), None),
        "pairs": pairs(),
        "a rank's share": epochs(MIXED[1::4], rng),
        "two batches": epochs(torch.arange(2 * ROWS), rng),
        "one batch": epochs(torch.arange(ROWS), rng),
    }[loader]
    labels = CLASSES if labelled else None
    assert warned(batches, rng, labels, 0.1) == []


def test_the_squares_of_random_batches_are_chi_square_at_most(rng: torch.Generator) -> None:
    """Their mean over many runs is 1 within four standard errors, or below 1 in epochs and in small labels."""
    for n, rows, labels, epoch in (
        (400, 8, None, False),
        (400, 8, None, True),
        (400, 32, torch.arange(400) % 7, False),
        (60, 4, torch.arange(60) // 3, False),
    ):
        squares, batches = torch.zeros(2), torch.zeros(2)
        for _ in range(150):
            spread = Spread(n, 1, labels)
            order = torch.randperm(n, generator=rng)
            for part in order.split(rows):
                index = part if epoch else torch.randint(n, (rows,), generator=rng)
                labelled = None if labels is None else torch.rand(rows, generator=rng) < 0.7
                assert spread.add(index, labelled, torch.ones(rows, dtype=torch.bool)) is None
            squares, batches = squares + torch.tensor(spread._squares), batches + torch.tensor(spread._batches)
        for square, count in zip(squares, batches, strict=True):
            if count:
                assert square / count < 1 + 4 * (2 / count) ** 0.5
                assert square / count > (0.5 if labels is not None else 0.85)


def test_a_tiny_pool_is_never_warned_of(rng: torch.Generator) -> None:
    for n in (2, 3, 10):
        for _ in range(50):
            spread = Spread(n, 1, None)
            for _ in range(30):
                index = torch.randint(n, (1,), generator=rng)
                assert spread.add(index, None, torch.ones(1, dtype=torch.bool)) is None
