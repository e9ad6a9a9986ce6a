import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stablefield.data._digits import open_digits
from stablefield.evaluation._extraction import ExtractorPass
from stablefield.evaluation._extractor import RandomConvolutions
from stablefield.evaluation._reference import (
    FIRST,
    DamagedCacheWarning,
    ProtocolWarning,
    ReferenceSet,
    measure_reference,
)

DIGITS = open_digits()


class Counting(RandomConvolutions):
    seen = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return super().__call__(images)


def test_features_are_computed_once_and_kept_with_their_record(tmp_path: Path) -> None:
    chosen = ReferenceSet(images=DIGITS, split="train", count=50)
    net = Counting()
    first = measure_reference(chosen, ExtractorPass(extractor=net), batch=16, cache=tmp_path, commit="a")
    again = measure_reference(chosen, ExtractorPass(extractor=net), batch=16, cache=tmp_path, commit="a")
    assert net.seen == 50 + 2 * FIRST
    assert first.rows is not None
    assert again.moments is not None
    assert torch.equal(again.rows, first.rows)
    assert torch.equal(again.moments, first.moments)
    record = chosen.record(net)
    assert (record["reference"], record["split"]) == ("digits", "train, 50 of 1797 (seed 0)")
    assert record["reference_sha256"] == DIGITS.manifest["sha256"]


@pytest.mark.parametrize(
    "other",
    [
        (ReferenceSet(images=DIGITS, split="train", count=60), RandomConvolutions(0)),
        (ReferenceSet(images=DIGITS, split="test", count=50), RandomConvolutions(0)),
        (ReferenceSet(images=DIGITS, split="train", count=50), RandomConvolutions(1)),
    ],
    ids=["count", "split", "weights"],
)
def test_what_was_kept_of_something_else_is_not_used(
    tmp_path: Path, other: tuple[ReferenceSet, RandomConvolutions]
) -> None:
    chosen = ReferenceSet(images=DIGITS, split="train", count=50)
    measure_reference(chosen, ExtractorPass(extractor=RandomConvolutions(0)), batch=16, cache=tmp_path)
    got = measure_reference(other[0], ExtractorPass(extractor=other[1]), batch=16, cache=tmp_path)
    expected = measure_reference(other[0], ExtractorPass(extractor=other[1]), batch=16)
    assert got.rows is not None
    assert torch.equal(got.rows, expected.rows)
    assert len(list(tmp_path.iterdir())) == 4


def test_features_that_changed_under_the_same_hash_are_found(tmp_path: Path) -> None:
    chosen = ReferenceSet(images=DIGITS, split="train", count=50)

    class Preprocessing(RandomConvolutions):
        """Its hash is that of the weights, whatever happens to the images before."""

        contrast = 1.0

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return super().__call__((images * self.contrast).to(torch.uint8))

    for rows in (True, False):
        net, folder = Preprocessing(), tmp_path / str(rows)
        measure_reference(chosen, ExtractorPass(extractor=net, rows=rows), batch=16, cache=folder)
        net.contrast = 0.95
        with pytest.warns(DamagedCacheWarning, match="other features of the first images than random convolutions"):
            found = measure_reference(chosen, ExtractorPass(extractor=net, rows=rows), batch=16, cache=folder)
        right = measure_reference(chosen, ExtractorPass(extractor=net, rows=rows), batch=16)
        assert torch.equal(found.moments, right.moments)
        again = measure_reference(chosen, ExtractorPass(extractor=net, rows=rows), batch=7, cache=folder)
        assert torch.equal(again.moments, right.moments)


def test_features_of_another_commit_are_used_with_a_warning(tmp_path: Path) -> None:
    chosen, net = ReferenceSet(images=DIGITS, split="train", count=50), Counting()
    measure_reference(chosen, ExtractorPass(extractor=net), batch=16, cache=tmp_path, commit="a")
    with pytest.warns(ProtocolWarning, match="cached features of digits .*another commit, 'a' not 'b'") as told:
        measure_reference(chosen, ExtractorPass(extractor=net), batch=16, cache=tmp_path, commit="b")
    assert len(told) == 1  # there are two files
    assert net.seen == 50 + 2 * FIRST


def test_damaged_files_are_made_again_and_a_missing_half_too(tmp_path: Path) -> None:
    chosen, net = ReferenceSet(images=DIGITS, split="train", count=50), Counting()
    measure_reference(chosen, ExtractorPass(extractor=net, rows=False), batch=16, cache=tmp_path)
    measure_reference(chosen, ExtractorPass(extractor=net), batch=16, cache=tmp_path)
    assert net.seen == 100 + 2 * FIRST
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.warns(DamagedCacheWarning, match="delete it and compute them again"):
        measure_reference(chosen, ExtractorPass(extractor=net), batch=16, cache=tmp_path)
    assert net.seen == 150 + 4 * FIRST  # before and after
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure_reference(chosen, ExtractorPass(extractor=net), batch=16, cache=tmp_path)
    assert net.seen == 150 + 5 * FIRST


def test_a_cache_that_cannot_be_written_costs_no_result(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    chosen = ReferenceSet(images=DIGITS, split="train", count=50)
    wanted = ExtractorPass(extractor=RandomConvolutions())
    assert measure_reference(chosen, wanted, batch=16, cache=tmp_path / "file" / "x").matrix().shape[0] == 50


def test_a_subset_is_drawn_without_replacement_over_the_whole_set() -> None:
    chosen = ReferenceSet(images=DIGITS, split="train", count=600)
    rows = chosen.rows
    assert len(set(rows.tolist())) == 600
    assert (np.diff(rows) > 0).all()
    # Uniform over a set in order: the mean of 600 of 1,797 places, within 4 of its standard errors.
    assert abs(rows.mean() - 898) < 4 * 1797 / np.sqrt(12 * 600)
    assert np.array_equal(replace(chosen).rows, rows)
    assert np.array_equal(ReferenceSet(images=DIGITS, split="train").rows, np.arange(1797))


@pytest.mark.parametrize("count", [0, 1, 1798])
def test_more_images_than_there_are_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"references={count}: digits has 1797 images"):
        ReferenceSet(images=DIGITS, split="train", count=count)
