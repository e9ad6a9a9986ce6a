"""The averaged weights follow the half-life rule."""

import pytest
import torch

from stablefield.training.ema import ema_decay, follower, update_ema


def test_weight_of_the_past_halves_over_the_half_life() -> None:
    decay = ema_decay(50, images_seen=10**9, half_life=1000, ramp_share=0.05)
    assert decay ** (1000 / 50) == pytest.approx(0.5)


def test_half_life_is_a_share_of_the_images_seen_at_first() -> None:
    assert ema_decay(10, images_seen=2000, half_life=1e9, ramp_share=0.05) == pytest.approx(0.5 ** (10 / 100))
    assert ema_decay(10, images_seen=0, half_life=1e9, ramp_share=0.05) == 0


def test_average_equals_the_explicit_weighted_sum() -> None:
    model = torch.nn.Linear(3, 2).double()
    average = follower(model)
    expected = model.weight.detach().clone()
    for k in range(5):
        with torch.no_grad():
            model.weight.add_(k + 1.0)
        update_ema(average, model, 0.9)
        expected = 0.9 * expected + 0.1 * model.weight.detach()
    torch.testing.assert_close(average.weight, expected)
    assert not average.weight.requires_grad
