"""`evaluate` in one call: what the metrics' own functions say of the same images, with the whole protocol."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import stablefield as sf
from stablefield._distributed import Ranks
from stablefield._progress import Progress
from stablefield.data._digits import open_digits
from stablefield.evaluation._evaluate import METRICS, evaluate
from stablefield.evaluation._extractor import RandomConvolutions, RawPixels
from stablefield.evaluation._fid import Frechet, frechet_distance_from_features
from stablefield.evaluation._kid import Kernel
from stablefield.evaluation._memorisation import nearest_ratio
from stablefield.evaluation._metric import LOWER, Metric, MetricInput, Value
from stablefield.evaluation._precision_recall import Precision
from stablefield.evaluation._result import Evaluation
from stablefield.evaluation._sample_source import SampleSource, SamplingRecord
from stablefield.evaluation._time_estimate import TimeEstimate
from stablefield.targets._moments import Moments

DIGITS = open_digits()
NET = RandomConvolutions()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stablefield" / "references"


class Draws(SampleSource):
    """Digits in place of a model's samples."""

    name, shape, count, class_names = "draws", (1, 8, 8), 30, ("a", "b")

    def batches(
        self,
        repeat: int,
        ranks: Ranks,
        progress: Callable[[Progress], object] | None,  # noqa: ARG002
    ) -> Iterator[tuple[Tensor, Tensor]]:
        images = torch.from_numpy(DIGITS.images[30 * repeat : 30 * (repeat + 1)])
        numbers = torch.arange(30)
        yield from ranks.share(list(zip(images.split(7), numbers.split(7), strict=True)))

    def seeds(self, repeat: int) -> str:
        return f"{30 * repeat}-{30 * repeat + 29}"

    def labels(self, repeat: int, numbers: Tensor) -> Tensor | None:  # noqa: ARG002
        return numbers % 2

    def record(self, ranks: Ranks) -> SamplingRecord:  # noqa: ARG002
        return SamplingRecord(sampler="heun", steps=18, nfe=35, ema="half-life", commit="c")


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    return frechet_distance_from_features(NET(torch.from_numpy(a)), NET(torch.from_numpy(b))).value


def test_it_is_a_name_of_the_library_and_takes_images_of_any_kind(tmp_path: Path) -> None:
    images = DIGITS.images[:200]
    (tmp_path / "folder").mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image[0]).save(tmp_path / "folder" / f"{k:04d}.png")
    np.savez(tmp_path / "images.npz", images=images)
    kinds = (
        images,
        torch.from_numpy(images),
        tmp_path / "folder",
        str(tmp_path / "images.npz"),
        sf.data.open_images(tmp_path / "folder"),
    )
    found = [sf.evaluate(kind, data="digits", metrics=["frechet"], extractor=NET).scores[0] for kind in kinds]
    expected = frechet(images, DIGITS.images)
    assert [score.mean for score in found] == pytest.approx([expected] * 5, rel=1e-5)
    assert len({json.dumps(score.protocol.to_dict()) for score in found}) == 1


def test_scores_hold_every_repeat_and_the_whole_protocol(tmp_path: Path) -> None:
    it = evaluate(Draws(), data=DIGITS, metrics=[Frechet(), Kernel(subsets=5)], extractor=NET, repeats=3)
    of_frechet, of_kernel = it.scores
    expected = [frechet(DIGITS.images[30 * r : 30 * r + 30], DIGITS.images) for r in range(3)]
    assert of_frechet.values == pytest.approx(expected, rel=1e-4)
    assert of_frechet.standard_error is None
    alone = [
        evaluate(DIGITS.images[30 * r : 30 * r + 30], data=DIGITS, metrics=[Kernel(subsets=5)], extractor=NET)
        for r in range(3)
    ]
    errors = [one.scores[0].standard_error or 0.0 for one in alone]
    assert of_kernel.standard_error == pytest.approx((sum(error**2 for error in errors) / 3) ** 0.5, rel=1e-6)
    record = of_kernel.to_dict()["protocol"]
    assert record["settings"] == {"seed": 0, "subset_size": 15, "subsets": 5}
    assert {key: record[key] for key in ("sampler", "steps", "nfe", "ema", "commit", "seeds", "sample_count")} == {
        "sampler": "heun",
        "steps": 18,
        "nfe": 35,
        "ema": "half-life",
        "commit": "c",
        "seeds": ["0-29", "30-59", "60-89"],
        "sample_count": 30,
    }
    assert (record["reference"], record["reference_count"], record["split"]) == ("digits", 1797, "train")
    path = it.save(tmp_path / "deep" / "r.json")
    loaded = Evaluation.load(path)
    assert (loaded.name, loaded.scores) == ("draws", it.scores)
    assert [file.name for file in path.parent.iterdir()] == ["r.json"]


