"""Claims on runs within a time: what is chosen fits it, on a clock that only the work moves on, and on the real one."""

import dataclasses
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import stablefield as sf
from pictures import whole_pictures
from stablefield.cli.entry import main
from stablefield.data._digits import open_digits
from stablefield.data._source import as_image_set
from stablefield.evaluation._extractor import RawPixels
from stablefield.report._cells import duration
from stablefield.training._estimate import estimate_run
from stablefield.training._held_out import HeldOut
from stablefield.training._pace import Costs, Pace
from stablefield.training._plan import make_plan
from stablefield.training._recipe import MLPConfig, Recipe, SongUNetConfig
from stablefield.training._recipes import DIGITS, recipe_for
from stablefield.training._self_check import FrechetObserver, SelfCheck
from stablefield.training._time_budget import narrowed, seconds_of, within

TINY = Recipe(batch=32, references=32, noise_band=0.0, network=MLPConfig(width=16, depth=1))
FLAGS = ("--network.width", "16", "--network.depth", "1", "--batch", "32", "--references", "32", "--device", "cpu")


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


class Machine:
    """A machine whose clock moves on with the rows that the network sees: in training three times as far as in sampling."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type[torch.nn.Module] = sf.networks.MLP) -> None:
        self.now, self.row = 0.0, 4e-3
        self.slower_after, self.slower = math.inf, 1.0
        forward = kind.forward
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

        def charged(network: torch.nn.Module, x: torch.Tensor, *given: object, **more: object) -> torch.Tensor:
            factor = self.slower if self.now > self.slower_after else 1.0
            self.now += factor * self.row * len(x) * (3 if torch.is_grad_enabled() else 1)
            return forward(network, x, *given, **more)

        monkeypatch.setattr(kind, "forward", charged)


@pytest.mark.parametrize("given", [60, "60", "60s", "1m", "1 min", "1.0m"])
def test_times_are_seconds_or_have_a_unit(given: str | float) -> None:
    assert seconds_of(given) == 60
    assert seconds_of("1.5h") == 5400


@pytest.mark.parametrize("given", ["", "m", "10 minutes or so", "-5s", 0, -1.0, math.nan, math.inf, "10x", True, "0s"])
def test_what_is_no_time_is_refused(given: object) -> None:
    with pytest.raises((ValueError, TypeError), match=r"^time"):
        seconds_of(given)


def test_the_chosen_steps_fit_the_time_for_any_costs() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        setup, step, picture, checkpoint, seconds = (
            float(10 ** torch.empty(()).uniform_(low, high, generator=generator))
            for low, high in ((-2, 1), (-3, 0.5), (-2, 1.5), (-3, 1), (2, 5))
        )
        costs = Costs(setup=setup, step=step, picture=picture, checkpoint=checkpoint)
        found = within(TINY, seconds, costs)
        # By hand: every step, the pictures and checkpoints where they are due, and those after the last step.
        looks = (found.steps - 1) // found.sample_every if found.sample_every else 0
        early = len([step for step in found.early_grids if step < found.steps])
        saves = (found.steps - 1) // found.checkpoint_every
        used = setup + found.steps * step + (looks + early + 1) * picture + (saves + 1) * checkpoint
        assert used <= seconds
        assert used >= 0.9 * seconds - (5 - early) * picture - checkpoint - step
        images = found.steps * found.batch
        assert found.ramp_images <= 0.05 * images
        assert found.ema_half_life <= 0.05 * images
    kept = within(TINY, 1e6, Costs(setup=0, step=1e-3, picture=1, checkpoint=0.1))
    assert (kept.ramp_images, kept.ema_half_life, kept.log_every) == (20_000, 50_000, 50)


def test_the_chosen_steps_leave_time_for_looks_at_held_out_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    digits = open_digits()
    for _ in range(100):
        step, seconds = (
            float(10 ** torch.empty(()).uniform_(low, high, generator=generator)) for low, high in ((-3, 0), (3, 5))
        )
        costs = Costs(setup=0.1, step=step, picture=1.0, checkpoint=0.1, row=0.9 * step / (3 * TINY.batch))
        held_out = HeldOut.part(0.05, digits, TINY)
        found = within(TINY, seconds, costs, held_out)
        plain = within(TINY, seconds, costs)
        # By hand: what the looks take, at every one of which the loss may be the best so far.
        looks = found.steps // held_out.paced(found).every + 1
        used = found.steps * step + looks * (0.1 + 2 * 8 * 128 * costs.row)
        assert used <= plain.steps * step
        # Short runs of this batch pay for five looks; long ones two percent, and the checkpoints.
        assert used >= 0.8 * plain.steps * step


@pytest.mark.parametrize(("steps", "done"), [(40, 0), (45, 0), (45, 23)])
def test_an_estimate_has_all_that_a_run_does(
    steps: int, done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held against the run, on a clock that only the network moves on."""
    machine, data = Machine(monkeypatch), open_digits()
    recipe = dataclasses.replace(TINY, steps=steps, sample_every=20, checkpoint_every=15, log_every=5)
    plan = make_plan(data, recipe, held_out=0.1, device="cpu")
    run = None
    if done:
        taken = iter(range(1, steps))
        run = sf.train(plan, out=tmp_path / "run", device="cpu", stop=lambda: next(taken) == done)
        assert run.step == done
    found = estimate_run(plan.config, data, torch.device("cpu"), done, evaluate_every=20, evaluate_samples=60)
    monkeypatch.setattr("stablefield.training._report_writer._drawable", lambda: False)
    check = SelfCheck.prepare(data, RawPixels(data.shape), samples=60)
    observer = FrechetObserver(check, 20, plan.config, torch.device("cpu"))
    began = machine.now
    with whole_pictures():
        if run is not None:
            run.resume(data=data, device="cpu", observers=[observer])
        else:
            sf.train(plan, out=tmp_path / "run", device="cpu", observers=[observer])
    # What else the run does takes no time on this clock.
    network = sum(found.parts[name] for name in ("steps", "pictures", "held-out samples", "evaluations"))
    assert network == pytest.approx(machine.now - began, rel=1e-6)
    assert found.seconds == pytest.approx(sum(found.parts.values()))


