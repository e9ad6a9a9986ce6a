"""A step is a function of (seed, step): not of parts, processes, or where the references lie."""

import dataclasses
import itertools
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import stablefield as sf
from forks import Server, group_of
from stablefield.data._digits import open_digits
from stablefield.data._image_set import ImageSet, Origin, make_image_set
from stablefield.diffusion._noise_levels import LogNormal
from stablefield.diffusion._objective import Draws
from stablefield.training import _target_blocks
from stablefield.training._allocator import keep_freed_memory
from stablefield.training._cuda_graph import _layout, _tensors, mapped
from stablefield.training._estimate import estimate_run
from stablefield.training._feed import Feed
from stablefield.training._loop import _Loop, fit
from stablefield.training._meter import BINS, Meter, Stopwatch, bin_edges
from stablefield.training._recipe import MLPConfig, Recipe, SongUNetConfig
from stablefield.training._recipes import CIFAR10_EDM, DIGITS
from stablefield.training._run_config import RunConfig
from stablefield.training._run_folder import RunFolder
from stablefield.training._stepper import Stepper
from stablefield.training._target_blocks import band_capacity, steps_together

CPU = torch.device("cpu")
SMALL = dataclasses.replace(
    DIGITS,
    references="all",
    noise_band=0.0,
    steps=12,
    batch=36,
    network=MLPConfig(width=32, depth=1),
    noise_levels=LogNormal(),
)
TINY_UNET = SongUNetConfig(base_channels=8, multipliers=(1,), blocks=1, dropout=0.0)


PAIRS = {"draws_per_image": 2, "antithetic": True, "noise_levels": sf.LogNormal(stratified=True)}
"""The levers of a batch's variance."""


def configured(recipe: Recipe, data: ImageSet) -> RunConfig:
    classes = data.classes if recipe.conditional else 0
    return RunConfig(
        data="digits", shape=data.shape, classes=classes, manifest=data.manifest, recipe=recipe, version="test"
    )


def stepper(recipe: Recipe, data: ImageSet) -> Stepper:
    config = configured(recipe, data)
    feed = Feed(data, recipe, CPU, labelled=config.classes > 0, placement="resident")
    return Stepper(config, feed, Accelerator(cpu=True))


def losses(recipe: Recipe, data: ImageSet, steps: int = 6) -> list[float]:
    found = stepper(recipe, data)
    totals = []
    for step in range(steps):
        parts = found.take(step)
        totals.append(sum(float(part.row_loss.detach().sum()) for part in parts) / recipe.batch)
    return totals


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return open_digits()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"references": 64},
        {"conditional": True},
        {"target": "dsm"},
        {"network": TINY_UNET, "augmentation": 0.3},
        PAIRS,
        {**PAIRS, "draws_per_image": 4, "network": TINY_UNET, "augmentation": 0.3, "conditional": True},
        {**PAIRS, "references": 20, "mirror": True, "network": TINY_UNET},
    ],
)
def test_losses_do_not_depend_on_the_parts_of_a_step(digits: ImageSet, change: dict[str, object]) -> None:
    recipe = dataclasses.replace(SMALL, **change)
    whole = losses(recipe, digits, 3)
    for parts in (2, 5):
        assert losses(dataclasses.replace(recipe, gradient_accumulation_steps=parts), digits, 3) == pytest.approx(
            whole, rel=1e-4
        )


