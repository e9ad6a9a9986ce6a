"""A pool always holds every source, holds no sample twice, and draws the others uniformly."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

import stablefield as sf
from stablefield.targets._engine.query import Host
from stablefield.targets._references import Batch, Selection


def numbered(n: int) -> Tensor:
    """Samples of which each is its own number."""
    return torch.arange(n, dtype=torch.float32)[:, None].expand(n, 2).contiguous()


def select(pool: sf.Pool, data: Tensor, index: Tensor, generator: torch.Generator | None) -> Selection:
    x0, one = data[index], torch.ones(len(index))
    batch = Batch(x0=x0, x_t=x0, alpha=one, sigma=one, labels=None, reference_labels=None, index=index)
    return pool.select(batch, generator, Host.READS)


@st.composite
def selections(draw: st.DrawFn) -> tuple[int, list[int], int, int]:
    """(n, index, size, seed): all of the data, most of them or few; rows that share a sample; sizes from the least up."""
    n = draw(st.sampled_from([1, 2, 5, 9, 40, 300]))
    index = draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=12))
    size = draw(st.one_of(st.integers(len(set(index)), n), st.just(len(set(index)))))
    return n, index, size, draw(st.integers(0, 2**31))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(selections())
def test_every_source_is_held_and_nothing_twice(case: tuple[int, list[int], int, int]) -> None:
    n, places, size, seed = case
    data, index = numbered(n), torch.tensor(places)
    pool = sf.Pool(data, size, labels=torch.arange(n) % 3)
    chosen = select(pool, data, index, torch.Generator().manual_seed(seed))
    held = chosen.matrix.data[:, 0].long()
    assert len(held) == size
    assert len(held.unique()) == size
    assert torch.equal(held[chosen.source], index)
    assert chosen.labels is not None
    assert torch.equal(chosen.labels, held % 3)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(selections())
def test_a_pool_without_size_is_the_data_themselves(case: tuple[int, list[int], int, int]) -> None:
    n, places, _, _ = case
    data, index = numbered(n), torch.tensor(places)
    chosen = select(sf.Pool(data), data, index, None)
    assert chosen.matrix.data is data
    assert torch.equal(chosen.source, index)


# 4 (size + 1) > n takes one way to draw, the other cases the other one.
@pytest.mark.parametrize(("n", "size"), [(30, 12), (30, 29), (60, 12), (200, 8), (200, 45)])
def test_the_others_are_drawn_uniformly(n: int, size: int, rng: torch.Generator) -> None:
    data, index, draws = numbered(n), torch.tensor([4, 7, 4]), 4000
    pool = sf.Pool(data, size)
    count = torch.zeros(n, dtype=torch.float64)
    for _ in range(draws):
        held = select(pool, data, index, rng).matrix.data[:, 0].long()
        count[held] += 1
    assert count[4] == count[7] == draws
    others = torch.cat([count[:4], count[5:7], count[8:]])
    m, p = n - 2, (size - 2) / (n - 2)
    # Draws without replacement: the counts have variance draws p (1 - p) and correlation -1 / (m - 1).
    statistic = ((others - draws * p) ** 2).sum() / (draws * p * (1 - p)) * (m - 1) / m
    assert 1e-4 < stats.chi2.sf(statistic.item(), m - 1) < 1 - 1e-4


def test_pairs_of_others_are_drawn_uniformly(rng: torch.Generator) -> None:
    # Five others out of 39, few out of many: every pair equally often, so the draws depend on nothing but the seed.
    data, index, draws, m, c = numbered(40), torch.tensor([0]), 6000, 39, 5
    pool = sf.Pool(data, c + 1)
    held = torch.zeros(draws, 40)
    for i in range(draws):
        held[i, select(pool, data, index, rng).matrix.data[:, 0].long()] = 1
    pairs = (held.T @ held)[1:, 1:]
    expected = draws * c * (c - 1) / (m * (m - 1))
    z = (pairs[~torch.eye(m, dtype=torch.bool)] - expected) / expected**0.5
    assert z.abs().max() < 5


def test_the_drawn_set_is_a_function_of_the_generator() -> None:
    for n, size in ((40, 20), (400, 20)):
        data, index = numbered(n), torch.arange(5)
        pool = sf.Pool(data, size)

        def drawn(seed: int, pool: sf.Pool = pool, data: Tensor = data, index: Tensor = index) -> Tensor:
            return select(pool, data, index, torch.Generator().manual_seed(seed)).matrix.data[:, 0].sort()[0]

        assert torch.equal(drawn(1), drawn(1))
        assert not torch.equal(drawn(1), drawn(2))


def test_the_target_over_a_whole_pool_is_the_posterior_over_the_data(rng: torch.Generator) -> None:
    data = torch.randint(0, 256, (30, 3, 4, 4), generator=rng, dtype=torch.uint8)
    index = torch.tensor([5, 5, 29, 0])
    x0 = data[index] / 127.5 - 1
    x_t = x0 + torch.randn(x0.shape, generator=rng)
    target = sf.StableTarget(sf.EDM(), references=sf.Pool(data))(x0, x_t, 1.0, index=index)
    found = sf.posterior(x_t, 1.0, 1.0, data, index)
    torch.testing.assert_close(target.x0, found.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(target.ess, found.ess, rtol=1e-6, atol=0)
    torch.testing.assert_close(target.source_weight, found.source_weight, rtol=1e-5, atol=1e-6)


def test_norms_of_a_drawn_bank_are_those_of_its_rows(rng: torch.Generator) -> None:
    data = torch.randn(50, 7, generator=rng)
    index = torch.tensor([3, 40])
    x_t = data[index] + 0.7 * torch.randn(2, 7, generator=rng)
    target = sf.StableTarget(sf.EDM(), references=sf.Pool(data, 10))
    for _ in range(3):  # the second draw uses the norms that the first has kept
        state = rng.get_state()
        members = select(sf.Pool(data, 10), data, index, rng).matrix.data
        rng.set_state(state)
        found = target(data[index], x_t, 0.7, index=index, generator=rng)
        truth = sf.posterior(x_t, 1.0, 0.7, members)
        torch.testing.assert_close(found.x0, truth.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.variance, truth.variance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"size": 64}, {"mirrored": True}, {"weights": torch.full((300,), 2.0)}, {"labels": torch.arange(300) % 3}],
    ids=lambda options: next(iter(options), "whole"),
)
def test_a_first_call_in_inference_mode_leaves_later_ones_the_same(
    options: dict[str, Any], rng: torch.Generator
) -> None:
    data = torch.randn(300, 4, generator=rng)
    calls = []
    for _ in range(90):  # more than four draws of each sample, for all comparisons
        index, flip = torch.randint(300, (16,), generator=rng), torch.rand(16, generator=rng) < 0.5
        x0 = torch.where(flip[:, None], data[index].flip(-1), data[index]) if "mirrored" in options else data[index]
        call = {"x0": x0, "x_t": sf.EDM().perturb(x0, 1.0, generator=rng), "t": 1.0, "index": index}
        call |= {"flip": flip} if "mirrored" in options else {}
        calls.append(call | ({"labels": options["labels"][index]} if "labels" in options else {}))
    inside, outside = (sf.StableTarget(sf.EDM(), references=sf.Pool(data, **options)) for _ in range(2))
    for number, call in enumerate(calls):
        drawn = torch.Generator().manual_seed(number)
        with torch.inference_mode(number % 3 == 0):
            found = inside(**call, generator=drawn)
        truth = outside(**call, generator=torch.Generator().manual_seed(number))
        assert torch.equal(found.x0, truth.x0)


def test_latents_of_a_pool_made_in_inference_mode_are_drawn_anew_outside(rng: torch.Generator) -> None:
    mean, std = torch.randn(6, 4, generator=rng), torch.ones(6, 4)
    with torch.inference_mode():
        pool = sf.Pool.from_moments(mean, std)
    pool.refresh(3)
    other = sf.Pool.from_moments(mean, std)
    other.refresh(3)
    assert torch.equal(torch.as_tensor(pool.data), torch.as_tensor(other.data))


@pytest.mark.parametrize(
    "kind",
    ["whole", "size", "labels", "label_size", "mirrored", "flipped", "weights", "drawn", "array", "bytes", "batch"],
)
def test_a_default_device_that_is_not_the_datas_changes_nothing(kind: str, rng: torch.Generator) -> None:
    """The device "meta" stands for a GPU: what lands on it cannot meet data on the CPU."""
    data, labels, flips = (
        torch.randn(40, 4, generator=rng),
        torch.arange(40) % 3,
        torch.rand(90, 16, generator=rng) < 0.5,
    )
    pixels = torch.randint(256, (40, 4), generator=rng, dtype=torch.uint8)
    made: dict[str, Callable[[], sf.Pool | sf.InBatch]] = {
        "whole": lambda: sf.Pool(data),
        "size": lambda: sf.Pool(data, 30),
        "labels": lambda: sf.Pool(data, labels=labels),
        "label_size": lambda: sf.Pool(data, labels=labels, label_size=5, unlabelled_size=20),
        "mirrored": lambda: sf.Pool(data, mirrored=True),
        "flipped": lambda: sf.Pool(data, flipped=data + 1),
        "weights": lambda: sf.Pool(data, weights=torch.ones(40, device="cpu")),
        "drawn": lambda: sf.Pool(data, 20, weights=torch.ones(40, device="cpu")),
        "array": lambda: sf.Pool(data.numpy()),
        "bytes": lambda: sf.Pool(pixels),
        "batch": sf.InBatch,
    }
    calls = []
    for flip in flips:  # enough draws for all comparisons
        index = torch.randint(40, (16,), generator=rng)
        x0 = pixels[index] / 127.5 - 1 if kind == "bytes" else data[index]
        call = {"index": index} | ({"labels": labels[index].masked_fill(flip, -1)} if "label" in kind else {})
        if kind in ("mirrored", "flipped"):
            call["flip"] = flip
            x0 = torch.where(flip[:, None], x0.flip(-1) if kind == "mirrored" else x0 + 1, x0)
        calls.append(call | {"x0": x0, "x_t": sf.EDM().perturb(x0, 1.0, generator=rng)})

    def found() -> list[Tensor]:
        stable = sf.StableTarget(sf.EDM(), references=made[kind](), noise_band=0.1, capacity=12)
        draws = torch.Generator("cpu").manual_seed(0)
        return [stable(**call, t=1.0, generator=draws).noise for call in calls]

    plain = found()
    with torch.device("meta"):
        elsewhere = found()
    assert all(torch.equal(one, other) for one, other in zip(plain, elsewhere, strict=True))
