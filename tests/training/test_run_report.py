"""The report of a run: it follows the training, says what the log says, and comes with an animation of bounded size."""

import dataclasses
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import stablefield as sf
from stablefield.cli.entry import main
from stablefield.data._digits import open_digits
from stablefield.data._png import write_png
from stablefield.training import _grids, _report_writer, _run_report
from stablefield.training._grids import picked, write_animation
from stablefield.training._recipe import MLPConfig, Recipe

TINY = Recipe(
    steps=40, batch=16, noise_band=0.5, network=MLPConfig(width=16, depth=1), sample_every=20, log_every=5, keep_last=1
)
REFRESH = '<meta http-equiv="refresh" content="20">'


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[sf.Run, list[str]]:
    """A run whose report was written at every look, and the texts of the report after each report of progress."""
    path, seen = tmp_path_factory.mktemp("report") / "run", list[str]()

    def look(report: sf.training.Report) -> None:
        if report.step == 12:
            assert sf.Run(path).report().training
        page = path / "report.html"
        if page.is_file():
            text = page.read_text("utf-8")
            assert text.endswith("</html>")
            if text not in seen:
                seen.append(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_report_writer, "FIRST", 0.0)
        patch.setattr(_report_writer, "SHARE", 1e9)
        patch.setattr("stablefield.training._held_out.ROWS", 16)
        run = sf.train(
            "digits", out=path, recipe=TINY, held_out=0.1, device="cpu", progress=look, every=1, stop=_stops(25)
        )
    return run, seen


def _stops(after: int) -> Any:
    return iter([False] * (after - 1) + [True] * 100).__next__


def test_the_report_is_replaced_at_the_looks_and_loads_itself_again_until_the_training_ends(
    followed: tuple[sf.Run, list[str]],
) -> None:
    run, seen = followed
    assert len(seen) == 4  # the looks
    for text, step in zip(seen, (5, 10, 15, 20), strict=True):
        assert REFRESH in text
        assert f"Training: step {step} of 40, about" in text
    last = (run.path / "report.html").read_text("utf-8")
    assert "refresh" not in last
    assert "Stopped at step 25 of 40." in last
    assert last.count("data:image/png") == 1
    assert not (run.path / "samples" / "training.gif").exists()


def test_a_value_that_is_not_the_newest_says_its_step(followed: tuple[sf.Run, list[str]], tmp_path: Path) -> None:
    run, _ = followed
    (tmp_path / "run").mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / "run" / name).write_bytes((run.path / name).read_bytes())
    copy = sf.Run(tmp_path / "run")
    copy.folder.log({"step": 10, "frechet": 3.25, "frechet_error": 0.5})
    assert re.search(r"frechet +3\.25 ± 0\.5 at step 10\n", str(copy.report()))
    assert re.search(r"\nloss +[\d.]+\n", str(copy.report()))  # of the last line, step 25
    page = copy.report().save(tmp_path / "report.html").read_text("utf-8")
    assert "of a few samples, at step 10" in page
    copy.folder.log({"step": 25, "frechet": 2.5, "frechet_error": 0.5})
    assert re.search(r"frechet +2\.5 ± 0\.5\n", str(copy.report()))


def test_the_report_says_what_the_log_says(followed: tuple[sf.Run, list[str]], tmp_path: Path) -> None:
    run, _ = followed
    report = run.report()
    assert not report.training
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    held_out = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    charts = report.charts()
    assert set(charts) == {"loss", "excess", "speed"}
    by_name = {line.label: line for line in charts["loss"].lines}
    assert dict(zip(by_name["held out, fixed noise"].x, by_name["held out, fixed noise"].y, strict=True)) == held_out
    assert by_name["training, batches"].y == pytest.approx([line["loss"] + line["variance_removed"] for line in lines])
    assert set(by_name["floor"].y) == {lines[1]["floor"]}
    above = {line.label: line for line in charts["excess"].lines}["held out, fixed noise"]
    assert above.y == pytest.approx([value - lines[1]["floor"] for value in held_out.values()])
    found = json.loads(report.save(tmp_path / "run.json").read_text())
    assert [line["step"] for line in found["metrics"]] == [5, 10, 15, 20, 25]
    assert found["best"] == {"step": min(held_out, key=held_out.__getitem__), "held_out_loss": min(held_out.values())}
    (where,) = found["environment"]
    assert (where["step"], where["processes"], where["device"][:3]) == (0, 1, "cpu")
    assert max(map(len, str(report).splitlines())) <= 80
    assert re.search(rf"held out loss +{held_out[20]:.4g} ±", str(report))
    columns, rows = report.tables()["metrics"]
    assert dict(zip(columns, rows[1], strict=True))["held_out_loss"] == held_out[10]


