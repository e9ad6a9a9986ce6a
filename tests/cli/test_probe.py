"""`stablefield probe`: numbers, pictures and a report from data or a run, and wrong use told of."""

import csv
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import stablefield as sf
from stablefield.cli.entry import main
from stablefield.diffusion._objective import DenoiserLike
from stablefield.training._run_folder import RunFolder


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    code = exit_.value.code
    assert isinstance(code, int)
    return code


def headed(printed: str) -> tuple[str, str, str]:
    """The first three lines of a probe, of which a terminal may break the first."""
    first, figure, rows = re.findall(
        r"^(\w+, \w+\(.*?\.)\n(Gradient's variance .*?\.)\n(Rows that can gain.*?\.)\n",
        printed,
        re.DOTALL | re.MULTILINE,
    )[0]
    return " ".join(first.split()), " ".join(figure.split()), rows


@pytest.fixture
def few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is said and not of how exactly the variance of a whole batch is known."""
    monkeypatch.setattr("stablefield.probing._batch._MOST", 8)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ninety small images of three classes."""
    path = tmp_path_factory.mktemp("data") / "few.npz"
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    images = np.clip(70 * labels[:, None, None] + rng.normal(60, 40, (90, 4, 4)), 0, 255).astype(np.uint8)
    np.savez(path, images=images, labels=labels)
    return path


