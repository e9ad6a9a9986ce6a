import numpy as np
import pytest
import torch

from stablefield.evaluation._memorisation import nearest_ratio


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_ratios_are_those_of_a_double_loop() -> None:
    samples, training = torch.randn(20, 5, generator=rng()), torch.randn(33, 5, generator=rng(1))
    got = nearest_ratio(samples, training)
    for row, sample in enumerate(samples.double().numpy()):
        distances = [float(np.sqrt(((sample - image) ** 2).sum())) for image in training.double().numpy()]
        first, second = sorted(distances)[:2]
        assert got.ratio[row].item() == pytest.approx(first / second, abs=1e-12)
        assert got.distance[row].item() == pytest.approx(first, abs=1e-12)
        assert got.index[row].item() == distances.index(first)
    assert got.memorised == (got.ratio < 1 / 3).double().mean().item()
    assert got.closer is None


def test_copies_are_found_with_distance_and_ratio_exactly_zero() -> None:
    training = torch.randn(100, 30, generator=rng())
    got = nearest_ratio(training[[3, 50, 7]], training)
    assert got.ratio.tolist() == got.distance.tolist() == [0.0, 0.0, 0.0]
    assert got.index.tolist() == [3, 50, 7]
    assert got.memorised == 1.0


def test_a_copy_of_a_doubled_image_has_ratio_zero_by_definition() -> None:
    training = torch.tensor([[0.0], [0.0], [5.0]])
    assert nearest_ratio(training[:1], training).ratio.tolist() == [0.0]


def test_fresh_samples_are_as_near_as_held_out_images_and_copies_nearer() -> None:
    training, held_out, fresh = torch.randn(3, 400, 8, generator=rng(2))
    good = nearest_ratio(fresh, training, held_out)
    copied = nearest_ratio(training + 0.01, training, held_out)
    assert good.closer == pytest.approx(0.5, abs=0.1)
    # By chance a ratio is below 1/3 with probability about 3^-8.
    assert good.memorised <= 0.01
    assert good.held_out_memorised is not None
    assert good.held_out_memorised <= 0.01
    assert copied.closer == 1.0
    assert copied.memorised == 1.0


def test_closer_is_the_share_of_pairs_with_ties_counted_half() -> None:
    training = torch.tensor([[0.0], [100.0]])
    got = nearest_ratio(torch.tensor([[1.0], [2.0], [4.0]]), training, torch.tensor([[2.0], [3.0]]))
    # 1 < 2, 1 < 3, 2 = 2, 2 < 3; 4 is below neither.
    assert got.closer == pytest.approx(3.5 / 6, abs=1e-12)


def test_one_training_image_and_odd_thresholds_are_refused() -> None:
    with pytest.raises(ValueError, match="training has 1 rows: at least 2 are needed"):
        nearest_ratio(torch.zeros(3, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"threshold is 1.5"):
        nearest_ratio(torch.zeros(3, 2), torch.zeros(3, 2), threshold=1.5)