def test_what_the_report_calls_a_loss_is_one(followed: tuple[sf.Run, list[str]]) -> None:
    run, _ = followed
    with_looks = run.report()
    without = dataclasses.replace(
        with_looks,
        config=dataclasses.replace(with_looks.config, held_out=None),
        lines=tuple(
            {k: v for k, v in line.items() if "fixed" not in k and "held" not in k and "floor" not in k}
            | {"images_per_second": 0.37}
            for line in with_looks.lines
        ),
    )
    assert [line.label for line in without.charts()["loss"].lines] == [
        "loss to single samples",
        "loss to stable targets",
    ]
    assert "all lines are losses to single samples" in with_looks._about_losses()
    assert "all lines are losses" not in without._about_losses()
    figures = {figure.label: figure for figure in without._key_figures()}
    assert figures["training loss"].note == "to stable targets, means over batches"
    assert figures["images per second"].value == 0.37


def test_the_pace_of_a_report_is_that_of_its_last_lines_since_the_training_went_on(
    followed: tuple[sf.Run, list[str]],
) -> None:
    found = followed[0].report()
    seconds, shares = (0.5, 8.0, 2.0, 4.0, 1.0, 1.0), (0.9, 0.9, 0.5, 0.25, 0.0, 0.0)
    lines = tuple(
        {"step": 10 * k + 10, "loss": 1.0, "images_per_second": 80 / seconds[k], "target_share": shares[k]}
        for k in range(6)
    )
    begun = [{**found.environment[0], "step": step} for step in (0, 30, 60)]
    recipe = dataclasses.replace(found.config.recipe, steps=100, batch=8)
    config = dataclasses.replace(found.config, recipe=recipe)
    # Ten steps of eight images: 2 + 4 + 1 + 1 seconds for the last forty, of which 2 s for noise and target.
    for last, images, used, share in ((1, 320, 8.0, 2.0 / 8), (2, 240, 6.0, 1.0 / 6), (3, 80, 1.0, 0.0)):
        now = dataclasses.replace(
            found, config=config, lines=lines, environment=tuple(begun[:last]), training=True, best=None
        )
        assert now.seconds_left == pytest.approx(40 * 8 * used / images)
        assert now._pace[1] == pytest.approx(share)
        assert f"{images / used:.4g}" in str(now)
        assert dataclasses.replace(now, training=False)._key_figures()[-1].value == pytest.approx(
            images / used, rel=0.02
        )


@pytest.mark.parametrize("draws", [1, 4])
def test_reports_and_estimates_tell_images_from_their_draws(tmp_path: Path, draws: int) -> None:
    recipe = Recipe(
        network=MLPConfig(width=16, depth=1),
        steps=100,
        batch=128,
        draws_per_image=draws,
        antithetic=draws > 1,
        importance_sampling=draws > 1,
        noise_levels=sf.LogNormal(0.5, 1.25),
        references=128,
        noise_band=1.0,
        sample_every=0,
    )
    plan = sf.training.make_plan(open_digits(), recipe, device="cpu")
    run = sf.train(plan, out=tmp_path / "run", device="cpu", stop=lambda: True)
    report = run.report()
    settings, speed = dict(report._settings().rows), report._key_figures()[-1]
    steps = report._key_figures()[0].note
    told = dict(plan.estimate("cpu").rows())["steps"]
    assert settings["noise levels"].startswith("LogNormal(stratified=False, mean=0.5, std=1.25)")
    if draws == 1:
        assert told == "100 of 128: 12,800 images, 7.1 epochs"  # of 1,797
        assert steps == "of 100, 128 images each"
        assert speed.label == "images per second"
        assert "draws" not in settings
        assert settings["averages"].endswith(" images")
        assert "importance" not in settings["noise levels"]
    else:
        assert told == "100 of 128 rows of 32 images: 3,200 images, 1.8 epochs"
        assert steps == "of 100, 128 rows of 32 images each"
        assert settings["steps"] == "100 of 128 rows of 32 images, seed 0"
        assert speed.label == "noisy images per second"
        assert settings["draws"] == "4 of each image, in pairs of opposite noise"
        assert settings["learning rate"].endswith("20,000 noisy images")
        assert settings["averages"].endswith(" noisy images")
        assert settings["noise levels"].endswith(", importance sampling")
        assert "noisy images per second" in str(report)


