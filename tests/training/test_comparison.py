"""A comparison: equal starts, equal batches, scores that mean what they say, and nothing done twice."""

import dataclasses
import itertools
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import stablefield as sf
from pictures import empty_charts
from stablefield._distributed import Ranks
from stablefield.cli.entry import main
from stablefield.data._digits import open_digits
from stablefield.evaluation._extractor import RandomConvolutions, RawPixels
from stablefield.probing import _fit as fit
from stablefield.probing._exact import Exact, ExactPosterior
from stablefield.probing._fit import Optimum, measure_fit
from stablefield.probing._population import Population
from stablefield.report import KeyFigures
from stablefield.training._compare import ComparisonPlan
from stablefield.training._comparison import Comparison, summary
from stablefield.training._comparison_page import comparison_page, gain_texts
from stablefield.training._model import open_model
from stablefield.training._recipe import MLPConfig, Recipe
from stablefield.training._recipes import DIGITS
from stablefield.training._run_config import RunConfig
from stablefield.training._run_folder import RunFolder
from stablefield.training._run_source import RunSource
from stablefield.training._scorer import optimum_of, run_one, samples_of
from stablefield.training._scores import LEVELS, Outcome, Score, read_scores, spread
from stablefield.training._scoring_plan import plan_scoring
from stablefield.training._self_check import SelfCheck

CPU = torch.device("cpu")
RECIPE = dataclasses.replace(
    DIGITS,
    references="all",
    noise_band=0.0,
    steps=20,
    batch=64,
    ramp_images=500,
    sample_every=0,
    checkpoint_every=10,
    network=MLPConfig(width=32, depth=1),
)
FLAGS = ("--steps", "20", "--evaluations", "2", "--samples", "100", "--network.width", "32", "--network.depth", "1")


@pytest.fixture(scope="module")
def check() -> SelfCheck:
    return SelfCheck.prepare(open_digits(), RawPixels((1, 8, 8)), samples=100)


def config_of(recipe: Recipe) -> RunConfig:
    data = open_digits()
    classes = 10 if recipe.conditional else 0
    return RunConfig(
        data="digits", shape=data.shape, classes=classes, manifest=data.manifest, recipe=recipe, version="test"
    )


@pytest.fixture(scope="module")
def optimum() -> Optimum:
    return optimum_of(config_of(RECIPE), open_digits(), CPU)


def run(
    path: Path, target: str, check: SelfCheck, optimum: Optimum | None = None, recipe: Recipe = RECIPE
) -> tuple[RunFolder, tuple[Score, ...]]:
    folder = RunFolder.create(path, config_of(dataclasses.replace(recipe, target=target)))
    outcome = run_one(folder, open_digits(), check, 10, CPU, optimum=optimum)
    assert outcome is not None
    return folder, outcome.scores


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory, check: SelfCheck) -> tuple[RunFolder, tuple[Score, ...]]:
    """A run that is only read."""
    return run(tmp_path_factory.mktemp("comparison") / "stf", "stf", check)


def test_scores_are_those_of_the_saved_model(stable: tuple[RunFolder, tuple[Score, ...]]) -> None:
    folder, scores = stable
    assert [score.step for score in scores] == [10, 20]
    denoiser = open_model(folder.path).denoiser
    population = Population(torch.from_numpy(open_digits().images))
    found = measure_fit(denoiser, population, LEVELS, rows=1024)
    assert scores[-1].distance == pytest.approx((found.distance.mean / 64).tolist(), rel=1e-4)
    assert scores[1].seconds > scores[0].seconds > 0


