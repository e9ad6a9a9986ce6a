"""The ranking of checkpoints measures what it says, and the page states what it came to."""

import argparse
import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Generator, nn

import stablefield as sf

pytest.importorskip("scipy")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
ranking, race = (importlib.import_module(name) for name in ("ranking", "race"))
sys.path.remove(str(ROOT / "benchmarks"))

RESULTS = sorted((ROOT / "benchmarks/results").glob("ranking_*.json"))
DATA = {"digits": "digits", "fashion_mnist": "Fashion-MNIST"}
GROUPS = {
    "edm": "single sample",
    "edm, second half": "single sample, second half",
    "stf": "stable target",
    "stf, second half": "stable target, second half",
    "all": "both trainings",
}


def small(shape: tuple[int, ...], generator: Generator) -> nn.Module:
    return sf.networks.MLP(shape, width=32, depth=1, generator=generator)


@pytest.mark.parametrize("runner", ["edm", "stf"])
def test_a_training_has_a_row_at_each_checkpoint(runner: str) -> None:
    data, setting = race.open_data("digits", 200)
    setting = dataclasses.replace(setting, network=small, batch=32)
    args = argparse.Namespace(seed=0, steps=60, checkpoints=3, window=10, evaluations=5)
    rows = ranking.train(runner, data, setting, sf.ExcessLoss(data, rows=32, levels=4), args)
    assert [row["step"] for row in rows] == [20, 40, 60]
    for key in ("logged_loss", "excess", "frechet"):
        assert rows[0][key] > rows[-1][key]
    for row in rows:
        assert abs(row["loss_minus_floor"] - row["excess"]) < 5 * row["loss_minus_floor_se"]
    assert torch.isfinite(torch.tensor(rows[-1]["excess_se"]))


def test_the_correlations_are_those_of_ranks() -> None:
    shared = {"loss_at_fixed_noise": 0.0, "loss_minus_floor": 0.0}
    rows = [
        {"runner": runner, "frechet": k, "excess": k**3, "logged_loss": shift - k * sign, **shared}
        for runner, shift, sign in (("edm", 0.0, -1), ("stf", -1000.0, 1))
        for k in range(20)
    ]
    for row in rows:
        row |= {"loss_at_fixed_noise": row["logged_loss"], "loss_minus_floor": row["excess"]}
    found = ranking.correlations(rows)
    assert found["edm"] == {"logged_loss": 1, "loss_at_fixed_noise": 1, "loss_minus_floor": 1, "excess": 1}
    assert found["stf"]["logged_loss"] == -1
    assert found["stf, second half"]["excess"] == 1
    assert found["all"]["excess"] == 1
    assert abs(found["all"]["logged_loss"]) < 0.5


def test_the_page_says_what_the_committed_rankings_came_to() -> None:
    page = (ROOT / "docs/monitoring.md").read_text("utf-8")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:2] == "| "]
    assert RESULTS
    for path in RESULTS:
        record = json.loads(path.read_text("utf-8"))
        assert record["spearman"] == ranking.correlations(record["rows"])
        for group, found in record["spearman"].items():
            figures = [f"{found[key]:.2f}" for key in ("logged_loss", "loss_at_fixed_noise", "excess")]
            assert [f"{DATA[record['data']]}: {GROUPS[group]}", *figures] in cells, (path.name, group)
    record = json.loads((ROOT / "benchmarks/results/ranking_digits.json").read_text("utf-8"))
    last = [row for row in record["rows"] if row["runner"] == "edm"][-1]
    text = " ".join(page.split())
    stated = f"a loss of {last['loss_at_fixed_noise']:.2f} at fixed noise, of which {last['excess']:.2f} can still go"
    assert f"The single-sample training on the digits ends at {stated}" in text
