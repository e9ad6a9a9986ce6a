"""The example scripts: each runs with the library it is about, and its marked lines are the whole change.

A script is turned back into what it was: its lines that end in `# +` are dropped, those that begin with `# -` come
back. With one reference the script's losses must be those, to the last bit.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import stablefield as sf
from stablefield.data import open_images

FOLDER = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if "# +" in path.read_text("utf-8"))
STEPS = 8
# Where the script before takes means itself: how to make it draw the same rows, but regress on the single sample.
SINGLE = {"stablevm_bank.py": {"capacity": 10_000, "mean_from": 1.0}}


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
    plain = load(before(source), script)(steps=STEPS, **SINGLE.get(script, {}))
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


def test_the_example_autoencoder_opens_with_diffusers_alone_and_scales_its_latents_to_unit_variance(
    tmp_path: Path,
) -> None:
    kl = pytest.importorskip("diffusers").AutoencoderKL
    images = open_images("digits")
    main: Callable[..., list[float]] = load((FOLDER / "autoencoder.py").read_text("utf-8"), "autoencoder.py")
    losses = main(images, tmp_path / "vae", steps=20, batch=32, widths=(8, 16))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    vae = kl.from_pretrained(tmp_path / "vae", use_safetensors=True)
    x = torch.from_numpy(images.images[:500].copy()).float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(x).latent_dist.sample() * vae.config.scaling_factor
    assert latents.shape == (500, 4, 4, 4)
    assert latents.std().item() == pytest.approx(1, abs=0.1)


def test_a_bank_of_all_latents_gives_the_losses_of_the_pool() -> None:
    source = (FOLDER / "stablevm_bank.py").read_text("utf-8")
    main = load(before(source), "before")
    pool = load(source, "after")(steps=STEPS)
    assert main(steps=STEPS, capacity=10_000) == pytest.approx(pool, rel=1e-5)
    assert main(steps=STEPS) != pytest.approx(pool, rel=1e-3)


def test_the_targets_of_the_sit_loop_are_means_over_what_the_network_cannot_tell_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    call = sf.StableTarget.__call__

    def recorded(target: sf.StableTarget, x0: Tensor, x_t: Tensor, t: Tensor, **given: Tensor) -> sf.Target:
        found = call(target, x0, x_t, t, **given)
        pool = target.references
        assert isinstance(pool, sf.Pool)
        assert isinstance(pool.labels, Tensor)
        assert isinstance(pool.data, Tensor)
        assert isinstance(pool.flipped, Tensor)
        for row in range(0, len(x0), 9):
            stored = torch.stack([pool.data, pool.flipped]).double()
            stored[int(given["flip"][row]), given["index"][row]] = x0[row].double()
            label = given["labels"][row]
            if label >= 0:
                stored = stored[:, pool.labels == label]
            # SiT's path: x_t = (1 - t) noise + t data, with its time.
            time = 1 - t[row].double()
            gap = (x_t[row].double() - time * stored).flatten(2).square().sum(2)
            weight = torch.softmax(-gap.flatten() / (2 * (1 - time) ** 2), dim=0)
            mean = torch.tensordot(weight, stored.flatten(0, 1), dims=1)
            velocity = (mean - x_t[row]) / (1 - time)
            called.append((found.velocity[row], -velocity, label, found.source_weight[row]))
        return found

    monkeypatch.setattr(sf.StableTarget, "__call__", recorded)
    load((FOLDER / "sit_loop.py").read_text("utf-8"), "after")(steps=2)
    found, expected, labels, weights = (torch.stack(column) for column in zip(*called, strict=True))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert bool((labels == -1).any())
    assert bool((labels >= 0).any())
    assert float(weights.min()) < 0.5


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
        "sit_loop.py",
        "stablevm_bank.py",
        "torchcfm_loop.py",
    ]
