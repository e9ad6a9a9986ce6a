"""CONTRIBUTING's examples of extensions run as they stand there."""

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import stablefield as sf
from stablefield.evaluation import _metric
from stablefield.evaluation._evaluate import METRICS

ROOT = Path(__file__).resolve().parents[2]


def examples(title: str) -> list[str]:
    """The blocks of Python of a section."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## )", text, re.M | re.S)
    return re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)


def test_a_new_metric_is_one_file_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file, call = examples("Add a metric")
    names: dict[str, Any] = {"__name__": "mean_distance"}
    exec(compile(file, "mean_distance.py", "exec"), names)
    exec(compile(call, "call.py", "exec"), names)
    assert re.search(r"^mean distance ↓ +0\.\d{4}$", capsys.readouterr().out, re.M)
    (line,) = re.findall(r"`\"(mean-distance)\": (MeanDistance\(\)),`", (ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    monkeypatch.setitem(METRICS, line[0], eval(line[1], names))
    digits = sf.data.open_images("digits")
    net = sf.evaluation.RandomConvolutions()
    assert sf.evaluate(digits, data=digits, metrics=["mean-distance"], extractor=net)["mean distance"].mean < 1e-6


def test_the_metric_in_the_docstring_of_the_interface_runs() -> None:
    text = textwrap.dedent(re.findall(r"^    @dataclass.*?(?=\n\n)", _metric.__doc__ or "", re.M | re.S)[0])
    names: dict[str, Any] = {**vars(_metric), "__name__": "mean_distance"}
    exec(compile(text, "mean_distance.py", "exec"), names)
    digits = sf.data.open_images("digits").images[:40]
    net = sf.evaluation.RandomConvolutions()
    found = sf.evaluate(digits, data=digits, metrics=[names["MeanDistance"]()], extractor=net, cache=False)
    assert found["mean distance"].mean == 0


# Section, what its file is imported for, and where its line goes: behind this text, or in place of the line that begins so.
ADDED = {
    "sampler": ("midpoint", "SOLVERS: Mapping[str, Solver] = {\n"),
    "recipe": ("QUICK", "RECIPES = {\n"),
    "network": ("LinearConfig", "    network: "),
    "data source": ("open_csv", "SOURCES: tuple[Source, ...] = (\n"),
}

SCRIPT = """
import runpy

runpy.run_module("stablefield.cli.inventory", run_name="__main__")

import numpy as np
import stablefield as sf
from stablefield.cli.entry import main
from stablefield.networks._linear import LinearConfig
from stablefield.training import Recipe

values = np.random.default_rng(0).integers(0, 256, (40, 64))
np.savetxt("grey.csv", values, "%d", delimiter=",")
images = sf.data.open_images("grey.csv")
assert (images.images.reshape(40, 64) == values).all()
run = sf.train(images, out="linear", recipe=Recipe(network=LinearConfig(), batch=8, steps=2), device="cpu")
assert sf.Run("linear").config.recipe.network == LinearConfig()
samples = run.sample(2, sampler="midpoint", steps=3)
assert samples.nfe == 6 and samples.images.shape == (2, 1, 8, 8)
one, same = (run.sample([1], sampler=name, steps=300).images[0].astype(int) for name in ("midpoint", "heun"))
assert abs(one - same).max() <= 2
for arguments in (
    "train grey.csv --recipe quick --steps 1 --batch 8 --out quick --device cpu",
    "sample quick --sampler midpoint --steps 2 --seeds 0-1 --out two.png --device cpu",
):
    try:
        main(arguments.split())
    except SystemExit as ended:
        assert ended.code == 0, arguments
try:
    sf.data.open_images("nowhere")
except ValueError as error:
    assert "a .csv file" in str(error)
"""


def test_a_new_sampler_recipe_network_and_data_source_is_one_file_and_one_line(tmp_path: Path) -> None:
    """Each is added to a copy of the sources as its section says, and used from Python and by the command."""
    source = tmp_path / "src"
    shutil.copytree(ROOT / "src", source)  # with what is compiled
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    for title, (name, place) in ADDED.items():
        (section,) = re.findall(rf"^## Add a {title}\n(.*?)(?=^## )", text, re.M | re.S)
        (content,) = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
        ((folder, file),) = re.findall(r"`(src/[\w/]+)`,\s+such\s+as `(\w+)\.py`", section)
        ((listed,),) = [
            re.findall(r"^and one (?:line|more)[^`]*(?:`[^`./]+`[^`]*)+`(src/[\w/]+\.py)`", section, re.M | re.S)
        ]
        (line,) = re.findall(r"^    (\S.*)$", section.replace(content, ""), re.M)
        (tmp_path / folder / f"{file}.py").write_text(content, "utf-8")
        module = tmp_path / listed
        before = module.read_text("utf-8")
        assert before.count(place) == 1
        if place.endswith("\n"):
            after = before.replace(place, f"{place}    {line}\n")
        else:
            after = re.sub(rf"^{place}.*$", lambda _, line=line: f"    {line}", before, flags=re.M)
        package = folder.removeprefix("src/").replace("/", ".")
        after = after.replace("\n__all__", f"\nfrom {package}.{file} import {name}\n\n__all__", 1)
        assert len(after.splitlines()) - len(before.splitlines()) <= 3  # the line, its import and a blank one
        module.write_text(after, "utf-8")
    script = tmp_path / "use.py"
    script.write_text(SCRIPT, "utf-8")
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(source), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
