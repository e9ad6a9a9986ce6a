"""Scores of each class: of the images of that class alone, under its name, whatever the order of the names."""

from pathlib import Path

import numpy as np
import pytest

import stablefield as sf
from stablefield.cli.entry import main
from stablefield.data import ImageSet, make_image_set
from stablefield.data._image_set import Origin
from stablefield.evaluation import Evaluation, RawPixels
from stablefield.training import MLPConfig, Recipe

NAMES = ("boot", "a shoe with a name that is much too long for a table", "bag")


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance of two sets of images, by the eigenvalues of the product of their covariances."""
    first, second = (x.reshape(len(x), -1) / 127.5 - 1 for x in (a.astype(np.float64), b.astype(np.float64)))
    one, two = np.cov(first.T), np.cov(second.T)
    cross = np.sqrt(np.linalg.eigvals(one @ two).astype(complex)).real.sum()
    return float(((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(one) + np.trace(two) - 2 * cross)


def made(labels: np.ndarray, names: tuple[str, ...] | None, seed: int) -> ImageSet:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 200, (len(labels), 1, 2, 3)) + 20 * labels[:, None, None, None]
    return make_image_set(images.astype(np.uint8), labels, Origin(name=f"set{seed}", source="drawn", class_names=names))


def test_a_class_is_scored_as_its_images_alone_and_matched_by_name(tmp_path: Path) -> None:
    real = made(np.arange(90) % 3, NAMES, 0)
    samples = made(np.arange(60) % 2, (NAMES[2], NAMES[0]), 1)
    found = sf.evaluate(samples, data=real, metrics=["frechet", "kernel"], extractor=RawPixels((1, 2, 3)), cache=False,
                        per_class=True)  # fmt: skip
    assert [(one.number, one.name, one.samples, one.references) for one in found.classes] == [
        (0, NAMES[0], 30, 30), (1, NAMES[1], 0, 30), (2, NAMES[2], 30, 30),
    ]  # fmt: skip
    for one, place in ((found.classes[0], 1), (found.classes[2], 0)):
        parts = samples.images[samples.labels == place], real.images[real.labels == one.number]
        assert one["Frechet distance (pixels)"].mean == pytest.approx(frechet(*parts), rel=1e-6)
        alone = sf.evaluate(parts[0], data=parts[1], metrics=["kernel"], extractor=RawPixels((1, 2, 3)), cache=False)
        assert one["kernel distance (pixels)"].mean == pytest.approx(alone.scores[0].mean, rel=1e-6)
        protocol = one.scores[0].protocol
        assert (protocol.sample_count, protocol.reference_count) == (30, 30)
        assert protocol.settings["class"] == f"{one.number} ({one.name})"
    assert found.classes[1].scores == ()
    # The numbers of the whole are as without the classes.
    plain = sf.evaluate(samples, data=real, metrics=["frechet"], extractor=RawPixels((1, 2, 3)), cache=False)
    assert found.scores[0].mean == plain.scores[0].mean
    text = str(found)
    assert max(map(len, text.splitlines())) <= 80
    assert "on as few as 30 images" in " ".join(text.split())
    assert f"No scores for classes with too few samples or real images: {NAMES[1]}." in " ".join(text.split())
    again = Evaluation.load(found.save(tmp_path / "found.json"))
    assert again.classes == found.classes
    found.save(tmp_path / "found.html")
    assert "Class by class" in (tmp_path / "found.html").read_text("utf-8")


def test_without_classes_or_with_a_class_that_the_data_lack_it_says_so() -> None:
    real, options = made(np.arange(20) % 2, ("a", "b"), 0), {"extractor": RawPixels((1, 2, 3)), "cache": False}
    for samples, data, words in (
        (real, real.images, "per_class=True: data=data has no classes"),
        (real.images, real, "per_class=True: samples has no classes"),
        (
            made(np.arange(20) % 2, ("a", "c"), 1),
            real,
            "the samples have the class 'c', which data=set0 lacks; it has a, b",
        ),
        (made(np.arange(20) % 3, None, 1), real, "the samples have the class 2, and data=set0 has 2 classes"),
    ):
        with pytest.raises(ValueError, match=words):
            sf.evaluate(samples, data=data, metrics=["frechet"], per_class=True, **options)


def test_a_run_is_scored_by_class_from_the_command_and_from_python(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = made(np.arange(60) % 3, NAMES, 0)
    data = sf.data.pack(real, tmp_path / "data.safetensors")
    recipe = Recipe(steps=2, batch=16, conditional=True, sample_every=0, network=MLPConfig(width=8, depth=1))
    run = sf.train(data, recipe=recipe, out=tmp_path / "run", device="cpu")
    words = ["--samples", "31", "--repeats", "2", "--steps", "2", "--metrics", "frechet", "--extractor", "pixels"]
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", str(run.path), *words, "--per-class", "--no-cache", "--out", str(tmp_path / "found.json")])
    assert exit_.value.code == 0
    told = capsys.readouterr().out
    assert "0 (boot)" in told
    found = Evaluation.load(tmp_path / "found.json")
    drawn = [run.sample(range(start, start + 31), steps=2, device="cpu") for start in (0, 31)]
    for one in found.classes:
        # Of 31 seeds a class has 10 or 11; every value is on the same number.
        assert one.samples == 10
        for value, part in zip(one.scores[0].values, drawn, strict=True):
            own = part.images[part.labels == one.number][:10]
            assert value == pytest.approx(frechet(own, real.images[real.labels == one.number]), rel=1e-6)
