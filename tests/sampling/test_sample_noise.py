"""Claims on noise whose rows belong to seeds."""

import pytest
import torch

import stablefield.sampling as sampling


def test_a_row_depends_on_its_seed_only_in_the_latents_and_in_every_later_draw():
    together = sampling.SampleNoise([5, 0, 123456789])
    source_only = sampling.SampleNoise([123456789])
    latents = together.latents((3, 4, 4))
    assert latents.shape == (3, 3, 4, 4)
    assert torch.equal(latents[2:], source_only.latents((3, 4, 4)))
    for _ in range(3):
        draws = together(latents)
        assert torch.equal(draws[2:], source_only(latents[2:]))
        assert not torch.equal(draws, latents)
        latents = draws


def test_order_and_repetition_of_seeds_are_free():
    rows = sampling.SampleNoise([1, 2, 1]).latents((5,))
    assert torch.equal(rows[0], rows[2])
    assert torch.equal(sampling.SampleNoise([2, 1]).latents((5,)), rows[[1, 0]])


def test_rows_are_standard_normal_and_uncorrelated_between_neighbouring_seeds():
    rows = sampling.SampleNoise(range(64)).latents((4096,), dtype=torch.float64)
    # Mean and variance within 5 of their standard errors over all values; correlations within 5 / sqrt(4096).
    assert rows.mean().abs() < 5 / 512
    assert (rows.var() - 1).abs() < 5 * 2**0.5 / 512
    assert (torch.corrcoef(rows) - torch.eye(64)).abs().max() < 5 / 64


def test_dtype_and_shape_follow_the_argument():
    noise = sampling.SampleNoise([1, 2])
    assert noise(torch.zeros(2, 3, dtype=torch.float64)).dtype == torch.float64
    assert noise(torch.zeros(2, 3, 1)).shape == (2, 3, 1)
    assert len(noise) == 2


@pytest.mark.parametrize("seeds", [[], [-1], [2**32], [3, 2**40]])
def test_seeds_that_would_collide_unnoticed_are_refused(seeds):
    with pytest.raises(ValueError, match="seeds"):
        sampling.SampleNoise(seeds)


def test_a_batch_of_another_size_is_refused():
    with pytest.raises(ValueError, match="x has 3 rows, but there are 2 seeds"):
        sampling.SampleNoise([1, 2])(torch.zeros(3, 4))