def test_the_command_estimates_what_the_plan_estimates_and_says_what_takes_the_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Machine(monkeypatch)
    monkeypatch.setattr("stablefield.training._report_writer._drawable", lambda: False)
    recipe = dataclasses.replace(DIGITS, steps=40, batch=32, references=32, network=TINY.network)
    plan = make_plan(open_digits(), recipe, device="cpu")
    plain = dict(plan.estimate("cpu").rows())["all of it"]
    found = dict(plan.estimate("cpu", evaluate_every=10, evaluate_samples=100).rows())["all of it"]
    # 40 steps of 3 x 32 rows, a picture of 35 x 64, four times 100 samples of 35: 4 ms for a row.
    assert plain == "about 24 s on cpu: steps 15 s, pictures 9 s"
    assert found == "about 1 min 20 s on cpu: steps 15 s, pictures 9 s, evaluations 56 s"
    for flags, words in (((), plain), (("--evaluate-every", "10", "--evaluate-samples", "100"), found)):
        assert status("train", "digits", "--recipe", "digits", *FLAGS, "--steps", "40", *flags, "--dry-run") == 0
        assert words in " ".join(capsys.readouterr().out.split())
    # Where the steps take nearly all of the time, it does not list them.
    long = make_plan(open_digits(), dataclasses.replace(recipe, steps=4000), device="cpu")
    assert dict(long.estimate("cpu").rows())["all of it"] == f"about {duration(long.estimate('cpu').seconds)} on cpu"


def test_a_time_that_is_too_short_says_how_much_more_to_give() -> None:
    costs = Costs(setup=1, step=2, picture=3, checkpoint=4)
    with pytest.raises(
        ValueError, match=r"^time is too short: 8 s .* takes 2 s, the start and the end 8 s\. Pass 32 s"
    ):
        within(TINY, 8, costs)
    assert within(TINY, 8 + 32, costs).steps >= 10


def test_a_run_uses_its_time_and_not_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    with whole_pictures():
        run = sf.train(open_digits(), out=tmp_path / "run", recipe=TINY, time="1m", device="cpu")
    assert 0.85 * 60 < machine.now <= 60
    assert run.step == run.config.recipe.steps
    assert run.folder.picture(run.step).is_file()
    recipe = run.config.recipe
    assert recipe.steps == pytest.approx((60 - 35 * 64 * 4e-3) / (32 * 3 * 4e-3), rel=0.15)
    assert recipe.ema_half_life <= 0.06 * recipe.steps * recipe.batch


def test_a_run_on_a_machine_that_becomes_busy_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    machine.slower_after, machine.slower = 20.0, 2.0
    shown: list[tuple[int, int]] = []
    with whole_pictures():
        run = sf.train(
            open_digits(), out=tmp_path / "run", recipe=TINY, time=60, device="cpu",
            progress=lambda report: shown.append((report.step, report.steps)), every=1,
        )  # fmt: skip
    # The picture, too, takes twice as long as foreseen: 18 seconds.
    assert 50 < machine.now <= 60
    assert run.folder.picture(run.step).is_file()
    changes = run.config.extensions
    assert 1 <= len(changes) <= 20
    assert [one.before for one in changes[1:]] == [one.after for one in changes[:-1]]
    assert shown[-1] == (run.step, run.step) == (changes[-1].after, run.config.recipe.steps)
    assert changes[0].after < changes[0].before == shown[0][1]
    # What is recorded is the schedule that was followed.
    rates = {entry["step"]: entry["learning_rate"] for entry in run.metrics()}
    assert rates[run.step] == run.config.recipe.learning_rate_at(run.step - 1)


