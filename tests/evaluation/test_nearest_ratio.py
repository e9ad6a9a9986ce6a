import numpy as np
import pytest
import torch

from stablefield.evaluation._memorisation import nearest_ratio
from stablefield.evaluation._neighbours import nearest


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("block", [3, 8192])
def test_the_next_nearest_is_another_image_by_brute_force(
    dtype: torch.dtype, mirrored: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "__kwdefaults__", nearest.__kwdefaults__ | {"columns": block, "rows": 7})
    pictures = torch.randn(12, 2, 4, generator=rng(), dtype=torch.float64).to(dtype)
    pictures[3] = (pictures[3] + pictures[3].flip(-1)) / 2  # the same in a mirror
    pictures[5] = pictures[4].flip(-1)  # a pair
    pictures[6] = pictures[7] + 0.05  # another image, however near
    pictures[0, 0, 0] = 0.0
    every = torch.cat([pictures, pictures[[3, 4, 4, 5, 9, 0]]])[torch.randperm(18, generator=rng(1))]
    every[-1] = pictures[0]
    every[-1, 0, 0] = -0.0
    training = torch.cat([every, every.flip(-1)]) if mirrored else every
    near = pictures.double() + 0.01 * torch.randn(12, 2, 4, generator=rng(2))
    samples = torch.cat([near, near.flip(-1), torch.randn(10, 2, 4, generator=rng(3)), training.double()]).to(dtype)
    held_out = torch.randn(9, 2, 4, generator=rng(4)).to(dtype)
    got = nearest_ratio(samples.flatten(1), training.flatten(1), held_out.flatten(1), mirrored=mirrored)
    rows, expected = training.double().numpy(), []
    for row, sample in enumerate(samples.double().numpy()):
        distances = np.sqrt(np.square(rows - sample).sum((1, 2)))
        one = rows[distances.argmin()]
        other = ~((rows == one).all((1, 2)) | (mirrored & (rows == one[:, ::-1]).all((1, 2))))
        expected.append(distances.min() / distances[other].min())
        assert got.distance[row].item() == pytest.approx(distances.min(), abs=1e-12)
        assert distances[got.index[row]] == pytest.approx(distances.min(), abs=1e-12)
    np.testing.assert_allclose(got.ratio, expected, rtol=0, atol=1e-10)
    assert got.memorised == np.mean(np.array(expected) < 1 / 3)
    assert (got.ratio[-len(training) :] == 0).all()
    # Two nearest rows instead would find hardly any copy.
    assert (np.array(expected)[[3, 4, 9]] < 1 / 3).all()


def test_duplicates_hide_no_copies_and_mirror_images_of_symmetric_ones_do_not_either() -> None:
    base, noise = torch.randn(50, 30, generator=rng()), 0.02 * torch.randn(50, 30, generator=rng(1))
    alone = nearest_ratio(base + noise, base)
    assert alone.memorised == 1
    for times in (2, 3):
        again = nearest_ratio(base + noise, base.repeat(times, 1))
        torch.testing.assert_close(again.ratio, alone.ratio, rtol=1e-12, atol=0)
        assert again.memorised == 1
    symmetric = base.reshape(50, 5, 6)
    symmetric = (symmetric + symmetric.flip(-1)) / 2
    both = torch.cat([symmetric, symmetric.flip(-1)]).flatten(1)
    once, twice = (
        nearest_ratio(symmetric.flatten(1) + noise, kept, mirrored=len(kept) > 50) for kept in (both[:50], both)
    )
    assert once.memorised == twice.memorised == 1
    # Nearly symmetric ones are two rows, and still one image.
    both[50:] += 1e-3
    assert nearest_ratio(symmetric.flatten(1) + noise, both, mirrored=True).memorised == 1
    assert nearest_ratio(symmetric.flatten(1) + noise, both).memorised == 0


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
    with pytest.raises(ValueError, match=r"^training shows a single image, 3 times: at least 2 are needed"):
        nearest_ratio(torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"^training shows a single image, 2 times"):
        nearest_ratio(torch.zeros(3, 2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), mirrored=True)
    with pytest.raises(ValueError, match=r"^mirrored=True, and training has 3 rows: pass each image's mirror image"):
        nearest_ratio(torch.zeros(3, 2), torch.zeros(3, 2), mirrored=True)
