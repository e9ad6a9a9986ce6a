"""The built site: strict, whole, and readable without a network."""

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import stablefield as sf
from stablefield import sampling
from stablefield.cli.inventory import inventory
from stablefield.cli.verbs import VERBS

for _needed in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
    pytest.importorskip(_needed, reason="needs the dependency group docs")

ROOT = Path(__file__).resolve().parents[2]


def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return out


class Loads(HTMLParser):
    """What a page loads by itself: pictures, scripts, sheets, frames; and the ids in it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: set[str] = set()
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids.add(found.get("id") or "")
        if tag in ("img", "script", "iframe", "source", "embed") and found.get("src"):
            self.addresses.append(found["src"] or "")
        if tag == "link" and found.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(found.get("href") or "")


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        addresses = Loads(page).addresses
        assert addresses
        for address in addresses:
            assert not re.match(r"(https?:)?//", address), f"{page.name} loads {address}"
            # The page of what is not found names places from the root of a server.
            if not address.startswith("data:") and page.name != "404.html":
                assert (page.parent / address.split("#")[0].split("?")[0]).is_file(), f"{page.name} loads {address}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(https?:)?//|@import", sheet.read_text("utf-8")), sheet.name


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    ids = set().union(*(Loads(page).ids for page in (site / "api").glob("*.html")))
    for package in (sf, sampling):
        for name in package.__all__:
            thing = getattr(package, name)
            if not inspect.ismodule(thing):
                assert f"{thing.__module__}.{name}" in ids, name


def test_a_page_lists_every_verb_and_flag(site: Path) -> None:
    page = (site / "api/command.html").read_text("utf-8")
    sections = {
        re.sub("<[^>]*>|&para;", "", part.split("</h2>")[0]).split(">")[-1].strip(): part for part in page.split("<h2")
    }
    verbs = inventory()
    assert {name.split()[0] for name in verbs} == set(VERBS)
    for name, verb in verbs.items():
        section = sections[f"stablefield {name}"]
        missing = [flag for flag in verb.flags() if f"<td><code>{flag}</code></td>" not in section]
        assert missing == [], name
    assert len(verbs["train"].flags()) > 50


def test_formulas_are_drawn_by_the_browser_itself(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert "arithmatex" not in page.read_text("utf-8"), page.name
    assert (site / "theory.html").read_text("utf-8").count("<math") > 40
    assert (site / "api/targets.html").read_text("utf-8").count("<math") > 10


def test_the_table_of_the_theory_is_the_committed_measurement(site: Path) -> None:
    page = (site / "theory.html").read_text("utf-8")
    record = json.loads((ROOT / "benchmarks/results/own_weight.json").read_text())
    assert len(record["levels"]) > 5
    for level in record["levels"]:
        assert f">{level['own_weight_4096']:.4f}</td>" in page
    assert "<!-- own weight" not in page


def test_the_tables_of_the_comparison_are_the_committed_measurements(site: Path) -> None:
    page = (site / "comparison.html").read_text("utf-8")
    samplers = json.loads((ROOT / "benchmarks/results/samplers.json").read_text())["samplers"]
    assert len(samplers) >= 8
    for row in samplers:
        assert re.search(rf">{row['sampler']}</td>.*?>{row['nfe_18']}</td>.*?>{row['error_18']:.3f}</td>", page, re.S)
    target = json.loads((ROOT / "benchmarks/results/target.json").read_text())
    assert f">{target['beside_two_products']['ratio']:.2f} of their time</td>" in page
    assert f">{target['training_step']['ratio'] - 1:+.1%}</td>" in page


def test_the_picture_of_the_comparison_is_that_of_the_experiments() -> None:
    shown, made = ROOT / "docs/assets/comparisons.png", ROOT / "experiments/figures/comparisons.png"
    assert shown.read_bytes() == made.read_bytes()


def test_the_tables_of_the_page_on_speed_are_the_committed_measurements(site: Path) -> None:
    page = (site / "speed.html").read_text("utf-8")
    record = json.loads((ROOT / "benchmarks/results/step_cpu.json").read_text())
    assert {row["precision"] for row in record["throughput"]} == {"float32", "bf16"}
    for row in record["throughput"]:
        assert f'>{row["setting"]}</td>\n<td style="text-align: right;">{row["images_per_second"]:.1f}</td>' in page
    assert abs(sum(record["shares_of_a_float32_step"].values()) - 1) < 1e-9


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_each_example_has_a_page_with_its_changes_and_all_of_it(script: Path, site: Path) -> None:
    source = (ROOT / "docs" / "drop-ins").glob("*.md")
    (page,) = [path for path in source if f"<!-- script: examples/{script.name} -->" in path.read_text("utf-8")]
    assert f"<!-- changes: examples/{script.name} -->" in page.read_text("utf-8")
    diff = hooks().changes(script)
    lines = script.read_text("utf-8").splitlines()
    added = [line.removesuffix("# +").rstrip() for line in lines if line.endswith("# +")]
    gone = [re.sub(r"^(\s*)# - ", r"\1", line) for line in lines if re.match(r"\s*# - ", line)]
    shown = diff.splitlines()
    assert [line[1:] for line in shown if line.startswith("+")] == added
    assert [line[1:] for line in shown if line.startswith("-")] == gone
    built = (site / "drop-ins" / f"{page.stem}.html").read_text("utf-8")
    assert "<!-- changes" not in built
    assert "<!-- script" not in built
    assert "def main(" in re.sub(r"<[^>]+>", "", built)
