"""Names find room: no overlap, the order kept, moved by as little as can be."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from stablefield.report.spacing import lanes, spread


@pytest.mark.parametrize("seed", range(8))
def test_labels_are_moved_by_as_little_as_can_be(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 7))
    centres, sizes = rng.uniform(0, 100, n), rng.uniform(5, 15, n)
    order = np.argsort(centres)

    # The same as a quadratic programme, solved by a general method.
    apart = [
        {"type": "ineq", "fun": lambda p, a=a, b=b: p[b] - p[a] - (sizes[a] + sizes[b]) / 2 - 2}
        for a, b in itertools.pairwise(order)
    ]
    inside = [
        {"type": "ineq", "fun": lambda p: p[order[0]] - sizes[order[0]] / 2},
        {"type": "ineq", "fun": lambda p: 120 - p[order[-1]] - sizes[order[-1]] / 2},
    ]
    best = minimize(
        lambda p: ((p - centres) ** 2).sum(),
        np.linspace(10, 110, n)[np.argsort(order)],
        constraints=apart + inside,
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert best.success
    np.testing.assert_allclose(spread(centres, sizes, 0, 120, gap=2), best.x, atol=1e-3)


@given(
    st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(0.1, 50)), min_size=1, max_size=12),
    st.floats(0, 5),
)
def test_labels_never_overlap_and_stay_inside_where_they_fit(labels, gap):
    centres, sizes = [c for c, _ in labels], [s for _, s in labels]
    placed = spread(centres, sizes, 0.0, 300.0, gap)
    order = sorted(range(len(labels)), key=lambda i: centres[i])
    for a, b in itertools.pairwise(order):
        assert placed[b] - placed[a] >= (sizes[a] + sizes[b]) / 2 + gap - 1e-6
    assert placed[order[0]] - sizes[order[0]] / 2 >= -1e-6
    if sum(sizes) + gap * (len(sizes) - 1) <= 300:
        assert placed[order[-1]] + sizes[order[-1]] / 2 <= 300 + 1e-6


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), min_size=1, max_size=12))
def test_no_two_of_a_lane_overlap_and_no_lane_is_used_without_need(spans):
    extents = [(begin, begin + length) for begin, length in spans]
    found = lanes(extents)

    def overlap(a, b):
        return a[0] < b[1] and b[0] < a[1]

    for i, lane in enumerate(found):
        before = list(zip(extents[:i], found[:i], strict=True))
        assert not any(overlap(extents[i], other) for other, there in before if there == lane)
        for lower in range(lane):
            assert any(overlap(extents[i], other) for other, there in before if there == lower)