def test_the_optimum_of_mirrored_runs_has_the_mirror_images() -> None:
    """The posterior mean over images and mirror images has no distance to it, and that over the images alone has."""
    data = open_digits()
    x = torch.from_numpy(data.images).float() / 127.5 - 1
    optimum = optimum_of(config_of(dataclasses.replace(RECIPE, mirror=True)), data, CPU, rows=48)
    both, alone = (
        optimum.fit(lambda x_t, sigma, *_, pool=pool: sf.posterior(x_t, 1.0, sigma, pool).mean)
        for pool in (torch.cat([x, x.flip(-1)]), x)
    )
    middle = [k for k, level in enumerate(LEVELS) if 1 <= level <= 3]
    assert float(both.distance.mean[middle].max()) < 1e-6 * float(both.floor.mean[middle].max())
    assert float(alone.distance.mean[middle].min()) > 0.1


def test_the_time_before_a_stop_between_two_scores_counts(
    tmp_path: Path, check: SelfCheck, optimum: Optimum, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    monkeypatch.setattr("stablefield.training._scorer.time.perf_counter", lambda: float(next(clock)))
    folder = RunFolder.create(tmp_path / "dsm", config_of(dataclasses.replace(RECIPE, target="dsm")))
    steps = itertools.count(1)
    assert run_one(folder, open_digits(), check, 10, CPU, optimum=optimum, stop=lambda: next(steps) == 15) is None
    (before,) = read_scores(folder.path)
    last = json.loads((folder.path / "scores.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 15
    assert last["seconds"] > before.seconds
    outcome = run_one(folder, open_digits(), check, 10, CPU, optimum=optimum)
    assert outcome is not None
    assert [score.step for score in outcome.scores] == [10, 20]
    assert outcome.scores[-1].seconds > last["seconds"]


@pytest.mark.parametrize("fitted", [False, True], ids=["", "importance sampling"])
def test_gradient_variance_is_that_of_the_gradients_themselves(
    tmp_path: Path, check: SelfCheck, optimum: Optimum, fitted: bool
) -> None:
    data, recipe = open_digits(), dataclasses.replace(RECIPE, importance_sampling=fitted, steps=30 if fitted else 20)
    folder, scores = run(tmp_path / "dsm", "dsm", check, optimum, recipe)
    importance = None
    if fitted:
        importance = sf.ImportanceSampling(recipe.noise_levels, recipe.process)
        importance.load_state_dict(load_file(folder.checkpoint(30) / "importance.safetensors"))
        assert importance.density().min() < 0.8
    model = open_model(folder.path).denoiser.requires_grad_(True)
    x = torch.from_numpy(data.images).float() / 127.5 - 1
    from stablefield.data._index_stream import IndexStream
    from stablefield.training._seeding import Purpose, generator_for

    stream = IndexStream(len(data), recipe.batch, recipe.seed)
    variance = {}
    for name, target in (
        ("dsm", sf.DenoisingTarget(recipe.process)),
        ("stf", sf.StableTarget(recipe.process, references=sf.Pool(torch.from_numpy(data.images)))),
    ):
        objective = sf.Objective(recipe.process, target=target, noise_levels=recipe.noise_levels, importance=importance)
        gradients = []
        for step in range(16):
            index = torch.from_numpy(stream.batch_at(step))
            loss = objective(model, x[index], None, index, generator=generator_for(0, Purpose.OBJECTIVE, step)).loss
            gradients.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))]))
        variance[name] = torch.stack(gradients).double().var(0).sum().item()
    assert scores[-1].gradient_variance == pytest.approx(variance["dsm"], rel=1e-3)
    assert scores[-1].gradient_ratio == pytest.approx(variance["stf"] / variance["dsm"], rel=1e-3)


def test_a_line_cut_off_by_a_kill_is_passed_over_and_a_step_scored_twice_counts_once(tmp_path: Path) -> None:
    score = Score(10, 1.0, tuple(0.0 for _ in LEVELS), 1.0, 0.1, 1.0, 1.0)
    lines = [json.dumps(dataclasses.asdict(dataclasses.replace(score, frechet=f))) for f in (1.0, 2.0)]
    (tmp_path / "scores.jsonl").write_text("\n".join([*lines, lines[0][:20]]))
    assert [found.frechet for found in read_scores(tmp_path)] == [2.0]


