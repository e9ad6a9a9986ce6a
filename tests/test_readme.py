"""The README's code runs as it stands, and with one reference its loss is bit for bit the one without stablefield."""

import dataclasses
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import stablefield
from stablefield.training._recipe import MLPConfig
from stablefield.training._recipes import DIGITS

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```diff\n(.*?)```", README.read_text(), flags=re.DOTALL)


def loss_of(block: str, sign: str, library: object) -> torch.Tensor:
    lines = [line[1:] for line in block.splitlines() if line[:1] in (sign, " ")]
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 1, 4, 4, generator=generator) * 2 - 1
    index = torch.randperm(40, generator=generator)[:16]
    names = {
        "sf": library,
        "torch": torch,
        "images": images,
        "batches": [(index, images[index])],
        "alphas_cumprod": torch.linspace(0.999, 0.01, 1000),
        "network": lambda x, t: x * 0.3,
    }
    torch.manual_seed(1)
    exec("\n".join(lines), names)
    loss = names["loss"]
    assert isinstance(loss, torch.Tensor)
    return loss


def test_readme_shows_three_loops() -> None:
    assert len(BLOCKS) == 3
    for block in BLOCKS:
        added = [line for line in block.splitlines() if line.startswith("+")]
        assert len(added) == 3


@pytest.mark.parametrize("block", BLOCKS)
def test_drop_in_runs_and_with_one_reference_changes_no_bit(block: str) -> None:
    single = SimpleNamespace(**{name: getattr(stablefield, name) for name in stablefield.__all__})
    single.StableTarget = lambda process, references: stablefield.DenoisingTarget(process)
    before = loss_of(block, "-", None)
    assert torch.equal(loss_of(block, "+", single), before)
    stable = loss_of(block, "+", stablefield)
    assert torch.isfinite(stable)
    assert not torch.equal(stable, before)


def test_table_of_the_readme_is_the_committed_measurement() -> None:
    import json

    record = json.loads((README.parent / "benchmarks/results/own_weight.json").read_text())
    for level in record["levels"]:
        cells = [f"{level[f'own_weight_{n}']:.4f}" for n in (1024, 4096, 50_000)]
        removed = f"{level['variance_removed_50000']:.3g}"
        assert f"| {level['noise_level']:g} | {' | '.join(cells)} | {removed} |" in README.read_text()


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (block,) = re.findall(r"```python\n(import stablefield as sf.*?)```", README.read_text(), flags=re.DOTALL)
    # The same calls on less: a smaller network, fewer images, steps and seeds.
    recipe = dataclasses.replace(DIGITS, network=MLPConfig(width=32, depth=1))
    small = SimpleNamespace(**{name: getattr(stablefield, name) for name in stablefield.__all__})
    small.probe = partial(stablefield.probe, max_images=200, sources=32, noise_levels=[1.0, 5.0])
    small.train = partial(stablefield.train, recipe=recipe, steps=8, device="cpu")
    small.compare = partial(stablefield.compare, recipe=recipe, seeds=1, evaluations=1, samples=60)
    code = block.replace("import stablefield as sf\n", "").replace("steps=500", "steps=4")
    names = {"sf": small}
    exec(code, names)
    assert (tmp_path / "grid.png").is_file()
    assert "Frechet" in (tmp_path / "report.html").read_text()
    assert isinstance(names["run"], stablefield.Run)
    assert (tmp_path / "runs" / "digits" / "config.json").is_file()
