"""Held-out samples are never trained on; the loss on them is that of a direct computation; the best checkpoint is kept."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stablefield as sf
import stablefield.training._loop
from stablefield._distributed import Ranks
from stablefield.cli.entry import main
from stablefield.data._digits import open_digits
from stablefield.training._checkpoint import State, Trained
from stablefield.training._feed import Feed
from stablefield.training._held_out import LEVELS, HeldOut
from stablefield.training._held_out_loss import HeldOutLoss
from stablefield.training._placement import Placement
from stablefield.training._plan import make_plan
from stablefield.training._recipe import MLPConfig, Recipe
from stablefield.training._seeding import Purpose, seed_for

CPU = torch.device("cpu")
TINY = Recipe(
    steps=40,
    batch=16,
    noise_band=0.5,
    network=MLPConfig(width=16, depth=1),
    sample_every=0,
    checkpoint_every=25,
    keep_last=1,
    log_every=10,
)


@pytest.fixture(autouse=True)
def few_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at few rows, which is quick."""
    if "cost" not in request.node.name:
        monkeypatch.setattr("stablefield.training._held_out.ROWS", 16)


def measured(run: sf.Run) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    clock = ("images_per_second", "target_share")
    return [{name: value for name, value in line.items() if name not in clock} for line in run.metrics()]


def looks(run: sf.Run) -> dict[int, float]:
    return {line["step"]: line["held_out_loss"] for line in run.metrics() if "held_out_loss" in line}


