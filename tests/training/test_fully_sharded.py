"""Runs whose processes each hold a part of the weights have the losses and weights of one process, and the same files."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import stablefield as sf
from forks import Fork
from stablefield.cli.train import _summed
from stablefield.data._digits import open_digits
from stablefield.training._data_parallel import overlaps
from stablefield.training._fully_sharded import shards
from stablefield.training._loop import fit
from stablefield.training._recipe import Recipe, SiTConfig
from stablefield.training._recipes import DIGITS
from stablefield.training._run_config import RunConfig
from stablefield.training._run_folder import RunFolder

CPU = torch.device("cpu")
STEPS = 4
# 37 rows do not divide evenly; the gradients are above the norm to which they are clipped.
RECIPE = dataclasses.replace(
    DIGITS,
    references="all",
    noise_band=0.0,
    steps=STEPS,
    batch=37,
    gradient_accumulation_steps=2,
    conditional=True,
    importance_sampling=True,
    ramp_images=0,
    max_grad_norm=0.05,
    nan_to_num=True,
    ema_snapshot_every=STEPS,
    sample_every=0,
    checkpoint_every=2,
    keep_last=9,
    log_every=1,
    fsdp=True,
    network=SiTConfig(width=24, depth=2, heads=2, patch_size=4, checkpointing=True),
)
HALF = dataclasses.replace(RECIPE, precision="bf16", steps=2, ema_snapshot_every=0)
# Train each run of the list: stop a "stopped" one after 2 steps and go on, another time by DistributedDataParallel; on the
# way kill the second process.
TRAIN = """
import dataclasses, os, sys
from pathlib import Path
import torch
from stablefield._distributed import Ranks
from stablefield.data._digits import open_digits
from stablefield.diffusion._preconditioning import Denoiser
from stablefield.training._checkpoint import State, restore, save
from stablefield.training._fully_sharded import own_part, shard, write_parts
from stablefield.training._loop import TrainingError, _Loop, fit
from stablefield.training._model import untrained
from stablefield.training._recipe import MLPConfig, SongUNetConfig
from stablefield.training._run_folder import RunFolder

class Norm:
    every = 2

    def __call__(self, step, denoiser):
        return {"norm": sum(float(value.norm()) for value in denoiser.parameters())}

data, cpu, draw = open_digits(), torch.device("cpu"), _Loop._draw

def go(name, stop=lambda done: False, **change):
    run, calls = RunFolder(Path(name)), iter(range(1, 1000))
    config = run.config()
    config = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, **change))
    _Loop._draw = draw if name == "two" else lambda *_: None  # it takes longer than the steps
    observers = (Norm(),) if name == "two" and ranks.first else ()
    return fit(run, config, data, device=cpu, stop=lambda: stop(next(calls)), observers=observers)

def same(network, x, *labels):
    # The sum of the gradients over the processes is that of the whole batch.
    whole = network(x, *labels).square().sum()
    expected = dict(zip(dict(network.named_parameters()), torch.autograd.grad(whole, network.parameters())))
    shard(network, cpu)
    mine = slice(2 * ranks.rank, 2 * ranks.rank + 2)
    network(x[mine], *(label[mine] for label in labels)).square().sum().backward()
    for name, value in network.named_parameters():
        assert own_part(value.grad).shape == own_part(value.detach()).shape
        assert torch.allclose(value.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-4), name

