import math

import numpy as np
import pytest
import torch

from stablefield.evaluation._inception_score import inception_score


def test_sure_and_varied_samples_score_the_number_of_classes() -> None:
    got = inception_score(torch.eye(7).repeat(10, 1), splits=10)
    assert got.mean == pytest.approx(7.0, abs=1e-12)
    assert got.standard_deviation == pytest.approx(0.0, abs=1e-12)


def test_samples_that_all_look_alike_score_one() -> None:
    assert inception_score(torch.tensor([[0.2, 0.5, 0.3]]).repeat(20, 1)).mean == pytest.approx(1.0, abs=1e-12)


def test_two_kinds_of_samples_have_the_closed_form() -> None:
    # Half the rows (p, 1 - p), half (1 - p, p): the marginal is uniform, KL = log 2 - H(p).
    p = 0.9
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    rows = torch.tensor([[p, 1 - p], [1 - p, p]], dtype=torch.float64).repeat(10, 1)
    assert inception_score(rows, splits=2).mean == pytest.approx(2 * math.exp(-entropy), abs=1e-12)


def test_splits_are_consecutive_and_scored_apart() -> None:
    p = torch.rand(23, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = p / p.sum(1, keepdim=True)
    scores = []
    for start, end in ((0, 7), (7, 15), (15, 23)):
        part = p[start:end].numpy()
        marginal = part.mean(0)
        scores.append(math.exp(np.mean([sum(q[c] * math.log(q[c] / marginal[c]) for c in range(5)) for q in part])))
    got = inception_score(p, splits=3)
    assert got.mean == pytest.approx(np.mean(scores), abs=1e-12)
    assert got.standard_deviation == pytest.approx(np.std(scores), abs=1e-12)


def test_logits_and_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"row 0 sums to 6 .*pass probabilities"):
        inception_score(torch.tensor([[1.0, 2.0, 3.0]]).repeat(10, 1))
    with pytest.raises(ValueError, match="at least 10 are needed, because each of 10 splits"):
        inception_score(torch.eye(3))
