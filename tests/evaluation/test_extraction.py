from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from forks import Fork
from stablefield.data._digits import open_digits
from stablefield.evaluation._evaluate import evaluate
from stablefield.evaluation._extraction import Batch, ExtractorPass, extract, image_batches
from stablefield.evaluation._extractor import RandomConvolutions, RawPixels
from stablefield.evaluation._features import moments_of, unpack
from stablefield.evaluation._result import Evaluation

DIGITS = open_digits().images[:100]


def test_a_pass_is_the_extractor_on_all_images_at_once() -> None:
    net, pixels = RandomConvolutions(), RawPixels((1, 8, 8))
    passes = [
        ExtractorPass(extractor=net, moments=False),
        ExtractorPass(extractor=pixels),
        ExtractorPass(extractor=net, rows=False),
    ]
    rows = np.arange(3, 100)
    first, second, third = extract(image_batches(DIGITS, rows, 16), passes)
    whole = torch.from_numpy(DIGITS[3:])
    assert first.moments is None
    assert third.rows is None
    assert second.rows is not None
    assert second.moments is not None
    assert third.moments is not None
    torch.testing.assert_close(first.rows, net(whole), rtol=1e-5, atol=1e-6)
    assert torch.equal(second.rows, pixels(whole))
    count, _, covariance = unpack(third.moments)
    assert count == len(second.rows) == 97
    torch.testing.assert_close(covariance, unpack(moments_of(net(whole)))[2], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(unpack(second.moments)[1], pixels(whole).double().mean(0), rtol=1e-12, atol=1e-12)


class Broken(RandomConvolutions):
    def __call__(self, images: Tensor) -> Tensor:
        features = super().__call__(images).clone()
        features[images.flatten(1).sum(1) == 0] = torch.nan
        return features


def test_nan_features_name_the_image() -> None:
    images = DIGITS.copy()
    images[[42, 77]] = 0
    with pytest.raises(
        ValueError, match="NaN or infinite features for 1 of a batch of 10, the first for sample 42: look"
    ):
        extract(image_batches(images, np.arange(100), 10), [ExtractorPass(extractor=Broken())], "sample")


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images have shape .*compare images of one size"):
        extract(image_batches(DIGITS, np.arange(4), 4), [ExtractorPass(extractor=RawPixels((1, 16, 16)))])


def test_too_few_images_for_moments_are_refused() -> None:
    (features,) = extract(image_batches(DIGITS, np.arange(1), 4), [ExtractorPass(extractor=RandomConvolutions())])
    with pytest.raises(ValueError, match="statistics of 1 rows: at least 2 are needed"):
        _ = features.gaussian


def test_an_empty_pass_keeps_no_rows() -> None:
    nothing: Iterator[Batch] = iter(())
    (features,) = extract(nothing, [ExtractorPass(extractor=RandomConvolutions())])
    assert features.matrix().shape == (0, 112)
    with pytest.raises(ValueError, match="statistics of 0 rows: at least 2 are needed"):
        _ = features.gaussian


def test_an_extractor_that_gives_other_features_than_it_says_is_refused() -> None:
    net = RandomConvolutions()
    net.dim = 7
    with pytest.raises(ValueError, match=r"gives features of shape \(4, 112\) for 4 images, and says .* dim=7"):
        extract(image_batches(DIGITS, np.arange(4), 4), [ExtractorPass(extractor=net)])


PASS = """
import sys
import numpy as np, torch
from stablefield._distributed import Ranks
from stablefield.data._digits import open_digits
from stablefield.evaluation._extraction import ExtractorPass, extract, image_batches
from stablefield.evaluation._evaluate import evaluate
from stablefield.evaluation._features import unpack
from stablefield.evaluation._extractor import RandomConvolutions

torch.set_num_threads(1)
MEASURED = {MEASURED}
with Ranks.launched() as ranks:
    batches = image_batches(open_digits().images, np.arange(50), 16, ranks)
    (features,) = extract(batches, [ExtractorPass(extractor=RandomConvolutions())], ranks=ranks)
    told = ranks.all_gather_rows(torch.full((1 + ranks.rank, 2), float(ranks.rank)), "to test")
    assert told.tolist() == [[r, r] for r in range(ranks.world_size) for _ in range(r + 1)], told
    assert ranks.total(1.0, ranks.rank, purpose="to test") == [ranks.world_size, sum(range(ranks.world_size))]
    assert ranks.all(True, "to test") and ranks.all(ranks.rank == 0, "to test") == (ranks.world_size == 1)
    assert sorted(sum(([n] * c for n, c in [(k, 1) for k in ranks.share(range(7))]), [])) == list(
        range(ranks.rank, 7, ranks.world_size)
    )
    if ranks.first:
        np.savez(sys.argv[1], rows=features.rows, covariance=unpack(features.moments)[2])
    found = evaluate(open_digits().images[:90], **MEASURED, extractor=RandomConvolutions())
    found.save(f"{sys.argv[1]}.{ranks.rank}.json")
"""
MEASURED = {"data": "digits", "metrics": ["frechet", "recall", "nearest"], "repeats": 2, "batch": 16, "cache": False}


def test_features_and_moments_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, fork_ranks: Callable[..., list[Fork]]
) -> None:
    # 4 batches of 16, 16, 16 and 2.
    (alone,) = extract(
        image_batches(open_digits().images, np.arange(50), 16), [ExtractorPass(extractor=RandomConvolutions())]
    )
    out = tmp_path / "two.npz"
    ranks = fork_ranks(2, PASS.replace("{MEASURED}", repr(MEASURED)), out)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    together = dict(np.load(out))
    assert together["rows"].shape == (50, 112)
    assert alone.rows is not None
    assert alone.moments is not None
    np.testing.assert_allclose(together["rows"], alone.rows, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(together["covariance"], unpack(alone.moments)[2], rtol=1e-4, atol=1e-9)
    # So is a whole evaluation, and each process gets it.
    expected = evaluate(open_digits().images[:90], **MEASURED, extractor=RandomConvolutions()).scores
    for rank in range(2):
        scores = Evaluation.load(tmp_path / f"two.npz.{rank}.json").scores
        assert [score.protocol for score in scores] == [score.protocol for score in expected]
        for mine, own in zip(scores, expected, strict=True):
            assert mine.values == pytest.approx(own.values, rel=1e-4)
