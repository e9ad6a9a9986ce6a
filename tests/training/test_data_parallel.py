"""Gradients that DistributedDataParallel sums are those of one process, and resumed runs repeat their bits."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import stablefield as sf
from forks import Fork
from stablefield.data._digits import open_digits
from stablefield.training._config import decode, encode
from stablefield.training._data_parallel import overlaps
from stablefield.training._loop import _Loop, fit
from stablefield.training._recipe import MLPConfig, Recipe, SongUNetConfig
from stablefield.training._recipes import DIGITS
from stablefield.training._run_config import RunConfig
from stablefield.training._run_folder import RunFolder

CPU = torch.device("cpu")
STEPS, STOP = 5, 2
# Its gradients fill more than one bucket of DistributedDataParallel; 37 rows do not divide evenly.
RECIPE = dataclasses.replace(
    DIGITS,
    references="all",
    noise_band=0.0,
    steps=STEPS,
    batch=37,
    gradient_accumulation_steps=2,
    conditional=True,
    ramp_images=0,
    sample_every=0,
    log_every=1,
    network=MLPConfig(width=384, depth=1),
)
# Train each run of the list. One whose name begins with "stopped" stops on the way and goes on; one with "halved" stops.
TRAIN = f"""
import sys
from pathlib import Path
import torch
from stablefield._distributed import Ranks
from stablefield.data._digits import open_digits
from stablefield.training._loop import _Loop, fit
from stablefield.training._run_folder import RunFolder

_Loop._picture = lambda *_: None  # it would take longer than the steps
data = open_digits()
def go(path, stop):
    calls = iter(range(1, 1000))
    run = RunFolder(path)
    fit(run, run.config(), data, device=torch.device("cpu"), stop=lambda: next(calls) == stop)

with Ranks.launched():
    for path in map(Path, sys.argv[1:]):
        for stop in {{"stopped": ({STOP}, 0), "halved": ({STOP},)}}.get(path.name.split("-")[0], (0,)):
            go(path, stop)
"""
# "seldom" uses its second layer in one part of one process alone.
# "sometimes" leaves it out in its last part, and one process leaves "left" before its last part.
SUM = """
import gc, os, weakref
import torch
from torch import nn
from stablefield._distributed import RankError, Ranks
from stablefield.training._data_parallel import DataParallel

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        used = self.training and name != "seldom"
        return self.first(x).sum() + (self.second(x).sum() if used else 0)

there = lambda: None
with Ranks.launched() as ranks:
    for name in ("seldom", "sometimes", "left"):
        network = parallel = parameter = None
        gc.collect()
        assert there() is None
        torch.manual_seed(0)
        network, x = Network(), torch.full((2, 3), 1.0 + ranks.rank)
        there = weakref.ref(network)
        parallel = DataParallel(network, lambda network: network(x), ranks)
        assert network.seen == 0 and all(p.grad is None for p in network.parameters())
        network(x).backward()
        parallel.backward(parallel.network(x))
        assert network.first.weight.grad.tolist() == [[12.0] * 3] * 3  # twice two rows of 1 and of 2
        assert (network.second.weight.grad is None) == (name == "seldom")
        assert network.seen == 2
        for parameter in network.parameters():
            parameter.grad = None
        if name == "seldom":
            network.second(x).sum().backward() if ranks.first else None
            parallel.backward(parallel.network(x))
            assert network.second.weight.grad.tolist() == [[2.0] * 3]
            continue
        network(x).backward()
        network.train(name != "sometimes")
        if name == "left" and ranks.rank == 1:
            os._exit(0)
        try:
            parallel.backward(parallel.network(x))
        except (ValueError, RankError) as error:
            print(error, flush=True)  # `os._exit` drops what is buffered
        ranks.first and name == "left" and os._exit(0)
