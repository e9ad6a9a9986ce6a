"""The index stream: a function of (seed, step) whose batches hold distinct, exchangeable rows."""

import itertools
from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from stablefield.data import IndexStream


def epoch_of(stream, epoch):
    first = epoch * stream.batches_per_epoch
    return np.concatenate([stream.batch_at(first + i) for i in range(stream.batches_per_epoch)])


@pytest.mark.parametrize(("size", "batch"), [(1, 1), (7, 7), (10, 3), (10, 4), (11, 5), (1797, 128)])
def test_an_epoch_deals_distinct_rows_and_drops_only_the_remainder(size, batch):
    stream = IndexStream(size, batch, seed=3)
    for epoch in range(3):
        rows = epoch_of(stream, epoch)
        assert len(rows) == size // batch * batch
        assert len(set(rows.tolist())) == len(rows)
        assert rows.min() >= 0
        assert rows.max() < size
        assert rows.dtype == np.int64


def test_every_row_sits_out_equally_often():
    # 10 rows in batches of 4: two rows sit out an epoch, independently from epoch to epoch.
    epochs = 4000
    dealt = np.zeros(10, int)
    stream = IndexStream(10, 4, seed=1)
    for epoch in range(epochs):
        dealt[epoch_of(stream, epoch)] += 1
    assert dealt.sum() == 8 * epochs
    # A row's count is binomial(4000, 0.8), and the ten counts have correlation -1 / 9: their scaled squares are chi-square.
    statistic = ((dealt - 0.8 * epochs) ** 2).sum() / (epochs * 0.8 * 0.2) * 9 / 10
    assert 1.7 < statistic < 23.6  # 0.5 % on either side, 9 degrees of freedom


def test_any_step_can_be_asked_for_in_any_order():
    steps = 3 * (23 // 5)
    expected = [IndexStream(23, 5, seed=9).batch_at(step) for step in range(steps)]
    stream = IndexStream(23, 5, seed=9)
    for step in np.random.default_rng(0).permutation(np.arange(steps).repeat(3)):
        np.testing.assert_array_equal(stream.batch_at(int(step)), expected[step])


def test_what_is_returned_is_the_callers_own():
    stream = IndexStream(23, 5, seed=9)
    first = stream.batch_at(0)
    kept = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(stream.batch_at(0), kept)


def test_seeds_and_epochs_give_unrelated_orders():
    # With seeds and epochs laid end to end as 32-bit words, (5 + 2^32, 0) and (5, 1) would be one stream.
    orders = [
        tuple(epoch_of(IndexStream(50, 5, seed), e)) for seed in (0, 1, 5, 2**32, 2**32 + 5, 2**70) for e in range(3)
    ]
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_which_rows_share_a_batch_and_at_which_place_is_uniform(position):
    # One batch of two per epoch: 42 ordered pairs of 7 rows, independent over epochs, so chi-square holds exactly.
    stream = IndexStream(7, 2, seed=5)
    epochs = 6000
    pairs = Counter(tuple(stream.batch_at(3 * epoch + position).tolist()) for epoch in range(epochs))
    counts = [pairs[pair] for pair in itertools.permutations(range(7), 2)]
    assert sum(counts) == epochs
    assert chisquare(counts).pvalue > 1e-3


def test_a_row_is_never_twice_in_a_batch_where_permutations_meet():
    # 5 rows in batches of 3: a stream that went on into the next permutation would repeat a row in most batches.
    stream = IndexStream(5, 3, seed=0)
    assert all(len(set(stream.batch_at(step).tolist())) == 3 for step in range(500))


def test_the_order_is_pinned_because_resumed_runs_depend_on_it():
    np.testing.assert_array_equal(IndexStream(100, 8, seed=0).batch_at(0), PINNED_FIRST)
    np.testing.assert_array_equal(IndexStream(100, 8, seed=42).batch_at(1000), PINNED_LATER)


def test_the_order_comes_from_raw_pcg64_outputs():
    bits = np.random.PCG64(np.random.SeedSequence(42, spawn_key=(83,)))
    raw = [int(v) for v in bits.random_raw(100)]
    order = sorted(range(100), key=lambda row: raw[row])
    # Step 1000 of 12 batches an epoch is batch 4 of epoch 83.
    np.testing.assert_array_equal(IndexStream(100, 8, seed=42).batch_at(1000), order[32:40])


def test_a_step_within_an_epoch_does_not_draw_again(monkeypatch):
    stream = IndexStream(1000, 10, seed=0)
    stream.batch_at(0)
    monkeypatch.setattr(np.random, "PCG64", None)
    assert len(stream.batch_at(99)) == 10
    with pytest.raises(TypeError):
        stream.batch_at(100)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((10, 11, 0), r"batch=11 .*10 images.*at most 10"),
        ((0, 1, 0), "size=0"),
        ((10, 0, 0), "batch=0"),
        ((10, 2, -1), "seed=-1"),
    ],
)
def test_bad_arguments_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        IndexStream(*arguments)


def test_a_negative_step_is_named():
    with pytest.raises(ValueError, match="step=-1"):
        IndexStream(10, 2, 0).batch_at(-1)


PINNED_FIRST = [17, 46, 60, 36, 6, 43, 71, 11]
PINNED_LATER = [63, 54, 49, 53, 34, 31, 95, 89]
