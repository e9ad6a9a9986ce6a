"""What each verb of the command does, a notebook does in one call."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stablefield as sf
from stablefield.cli.verbs import VERBS
from stablefield.training import MLPConfig, Recipe

TINY = Recipe(
    steps=4, batch=8, sample_every=0, ema_snapshot_every=2, network=MLPConfig(width=8, depth=1), noise_band=1.0
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verbs")


@pytest.fixture(scope="module")
def run(place: Path) -> sf.Run:
    return sf.train("digits", out=place / "run", recipe=TINY, device="cpu")


def weights(path: Path) -> Path:
    """A network's weights, as they are published."""
    network = sf.networks.SongUNet.ddpmpp(16, 1, 8, (1, 2), 1, generator=torch.Generator().manual_seed(0))
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)
    return path


PIXELS = sf.evaluation.RawPixels((1, 8, 8))
SMALL: dict[str, Any] = {"metrics": ["kernel"], "extractor": PIXELS, "cache": False}

CALLS: dict[str, Callable[[sf.Run, Path], object]] = {
    "train": lambda run, at: sf.train("digits", out=at / "again", recipe=TINY, device="cpu"),
    "compare": lambda run, at: sf.compare(
        "digits", seeds=[0], out=at / "both", recipe=TINY, evaluations=1, samples=40, device="cpu"
    ),
    "sample": lambda run, at: run.sample(4, steps=2).save(at / "grid.png"),
    "report": lambda run, at: run.report().save(at / "run.html"),
    "ema": lambda run, at: run.average(0.1)[0],
    "evaluate": lambda run, at: run.evaluate(samples=16, sampler="euler", **SMALL).save(at / "evaluation.json"),
    "evaluate IMAGES": lambda run, at: sf.evaluate("digits", data="digits", **SMALL).save(at / "images.html"),
    "probe": lambda run, at: sf.probe("digits", references=[16], sources=16, max_images=64, noise_levels=[1.0, 4.0]),
    "probe RUN": lambda run, at: sf.probe(run.path, sources=16, max_images=64, noise_levels=[1.0, 4.0]),
    "bench": lambda run, at: sf.benchmark(
        batch=[2], references=[8], pairs=1, step=False, growth=False, device="cpu"
    ).save(at / "bench.json"),
    "data pack": lambda run, at: sf.data.pack(sf.data.open_images("digits"), at / "digits.safetensors"),
    "data inspect": lambda run, at: sf.data.summary(sf.data.open_images("digits")),
    "data inspect --out": lambda run, at: sf.data.write_png(
        at / "digits.png", sf.data.sample_grid(sf.data.open_images("digits"))
    ),
    "export": lambda run, at: run.export(at / "plain", format="plain", samples=0),
    "import": lambda run, at: sf.interop.import_run(
        weights(at / "net.safetensors"), at / "imported", preconditioning="edm"
    ),
    "doctor": lambda run, at: sf.check_machine(),
}


def test_every_verb_has_its_call() -> None:
    assert {name.partition(" ")[0] for name in CALLS} == {name.partition(" ")[0] for name in VERBS}


@pytest.mark.usefixtures("without_charts")
@pytest.mark.parametrize("verb", CALLS)
def test_a_notebook_does_what_a_verb_does_in_one_call(verb: str, run: sf.Run, place: Path) -> None:
    found = CALLS[verb](run, place)
    assert found is not None
    # What was written is named; what was found says itself at a prompt.
    assert found.exists() if isinstance(found, Path) else 0 < len(repr(found)) < 20_000


def test_a_check_up_says_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    found = sf.check_machine()
    assert found.healthy
    assert np.isfinite([check.error for check in found.devices]).all()
    assert f"stablefield       {sf.__version__}" in str(found)
    assert VERBS["doctor"]().run() == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [line.strip() for line in str(found).splitlines()]


def test_a_benchmark_prints_saves_and_draws_what_it_measured(tmp_path: Path) -> None:
    images = sf.data.open_images("digits")
    found = sf.benchmark(images, batch=[2, 4], references=[8], pairs=1, step=False, growth=False, device="cpu")
    assert [(cost.batch, cost.references, cost.dim) for cost in found.costs] == [(2, 8, 64), (4, 8, 64)]
    assert len(str(found).splitlines()) == 4
    assert max(map(len, str(found).splitlines())) <= 80
    assert found.to_dict()["data"] == "digits"
    for name in ("bench.json", "bench.png", "bench.html"):
        assert found.save(tmp_path / name).stat().st_size > 100
    with pytest.raises(ValueError, match=r"^batch\[0\]"):
        sf.benchmark(images, batch=[0])
    # Numbers that are scaled already, such as latents.
    latents = np.random.default_rng(0).standard_normal((16, 4, 4, 4), dtype=np.float32)
    floats = sf.benchmark(latents, batch=[2], references=[8], pairs=1, growth=False, device="cpu")
    assert [cost.pool for cost in floats.costs] == ["float32"]
    assert floats.step is not None
    assert floats.step.references == 16
    # The only reference has all the weight at every level.
    lonely = sf.benchmark(images.images[:1], batch=[2], references=[8], pairs=1, growth=False, device="cpu")
    record = json.loads(lonely.save(tmp_path / "lonely.json").read_text())
    assert record["noise_band"]["level"] is record["noise_band"]["nearest"] is record["step"]["noise_band"] is None