@pytest.fixture(scope="module")
def probed(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("probe") / "out"
    assert status("probe", str(few), "--references", "4,32,all", "--out", str(out)) == 0
    return out


def test_a_probe_leaves_numbers_pictures_and_a_report(probed: Path) -> None:
    assert {path.name for path in probed.iterdir()} == {
        "probe.json",
        "variance.csv",
        "variance.png",
        "phases.png",
        "references.png",
        "report.html",
    }
    for path in probed.glob("*.png"):
        with Image.open(path) as picture:
            assert np.asarray(picture).std() > 1
    page = (probed / "report.html").read_text()
    assert page.count("<svg") >= 3
    assert "stablefield probe" in page


@pytest.mark.usefixtures("without_charts", "few_batches")
def test_pictures_of_many_sizes_are_probed_as_train_would_take_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(12):
        width, height = rng.integers(20, 40, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    flags = ("--references", "4,all", "--noise-levels", "1,8", "--sources", "8")
    assert status("probe", str(folder), *flags, "--out", str(tmp_path / "a")) == 2
    assert "broken.png" in capsys.readouterr().err
    for out, more, side in (("a", (), 16), ("b", ("--resolution", "8", "--resize", "squash"), 8)):
        assert status("probe", str(folder), *flags, "--skip-broken", *more, "--out", str(tmp_path / out)) == 0
        record = json.loads((tmp_path / out / "probe.json").read_text())
        assert record["data"]["shape"] == [3, side, side]
        assert " ".join((*more, "--skip-broken")) in record["command"]


def test_the_json_and_the_table_hold_the_same_numbers(probed: Path) -> None:
    record = json.loads((probed / "probe.json").read_text())
    levels = record["variance"]["levels"]
    with (probed / "variance.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(levels) == len(rows) == 21
    for level, row in zip(levels, rows, strict=True):
        assert level == {name: float(cell) if cell else None for name, cell in row.items()}
    assert {"v_dsm", "v_dsm_se", "v_stf_4", "share_left_32", "divergence", "source_weight", "ess"} <= set(levels[0])
    assert [entry["references"] for entry in record["advice"]["sizes"]] == [4, 32, 90]
    assert record["variance"]["every_sample_a_source"]
    assert record["data"]["count"] == 90
    assert 0 < record["advice"]["share_of_batch_in_band"] < 1


@pytest.mark.usefixtures("without_charts", "few_batches")
def test_the_advice_is_a_few_lines(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    levels = ("--noise-levels", "0.01,0.3,1,30")
    arguments = ("--references", "32", *levels, "--sources", "32", "--plan", "ve", "--by-class")
    assert status("probe", str(few), *arguments, "--out", str(tmp_path / "out")) == 0
    lines = capsys.readouterr().out.splitlines()
    first, figure, rows = headed("\n".join(lines))
    assert first == "VE, LogUniform(0.02, 100), batches of 90, all 90 references: expect little."
    assert re.match(r"Gradient's variance when training starts: [\d.]+ ± [\d.]+ % of the single sample's\.$", figure)
    assert re.match(r"Rows that can gain: \d+ %; EDM \d+ %, VP \d+ %, flow \d+ %\.$", rows)
    assert lines[lines.index(rows) + 1].startswith("Take ")
    text = " ".join(lines)
    assert "of a row's variance in VE training." in text
    assert re.search(
        r"with batches of 90, single sample 100 %: [\d.]+ ± [\d.]+ % with the batch alone, [\d.]+ ± [\d.]+ %", text
    )
    assert len(lines) < 20
    assert all(len(line) <= 84 for line in lines[:-1])
    record = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert record["command"].endswith("--plan ve --by-class --sources 32")
    assert [level["noise_level"] for level in record["variance"]["levels"]] == pytest.approx([0.01, 0.3, 1, 30])


@pytest.mark.usefixtures("without_charts", "few_batches")
def test_classes_of_no_sample_or_of_one_leave_the_measurement_whole(tmp_path: Path) -> None:
    """Labels from 1 on leave class 0 empty; the last class has one sample. Neither has a noise band."""
    path = tmp_path / "some.npz"
    images = np.random.default_rng(0).integers(0, 256, (41, 4, 4), dtype=np.uint8)
    np.savez(path, images=images, labels=np.array([*(np.arange(40) % 3 + 1), 4]))
    flags = ("--by-class", "--references", "4,all", "--noise-levels", "1,8", "--sources", "8")
    assert status("probe", str(path), *flags, "--out", str(tmp_path / "out")) == 0
    record = json.loads((tmp_path / "out" / "probe.json").read_text())
    empty, *some, single = record["noise_band"]["by_label"]
    assert empty is single is None
    assert len(some) == 3
    assert all(level > 0 for level in some)
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.usefixtures("without_charts")
def test_the_first_line_says_what_to_expect_of_each_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Samples far from each other, of which few compete at EDM's noise levels and more at those of flow matching; and near.

    Many compete at VE's levels, too. But its network predicts noise, and references take none of it from the gradient.
    """
    rng = np.random.default_rng(0)
    np.save(tmp_path / "far.npy", rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8))
    np.save(tmp_path / "near.npy", rng.integers(0, 256, (40, 2, 2), dtype=np.uint8))
    for name, plan, said in (
        ("far", "edm", "EDM, LogNormal(-1.2, 1.2), batches of 8, all 40 references: expect nothing."),
        ("far", "ve", "VE, LogUniform(0.02, 100), batches of 8, all 40 references: expect nothing."),
        ("far", "flow", "flow, Uniform(0, 1), batches of 8, all 40 references: expect little."),
        ("near", "flow", "flow, Uniform(0, 1), batches of 8, all 40 references: worth it."),
    ):
        flags = ("--references", "all", "--sources", "24", "--plan", plan, "--batch", "8")
        assert status("probe", str(tmp_path / f"{name}.npy"), *flags, "--out", str(tmp_path / plan)) == 0
        first, figure, rows = headed(capsys.readouterr().out)
        assert first == said
        record = json.loads((tmp_path / plan / "probe.json").read_text())["advice"]
        shown = re.match(r"Rows that can gain: ([\d.]+) %", rows)
        assert shown is not None
        assert float(shown[1]) == pytest.approx(100 * record["share_of_batch_in_band"], abs=0.5)
        shown = re.match(r"Gradient's variance when training starts: ([\d.]+) ± ", figure)
        assert shown is not None
        assert float(shown[1]) == pytest.approx(100 * record["sizes"][-1]["batch_variance"], abs=0.051)


@pytest.mark.usefixtures("without_charts")
def test_the_verdict_is_of_the_batch_and_not_of_the_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures nearly black or nearly white: those of one kind compete in nearly every row, and differ by next to nothing.

    The variance within a kind is 64 d (2 / 255)^2 / 3 in all, that between them near d: under 1 % can be gained.
    """
    rng = np.random.default_rng(0)
    kinds = np.where(np.arange(40) % 2, 16, 239)[:, None, None]
    np.save(tmp_path / "two.npy", (kinds + rng.integers(-8, 9, (40, 16, 16))).astype(np.uint8))
    flags = ("--references", "16,all", "--sources", "24", "--plan", "edm")
    assert status("probe", str(tmp_path / "two.npy"), *flags, "--out", str(tmp_path / "out")) == 0
    first, figure, rows = headed(capsys.readouterr().out)
    record = json.loads((tmp_path / "out" / "probe.json").read_text())["advice"]
    assert record["share_of_batch_in_band"] > 0.5
    assert record["sizes"][-1]["batch_variance"] > 0.98
    assert first.endswith("all 40 references: expect nothing.")
    assert re.match(r"Gradient's variance when training starts: (99\.\d|100\.0) ± 0.1 %", figure)
    assert float(rows.split()[4]) > 50


@pytest.mark.usefixtures("without_charts", "few_batches")
@pytest.mark.parametrize(("given", "batch"), [((), 64), (("--batch", "24"), 24)])
def test_the_batch_is_that_of_the_recipe_unless_it_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: tuple[str, ...], batch: int
) -> None:
    np.save(tmp_path / "grey.npy", np.random.default_rng(0).integers(0, 256, (80, 28, 28), dtype=np.uint8))
    flags = ("--references", "all", "--sources", "8", *given)
    assert status("probe", str(tmp_path / "grey.npy"), *flags, "--out", str(tmp_path / "out")) == 0
    first, *_ = headed(capsys.readouterr().out)
    assert re.match(rf"EDM, LogNormal\([-.\d]+, [.\d]+\), batches of {batch}, all 80 references: ", first)
    record = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert record["batch"] == record["advice"]["batch"] == batch
    assert record["command"].endswith("--sources 8" if not given else "--batch 24 --sources 8")


@pytest.mark.usefixtures("without_charts", "few_batches")
def test_references_that_train_reads_with_each_batch_decide_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stablefield.training import _placement as placement

    monkeypatch.setattr(placement, "can_be_resident", lambda *_: False)
    monkeypatch.setattr(placement, "LOADED_REFERENCES", 70)
    np.save(tmp_path / "grey.npy", np.random.default_rng(0).integers(0, 256, (90, 28, 28), dtype=np.uint8))
    flags = ("--references", "all", "--sources", "8")
    for batch in (64, 80):
        assert (
            status("probe", str(tmp_path / "grey.npy"), *flags, "--batch", str(batch), "--out", str(tmp_path / "o"))
            == 0
        )
        first, figure, _ = headed(capsys.readouterr().out)
        advice = json.loads((tmp_path / "o" / "probe.json").read_text())["advice"]
        of_pool = next(entry["batch_variance"] for entry in advice["sizes"] if entry["references"] == 70)
        assert f"batches of {batch}, {max(70, batch)} references: " in first
        expected = of_pool if batch < 70 else advice["batch_variance_in_batch"]
        assert f": {100 * expected:.1f} ± " in figure


@pytest.mark.usefixtures("without_charts", "few_batches")
@pytest.mark.parametrize("given", [(), ("--by-class",)])
def test_probe_and_train_have_one_noise_band(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: tuple[str, ...]
) -> None:
    flags = ("--references", "all", "--sources", "8", "--batch", "16")
    assert status("probe", str(few), *flags, *given, "--out", str(tmp_path / "out")) == 0
    told = " ".join(capsys.readouterr().out.split())
    tiny = ("--steps", "1", "--network.width", "16", "--network.depth", "1", "--sample-every", "0")
    conditional = ("--conditional",) if given else ()
    assert status("train", str(few), *tiny, *conditional, "--out", str(tmp_path / "run")) == 0
    printed = " ".join(capsys.readouterr().out.split())
    band = json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]["noise_band"]
    assert json.loads((tmp_path / "out" / "probe.json").read_text())["advice"]["band_from"] == band
    words = re.search(r"that train uses: (from [\d.]+)", told)
    assert words is not None
    assert words[1] in printed


@pytest.mark.usefixtures("without_charts", "few_batches")
def test_a_part_of_the_images_is_said_to_be_one(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--max-images", "40", "--references", "8", "--sources", "8")
    assert status("probe", str(few), *arguments, "--out", str(tmp_path / "out")) == 0
    assert "sampled: 40 of 90 images represent the data set" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "probe.json").read_text())["variance"]["drawn_from"] == 90


@pytest.mark.usefixtures("without_charts")
def test_the_bias_check_passes_the_policies_and_sees_the_faults(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("probe", str(few), "--by-class", "--check-bias", "--out", str(tmp_path / "out")) == 0
    out = capsys.readouterr().out
    assert out.count("no bias seen") == 3
    assert out.count("BIASED") == 3
    checks = json.loads((tmp_path / "out" / "bias.json").read_text())["checks"]
    assert {name for name, check in checks.items() if not check["passed"]} == {
        "source left out",
        "source included twice",
        "classes mixed",
    }
    assert all(check["planted"] != check["passed"] for check in checks.values())


@pytest.mark.parametrize("conditional", [False, True])
def test_a_run_is_held_against_the_optimum(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], conditional: bool
) -> None:
    run = tmp_path / "run"
    tiny = ["--recipe", "digits", "--steps", "30", "--batch", "32", "--network.width", "16", "--network.depth", "1"]
    given = ["--conditional"] if conditional else []
    assert status("train", str(few), *tiny, *given, "--log-every", "10", "--sample-every", "0", "--out", str(run)) == 0
    assert status("probe", str(run)) == 0
    printed = capsys.readouterr().out
    assert "Step 30: the network is farthest from the optimum" in printed
    assert "variance of the gradient, batch of 32" in printed
    assert {path.name for path in (run / "probe").iterdir()} == {
        "probe.json",
        "fit.csv",
        "distance.png",
        "excess.png",
        "training.png",
        "report.html",
    }
    logged = json.loads((run / "probe" / "probe.json").read_text())["logged"]
    assert [entry["step"] for entry in logged] == [10, 20, 30]
    assert all(len(entry["bin_excess"]) == len(entry["bin_edges"]) + 1 for entry in logged)
    levels = json.loads((run / "probe" / "probe.json").read_text())["fit"]["levels"]
    # A network of 30 steps is far from the optimum, and the loss is distance and floor.
    for level in levels:
        spread = 5 * level["loss_se"] + 1e-6
        assert abs(level["loss"] - level["distance_to_mean"] - level["floor"]) < spread
    assert max(level["distance_to_mean"] for level in levels) > 0.1

    def nothing(
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        return 0 * x

    found = sf.probe(RunFolder(run), noise_levels=[0.5], sources=16, device="cpu")
    assert isinstance(found, sf.probing.NetworkProbe)
    assert (found.name, found.step, len(found.logged)) == ("run", 30, 3)
    assert "note: measured at the given noise levels only; it may be worse at others" in str(found).splitlines()
    for given in ({"aim": 0.2, "batch": 8}, {"by_class": True}, {"labels": np.zeros(90)}, {"references": (4,)}):
        with pytest.raises(ValueError, match=f"^{', '.join(given)}: no effect on a run"):
            sf.probe(run, **given)
    with pytest.raises(ValueError, match=r"^aim: no effect on data with a network"):
        sf.probe(few, network=nothing, aim=0.2)
    assert found.ledger is not None

    own = sf.probe(run, network=nothing, noise_levels=[0.5], sources=16, device="cpu")
    assert isinstance(own, sf.probing.NetworkProbe)
    assert (own.name, own.step, own.ledger) == ("run", None, None)
    assert float(own.fit.distance.mean[0]) != float(found.fit.distance.mean[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--references", "4,x"), "--references is 4,x"),
        (("--references", "0"), "--references is (0,): pass sizes of at least 1"),
        (("--noise-levels", "1,b"), "--noise-levels is 1,b"),
        (("--noise-levels", "-1"), "--noise-levels [-1.0]"),
        (("--aim", "2"), "--aim is 2"),
        (("--max-images", "1"), "--max-images is 1"),
        (("--batch", "0"), "--batch is 0"),
        (("--device", "abacus"), "--device abacus"),
    ],
)
def test_wrong_use_is_told_in_one_paragraph(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    given = arguments if "--noise-levels" in arguments else (*arguments, "--noise-levels", "0.5,1")
    assert status("probe", str(few), *given, "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("of_run", "arguments", "words"),
    [
        (True, ("--check-bias",), "--check-bias tests reference policies on data"),
        (
            True,
            ("--plan", "ve", "--by-class", "--resolution", "8"),
            "--resolution, --plan, --by-class: no effect on a run",
        ),
        (
            False,
            ("--check-bias", "--sources", "8", "--aim", "0.2"),
            "--aim, --sources: no effect with --check-bias",
        ),
        (False, ("--false-alarm", "0.01"), "--false-alarm: no effect without --check-bias"),
    ],
)
def test_flags_without_effect_are_refused(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], of_run: bool, arguments: tuple[str, ...], words: str
) -> None:
    data = few
    if of_run:
        data = tmp_path / "run"
        data.mkdir()
        (data / "config.json").write_text("{}")  # not read
    assert status("probe", str(data), *arguments, "--out", str(tmp_path / "out")) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_the_optimum_of_a_run_with_mirrored_images_has_them(few: Path, tmp_path: Path) -> None:
    """The posterior mean over the images and their mirror images has no distance to it, and that over the images has."""
    images = sf.data.open_images(few)
    data = torch.from_numpy(np.array(images.images)).float() / 127.5 - 1
    recipe = dataclasses.replace(
        sf.training.DIGITS, steps=1, batch=8, mirror=True, network=sf.training.MLPConfig(width=8, depth=1)
    )
    sf.train(images, out=tmp_path / "run", recipe=recipe, device="cpu")

    def exact(references: Tensor) -> DenoiserLike:
        def mean(
            x: Tensor,
            sigma: Tensor,
            class_labels: Tensor | None = None,
            augment_labels: Tensor | None = None,
        ) -> Tensor:
            return sf.posterior(x, 1.0, sigma, references).mean

        return mean

    both, one = (
        sf.probe(tmp_path / "run", network=exact(references), noise_levels=[0.5], sources=40, device="cpu")
        for references in (torch.cat([data, data.flip(-1)]), data)
    )
    assert float(both.fit.distance.mean[0]) < 1e-6 * float(both.fit.floor.mean[0])
    assert float(one.fit.distance.mean[0]) > 1e-2 * float(one.fit.floor.mean[0])


def test_a_run_is_not_measured_on_other_data_than_it_was_trained_on(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4), np.uint8)
    np.save(tmp_path / "x.npy", images)
    recipe = dataclasses.replace(sf.training.DIGITS, steps=1, batch=8, network=sf.training.MLPConfig(width=8, depth=1))
    sf.train(tmp_path / "x.npy", out=tmp_path / "run", recipe=recipe, device="cpu")
    np.save(tmp_path / "x.npy", 255 - images)
    with pytest.raises(ValueError, match="is not what this run was started with"):
        sf.probe(tmp_path / "run", noise_levels=[0.5], sources=8, device="cpu")
    (tmp_path / "x.npy").unlink()
    with pytest.raises(ValueError, match=r"^data is missing: the run's own data, .*x\.npy, do not exist"):
        sf.probe(tmp_path / "run", noise_levels=[0.5], sources=8, device="cpu")


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((1, 4, 4), np.uint8), "hold 1 sample"),
        (np.full((30, 4, 4), 9, np.uint8), "all 30 samples are equal"),
        (np.full((30, 4, 4), np.nan, np.float32), "sample 0 is nan at [0, 0]"),
    ],
)
def test_data_with_nothing_to_measure_are_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], images: np.ndarray, words: str
) -> None:
    np.save(tmp_path / "x.npy", images)
    assert status("probe", str(tmp_path / "x.npy"), "--out", str(tmp_path / "out")) == 2
    assert words in capsys.readouterr().err
