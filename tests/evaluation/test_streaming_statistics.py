# pyright: reportInvalidTypeForm=false

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing import spawn

from stablefield.evaluation._features import Statistics, statistics_of

streaming = pytest.importorskip("stablefield.evaluation._extraction", reason="torchmetrics", exc_type=ImportError)

DIM = 7


def features(n: int = 211, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    mixing = torch.randn(DIM, DIM, dtype=torch.float64, generator=generator)
    return torch.randn(n, DIM, dtype=torch.float64, generator=generator) @ mixing + offset


def ragged(x: Tensor) -> list[Tensor]:
    return list(x.split([1, 40, 2, 0, 100, len(x) - 143]))


def streamed(batches: list[Tensor]) -> "streaming.StreamingStatistics":
    metric = streaming.StreamingStatistics(DIM)
    for batch in batches:
        metric.update(batch)
    return metric


def assert_same(got: Statistics, expected: Statistics, tolerance: float = 1e-12) -> None:
    assert got.count == expected.count
    torch.testing.assert_close(got.mean, expected.mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.covariance, expected.covariance, rtol=tolerance, atol=tolerance)


def test_one_shot_is_numpys_mean_and_covariance() -> None:
    x = features()
    got = statistics_of(x)
    np.testing.assert_allclose(got.mean, x.numpy().mean(0), atol=1e-13)
    np.testing.assert_allclose(got.covariance, np.cov(x.numpy(), rowvar=False), atol=1e-12)


def test_ragged_batches_give_the_statistics_of_the_whole() -> None:
    assert_same(streamed(ragged(features())).statistics(), statistics_of(features()))


def test_an_offset_of_a_hundred_million_leaves_the_covariance_its_digits() -> None:
    # Sums of squares would hold 1e16 here, and no digit of a covariance of order 1.
    x = features(offset=1e8)
    near = x - 1e8
    got = streamed(ragged(x)).statistics()
    torch.testing.assert_close(got.covariance, statistics_of(near).covariance, rtol=1e-7, atol=1e-7)


def test_merged_states_give_the_statistics_of_the_whole() -> None:
    x = features()
    first, second = streamed(ragged(x[:150])), streamed([x[150:]])
    first.merge_state(second)
    assert_same(first.statistics(), statistics_of(x))


@pytest.mark.parametrize("share", [[150, 61], [211, 0], [70, 71, 70]])
def test_simulated_processes_give_the_statistics_of_the_whole_to_each(share: list[int]) -> None:
    parts = [streamed(list(part.split(32)) if len(part) else []) for part in features().split(share)]
    states = [part.moments.clone() for part in parts]
    for mine in parts:
        metric = streaming.StreamingStatistics(DIM)
        metric.distributed_available_fn = lambda: True
        metric.dist_sync_fn = lambda *_, **__: states
        metric.update(torch.empty(0, DIM))
        metric.moments = mine.moments
        assert_same(metric.statistics(), statistics_of(features()))
        # The process's own state comes back after the synchronised result.
        assert torch.equal(metric.moments, mine.moments)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    x = features()
    statistics, rows = streaming.StreamingStatistics(DIM), streaming.StreamingFeatures(DIM)
    # Every other sample each, and one of padding that both have.
    numbers = torch.cat([torch.arange(rank, len(x), 2), torch.tensor([0])])
    for batch in numbers.split(17):
        rows.update(x[batch], batch)
    for batch in numbers[:-1].split(17):
        statistics.update(x[batch])
    result = statistics.statistics()
    torch.save(
        {"count": result.count, "mean": result.mean, "covariance": result.covariance, "rows": rows.features()},
        os.path.join(folder, f"{rank}.pt"),
    )
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_statistics_and_rows_of_the_whole_to_each(tmp_path: Path) -> None:
    spawn(work, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        rows = got.pop("rows")
        assert_same(Statistics(**got), statistics_of(features()))
        assert torch.equal(rows, features().float())


def test_rows_come_back_in_the_order_of_their_numbers_and_once() -> None:
    x = features(20)
    metric = streaming.StreamingFeatures(DIM)
    order = torch.tensor([3, 1, 2, 0, 19, 4, 3])
    for batch in order.split(2):
        metric.update(x[batch], batch)
    assert torch.equal(metric.features(), x[[0, 1, 2, 3, 4, 19]].float())


def test_moving_to_half_precision_leaves_the_state_in_float64() -> None:
    metric = streamed(ragged(features())).half()
    assert metric.moments.dtype == torch.float64
    assert_same(metric.statistics(), statistics_of(features()))


def test_bad_batches_are_refused() -> None:
    metric = streaming.StreamingStatistics(DIM)
    with pytest.raises(ValueError, match="features has 3 features per row, this stream was made for 7"):
        metric.update(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="the first is row 1"):
        metric.update(torch.tensor([[0.0] * DIM, [torch.nan] * DIM]))
    with pytest.raises(ValueError, match="statistics of 0 rows: at least 2 are needed"):
        streaming.StreamingStatistics(DIM).statistics()
    with pytest.raises(ValueError, match="pass one integer per row"):
        streaming.StreamingFeatures(DIM).update(torch.zeros(2, DIM), torch.zeros(3, dtype=torch.long))
