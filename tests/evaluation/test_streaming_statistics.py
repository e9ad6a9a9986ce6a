"""Moments and rows over batches and processes are those of the whole."""

import os
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing import spawn

from stablefield._distributed import Ranks
from stablefield.evaluation._extraction import ExtractorPass, extract, joined
from stablefield.evaluation._features import empty_moments, join_moments, moments_of, unpack

DIM = 7


def features(n: int = 211, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    mixing = torch.randn(DIM, DIM, dtype=torch.float64, generator=generator)
    return torch.randn(n, DIM, dtype=torch.float64, generator=generator) @ mixing + offset


def streamed(x: Tensor) -> Tensor:
    """Moments of ragged batches, joined one after the other."""
    parts = x.split([1, 40, 2, 100, len(x) - 143])
    return reduce(join_moments, map(moments_of, parts), empty_moments(DIM))


def assert_same(got: Tensor, x: Tensor, tolerance: float = 1e-12) -> None:
    """Packed moments are numpy's of all rows."""
    count, mean, covariance = unpack(got)
    assert count == len(x)
    np.testing.assert_allclose(mean, x.numpy().mean(0), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(covariance, np.cov(x.numpy(), rowvar=False), rtol=tolerance, atol=tolerance)


def test_one_shot_is_numpys_mean_and_covariance() -> None:
    assert_same(moments_of(features()), features())


def test_ragged_batches_give_the_statistics_of_the_whole() -> None:
    assert_same(streamed(features()), features())


def test_an_offset_of_a_hundred_million_leaves_the_covariance_its_digits() -> None:
    # Sums of squares would hold 1e16 here, and no digit of a covariance of order 1.
    x = features(offset=1e8)
    _, _, covariance = unpack(streamed(x))
    np.testing.assert_allclose(covariance, np.cov((x - 1e8).numpy(), rowvar=False), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("share", [[150, 61], [211, 0], [70, 71, 70], [1, 0, 200, 10, 0]])
def test_the_moments_of_all_processes_are_those_of_the_whole(share: list[int]) -> None:
    parts = [moments_of(part) if len(part) else empty_moments(DIM) for part in features().split(share)]
    assert_same(joined(parts), features())


class Table:
    """An extractor that looks features up by the one pixel of an image."""

    name, dim, sha256, resize = "table", DIM, "0" * 64, "none"

    def __call__(self, images: Tensor) -> Tensor:
        return features()[images.flatten().long()]


def batches(numbers: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return [(part.to(torch.uint8).reshape(-1, 1, 1, 1), part) for part in numbers.split(size)]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    # Every other sample each, and one of padding that both have.
    numbers = torch.cat([torch.arange(rank, len(features()), 2), torch.tensor([0])])
    with Ranks.launched() as ranks:
        wanted = [ExtractorPass(extractor=Table(), moments=False)]
        (rows,) = extract(batches(numbers, 17), wanted, ranks=ranks)
        wanted = [ExtractorPass(extractor=Table(), rows=False)]
        (moments,) = extract(batches(numbers[:-1], 17), wanted, ranks=ranks)
        # Without them a process measures for itself, and the other need not take part.
        alone = extract(batches(numbers[:5], 17), wanted)[0].moments if rank else None
    found = {"rows": rows.matrix(), "moments": moments.moments, "alone": alone}
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_statistics_and_rows_of_the_whole_to_each(tmp_path: Path) -> None:
    spawn(work, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert_same(got["moments"], features())
        assert torch.equal(got["rows"], features())
    assert unpack(got["alone"])[0] == 5


def test_rows_come_back_in_the_order_of_their_numbers_and_once() -> None:
    order = torch.tensor([3, 1, 2, 0, 19, 4, 3])
    (found,) = extract(batches(order, 2), [ExtractorPass(extractor=Table())])
    assert torch.equal(found.matrix(), features()[[0, 1, 2, 3, 4, 19]])


class Half(Table):
    def __call__(self, images: Tensor) -> Tensor:
        return super().__call__(images).half()


def test_features_in_half_precision_leave_the_moments_in_float64() -> None:
    (found,) = extract(batches(torch.arange(211), 16), [ExtractorPass(extractor=Half())])
    assert found.moments is not None
    assert found.moments.dtype == torch.float64
    assert_same(found.moments, features().half().double())
