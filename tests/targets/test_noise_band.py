"""The picked band: the level below which the source has all the weight to a tolerance, by distances alone."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, special
from torch import Tensor

import stablefield as sf


def gaussian(n: int, d: int, rng: torch.Generator) -> Tensor:
    return torch.randn(n, d, generator=rng)


def own_weight(pool: sf.Pool, level: float, rng: torch.Generator, repeats: int = 4) -> float:
    """Mean source weight of every sample of a pool at a noise level."""
    data = pool.data
    assert isinstance(data, Tensor)
    x0 = data / 127.5 - 1 if data.dtype == torch.uint8 else data
    found = []
    for _ in range(repeats):
        x_t = sf.EDM().perturb(x0, level, generator=rng)
        target = sf.StableTarget(sf.EDM(), references=pool)
        found.append(target(x0, x_t, level, pool.labels, torch.arange(len(x0)), generator=rng).source_weight)
    return float(torch.stack(found).double().mean())


def pools(rng: torch.Generator, smooth_images: Callable) -> dict[str, sf.Pool]:
    images = ((smooth_images(400, rng, size=8) + 1) * 127.5).round().to(torch.uint8)
    return {
        "uint8 images": sf.Pool(images),
        "mirrored images": sf.Pool(images, mirrored=True),
        "groups": sf.Pool(images, labels=torch.arange(400) % 7),
        "points of the plane": sf.Pool(gaussian(500, 2, rng)),
        "float64": sf.Pool(gaussian(300, 50, rng).double()),
        "tiny": sf.Pool(gaussian(3, 4, rng)),
    }


def test_the_own_weight_below_the_band_is_one_to_the_tolerance_and_soon_above_it_is_not(
    rng: torch.Generator, smooth_images: Callable
) -> None:
    for name, pool in pools(rng, smooth_images).items():
        for tolerance in (0.02, 0.1):
            band = sf.pick_noise_band(pool, tolerance=tolerance, rows=500)
            assert own_weight(pool, band.level, rng) > 1 - 1.3 * tolerance, name
            assert own_weight(pool, 0.5 * band.level, rng) > 1 - tolerance, name
            # A bound that is not idle: half as much noise again loses more than the tolerance.
            assert own_weight(pool, 1.5 * band.level, rng) < 1 - tolerance, name
            assert band.lost <= tolerance


@pytest.mark.parametrize("tolerance", [0.001, 0.02, 0.3])
def test_two_samples_have_the_band_that_the_integral_says(tolerance: float) -> None:
    distance = 3.0

    def lost(level: float) -> float:
        r = distance / level

        def weight(z: float) -> float:
            return math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * special.expit(r * z - r**2 / 2)

        return integrate.quad(weight, -12, 12, limit=400)[0]

    truth = optimize.brentq(lambda level: lost(level) - tolerance, 0.1, 1e3)
    data = torch.tensor([[0.0, 1.0], [3.0, 1.0]])
    assert sf.pick_noise_band(sf.Pool(data), tolerance=tolerance).level == pytest.approx(truth, rel=0.012)


def test_three_times_the_data_have_three_times_the_band_and_moved_data_the_same(rng: torch.Generator) -> None:
    data = gaussian(200, 30, rng)
    level = sf.pick_noise_band(sf.Pool(data)).level
    assert sf.pick_noise_band(sf.Pool(3 * data)).level == pytest.approx(3 * level, rel=0.012)
    assert sf.pick_noise_band(sf.Pool(data + 200)).level == pytest.approx(level, rel=0.012)


def test_what_leaves_no_choice_is_told_as_zero_or_infinity() -> None:
    one, equal = torch.randn(1, 3), torch.full((50, 3), 0.3)
    assert sf.pick_noise_band(sf.Pool(one)).level == math.inf
    assert sf.pick_noise_band(sf.Pool(torch.randn(9, 3), size=1)).level == math.inf
    assert sf.pick_noise_band(sf.Pool(torch.randn(9, 3), labels=torch.arange(9))).level == math.inf
    assert sf.pick_noise_band(sf.Pool(equal)).level == 0
    assert sf.pick_noise_band(sf.Pool(torch.zeros(50, 3, dtype=torch.uint8))).level == 0
    pairs = torch.randn(20, 3).repeat(2, 1)  # every sample twice: the source never has more than half
    assert sf.pick_noise_band(sf.Pool(pairs)).level == 0


def test_an_own_mirror_image_competes(rng: torch.Generator) -> None:
    half = torch.randn(40, 3, 6, 3, generator=rng)
    symmetric = torch.cat([half, half.flip(-1)], -1)
    assert sf.pick_noise_band(sf.Pool(symmetric)).level > 0
    assert sf.pick_noise_band(sf.Pool(symmetric, mirrored=True)).level == 0


def test_fewer_references_per_step_have_a_higher_band(rng: torch.Generator) -> None:
    data = gaussian(2000, 10, rng)
    levels = [sf.pick_noise_band(sf.Pool(data, size)).level for size in (10, 200, None)]
    assert levels[0] > 1.2 * levels[1] > 1.2 * levels[2]
    # A part of a set stands for the whole.
    assert sf.pick_noise_band(sf.Pool(data[:200]), total=2000).level == pytest.approx(levels[2], rel=0.2)
    # Each reference stands for ten: the band of 200 is that of 200 of them, to the luck of the draw.
    parts = [sf.pick_noise_band(sf.Pool(part)).level for part in data.split(200)]
    assert levels[1] == pytest.approx(sum(parts) / 10, rel=0.15)


def test_weights_on_five_samples_give_the_band_of_a_pool_of_those_five(rng: torch.Generator) -> None:
    data = gaussian(500, 10, rng)
    some = torch.tensor([3, 77, 140, 201, 499])
    source_only = sf.pick_noise_band(sf.Pool(data[some]))
    for scale in (1.0, 0.01):
        weights = torch.zeros(500).index_fill(0, some, scale)
        band = sf.pick_noise_band(sf.Pool(data, weights=weights))
        assert band.level == pytest.approx(source_only.level, rel=0.012)
        assert band.nearest == pytest.approx(source_only.nearest, rel=0.012)
    # Far from the band of all.
    assert source_only.level > 1.5 * sf.pick_noise_band(sf.Pool(data)).level


def test_equal_weights_change_no_band(rng: torch.Generator) -> None:
    data = gaussian(400, 10, rng)
    for size in (None, 40):
        level = sf.pick_noise_band(sf.Pool(data, size), rows=400).level
        weighted = sf.pick_noise_band(sf.Pool(data, size, weights=torch.full((400,), 3.0)), rows=400).level
        # With a size, the row's own comes in addition: 39.9 others in place of 39.
        assert weighted == pytest.approx(level, rel=0.02)
        assert sf.pick_noise_band(sf.Pool(data, size, weights=torch.ones(400)), rows=200).level == pytest.approx(
            level, rel=0.1
        )


@pytest.mark.parametrize("rows", [60, 1000])
def test_the_band_of_a_weighted_pool_bounds_the_loss_of_the_rows_that_its_sampler_draws(
    rows: int, rng: torch.Generator
) -> None:
    """A heavy part that is dense beside a light one that is not: rows come from the heavy part, mostly."""
    data = torch.cat([0.1 * gaussian(100, 4, rng), 3 + gaussian(300, 4, rng)])
    for heavy in (0.02, 1.0, 50.0):
        weights = torch.where(torch.arange(400) < 100, heavy, 1.0)
        pool = sf.Pool(data, weights=weights)
        for tolerance in (0.02, 0.1):
            band = sf.pick_noise_band(pool, tolerance=tolerance, rows=rows)
            index = torch.multinomial(weights, 4000, replacement=True, generator=rng)
            stable = sf.StableTarget(sf.EDM(), references=pool, validate_args=False)

            def own(level: float, index: Tensor = index, stable: sf.StableTarget = stable) -> float:
                x_t = sf.EDM().perturb(data[index], level, generator=rng)
                return float(stable(data[index], x_t, level, index=index).source_weight.double().mean())

            assert own(band.level) > 1 - 1.3 * tolerance
            # Not idle: at most three times too low.
            assert own(3 * band.level) < 1 - tolerance


def test_large_weighted_pools_are_probed_on_some_that_can_be_drawn(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = gaussian(4000, 6, rng)
    weights = (torch.arange(4000) % 2).float() * (1 + torch.arange(4000) % 3)
    whole = sf.pick_noise_band(sf.Pool(data, weights=weights))
    monkeypatch.setattr("stablefield.targets._band._REFERENCES", 1000)
    part = sf.pick_noise_band(sf.Pool(data, weights=weights))
    assert (whole.references, part.references) == (2000, 1000)
    assert part.level == pytest.approx(whole.level, rel=0.2)


def test_large_pools_are_probed_on_some(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    data = gaussian(4000, 6, rng)
    whole = sf.pick_noise_band(sf.Pool(data, labels=torch.arange(4000) % 2))
    monkeypatch.setattr("stablefield.targets._band._REFERENCES", 1000)
    part = sf.pick_noise_band(sf.Pool(data, labels=torch.arange(4000) % 2))
    assert (whole.references, part.references) == (4000, 1000)
    assert part.level == pytest.approx(whole.level, rel=0.2)


def test_a_pool_has_one_band_and_a_mapped_file_the_same(rng: torch.Generator, tmp_path: Path) -> None:
    data = torch.randint(0, 256, (300, 3, 4, 4), generator=rng, dtype=torch.uint8)
    np.save(tmp_path / "data.npy", data.numpy())
    band = sf.pick_noise_band(sf.Pool(data), rows=100)
    assert sf.pick_noise_band(sf.Pool(data), rows=100) == band
    assert sf.pick_noise_band(sf.Pool(np.load(tmp_path / "data.npy", mmap_mode="r")), rows=100) == band
    other = sf.pick_noise_band(sf.Pool(data), rows=100, generator=rng)
    assert other.level != band.level
    assert other.level == pytest.approx(band.level, rel=0.2)
    assert float(band) == band.level


def test_wrong_use_is_told() -> None:
    pool = sf.Pool(torch.randn(4, 2))
    for tolerance in (0.0, 0.5, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"tolerance is .*between 0 and 0\.5"):
            sf.pick_noise_band(pool, tolerance=tolerance)
    with pytest.raises(ValueError, match="rows is 0"):
        sf.pick_noise_band(pool, rows=0)
    with pytest.raises(ValueError, match="total is 3, but the pool alone has 4"):
        sf.pick_noise_band(pool, total=3)
    with pytest.raises(ValueError, match="NaN or inf"):
        sf.pick_noise_band(sf.Pool(torch.tensor([[1.0], [math.nan]])))


def test_each_label_has_the_level_of_a_pool_of_its_samples_and_rows_without_one_that_of_all(
    rng: torch.Generator,
) -> None:
    # Dense and sparse labels, one of a single sample, and one of none.
    sizes = [400, 40, 1, 0, 159]
    labels = torch.repeat_interleave(torch.arange(5), torch.tensor(sizes))
    scale = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.7])[labels]
    data = torch.randn(600, 6, generator=rng) * scale[:, None]
    order = torch.randperm(600, generator=rng)
    data, labels = data[order], labels[order]
    band = sf.pick_noise_band(sf.Pool(data, labels=labels), rows=600)
    assert band.by_label is not None
    assert band.unlabelled == pytest.approx(sf.pick_noise_band(sf.Pool(data), rows=600).level, rel=0.012)
    for label in (0, 1, 4):
        alone = sf.pick_noise_band(sf.Pool(data[labels == label]), rows=400).level
        # 32 rows of each.
        assert band.by_label[label] == pytest.approx(alone, rel=0.25)
    assert band.by_label[4] < band.by_label[0] < band.by_label[1]
    assert band.by_label[2] == band.by_label[3] == math.inf
    assert band.unlabelled < band.level
    few = sf.pick_noise_band(sf.Pool(data, labels=labels, unlabelled_size=30), rows=600)
    assert few.unlabelled is not None
    assert few.unlabelled > band.unlabelled
    assert few.level == band.level


def test_rows_use_references_from_the_level_of_their_label(rng: torch.Generator) -> None:
    data, labels = torch.randn(90, 4, generator=rng), torch.arange(90) % 3
    pool = sf.Pool(data, labels=labels)
    band = dataclasses.replace(sf.pick_noise_band(pool), by_label=(0.5, 2.0, math.inf), unlabelled=1.0)
    index = torch.arange(24)
    seen = labels[index].clone()
    seen[12:] = -1
    for level in (0.4, 0.9, 1.5, 3.0):
        x0 = data[index]
        x_t = x0 + level * torch.randn(x0.shape, generator=rng)
        t = torch.full((24,), level)
        found = sf.StableTarget(sf.EDM(), references=pool, noise_band=band)(x0, x_t, t, seen, index)
        every = sf.StableTarget(sf.EDM(), references=pool)(x0, x_t, t, seen, index)
        limits = torch.tensor([0.5, 2.0, math.inf, 1.0])[seen]  # -1 is the last
        used = (level >= limits)[:, None]
        torch.testing.assert_close(found.x0, torch.where(used, every.x0, x0), rtol=0, atol=1e-6)
    # Without labels in the call there is one level for all.
    free = sf.StableTarget(sf.EDM(), references=sf.Pool(data), noise_band=band)
    x_t = x0 + band.level * 0.9 * torch.randn(x0.shape, generator=rng)
    assert torch.equal(free(x0, x_t, 0.9 * band.level, index=index).x0, x0)


def test_flipped_samples_compete_as_others_do(rng: torch.Generator) -> None:
    data, flipped = torch.randn(300, 8, generator=rng), torch.randn(300, 8, generator=rng)
    both = sf.pick_noise_band(sf.Pool(torch.cat([data, flipped])), rows=600)
    band = sf.pick_noise_band(sf.Pool(data, flipped=flipped), rows=600)
    assert band.level == pytest.approx(both.level, rel=0.012)
    assert band.level < sf.pick_noise_band(sf.Pool(data), rows=600).level
    # A flipped sample that is nearly the sample competes at every level.
    assert sf.pick_noise_band(sf.Pool(data, flipped=data + 1e-6)).level < 1e-5
    labels = torch.arange(300) % 3
    named = sf.pick_noise_band(sf.Pool(data, labels=labels, flipped=flipped), rows=600)
    together = sf.pick_noise_band(sf.Pool(torch.cat([data, flipped]), labels=labels.repeat(2)), rows=600)
    assert named.by_label is not None
    assert together.by_label is not None
    assert named.by_label == pytest.approx(together.by_label, rel=0.2)


def test_labels_of_few_samples_in_a_large_pool_have_a_level(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, labels = torch.randn(600, 4, generator=rng), torch.arange(600) % 100
    whole = sf.pick_noise_band(sf.Pool(data, labels=labels))
    monkeypatch.setattr("stablefield.targets._band._REFERENCES", 60)
    few = sf.pick_noise_band(sf.Pool(data, labels=labels))
    assert few.by_label is not None
    assert max(few.by_label) < math.inf
    assert few.by_label == pytest.approx(whole.by_label, rel=0.012)
    # A part of a set says nothing of the labels of the others.
    assert sf.pick_noise_band(sf.Pool(data, labels=labels), total=1200).by_label is None
    drawn = sf.pick_noise_band(sf.Pool(data, labels=labels, label_size=2))
    assert drawn.by_label is not None
    assert whole.by_label is not None
    assert all(a > b for a, b in zip(drawn.by_label, whole.by_label, strict=True))
    assert drawn.level > whole.level
    monkeypatch.setattr("stablefield.targets._band._MOST_LABELS", 50)
    assert sf.pick_noise_band(sf.Pool(data, labels=labels)).by_label is None