def test_a_pace_within_half_a_percent_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    costs = Costs(setup=0, step=1, picture=2, checkpoint=1)
    pace = Pace(1000, costs)
    pace.begin(0, 967)
    assert not pace.due(240)
    assert pace.due(241)
    now[0] = 241 * 1.003
    assert pace.steps(241) == 967
    now[0] = 241 * 1.25  # 970 seconds in all, of which 301.25 are gone and the end takes 3.75
    assert pace.steps(241) == 241 + int((970 - 301.25 - 3.75) / 1.25) == 773
    pace.begin(241, 773)
    assert not pace.due(373)
    assert pace.due(374)
    assert not pace.due(773)


@pytest.mark.timed
def test_a_few_real_seconds_are_kept(tmp_path: Path) -> None:
    sf.train("digits", out=tmp_path / "first", recipe=TINY, steps=1, device="cpu")  # what is imported once
    began = time.monotonic()
    run = sf.train(
        "digits", out=tmp_path / "run", recipe=dataclasses.replace(TINY, sample_every=5), time=3, device="cpu"
    )
    assert time.monotonic() - began < 1.5 * 3
    assert run.step == run.config.recipe.steps > 3
    assert run.folder.picture(run.step).is_file()


def test_the_command_says_what_it_makes_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    for more, words in (
        (("--time", "1m", "--steps", "3"), "--time 1m and --steps: give one of the two"),
        (("--time", "soon"), "--time soon: pass a time such as 90s, 10m or 2h."),
    ):
        assert status("train", "digits", *FLAGS, *more, "--out", out) == 2
        assert words in capsys.readouterr().err
    assert status("train", "--resume", "--time", "1m", "--out", out) == 2
    assert "--time with --resume" in capsys.readouterr().err
    with pytest.raises(ValueError, match="steps=3 and time=1m: pass one of the two"):
        sf.train("digits", steps=3, time="1m", out=out)
    machine = Machine(monkeypatch)
    assert status("train", "digits", *FLAGS, "--time", "30s", "--out", out) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "left, for about" in told
    assert "steps (the recipe: 4,000) ramp" in told
    assert 15 < machine.now <= 30
    before = machine.now
    assert status("train", "digits", *FLAGS, "--time", "2s", "--out", str(tmp_path / "no")) == 2
    assert "--time is too short" in capsys.readouterr().err
    assert machine.now > before
    assert not (tmp_path / "no").exists()


UNET = SongUNetConfig(base_channels=64, multipliers=(1, 2, 2), blocks=1, dropout=0.0)


@pytest.mark.parametrize(("step", "width"), [(0.1, None), (0.59, None), (0.61, 32)])
def test_a_u_net_is_halved_if_the_time_allows_fewer_than_a_thousand_steps(step: float, width: int | None) -> None:
    costs = Costs(setup=1.0, step=step, picture=1.0, checkpoint=0.1)
    recipe = dataclasses.replace(TINY, network=UNET)
    found = narrowed(recipe, 590.0, costs)
    if width is None:
        assert found is None
    else:
        assert found == dataclasses.replace(recipe, network=dataclasses.replace(UNET, base_channels=width))
    # A perceptron has another unit of width, and is fast.
    assert narrowed(TINY, 590.0, costs) is None


def test_the_narrowest_u_net_has_16_base_channels() -> None:
    costs = Costs(setup=1.0, step=10.0, picture=1.0, checkpoint=0.1)
    recipe = dataclasses.replace(TINY, network=UNET)
    widths = list[int]()
    while (narrower := narrowed(recipe, 60.0, costs)) is not None:
        assert isinstance(narrower.network, SongUNetConfig)
        widths.append(narrower.network.base_channels)
        recipe = narrower
    assert widths == [32, 16]


def test_a_run_that_chooses_its_recipe_fits_the_width_to_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(monkeypatch, sf.networks.SongUNet)
    machine.row = 0.05  # a step takes 1.2 s, so three are enough to try
    images = torch.randint(0, 256, (8, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "images.npy", images.numpy())
    run = sf.train(images, out=tmp_path / "run", time=300, device="cpu", stop=lambda: True)
    assert isinstance(run.config.recipe.network, SongUNetConfig)
    assert run.config.recipe.network.base_channels == 16
    # Both networks were tried; the steps are those of the narrow one.
    assert 2 * 3 * 3 * 8 * machine.row < machine.now < 30
    # A recipe, or a network that the command names, stays as it is.
    recipe = recipe_for(as_image_set("images", images), accelerated=False)
    plan = make_plan(as_image_set("images", images), recipe, device="cpu")
    assert plan.within(300, "cpu").config.recipe.network == recipe.network
    for flags, words in (((), "16 base channels instead of 32"), (("--network.base-channels", "32"), "")):
        out = str(tmp_path / f"out{len(flags)}")
        assert status("train", str(tmp_path / "images.npy"), "--time", "300s", *flags, "--out", out, "--dry-run") == 0
        told = " ".join(capsys.readouterr().out.split())
        assert words in told
        assert ("network:" in told) == (words != "")
