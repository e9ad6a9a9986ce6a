"""The built site: strict, whole, and readable without a network."""

import dataclasses
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import stablefield as sf
from stablefield import sampling
from stablefield.cli.inventory import inventory
from stablefield.cli.verbs import VERBS
from stablefield.networks._song_unet import SongUNet

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
                assert f"{package.__name__}.{name}" in ids, name


def test_a_page_lists_every_verb_and_flag(site: Path) -> None:
    page = (site / "api/command.html").read_text("utf-8")
    sections = {
        re.sub("<[^>]*>|&para;", "", part.split("</h2>")[0]).split(">")[-1].strip(): part for part in page.split("<h2")
    }
    verbs = inventory()
    assert verbs.keys() == VERBS.keys()
    for name, verb in verbs.items():
        section = sections[f"stablefield {name}"]
        missing = [flag for flag in verb.flags() if f"<td><code>{flag}</code></td>" not in section]
        assert missing == [], name
    assert len(verbs["train"].flags()) > 50


def test_formulas_are_drawn_by_the_browser_itself(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert "arithmatex" not in page.read_text("utf-8"), page.name
    assert (site / "theory.html").read_text("utf-8").count("<math") > 40
    assert (site / "theory.html").read_text("utf-8").count("<math") > 10


def test_the_table_of_the_theory_is_the_committed_measurement(site: Path) -> None:
    page = (site / "theory.html").read_text("utf-8")
    record = json.loads((ROOT / "benchmarks/results/own_weight.json").read_text())
    assert len(record["levels"]) > 5
    for level in record["levels"]:
        assert f">{level['own_weight_4096']:.4f}</td>" in page
    assert "<!-- source weight" not in page


def test_the_tables_of_the_comparison_are_the_committed_measurements(site: Path) -> None:
    page = (site / "comparison.html").read_text("utf-8")
    samplers = json.loads((ROOT / "benchmarks/results/samplers.json").read_text())["samplers"]
    assert len(samplers) >= 8
    for row in samplers:
        assert re.search(rf">{row['sampler']}</td>.*?>{row['nfe_18']}</td>.*?>{row['error_18']:.3f}</td>", page, re.S)
    target = json.loads((ROOT / "benchmarks/results/target.json").read_text())
    assert f">{target['beside_two_products']['ratio']:.2f} of their time</td>" in page
    assert f">{target['training_step']['ratio'] - 1:+.1%}</td>" in page


def test_the_pictures_of_the_experiments_are_those_that_the_scripts_drew() -> None:
    made = {figure.name: figure for figure in (ROOT / "experiments/figures").glob("*.png")}
    shown = [picture for picture in (ROOT / "docs/assets").glob("*.png") if picture.name in made]
    assert {picture.stem for picture in shown} == {"comparisons", "cifar10_variance", "cifar10_sizes"}
    for picture in shown:
        assert picture.read_bytes() == made[picture.name].read_bytes(), picture.name


def test_the_tables_of_the_page_on_speed_are_the_committed_measurements(site: Path) -> None:
    page = (site / "speed.html").read_text("utf-8")
    record = json.loads((ROOT / "benchmarks/results/step_cpu.json").read_text())
    assert {row["precision"] for row in record["throughput"]} == {"float32", "bf16"}
    for row in record["throughput"]:
        assert f'>{row["setting"]}</td>\n<td style="text-align: right;">{row["images_per_second"]:.1f}</td>' in page
    assert abs(sum(record["shares_of_a_float32_step"].values()) - 1) < 1e-9


def cells(page: str) -> list[list[str]]:
    """The rows of a page's tables, as text."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.S)
    return [[re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)] for row in rows]


def test_the_tables_of_the_gpu_are_the_committed_measurements(site: Path) -> None:
    page = (site / "speed.html").read_text("utf-8")
    shown = cells(page)
    record = json.loads((ROOT / "benchmarks/results/gpu.json").read_text())
    rates = {(row["precision"], row["target"]): row["images_per_second"] for row in record["throughput"]}
    assert len(rates) == 6
    for precision in ("bf16", "bf16 compiled"):
        single, *stable = (rates[precision, target] for target in ("DSM", "STF, n = 4096", "STF, n = 50,000"))
        changed = [f"{rate:,.0f} ({rate / single - 1:+.1%})" for rate in stable]
        assert [precision, f"{single:,.0f}", *changed] in shown
    assert len(record["cost"]) == 6
    for row in record["cost"]:
        (line,) = [line for line in shown if line[:2] == [str(row["batch"]), f"{row['references']:,}"]]
        assert line[2:5] == [f"{row['seconds'] * 1e3:.1f} ms", f"{row['products'] * 1e3:.2f} ms", f"{row['ratio']:.1f}"]
        assert (line[6] == "too large") == (row["naive"] is None)
    said = " ".join((ROOT / "benchmarks/README.md").read_text("utf-8").split())
    seconds, products = ([1e3 * row[name] for row in record["cost"]] for name in ("seconds", "products"))
    over = [a - b for a, b in zip(seconds, products, strict=True)]
    assert f"An H200, which computes as fast, measured (`results/gpu.json`, commit {record['commit']})" in said
    assert f"{products[-1]:.2f} ms for the products of 512 rows and {seconds[-1]:.2f} ms for the whole call" in said
    assert f"In all six cases a call takes {min(over):.1f} to {max(over):.1f} ms more than its products" in said
    assert f"also where the products take {min(products):.1f} ms" in said
    for row in record["accuracy"]:
        assert [f"{row['level']:g}", f"{row['relative_error']:.1e}"] in shown
    assert page.count(f"{record['machine']}, torch {record['torch']}, {record['date']}") == 2  # and flow matching's


@pytest.mark.parametrize(
    "data", ["digits", "digits_long", "fashion_mnist", "fashion_mnist_wide", "fashion_mnist_long", "cifar10"]
)
def test_the_table_of_the_race_is_the_committed_measurement(site: Path, data: str) -> None:
    shown = cells((site / "race.html").read_text("utf-8"))
    record = json.loads((ROOT / f"benchmarks/results/race_{data}.json").read_text())
    last = max(row["seconds"] for row in record["rows"])
    ends: dict[tuple[int, str], list[float]] = {}
    for row in record["rows"]:
        if row["seconds"] == last:
            ends.setdefault((row["evaluations"], row["runner"]), []).append(row["distance"])
    assert len(ends) == 2 * len({row["runner"] for row in record["rows"]})
    for of in ends.values():
        value = f"{statistics.fmean(of):.3f} ({min(of):.3f} to {max(of):.3f})"
        assert any(line[-1] == value for line in shown), value


def test_the_page_of_the_race_says_of_cifar10_what_was_measured() -> None:
    rows = json.loads((ROOT / "benchmarks/results/race_cifar10.json").read_text())["rows"]
    said = " ".join((ROOT / "docs/race.md").read_text("utf-8").split())
    assert "4,096 references is better than every other in every seed" in said
    found = {(row["runner"], row["seed"], row["evaluations"]): row["distance"] for row in rows}
    others = {key for key in found if key[0] != "ours-wide-4096"}
    assert {name for name, *_ in others} == {"ours-wide", "ours", "edm", "torchcfm"}
    for name, seed, evaluations in others:
        assert found["ours-wide-4096", seed, evaluations] < found[name, seed, evaluations]
    steps = {(row["runner"], row["seed"]): row["steps"] for row in rows}
    assert "takes nearly a fifth fewer steps in the time" in said
    fewer = statistics.fmean(1 - steps["ours-wide", seed] / steps["ours-wide-4096", seed] for seed in (0, 1))
    assert 0.17 < fewer < 0.2
    assert 0.4 < 350 * 64 / 50_000 < 0.5
    assert all(280 < number < 400 for number in steps.values())
    more = json.loads((ROOT / "benchmarks/results/race_cifar10_more_seeds.json").read_text())["rows"]
    later = {(row["runner"], row["seed"], row["evaluations"]): row["distance"] for row in more}
    ours, theirs = ([later[name, seed, 35] for seed in (3, 4)] for name in ("ours-wide-4096", "torchcfm"))
    shown = [f"{one[0]:.3f} and {one[1]:.3f} for {name}" for one, name in ((ours, "it"), (theirs, "torchcfm"))]
    assert f"{', '.join(shown)}, at 35 evaluations" in said
    for seed, evaluations in itertools.product((3, 4), (35, 10)):  # "better in every seed"
        assert later["ours-wide-4096", seed, evaluations] < later["torchcfm", seed, evaluations]
    assert "some 280 steps in the time" in said
    assert 275 < statistics.fmean(row["steps"] for row in more) < 285


def test_the_page_of_the_race_says_of_fashion_mnist_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    race = importlib.import_module("race")
    rows = json.loads((ROOT / "benchmarks/results/race_fashion_mnist.json").read_text())["rows"]
    rows = sorted((row for row in rows if row["seconds"] == 110), key=lambda row: row["seed"])
    said = " ".join((ROOT / "docs/race.md").read_text("utf-8").split())
    for sentence in (
        "is better than torchcfm's velocity in every seed, and the best of all on average",
        "The stable target makes it better in every seed, and all levers more so",
        "on average it is then as good as flow matching, but not in every seed",
        "do not help",
    ):
        assert sentence in said
    for evaluations in race.EVALUATIONS:
        of = {name: race.curve(rows, name, evaluations)[110.0] for name in {row["runner"] for row in rows}}
        means = {name: statistics.fmean(values) for name, values in of.items()}
        assert {len(values) for values in of.values()} == {3}

        def always_better(name: str, other: str, of: dict[str, list[float]] = of) -> bool:
            return all(a < b for a, b in zip(of[name], of[other], strict=True))

        assert always_better("torchcfm-stf", "torchcfm")
        assert min(means, key=means.__getitem__) == "torchcfm-stf"
        assert always_better("stf", "edm")
        assert always_better("ours", "stf")
        assert means["ours"] < means["torchcfm"]
        assert not always_better("ours", "torchcfm")
        assert means["ours-steps"] > means["ours"]


def test_the_page_of_the_race_says_of_wide_levels_on_fashion_mnist_what_was_measured() -> None:
    rows = json.loads((ROOT / "benchmarks/results/race_fashion_mnist_wide.json").read_text())["rows"]
    said = " ".join((ROOT / "docs/race.md").read_text("utf-8").split())
    found = {(row["runner"], row["seed"], row["seconds"], row["evaluations"]): row["distance"] for row in rows}
    assert "better than torchcfm on average, and at 35 evaluations in four of the five seeds" in said
    for evaluations in (35, 10):
        ours, theirs = (
            [found[name, seed, 110.0, evaluations] for seed in range(5)] for name in ("ours-wide-4096", "torchcfm")
        )
        assert statistics.fmean(ours) < statistics.fmean(theirs)
        assert min(found["ours-wide-4096", seed, 55.0, evaluations] for seed in range(5)) > statistics.fmean(theirs)
        if evaluations == 35:
            assert sum(a < b for a, b in zip(ours, theirs, strict=True)) == 4
    steps = {
        seconds: statistics.fmean(row["steps"] for row in rows if row["seconds"] == seconds) for seconds in (110, 55)
    }
    assert "some 140 steps in the time" in said
    assert 130 < steps[110] < 150
    assert "half of the time is 60 steps" in said
    assert 57 < steps[55] < 63


def test_the_page_of_the_race_says_of_a_longer_race_on_fashion_mnist_what_was_measured() -> None:
    results = ROOT / "benchmarks/results"
    said = " ".join((ROOT / "docs/race.md").read_text("utf-8").split())
    rows = json.loads((results / "race_fashion_mnist_long.json").read_text())["rows"]
    found = {(row["runner"], row["seed"], row["seconds"], row["evaluations"]): row["distance"] for row in rows}
    ours, half, theirs, edm = (
        [[found[runner, seed, seconds, evaluations] for seed in range(seeds)] for evaluations in (35, 10)]
        for runner, seconds, seeds in (
            ("ours-wide-4096", 900, 5),
            ("ours-wide-4096", 450, 5),
            ("torchcfm", 900, 5),
            ("edm", 900, 2),
        )
    )
    assert "better than torchcfm after equal time in all five seeds, and EDM's loss is far behind both" in said
    assert all(a < b for a, b in zip(ours[0], theirs[0], strict=True))
    assert max(theirs[0][:2]) < 0.5 * min(edm[0])  # of the seeds that all have
    assert max(theirs[0]) < min(edm[0])
    assert "it comes within 4 % of torchcfm's last value on average, below it in two of the five seeds" in said
    assert 1 < statistics.fmean(half[0]) / statistics.fmean(theirs[0]) < 1.04
    assert [a < b for a, b in zip(half[0], theirs[0], strict=True)] == [True, False, False, True, False]
    assert "At 10 evaluations torchcfm ends 4 % better on average, in three of the five seeds." in said
    assert statistics.fmean(theirs[1]) / statistics.fmean(ours[1]) == pytest.approx(0.96, abs=0.005)
    assert [b < a for a, b in zip(ours[1], theirs[1], strict=True)] == [False, True, True, False, True]
    assert "2,800 to 3,600 steps" in said
    steps = [row["steps"] for row in rows if row["seconds"] == 900]
    assert 2800 < min(steps) < max(steps) < 3600
    unpaired = json.loads((results / "race_fashion_mnist_unpaired.json").read_text())["rows"]
    assert [f"{row['distance']:.3f}" for row in unpaired if row["evaluations"] == 35] == ["0.202", "0.228"]
    assert "0.202 and 0.228 at 35 evaluations" in said


def test_the_page_of_the_race_says_of_a_longer_race_on_the_digits_what_was_measured() -> None:
    rows = json.loads((ROOT / "benchmarks/results/race_digits_long.json").read_text())["rows"]
    said = " ".join((ROOT / "docs/race.md").read_text("utf-8").split())
    found = {(row["runner"], row["seed"], row["seconds"], row["evaluations"]): row["distance"] for row in rows}
    assert "after equal time, and still better with half of the time, in every seed." in said
    assert "At 10 evaluations half of the time is enough on average." in said
    half, equal, edm = (
        [[found[runner, seed, seconds, evaluations] for seed in range(5)] for evaluations in (35, 10)]
        for runner, seconds in (("ours", 135.0), ("ours", 270.0), ("edm", 270.0))
    )
    assert max(half[0]) < min(edm[0])
    claim = "On the digits, at the recipe's length and 35 evaluations, with all levers it passes EDM's single-sample loss in"
    assert f"{claim} less than half of the time." in " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert max(equal[0]) < min(edm[0])
    assert statistics.fmean(half[1]) < statistics.fmean(edm[1])
    assert all(edm[0][seed] < found["torchcfm", seed, 270.0, 35] for seed in (0, 1))  # the best peer
    assert "some 3,300 steps of the recipe's 4,000" in said
    assert sf.training.DIGITS.steps == 4000
    assert 3200 < statistics.fmean(row["steps"] for row in rows if row["seconds"] == 270) < 3450
    assert "These 45 s are a fifth of the steps of the recipe" in said
    short = json.loads((ROOT / "benchmarks/results/race_digits.json").read_text())["rows"]
    assert 0.19 < statistics.fmean(row["steps"] for row in short if row["seconds"] == 45) / 4000 < 0.23


def test_the_page_of_the_race_says_when_the_best_peer_is_reached(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    race, runners = importlib.import_module("race"), importlib.import_module("runners")
    text = " ".join(re.sub(r"<[^>]+>", "", (site / "race.html").read_text("utf-8")).split())
    rows = json.loads((ROOT / "benchmarks/results/race_digits.json").read_text())["rows"]
    ends = {
        name: [race.curve(rows, name, evaluations)[45.0] for evaluations in race.EVALUATIONS]
        for name in {row["runner"] for row in rows}
    }
    others = ends.keys() - {"ours", "stf"}
    assert len(others) == 4
    for name in ("ours", "stf"):  # "in every seed"
        assert all(max(of) < min(ends[peer][k]) for peer in others for k, of in enumerate(ends[name]))
    assert statistics.fmean(ends["stf"][1]) < statistics.fmean(ends["ours"][1])  # "at 10 evaluations they add nothing"
    assert all(statistics.fmean(a) > statistics.fmean(b) for a, b in zip(ends["immiscible"], ends["edm"], strict=True))
    for evaluations in race.EVALUATIONS:
        means = {
            name: {t: statistics.fmean(of) for t, of in race.curve(rows, name, evaluations).items()}
            for name in ("ours", *runners.PEERS)
        }
        goal = min(means[name][45.0] for name in runners.PEERS if means[name])
        reached = race.time_to(means["ours"], goal)
        if reached.startswith("<"):
            assert (
                f"ends at {goal:.3f} after 45 s. The stable target and all levers reach this value in less than" in text
            )
        else:
            share = f"after {float(reached):.0f} s, {float(reached) / 45:.0%} of the time.".replace("%", " %")
            assert f"ends at {goal:.3f} after 45 s. The stable target and all levers reach this value {share}" in text


@pytest.mark.parametrize("data", ["digits", "digits_long", "fashion_mnist", "fashion_mnist_long"])
def test_each_sentence_of_the_race_on_its_best_peer_is_that_of_the_rows(
    data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    race, runners, page = importlib.import_module("race"), importlib.import_module("runners"), hooks()
    rows = json.loads((ROOT / f"benchmarks/results/race_{data}.json").read_text())["rows"]
    said = [text for text in page.race(data).split("\n\n") if text.startswith("The best of the others")]
    named = {text: name for name, text in page.RUNNERS.items()}
    for text, evaluations in zip(said, race.EVALUATIONS, strict=True):
        found = re.fullmatch(
            r".* ends at [\d.]+ after (\d+) s\. The (.*?) (?:reach|reaches|do not reach) this value (.*)\.", text
        )
        assert found is not None, text
        means = {
            name: {t: statistics.fmean(of) for t, of in race.curve(rows, name, evaluations).items()}
            for name in (named[found[2]], *runners.PEERS)
        }
        last = float(found[1])
        reached = race.time_to(
            means[named[found[2]]], min(of[last] for name, of in means.items() if last in of and name in runners.PEERS)
        )
        if reached.startswith(">"):
            assert found[3] == "in that time"
        elif reached.startswith("<"):
            assert found[3] == f"in less than {reached[1:]} s"
        else:
            assert float(found[3].split()[1]) == pytest.approx(float(reached), rel=0.02)


def test_the_page_says_what_flow_matching_on_a_gpu_came_to(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = (site / "speed.html").read_text("utf-8")
    text = " ".join(re.sub(r"<[^>]+>", "", page).split())
    rows = json.loads((ROOT / "benchmarks/results/gpu_proof_flow.json").read_text())["proof"]
    names = {"dsm": "single sample", "stf": "stable"}
    for row in rows:
        line = [names[row["target"]], f"{row['seconds']:.0f} s", f"{row['steps']:,}", f"{row['images']:,}"]
        assert [*line, f"{row['heun']:.1f}"] in cells(page)
    quality = importlib.import_module("quality")
    layout = dataclasses.replace(quality.RECIPES["flow"][0].network, base_channels=64, blocks=2)
    network = layout.build((3, 32, 32), 0, 0, torch.Generator().manual_seed(0))
    assert (
        f"DDPM++ with {sum(p.numel() for p in network.parameters()) / 1e6:.1f} million parameters at batch 128" in text
    )
    shares = [row["gradient_variance"]["stf"] / row["gradient_variance"]["dsm"] for row in rows]
    assert f"factors from {min(shares):.2f} to {max(shares):.2f}" in text
    (_, single), (_, stable) = ([row for row in rows if row["target"] == name] for name in names)
    assert 0.70 < stable["steps"] / single["steps"] < 0.78  # "a quarter fewer"
    assert abs(stable["heun"] - single["heun"]) < 0.5  # "the same FIDs"
    step = {name: row["seconds"] / row["steps"] * 1e3 for name, row in (("dsm", single), ("stf", stable))}
    assert (
        f"takes {step['dsm']:.0f} ms here, and the call of the target adds {step['stf'] - step['dsm']:.0f} ms" in text
    )


def test_the_page_says_what_the_first_proof_on_a_gpu_came_to(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = (site / "speed.html").read_text("utf-8")
    record = json.loads((ROOT / "benchmarks/results/gpu_proof.json").read_text())
    text = " ".join(re.sub(r"<[^>]+>", "", page).split())
    (sanity,) = record["sanity"]
    assert f"{sanity['images'][0]:,} training images against its {sanity['images'][1]:,} test images have FID" in text
    assert f"have FID {sanity['distance']:.3f};" in text
    quality = importlib.import_module("quality")
    budget = quality.Budget()
    layout = dataclasses.replace(quality.RECIPES["ve"][0].network, base_channels=budget.width, blocks=budget.blocks)
    small = layout.build((3, 32, 32), 0, 0, torch.Generator().manual_seed(0))
    with torch.device("meta"):
        large = SongUNet.ddpmpp(32, 3, 128)
    for words, network in (("9.0 million", small), ("55.7 million", large)):
        assert words == f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} million"
        assert f"{words} parameters" in text
    assert f"at batch {budget.batch} with VE noise" in text
    names = {"dsm": "single sample", "stf": "stable"}
    assert len(record["proof"]) == 4
    for row in record["proof"]:
        line = [names[row["target"]], f"{row['seconds']:.0f} s", f"{row['steps']:,}", f"{row['images']:,}"]
        assert [*line, f"{row['heun']:.1f}"] in cells(page)
        assert f"Heun's method, {row['heun_nfe']:.0f} network evaluations each" in text
    single, stable = (next(r for r in reversed(record["proof"]) if r["target"] == name) for name in ("dsm", "stf"))
    assert stable["heun"] > single["heun"]
    assert "In this first run it gained nothing." in text
    assert f"the difference of {stable['heun'] - single['heun']:.1f} between the two FIDs" in text
    assert f"made {1 - stable['steps'] / single['steps']:.0%} fewer steps".replace("%", " %") in text


DROP_INS = sorted(path for path in (ROOT / "examples").glob("*.py") if "# +" in path.read_text("utf-8"))


@pytest.mark.parametrize("script", DROP_INS, ids=lambda path: path.stem)
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