with Ranks.launched() as ranks:
    go("two")
    go("stopped", lambda done: done == 2)
    go("stopped")
    go("changed", lambda done: done == 2)
    go("changed", fsdp=False)
    go("grown")
    go("half")
    go("half-ddp")
    # A U-Net for grey images has a weight of one number, of which the second process has none.
    unet = SongUNetConfig(base_channels=8, multipliers=(1,), blocks=1, dropout=0.0)
    config = RunFolder(Path("two")).config()
    config = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, network=unet))
    trained, again = (untrained(config, cpu, sharded=True) for _ in range(2))
    for value in trained.model.parameters():
        value.grad = torch.ones_like(value)
    trained.optimizer.step()
    save(Path("step-00000001"), State(1, 37), trained, ranks)
    ranks.barrier("to read it")
    restore(Path("step-00000001"), again)
    for one, other in zip(trained.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(own_part(one.detach()), own_part(other.detach()))
        states = trained.optimizer.state[one], again.optimizer.state[other]
        assert states[0].keys() == states[1].keys()
        for name, value in states[0].items():
            assert value.shape == states[1][name].shape
            assert torch.equal(own_part(value), own_part(states[1][name])), name
    for held in (
        list(trained.model.parameters()),
        list(trained.averages["power-0.1"].parameters()),
        [entry["exp_avg_sq"] for entry in trained.optimizer.state.values()],
    ):
        print(sum(own_part(value.detach()).numel() for value in held), sum(value.numel() for value in held))
    for network in (unet, MLPConfig(width=20, depth=1)):
        torch.manual_seed(0)
        network = Denoiser(network.build((1, 8, 8), 3, 0, torch.Generator().manual_seed(0)))
        for value in network.parameters():
            torch.nn.init.normal_(value, std=0.1)
        same(network, torch.randn(4, 1, 8, 8), 0.1 + torch.rand(4), torch.arange(4) % 3)
    apart = Path(f"apart{ranks.rank}")  # as on machines that share no folder
    if ranks.first:
        apart.mkdir()
    for place in (apart / "x", Path("two/config.json/x")):
        try:
            write_parts(place, trained.model.state_dict(), ranks)
        except OSError as error:
            assert "processes do not find it: all machines must share it" in str(error), error
        else:
            raise AssertionError
    try:
        go("killed", lambda done: ranks.rank == 1 and done == 3 and os._exit(9))
    except TrainingError as error:
        print(error, flush=True)
    os._exit(0)  # the group of a dead process cannot be taken down
"""


def created(path: Path, recipe: Recipe = RECIPE) -> Path:
    data = open_digits()
    config = RunConfig(
        data="digits", shape=data.shape, classes=10, manifest=data.manifest, recipe=recipe, version="test"
    )
    return RunFolder.create(path, config).path


def last(path: Path, step: int = STEPS) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {
        f"{file.stem}/{name}": value
        for file in (path / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def lines(path: Path, name: str = "loss") -> list[float]:
    entries = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [entry[name] for entry in entries if name in entry]


@pytest.mark.slow
def test_two_processes_that_hold_half_of_everything_train_as_one(
    tmp_path: Path, fork_ranks: Callable[..., list[Fork]]
) -> None:
    ddp = dataclasses.replace(HALF, fsdp=False)
    names = ("one", "two", "stopped", "changed", "grown", "killed")
    one, two, stopped, changed, grown, killed = (created(tmp_path / name) for name in names)
    half, half_ddp = created(tmp_path / "half", HALF), created(tmp_path / "half-ddp", ddp)
    calls = iter(range(1, 10))
    fit(RunFolder(grown), RunFolder(grown).config(), open_digits(), device=CPU, stop=lambda: next(calls) == 2)
    ranks = fork_ranks(2, TRAIN, cwd=tmp_path)
    fit(RunFolder(one), RunFolder(one).config(), open_digits(), device=CPU)
    assert [rank.wait() for rank in ranks] == [0, 9], ranks[0].stderr[-3000:]
    assert ranks[0].stderr == ""

    *numbers, message = ranks[0].stdout.splitlines()
    for line in numbers:
        own, every = map(int, line.split())
        assert own == pytest.approx(every / 2, rel=0.01)
    assert "has died or does not answer" in message
    assert "Earlier checkpoints are intact." in message
    assert not list(tmp_path.rglob("*.pkl")) + list(tmp_path.rglob(".metadata"))
    fit(RunFolder(killed), RunFolder(killed).config(), open_digits(), device=CPU)

    expected = last(one)
    for run in (two, changed, grown, killed):
        assert lines(run) == pytest.approx(lines(one), rel=1e-5), run.name
        found = last(run)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=1e-3, atol=1e-5), (run.name, name)
    bits = last(stopped)
    assert all(torch.equal(bits[name], value) for name, value in last(two).items())
    assert lines(stopped) == lines(two)
    averages = [load_file(two / f"checkpoints/step-{step:08d}/ema.safetensors") for step in (2, STEPS)]
    norms = [sum(float(v.norm()) for name, v in each.items() if "pos_embed" not in name) for each in averages]
    assert lines(two, "norm") == pytest.approx(norms, rel=1e-6)
    assert lines(half) == pytest.approx(lines(half_ddp), rel=1e-5)
    pictures = [np.asarray(Image.open(run / f"samples/step-{STEPS:08d}.png"), np.int16) for run in (one, two)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    snapshots = [load_file(run / f"ema/step-{STEPS:08d}.safetensors") for run in (one, two)]
    assert all(torch.allclose(snapshots[1][name], value, atol=1e-5) for name, value in snapshots[0].items())
    opened = sf.Run(two).sample(2, steps=2).images
    assert np.abs(opened.astype(np.int16) - sf.Run(one).sample(2, steps=2).images).max() <= 1


def test_one_process_shards_nothing_and_each_of_several_needs_rows() -> None:
    assert not shards(RECIPE, 1)
    assert shards(RECIPE, 2)
    assert not shards(dataclasses.replace(RECIPE, fsdp=False), 2)
    assert not overlaps(RECIPE, 2, CPU)
    with pytest.raises(ValueError, match="batch=37 is below the 38 parts"):
        shards(RECIPE, 19)


def test_the_command_says_who_holds_what() -> None:
    assert (
        _summed(RECIPE, 4, CPU)
        == "by FSDP2, and each process holds 1/4 of the weights, gradients, moments and averages"
    )
    assert _summed(dataclasses.replace(RECIPE, fsdp=False), 4, CPU) == "by DistributedDataParallel"
    assert _summed(dataclasses.replace(RECIPE, fsdp=False, exact=True), 4, CPU) == "in a fixed order"


@pytest.mark.parametrize("other", ["exact", "compile"])
def test_what_cannot_go_together_is_refused(other: str) -> None:
    with pytest.raises(ValueError, match=f"fsdp=True and {other}=True"):
        dataclasses.replace(RECIPE, **{other: True})