def test_a_damaged_last_score_is_made_again_and_not_replaced_by_the_one_before(
    tmp_path: Path, check: SelfCheck, optimum: Optimum, stable: tuple[RunFolder, tuple[Score, ...]]
) -> None:
    folder, scores = RunFolder(Path(shutil.copytree(stable[0].path, tmp_path / "stf"))), stable[1]
    path = folder.path / "scores.jsonl"
    whole = path.read_text().splitlines()
    for last in (whole[1].replace('"step": 20', '"step": 21'), whole[1][:40], '{"step": 20, "distance": "near"}'):
        path.write_text(f"{whole[0]}\n{last}\n")
        assert [score.step for score in read_scores(folder.path)] == [10]
        again = run_one(folder, open_digits(), check, 10, CPU, optimum=optimum)
        assert again is not None
        assert [score.step for score in again.scores] == [10, 20]
        assert again.scores[1].distance == pytest.approx(scores[1].distance, rel=1e-6)
        assert again.scores[1].frechet == pytest.approx(scores[1].frechet, rel=1e-4)


@pytest.mark.parametrize(("steps", "batch"), [(60, 64), (600, 64), (2000, 128), (100_000, 256)])
def test_scoring_takes_no_longer_than_training_as_far_as_can_be(steps: int, batch: int) -> None:
    scoring = plan_scoring(dataclasses.replace(DIGITS, steps=steps, batch=batch), 50_000)
    assert scoring.training == 3 * steps * batch
    # Samples by 18 steps of Heun's method, noisy rows at every level, and 16 gradients of two targets.
    assert scoring.rows == 35 * scoring.samples + 1024 * len(LEVELS) + 2 * 16 * 3 * batch
    least = plan_scoring(dataclasses.replace(DIGITS, steps=1, batch=batch), 50_000)
    assert (least.count, least.samples) == (1, 200)
    assert scoring.count * scoring.rows <= max(scoring.training, least.rows)
    assert 1 <= scoring.count <= 8
    assert 200 <= scoring.samples <= 1000
    if steps == 100_000:
        assert (scoring.count, scoring.samples) == (8, 1000)


def test_evaluations_and_samples_that_are_asked_for_are_kept() -> None:
    short = dataclasses.replace(DIGITS, steps=60)
    assert plan_scoring(short, 50_000, evaluations=3, samples=700).samples == 700
    assert plan_scoring(short, 50_000, evaluations=3).count == 3
    assert plan_scoring(short, 50_000, samples=700).count == 1
    assert plan_scoring(short, 150).samples == 150


@pytest.mark.parametrize(
    ("steps", "wanted", "every", "count"),
    [(100, 60, 2, 50), (100, 8, 13, 8), (10, 4, 3, 4), (10, 6, 2, 5), (60, 3, 20, 3), (4, 9, 1, 4), (7, 1, 7, 1)],
)
def test_there_are_never_more_scores_than_asked_for(steps: int, wanted: int, every: int, count: int) -> None:
    scoring = plan_scoring(dataclasses.replace(DIGITS, steps=steps), 50_000, evaluations=wanted)
    assert (scoring.every, scoring.count) == (every, count)
    # As the loop scores: at every such step, and after the last one.
    assert len({*range(every, steps + 1, every), steps}) == count <= wanted


