import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from stablefield.data._digits import open_digits
from stablefield.data._image_set import Origin, make_image_set
from stablefield.evaluation._extractor import RawPixels, raw
from stablefield.evaluation._features import fit_features, fit_moments
from stablefield.evaluation._fid import distance_between, frechet_distance, frechet_distance_from_features
from stablefield.targets._moments import Moments
from stablefield.training._recipe import Recipe
from stablefield.training._run_config import RunConfig
from stablefield.training._self_check import FrechetObserver, SelfCheck, jackknife_error

DIGITS = open_digits()


@pytest.mark.parametrize(("n", "d", "shift"), [(200, 10, 0.5), (60, 40, 0.3)])
def test_standard_error_is_the_spread_over_fresh_samples(n: int, d: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(n)
    root = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    reference = fit_moments(torch.zeros(d), root.T @ root)
    draws = [1.1 * torch.randn(n, d, generator=generator, dtype=torch.float64) @ root + shift for _ in range(80)]
    spread = np.std([distance_between(fit_features(x), reference).value for x in draws], ddof=1)
    claimed = np.sqrt(np.mean([jackknife_error(x, reference) ** 2 for x in draws[:20]]))
    # The jackknife's variance is too large on average, never too small (Efron and Stein).
    assert 0.85 < claimed / spread < 1.4


def test_standard_error_of_samples_that_take_classes_in_turn_is_the_spread_over_fresh_samples() -> None:
    """Ten classes far apart, in turn: groups of one class each would show the differences between classes."""
    generator = torch.Generator().manual_seed(3)
    centres = 3 * torch.randn(10, 4, generator=generator, dtype=torch.float64)
    labels = torch.arange(200) % 10
    real = centres[labels] + torch.randn(200, 4, generator=generator, dtype=torch.float64)
    reference = fit_features(real)
    draws = [
        centres[labels] + 0.4 + 1.1 * torch.randn(200, 4, generator=generator, dtype=torch.float64) for _ in range(80)
    ]
    spread = np.std([distance_between(fit_features(x), reference).value for x in draws], ddof=1)
    claimed, mixed = (
        np.sqrt(np.mean([jackknife_error(x, reference, labels=given) ** 2 for x in draws[:20]]))
        for given in (labels, None)
    )
    assert 0.8 < claimed / spread < 1.4
    assert mixed > 2 * spread


@pytest.mark.parametrize("d", [3, 20])
def test_the_jackknife_is_that_of_its_definition(d: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, d, generator=generator, dtype=torch.float64)
    root = torch.randn(d, d, generator=generator, dtype=torch.float64)
    other = torch.full((d,), 0.3, dtype=torch.float64), root.T @ root
    reference = fit_moments(*other)
    without = [
        frechet_distance(part.mean(0), part.T.cov(), *other).value
        for part in (x[[row for row in range(12) if row % 4 != j]] for j in range(4))
    ]
    expected = np.sqrt(3 / 4 * np.square(np.array(without) - np.mean(without)).sum())
    assert jackknife_error(x, reference, 4) == pytest.approx(expected, rel=1e-6)


def test_a_reading_is_value_error_and_floor_on_as_many_images() -> None:
    extractor = RawPixels((1, 8, 8))
    check = SelfCheck.prepare(DIGITS, extractor, samples=300, batch=128, groups=10)
    generator = torch.Generator().manual_seed(1)
    pool = torch.from_numpy(DIGITS.images)
    asked: list[int] = []

    def resampled(seeds: object) -> Tensor:
        asked.extend(seeds)
        return pool[torch.randint(0, len(pool), (len(seeds),), generator=generator)]

    def noisy(seeds: object) -> Tensor:
        x = pool[torch.randint(0, len(pool), (len(seeds),), generator=generator)].float()
        return (x + 60 * torch.randn(x.shape, generator=generator)).clamp(0, 255).to(torch.uint8)

    perfect, poor = check.read(resampled), check.read(noisy)
    assert asked == list(range(300))
    # A model that draws real images reads its floor, within its noise; noise on the images is seen at once.
    assert abs(perfect.value - perfect.floor) < 5 * perfect.standard_error
    assert poor.value - poor.floor > 20 * poor.standard_error
    assert perfect.floor == check.floor > 0.1
    assert (perfect.name, perfect.count) == ("Frechet distance (pixels)", 300)
    assert "300 samples (as many real images: " in str(perfect)


@pytest.mark.parametrize("labelled", [False, True])
def test_the_floor_is_what_a_perfect_model_reads_on_average(labelled: bool) -> None:
    extractor, pool = RawPixels((1, 8, 8)), torch.from_numpy(DIGITS.images)
    classes = [0, 0, 1, 7] if labelled else None
    check = SelfCheck.prepare(DIGITS, extractor, samples=200, classes=classes)
    rng = np.random.default_rng(5)
    read: list[float] = []
    for _ in range(40):
        rows = rng.integers(len(pool), size=200)
        if classes is not None:
            assert DIGITS.labels is not None
            rows = np.array([rng.choice(np.flatnonzero(DIGITS.labels == classes[k % 4])) for k in range(200)])
        read.append(distance_between(fit_features(extractor(pool[rows])), check.reference).value)
    error = np.std(read, ddof=1) * (1 / 40 + 1 / 16) ** 0.5
    assert error < 0.05 * np.mean(read)
    assert check.floor == pytest.approx(np.mean(read), abs=4 * error)


@pytest.mark.parametrize("labelled", [False, True])
def test_the_floor_of_mirrored_data_is_what_a_perfect_model_of_them_reads(labelled: bool) -> None:
    """It draws the mirror images half of the time, and the digits are far from symmetric."""
    extractor, pool = RawPixels((1, 8, 8)), torch.from_numpy(DIGITS.images)
    classes = range(10) if labelled else None
    plain, mirrored = (
        SelfCheck.prepare(DIGITS, extractor, samples=200, classes=classes, mirrored=mirrored)
        for mirrored in (False, True)
    )
    assert torch.equal(plain.reference.mean, mirrored.reference.mean)
    rng = np.random.default_rng(6)
    values, drawn = list[float](), []
    for _ in range(40):
        rows = rng.integers(len(pool), size=200)
        if classes is not None:
            rows = np.array([rng.choice(np.flatnonzero(DIGITS.labels == k % 10)) for k in range(200)])
        images = torch.stack([pool[row].flip(-1) if rng.random() < 0.5 else pool[row] for row in rows])
        drawn.append(images)
        values.append(distance_between(fit_features(extractor(images)), mirrored.reference).value)
    error = np.std(values, ddof=1) * (1 / 40 + 1 / 16) ** 0.5
    assert mirrored.floor == pytest.approx(np.mean(values), abs=4 * error)
    reading = mirrored.read(lambda seeds: drawn[0][list(seeds)])
    assert abs(reading.value - reading.floor) < 5 * reading.standard_error
    assert 3 * plain.floor < mirrored.floor


def test_the_floor_of_latents_of_mirrored_images_draws_these() -> None:
    """The latent of a mirrored image is not the mirror image of its latent."""
    rng = np.random.default_rng(2)
    mean = rng.standard_normal((300, 2, 4, 4), np.float32)
    std = np.full_like(mean, 0.1)
    images = make_image_set(mean, None, Origin(name="latents", source="here"))
    flipped = Moments(mean=mean + 3, std=std)
    images = dataclasses.replace(images, moments=Moments(mean=mean, std=std), flipped=flipped)
    extractor = raw(images)
    check = SelfCheck.prepare(images, extractor, samples=200, batch=64, mirrored=True)
    draws = []
    for _ in range(20):
        rows, turned = rng.integers(300, size=200), rng.random((200, 1, 1, 1)) < 0.5
        drawn = np.where(turned, mean[rows] + 3 + 0.1 * rng.standard_normal((200, 2, 4, 4)), mean[rows])
        features = extractor(torch.from_numpy(drawn.astype(np.float32)))
        draws.append(distance_between(fit_features(features), check.reference).value)
    assert check.floor == pytest.approx(np.mean(draws), rel=5 * np.std(draws) / np.mean(draws) / 16**0.5)


@pytest.mark.parametrize("classes", [0, 3, 10])
def test_samples_of_a_check_take_the_classes_in_turn(classes: int) -> None:
    seen: list[Tensor] = []

    def denoiser(x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        assert (class_labels is None) == (classes == 0)
        # Class c draws the grey value 25 c.
        grey = torch.zeros(len(x)) if class_labels is None else 25 * class_labels
        return (grey / 127.5 - 1).reshape(-1, 1, 1, 1).expand_as(x)

    class Recorded(RawPixels):
        def __call__(self, images: Tensor) -> Tensor:
            seen.append(images)
            return super().__call__(images)

    check = SelfCheck.prepare(DIGITS, Recorded((1, 8, 8)), samples=100, batch=30)
    seen.clear()
    config = RunConfig(data="digits", shape=(1, 8, 8), classes=classes, manifest={}, recipe=Recipe(), version="test")
    FrechetObserver(check, 1, config, torch.device("cpu"))(1, denoiser)
    labels = torch.arange(100) % classes if classes else None
    assert torch.cat(seen)[:, 0, 4, 4].tolist() == ([0] * 100 if labels is None else (25 * labels).tolist())


def test_a_perfect_model_of_classes_of_unequal_numbers_reads_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes in turn would measure the difference to the proportions of the data."""
    labels = DIGITS.labels
    assert labels is not None
    rows = np.concatenate([np.flatnonzero(labels == c)[: 170 if c == 0 else 15] for c in range(10)])
    data = make_image_set(DIGITS.images[rows], labels[rows], Origin(name="few", source="here"))
    counts = [170, *[15] * 9]
    config = RunConfig(
        data="few", shape=(1, 8, 8), classes=10, manifest={"class_counts": counts}, recipe=Recipe(), version="test"
    )
    assert np.bincount(config.proportional_classes).tolist() == counts
    # Every part of the sequence has about the same proportions.
    assert 55 <= config.proportional_classes[:100].count(0) <= 59
    by_class = [data.images[data.labels == c] for c in range(10)]
    generator = np.random.default_rng(0)

    def perfect(_, config, seeds, device, classes) -> Tensor:
        wanted = np.array(classes or range(10))[np.array(seeds) % len(classes or range(10))]
        return torch.from_numpy(np.stack([generator.choice(by_class[c]) for c in wanted]))

    monkeypatch.setattr("stablefield.training._self_check.draw_samples", perfect)
    check = SelfCheck.prepare(data, RawPixels((1, 8, 8)), samples=300, classes=config.proportional_classes)
    readings = [check.read_model(None, config, torch.device("cpu")).value for _ in range(8)]
    assert check.floor == pytest.approx(np.mean(readings), rel=0.25)
    unaware = SelfCheck.prepare(data, RawPixels((1, 8, 8)), samples=300)
    assert unaware.floor > 1.3 * np.mean(readings)  # its classes are not in proportion
    found = check.read_model(None, config, torch.device("cpu"))
    assert abs(found.value - found.floor) < 4 * found.standard_error
    without = check.read_model(None, dataclasses.replace(config, manifest={}), torch.device("cpu"))
    assert without.value > 10 * found.floor


def test_the_floor_falls_with_the_number_of_samples_and_is_what_a_perfect_model_reads() -> None:
    extractor = RawPixels((1, 8, 8))
    whole = extractor(torch.from_numpy(DIGITS.images))
    generator, floors = torch.Generator().manual_seed(5), []
    for n in (200, 800, len(DIGITS)):
        floor = SelfCheck.prepare(DIGITS, extractor, samples=n).floor
        perfect = [
            frechet_distance_from_features(whole[torch.randint(len(whole), (n,), generator=generator)], whole).value
            for _ in range(8)
        ]
        # Also with as many samples as there are images: different images of the set would have no distance to it.
        assert floor == pytest.approx(np.mean(perfect), rel=5 * np.std(perfect) / np.mean(perfect))
        floors.append(floor)
    assert floors[0] > 2.5 * floors[1] > 2.5 * floors[2] > 0


def test_too_few_samples_or_images_are_refused() -> None:
    small = make_image_set(DIGITS.images[:100], None, Origin(name="few", source="here"))
    with pytest.raises(
        ValueError, match=r"samples=39: a self-check takes at least 2 groups of 2 samples, and 40 samples in 20 groups"
    ):
        SelfCheck.prepare(DIGITS, RawPixels((1, 8, 8)), samples=39)
    # More samples than images are fine, since a perfect model draws images more than once.
    assert SelfCheck.prepare(small, RawPixels((1, 8, 8))).floor > 0
    few = make_image_set(DIGITS.images[:39], None, Origin(name="few", source="here"))
    with pytest.raises(ValueError, match="the data have 39 images: a self-check takes at least 40 samples"):
        SelfCheck.prepare(few, RawPixels((1, 8, 8)))
    with pytest.raises(ValueError, match="features has 30 rows, but at least 40"):
        jackknife_error(torch.zeros(30, 2), fit_moments(torch.zeros(2), torch.eye(2)))
