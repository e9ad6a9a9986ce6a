"""What cannot be written is found out before anything is read, and an image file is what it is called."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stablefield.cli.entry import main

SMALL = "--steps 2 --batch 4 --network.width 8 --network.depth 1 --sample-every 0 --device cpu"


def status(line: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(shlex.split(line))
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("places") / "my run"
    assert status(f"train digits {SMALL} --out '{path}'") == 0
    return path


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train digits --out full", ["--out full is not empty", "--resume --out full"]),
        ("train digits --out file/run", ["--out file/run cannot be written"]),
        ("train digits --out run.png", ["the suffix of a file"]),
        ("train digits --out /proc/run", ["cannot be written"]),
        ("train digits --tracker wandb", ["--tracker wandb needs a package"]),
        ("train digits --evaluate-every 1 --extractor dinov2", ["--extractor-file"]),
        ("train digits --device abacus", ["--device abacus"]),
        ("train digits --device meta", ["--device meta"]),
        ("train digits --evaluate-every 1 --evaluate-samples 39", ["--evaluate-samples 39", "40 samples in 20 groups"]),
        ("train digits --evaluate-samples 100", ["--evaluate-samples 100 does nothing without --evaluate-every: pass"]),
        (
            "train digits --extractor pixels",
            ["--extractor pixels does nothing without --evaluate-every"],
        ),
        ("compare digits --extractor dinov2", ["--extractor dinov2 needs --extractor-file"]),
        ("compare digits --samples 39", ["--samples 39", "40 samples in 20 groups"]),
        ("evaluate RUN --extractor random --out grid.png", ["--out grid.png exists", "--overwrite"]),
        ("evaluate RUN --extractor random --report grid.png", ["--report grid.png exists", "--overwrite"]),
        ("evaluate RUN --samples 5 --extractor random", ["there are 5 samples, but Density takes at least 6"]),
        ("evaluate RUN --samples 3 --metrics kernel --extractor random", ["3 samples, but Kernel takes at least 4"]),
        ("evaluate RUN --references 4 --extractor random", ["4 reference images, but Density takes at least 6"]),
        ("evaluate RUN --samples 1 --metrics nearest", ["there are 1 samples, but Nearest takes at least 2"]),
        ("compare digits --out file/x", ["--out file/x cannot be written"]),
        ("compare digits --out x.html", ["the suffix of a file"]),
        ("compare digits --seeds a", ["--seeds a"]),
        ("compare digits --evaluations 0", ["--evaluations is 0"]),
        ("data pack digits file", ["file exists", "--overwrite"]),
        ("data inspect digits --out grid.png", ["--out grid.png exists", "name another file", "--overwrite"]),
        ("data inspect digits --out full", ["has the suffix .png or .jpg"]),
        ("sample RUN --out grid.png", ["--out grid.png exists", "name another file", "--overwrite"]),
        ("sample RUN --out full", ["--out full holds 1 file, such as thesis.txt", "name a new folder", "--overwrite"]),
        ("data pack digits full", ["full is a folder"]),
        ("data pack digits x.npz", ["has the suffix .safetensors"]),
        ("data pack digits file/x", ["cannot be written"]),
        ("data inspect digits --out x.gif", ["has the suffix .png or .jpg"]),
        ("data inspect digits --out file/x.png", ["cannot be written"]),
        ("data inspect digits --count 0", ["--count is 0"]),
        ("bench digits --out file/x", ["cannot be written"]),
        ("bench digits --out bench.json", ["the suffix of a file"]),
        ("bench digits --batch 0", ["--batch is 0"]),
        ("sample RUN --out x.gif", [".png or .jpg or .jpeg or .npz"]),
        ("sample RUN --out file/x.png", ["cannot be written"]),
        ("export RUN --out full", ["not empty"]),
        ("export RUN --out new --private", ["--private is about the repository of --push: name one"]),
        ("export RUN --out new --samples 0 --steps 9", ["--steps 9 does nothing with --samples 0"]),
        ("ema RUN --step 4", ["--step 4 does nothing without --length"]),
        ("probe digits --references 16.9", ["--references holds 16.9: pass whole numbers"]),
        ("export RUN --out x.safetensors", ["the suffix of a file"]),
        ("import file --out full", ["not empty"]),
    ],
)
def test_checks_come_before_work(
    line: str,
    words: list[str],
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("it has begun to work")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    (tmp_path / "grid.png").write_text("months of work")
    before = sorted(tmp_path.rglob("*"))
    for name in (
        "cli.sources.open_images",
        "training._sampler.open_model",
        "training._run.open_model",
        "cli.importing.read_published",
    ):
        monkeypatch.setattr(f"stablefield.{name}", work)
    assert status(line.replace("RUN", f"'{run}'")) in (1, 2)
    told = capsys.readouterr().err
    assert [word for word in words if word not in told] == [], told
    assert "begun to work" not in told
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("verb", ["compare", "train"])
def test_too_few_images_for_the_samples_are_found_before_anything_is_computed(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("it has begun to work")

    monkeypatch.setattr("stablefield.training._plan.resolve_band", work)
    number = {"compare": "--samples {}", "train": "--evaluate-every 1 --evaluate-samples {}"}[verb]
    np.save(tmp_path / "few.npy", np.random.default_rng(0).integers(0, 256, (39, 8, 8), dtype=np.uint8))
    assert status(f"{verb} '{tmp_path}/few.npy' {number.format(40)} --out '{tmp_path}/out' --device cpu") == 2
    assert "the data have 39 images" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["grid.jpg", "grid.JPEG", "grid.png"])
def test_a_grid_is_the_picture_that_its_name_says(name: str, run: Path, tmp_path: Path) -> None:
    assert status(f"sample '{run}' --seeds 0-3 --steps 2 --device cpu --out '{tmp_path / name}'") == 0
    assert status(f"sample '{run}' --seeds 0-3 --steps 2 --device cpu --out '{tmp_path / 'same.png'}'") == 0
    with Image.open(tmp_path / name) as picture, Image.open(tmp_path / "same.png") as same:
        assert picture.format == ("PNG" if name.endswith("png") else "JPEG")
        assert np.abs(np.asarray(picture).astype(float) - np.asarray(same)).mean() < 3


def test_files_are_replaced_only_where_that_is_asked_for(run: Path, tmp_path: Path) -> None:
    draw = f"sample '{run}' --seeds 0-1 --steps 2 --device cpu"
    inspect = f"data inspect digits --count 4 --out '{tmp_path}/some.png'"
    commands = [f"{draw} --out '{tmp_path}/{name}'" for name in ("grid.png", "grid.npz", "images")]
    for command in (*commands, inspect):
        assert status(command) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert len(before) == 5
    for command in (*commands, inspect):
        assert status(command) == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    for command in (*commands, inspect):
        assert status(f"{command} --overwrite") == 0
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    assert all(after[path] > before[path] for path in before)
    (tmp_path / "empty").mkdir()
    assert status(f"{draw} --out '{tmp_path}/empty'") == 0


def test_grids_without_a_name_never_replace_each_other(run: Path) -> None:
    folder = run / "samples"
    before = {path.name for path in folder.iterdir()}
    for _ in range(2):
        assert status(f"sample '{run}' --seeds 0-1 --sampler euler --steps 2 --device cpu") == 0
    assert {path.name for path in folder.iterdir()} - before == {"euler-2.png", "euler-2-2.png"}


def test_printed_commands_can_be_copied(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a b;c"
    assert status(f"train digits {SMALL} --out '{path}'") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("draw more:"))
    assert shlex.split(line.partition(":")[2]) == ["stablefield", "sample", str(path), "--seeds", "0-63"]
