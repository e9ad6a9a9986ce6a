"""Flips: undone on the query and redone on the mean they equal a flipped pool; mirrored pools equal doubled ones."""

import warnings
from typing import Any

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


def warned(pool: sf.Pool, images: Tensor, rng: torch.Generator, share: float = 0.5, **options: Any) -> list[str]:
    """The warnings of 70 calls in which rows are mirror images with the probability `share`.

    Options: `say`, whether to pass flip=; `rows`, of each sample in a batch; `calls` with each batch; `flips`, of the data;
    `source_only`, whether flipped rows use their source only; `validate_args`.
    """
    stable = sf.StableTarget(sf.EDM(), references=pool, validate_args=options.get("validate_args", True))
    flips = options.get("flips", images.flip(-1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(70):
            index = torch.randint(len(images), (8,), generator=rng).repeat(options.get("rows", 1))
            flip = (torch.rand(8, generator=rng) < share).repeat(options.get("rows", 1))
            x0 = torch.where(flip[:, None, None], flips[index], images[index])
            alone = torch.rand(len(flip), generator=rng) < 0.2
            given = {"flip": flip} if options.get("say", True) else {}
            given |= {"source_only": flip | alone} if options.get("source_only", False) else {}
            for _ in range(options.get("calls", 1)):
                stable(x0, sf.EDM().perturb(x0, 2.0, generator=rng), 2.0, index=index, **given)
    return [str(warning.message) for warning in caught]


def pools(images: Tensor, flips: Tensor) -> list[tuple[str, sf.Pool]]:
    std = torch.full_like(images, 0.01)
    made = [
        ("flipped", sf.Pool(images, flipped=flips)),
        ("arrays", sf.Pool(images.numpy(), flipped=flips.numpy())),
        ("moments", sf.Pool.from_moments(images, std, flipped_mean=flips, flipped_std=std)),
    ]
    return [*made, ("mirrored", sf.Pool(images, mirrored=True))]


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_a_pool_of_flips_warns_once_of_rows_that_are_not_flipped_half_of_the_time(
    share: float, rng: torch.Generator
) -> None:
    images = torch.randn(30, 2, 5, generator=rng)
    for name, pool in pools(images, images.flip(-1)):
        found = warned(pool, images, rng, share)
        assert len(found) == 1, name
        rows, flips = (int(found[0].split()[k]) for k in (2, 0))
        assert 120 <= rows <= 500, name
        assert abs(flips / rows - share) < 0.1, name
        assert "standard errors from half" in found[0]
        assert "probability 1/2" in found[0]


def test_a_mirrored_pool_warns_of_rows_that_are_never_flipped_and_do_not_say_so(rng: torch.Generator) -> None:
    """A mirror image without flip= is refused, so rows without it are not flipped."""
    images = torch.randn(30, 2, 5, generator=rng)
    found = warned(sf.Pool(images, mirrored=True), images, rng, 0.0, say=False)
    assert len(found) == 1
    assert found[0].startswith("0 of 1")
    assert "no flip= was given" in found[0]
    with pytest.raises(ValueError, match="pass flip= for mirrored rows"):
        warned(sf.Pool(images, mirrored=True), images, rng, 0.5, say=False)


def test_without_flips_the_target_of_a_pool_of_flips_has_half_the_mean_as_its_error(rng: torch.Generator) -> None:
    """What the warning says, at high noise: the mean over samples and flips in place of that over samples."""
    images = torch.cat([torch.ones(30, 1, 1), torch.zeros(30, 1, 1)], 2).double()
    index = torch.arange(30)
    x_t = images + 1e4 * torch.randn(images.shape, generator=rng, dtype=torch.float64)
    found = sf.StableTarget(sf.EDM(), references=sf.Pool(images, mirrored=True))(images, x_t, 1e4, index=index).x0
    torch.testing.assert_close(found.mean(0), torch.tensor([[0.5, 0.5]]).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(images.mean(0), torch.tensor([[1.0, 0.0]]).double(), rtol=0, atol=0)


def test_half_of_the_rows_flipped_are_not_warned_of(rng: torch.Generator) -> None:
    images = torch.randn(30, 2, 5, generator=rng)
    for options in ({"rows": 4}, {"calls": 2}):
        for name, pool in pools(images, images.flip(-1)):
            assert warned(pool, images, rng, **options) == [], (name, options)


def test_who_asked_for_no_checks_and_rows_with_their_source_only_are_not_warned_of(rng: torch.Generator) -> None:
    images = torch.randn(30, 2, 5, generator=rng)
    assert warned(sf.Pool(images, mirrored=True), images, rng, 0.0, validate_args=False) == []
    # Only unflipped rows use references: these are the ones that count.
    assert len(warned(sf.Pool(images, mirrored=True), images, rng, 0.5, source_only=True)) == 1


def test_samples_that_are_their_own_flips_count_for_neither(rng: torch.Generator) -> None:
    images = torch.randn(30, 2, 5, generator=rng)
    images = images + images.flip(-1)
    for name, pool in pools(images, images):
        assert warned(pool, images, rng, 0.0) == [], name
    # Of the others, which are half of the samples, all count.
    images[::2] = torch.randn(15, 2, 5, generator=rng)
    for name, pool in pools(images, images.flip(-1)):
        found = warned(pool, images, rng, 0.0)
        assert len(found) == 1, name
        assert int(found[0].split()[2]) < 500


def test_the_check_of_flips_cannot_fire_by_chance(rng: torch.Generator) -> None:
    """Of 300 runs of some looks, with batches of rows that share their flips, none is warned of."""
    from stablefield.targets._flips import Flips

    for n, rows in ((2, 1), (10, 4), (100, 1)):
        for _ in range(100):
            flips, size = Flips(n), 16
            for _ in range(12):
                index = torch.randint(n, (size,), generator=rng).repeat(rows)
                flip = (torch.rand(size, generator=rng) < 0.5).repeat(rows)
                check = flips.add(index, flip, torch.ones_like(flip), lambda index: index < 0)
                assert check is None or bool(check.holds.all())
                size = min(2 * size, 256)


def test_a_compiled_call_over_a_pool_of_flips_counts_nothing(rng: torch.Generator) -> None:
    images = torch.randn(4, 2, 5, generator=rng)
    pool = sf.Pool(images, mirrored=True)
    stable = sf.StableTarget(sf.EDM(), references=pool, capacity=64)
    index = torch.arange(4).repeat(16)
    x_t = sf.EDM().perturb(images[index], 2.0, generator=rng)
    flip = torch.zeros(64, dtype=torch.bool)
    call = torch.compile(
        lambda: stable(images[index], x_t, 2.0, index=index, flip=flip), fullgraph=True, backend="eager"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()
    assert pool._flips is None