@pytest.fixture
def cheap_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that make many scores, or of the plan."""
    monkeypatch.setattr("stablefield.training._scorer.GRADIENTS", 2)
    monkeypatch.setattr("stablefield.training._compare._seconds", lambda *_: (0.0, 0.0, 0.0))


@pytest.mark.usefixtures("cheap_scores")
def test_a_comparison_makes_the_scores_that_it_plans_and_a_folder_with_others_is_refused(tmp_path: Path) -> None:
    plans: list[ComparisonPlan] = []

    def scored(out: Path) -> list[list[int]]:
        found = sf.compare(
            open_digits().images[:100], seeds=1, out=out, recipe=RECIPE, steps=10, evaluations=4, samples=40, device="cpu",
            on_start=plans.append,
        )  # fmt: skip
        return [[score.step for score in outcome.scores] for outcome in found.outcomes]

    assert scored(tmp_path / "new") == [[3, 6, 9, 10]] * 2
    assert plans[-1].scoring.count == 4
    config = RunFolder(tmp_path / "new" / "stf-seed0").config()
    assert config.recipe.checkpoint_every == 3
    other = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, target="dsm", checkpoint_every=5))
    RunFolder.create(tmp_path / "other" / "dsm-seed0", other)
    with pytest.raises(ValueError, match="other settings"):
        scored(tmp_path / "other")


@pytest.mark.usefixtures("cheap_scores")
def test_scores_of_other_settings_and_of_unknown_ones_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "c"
    options = {"seeds": 1, "out": out, "recipe": RECIPE, "steps": 2, "evaluations": 1, "device": "cpu"}
    images = open_digits().images[:100]
    first = sf.compare(images, **options, samples=60)
    record = json.loads((out / "stf-seed0" / "scoring.json").read_text())
    assert (record["extractor"], record["samples"]) == ("pixels", 60)
    lines = (out / "stf-seed0" / "scores.jsonl").read_text()
    for others, words in (
        ({"samples": 50}, r"samples 60 there, 50 here\. Pass another out=FOLDER"),
        (
            {"samples": 60, "extractor": RandomConvolutions()},
            r"dsm-seed0 holds scores of other settings: extractor pixels there, random convolutions \(seed 0\) here; sha256",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            sf.compare(images, **options, **others)
    # A run without a score yet takes any settings, but the others of its comparison do not.
    (out / "stf-seed0" / "scores.jsonl").unlink()
    with pytest.raises(ValueError, match="dsm-seed0 holds scores of other settings"):
        sf.compare(images, **options, samples=50)
    (out / "stf-seed0" / "scores.jsonl").write_text(lines)
    again = sf.compare(images, **options, samples=60)
    assert [o.scores for o in again.outcomes] == [o.scores for o in first.outcomes]
    assert again.protocol == first.protocol
    (where,) = again.protocol["environments"]
    assert where["torch"] == torch.__version__
    assert "do not compare" not in again.summary
    with (out / "dsm-seed0" / "environment.jsonl").open("a") as file:
        file.write(json.dumps(where | {"step": 1, "started": "later", "device": "another machine"}) + "\n")
    moved = sf.compare(images, **options, samples=60)
    assert [place["device"] for place in moved.protocol["environments"]] == [where["device"], "another machine"]
    assert "so their times do not compare" in moved.summary
    (out / "stf-seed0" / "scoring.json").unlink()
    with pytest.raises(ValueError, match=r"scoring.json cannot be used: .*No such file.*pass another out=FOLDER"):
        sf.compare(images, **options, samples=60)
    (out / "dsm-seed0" / "scoring.json").write_text("{")
    with pytest.raises(ValueError, match=r"scoring.json cannot be used: .*pass another out=FOLDER"):
        sf.compare(images, **options, samples=60)


@pytest.mark.usefixtures("cheap_scores", "without_charts")
def test_the_command_refuses_to_show_scores_under_the_name_of_another_extractor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c"
    flags = ("--seeds", "0", "--steps", "2", "--evaluations", "1", "--samples", "60", *FLAGS[6:], "--out", str(out))
    assert status("compare", "digits", *flags) == 0
    capsys.readouterr()
    assert status("compare", "digits", *flags, "--extractor", "random") == 2
    told = capsys.readouterr().err
    assert "extractor pixels there, random convolutions (seed 0) here" in told
    assert "another --out FOLDER" in told


@pytest.mark.usefixtures("cheap_scores")
def test_pictures_are_in_the_order_of_the_classes_that_have_images(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, conditional=True)
    digits = open_digits()
    images, labels = digits.images[:100], digits.labels[:100] + 1  # so that class 0 has none
    options = {"seeds": 1, "recipe": recipe, "steps": 2, "evaluations": 1, "samples": 40, "device": "cpu"}
    with pytest.warns(UserWarning, match="^images: Class 0 has no images"):
        outcome = sf.compare(images, labels=labels, out=tmp_path, **options).outcomes[0]
    drawn = sf.Run(outcome.folder).sample(20, device="cpu")
    order = np.argsort(drawn.labels, kind="stable")
    assert drawn.labels[order].tolist() == sorted([*range(1, 11)] * 2)
    found = samples_of(outcome, range(20), torch.device("cpu"))
    assert np.abs(found.astype(int) - drawn.images[order]).max() <= 1


@pytest.mark.usefixtures("cheap_scores")
def test_finished_runs_on_other_labels_are_refused(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, conditional=True)
    options = {"seeds": 1, "out": tmp_path, "recipe": recipe, "steps": 2, "evaluations": 1, "samples": 40}
    digits = open_digits()
    assert digits.labels is not None
    images, labels = digits.images[:100], digits.labels[:100]
    sf.compare(images, labels=labels, **options, device="cpu")
    with pytest.raises(ValueError, match="its labels' sha256 differs"):
        sf.compare(images, labels=labels[::-1].copy(), **options, device="cpu")


def test_a_spread_is_the_standard_error_over_seeds_and_one_seed_has_none() -> None:
    found = spread([0.1, 0.2, 0.6])
    assert (found.mean, found.least, found.most) == (pytest.approx(0.3), 0.1, 0.6)
    assert found.error == pytest.approx((0.07 / 3) ** 0.5)
    assert spread([0.4]).error is None
    with pytest.raises(ValueError, match="values are empty"):
        spread([])


def outcomes_of(gains: Sequence[float], frechet: Sequence[float]) -> list[Outcome]:
    """Runs of both targets whose distances at middle noise levels differ by these shares."""
    found: list[Outcome] = []
    for seed, (gain, value) in enumerate(zip(gains, frechet, strict=True)):
        for target, distance in (("dsm", 1.0), ("stf", 1.0 - gain)):
            score = Score(9, 5.0, (distance,) * len(LEVELS), value, 0.1, 1.0, 1.0)
            found.append(Outcome(target, seed, (score,), Path("run")))
    return found


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        # Standard errors over seeds, by hand: half the difference of two.
        ([0.0312, 0.0330], "in 2 of 2 seeds, by 3.21% ± 0.09% on average (3.12% to 3.30%);"),
        ([0.20, 0.30], "in 2 of 2 seeds, by 25.0% ± 5.0% on average (20.0% to 30.0%);"),
        ([0.05, 0.45], "in 2 of 2 seeds, by 25% ± 20% on average (5% to 45%);"),
        ([-0.0004, 0.0002], "in 1 of 2 seeds, by -0.01% ± 0.03% on average (-0.04% to 0.02%);"),
        ([0.03, 0.03], "in 2 of 2 seeds, by 3.00% ± less than 0.01% on average (3.00% to 3.00%);"),
        ([0.031], "in 1 of 1 seed, by 3.1%;"),
        ([-0.0001], "in 0 of 1 seed, by 0.0%;"),
    ],
)
def test_the_headline_gives_the_spread_the_digits_that_it_has(gains: list[float], said: str) -> None:
    told = summary(outcomes_of(gains, [2.0] * len(gains)), range(len(gains)), "FD")
    assert said in told
    assert "± 0%" not in told
    assert "-0%" not in told
    one = len(gains) == 1
    assert ("±" in told) != one
    assert ("One seed shows no spread: pass more, such as 0, 1, 2." in told) == one
    assert ("± is the standard error over" in told) != one


def test_small_numbers_of_a_comparison_are_shown_with_their_digits() -> None:
    outcomes = outcomes_of([0.0030, 0.0045], [2.394e-6, 1.772e-6])
    outcomes = [
        dataclasses.replace(
            o, scores=(dataclasses.replace(o.last, distance=(2e-5,) * len(LEVELS), frechet_error=5.4e-7),)
        )
        for o in outcomes
    ]
    compared = Comparison(
        data_name="x", outcomes=tuple(outcomes), frechet_name="FD", protocol={}, command="", device=torch.device("cpu")
    )
    _, rows = compared.rows()
    assert [row[1:3] for row in rows] == [("2.00·10⁻⁵", "2.00·10⁻⁵")] * 2
    assert [row[4] for row in rows] == ["2.39·10⁻⁶ ± 5.4·10⁻⁷", "1.77·10⁻⁶ ± 5.4·10⁻⁷"]
    # Mean and standard error over the seeds: half the difference of the two.
    said = summary(outcomes_of([0.0030, 0.0045], [2.394e-6, 1.772e-6]), range(2), "FD")
    assert "2.08·10⁻⁶ ± 3.1·10⁻⁷ against 2.08·10⁻⁶ ± 3.1·10⁻⁷." in said
    assert gain_texts([0.1, float("nan")])[0].startswith("nan%")
    outcomes = outcomes_of([0.0030, 0.0046], [1.0, 1.0])
    with empty_charts():
        page = comparison_page("x", "x", outcomes, [], {"steps": 9}, "FD", "x")
    figures = next(block for block in page.blocks if isinstance(block, KeyFigures)).figures
    assert figures[0].value == "0.38% ± 0.08%"
    assert figures[0].note.endswith("0.30% to 0.46% over seeds")


@pytest.mark.usefixtures("without_charts")
def test_all_runs_of_a_comparison_share_one_pass_for_the_posterior_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passes: list[int] = []

    class Counted(ExactPosterior):
        def __call__(self, x_t: torch.Tensor, *others: torch.Tensor) -> Exact:
            passes.append(len(x_t))
            return super().__call__(x_t, *others)

    monkeypatch.setattr(fit, "ExactPosterior", Counted)
    flags = ("--steps", "4", "--evaluations", "1", "--samples", "60", *FLAGS[6:])
    assert status("compare", "digits", "--seeds", "0,1", *flags, "--out", str(tmp_path / "c")) == 0
    # Once for all runs; a few rows told before how long it takes.
    assert sum(passes) == (16 + 16 + 128 + 1024) * len(LEVELS)
    text = " ".join(capsys.readouterr().out.split())
    foretold = re.search(
        r"takes about (\d+ s|\d+ min \d+ s) from here: .* of scoring \(once in each run, on 60 samples\)", text
    )
    assert foretold is not None
    assert foretold.start() < text.index("distance DSM")
    headline = re.search(
        r"in \d of 2 seeds, by (-?[\d.]+)% ± (?:less than )?([\d.]+)% on average \((-?[\d.]+)% to (-?[\d.]+)%\)", text
    )
    assert headline is not None
    mean, _, least, most = map(float, headline.groups())
    assert least <= mean <= most
    assert "± is the standard error over 2 seeds" in text


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    code = exit_.value.code
    assert isinstance(code, int)
    return code


def frechet_of_evaluate(path: Path, check: SelfCheck) -> float:
    """The Frechet distance of the samples that `stablefield evaluate` draws from a run."""
    source = RunSource(sf.Run(path).sampler(device="cpu"), "run", len(check.seeds))
    images = torch.cat([part for part, _ in source.batches(0, Ranks(), None)])
    return check.read(lambda seeds: images[torch.tensor(seeds)]).value


@pytest.mark.usefixtures("cheap_scores")
def test_scores_of_a_conditional_run_measure_the_classes_that_evaluate_draws(tmp_path: Path, check: SelfCheck) -> None:
    recipe = dataclasses.replace(RECIPE, conditional=True, label_dropout=0.0, learning_rate=0.02, steps=40)
    folder, scores = run(tmp_path / "run", "dsm", check, recipe=recipe)
    assert scores[-1].frechet == pytest.approx(frechet_of_evaluate(folder.path, check), rel=1e-4)


def test_a_conditional_run_measures_itself_on_the_classes_that_evaluate_draws(tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ("--network.width", "32", "--network.depth", "1", "--sample-every", "0")
    conditional = ("--conditional", "--label-dropout", "0", "--learning-rate", "0.02", "--ramp-images", "500")
    measure = ("--evaluate-every", "40", "--evaluate-samples", "100", "--extractor", "pixels")
    assert status("train", "digits", "--steps", "40", *flags, *conditional, *measure, "--out", str(out)) == 0
    measured = [entry["frechet"] for entry in RunFolder(out).metrics() if "frechet" in entry]
    check = SelfCheck.prepare(open_digits(), RawPixels((1, 8, 8)), samples=100)
    assert measured[-1] == pytest.approx(frechet_of_evaluate(out, check), rel=1e-4)


def test_runs_with_mirror_images_have_the_floor_of_a_perfect_model_of_them(tmp_path: Path) -> None:
    floor = SelfCheck.prepare(open_digits(), RawPixels((1, 8, 8)), samples=60, mirrored=True).floor
    flags = ("--network.width", "32", "--network.depth", "1", "--sample-every", "0", "--steps", "2", "--mirror")
    measure = ("--evaluate-every", "2", "--evaluate-samples", "60", "--extractor", "pixels")
    assert status("train", "digits", *flags, *measure, "--out", str(tmp_path / "run")) == 0
    assert list(RunFolder(tmp_path / "run").metrics())[-1]["frechet_floor"] == pytest.approx(floor, rel=1e-6)
    recipe = dataclasses.replace(RECIPE, mirror=True, steps=2)
    compared = sf.compare("digits", seeds=1, out=tmp_path / "compare", recipe=recipe, evaluations=1, samples=60)
    assert compared.protocol["frechet"]["floor"] == pytest.approx(floor, rel=1e-6)


@pytest.mark.slow
def test_compare_trains_reports_and_goes_on_without_doing_anything_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "compare"
    command = ("compare", "digits", "--seeds", "0,1", *FLAGS, "--out", str(out))
    assert status(*command) == 0
    text = capsys.readouterr().out
    assert "of 2 seeds" in text
    record = json.loads((out / "comparison.json").read_text())
    assert [(r["target"], r["seed"]) for r in record["runs"]] == [("dsm", 0), ("stf", 0), ("dsm", 1), ("stf", 1)]
    page = (out / "report.html").read_text()
    assert "gradient variance STF / DSM" in page
    assert len((out / "comparison.csv").read_text().splitlines()) == 1 + 4 * 2
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    with empty_charts():
        assert status(*command) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before
    assert json.loads((out / "comparison.json").read_text())["runs"] == record["runs"]
    # Both runs of a seed began alike: the same weights, rows and noise.
    first = [json.loads((out / f"{t}-seed0" / "config.json").read_text())["recipe"] for t in ("dsm", "stf")]
    assert {**first[0], "target": ""} == {**first[1], "target": ""}
    assert status(*command[:-2], "--batch", "32", "--out", str(out)) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [(("--seeds", "0,0"), "every seed once"), (("--seeds", "a"), "0,1,2"), (("--evaluations", "0"), "--evaluations")],
)
def test_wrong_use_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: str
) -> None:
    assert status("compare", "digits", *FLAGS, *flags, "--out", str(tmp_path / "c")) == 2
    assert words in capsys.readouterr().err


def test_a_run_can_measure_itself_and_says_how_noisy_that_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    flags = ("--network.width", "32", "--network.depth", "1", "--sample-every", "0", "--log-every", "2")
    measure = ("--evaluate-every", "2", "--evaluate-samples", "60", "--extractor", "pixels")
    assert status("train", "digits", "--steps", "4", *flags, *measure, "--out", str(out)) == 0
    text = capsys.readouterr().out
    assert "on 60 samples (as many real images:" in text
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "frechet" in entry] == [2, 4]
    assert all(entry["frechet_error"] > 0 for entry in entries if "frechet" in entry)