"""


def created(path: Path, recipe: Recipe = RECIPE) -> Path:
    data = open_digits()
    config = RunConfig(
        data="digits", shape=data.shape, classes=10, manifest=data.manifest, recipe=recipe, version="test"
    )
    return RunFolder.create(path, config).path


def last(path: Path) -> dict[str, Tensor]:
    """All tensors of the last checkpoint."""
    folder = path / "checkpoints" / f"step-{STEPS:08d}"
    return {
        f"{name}/{key}": value
        for name in ("model", "ema", "optimizer")
        for key, value in load_file(folder / f"{name}.safetensors").items()
    }


def losses(path: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def same(first: Path, second: Path) -> bool:
    one, two = last(first), last(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Loop, "_picture", lambda *_: None)


@pytest.mark.slow
def test_two_processes_have_the_weights_of_one_in_the_order_of_torch_and_in_a_fixed_one(
    tmp_path: Path, fork_ranks: Callable[..., list[Fork]]
) -> None:
    one, two, stopped, halved = (created(tmp_path / name) for name in ("one", "two", "stopped-two", "halved"))
    exact = created(tmp_path / "exact", dataclasses.replace(RECIPE, exact=True))
    ranks = fork_ranks(2, TRAIN, two, stopped, exact, halved)
    fit(RunFolder(one), RunFolder(one).config(), open_digits(), device=CPU)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr[-3000:]
    assert ranks[0].stderr == ""
    fit(RunFolder(halved), RunFolder(halved).config(), open_digits(), device=CPU)
    expected = last(one)
    for run in (two, exact, halved):
        assert losses(run) == pytest.approx(losses(one), rel=1e-5)
        found = last(run)
        assert found.keys() == expected.keys()
        assert not any("module." in name for name in found)
        for name, value in expected.items():
            if not name.startswith("optimizer"):
                assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-5), (run.name, name)
    assert same(two, stopped)
    assert losses(stopped) == losses(two)


@pytest.mark.slow
def test_a_run_resumed_on_as_many_processes_has_the_bits_of_one_never_stopped(
    tmp_path: Path, fork_ranks: Callable[..., list[Fork]]
) -> None:
    # Of three processes: from there on, the layout of the buckets decides the order of a sum, and its rounding.
    unet = SongUNetConfig(base_channels=8, multipliers=(1, 2), blocks=1, dropout=0.1)
    recipes = {
        "torch": RECIPE,
        "exact": dataclasses.replace(RECIPE, exact=True),
        "unet": dataclasses.replace(RECIPE, network=unet, augmentation=0.3, importance_sampling=True),
    }
    runs = {name: (tmp_path / name, tmp_path / f"stopped-{name}") for name in recipes}
    ranks = fork_ranks(3, TRAIN, *(created(path, recipes[name]) for name, pair in runs.items() for path in pair))
    assert [rank.wait() for rank in ranks] == [0, 0, 0], ranks[0].stderr[-3000:]
    for quiet, stopped in runs.values():
        assert same(quiet, stopped), quiet.name
        assert losses(stopped) == losses(quiet)
    assert not same(runs["torch"][0], runs["exact"][0])  # or the order would not matter


@pytest.mark.slow
def test_weights_without_gradients_and_processes_that_leave(fork_ranks: Callable[..., list[Fork]]) -> None:
    ranks = fork_ranks(2, SUM)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr[-3000:]
    changed, left = ranks[0].stdout.splitlines()
    assert "uses the same weights in every pass, and this one left out some that" in changed
    assert left.startswith("rank 0 of 2 waited for the others to sum their gradients, and one has died")


def test_a_run_from_before_the_choice_keeps_the_fixed_order() -> None:
    record = encode(sf.training.DIGITS)
    assert record.pop("exact") is False
    assert decode(record).exact


@pytest.mark.parametrize(
    ("change", "processes", "device", "expected"),
    [
        ({}, 2, "cpu", True),
        ({}, 2, "cuda", True),
        ({}, 1, "cpu", False),
        ({"exact": True}, 2, "cpu", False),
        ({"compile": True}, 2, "cpu", True),
        ({"compile": True}, 2, "cuda", False),  # the backward pass is replayed as a graph
        ({"batch": 2}, 3, "cpu", False),  # a process without rows
    ],
)
def test_who_sums_during_the_backward_pass(
    change: dict[str, object], processes: int, device: str, expected: bool
) -> None:
    assert overlaps(dataclasses.replace(RECIPE, **change), processes, torch.device(device)) is expected
