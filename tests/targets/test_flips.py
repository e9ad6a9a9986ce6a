"""Flips: undone on the query and redone on the mean they equal a flipped pool; mirrored pools equal doubled ones."""

import pytest
import torch
from torch import Tensor

import stablefield as sf

SIGMA = 3.0
INDEX = torch.tensor([0, 3, 3, 7, 11, 5])
ACROSS = torch.tensor([True, False, True, True, False, False])
DOWN = torch.tensor([False, False, True, True, True, False])


def assert_row(target: sf.Target, row: int, truth: sf.Posterior) -> None:
    torch.testing.assert_close(target.x0[row], truth.mean[0], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(target.variance[row], truth.variance[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(target.ess[row], truth.ess[0], rtol=1e-10, atol=0)
    assert truth.source_weight is not None
    torch.testing.assert_close(target.source_weight[row], truth.source_weight[0], rtol=1e-10, atol=1e-12)


def flipped(x: Tensor, across: bool, down: bool) -> Tensor:
    if across:
        x = x.flip(-1)
    return x.flip(-2) if down else x


def case(rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(pool, x0, x_t): twelve images and six rows, flipped across where ACROSS, down where DOWN says so."""
    pool = torch.randn(12, 2, 3, 4, generator=rng, dtype=torch.float64)
    x0 = torch.stack([flipped(pool[k], a, d) for k, a, d in zip(INDEX, ACROSS, DOWN, strict=True)])
    return pool, x0, x0 + SIGMA * torch.randn(x0.shape, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("kernel", [sf.GaussianKernel(), sf.StudentTKernel(5.0)], ids=repr)
def test_rows_flipped_both_ways_see_the_pool_flipped_both_ways(rng: torch.Generator, kernel) -> None:
    pool, x0, x_t = case(rng)
    target = sf.StableTarget(sf.EDM(), references=sf.Pool(pool), kernel=kernel)
    found = target(x0, x_t, SIGMA, index=INDEX, flip=torch.stack([ACROSS, DOWN], 1))
    for row in range(6):
        seen = flipped(pool, bool(ACROSS[row]), bool(DOWN[row]))
        own = INDEX[row : row + 1]
        assert_row(found, row, sf.posterior(x_t[row : row + 1], 1.0, SIGMA, seen, own, kernel=kernel))
    assert found.ess.max() > 2


def test_one_flag_per_row_flips_the_last_axis(rng: torch.Generator) -> None:
    pool, _, _ = case(rng)
    x0 = torch.stack([flipped(pool[k], a, False) for k, a in zip(INDEX, ACROSS, strict=True)])
    x_t = x0 + SIGMA * torch.randn(x0.shape, generator=rng, dtype=torch.float64)
    target = sf.StableTarget(sf.EDM(), references=sf.Pool(pool))
    by_flag = target(x0, x_t, SIGMA, index=INDEX, flip=ACROSS)
    by_column = target(x0, x_t, SIGMA, index=INDEX, flip=ACROSS[:, None])
    assert torch.equal(by_flag.x0, by_column.x0)
    for row in range(6):
        seen = flipped(pool, bool(ACROSS[row]), False)
        assert_row(by_flag, row, sf.posterior(x_t[row : row + 1], 1.0, SIGMA, seen, INDEX[row : row + 1]))


def test_references_from_the_batch_are_unflipped_and_flipped_as_the_row(rng: torch.Generator) -> None:
    _, x0, x_t = case(rng)
    found = sf.StableTarget(sf.EDM(), references=sf.InBatch())(x0, x_t, SIGMA, flip=torch.stack([ACROSS, DOWN], 1))
    straight = torch.stack([flipped(x, a, d) for x, a, d in zip(x0, ACROSS, DOWN, strict=True)])
    for row in range(6):
        seen = flipped(straight, bool(ACROSS[row]), bool(DOWN[row]))
        assert_row(found, row, sf.posterior(x_t[row : row + 1], 1.0, SIGMA, seen, torch.tensor([row])))


@pytest.mark.parametrize("kernel", [sf.GaussianKernel(), sf.StudentTKernel(5.0)], ids=repr)
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_a_mirrored_pool_is_the_doubled_pool(rng: torch.Generator, kernel, chunk_size: int | None) -> None:
    pool, _, _ = case(rng)
    x0 = torch.stack([flipped(pool[k], a, False) for k, a in zip(INDEX, ACROSS, strict=True)])
    x_t = x0 + SIGMA * torch.randn(x0.shape, generator=rng, dtype=torch.float64)
    references = sf.Pool(pool, mirrored=True)
    target = sf.StableTarget(sf.EDM(), references=references, kernel=kernel, chunk_size=chunk_size)
    found = target(x0, x_t, SIGMA, index=INDEX, flip=ACROSS)
    doubled = torch.cat([pool, pool.flip(-1)])
    truth = sf.posterior(x_t, 1.0, SIGMA, doubled, INDEX + 12 * ACROSS, kernel=kernel)
    for row in range(6):
        one = slice(row, row + 1)
        assert truth.source_weight is not None
        assert_row(
            found,
            row,
            sf.Posterior(
                truth.mean[one], truth.variance[one], truth.ess[one], truth.source_weight[one], truth.log_evidence[one]
            ),
        )
    plain = sf.posterior(x_t, 1.0, SIGMA, pool)
    assert (plain.mean - found.x0).abs().max() > 0.05


def test_a_mirrored_pool_keeps_its_labels(rng: torch.Generator) -> None:
    pool, _, _ = case(rng)
    labels = torch.arange(12) % 2
    x0 = pool[INDEX]
    x_t = x0 + SIGMA * torch.randn(x0.shape, generator=rng, dtype=torch.float64)
    seen = torch.where(torch.arange(6) < 4, labels[INDEX], -1)
    found = sf.StableTarget(sf.EDM(), references=sf.Pool(pool, labels=labels, mirrored=True))(
        x0, x_t, SIGMA, seen, INDEX
    )
    truth = sf.posterior(x_t, 1.0, SIGMA, torch.cat([pool, pool.flip(-1)]), INDEX, seen, labels.repeat(2))
    torch.testing.assert_close(found.x0, truth.mean, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(found.ess, truth.ess, rtol=1e-10, atol=0)


def test_certain_rows_are_returned_as_they_are_after_a_flip(rng: torch.Generator) -> None:
    pool = torch.randint(0, 256, (12, 2, 3, 4), generator=rng, dtype=torch.uint8)
    straight = pool[INDEX] / 127.5 - 1
    x0 = torch.stack([flipped(x, a, d) for x, a, d in zip(straight, ACROSS, DOWN, strict=True)])
    x_t = x0 + 1e-3 * torch.randn(x0.shape, generator=rng)
    flip = torch.stack([ACROSS, DOWN], 1)
    found = sf.StableTarget(sf.EDM(), references=sf.Pool(pool))(x0, x_t, 1e-3, index=INDEX, flip=flip)
    assert torch.equal(found.x0, x0)
