"""The example scripts: each runs with the library it is about, and its marked lines are the whole change.

A script is turned back into what it was: its lines that end in `# +` are dropped, those that begin with `# -` come
back. With one reference the script's losses must be those, to the last bit.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import stablefield as sf

FOLDER = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py"))
STEPS = 8


def before(source: str) -> str:
    """The script as it was without stable targets."""
    lines = [line for line in source.splitlines() if not line.endswith("# +")]
    return "\n".join(re.sub(r"^(\s*)# - ", r"\1", line) for line in lines) + "\n"


def load(source: str, name: str) -> Callable[..., list[float]]:
    space: dict = {"__name__": "example"}
    exec(compile(source, name, "exec"), space)
    return space["main"]


@pytest.fixture(params=SCRIPTS)
def script(request: pytest.FixtureRequest) -> str:
    library = request.param.split("_")[0]
    if library in ("torchcfm", "lightning", "diffusers", "accelerate"):
        pytest.importorskip(library)
    return request.param


@pytest.fixture(autouse=True)
def one_thread():
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(found)


# Lightning warns of missing workers, and calls what torch is about to drop.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_with_one_reference_the_losses_are_those_of_the_script_before_to_the_last_bit(
    script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (FOLDER / script).read_text("utf-8")
    plain = load(before(source), script)(steps=STEPS)
    stable = load(source, script)(steps=STEPS)
    monkeypatch.setattr(sf, "StableTarget", lambda process, **_: sf.DenoisingTarget(process))
    source_only = load(source, script)(steps=STEPS)
    assert len(plain) == STEPS
    assert source_only == plain
    assert stable != plain
    assert all(0 < loss < 1e4 for loss in stable)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_diffusers_loop_is_the_same_to_the_last_bit_for_its_other_prediction_types(
    prediction_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    source = (FOLDER / "diffusers_unconditional.py").read_text("utf-8")
    plain = load(before(source), "before")(steps=4, prediction_type=prediction_type, draw=0)
    monkeypatch.setattr(sf, "StableTarget", lambda process, **_: sf.DenoisingTarget(process))
    assert load(source, "after")(steps=4, prediction_type=prediction_type, draw=0) == plain


def test_what_was_before_knows_nothing_of_stable_targets(script: str) -> None:
    source = (FOLDER / script).read_text("utf-8")
    plain = before(source.split('"""', 2)[2])  # without the docstring
    assert not re.search(r"\bsf\.|import stablefield as", plain)
    added = [line for line in source.splitlines() if line.endswith("# +")]
    assert 3 <= len(added) <= 10


def test_every_drop_in_has_its_script() -> None:
    assert SCRIPTS == [
        "accelerate_loop.py",
        "diffusers_unconditional.py",
        "k_diffusion_denoiser.py",
        "latent_class_conditional.py",
        "lightning_module.py",
        "torchcfm_loop.py",
    ]