def test_samples_are_kept_with_their_classes_beside_as_many_real_images() -> None:
    it = evaluate(Draws(), data=DIGITS, metrics=["frechet"], extractor=NET, repeats=3)
    assert it.samples is not None
    assert it.references is not None
    drawn = {image.tobytes(): number for number, image in enumerate(DIGITS.images[:30])}  # the first repeat
    numbers = [drawn[image.tobytes()] for image in it.samples.images]
    assert sorted(numbers) == list(range(30))
    assert it.samples.labels is not None
    assert it.samples.labels.tolist() == [number % 2 for number in numbers]
    assert it.samples.class_names == ("a", "b")
    assert it.references.images.shape == (64, 1, 8, 8)
    real = {image.tobytes() for image in DIGITS.images}
    assert all(image.tobytes() in real for image in it.references.images)
    assert it.references.labels is not None


def test_samples_that_are_shown_are_a_random_choice_of_sorted_images() -> None:
    labels = DIGITS.labels
    assert labels is not None
    order = np.argsort(labels, kind="stable")
    it = evaluate(DIGITS.images[order], data=DIGITS, metrics=["frechet"], extractor=NET)
    assert it.samples is not None
    digit = {image.tobytes(): label for image, label in zip(DIGITS.images, labels, strict=True)}
    assert {digit[image.tobytes()] for image in it.samples.images} == set(range(10))


def test_memorisation_is_of_the_whole_training_set_and_held_out_images_are_the_test_split() -> None:
    asked: list[str] = []

    def data(split: str) -> sf.data.ImageSet:
        asked.append(split)
        return replace_images(DIGITS.images[:900] if split == "train" else DIGITS.images[900:], split)

    it = evaluate(DIGITS.images[:50], data=data, metrics=["nearest", "frechet"], extractor=NET, split="test")
    assert set(asked) == {"train", "test"}
    assert it["memorised share"].protocol.reference_count == 900
    assert it["memorised share"].mean == 1  # these samples are training images
    assert it["nearer than held-out images"].mean > 0.9
    assert it.scores[0].protocol.reference_count == 897


class Trained(Draws):
    """Samples of a model that held out the first 300 digits."""

    def held_out(self, images: sf.data.ImageSet) -> np.ndarray | None:
        return np.arange(300) if images.manifest["sha256"] == DIGITS.manifest["sha256"] else None


def test_what_a_model_held_out_is_the_control_and_no_training_data() -> None:
    pixels = torch.from_numpy(DIGITS.images).flatten(1) / 127.5 - 1
    it = evaluate(Trained(), data=DIGITS, metrics=["nearest"])
    expected = nearest_ratio(pixels[:30], pixels[300:], pixels[:300])
    assert it["memorised share"].mean == pytest.approx(expected.memorised)
    assert it["memorised share of held-out images"].mean == pytest.approx(expected.held_out_memorised)
    assert it["nearer than held-out images"].mean == pytest.approx(expected.closer)
    protocol = it["memorised share"].protocol
    assert protocol.reference_count == 1497
    assert re.fullmatch(r"train, 1497 of 1797 \(without the held-out images, indices [0-9a-f]{8}\)", protocol.split)
    # The samples are these very images: with all digits as training data every one of them is remembered.
    assert evaluate(Draws(), data=DIGITS, metrics=["nearest"])["memorised share"].mean == 1 > expected.memorised
    given = evaluate(Trained(), data=DIGITS, metrics=["nearest"], held_out=DIGITS.images[:50])
    assert given["memorised share"].mean == pytest.approx(expected.memorised)
    assert given["nearer than held-out images"].protocol.settings["held_out"] == 50


