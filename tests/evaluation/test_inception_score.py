import math

import numpy as np
import pytest
import torch

from stablefield.evaluation._extractor import RawPixels
from stablefield.evaluation._inception_score import ClassifierScore, inception_score
from stablefield.evaluation._metric import Features, MetricInput


def test_sure_and_varied_samples_score_the_number_of_classes() -> None:
    got = inception_score(torch.eye(7).repeat(10, 1), splits=10, seed=None)
    assert got.mean == pytest.approx(7.0, abs=1e-12)
    assert got.standard_deviation == pytest.approx(0.0, abs=1e-12)


def test_samples_that_all_look_alike_score_one() -> None:
    assert inception_score(torch.tensor([[0.2, 0.5, 0.3]]).repeat(20, 1)).mean == pytest.approx(1.0, abs=1e-12)


def test_two_kinds_of_samples_have_the_closed_form() -> None:
    # Half the rows (p, 1 - p), half (1 - p, p): the marginal is uniform, KL = log 2 - H(p).
    p = 0.9
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    rows = torch.tensor([[p, 1 - p], [1 - p, p]], dtype=torch.float64).repeat(10, 1)
    assert inception_score(rows, splits=2, seed=None).mean == pytest.approx(2 * math.exp(-entropy), abs=1e-12)


def test_splits_are_consecutive_and_scored_apart() -> None:
    p = torch.rand(23, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = p / p.sum(1, keepdim=True)
    scores = []
    for start, end in ((0, 7), (7, 15), (15, 23)):
        part = p[start:end].numpy()
        marginal = part.mean(0)
        scores.append(math.exp(np.mean([sum(q[c] * math.log(q[c] / marginal[c]) for c in range(5)) for q in part])))
    got = inception_score(p, splits=3, seed=None)
    assert got.mean == pytest.approx(np.mean(scores), abs=1e-12)
    assert got.standard_deviation == pytest.approx(np.std(scores), abs=1e-12)


def test_samples_sorted_by_class_score_as_shuffled_ones() -> None:
    # Sure of every row: the score is exp(entropy of the classes in a split), 10 up to the draw of 1,000 rows per split.
    rows = torch.eye(10, dtype=torch.float64)
    mixed, sorted_by_class = (
        inception_score(one) for one in (rows.repeat(1000, 1), rows.repeat_interleave(1000, dim=0))
    )
    for score in (mixed, sorted_by_class):
        assert score.mean == pytest.approx(10.0 * math.exp(-9 / 2000), rel=5e-3)
        assert 0 < score.standard_deviation < 0.05
    assert inception_score(rows.repeat_interleave(1000, dim=0), seed=None).mean == pytest.approx(1.0)
    assert inception_score(rows.repeat_interleave(1000, dim=0), seed=1) != sorted_by_class
    with pytest.raises(ValueError, match="seed=-1"):
        inception_score(rows, seed=-1)


def test_the_metric_of_images_in_class_folders_is_that_of_shuffled_ones() -> None:
    logits = 50 * torch.eye(10).repeat_interleave(100, dim=0)
    extractor = RawPixels((10, 1, 1))
    (value,) = ClassifierScore()(
        MetricInput(samples=Features(rows=logits), references=Features(rows=logits), extractor=extractor)
    )
    assert value.value == pytest.approx(10.0 * math.exp(-9 / 200), rel=0.02)
    assert value.standard_error is not None
    assert 0 < value.standard_error < 0.2
    assert value.settings == {"splits": 10, "seed": 0}


def test_logits_and_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"row 0 sums to 6 .*pass probabilities"):
        inception_score(torch.tensor([[1.0, 2.0, 3.0]]).repeat(10, 1))
    with pytest.raises(ValueError, match="at least 10 are needed, because each of 10 splits"):
        inception_score(torch.eye(3))