def test_the_command_writes_the_report_and_the_animation(
    followed: tuple[sf.Run, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = followed
    with pytest.raises(SystemExit, match="0"):
        main(["report", str(run.path), "--out", str(tmp_path / "a.json")])
    assert "Stopped at step 25 of 40" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["step"] == 25
    for words, flags in (
        ("a.json exists", ("--out", str(tmp_path / "a.json"))),
        ("has the suffix .html or .json", ("--out", str(tmp_path / "a.pdf"))),
        ("fewer than two sample grids", ("--out", str(tmp_path / "b.json"), "--gif", str(tmp_path / "a.gif"))),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["report", str(run.path), *flags])
        assert words in capsys.readouterr().err
    # A call that is refused writes nothing, not the report either.
    page = run.path / "report.html"
    before = page.stat().st_mtime_ns
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(run.path), "--gif", str(tmp_path / "a.gif")])
    assert page.stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert capsys.readouterr().out == ""
    run.resume(device="cpu")
    # The last step made it from the grids of 20 and 40, and the command makes the same.
    with Image.open(run.path / "samples" / "training.gif") as film:
        assert film.n_frames == 2
    flags = ["--out", str(tmp_path / "b.json"), "--overwrite", "--gif", str(tmp_path / "a.gif")]
    with pytest.raises(SystemExit, match="0"):
        main(["report", str(run.path), *flags])
    assert (tmp_path / "a.gif").read_bytes() == (run.path / "samples" / "training.gif").read_bytes()
    assert len(run.report().environment) == 2


def test_the_animation_shows_the_grids_in_order_and_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_grids, "FRAMES", 5)
    for step in range(1, 13):
        write_png(tmp_path / f"step-{step:08d}.png", np.full((40, 1000, 1), 20 * step, np.uint8))
    write_png(tmp_path / "step-00000000.png", np.full((8, 8, 1), 255, np.uint8))  # of another size
    write_png(tmp_path / "step-00000020.png", np.zeros((40, 1000, 1), np.uint8))  # of a future that was taken back
    assert write_animation(tmp_path, tmp_path / "a.gif", 12)
    with Image.open(tmp_path / "a.gif") as film:
        shown = []
        for k in range(film.n_frames):
            film.seek(k)
            shown.append(int(np.asarray(film.convert("L"))[-1, 0]) // 20)
        assert film.size[0] == 480
        assert film.info["duration"] == 2500
    assert shown == [3, 6, 9, 12]
    assert picked(range(100), 5) == [0, 25, 50, 74, 99]
    noise = np.random.default_rng(0).integers(0, 255, (2, 160, 160, 3), np.uint8)
    for step, grid in enumerate(noise):
        write_png(tmp_path / "noise" / f"step-{step:08d}.png", grid)
    monkeypatch.setattr(_grids, "BYTES", 30_000)
    assert write_animation(tmp_path / "noise", tmp_path / "b.gif")
    content = (tmp_path / "b.gif").read_bytes()
    assert len(content) <= 30_000
    assert struct.unpack("<H", content[6:8])[0] < 160


def test_a_run_of_a_few_seconds_writes_no_report_and_one_that_cannot_be_drawn_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(TINY, steps=5, sample_every=0)
    run = sf.train("digits", out=tmp_path / "short", recipe=recipe, device="cpu")
    assert not (run.path / "report.html").exists()
    assert run.report().charts().keys() == {"loss", "speed"}
    monkeypatch.setattr(_report_writer, "FIRST", 0.0)

    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(_run_report.RunReport, "save", fail)
    with pytest.warns(UserWarning, match=r"report\.html was not written: the disk is full"):
        run = sf.train("digits", out=tmp_path / "full", recipe=recipe, device="cpu")
    assert run.step == 5
