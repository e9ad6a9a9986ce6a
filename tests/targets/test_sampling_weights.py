"""A pool with weights is the prior of samples that are not drawn uniformly: by enumeration; other draws are noticed."""

import math
import warnings
from collections.abc import Iterator
from itertools import combinations, product

import pytest
import torch
from torch import Tensor

import stablefield as sf
from stablefield.targets import _pool as pools

DATA = torch.tensor([[-1.0, 0.2], [0.1, 0.4], [0.8, -0.5], [1.5, 1.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 5.0, 2.0, 0.5], dtype=torch.float64)
PRIOR = WEIGHTS / WEIGHTS.sum()
LABELS = torch.tensor([0, 0, 1, 1])
X_T = torch.tensor([[-0.4, 0.3], [0.6, 0.1], [1.2, -1.0]], dtype=torch.float64)
SIGMA = 0.8


def density(samples: Tensor) -> Tensor:
    """N(x_t; sample, sigma^2) up to a constant, shape (3, n)."""
    return torch.exp(-(X_T[:, None] - samples).square().sum(2) / (2 * SIGMA**2))


def truth(samples: Tensor, prior: Tensor) -> Tensor:
    joint = density(samples) * prior
    return joint @ samples / joint.sum(1, keepdim=True)


@pytest.mark.parametrize("mirrored", [False, True], ids=["plain", "mirrored"])
@pytest.mark.parametrize("seen", ["none", "labels", "dropped"])
@pytest.mark.parametrize("size", [None, 1, 2, 3])
def test_the_target_has_the_expectation_of_the_weighted_prior(
    size: int | None, seen: str, mirrored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over sources, a batch mate, flips and all sets that can be drawn, each with its probability."""
    pool = sf.Pool(DATA, size, None if seen == "none" else LABELS, mirrored=mirrored, weights=7 * WEIGHTS)
    stable = sf.StableTarget(sf.EDM(), references=pool, validate_args=False)
    label = None if seen == "none" else -1 if seen == "dropped" else 1
    drawn: list[int] = []
    monkeypatch.setattr(pools, "others", lambda *_: torch.tensor(drawn))
    sets = [()] if size is None else list(combinations(range(4), size))
    flips = (False, True) if mirrored else (False,)
    total, mass = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    for (source, mate), chosen, flip in product(product(range(4), repeat=2), sets, flips):
        if label == 1 and LABELS[source] != 1:
            continue
        drawn[:] = chosen
        index = torch.tensor([source] * 3 + [mate])
        x0 = DATA[index]
        x0[:3] = x0[:3].flip(-1) if flip else x0[:3]
        labels = None if label is None else torch.tensor([label] * 3 + [int(LABELS[mate])])
        flags = torch.tensor([flip] * 3 + [False])
        x_t = torch.cat([X_T, DATA[mate : mate + 1] + 0.3])
        found = stable(x0, x_t, SIGMA, labels, index, flip=flags if mirrored else None).x0[:3]
        weight = PRIOR[source] * PRIOR[mate] * density(x0[:1])
        total, mass = total + weight * found, mass + weight
    members = LABELS == 1 if label == 1 else torch.ones(4, dtype=torch.bool)
    samples, prior = DATA[members], PRIOR[members]
    if mirrored:
        samples, prior = torch.cat([samples, samples.flip(-1)]), torch.cat([prior, prior])
    torch.testing.assert_close(total / mass, truth(samples, prior), rtol=0, atol=1e-12)


def test_a_class_balanced_sampler_needs_its_weights() -> None:
    """Atoms -1 (nine tenths of the pool) and +1, drawn equally often, at x_t = 0: the right mean is 0."""
    data = torch.tensor([-1.0] * 9 + [1.0], dtype=torch.float64)[:, None]
    balanced = torch.tensor([1 / 9] * 9 + [1.0])
    index = torch.tensor([0, 9])
    x_t = torch.zeros(2, 1, dtype=torch.float64)
    for weights, mean in ((balanced, 0.0), (None, -0.8)):
        stable = sf.StableTarget(sf.EDM(), references=sf.Pool(data, weights=weights), validate_args=False)
        found = stable(data[index], x_t, 1.0, index=index)
        torch.testing.assert_close(found.x0, torch.full_like(x_t, mean), rtol=0, atol=1e-7)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 300.0])
@pytest.mark.parametrize("size", [None, 1])
def test_drawing_in_proportion_to_loss_weights_has_the_minimiser_of_the_weighted_loss(
    size: int | None, sigma: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two atoms with loss weights 1 and 9, by enumeration of the source and of the references that can be drawn."""
    data = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    weights = torch.tensor([1.0, 9.0], dtype=torch.float64)
    x_t = sigma * torch.tensor([[-0.7], [0.0], [0.4]], dtype=torch.float64)
    near = torch.exp(-((x_t - data.T) ** 2) / (2 * sigma**2))
    # The zero of the derivative of sum_k w_k p(x_t | k) |D - x_k|^2.
    minimiser = (near * weights) @ data / (near @ weights)[:, None]

    def found(pool: sf.Pool, shares: Tensor) -> Tensor:
        """The minimiser of the loss on the target, if the atoms' shares of it are so."""
        stable = sf.StableTarget(sf.EDM(), references=pool, validate_args=False)
        total, mass = torch.zeros(3, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
        for source, drawn in product(range(2), range(2)):
            monkeypatch.setattr(pools, "others", lambda *_, drawn=drawn: torch.tensor([drawn]))
            index = torch.full((3,), source)
            share = shares[source] * near[:, source, None]
            total, mass = total + share * stable(data[index], x_t, sigma, index=index).x0, mass + share
        return total / mass

    # Weights in the sampler and none in the loss, or the other way round, have the same shares.
    torch.testing.assert_close(found(sf.Pool(data, size, weights=weights), weights), minimiser, rtol=0, atol=1e-12)
    if size is None:
        undone = found(sf.Pool(data), weights)
        torch.testing.assert_close(undone, near @ data / near.sum(1, keepdim=True), rtol=0, atol=1e-12)
        if sigma == 300:
            torch.testing.assert_close(minimiser[1], torch.tensor([0.8]).double(), rtol=0, atol=1e-5)
            assert undone.abs().max() < 0.003


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), r"weights have shape \(3,\).*\(4,\)"),
        (torch.tensor([1.0, -1.0, 1.0, 1.0]), "weights are -1 at sample 1"),
        (torch.tensor([1.0, 1.0, torch.nan, 1.0]), "weights are nan at sample 2"),
        (torch.zeros(4), "weights are all 0"),
    ],
)
def test_weights_that_are_no_probabilities_are_refused(weights: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sf.Pool(DATA, weights=weights)


def test_a_row_that_cannot_have_been_drawn_is_refused() -> None:
    pool = sf.Pool(DATA, weights=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match=r"index\[0\] is 1: its weight in the Pool is 0"):
        sf.StableTarget(sf.EDM(), references=pool)(DATA[1:2], DATA[1:2] + 0.5, 1.0, index=torch.tensor([1]))


N = 60
IMAGES = torch.arange(N, dtype=torch.float32)[:, None] * torch.ones(4)
CLASSES = (torch.arange(N) >= 45).long()


def run(pool: sf.Pool, batches: Iterator[tuple[Tensor, Tensor | None]], rng: torch.Generator, steps: int) -> list[str]:
    """The warnings of a run."""
    stable = sf.StableTarget(sf.EDM(), references=pool)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            index, labels = next(batches)
            x0 = IMAGES[index]
            stable(x0, sf.EDM().perturb(x0, 1.0, generator=rng), 1.0, labels, index)
    return [str(warning.message) for warning in caught]


def balanced(rng: torch.Generator) -> Tensor:
    return torch.multinomial(torch.where(CLASSES == 0, 1 / 45, 1 / 15), 64, replacement=True, generator=rng)


def uniform(rng: torch.Generator) -> Tensor:
    return torch.randint(N, (64,), generator=rng)


def test_draws_that_the_pool_does_not_expect_are_warned_of_once(rng: torch.Generator) -> None:
    cases = {
        "balanced": (sf.Pool(IMAGES), lambda: (balanced(rng), None), 40),
        "a part": (sf.Pool(IMAGES), lambda: (torch.randint(N // 2, (64,), generator=rng), None), 40),
        "weights that are not those of the sampler": (
            sf.Pool(IMAGES, weights=1.0 + CLASSES),
            lambda: (uniform(rng), None),
            125,
        ),
        "labels dropped by sample": (
            sf.Pool(IMAGES, labels=CLASSES),
            lambda: (index := uniform(rng), torch.where(index % 2 == 0, -1, CLASSES[index])),
            40,
        ),
    }
    for name, (pool, draw, steps) in cases.items():
        found = run(pool, iter(draw, None), rng, steps)
        assert len(found) == 1, name
        assert "were not drawn from the Pool as it assumes" in found[0]


def test_draws_that_it_expects_are_not_warned_of(rng: torch.Generator) -> None:
    def epochs() -> Iterator[tuple[Tensor, None]]:
        while True:
            yield from ((part, None) for part in torch.randperm(N, generator=rng).split(30))

    half = torch.rand(10_000, generator=rng) < 0.5

    def dropped() -> tuple[Tensor, Tensor]:
        index = uniform(rng)
        return index, torch.where(half[torch.randint(10_000, (64,), generator=rng)], -1, CLASSES[index])

    def labelled() -> tuple[Tensor, Tensor]:
        index = balanced(rng)
        return index, CLASSES[index]

    cases = {
        "with replacement": (sf.Pool(IMAGES), iter(lambda: (uniform(rng), None), None)),
        "in epochs": (sf.Pool(IMAGES), epochs()),
        "balanced, with its weights": (
            sf.Pool(IMAGES, weights=torch.where(CLASSES == 0, 1 / 45, 1 / 15)),
            iter(lambda: (balanced(rng), None), None),
        ),
        "balanced, but every row sees its label": (sf.Pool(IMAGES, labels=CLASSES), iter(labelled, None)),
        "labels dropped by chance": (sf.Pool(IMAGES, labels=CLASSES), iter(dropped, None)),
    }
    for name, (pool, batches) in cases.items():
        assert run(pool, batches, rng, 65) == [], name


def test_the_test_of_draws_cannot_fire_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3,000 runs of uniform draws none comes near the bound, in few and in many samples."""
    from stablefield.targets._draws import Frequencies

    deviations: list[Tensor] = []
    deviation = Frequencies._deviation

    def noted(counts: Frequencies, kind: int) -> Tensor:
        deviations.append(deviation(counts, kind))
        return deviations[-1]

    monkeypatch.setattr(Frequencies, "_deviation", noted)
    rng = torch.Generator().manual_seed(0)
    for n in (2, 10, 300):
        deviations.clear()
        for _ in range(1000):
            counts = Frequencies(torch.ones(n, dtype=torch.float64), None)
            check = counts.add(torch.randint(n, (4 * n,), generator=rng), None, None)
            assert check is not None
        assert len(deviations) == 1000
        assert torch.stack(deviations).max() < 0.6


def checks_of(n: int, batches: Iterator[Tensor], steps: int) -> int:
    """After which draw for each sample the counts were found uneven, 0 for never."""
    return math.ceil(rows_until_uneven(n, batches, steps) / n)


def rows_until_uneven(
    n: int,
    batches: Iterator[Tensor],
    steps: int,
    weights: Tensor | None = None,
    labels: Tensor | None = None,
    dropped: float = 0.0,
) -> int:
    """After how many rows the draws were found uneven, 0 for never."""
    from stablefield.targets._draws import Frequencies

    counts, drawn = Frequencies(torch.ones(n, dtype=torch.float64) if weights is None else weights, labels), 0
    rng = torch.Generator().manual_seed(5)
    for _ in range(steps):
        index = next(batches)
        drawn += len(index)
        labelled = None if labels is None else torch.rand(len(index), generator=rng) >= dropped
        check = counts.add(index, labelled, None)
        if check is not None and not check.holds.all():
            return drawn
    return 0


MANY = 20_000
SHARE = {share: torch.arange(MANY) >= (1 - share) * MANY for share in (0.02, 0.2)}


def equally(rare: Tensor) -> Tensor:
    """Weights of a sampler that draws the rare samples, bool (n,), as often as the others together."""
    return torch.where(rare, 0.5 / rare.sum(), 0.5 / (~rare).sum()).double()


def drawn_with(weights: Tensor, rng: torch.Generator, repeats: int = 1) -> Iterator[Tensor]:
    while True:
        yield torch.multinomial(weights, 64 // repeats, True, generator=rng).repeat_interleave(repeats)


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize(("share", "latest"), [(0.02, 4096), (0.2, 16_384)])
def test_a_preference_shows_long_before_all_samples_have_come(
    share: float, latest: int, repeats: int, rng: torch.Generator
) -> None:
    weights = equally(SHARE[share])
    assert 0 < rows_until_uneven(MANY, drawn_with(weights, rng, repeats), latest // 32) <= latest
    assert rows_until_uneven(MANY, drawn_with(weights, rng, repeats), 1240, weights) == 0


def test_a_preference_within_a_label_shows_early_and_one_between_labels_is_none(rng: torch.Generator) -> None:
    labels = SHARE[0.02].long()
    between, within = equally(SHARE[0.02]), torch.where(torch.arange(MANY) % 50 == 0, 50.0, 1.0)
    assert rows_until_uneven(MANY, drawn_with(between, rng), 1240, None, labels) == 0
    assert 0 < rows_until_uneven(MANY, drawn_with(within, rng), 64, None, labels) <= 4096
    # A row whose label is dropped meets all samples.
    assert 0 < rows_until_uneven(MANY, drawn_with(between, rng), 512, None, labels, dropped=0.1) <= 32_768


def passes(count: int, rng: torch.Generator, repeats: int = 1, shuffled: bool = True) -> Iterator[Tensor]:
    """Epochs over the first samples; a sample's repeats may lie across the end of a batch."""
    while True:
        order = torch.randperm(count, generator=rng) if shuffled else torch.arange(count)
        yield from order.repeat_interleave(repeats).split(64)


@pytest.mark.parametrize(
    "loader", ["epochs", "in order", "repeats", "a rank's share", "one batch", "two batches", "accumulated"]
)
def test_draws_that_are_even_are_not_found_uneven_early(loader: str, rng: torch.Generator) -> None:
    def accumulated() -> Iterator[Tensor]:
        for index in passes(MANY, rng):
            yield from (index,) * 4

    batches = {
        "epochs": passes(MANY, rng),
        "in order": passes(MANY, rng, shuffled=False),
        "repeats": passes(MANY, rng, repeats=3),
        "a rank's share": passes(MANY // 8, rng),
        "one batch": passes(64, rng),
        "two batches": passes(128, rng, shuffled=False),
        "accumulated": accumulated(),
    }[loader]
    assert rows_until_uneven(MANY, batches, 1240) == 0


def test_coincidences_and_their_expectation_are_those_of_a_count_by_hand(rng: torch.Generator) -> None:
    from stablefield.targets._coincidences import Coincidences

    n, weights = 13, torch.rand(13, generator=rng, dtype=torch.float64)
    labels = torch.randint(3, (n,), generator=rng)
    found, batches = Coincidences(weights, labels), []
    for _ in range(30):
        place, labelled, counted = torch.randint(n, (7,), generator=rng), *(torch.rand(2, 7, generator=rng) < 0.7)
        found.add(place + n * labelled.long(), counted)
        batches.append({(int(k), bool(s)) for k, s, c in zip(place, labelled, counted, strict=True) if c})
    truth = torch.zeros(3, 2, dtype=torch.float64)
    for b, batch in enumerate(batches):
        earlier = batches[: max(b - 1, 0)]
        for sample, sees in batch:
            group = [k for k in range(n) if not sees or labels[k] == labels[sample]]
            times = torch.tensor([sum((k, sees) in one for one in earlier) for k in group]).double()
            chance = weights[group] / weights[group].sum()
            own = float(sum((sample, sees) in one for one in earlier))
            truth[:, int(sees)] += torch.tensor([own, chance @ times, chance @ times.square()], dtype=torch.float64)
    found.deviations()  # counts what is kept
    torch.testing.assert_close(found._sums, truth, rtol=1e-12, atol=1e-12)


def test_coincidences_cannot_be_too_many_by_chance(rng: torch.Generator) -> None:
    """Of 600 runs with equal and with very unequal weights, known to the pool, none comes near the bound."""
    from stablefield.targets._coincidences import Coincidences

    worst = []
    for weights in (torch.ones(500), torch.ones(4000), torch.cat([torch.full((3,), 100.0), torch.ones(3000)])):
        for _ in range(200):
            found = Coincidences(weights.double(), None)
            for index in torch.multinomial(weights, 2048, True, generator=rng).split(32):
                found.add(index, torch.ones(32, dtype=torch.bool))
            worst.append(found.deviations().max())
    assert torch.stack(worst).max() < 0.5


@pytest.mark.parametrize("repeats", [2, 4, 16])
@pytest.mark.parametrize("n", [400, 2000])
def test_several_rows_of_a_sample_in_one_batch_are_one_draw(n: int, repeats: int, rng: torch.Generator) -> None:
    def draws() -> Iterator[Tensor]:
        while True:
            yield torch.randint(n, (64 // repeats,), generator=rng).repeat(repeats)

    assert checks_of(n, draws(), 40 * n // 64) == 0


@pytest.mark.parametrize(("share", "latest"), [(0.9, 5), (0.95, 9), (0.98, 17)])
def test_training_on_a_part_shows_within_some_epochs(share: float, latest: int, rng: torch.Generator) -> None:
    n = 2000

    def epochs() -> Iterator[Tensor]:
        while True:
            yield from torch.randperm(int(share * n), generator=rng).split(100)

    assert 0 < checks_of(n, epochs(), 20 * 40) <= latest


def test_rows_that_are_not_counted_are_no_repeats(rng: torch.Generator) -> None:
    """Half of the rows alone, the others antithetic pairs."""
    from stablefield.targets._draws import Frequencies

    n = 1000
    counts = Frequencies(torch.ones(n, dtype=torch.float64), None)
    for _ in range(500):
        index = torch.randint(n, (16,), generator=rng).repeat(2)
        check = counts.add(torch.cat([index, index]), None, torch.arange(64) < 32)
        assert check is None or check.holds.all()


@pytest.mark.parametrize("calls", [2, 4])
@pytest.mark.parametrize("labelled", [False, True])
def test_calls_in_a_row_with_one_batch_are_one_draw(calls: int, labelled: bool, rng: torch.Generator) -> None:
    """As of loops that accumulate gradients over draws of noise, and of dropped labels."""
    n, pool_labels = 1000, torch.arange(1000) % 3
    data = torch.randn(n, 4, generator=rng)
    stable = sf.StableTarget(sf.EDM(), references=sf.Pool(data, labels=pool_labels if labelled else None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(100):
            index = torch.randint(n, (50,), generator=rng)
            for _ in range(calls):
                seen = torch.where(torch.rand(50, generator=rng) < 0.3, -1, pool_labels[index]) if labelled else None
                stable(data[index], sf.EDM().perturb(data[index], 1.0, generator=rng), 1.0, seen, index)


@pytest.mark.parametrize("fault", ["half", "one batch"])
@pytest.mark.parametrize("calls", [1, 4])
def test_draws_from_a_part_are_warned_of_though_calls_repeat_their_batch(
    calls: int, fault: str, rng: torch.Generator
) -> None:
    n = 1000
    fixed = torch.randint(n, (50,), generator=rng)

    def batches() -> Iterator[Tensor]:
        while True:
            index = fixed if fault == "one batch" else torch.randint(n // 2, (50,), generator=rng)
            yield from (index for _ in range(calls))

    assert 0 < checks_of(n, batches(), 1000) <= 20


def test_overfitting_one_batch_that_is_the_pool_is_not_warned_of(rng: torch.Generator) -> None:
    assert checks_of(16, iter(lambda: torch.arange(16), None), 1000) == 0


@pytest.mark.parametrize("rows", [1, 8])
def test_the_same_batch_by_chance_is_no_repeat(rows: int, rng: torch.Generator) -> None:
    """Two samples, one of them drawn nine times as often: half of the batches of one row, counted once, would be its."""
    from stablefield.targets._draws import Frequencies

    weights = torch.tensor([1.0, 9.0], dtype=torch.float64)
    counts = Frequencies(weights, None)
    for _ in range(4000):
        check = counts.add(torch.multinomial(weights, rows, replacement=True, generator=rng), None, None)
        assert check is None or check.holds.all()


@pytest.mark.parametrize("name", ["weights", "labels"])
def test_weights_and_labels_of_a_pool_cannot_be_set(name: str, rng: torch.Generator) -> None:
    """What was set after a call was ignored; a new pool has the new prior."""
    pool = sf.Pool(DATA, labels=LABELS, weights=WEIGHTS)
    index = torch.arange(4)
    new = {"weights": torch.tensor([9.0, 1.0, 1.0, 4.0]), "labels": torch.tensor([0, 1, 0, 1])}

    def found(pool: sf.Pool, labels: Tensor) -> Tensor:
        stable = sf.StableTarget(sf.EDM(), references=pool, validate_args=False)
        return stable(DATA, X_T[:1].expand(4, 2), SIGMA, labels, index).x0

    before = found(pool, LABELS)
    with pytest.raises(AttributeError, match=rf"Pool\.{name} cannot be set.*Make a new Pool with {name}=\.\.\."):
        setattr(pool, name, new[name])
    torch.testing.assert_close(found(pool, LABELS), before, rtol=0, atol=0)
    given = {"weights": WEIGHTS, "labels": LABELS, name: new[name]}
    after = found(sf.Pool(DATA, **given), given["labels"])
    for row in range(4):
        members = given["labels"] == given["labels"][row]
        right = truth(DATA[members], given["weights"].double()[members])[0]
        torch.testing.assert_close(after[row], right, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("caller", ["target", "without gradients", "a module", "objective"])
def test_a_warning_names_the_line_that_called(caller: str, rng: torch.Generator) -> None:
    data = torch.randn(MANY, 2, generator=rng)
    stable = sf.StableTarget(sf.EDM(), references=sf.Pool(data))
    objective = sf.Objective(sf.EDM(), target=stable)

    class Module(torch.nn.Module):
        def forward(self, index: Tensor, x_t: Tensor) -> sf.Target:
            return stable(data[index], x_t, 1.0, None, index)

    module = Module()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for index in torch.multinomial(equally(SHARE[0.02]), 4096, True, generator=rng).split(256):
            x_t = sf.EDM().perturb(data[index], 1.0, generator=rng)
            if caller == "objective":
                objective(lambda x, _: x, data[index], index=index, generator=rng)
            elif caller == "without gradients":
                torch.no_grad()(stable)(data[index], x_t, 1.0, None, index)
            else:
                (module(index, x_t) if caller == "a module" else stable(data[index], x_t, 1.0, None, index))
    assert len(seen) == 1
    assert "two batches had a sample in common" in str(seen[0].message)
    assert seen[0].filename == __file__
