"""The site's pages: their code runs in order, their commands and names exist, their numbers are the committed ones."""

import contextlib
import importlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import DOCS, PAGES, ROOT, blocks, prose
from PIL import Image

import stablefield as sf
from stablefield.cli.entry import main
from stablefield.cli.verbs import parse
from stablefield.training.recipes import DIGITS

VERBS = ["train", "compare", "sample", "ema", "evaluate", "probe", "bench", "export", "import", "doctor"]
IDS = [str(page.relative_to(DOCS)) for page in PAGES]


def photos(folder: Path) -> None:
    """Pictures of several sizes, jpg and png."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(24):
        width, height = rng.integers(20, 40, 2)
        ramp = np.linspace(0, 255, width)[None, :, None] * rng.random(3) * np.ones((height, 1, 1))
        Image.fromarray(ramp.astype(np.uint8)).save(folder / f"{k}.{'jpg' if k % 2 else 'png'}")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, as the reader of a page has one, and the places for caches below it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    modules = pytest.importorskip("diffusers.utils.dynamic_modules_utils")
    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    photos(tmp_path / "photos")
    return tmp_path


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_code_on_the_page_runs_in_order_and_prints_what_the_page_says(page: Path, desk: Path) -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "page"}
    printed = ""
    last = ""
    for block in blocks(page):
        if block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(block.text, str(page), "exec"), names)
            printed = out.getvalue()
        elif block.language == "text" and last == "python":
            assert block.text == printed
        for command in block.commands:
            parse(command)
            if block.mark == "run":
                assert run([*command, *block.flags]) == 0, command
        last = block.language


def test_every_command_in_a_block_is_run_or_parsed_by_the_test_above() -> None:
    marks = [block.mark for page in PAGES for block in blocks(page) if block.commands]
    assert len(marks) > 12
    assert all(marks)
    assert marks.count("run") > 12


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """The help of every verb."""
    found = {}
    for verb in [*VERBS, "data inspect", "data pack"]:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert run([*verb.split(), "--help"]) == 0
        found[verb] = out.getvalue()
    return found


def test_every_flag_and_verb_in_prose_is_in_the_help(helps: dict[str, str]) -> None:
    seen = 0
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", prose(page)):
            words = code.split()
            if words[0] == "stablefield" and len(words) > 1:
                verb = " ".join(words[1:3]) if words[1] == "data" else words[1]
                assert verb in helps, f"{page.name}: {code}"
                known = helps[verb]
            else:
                known = "\n".join(helps.values())
            for flag in (word for word in words if word.startswith("--")):
                assert re.search(rf"{flag}\b", known), f"{page.name}: {code}"
                seen += 1
    assert seen > 10


def test_every_name_of_ours_in_prose_exists() -> None:
    seen = 0
    for page in PAGES:
        text = prose(page)
        for name in re.findall(r"`sf\.([A-Za-z_]\w*)", text):
            assert hasattr(sf, name), f"{page.name}: sf.{name}"
            seen += 1
        for name in re.findall(r"`(stablefield(?:\.\w+)+)`", text):
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), f"{page.name}: {name}"
            seen += 1
    assert seen > 8


def test_the_answer_of_the_probe_is_the_committed_one() -> None:
    record = json.loads((DOCS / "assets/digits-probe.json").read_text())
    assert record["command"] == "stablefield probe digits"
    advice, phases = record["advice"], record["phases"]
    size = next(s for s in advice["sizes"] if s["references"] == advice["recommended_references"])
    text = " ".join((DOCS / "choosing.md").read_text("utf-8").split())
    whole = advice["sizes"][-1]
    assert f"EDM training, batches of {advice['batch']}, all {whole['references']:,} as references: worth it." in text
    assert f"Variance of the sum over a batch: {100 * whole['batch_variance']:.0f} ± " in text
    assert f"Rows that can gain: {100 * advice['share_of_batch_in_band']:.0f} %; VE" in text
    assert f"Variance of the sum over a batch of {advice['batch']}, single sample 100 %:" in text
    assert f"Take {size['references']:,} references: they leave {size['variance_left']:.1%} " in text
    assert f"{100 * advice['batch_variance_in_batch']:.0f} ± " in text
    assert f"{100 * size['batch_variance']:.0f} ± " in text
    below, above = phases["one_sample_below"]["noise_level"], phases["prior_above"]["noise_level"]
    assert f"below noise level {below:.2g}, the prior above {above:.2g}." in text
    assert f"as train has it: from {advice['band_from']:.3g}: below" in text


def test_the_probe_of_the_digits_is_of_the_batch_that_train_takes() -> None:
    record = json.loads((DOCS / "assets/digits-probe.json").read_text())
    assert record["batch"] == record["advice"]["batch"] == DIGITS.batch


def test_numbers_of_the_enumeration_in_prose_are_those_that_the_tests_hold() -> None:
    text = (DOCS / "theory.md").read_text("utf-8")
    assert "0.550, 0.248 and 0.182 for 1, 2 and 3" in text
    held = (ROOT / "tests/targets/test_unbiased_by_enumeration.py").read_text("utf-8")
    assert "[(1, 0.550), (2, 0.248), (3, 0.182)]" in held


def test_the_home_page_and_the_readme_say_the_same_of_themselves() -> None:
    line = "Low-variance training targets for any Gaussian diffusion or flow model"
    assert line in (DOCS / "index.md").read_text("utf-8")
    assert line in (ROOT / "README.md").read_text("utf-8")
