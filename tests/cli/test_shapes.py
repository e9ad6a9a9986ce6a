"""Images that are not square, from their files to samples, scores and an export."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import stablefield as sf
from commands import status
from stablefield.cli.parser import parse_resolution
from stablefield.cli.usage import as_flags
from stablefield.evaluation import RawPixels

TINY = ["--recipe", "digits", "--network.width", "8", "--network.depth", "1", "--batch", "8", "--decay-share", "0"]


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance of two arrays of pixels, one image a row, by the singular values of the cross product."""
    first, second = (x / 127.5 - 1 for x in (a.astype(np.float64), b.astype(np.float64)))
    roots = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (first, second)]
    cross = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return float(((first.mean(0) - second.mean(0)) ** 2).sum() + sum((x**2).sum() for x in roots) - 2 * cross)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with alpha of two sizes in two classes, and a run on them at 10 x 16 pixels of grey over black."""
    folder = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    for k in range(48):
        path = folder / "data" / ("boots" if k % 3 else "shoes") / f"{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, ((12, 16) if k % 2 else (20, 24)) + (4,), np.uint8)).save(path)
    flags = ["--resolution", "10x16", "--background", "black", "--colour", "grey", "--conditional"]
    assert status("train", folder / "data", *flags, *TINY, "--steps", "4", "--out", folder / "run") == 0
    return folder


def test_a_height_and_a_width_cut_the_centre_and_resize_it_as_by_hand(place: Path) -> None:
    run = sf.Run(place / "run")
    assert run.config.shape == (1, 10, 16)
    opening = {"resolution": [10, 16], "resize": "crop", "skip_broken": False, "colour": "grey", "background": "black"}
    assert json.loads((place / "run" / "config.json").read_text())["opening"] == opening
    images = sf.data.open_images(run.config.data, **run.config.opening)
    for k, path in enumerate(sorted((place / "data").rglob("*.png"))):
        with Image.open(path) as picture:
            ground = Image.new("RGBA", picture.size, "black")
            whole = Image.alpha_composite(ground, picture).convert("L")
        # Of 20 x 24 pixels, 15 x 24 have the shape of 10 x 16; of 12 x 16, 10 x 16.
        top, high = (2, 15) if whole.height == 20 else (1, 10)
        part = whole.crop((0, top, whole.width, top + high)).resize((16, 10), Image.Resampling.LANCZOS)
        assert abs(np.asarray(part).astype(int) - images.images[k, 0]).max() <= 1


def test_samples_scores_and_more_steps_keep_the_shape(place: Path, tmp_path: Path) -> None:
    run = sf.Run(place / "run")
    samples = run.sample(6, steps=2, class_label="shoes", device="cpu")
    assert samples.images.shape == (6, 1, 10, 16)
    samples.save(tmp_path / "files")
    with Image.open(tmp_path / "files" / "000005.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), samples.images[5, 0])
    found = run.evaluate(
        samples=12, metrics=["frechet"], extractor=RawPixels((1, 10, 16)), sampler="euler", cache=False, device="cpu"
    )
    drawn = run.sample(12, sampler="euler", device="cpu").images.reshape(12, -1)
    real = sf.data.open_images(run.config.data, **run.config.opening).images.reshape(48, -1)
    assert found.scores[0].mean == pytest.approx(frechet(drawn, real), rel=1e-6)
    words = ("--resolution", "10x16", "--colour", "rgb", "--metrics", "frechet", "--extractor", "pixels", "--no-cache")
    assert status("evaluate", tmp_path / "files", "--data", place / "data", *words, "--out", tmp_path / "a.json") == 0
    assert status("train", "--resume", "--steps", "6", "--out", place / "run") == 0
    whole = sf.train(
        sf.data.open_images(run.config.data, **run.config.opening),
        recipe=run.config.recipe,
        out=tmp_path / "whole",
        device="cpu",
    )
    for name, value in whole.model("none").denoiser.state_dict().items():
        assert torch.equal(value, run.model("none").denoiser.state_dict()[name])


def test_a_resolution_is_a_side_or_a_height_and_a_width() -> None:
    assert parse_resolution("32") == 32
    assert parse_resolution("32x48") == (32, 48)
    assert parse_resolution("32X48") == (32, 48)
    assert parse_resolution("") is None
    for wrong in ("x", "32x", "x32", "0", "32x0", "1x2x3", "3.5", "-4", "32 48"):
        with pytest.raises(ValueError, match=r"--resolution is .*: give the side"):
            parse_resolution(wrong)
    assert as_flags("pass resolution=(40, 64), or fewer.") == "pass --resolution 40x64, or fewer."


def test_images_that_a_network_does_not_fit_are_refused_with_the_size_that_fits(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--recipe", "cifar10-edm", "--batch", "8", "--network.multipliers", "1", "1", "1", "--resolution", "10x18")
    assert status("train", place / "data", *flags, "--out", tmp_path / "run") == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "images 10 high and 18 wide do not fit a U-Net of 3 levels" in told
    assert "pass --resolution 8x16, or at most 2 levels" in told