@pytest.mark.parametrize("conditional", [False, True])
def test_the_logged_losses_are_those_of_a_direct_computation_in_float64(tmp_path: Path, conditional: bool) -> None:
    recipe = dataclasses.replace(TINY, steps=5, conditional=conditional, label_dropout=0.0, seed=3)
    run = sf.train("digits", out=tmp_path / "run", recipe=recipe, held_out=0.1, device="cpu")
    (line,) = [line for line in run.metrics() if "held_out_loss" in line]
    network = run.model().denoiser.double()
    held_out = run.config.held_out
    assert held_out is not None
    digits = open_digits()
    assert digits.labels is not None
    x = torch.from_numpy(digits.images).double().flatten(1) / 127.5 - 1
    sets = [torch.from_numpy(rows) for rows in held_out.split(len(x), recipe.seed)]
    generator = torch.Generator().manual_seed(seed_for(recipe.seed, Purpose.HELD_OUT))
    found: dict[str, list[float]] = {"fixed_loss": [], "held_out_loss": [], "floor": []}
    for k in range(LEVELS):
        rows = held_out.rows
        u = (k + (torch.arange(rows) + torch.rand(rows, generator=generator, dtype=torch.float64)) / rows) / LEVELS
        s = torch.exp(-1.2 + 1.2 * torch.special.ndtri(u))
        noise = torch.randn(rows, 64, generator=generator).double()
        weight = (s**2 + 0.25) / (0.5 * s) ** 2 / 64
        for name, members in zip(("fixed_loss", "held_out_loss"), sets, strict=True):
            order = [torch.randperm(len(members), generator=generator) for _ in range(-(-rows // len(members)))]
            index = members[torch.cat(order)[:rows]]
            labels = torch.from_numpy(digits.labels)[index]
            noisy = x[index] + s[:, None] * noise
            with torch.no_grad():
                images = noisy.reshape(-1, 1, 8, 8)
                clean = (network(images, s, labels) if conditional else network(images, s)).flatten(1)
            found[name].append(float((weight * (clean - x[index]).square().sum(1)).mean()))
            if name == "held_out_loss":
                continue
            logits = -torch.cdist(noisy, x[members]).square() / (2 * s[:, None] ** 2)
            if conditional:
                logits[labels[:, None] != torch.from_numpy(digits.labels)[members]] = -torch.inf
            posterior = torch.softmax(logits, 1)
            variance = posterior @ x[members].square() - (posterior @ x[members]).square()
            found["floor"].append(float((weight * variance.sum(1)).mean()))
    for name, values in found.items():
        assert line[name] == pytest.approx(np.mean(values), rel=1e-5), name
    for name in ("fixed", "held_out"):
        assert line[f"{name}_loss_minus_floor"] == pytest.approx(line[f"{name}_loss"] - line["floor"], rel=1e-9)
    assert line["loss_minus_floor"] == pytest.approx(line["loss"] + line["variance_removed"] - line["floor"], rel=1e-9)


@pytest.mark.parametrize(("placement", "references"), [("resident", "all"), ("resident", 24), ("loaded", 24)])
def test_held_out_rows_are_in_no_batch_and_no_reference(placement: Placement, references: int | str) -> None:
    # The pixels of each image say which row it is.
    count = 120
    images = np.arange(count, dtype=np.uint8).repeat(4).reshape(count, 1, 2, 2)
    recipe = dataclasses.replace(TINY, references=references, mirror=True)
    plan = make_plan(sf.data.make_image_set(images, None, sf.data.Origin(name="x", source="x")), recipe, held_out=0.25)
    training = plan.config.training_rows(count)
    assert training is not None
    assert plan.config.held_out is not None
    held = set(range(count)) - set(training.tolist())
    assert len(held) == plan.config.held_out.count == 30
    drawn: set[int] = set()
    feed = Feed(plan.data, plan.config.recipe, CPU, labelled=False, placement=placement, rows=training)
    for step in range(6):
        rows = feed.rows(step, slice(0, 16))
        assert isinstance(rows.pool, sf.Pool)
        drawn |= set(rows.pixels[:, 0, 0, 0].tolist())
        of_step = set(torch.as_tensor(rows.pool.data)[:, 0, 0, 0].tolist())
        assert not of_step & held
        assert torch.equal(torch.as_tensor(rows.pool.data)[rows.index], rows.pixels)
    feed.close()
    assert not drawn & held
    assert len(drawn) >= 0.9 * len(training)
    look = HeldOutLoss(plan.config.held_out, plan.config.recipe, plan.data, None, labelled=False, device=CPU)
    for part in look._excess._bins:
        assert part.held_out is not None
        for rows, inside in ((part.rows, set(training.tolist())), (part.held_out, held)):
            assert set(((rows.x0[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()) <= inside
    assert look.population == len(training)


def test_a_floor_of_a_sample_says_of_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--steps", "4", "--batch", "8", "--network.width", "8", "--network.depth", "1", "--device", "cpu"]
    flags += ["--sample-every", "0", "--recipe", "digits", "--held-out", "0.1"]
    floors, told = list[float](), ["", ""]
    for k, population in enumerate((1617, 100)):
        monkeypatch.setattr("stablefield.training._held_out.POPULATION", population)
        with pytest.raises(SystemExit, match="0"):
            main(["train", "digits", *flags, "--out", str(tmp_path / str(k))])
        shown = " ".join(capsys.readouterr().out.split())
        assert ("; the floor is that of 100 of the 1,617 training samples, lower on average" in shown) == (k == 1)
        run = sf.Run(tmp_path / str(k))
        (line,) = [line for line in run.metrics() if "floor" in line]
        assert line.get("floor_samples") == (None, 100)[k]
        floors.append(line["floor"])
        told[k] = run.report().save(tmp_path / f"{k}.html").read_text("utf-8")
    assert floors[1] < floors[0]
    assert "what a perfect network would keep of the training loss." in told[0]
    assert (
        "would keep of the loss if 100 of the training samples, drawn at random, were all: lower on average" in told[1]
    )


def test_the_share_is_a_function_of_the_seed_and_of_nothing_else() -> None:
    digits = open_digits()
    kept = HeldOut.part(0.05, digits, TINY)
    training, held = kept.split(1797, 0)
    assert sorted([*training, *held]) == list(range(1797))
    assert len(held) == 90
    again = HeldOut.part(0.05, digits, dataclasses.replace(TINY, batch=64, target="dsm")).split(1797, 0)[1]
    np.testing.assert_array_equal(held, again)
    assert set(held) != set(kept.split(1797, 1)[1])


def test_a_run_that_was_stopped_has_the_looks_and_the_best_checkpoint_of_the_whole_run(tmp_path: Path) -> None:
    whole, cut = (
        sf.train("digits", out=tmp_path / name, recipe=TINY, held_out=0.05, device="cpu", every=1, stop=stop)
        for name, stop in (("whole", lambda: False), ("cut", iter([False] * 16 + [True]).__next__))
    )
    assert cut.step == 17
    cut.resume(device="cpu")
    assert [line["step"] for line in measured(cut)] == [10, 17, 20, 30, 40]
    assert looks(cut) == looks(whole)
    assert len(looks(whole)) == 4
    assert whole.best == cut.best == min(looks(whole), key=looks(whole).__getitem__)
    assert all(len(list(run.path.glob("checkpoints/*/ema.safetensors"))) <= 2 for run in (whole, cut))


def test_the_checkpoint_with_the_lowest_held_out_loss_is_kept_and_drawn_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {10: 3.0, 20: 1.0, 30: 2.0, 40: 1.5}
    monkeypatch.setattr(HeldOutLoss, "__call__", lambda _, step, __: {"held_out_loss": told[step]})
    run = sf.train("digits", out=tmp_path / "run", recipe=TINY, held_out=0.05, device="cpu")
    assert run.best == 20
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == ["step-00000020", "step-00000040"]
    best, newest = (run.model(checkpoint=which) for which in ("best", "newest"))
    assert (best.step, newest.step) == (20, 40)
    assert run.model(checkpoint="20").step == 20
    drawn = run.sample(2, steps=2, checkpoint="best", device="cpu")
    assert drawn.ema == "half-life, step 20"
    assert not np.array_equal(drawn.images, run.sample(2, steps=2, device="cpu").images)
    with pytest.raises(ValueError, match=r"^checkpoint=30: this run has no such checkpoint; .* 20, 40\.$"):
        run.model(checkpoint="30")
    with pytest.raises(ValueError, match=r"^checkpoint='latest': pass newest, best, or a step"):
        run.sample(2, checkpoint="latest")


def test_other_data_are_held_out_and_found_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = open_digits()
    for name, part in (("a", slice(0, 300)), ("b", slice(300, 400))):
        np.save(tmp_path / f"{name}.npy", digits.images[part])
    flags = ["--steps", "4", "--batch", "8", "--network.width", "8", "--network.depth", "1", "--device", "cpu"]
    flags += ["--sample-every", "0", "--recipe", "digits", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="0"):
        main(["train", str(tmp_path / "a.npy"), *flags, "--held-out", str(tmp_path / "b.npy")])
    shown = " ".join(capsys.readouterr().out.split())
    assert "b.npy, never trained on; a look every 50 steps costs" in shown
    assert "best: step 4, with a held-out loss of" in shown
    run = sf.Run(tmp_path / "run")
    assert run.config.held_out is not None
    assert (run.config.held_out.count, run.config.held_out.share) == (100, None)
    moved = (tmp_path / "b.npy").rename(tmp_path / "c.npy")
    with pytest.raises(ValueError, match=r"^held_out is missing: the run's own data, .*b\.npy, do not exist"):
        run.resume(steps=6, device="cpu")
    with pytest.raises(ValueError, match=r"^held_out=a is not what this run holds out"):
        run.resume(steps=6, held_out=tmp_path / "a.npy", device="cpu")
    run.resume(steps=6, held_out=moved, device="cpu")
    assert sorted(looks(run)) == [4, 6]


def test_what_cannot_be_held_out_is_refused(tmp_path: Path) -> None:
    digits = open_digits()
    coloured = np.zeros((5, 3, 8, 8), np.uint8)
    for wrong, words in (
        (1.5, r"^held_out=1\.5: pass a share between 0 and 1"),
        (0, r"^held_out=0: pass a share"),
        (0.9999, r"^held_out=0\.9999 of 1797 samples leaves 0 to train on"),
        (0.995, r"^batch=16 is above the 9 images"),
        ("digits", r"^held_out=digits is the training data itself"),
        (coloured, r"^held_out has samples of 3 x 8 x 8, the training data of 1 x 8 x 8"),
    ):
        with pytest.raises(ValueError, match=words):
            make_plan(digits, TINY, held_out=wrong, device="cpu")
    plan = make_plan(digits, TINY, held_out=0.1, device="cpu")
    with pytest.raises(ValueError, match=r"^images is a Plan"):
        sf.train(plan, held_out=0.1)
    run = sf.train(plan, out=tmp_path / "run", stop=lambda: True)
    path = run.path / "config.json"
    record = {name: value for name, value in json.loads(path.read_text()).items() if name != "checksum"}
    for change in ({"count": 1}, {"every": 0}, {"rows": 10**9}, {"share": 2.0}, {"more": 1}, {"count": "5"}):
        path.write_text(json.dumps(record | {"held_out": record["held_out"] | change}))
        with pytest.raises(ValueError, match="held_out"):
            _ = run.config


def test_held_out_samples_that_are_training_samples_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(data: np.ndarray, held_out: float | np.ndarray, recipe: Recipe = TINY) -> str:
        plain = sf.data.make_image_set(data, None, sf.data.Origin(name="x", source="x"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            plan = make_plan(plain, recipe, held_out=held_out, device="cpu")
        if recipe.mirror:
            data = np.concatenate([data, data[..., ::-1]])
        if isinstance(held_out, float):
            assert plan.config.held_out is not None
            training, outside = plan.config.held_out.split(len(data), TINY.seed)
            known = {data[row].tobytes() for row in training}
            expected, count = sum(data[row].tobytes() in known for row in outside), len(outside)
        else:
            expected, count = int((held_out[:, None] == data[None]).all((2, 3, 4)).any(1).sum()), len(held_out)
        assert bool(caught) == (expected >= 0.01 * count and expected > 0)
        for one in caught:
            assert one.category is UserWarning
            which = f"held_out={held_out}" if isinstance(held_out, float) else "held_out"
            assert str(one.message).startswith(
                f"{which}: {expected} of {count} held-out samples equal training samples"
            )
        return f"{expected} of {count}" if caught else ""

    images = open_digits().images
    assert told(images, 0.2) == ""
    assert told(np.repeat(images[:40], 4, axis=0), 0.2) == "32 of 32"
    assert told(np.concatenate([images[:100], images[:20]]), 0.2) not in ("", "24 of 24")
    assert told(images[:300], images[290:320]) == "10 of 30"
    assert told(images[:300], np.concatenate([images[299:400], images[299:300]])) == "2 of 102"
    assert told(images[:300], images[299:450]) == ""  # below one percent
    floats = images.astype(np.float64) / 16 - 1
    floats[0, 0, 0, 0] = 0.0
    others = floats[:3].copy()
    others[0, 0, 0, 0] = -0.0
    others[2, 0, 0, 0] += 1e-12
    assert told(floats, others) == "2 of 3"
    assert told(floats.astype(np.float32), floats.astype(np.float32).astype(np.float64)[:50] + np.eye(8) / 3) == ""
    assert told(images, images[3:43]) == "40 of 40"
    assert told(images[:300], images[290:320, ..., ::-1]) == ""
    assert told(images[:300], images[290:320, ..., ::-1], dataclasses.replace(TINY, mirror=True)) == "10 of 30"
    np.save(tmp_path / "a.npy", np.repeat(images[:40], 4, axis=0))
    flags = ["--steps", "4", "--device", "cpu", "--recipe", "digits", "--dry-run", "--held-out", "0.2"]
    with pytest.raises(SystemExit, match="0"):
        main(["train", str(tmp_path / "a.npy"), *flags])
    shown = " ".join(capsys.readouterr().out.split())
    assert "warning: --held-out 0.2: 32 of 32 held-out samples equal training samples" in shown


def test_looks_cost_two_percent_unless_that_would_be_too_few_or_too_many() -> None:
    digits = open_digits()
    for steps, batch, expected in ((400_000, 512, 40), (40_000, 16, 18), (4_000, 128, 14), (400, 128, 5)):
        recipe = dataclasses.replace(TINY, steps=steps, batch=batch, log_every=10)
        held_out = HeldOut.part(0.05, digits, recipe)
        assert held_out.every % 10 == 0
        assert steps // held_out.every == expected
        if steps > 400:
            assert held_out.cost(recipe) <= 0.02
            # By hand: rows of both sets at every look, against three evaluations of a batch in every step.
            assert held_out.cost(recipe) == pytest.approx(2 * 8 * 128 / (held_out.every * 3 * batch))
    # At multiples of log_every, at least five if there are as many.
    for steps, log_every, expected in ((600, 50, 100), (300, 50, 50), (60, 50, 50), (60, 20, 20), (24, 5, 5)):
        recipe = dataclasses.replace(TINY, steps=steps, batch=128, log_every=log_every)
        assert HeldOut.part(0.05, digits, recipe).every == expected


def test_a_run_that_dies_between_a_look_and_its_checkpoint_ends_as_the_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {10: 3.0, 20: 1.0, 30: 2.0, 40: 1.5}
    monkeypatch.setattr(HeldOutLoss, "__call__", lambda _, step, __: {"held_out_loss": told[step]})
    save = stablefield.training._loop.save

    def dies(folder: Path, state: State, trained: Trained, ranks: Ranks) -> None:
        if state.step == 20:
            raise OSError("the machine is gone")
        save(folder, state, trained, ranks)

    with monkeypatch.context() as patch:
        patch.setattr("stablefield.training._loop.save", dies)
        with pytest.raises(sf.training.TrainingError, match="the machine is gone"):
            sf.train("digits", out=tmp_path / "run", recipe=TINY, held_out=0.05, device="cpu")
    run = sf.Run(tmp_path / "run")
    assert looks(run) == {10: 3.0, 20: 1.0}
    assert run.best == run.step == 10
    run.resume(device="cpu")
    assert looks(run) == told
    assert run.best == 20
    assert run.model(checkpoint="best").step == 20


def test_a_refused_resume_leaves_the_configuration_as_it_was(tmp_path: Path) -> None:
    digits = open_digits()
    np.save(tmp_path / "a.npy", digits.images[:60])
    np.save(tmp_path / "b.npy", digits.images[60:80])
    others, share = (
        sf.train(tmp_path / "a.npy", out=tmp_path / name, recipe=TINY, steps=2, held_out=held_out, device="cpu")
        for name, held_out in (("others", tmp_path / "b.npy"), ("share", 0.1))
    )
    (tmp_path / "b.npy").rename(tmp_path / "c.npy")
    for run, given, words in (
        (others, {}, r"^held_out is missing: the run's own data, .*b\.npy, do not exist"),
        (others, {"held_out": tmp_path / "a.npy"}, r"^held_out=a is not what this run holds out"),
        (share, {"held_out": tmp_path / "c.npy"}, r"^held_out is given, but the run holds out no other data"),
        (share, {"vae": "somewhere"}, r"^vae=somewhere does nothing"),
    ):
        before = (run.path / "config.json").read_bytes()
        with pytest.raises(ValueError, match=words):
            run.resume(steps=4, device="cpu", **given)
        assert (run.path / "config.json").read_bytes() == before
        assert run.config.recipe.steps == 2