class Mirrored(Draws):
    """Samples of a model that trained on mirror images, too, all of them mirror images; it held out the first digits."""

    mirrored = True

    def __init__(self, outside: int = 0) -> None:
        self.outside = outside

    def batches(
        self, repeat: int, ranks: Ranks, progress: Callable[[Progress], object] | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for images, numbers in super().batches(repeat, ranks, progress):
            yield images.flip(-1), numbers

    def held_out(self, images: sf.data.ImageSet) -> np.ndarray | None:  # noqa: ARG002
        return np.arange(self.outside) if self.outside else None


def test_mirror_images_of_mirrored_training_data_are_training_images() -> None:
    pixels = torch.from_numpy(DIGITS.images).float() / 127.5 - 1
    for outside in (300, 0):
        source = Mirrored(outside)
        it = evaluate(source, data=DIGITS, metrics=["nearest"], batch=100)
        both = torch.cat([pixels[outside:], pixels[outside:].flip(-1)]).flatten(1)
        samples = pixels[:30].flip(-1).flatten(1)
        expected = nearest_ratio(samples, both, pixels[:outside].flatten(1) if outside else None, mirrored=True)
        assert it["memorised share"].mean == pytest.approx(expected.memorised)
        assert it["memorised share"].protocol.reference_count == 2 * (1797 - outside)
        assert it["memorised share"].protocol.split.endswith(", with the mirror images")
        if outside:
            assert it["nearer than held-out images"].mean == pytest.approx(expected.closer)
    assert expected.memorised == 1
    assert evaluate(Mirrored(), data=DIGITS, metrics=["precision"], extractor=NET).scores[0].protocol.split == "train"


def test_copies_of_duplicates_and_of_symmetric_images_are_memorised() -> None:
    base = DIGITS.images[:200]
    noise = np.random.default_rng(0).integers(-4, 5, base.shape)

    def share(samples: np.ndarray | Draws, data: np.ndarray) -> float:
        return evaluate(samples, data=data, metrics=["nearest"])["memorised share"].mean

    def noisy(images: np.ndarray) -> np.ndarray:
        return (images + noise[: len(images)]).clip(0, 255).astype(np.uint8)

    assert share(noisy(base), base) == share(noisy(base), np.concatenate([base, base])) == 1
    symmetric = np.maximum(base, base[..., ::-1])

    class Near(Draws):
        mirrored = True

        def batches(
            self, repeat: int, ranks: Ranks, progress: Callable[[Progress], object] | None
        ) -> Iterator[tuple[Tensor, Tensor]]:
            for _, numbers in super().batches(repeat, ranks, progress):
                yield torch.from_numpy(noisy(symmetric[numbers.numpy()])), numbers

    assert share(Near(), np.concatenate([symmetric, symmetric])) == share(Near(), symmetric) == 1


def test_held_out_images_that_are_training_images_are_counted() -> None:
    images = DIGITS.images
    given = {"data": images[:300], "metrics": ["nearest"]}
    for held_out, said in ((images[290:320], "10 of 30"), (images[:50], "50 of 50")):
        with pytest.warns(UserWarning, match=rf"^held_out: {said} held-out samples equal training samples"):
            evaluate(images[:9], held_out=held_out, **given)
    evaluate(images[:9], held_out=images[299:420], **given)
    # Of those that the model itself held out none is a training image.
    evaluate(Trained(), data=DIGITS, metrics=["nearest"], held_out=images[:50])
    twice = np.concatenate([images[:300], images[:300]])

    class Half(Draws):
        def held_out(self, images: sf.data.ImageSet) -> np.ndarray:  # noqa: ARG002
            return np.arange(300)

    with pytest.warns(UserWarning, match=r"^the control \(train split\): 300 of 300 held-out samples"):
        evaluate(Half(), data=twice, metrics=["nearest"])


def test_float64_data_far_from_zero_have_the_numbers_of_data_at_zero() -> None:
    rng = np.random.default_rng(0)
    real, samples = rng.normal(size=(300, 2)), 1.2 * rng.normal(size=(200, 2)) + 0.3
    offset = np.array([1.7e9, 4e7])  # float32 has steps of 128 there
    metrics = ["frechet", "precision", "recall", "density", "coverage", "nearest"]
    here, there = (
        evaluate(samples + place, data=real + place, metrics=metrics, cache=False) for place in (0.0, offset)
    )
    for one, other in zip(here.scores, there.scores, strict=True):
        assert other.mean == pytest.approx(one.mean, rel=1e-4), one.protocol.metric
    assert here["Frechet distance (values)"].mean == pytest.approx(
        frechet_distance_from_features(torch.from_numpy(samples), torch.from_numpy(real)).value, rel=1e-9
    )


class Classifier(RawPixels):
    """The pixels as logits of 64 classes, or their probabilities."""

    def __init__(self, probabilities: bool) -> None:
        super().__init__((1, 8, 8))
        self.probabilities = probabilities

    def __call__(self, images: Tensor) -> Tensor:
        logits = super().__call__(images)
        return logits.softmax(1) if self.probabilities else logits


def test_a_classifier_that_returns_probabilities_is_refused() -> None:
    given = {"data": DIGITS, "metrics": ["classifier-score"], "cache": False}
    assert evaluate(DIGITS.images[:50], classifier=Classifier(False), **given).scores[0].mean > 1
    with pytest.raises(ValueError, match="rows that sum to 1, which are probabilities: return logits"):
        evaluate(DIGITS.images[:50], classifier=Classifier(True), **given)


class Measuring:
    """An extractor as people write them: a network in an object, and no gradients."""

    name, dim, sha256, resize = "network", 64, "0" * 64, "none"

    def __init__(self, part: torch.nn.Module, wakes: bool = False) -> None:
        self.network, self.wakes = torch.nn.Sequential(torch.nn.Flatten(), part), wakes

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if self.wakes:
            self.network.eval()
        return self.network(images.float())


@pytest.mark.parametrize("part", [torch.nn.Dropout(0.1), torch.nn.BatchNorm1d(64)])
def test_an_extractor_in_training_mode_is_warned_of(part: torch.nn.Module) -> None:
    extractor = Measuring(part.train())
    given = {"data": DIGITS.images[:40], "metrics": ["frechet"], "cache": False}
    with pytest.warns(
        UserWarning, match=r"network: a network that it calls is in training mode.*: call eval\(\) of the"
    ):
        evaluate(DIGITS.images[:50], extractor=extractor, **given)
    extractor.network.eval()
    expected = evaluate(DIGITS.images[:50], extractor=extractor, **given).scores[0].mean  # a warning would be an error
    part.train()
    assert evaluate(DIGITS.images[:50], extractor=Measuring(part, wakes=True), **given).scores[0].mean == expected


def test_small_numbers_keep_their_digits_in_the_table() -> None:
    rng = np.random.default_rng(0)
    real, samples = 1e-3 * rng.normal(size=(300, 2)), 1e-3 * rng.normal(size=(200, 2))
    found = evaluate(samples, data=real, metrics=["frechet"], cache=False)
    assert f"{found.scores[0].mean:.3g}" in str(found)


def test_numbers_with_another_control_do_not_compare() -> None:
    one, other, again = (
        evaluate(DIGITS.images[:50], data=DIGITS, metrics=["nearest"], held_out=255 - DIGITS.images[first : first + 40])
        for first in (100, 900, 100)
    )
    assert all(pair.comparable for pair in one.compare(again).comparisons())
    by_name = {pair.first.protocol.metric: pair for pair in one.compare(other).comparisons()}
    assert by_name["memorised share"].comparable
    assert not by_name["nearer than held-out images"].comparable
    assert "held_out_images" in by_name["nearer than held-out images"].warning


def test_only_the_absence_of_a_test_split_takes_the_control_away_in_silence(tmp_path: Path) -> None:
    given = {"metrics": ["nearest"], "batch": 512}
    for split, images in (("train", DIGITS.images[:40]), ("test", DIGITS.images[40:80])):
        (tmp_path / "data" / split).mkdir(parents=True)
        for k, image in enumerate(images):
            Image.fromarray(image[0]).save(tmp_path / "data" / split / f"{k}.png")
    measured = {"memorised share", "nearer than held-out images", "memorised share of held-out images"}
    found = evaluate(DIGITS.images[:30], data=tmp_path / "data", **given)
    assert {score.protocol.metric for score in found.scores} == measured
    (tmp_path / "data" / "test" / "7.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"7\.png"):
        evaluate(DIGITS.images[:30], data=tmp_path / "data", **given)
    np.savez(tmp_path / "one.npz", images=DIGITS.images[:40])
    for without in ("digits", tmp_path / "data" / "train", tmp_path / "one.npz"):
        with pytest.raises(sf.data.MissingSplitError):
            sf.data.open_images(without, split="test")
        found = evaluate(DIGITS.images[:30], data=without, **given)
        assert [score.protocol.metric for score in found.scores] == ["memorised share"]


def replace_images(images: np.ndarray, name: str) -> sf.data.ImageSet:
    return sf.data.make_image_set(images, None, sf.data.Origin(name=name, source="digits"))


def test_progress_and_an_estimate_are_reported_where_they_are_asked_for() -> None:
    reports: list[Progress] = []
    estimates: list[TimeEstimate] = []
    evaluate(
        DIGITS.images[:90],
        data=DIGITS,
        metrics=["frechet"],
        extractor=NET,
        cache=False,
        batch=30,
        progress=reports.append,
        on_estimate=estimates.append,
    )
    assert [report.stage for report in reports][-2:] == ["samples", "metrics"]
    of_samples = [report.done for report in reports if report.stage == "samples"]
    assert of_samples == [30, 60, 90]
    assert all(0 <= report.done <= report.total for report in reports)
    (estimate,) = estimates
    assert estimate.sampling == 0
    assert estimate.total == estimate.features + estimate.metrics > 0


@dataclass(frozen=True)
class Brightness(Metric):
    """Distance of the means of all features."""

    def __call__(self, given: MetricInput) -> tuple[Value, ...]:
        shift = given.samples.matrix().mean() - given.references.matrix().mean()
        return (Value(name="brightness", value=abs(float(shift)), better=LOWER),)


def test_a_metric_of_ones_own_needs_no_list() -> None:
    it = evaluate(DIGITS.images[:90], data=DIGITS, metrics=[Brightness(), "recall"], extractor=RawPixels((1, 8, 8)))
    pixels = DIGITS.images / 127.5 - 1
    assert it["brightness"].mean == pytest.approx(abs(pixels[:90].mean() - pixels.mean()), rel=1e-3)
    assert it["brightness"].protocol.extractor == "pixels"


def test_features_of_real_images_are_kept_unless_told_otherwise(cache: Path, tmp_path: Path) -> None:
    one = evaluate(DIGITS.images[:90], data=DIGITS, metrics=["frechet", "recall"], extractor=NET, cache=False)
    assert not cache.exists()
    kept = evaluate(DIGITS.images[:90], data=DIGITS, metrics=["frechet", "recall"], extractor=NET)
    assert len(list(cache.iterdir())) == 2
    mine = evaluate(
        DIGITS.images[:90], data=DIGITS, metrics=["frechet", "recall"], extractor=NET, cache=tmp_path / "mine"
    )
    assert len(list((tmp_path / "mine").iterdir())) == 2
    assert one.scores == kept.scores == mine.scores


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metrics": ["fid"]}, "metrics holds 'fid': there are frechet, kernel"),
        ({"metrics": []}, "metrics=: name at least one"),
        ({"metrics": ["recall", "recall"]}, "metrics=recall recall: .*each once"),
        ({"metrics": ["classifier-score"], "cache": False}, "metrics=classifier-score goes with classifier="),
        ({"count": 5}, "there are 5 samples, but Density takes at least 6"),
        ({"count": 60, "repeats": 2}, "count=60 in 2 repeats take 120 images, and samples has 90"),
        ({"references": 1798}, "references=1798: digits has 1797 images"),
        ({"held_out": np.zeros((9, 1, 16, 16), np.uint8)}, "held_out=held_out has images of 1 x 16 x 16"),
        ({"data": np.zeros((9, 1, 16, 16), np.uint8)}, "data=data has images of 1 x 16 x 16.*resolution=8"),
        ({"data": DIGITS.images / 255}, "^data has dtype float64: pass uint8"),
        ({"repeats": 0}, "repeats=0"),
        ({"per_class": True, "metrics": ["nearest"]}, "per_class=True: only metrics that read the extractor"),
        ({"held_out": DIGITS, "metrics": ["frechet"]}, "^held_out is the control for nearest"),
        (
            {"split": "test", "metrics": ["nearest"]},
            "^split='test': nearest compares samples with the training images, and",
        ),
        ({"metrics": [Precision(3), Precision(5)]}, "^metrics holds several of Precision, which would have one name"),
        ({"device": "gpu"}, "device='gpu'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_measured_names_the_argument(change: dict[str, object], words: str) -> None:
    usual = {"data": DIGITS, "extractor": NET}
    with pytest.raises((ValueError, TypeError), match=words):
        evaluate(DIGITS.images[:90], **(usual | change))


class Unconditional(Draws):
    """Samples without classes."""

    def labels(self, repeat: int, numbers: Tensor) -> None:  # noqa: ARG002
        return None


@pytest.mark.parametrize(
    ("source", "change", "words"),
    [
        (Unconditional(), {"per_class": True}, "per_class=True: draws has no classes"),
        (Draws(), {"per_class": True}, "per_class=True: the samples have the class 'a', which data=latents lacks"),
        (Draws(), {"references": 41}, "references=41: latents has 40 images; pass 2 to 40"),
    ],
)
def test_what_cannot_be_measured_is_known_before_latents_are_decoded(
    monkeypatch: pytest.MonkeyPatch, source: SampleSource, change: dict[str, object], words: str
) -> None:
    def decode(found: sf.data.ImageSet, **options: object) -> sf.data.ImageSet:
        raise AssertionError("decoded")

    monkeypatch.setattr("stablefield.evaluation._evaluate.decode", decode)
    origin = sf.data.Origin(name="latents", source="made", class_names=("c", "d"))
    values = np.random.default_rng(0).normal(size=(40, 4, 2, 2)).astype(np.float32)
    latents = sf.data.make_image_set(values, np.arange(40) % 2, origin)
    latents = replace(latents, moments=Moments(values, np.ones_like(values)))
    usual = {"metrics": ["frechet"], "extractor": NET}
    with pytest.raises(ValueError, match=words):
        evaluate(source, data=latents, **usual, **change)
    with pytest.raises(AssertionError, match="decoded"):
        evaluate(source, data=latents, **usual)


def test_a_run_and_a_source_with_a_count_are_told_what_to_do_instead(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is a run: evaluate it by Run\("):
        evaluate(tmp_path, data=DIGITS, extractor=NET)
    with pytest.raises(ValueError, match="count=5: the source draws 30 samples per repeat"):
        evaluate(Draws(), data=DIGITS, extractor=NET, count=5)


def test_no_message_of_the_package_names_a_flag() -> None:
    folder = Path(sf.evaluation.__file__).parent
    found = [
        f"{path.name}: {line.strip()}"
        for path in sorted(folder.glob("*.py"))
        for line in path.read_text("utf-8").splitlines()
        if re.search(r"(?<![\w-])--[a-z]", line) and "pip install" not in line and "_git(" not in line
    ]
    assert found == []


def test_every_listed_metric_says_how_its_time_grows() -> None:
    for metric in METRICS.values():
        small, large = metric.cost(500, 500, 0, 64), metric.cost(1000, 1000, 0, 128)
        assert 0 <= small[0] <= large[0]
        assert 0 < small[1] < large[1]
        assert replace(metric) == metric  # pyrefly: ignore[bad-specialization]
