"""Rows that use their source alone: below the noise band, or with an augmentation of their own."""

from dataclasses import dataclass, field
from typing import NoReturn

import pytest
import torch
from torch import Tensor

import stablefield as sf


@dataclass(frozen=True)
class Counting(sf.GaussianKernel):
    """A Gaussian kernel that notes for how many rows it was asked."""

    rows: list[int] = field(default_factory=list)

    def log_ratio(self, distance: Tensor, anchor_square: Tensor, sigma: Tensor, dim: int) -> Tensor:
        self.rows.append(len(distance))
        return super().log_ratio(distance, anchor_square, sigma, dim)


class Refusing(sf.InBatch):
    """References that must not be asked for."""

    def select(self, *arguments: object, **named: object) -> NoReturn:  # noqa: ARG002
        raise AssertionError("references were selected for a batch that needs none")


def case(rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(x0, x_t, t): eight rows of noise level 0.1 and 2 in turn."""
    x0 = torch.randn(8, 6, generator=rng, dtype=torch.float64)
    t = torch.tensor([0.1, 2.0], dtype=torch.float64).repeat(4)
    return x0, sf.EDM().perturb(x0, t, generator=rng), t


@pytest.mark.parametrize("process", [sf.EDM(), sf.VP(), sf.RectifiedFlow()], ids=repr)
def test_the_band_is_a_noise_level_whatever_the_process(process: sf.Process, rng: torch.Generator) -> None:
    x0, _, level = case(rng)
    t = process.time(level)
    x_t = process.perturb(x0, t, generator=rng)
    below = level < 1
    found = sf.StableTarget(process, references=sf.InBatch(), noise_band=1.0)(x0, x_t, t)
    full = sf.StableTarget(process, references=sf.InBatch())(x0, x_t, t)
    assert torch.equal(found.x0[below], x0[below])
    assert torch.equal(found.variance[below], torch.zeros(4, dtype=torch.float64))
    assert torch.equal(found.ess[below], torch.ones(4, dtype=torch.float64))
    assert torch.equal(found.source_weight[below], torch.ones(4, dtype=torch.float64))
    # Rows below the band stay references of those above it.
    for name in ("x0", "variance", "ess", "source_weight"):
        torch.testing.assert_close(getattr(found, name)[~below], getattr(full, name)[~below], rtol=1e-12, atol=1e-12)
    assert full.ess[~below].min() > 1.1


def test_rows_below_the_band_are_not_computed(rng: torch.Generator) -> None:
    x0, x_t, t = case(rng)
    kernel = Counting()
    sf.StableTarget(sf.EDM(), references=sf.InBatch(), noise_band=1.0, kernel=kernel)(x0, x_t, t)
    assert kernel.rows == [4]
    sf.StableTarget(sf.EDM(), noise_band=3.0, references=Refusing())(x0, x_t, t)
    with pytest.raises(AssertionError, match="were selected"):
        sf.StableTarget(sf.EDM(), noise_band=1.0, references=Refusing())(x0, x_t, t)


def test_the_band_serves_a_pool_and_groups(rng: torch.Generator) -> None:
    x0, x_t, t = case(rng)
    index, labels = torch.arange(8).flip(0), torch.arange(8) % 2
    data = x0[index]  # so that row i is sample index[i]
    pool = sf.Pool(data, labels=labels)
    found = sf.StableTarget(sf.EDM(), references=pool, noise_band=1.0)(x0, x_t, t, labels[index], index)
    truth = sf.posterior(x_t, 1.0, t, data, index, labels[index], labels)
    above = t > 1
    torch.testing.assert_close(found.x0[above], truth.mean[above], rtol=1e-11, atol=1e-12)
    assert torch.equal(found.x0[~above], x0[~above])


def test_lone_rows_keep_their_source_and_serve_no_other_row(rng: torch.Generator) -> None:
    x0, x_t, _ = case(rng)
    source_only = torch.tensor([False, True, False, False, True, False, False, True])
    labels = torch.tensor([0, 0, 1, 0, 1, 1, -1, 0])
    target = sf.StableTarget(sf.EDM(), references=sf.InBatch())
    for g in (None, labels):
        found = target(x0, x_t, 2.0, g, source_only=source_only)
        rest = target(x0[~source_only], x_t[~source_only], 2.0, None if g is None else g[~source_only])
        assert torch.equal(found.x0[source_only], x0[source_only])
        assert torch.equal(found.ess[source_only], torch.ones(3, dtype=torch.float64))
        torch.testing.assert_close(found.x0[~source_only], rest.x0, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(found.ess[~source_only], rest.ess, rtol=1e-12, atol=0)


def test_lone_rows_need_not_be_samples_of_the_pool(rng: torch.Generator) -> None:
    x0, x_t, t = case(rng)
    data, index = x0.clone(), torch.arange(8)
    source_only = torch.zeros(8, dtype=torch.bool)
    source_only[2], source_only[5] = True, True
    x0[source_only] *= -3  # an augmentation of their own
    x_t = sf.EDM().perturb(x0, t, generator=rng)
    flip = torch.zeros(8, dtype=torch.bool)
    pool = sf.Pool(data)
    found = sf.StableTarget(sf.EDM(), references=pool, noise_band=1.0)(
        x0, x_t, t, index=index, source_only=source_only, flip=flip
    )
    truth = sf.posterior(x_t, 1.0, t, data, index)
    computed = ~source_only & (t > 1)
    assert computed.sum() == 3
    torch.testing.assert_close(found.x0[computed], truth.mean[computed], rtol=1e-11, atol=1e-12)
    assert torch.equal(found.x0[~computed], x0[~computed])
    everyone = sf.StableTarget(sf.EDM(), references=Refusing())(x0, x_t, t, source_only=torch.ones(8, dtype=torch.bool))
    assert torch.equal(everyone.x0, x0)
