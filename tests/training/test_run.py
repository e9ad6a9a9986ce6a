"""Claims on runs from Python: what `train` leaves, what `Run` does with it, and that a notebook can do it in one call."""

import dataclasses
import json
import math
import pickle
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import stablefield as sf
from commands import status
from stablefield._distributed import Ranks
from stablefield.data._digits import open_digits
from stablefield.evaluation._extractor import RawPixels
from stablefield.training._ema import power_exponent
from stablefield.training._loop import Report
from stablefield.training._recipe import MLPConfig, Recipe
from stablefield.training._sampler import SamplerOptions

TINY = Recipe(
    steps=12,
    batch=16,
    checkpoint_every=4,
    sample_every=0,
    log_every=4,
    ema_snapshot_every=4,
    network=MLPConfig(width=16, depth=1),
)


def short(**changes: Any) -> Recipe:
    """A recipe of a few steps of a small perceptron."""
    return dataclasses.replace(sf.training.DIGITS, batch=8, network=MLPConfig(width=8, depth=1), **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> sf.Run:
    return sf.train("digits", out=tmp_path_factory.mktemp("runs") / "digits", recipe=TINY, device="cpu")


def test_one_call_trains_and_reports_its_progress(tmp_path: Path) -> None:
    reports: list[Report] = []
    run = sf.train(
        open_digits(), out=tmp_path / "a", recipe=TINY, steps=6, device="cpu", progress=reports.append, every=2
    )
    assert run.path == tmp_path / "a"
    assert [report.step for report in reports] == [2, 4, 6]
    assert run.step == run.config.recipe.steps == 6
    assert [entry["step"] for entry in run.metrics()] == [4, 6]
    assert run.config.data == "digits"


def fails(*_: object) -> None:
    raise RuntimeError("no memory")


@pytest.mark.parametrize("init", [False, True])
@pytest.mark.parametrize(
    "broken",
    [
        "stablefield.training._loop.Stepper.take",  # in the first step
        "stablefield.training._loop.Stepper.__init__",
        "stablefield.training._loop.placed",
        "stablefield.training._run.make_accelerator",
        "stablefield.training._train.Run.__init__",
        "stablefield.training._run_folder.write_record",
        None,  # on_start
    ],
)
def test_a_call_that_fails_before_a_step_leaves_its_folder_to_the_corrected_one(
    run: sf.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str | None, init: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"recipe": TINY, "steps": 2, "device": "cpu", "init": run.path if init else None}
    for out, folder in (("new", tmp_path / "new"), (None, tmp_path / "runs" / "digits-stf")):
        with monkeypatch.context() as patch:
            if broken is not None:
                patch.setattr(broken, fails)
            with pytest.raises(RuntimeError, match="no memory"):
                sf.train("digits", out=out, tracker="tensorboard", on_start=None if broken else fails, **given)
        assert not list(folder.iterdir() if folder.exists() else ())
        assert sf.train("digits", out=out, **given).path.resolve() == folder


@pytest.mark.parametrize("place", ["stablefield/mine.py", "notes.txt", "checkpoints/mine.pt"])
def test_a_call_that_fails_before_a_step_removes_no_file_of_others(tmp_path: Path, place: str, run: sf.Run) -> None:
    def start(made: sf.Run, _: object) -> None:
        (made.path / place).parent.mkdir(exist_ok=True)
        (made.path / place).write_text("kept")
        raise RuntimeError("no memory")

    for name, init in (("plain", None), ("init", run.path)):
        with pytest.raises(RuntimeError, match="no memory"):
            sf.train("digits", out=tmp_path / name, recipe=TINY, steps=2, device="cpu", on_start=start, init=init)
        assert (tmp_path / name / place).read_text() == "kept"
        assert sf.Run(tmp_path / name).resume(device="cpu").step == 2  # the run stays, too


def test_a_run_without_a_checkpoint_can_be_resumed_to_fewer_steps(tmp_path: Path) -> None:
    """A kill at step 15 of 100, before the first checkpoint, and then a shorter total."""

    class KillError(BaseException):
        pass

    def kill(report: Any) -> None:
        if report.step >= 15:
            raise KillError

    recipe = dataclasses.replace(TINY, steps=100, checkpoint_every=1000, log_every=5)
    with pytest.raises(KillError):
        sf.train("digits", out=tmp_path / "a", recipe=recipe, device="cpu", progress=kill, every=5)
    assert sf.Run(tmp_path / "a").resume(steps=10, device="cpu").step == 10


def test_a_run_that_fails_after_a_step_stays(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no memory"):
        sf.train("digits", out=tmp_path / "a", recipe=TINY, steps=2, device="cpu", every=1, progress=fails)
    assert sf.Run(tmp_path / "a").resume(device="cpu").step == 2


@pytest.mark.parametrize(
    ("tracker", "kind", "said"),
    [
        (
            "tensorboards",
            ValueError,
            "tracker is 'tensorboards': pass none, tensorboard or wandb. Did you mean tensorb",
        ),
        (None, TypeError, "tracker is None: pass none, tensorboard or wandb"),
    ],
)
def test_an_unknown_tracker_is_named_and_writes_nothing(
    run: sf.Run, tmp_path: Path, tracker: Any, kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=f"^{said}"):
        sf.train("digits", out=tmp_path / "a", recipe=TINY, device="cpu", tracker=tracker)
    with pytest.raises(kind, match=f"^{said}"):
        run.resume(tracker=tracker)
    assert not (tmp_path / "a").exists()


def test_an_array_is_trained_on_as_an_image_set_is(tmp_path: Path) -> None:
    digits = open_digits()
    two = [
        sf.train(images, out=tmp_path / name, recipe=TINY, steps=3, device="cpu")
        for name, images in (
            ("set", digits),
            ("array", digits.images),
            ("tensor", torch.from_numpy(digits.images.copy())),
        )
    ]
    weights = [run.model("none").denoiser.state_dict() for run in two]
    assert all(torch.equal(value, other[name]) for other in weights[1:] for name, value in weights[0].items())


def test_without_a_recipe_the_data_choose_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = sf.train("digits", steps=2, device="cpu")
    assert run.path == Path("runs/digits-stf")
    assert run.config.recipe.network == sf.training.DIGITS.network
    assert sf.train("digits", steps=2, device="cpu").path == Path("runs/digits-stf-2")


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(run: sf.Run, tmp_path: Path) -> None:
    seen: list[int] = []
    stopped = sf.train(
        "digits", out=tmp_path / "a", recipe=TINY, device="cpu", progress=lambda r: seen.append(r.step), every=1,
        stop=lambda: len(seen) >= 5,
    )  # fmt: skip
    assert stopped.step < 12
    assert sf.Run(tmp_path / "a").resume(device="cpu").step == 12
    one, two = run.model("none").denoiser.state_dict(), stopped.model("none").denoiser.state_dict()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_images_that_were_no_file_are_handed_to_resume(tmp_path: Path) -> None:
    digits = open_digits().images
    stopped = sf.train(digits, out=tmp_path / "a", recipe=TINY, steps=4, device="cpu", stop=lambda: True)
    with pytest.raises(ValueError, match="data is missing"):
        stopped.resume(device="cpu")
    assert stopped.resume(data=digits, device="cpu").step == 4


def test_labels_that_were_no_file_are_handed_to_resume_too(tmp_path: Path) -> None:
    digits = open_digits()
    assert digits.labels is not None
    origin = sf.data.Origin(name="others", source="x")
    others = sf.data.make_image_set(digits.images[:40] // 2, digits.labels[:40], origin)
    given = {"recipe": dataclasses.replace(TINY, conditional=True), "steps": 4, "device": "cpu", "held_out": others}
    with pytest.raises(
        ValueError, match=r"^held_out=held_out has no labels, .* make an image set with stablefield\.data\.make_"
    ):
        sf.train(digits.images, labels=digits.labels, out=tmp_path / "no", **{**given, "held_out": others.images})
    whole, cut = (
        sf.train(digits.images, labels=digits.labels, out=tmp_path / name, stop=stop, **given)
        for name, stop in (("whole", lambda: False), ("cut", lambda: True))
    )
    assert cut.step == 1
    arrays = {"data": digits.images, "held_out": others}
    with pytest.raises(
        ValueError, match=r"^data have no labels, and this run is conditioned on 10 classes: pass labels= "
    ):
        cut.resume(**arrays)
    with pytest.raises(ValueError, match="its labels' sha256 differs"):
        cut.resume(**arrays, labels=digits.labels[::-1].copy())
    with pytest.raises(ValueError, match=r"held_out=held_out needs labels of the run's 10 classes, .*make_image_set"):
        cut.resume(**{**arrays, "held_out": others.images}, labels=digits.labels)
    with pytest.raises(ValueError, match="labels is only for data that is an array"):
        cut.resume(data=digits, held_out=others, labels=digits.labels)
    assert cut.resume(**arrays, labels=torch.from_numpy(digits.labels), device="cpu").step == 4
    name = "model.safetensors"
    assert (cut.folder.checkpoint(4) / name).read_bytes() == (whole.folder.checkpoint(4) / name).read_bytes()


def test_a_seed_is_one_image_however_it_is_drawn(run: sf.Run) -> None:
    whole = run.sample(6, steps=3, device="cpu")
    some = run.sample([4, 1], steps=3, batch=1, device="cpu")
    assert whole.images.shape == (6, 1, 8, 8)
    assert whole.nfe == some.nfe == 5
    np.testing.assert_array_equal(some.images, whole.images[[4, 1]])
    # By hand: the same latents through the same solver.
    latents = sf.sampling.SampleNoise([4, 1]).latents((1, 8, 8), dtype=torch.float64)
    clean = sf.sampling.heun(run.model().denoiser, latents * 80, sf.sampling.edm_sigmas(3))
    np.testing.assert_array_equal(((clean + 1) * 127.5).round().clamp(0, 255).byte().numpy(), some.images)


def test_samples_are_saved_as_their_suffix_says(run: sf.Run, tmp_path: Path) -> None:
    samples = run.sample([3, 0, 2], steps=2, device="cpu")
    with np.load(samples.save(tmp_path / "a.npz")) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], samples.images.transpose(0, 2, 3, 1))
        assert arrays["seeds"].tolist() == [3, 0, 2]
    with pytest.raises(ValueError, match=r"^path='.*x\.gif': name a \.png or \.jpg file for a grid"):
        samples.save(tmp_path / "x.gif")
    samples.save(tmp_path / "folder")
    with Image.open(tmp_path / "folder" / "000002.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), samples.images[2, 0])
    with Image.open(samples.save(tmp_path / "grid.png")) as picture:
        np.testing.assert_array_equal(np.asarray(picture), samples.grid()[:, :, 0])
    assert 'alt="3 samples" src="data:image/png;base64,' in samples._repr_html_()


def test_options_stand_in_one_place(run: sf.Run) -> None:
    options = SamplerOptions(sampler="euler", steps=2)
    np.testing.assert_array_equal(
        run.sample(2, sampler=options, device="cpu").images,
        run.sample(2, sampler="euler", steps=2, device="cpu").images,
    )
    with pytest.raises(
        ValueError, match=r"^steps=3: sampler is a SamplerOptions, and sampler holds all options: set them"
    ):
        run.sample(2, sampler=options, steps=3)
    with pytest.raises(ValueError, match=r"^churn=3 is an option of heun, not of euler"):
        run.sample(2, sampler=SamplerOptions(sampler="euler", churn=3), device="cpu")
    for name, value in {"grid": "VP", "predictor": "euler"}.items():
        with pytest.raises(ValueError, match=rf"^{name}='{value}' is none of \w+, .*: pass one of these"):
            run.sample(2, sampler=SamplerOptions(sampler="pc-ve", **{name: value}), device="cpu")
    with pytest.raises(ValueError, match=r"guidance_scale=2: classifier-free guidance takes a run with classes"):
        run.sample(2, guidance_scale=2.0, device="cpu")
    with pytest.raises(ValueError, match="seeds holds 2 seeds, 1 of them different"):
        run.sample([1, 1])


def test_options_beside_a_loaded_sampler_are_named_and_refused(run: sf.Run, tmp_path: Path) -> None:
    opened = run.sampler("euler", steps=2, device="cpu")
    np.testing.assert_array_equal(
        run.sample(2, sampler=opened, device="cpu").images, run.sample(2, sampler="euler", steps=2, device="cpu").images
    )
    found = r"^steps=100, guidance_scale=3, checkpoint=best: sampler is a RunSampler, .*: pass them to Run\.sampler\.$"
    with pytest.raises(ValueError, match=found):
        run.sample(2, sampler=opened, steps=100, guidance_scale=3, checkpoint="best")
    others = {"class_label": (0,), "ema": "none", "batch": 1, "decode": False, "vae": "x"}
    for name, value in others.items():
        with pytest.raises(ValueError, match=rf"^{name}={re.escape(str(value))}: sampler is a RunSampler"):
            run.sample(2, sampler=opened, **{name: value})
    with pytest.raises(ValueError, match=r"^vae=x: sampler is a RunSampler"):
        run.evaluate(samples=4, sampler=opened, vae="x")
    other = tmp_path / "other"
    shutil.copytree(run.path, other)
    for call in (sf.Run(other).sample, sf.Run(other).evaluate, sf.Run(other).sampler):
        with pytest.raises(
            ValueError, match=rf"^sampler draws from the run {re.escape(str(run.path))}, and this run is"
        ):
            call(sampler=opened)
    elsewhere = dataclasses.replace(opened, device=torch.device("cuda:0"))
    for call in (run.sample, run.evaluate):
        with pytest.raises(ValueError, match=r"^device=cpu: sampler is a RunSampler"):
            call(sampler=elsewhere, device="cpu")


def test_an_evaluation_is_of_the_runs_samples_and_data(run: sf.Run, tmp_path: Path) -> None:
    samples = run.sample(60, steps=2, device="cpu")
    options = SamplerOptions(steps=2)
    arguments = {"metrics": ("frechet",), "extractor": RawPixels((1, 8, 8)), "device": "cpu", "cache": False}
    found = run.evaluate(samples=60, sampler=options, **arguments)
    by_hand = sf.evaluate(samples.images, data="digits", **arguments)
    assert found.scores[0].mean == pytest.approx(by_hand.scores[0].mean, rel=1e-9)
    protocol = found.scores[0].protocol
    assert (protocol.nfe, protocol.steps, protocol.sample_count) == (3.0, 2, 60)
    assert json.loads(found.save(tmp_path / "e.json").read_text())["results"]


def test_an_average_is_written_beside_the_snapshots(run: sf.Run) -> None:
    assert run.snapshot_steps() == [4, 8, 12]
    path, error = run.average(0.1)
    assert path.name == "length-0.1.safetensors"
    assert 0 <= error < 0.2
    with pytest.raises(ValueError, match=r"length .* is 0\.5: .* below 0\.2887"):
        run.average(0.5)
    with pytest.warns(UserWarning, match=r"^length=0\.2886: .* differs by \d\d\.\d% from one of that length"):
        run.average(0.2886)
    before = sorted((run.path / "ema").iterdir())
    for step in (2, 6, 11, 13):
        with pytest.raises(ValueError, match=f"^step={step} has no snapshot: pass 4, 8 or 12"):
            run.average(0.1, step)
    assert sorted((run.path / "ema").iterdir()) == before
    assert run.average(0.1, 8)[1] < 1e-5


def test_an_average_far_from_the_lengths_that_are_kept_is_told_with_its_error(run: sf.Run, tmp_path: Path) -> None:
    def profile(step: int, length: float) -> np.ndarray:
        gamma, tau = power_exponent(length), (np.arange(120_000) + 0.5) / 1e4
        return np.where(tau < step, (gamma + 1) * tau**gamma / step ** (gamma + 1), 0)

    # Least squares on a fine grid, with coefficients that sum to 1.
    first, *others = (profile(step, length) for step in (4, 8, 12) for length in (0.05, 0.1))
    wanted = profile(12, 0.25)
    differences = np.stack([other - first for other in others], 1)
    shares = np.linalg.lstsq(differences, wanted - first, rcond=None)[0]
    error = np.linalg.norm(wanted - first - differences @ shares) / np.linalg.norm(wanted)
    told = (
        rf"^ema=0\.25: .* differs by {error:.1%} from one of that .* smaller ema_snapshot_every, or .* 0\.05 or 0\.1,"
    )
    with pytest.warns(UserWarning, match=told):
        model = run.model("0.25")
    assert model.ema_error == pytest.approx(error, rel=1e-3)
    with pytest.warns(UserWarning, match=told):
        samples = run.sample(2, steps=2, ema="0.25", device="cpu")
    assert samples.ema == f"0.25 (profile {error:.1%} off), step 12"
    with pytest.warns(UserWarning, match=told):
        run.export(tmp_path / "plain", format="plain", samples=0, ema="0.25")
    card = (tmp_path / "plain" / "README.md").read_text().replace("\\", "")
    assert f"average: 0.25 (profile {error:.1%} off)" in card
    with pytest.warns(UserWarning, match=r"^guide_ema=0\.25: .* differs by"):
        run.sampler(SamplerOptions(guide=run.path, guide_ema="0.25", guidance_scale=2), device="cpu")
    with pytest.warns(UserWarning, match=told.replace("ema=", "length=")):
        assert run.average(0.25)[1] == pytest.approx(error, rel=1e-3)
    # Those that are kept are exact, and told without an error or a warning.
    assert run.sample(2, steps=2, ema="0.05", device="cpu").ema == "0.05, step 12"
    assert run.model("0.08").ema_error == pytest.approx(run.average(0.08)[1])


def test_a_run_does_not_guide_itself(run: sf.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # By whatever path.
    (tmp_path / "link").symlink_to(run.path)
    monkeypatch.chdir(run.path.parent)
    for guide in (run.path, tmp_path / "link", Path(run.path.name)):
        with pytest.raises(ValueError, match=r"^guide=.* is the run itself, at the same step .*: name a worse run, or"):
            run.sampler(SamplerOptions(guide=guide, guidance_scale=2), device="cpu")
    plain = run.sample(2, steps=2, device="cpu").images
    chosen = SamplerOptions(steps=2, guide=run.path, guide_ema="none", guidance_scale=20)
    assert not np.array_equal(run.sample(2, sampler=chosen, device="cpu").images, plain)


def test_an_export_is_a_folder_with_a_card(run: sf.Run, tmp_path: Path) -> None:
    folder = run.export(tmp_path / "plain", format="plain", samples=4, steps=2, name="tiny")
    assert {"README.md", "samples.png"} <= {path.name for path in folder.iterdir()}
    assert "tiny" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="is not empty"):
        run.export(folder, format="plain")


@pytest.mark.parametrize(("given", "kind"), [("diffuser", ValueError), ("Plain", ValueError), (None, TypeError)])
def test_an_export_of_an_unknown_format_writes_nothing(
    run: sf.Run, tmp_path: Path, given: Any, kind: type[Exception]
) -> None:
    meant = {"diffuser": r"\. Did you mean diffusers\?", "Plain": r"\. Did you mean plain\?"}.get(given, r"\.")
    with pytest.raises(kind, match=rf"^format is {given!r}: pass diffusers or plain{meant}$"):
        run.export(tmp_path / "export", format=given)
    assert not (tmp_path / "export").exists()


def test_a_run_shows_itself_in_a_notebook(run: sf.Run) -> None:
    text = run._repr_html_()
    assert "step 12 of 12" in text
    assert re.search(r'<img alt="samples of step 12" src="data:image/png;base64,', text)
    assert repr(run) == f"Run({str(run.path)!r})"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run"):
        sf.Run(tmp_path / "nothing")
    with pytest.raises(ValueError, match="leave steps out"):
        sf.train(sf.training.make_plan(open_digits(), TINY), steps=3)
    with pytest.raises(ValueError, match=r"batch=2000 is above the 1797 images"):
        sf.train("digits", out=tmp_path / "x", recipe=Recipe(batch=2000), device="cpu")
    assert not (tmp_path / "x").exists()


def test_a_mistyped_sampler_or_recipe_says_what_it_takes(run: sf.Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^sampler='huen' is none of heun, .* Did you mean heun\?$"):
        run.sample(2, sampler="huen")
    for call in (sf.train, sf.compare):
        with pytest.raises(TypeError, match=r"^recipe is .*: pass a Recipe, such as"):
            call("digits", recipe="digits", out=tmp_path / "no", device="cpu")


def test_seeds_of_a_comparison_may_be_how_many(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^seeds=\[\]: pass at least one seed"):
        sf.compare("digits", seeds=[], device="cpu")
    found = sf.compare("digits", seeds=1, out=tmp_path, recipe=TINY, steps=2, evaluations=1, samples=40, device="cpu")
    assert found.seeds == [0]


def test_a_comparison_that_was_stopped_holds_the_seeds_that_are_done_and_goes_on(tmp_path: Path) -> None:
    options = {"seeds": 2, "out": tmp_path / "both", "recipe": TINY, "steps": 2, "evaluations": 1, "samples": 40}
    none = sf.compare("digits", **options, device="cpu", stop=lambda: True)
    assert (none.seeds, none.missing, none.charts()) == ([], (0, 1), {})
    assert str(none) == none.summary == "Stopped before seed 0, 1: the same call continues."
    assert none.summary in none.save(tmp_path / "none.html").read_text()
    ended: list[object] = []
    first = sf.compare("digits", **options, device="cpu", on_run=ended.append, stop=lambda: len(ended) >= 2)
    assert (first.seeds, first.missing) == ([0], (1,))
    assert first.summary.startswith("STF is nearer to the optimum")
    assert first.summary.endswith("Stopped before seed 1: the same call continues.")
    both = sf.compare("digits", **options, device="cpu", progress=ended.append)
    assert (both.seeds, both.missing) == ([0, 1], ())
    assert {report.stage for report in ended[2:]} <= {"seed 1 DSM", "seed 1 STF"}


def test_labels_of_an_array_are_those_of_the_run(tmp_path: Path) -> None:
    digits = open_digits()
    assert digits.labels is not None
    recipe = dataclasses.replace(TINY, conditional=True, steps=3)
    options = {"recipe": recipe, "device": "cpu"}
    by_array = sf.train(
        torch.from_numpy(digits.images.copy()), labels=torch.from_numpy(digits.labels), out=tmp_path / "a", **options
    )
    by_set = sf.train(digits, out=tmp_path / "b", **options)
    assert by_array.config.classes == 10
    one, two = (run.model("none").denoiser.state_dict() for run in (by_array, by_set))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    with pytest.raises(ValueError, match="labels is only for images that is an array"):
        sf.train(digits, labels=digits.labels, **options)


def test_labels_that_are_given_are_used_or_refused(tmp_path: Path) -> None:
    digits = open_digits()
    for compute in (sf.train, sf.compare):
        with pytest.raises(ValueError, match="labels are given, and the recipe has conditional=False"):
            compute(digits.images, labels=digits.labels, recipe=TINY, out=tmp_path / "never", device="cpu")
    run = sf.train(digits.images, labels=digits.labels, out=tmp_path / "run", device="cpu", stop=lambda: True)
    assert (run.config.recipe.conditional, run.config.classes) == (True, 10)
    next_run = sf.train(
        digits.images,
        labels=digits.labels,
        init=trained_without(tmp_path),
        out=tmp_path / "b",
        device="cpu",
        stop=lambda: True,
    )
    assert next_run.config.classes == 10


def trained_without(folder: Path) -> sf.Run:
    """A run without classes."""
    return sf.train("digits", recipe=TINY, out=folder / "without", device="cpu")


def test_classes_without_images_are_noted_and_not_drawn(tmp_path: Path) -> None:
    digits = open_digits()
    recipe = dataclasses.replace(TINY, conditional=True, steps=2)
    with pytest.warns(UserWarning, match=r"^images: Class 0 has no images: if the labels are numbered from 1") as told:
        run = sf.train(digits.images, labels=digits.labels + 1, recipe=recipe, out=tmp_path / "run", device="cpu")
    assert len(told) == 1
    assert run.config.classes == 11  # 0 to 10, as numbered
    samples = run.sample(12, steps=2, device="cpu")
    assert samples.labels.tolist() == [*range(1, 11), 1, 2]
    assert "the 10 classes with images in turn" in run.sampler(device="cpu").describe()
    assert run.sample(1, class_label=0, steps=2, device="cpu").labels.tolist() == [0]  # by name it is drawn
    from_one = sf.data.make_image_set(digits.images, digits.labels + 1, sf.data.Origin(name="x", source="y"))
    assert from_one.notes == ("Class 0 has no images: if the labels are numbered from 1, subtract 1.",)
    rows = (digits.labels != 3) & (digits.labels != 7)
    some = sf.data.make_image_set(digits.images[rows], digits.labels[rows], sf.data.Origin(name="x", source="y"))
    assert some.notes == ("2 of 10 classes have no images: 3, 7.",)
    named = sf.data.make_image_set(
        digits.images[:1], np.array([1]), sf.data.Origin(name="x", source="y", class_names=("cat", "dog"))
    )
    assert named.notes == ("1 of 2 classes has no images: cat.",)
    # They are derived from the labels: the keys of caches and manifests hold what was recorded.
    assert named.recorded_notes == ()
    assert digits.notes == ()


def test_processes_agree_on_a_plan_without_sending_each_other_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = open_digits()
    sent: list[bytes] = []

    def broadcast(values: list[object], **_: object) -> None:
        sent.append(pickle.dumps(values))
        values[:] = pickle.loads(sent[-1])

    monkeypatch.setattr("torch.distributed.broadcast_object_list", broadcast)
    monkeypatch.setattr("stablefield.training._plan.place", lambda _: (torch.device("cpu"), Ranks(0, 2)))
    shared = sf.training.make_plan(digits, TINY)
    assert shared.data is digits
    assert [(shared.config, shared.references, shared.noise_band)] == pickle.loads(sent[0])
    assert len(sent[0]) < 20_000 < digits.images.nbytes


def test_a_plan_says_what_its_run_would_take_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = sf.training.make_plan(open_digits(), TINY, device="cpu").estimate("cpu")
    assert found.parts["steps"] == found.seconds_per_step * TINY.steps
    assert found.seconds == sum(found.parts.values())
    assert 0 < found.target_seconds < found.seconds_per_step
    names = ["images", "parameters", "memory", "steps", "references", "a step here", "all of it"]
    assert [name for name, _ in found.rows()] == names
    assert [line[:12].strip() for line in str(found).splitlines()] == names
    assert list(tmp_path.iterdir()) == []


def test_snapshots_of_steps_that_are_taken_back_do_not_stay(tmp_path: Path) -> None:
    recipe = short(steps=6, checkpoint_every=3, ema_snapshot_every=1, sample_every=1)
    run = sf.train("digits", out=tmp_path / "run", recipe=recipe, device="cpu")
    shutil.rmtree(run.folder.checkpoint(6))  # as if it had been killed before
    assert sf.Run(run.path).step == 3
    shorter = sf.Run(run.path).resume(steps=4, device="cpu")
    assert shorter.snapshot_steps() == [1, 2, 3, 4]
    assert shorter.model(ema="0.1").step == 4
    with Image.open(shorter.animation(tmp_path / "a.gif")) as picture:
        assert picture.n_frames <= 4


def test_an_evaluation_refuses_other_images_at_the_place_of_the_runs_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    digits = sf.data.open_images("digits").images
    recipe = short(steps=1)
    run = sf.train(digits[:100], out="run", recipe=recipe, device="cpu")  # an array: the data have no place
    np.save("images", digits[100:200])
    (tmp_path / "images.npy").rename(tmp_path / run.config.data)
    arguments = {"metrics": ("frechet",), "extractor": RawPixels((1, 8, 8)), "device": "cpu", "cache": False}
    with pytest.raises(
        ValueError, match=r"images is not what this run was started with .*: to measure against other im"
    ):
        run.evaluate(samples=20, sampler="euler", **arguments)
    run.evaluate(samples=20, sampler="euler", data=digits[100:200], **arguments)
    flags = ("--samples", "20", "--extractor", "pixels", "--device", "cpu", "--metrics", "frechet")
    assert status("evaluate", "run", *flags) == 2
    assert "to measure against other images, pass --data IMAGES" in " ".join(capsys.readouterr().err.split())


def test_an_autoencoder_beside_pictures_is_refused(run: sf.Run, tmp_path: Path) -> None:
    digits = sf.data.open_images("digits").images[:100]
    calls = {
        "train": lambda: sf.train(digits, out=tmp_path / "run", vae="no/such", steps=1, device="cpu"),
        "in time": lambda: sf.train(digits, out=tmp_path / "run", vae="no/such", time=9, device="cpu"),
        "resume": lambda: run.resume(vae="no/such", device="cpu"),
    }
    for call in calls.values():
        with pytest.raises(
            ValueError, match=r"^vae=no/such does nothing: the run's data are no latents .* Leave it out"
        ):
            call()
    assert not (tmp_path / "run").exists()


def test_observers_do_not_replace_what_the_log_has(tmp_path: Path) -> None:
    class Observer:
        every = 1

        def __call__(self, *_: object) -> dict[str, float]:
            return {"loss": 0.0}

    recipe = short(steps=2)
    with pytest.raises(ValueError, match=r"^observers: Observer returned loss, which metrics\.jsonl has from another"):
        sf.train("digits", out=tmp_path / "run", recipe=recipe, device="cpu", observers=[Observer()])


def test_class_0_and_an_array_of_classes_are_named_classes(tmp_path: Path) -> None:
    recipe = short(steps=1, conditional=True)
    run = sf.train("digits", out=tmp_path / "run", recipe=recipe, device="cpu")
    for label, classes in ((0, (0,)), (np.array([0, 3]), (0, 3)), ("7", (7,)), (-1, (-1,))):
        sampler = run.sampler(class_label=label, steps=2, device="cpu")
        assert sampler.in_proportion().classes == sampler.classes == classes
        assert "proportions" not in sampler.describe()
    unnamed = run.sampler(steps=2, device="cpu")
    assert unnamed.classes == tuple(range(10))
    counts = np.bincount(unnamed.in_proportion().classes)
    assert counts.tolist() == np.bincount(sf.data.open_images("digits").labels).tolist()
    assert "classes in the proportions of the training data" in unnamed.in_proportion().describe()


def test_entries_of_observers_are_numbers_of_any_kind_or_refused(tmp_path: Path) -> None:
    class Observer:
        every = 2

        def __init__(self, found: Any) -> None:
            self.found = found

        def __call__(self, *_: object) -> Any:
            return self.found

    def train(name: str, found: Any) -> sf.Run:
        recipe = short(steps=4, log_every=1)
        return sf.train("digits", out=tmp_path / name, recipe=recipe, device="cpu", observers=[Observer(found)])

    given = {"better": True, "a": np.float32(0.5), "b": torch.tensor(0.25), "c": np.int64(3), "d": 2, "e": math.nan}
    lines = train("run", given).metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines[1::2]:
        assert {name: line.get(name) for name in given} == {**given, "better": 1, "e": None}
    for found, message in (
        ({"note": "ok"}, "observers: the entry note of Observer is the string .ok.: pass a number"),
        ({"acc": None}, "observers: the entry acc of Observer is None: pass a number"),
        ({"bin_acc": 1.0}, "observers: Observer returned an entry named 'bin_acc': return a text"),
        (None, 'observers: what Observer returned is None: pass numbers by their names, such as {"score": 0.5}'),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            train("other", found)
        shutil.rmtree(tmp_path / "other")


def test_an_integer_is_the_number_of_a_class_and_a_text_its_name(tmp_path: Path) -> None:
    digits = sf.data.open_images("digits")
    for digit in (1, 2, 3):  # names that are also numbers, of other classes
        (tmp_path / "data" / str(digit)).mkdir(parents=True)
        for k, image in enumerate(digits.images[digits.labels == digit][:4]):
            Image.fromarray(image[0]).save(tmp_path / "data" / str(digit) / f"{k}.png")
    run = sf.train(tmp_path / "data", out=tmp_path / "run", recipe=short(steps=1, conditional=True), device="cpu")
    assert run.config.class_names == ("1", "2", "3")
    for label, number in ((1, 1), (np.array([2, 0]), (2, 0)), ("1", 0), (["3", 0], (2, 0)), ("0", 0)):
        expected = number if isinstance(number, tuple) else (number,)
        assert run.sampler(class_label=label, steps=2, device="cpu").classes == expected
    # Seed k takes the class at place k modulo their number, wherever it stands among the seeds.
    for seeds in ([5, 2, 9, 0], [0, 5], range(3, 9)):
        drawn = run.sample(seeds, class_label=[2, 0, 1], steps=2, device="cpu")
        assert dict(zip(drawn.seeds, drawn.labels.tolist(), strict=True)) == {k: (2, 0, 1)[k % 3] for k in seeds}
    told = " ".join((sf.Run.sample.__doc__ or "").split())
    assert "of m classes, seed k takes the one at place k modulo m" in told
    with pytest.raises(ValueError, match=r"class_label=3: the run has classes 0 \(1\), 1 \(2\), 2 \(3\)"):
        run.sample(1, class_label=3, steps=2, device="cpu")


def test_natural_arguments_of_any_kind_mean_what_plain_ones_mean(tmp_path: Path) -> None:
    recipe = short(steps=4, conditional=True, checkpoint_every=2, ema_snapshot_every=2, sample_every=0)
    data = sf.data.open_images("digits", resolution=np.int64(4))
    run = sf.train(data, out=tmp_path / "run", recipe=recipe, held_out=np.float32(0.125), device="cpu")
    assert run.config.held_out is not None
    assert run.config.held_out.share == 0.125
    assert run.config.opening["resolution"] == 4

    def drawn(seeds: Any = 3, **options: Any) -> np.ndarray:
        found = run.sample(seeds, steps=2, device="cpu", **options)
        return np.concatenate([found.images.reshape(len(found.images), -1), found.labels[:, None]], 1)

    for seeds in (np.int64(3), torch.tensor(3), np.arange(3), torch.arange(3), (k for k in range(3))):
        assert np.array_equal(drawn(seeds), drawn(3))
    several = (
        np.array([1, 2]),
        torch.tensor([1, 2]),
        [np.int64(1), torch.tensor(2)],
        np.array(["1", "2"]),
        range(1, 3),
    )
    for given, plain in (
        *((one, (1, 2)) for one in several),
        (np.int64(1), 1),
        (torch.tensor(1), 1),
        (np.str_("1"), 1),
    ):
        assert np.array_equal(drawn(class_label=given), drawn(class_label=plain))
    best = run.best
    assert best is not None
    for checkpoint in (best, np.int64(best), "best"):
        assert np.array_equal(drawn(checkpoint=checkpoint), drawn(checkpoint=str(best)))
        assert run.model(checkpoint=checkpoint).step == best
    assert np.array_equal(drawn(ema=0.05), drawn(ema="0.05"))
    assert run.model(np.float32(0.05)).ema == "0.05"
    natural: dict[str, Any] = {"guide": run, "checkpoint": 2, "ema": 0.05}
    assert SamplerOptions(**natural) == SamplerOptions(guide=run.path, checkpoint="2", ema="0.05")
    scores = run.evaluate(
        samples=np.int64(20), references=np.int64(30), repeats=np.int64(1), seed=np.int64(0), feature_batch=np.int64(8),
        metrics=["frechet"], extractor=RawPixels((1, 4, 4)), data=data, sampler=SamplerOptions(steps=2), device="cpu",
        cache=False,
    )  # fmt: skip
    scores.save(tmp_path / "scores.json")
    assert run.resume(steps=np.int64(6), device="cpu").step == 6


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({"seeds": None}, TypeError, "seeds is None: pass how many images, or their seeds"),
        ({"seeds": 2.5}, ValueError, "seeds=2.5: pass a whole number"),
        ({"seeds": [True]}, TypeError, r"seeds\[0\] is the bool True"),
        ({"checkpoint": None}, TypeError, "checkpoint is None: pass newest, best, or a step"),
        ({"checkpoint": 4.0}, TypeError, "checkpoint is a float: pass newest, best, or a step"),
        ({"checkpoint": -4}, ValueError, "checkpoint=-4: pass a whole number of at least 0"),
        ({"ema": None}, TypeError, "ema is None: pass half-life, none, or a length"),
        ({"class_label": {}}, TypeError, "class_label is a dict: pass the name or number of a class"),
        ({"class_label": [1.5]}, ValueError, r"class_label\[0\]=1.5: pass a whole number"),
        ({"batch": None}, TypeError, "batch is None: pass a whole number"),
        ({"guidance_scale": None}, TypeError, "guidance_scale is None: pass a number"),
    ],
)
def test_other_arguments_are_refused_by_name(
    run: sf.Run, tmp_path: Path, given: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=f"^{said}"):
        run.sample(**({"steps": 2, "device": "cpu"} | given))
    if given.keys() <= {"checkpoint", "ema"}:
        with pytest.raises(kind, match=f"^{said}"):
            run.model(**given)
        with pytest.raises(kind, match=f"^{said}"):
            run.export(tmp_path / "export", format="plain", **given)
        assert not (tmp_path / "export").exists()


def test_the_animation_of_a_run_in_progress_has_the_grids_since_its_checkpoint(tmp_path: Path) -> None:
    recipe = short(steps=8, log_every=1, checkpoint_every=8, sample_every=2)
    run = sf.train("digits", out=tmp_path / "run", recipe=recipe, device="cpu")
    shutil.rmtree(run.folder.checkpoint(8))
    shutil.rmtree(run.path / "checkpoints")
    with Image.open(run.animation(tmp_path / "a.gif")) as picture:
        assert picture.n_frames > 1


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder with 48 photos, an icon and a file of a kind that is not read."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(48):
        Image.fromarray(rng.integers(0, 256, (120, 160, 3), np.uint8)).save(folder / f"{k}.jpg")
    Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).save(folder / "thumb.png")
    (folder / "phone.heic").write_bytes(b"?")
    return folder


def test_each_note_on_a_path_or_an_array_is_one_warning_where_it_was_given(odd: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(short(steps=1), batch=8)
    said = ["images: 1 file that ends in .heic is not read: save it as PNG or JPEG."]
    said.append(
        "images: Resolution 8 because of thumb.png (12 x 12): without the smallest of 49 images it would be 32 x 24; pass "
        "resolution=(24, 32), or move it away."
    )
    calls = {
        "train": lambda: sf.train(odd, out=tmp_path / "run", device="cpu", stop=lambda: True, steps=1),
        "compare": lambda: sf.compare(odd, out=tmp_path / "compare", device="cpu", stop=lambda: True, steps=8, seeds=1),
        "probe": lambda: sf.probe(odd, device="cpu"),
    }
    for name, call in calls.items():
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            call()
        found = [str(one.message).replace("data: ", "images: ") for one in told]
        assert found == said, name
        assert {Path(one.filename) for one in told} == {Path(__file__)}
    # A set that the caller has opened was told by its notes.
    opened = sf.data.open_images(odd, resolution=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = sf.train(opened, out=tmp_path / "set", recipe=recipe, device="cpu", stop=lambda: True)
    assert opened.notes == ("1 file that ends in .heic is not read: save it as PNG or JPEG.",)
    moved = shutil.move(odd, tmp_path / "moved")
    with pytest.warns(UserWarning, match=r"^data: 1 file that ends in \.heic") as told:
        run.resume(data=moved, device="cpu")
    assert len(told) == 1
    # Float data that are taken as they are are no mistake.
    np.save(tmp_path / "signals.npy", np.random.default_rng(0).normal(size=(20, 3, 16)))
    assert sf.data.open_images(tmp_path / "signals.npy").notes[0].startswith("float data are taken as they are")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sf.train(tmp_path / "signals.npy", recipe=recipe, out=tmp_path / "signals", device="cpu", stop=lambda: True)


def test_the_command_prints_each_note_once_with_its_flag(odd: Path, tmp_path: Path, capfd, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    from stablefield.cli.entry import main

    for words in (
        ["train", "photos", "--steps", "1", "--batch", "8", "--out", "run"],
        ["probe", "photos", "--out", "probe"],
    ):
        with pytest.raises(SystemExit) as left:
            main([*words, "--device", "cpu"])
        told = capfd.readouterr()
        assert left.value.code == 0, told.err
        for note in (".heic is not read", "would be 32 x 24; pass --resolution 24x32, or move it away."):
            assert (told.out + told.err).count(note) == 1, words