SOME = LogNormal().quantile(torch.tensor([0.9], dtype=torch.float64), sf.EDM()).item()
"""A noise band with a tenth of the rows."""


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"conditional": True, "label_dropout": 0.3},
        {"network": TINY_UNET, "augmentation": 0.3, "gradient_accumulation_steps": 5},
        {**PAIRS, "mirror": True},
    ],
)
def test_targets_of_several_steps_in_one_call_are_those_of_each(
    digits: ImageSet, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(SMALL, noise_band=SOME, **change)
    calls = list[int]()
    call = sf.StableTarget.__call__

    def counted(target: sf.StableTarget, x0: torch.Tensor, *given: object, **more: object) -> sf.Target:
        calls.append(len(x0))
        return call(target, x0, *given, **more)

    monkeypatch.setattr(sf.StableTarget, "__call__", counted)
    together = stepper(recipe, digits)
    assert together.steps_together == 16  # of 3.6 rows each
    found = [part for step in range(20) for part in together.examples(step)]
    assert calls == [16 * 36, 16 * 36]
    with monkeypatch.context() as patch:
        patch.setattr(_target_blocks, "_STEPS", 1)
        one = stepper(recipe, digits)
    alone = [part for step in range(20) for part in one.examples(step)]
    parts = recipe.gradient_accumulation_steps
    assert len(calls) == 2 + 20 * parts
    assert len(found) == len(alone) == 20 * parts
    removed = 0.0
    for (example, augment_labels), (expected, expected_labels) in zip(found, alone, strict=True):
        for name in "x", "noise_level", "seen":
            value = getattr(expected, name)
            assert getattr(example, name) is None if value is None else torch.equal(getattr(example, name), value)
        assert augment_labels is None if expected_labels is None else torch.equal(augment_labels, expected_labels)
        for name in "x0", "variance", "source_weight":
            torch.testing.assert_close(
                getattr(example.target, name), getattr(expected.target, name), rtol=1e-4, atol=1e-5
            )
        removed += float(example.target.variance.sum())
    assert removed > 0
    # A resumed run begins within a block, with the same bits.
    resumed = stepper(recipe, digits)
    for step in 13, 18:
        for (example, _), (expected, _) in zip(
            resumed.examples(step), found[parts * step : parts * (step + 1)], strict=True
        ):
            assert torch.equal(example.target.x0, expected.target.x0)
            assert torch.equal(example.x, expected.x)


def test_so_many_steps_share_a_call_that_64_rows_are_in_the_band(digits: ImageSet) -> None:
    def steps(shape: tuple[int, ...] = (1, 8, 8), device: torch.device = CPU, **change: object) -> int:
        recipe = dataclasses.replace(SMALL, **{"noise_band": SOME, **change})
        feed = Feed(digits, recipe, CPU, labelled=False, placement="resident")
        return steps_together(recipe, shape, device, feed)

    assert steps(batch=128) == 5  # 12.8 rows each
    assert steps(batch=640) == steps(batch=36, noise_band=0.0, shape=(1, 600, 600)) == 1
    assert steps(batch=36, noise_band=0.0) == 2
    # At most 32 MiB of float32 rows.
    assert steps(batch=64, shape=(3, 128, 128)) == 2
    # Where there is nothing to gain, or what is drawn depends on the steps before.
    assert steps(target="dsm") == steps(references=64) == steps(importance_sampling=True) == 1
    assert steps(device=torch.device("cuda")) == 1


def delay_targets_and_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which a call of the stable target takes 8 s, one of the network 1 s, and all else nothing."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def delay(kind: type, name: str, seconds: float) -> None:
        call = getattr(kind, name)

        def delayed(*given: object, **more: object) -> object:
            now[0] += seconds
            return call(*given, **more)

        monkeypatch.setattr(kind, name, delayed)

    delay(sf.StableTarget, "__call__", 8.0)
    delay(sf.networks.MLP, "forward", 1.0)


@pytest.mark.parametrize("stopped", [0, 6, 21])
def test_each_step_has_its_share_of_a_target_for_several_in_the_log_and_the_reports(
    digits: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: int
) -> None:
    delay_targets_and_networks(monkeypatch)
    recipe = dataclasses.replace(SMALL, noise_band=SOME, steps=40, log_every=3, sample_every=0, ramp_images=0)
    shown: list[sf.training.Report] = []
    more = {"progress": shown.append, "every": 1, "device": "cpu"}
    taken = itertools.count(1)
    run = sf.train(digits, out=tmp_path / "run", recipe=recipe, stop=lambda: next(taken) == stopped, **more)
    if stopped:
        run.resume(data=digits, **more)
    lines = run.metrics()
    assert [report.step for report in shown] == list(range(1, 41))
    # A block of 16 steps takes 8 s, and the network a second for each step; a resumed block is for the rest of its steps.
    for step, report in enumerate(shown):
        rest = 16 - stopped % 16 if stopped and stopped <= step < stopped + 16 - stopped % 16 else 16
        assert report.images_per_second == pytest.approx(recipe.batch / (1 + 8 / rest))
        assert report.target_share == pytest.approx(8 / rest / (1 + 8 / rest))
    if not stopped:
        assert [line["target_share"] for line in lines] == pytest.approx([1 / 3] * 14)
        assert [line["images_per_second"] for line in lines] == pytest.approx([recipe.batch / 1.5] * 14)


def test_the_trial_of_a_step_has_its_share_of_a_target_for_several(
    digits: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    delay_targets_and_networks(monkeypatch)
    for change, target in ({}, 8 / 16), ({"references": 64}, 8.0):
        recipe = dataclasses.replace(SMALL, noise_band=SOME, **change)
        found = estimate_run(configured(recipe, digits), digits, CPU)
        assert found.target_seconds == pytest.approx(target)
        assert found.seconds_per_step == pytest.approx(1 + target)


def test_the_draws_of_an_image_are_rows_beside_each_other(digits: ImageSet) -> None:
    recipe = dataclasses.replace(SMALL, mirror=True, network=TINY_UNET, **PAIRS)
    ((example, _),) = stepper(recipe, digits).examples(3)
    x, level = example.x, example.noise_level
    assert len(x) == 36
    assert torch.equal(level[::2], level[1::2])
    clean = (x[::2] + x[1::2]).double() / 2  # the noise cancels
    pixels = torch.from_numpy(digits.images).double() / 127.5 - 1
    both = torch.cat([pixels, pixels.flip(-1)]).flatten(1)
    # Up to float32's rounding of the noise.
    assert float((torch.cdist(clean.flatten(1), both).amin(1) / level[::2]).max()) < 1e-4
    places = torch.cdist(clean.flatten(1), both).argmin(1) % len(pixels)
    assert len(places.unique()) == recipe.images_per_step == 18


def test_an_epoch_of_several_draws_per_image_deals_every_image_once(digits: ImageSet) -> None:
    recipe = dataclasses.replace(SMALL, draws_per_image=4)
    feed = Feed(digits, recipe, CPU, labelled=False, placement="resident")
    seen = torch.cat([feed.rows(step, slice(None)).index for step in range(len(digits) // 9)])
    assert len(seen) == 4 * (len(digits) // 9) * 9
    assert set(seen.unique(return_counts=True)[1].tolist()) == {4}


def test_more_parts_than_rows_leave_none_out(digits: ImageSet) -> None:
    recipe = dataclasses.replace(SMALL, batch=3, gradient_accumulation_steps=5)
    assert losses(recipe, digits, 3) == pytest.approx(
        losses(dataclasses.replace(recipe, gradient_accumulation_steps=1), digits, 3), rel=1e-4
    )


TRAIN = """
import sys
from pathlib import Path
import torch
from stablefield._distributed import Ranks
from stablefield.data._digits import open_digits
from stablefield.training._loop import _Loop, fit
from stablefield.training._run_folder import RunFolder

_Loop._picture = lambda *_: None  # it would take longer than the steps
data = open_digits()
with Ranks.launched():
    for run in map(RunFolder, map(Path, sys.argv[1:])):
        fit(run, run.config(), data, device=torch.device("cpu"))
"""
FOLLOWED = [
    {},
    {"references": 64, "gradient_accumulation_steps": 2},
    {"references": "sharded", "gradient_accumulation_steps": 2},
    {"references": "sharded", "conditional": True, "label_dropout": 0.3, "noise_band": 0.5},
    {"references": "sharded", "network": TINY_UNET, "augmentation": 0.3},
    {"references": "sharded", "network": TINY_UNET, "mirror": True, **PAIRS},
    {"references": "sharded", "network": TINY_UNET, "mirror": True},
    {"importance_sampling": True, "gradient_accumulation_steps": 2, **PAIRS},
]


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory, digits: ImageSet, fork_server: Server) -> list[list[Path]]:
    """Each run of one process and of two; the same two train all of them, since to start takes them longer than a run."""
    recipes = [dataclasses.replace(SMALL, log_every=1, sample_every=0, **change) for change in FOLLOWED]
    place = tmp_path_factory.mktemp("followed")
    ones, twos = (
        [RunFolder.create(place / f"{name}-{k}", configured(recipe, digits)) for k, recipe in enumerate(recipes)]
        for name in ("one", "two")
    )
    ranks = [fork_server.start(TRAIN, [str(run.path) for run in twos], None, rank) for rank in group_of(2)]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_Loop, "_picture", lambda *_: None)
            for run in ones:
                fit(run, run.config(), digits, device=CPU)
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr[-3000:]
    finally:
        for rank in ranks:
            rank.kill()
    return [[one.path, two.path] for one, two in zip(ones, twos, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("change", FOLLOWED, ids=str)
def test_two_processes_follow_the_losses_of_one(followed: list[list[Path]], change: dict[str, object]) -> None:
    paths = followed[FOLLOWED.index(change)]
    read = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in paths]
    assert [entry["step"] for entry in read[1]] == list(range(1, 13))
    for key in ("loss", "variance_removed"):
        assert [e[key] for e in read[1]] == pytest.approx([e[key] for e in read[0]], rel=2e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("change", [{}, {"network": TINY_UNET, "augmentation": 0.3}], ids=["perceptron", "unet"])
def test_compiled_networks_have_the_losses_of_plain_ones(digits: ImageSet, change: dict[str, object]) -> None:
    recipe = dataclasses.replace(SMALL, **change)
    assert losses(dataclasses.replace(recipe, compile=True), digits, 4) == pytest.approx(
        losses(recipe, digits, 4), rel=1e-4
    )


def test_rows_with_an_augmentation_of_their_own_use_their_source_alone(digits: ImageSet) -> None:
    # Every row is shifted: nothing is left of the references, and the run is that of the single sample, bit for bit.
    recipe = dataclasses.replace(SMALL, network=TINY_UNET, augmentation=1.0)
    stable, single = (losses(dataclasses.replace(recipe, target=target), digits, 3) for target in ("stf", "dsm"))
    assert stable == single


@pytest.mark.parametrize("change", [{"mirror": True}, {"augmentation": 0.1, "network": TINY_UNET}])
def test_loss_plus_variance_removed_is_the_single_sample_loss_under_augmentation(
    digits: ImageSet, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(SMALL, batch=128, learning_rate=1e-12, **change)
    sums = {}
    for target in ("stf", "dsm"):
        found = stepper(dataclasses.replace(recipe, target=target), digits)
        # Gradients would take most of the time, for a network that stays as it is.
        monkeypatch.setattr(found._accelerator, "backward", lambda _: None)
        with torch.no_grad():
            parts = [part for step in range(40) for part in found.take(step)]
        sums[target] = [
            torch.cat([getattr(p, name) for p in parts]).mean().item() for name in ("row_loss", "variance_removed")
        ]
    gap = sums["dsm"][0] - sums["stf"][0]
    assert sums["dsm"][1] == 0
    assert gap == pytest.approx(sums["stf"][1], rel=0.2)


def test_mirrored_data_are_seen_from_both_sides() -> None:
    # One asymmetric image: at enormous noise the target is the mean of it and its mirror image.
    pixels = np.zeros((1, 1, 8, 8), np.uint8)
    pixels[..., :4] = 255
    data = make_image_set(pixels, None, Origin(name="one", source="made up"))
    recipe = dataclasses.replace(
        SMALL, batch=1, mirror=True, network=TINY_UNET, noise_levels=sf.LogUniform(900.0, 1000.0)
    )
    found = stepper(recipe, data)
    removed = [found.take(step)[0].variance_removed for step in range(8)]
    level = sf.EDMWeighting()(torch.tensor(950.0))
    # Half of the squared distance of the two, per dimension, weighted: each value is +-1 with equal weights.
    assert torch.cat(removed).mean().item() == pytest.approx(float(level), rel=0.01)


def test_bf16_networks_train_with_losses_and_weights_in_float32(digits: ImageSet) -> None:
    recipe = dataclasses.replace(SMALL, network=TINY_UNET)
    found = stepper(dataclasses.replace(recipe, precision="bf16"), digits)
    value = found.take(0)[0]
    assert value.row_loss.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in found.trained.model.parameters())
    exact = stepper(recipe, digits).take(0)[0].row_loss
    assert torch.allclose(value.row_loss, exact, rtol=0.05, atol=0.05)


def test_bins_are_equally_probable_and_sum_to_the_whole() -> None:
    process, levels = sf.EDM(), sf.LogNormal()
    edges = bin_edges(levels, process)
    assert len(edges) == BINS - 1
    drawn = process.noise_level(levels.sample(process, 80_000, torch.Generator().manual_seed(0)))
    counts = torch.bincount(torch.bucketize(drawn, torch.tensor(edges)), minlength=BINS)
    assert (counts - 10_000).abs().max() < 500
    meter = Meter(edges, CPU, Stopwatch(CPU))
    rows = torch.rand(1000, generator=torch.Generator().manual_seed(1))
    value = sf.ObjectiveValue(rows.mean(), rows, drawn[:1000], 2 * rows)
    meter.step([value, value], 2000)
    report = meter.report(5)
    assert report.loss == pytest.approx(float(rows.mean()), rel=1e-5)
    assert report.variance_removed == pytest.approx(2 * float(rows.mean()), rel=1e-5)
    assert report.share_removed == pytest.approx(2 / 3, rel=1e-5)
    inside = drawn[:1000] < edges[0]
    assert report.bin_loss[0] == pytest.approx(float(rows[inside].mean()), rel=1e-5)


@pytest.mark.timed
@pytest.mark.slow
def test_the_loop_itself_costs_under_5_percent_of_a_step_of_5_million_parameters() -> None:
    keep_freed_memory()  # as the command does
    pixels = np.random.default_rng(0).integers(0, 256, (64, 3, 32, 32), dtype=np.uint8)
    data = make_image_set(pixels, None, Origin(name="noise", source="made up"))
    network = SongUNetConfig(base_channels=64, multipliers=(1, 2, 2), blocks=1, dropout=0.0)
    recipe = dataclasses.replace(SMALL, batch=16, network=network)
    found = stepper(recipe, data)
    meter = Meter(bin_edges(recipe.noise_levels, recipe.process), CPU, found.target_watch)
    count = sum(p.numel() for p in found.trained.model.parameters())
    assert 4_000_000 < count < 7_000_000
    found.take(0)
    network_time = 0.0
    original = found._accelerator.backward
    evaluate = sf.Objective.evaluate

    def timed(function):
        def run(*arguments, **keywords):
            nonlocal network_time
            began = time.perf_counter()
            result = function(*arguments, **keywords)
            network_time += time.perf_counter() - began
            return result

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(found._accelerator, "backward", timed(original))
        patch.setattr(sf.Objective, "evaluate", timed(evaluate))
        patch.setattr(found.trained.optimizer, "step", timed(found.trained.optimizer.step))
        began = time.perf_counter()
        for step in range(1, 4):
            meter.step(found.take(step), recipe.batch)
            meter.report(step)
        whole = time.perf_counter() - began
    assert 0 < whole - network_time < 0.05 * whole


@pytest.mark.parametrize("levers", [{}, {"draws_per_image": 2, "antithetic": True}], ids=["", "pairs"])
@pytest.mark.parametrize(("batch", "parts"), [(512, 1), (128, 1), (128, 4), (16, 1)])
def test_a_recorded_target_has_room_for_every_row_of_the_noise_band(
    batch: int, parts: int, levers: dict[str, object]
) -> None:
    recipe = dataclasses.replace(
        CIFAR10_EDM, batch=batch, gradient_accumulation_steps=parts, noise_band=2.5, augmentation=0.0, **levers
    )
    capacity = band_capacity(recipe)
    rows = batch // parts
    pairs = 2 if levers else 1
    # ln sigma ~ N(-1.2, 1.2^2): the share of the rows in the band, and the chance of more than the capacity, exactly.
    share = 0.5 * math.erfc((math.log(2.5) + 1.2) / 1.2 / math.sqrt(2))
    count, room = rows // pairs, (rows if capacity is None else capacity) // pairs
    beyond = sum(math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(room + 1, count + 1))
    assert beyond < 1e-7
    assert capacity is None or capacity < rows
    assert batch < 512 or levers or capacity == 48  # of 512, 20 are expected


def test_a_recorded_target_without_a_band_computes_all_rows() -> None:
    assert band_capacity(dataclasses.replace(CIFAR10_EDM, noise_band=0.0)) is None
    assert band_capacity(dataclasses.replace(CIFAR10_EDM, noise_band=1e9)) == 8


def test_the_tensors_of_an_example_are_found_and_changed_wherever_they_are() -> None:
    t = torch.arange(3.0)
    draws = Draws(t, t + 1, None, t + 2)
    found = mapped(lambda tensor: tensor * 2, (draws, None, (t, sf.EDM())))
    assert draws.weight is not None
    assert torch.equal(found[0].weight, 2 * draws.weight)
    assert found[0].hidden is None
    assert found[1] is None
    assert torch.equal(found[2][0], 2 * t)
    assert found[2][1] == sf.EDM()
    assert [value.tolist() for value in _tensors((draws, None, (t, sf.EDM())))] == [
        value.tolist() for value in (t, t + 1, t + 2, t)
    ]
    assert _layout((draws, None)) != _layout((dataclasses.replace(draws, weight=None), None))
