"""The race is fair: every runner's loss and sampler agree with exact solutions, and the time given is kept."""

import dataclasses
import importlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

import stablefield as sf

pytest.importorskip("diffusers")
pytest.importorskip("torchcfm")
pytest.importorskip("scipy")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
race, runners = importlib.import_module("race"), importlib.import_module("runners")
sys.path.remove(str(ROOT / "benchmarks"))

MEAN, SPREAD = 0.1, 0.25
SHAPE = (1, 4, 4)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the race trains: the processor time of several threads contains their waits for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The label of a time: a number of order one, or for packages with time steps, these.
CASES = [(name, False) for name in runners.RUNNERS] + [
    (name, True) for name in (*runners.PEERS, *runners.FLOWS, "ours-steps") if name not in ("edm", "immiscible")
]


class Exact(nn.Module):
    """The best network for pixels that are N(mean, spread^2) each, and a line through its output.

    What it is given and what it returns follow the papers' formulas, with alpha and sigma recovered from the label.
    """

    def __init__(self, runner: str, mean: float, spread: float, *, timesteps: bool) -> None:
        super().__init__()
        self.runner, self.mean, self.spread, self.timesteps = runner, mean, spread, timesteps
        self.slope, self.shift = 1.0, 0.0
        steps = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
        # Nichol and Dhariwal, "Improved denoising diffusion probabilistic models", equation 17, with betas of at most 0.999.
        curve = torch.cos((torch.cat([torch.zeros(1), steps]) + 0.008) / 1.008 * math.pi / 2).square()
        self.signal = torch.cumprod(1 - (1 - curve[1:] / curve[:-1]).clamp(max=0.999), 0).sqrt()

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        x, label = x.double(), label.double()[:, None, None, None]
        if self.runner in runners.LEVERS or self.runner == "immiscible":
            numbered = self.runner == "ours-steps" and self.timesteps
            # From ln(0.002) / 4 to ln(81) / 4.
            out = self._edm(x, torch.exp(4 * (label / 999 * 2.65 - 1.55) if numbered else 4 * label))
        elif self.runner.startswith("torchcfm") or self.runner in runners.FLOWS:
            t = label / 999 if self.timesteps else (label + 1) / 2
            data, noise = self._expected(x, t, 1 - t)
            out = data - noise
        else:
            steps = self.timesteps
            alpha = self.signal[label.round().long()] if steps else 1 / torch.sqrt(1 + torch.exp(8 * label))
            sigma = torch.sqrt(1 - alpha**2)
            data, noise = self._expected(x, alpha, sigma)
            out = alpha * noise - sigma * data if self.runner.endswith("-v") else noise
        return (self.slope * out + self.shift).float()

    def _expected(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """E[x0 | x_t] and E[noise | x_t] of x_t = alpha x0 + sigma noise."""
        whole = (alpha * self.spread) ** 2 + sigma**2
        centred = x - alpha * self.mean
        # Without spread and without noise the state is the mean itself.
        share = torch.where(whole > 0, 1 / whole, 0.0)
        return self.mean + alpha * self.spread**2 * share * centred, sigma * share * centred

    def _edm(self, scaled: Tensor, sigma: Tensor) -> Tensor:
        """F of D(x) = (x / 4 + sigma / 2 sqrt(sigma^2 + 1/4) F) / (sigma^2 + 1/4): EDM's table 1, sigma_data 1/2."""
        root = torch.sqrt(sigma**2 + 0.25)
        x = scaled * root
        data, _ = self._expected(x, torch.ones_like(sigma), sigma)
        return (data - x / 4 / root**2) / (sigma / 2 / root)


def runner_of(name: str, images: Tensor, *, timesteps: bool) -> Any:
    setting = dataclasses.replace(race.SETTINGS[1, 8, 8], batch=len(images), timesteps=timesteps)
    torch.manual_seed(0)
    return race.runner_of(name, images, setting, Generator().manual_seed(0))


def small(shape: tuple[int, ...], generator: Generator) -> nn.Module:
    return sf.networks.MLP(shape, width=32, depth=1, generator=generator)


def gaussian_images(count: int) -> Tensor:
    """uint8 images whose pixels are N(MEAN, SPREAD^2), cut at 0 and 255."""
    values = MEAN + SPREAD * torch.randn(count, *SHAPE, generator=Generator().manual_seed(1))
    return ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(("name", "timesteps"), CASES)
def test_the_sampler_turns_noise_into_what_an_exact_network_means(name: str, timesteps: bool) -> None:
    # The flow from noise to a Gaussian is a line.
    noise = torch.randn(20, *SHAPE, generator=Generator().manual_seed(2))
    runner = runner_of(name, gaussian_images(100), timesteps=timesteps)
    drawn, used = runner.sample(Exact(name, MEAN, SPREAD, timesteps=timesteps), noise, 199)
    assert used in (198, 199)
    assert (drawn - (MEAN + SPREAD * noise)).abs().max().item() < 0.02 * SPREAD
    for evaluations, least in (35, 34), (10, 9):
        _, used = runner.sample(Exact(name, MEAN, SPREAD, timesteps=timesteps), noise, evaluations)
        assert least <= used <= evaluations


@pytest.fixture(scope="module")
def band() -> Any:
    """The noise band of the images of the next test, picked once for all of its runners."""
    return sf.pick_noise_band(sf.Pool(gaussian_images(2000)))


@pytest.mark.parametrize(
    ("name", "timesteps"), [case for case in CASES if case[0] not in ("immiscible", "torchcfm-ot")]
)
def test_the_exact_network_has_the_least_loss(
    name: str, timesteps: bool, band: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pairings within a batch change what is the best, so they are not here.
    monkeypatch.setattr(runners.sf, "pick_noise_band", lambda _: band)
    images = gaussian_images(2000)
    network = Exact(name, MEAN, SPREAD, timesteps=timesteps)

    def loss(slope: float, shift: float) -> float:
        network.slope, network.shift = slope, shift
        runner = runner_of(name, images, timesteps=timesteps)
        index = torch.arange(runner.images)
        return runner.loss(network, images[index].float() / 127.5 - 1, index).item()

    middle, step = loss(1, 0), 0.1
    for low, high in (loss(1 - step, 0), loss(1 + step, 0)), (loss(1, -step), loss(1, step)):
        # The lowest point of the parabola through three points.
        assert abs(step * (low - high) / (low + high - 2 * middle) / 2) < 0.03


@pytest.mark.parametrize("name", [*runners.LEVERS, *runners.FLOWS])
def test_batches_whose_targets_are_computed_together_have_the_losses_of_each(name: str, band: Any, monkeypatch) -> None:
    monkeypatch.setattr(runners.sf, "pick_noise_band", lambda _: band)
    images = gaussian_images(2000)
    network = Exact(name, MEAN + 0.1, SPREAD, timesteps=False)
    together, alone = (
        race.make_runner(name, images, 12, Generator().manual_seed(5), timesteps=False) for _ in range(2)
    )
    count = together.images
    order = torch.randperm(2000, generator=Generator().manual_seed(6))
    batches = [(race.scaled(images, index), index) for index in order[: 3 * count].split(count)]
    together.prepare(batches)
    seeds = iter((7, 7, 8, 8, 9, 9))
    for x0, index in batches:
        found: list[float] = []
        for runner in together, alone:
            torch.manual_seed(next(seeds))  # torchcfm draws from it
            found.append(runner.loss(network, x0, index).item())
        assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("name", runners.RUNNERS)
def test_one_image_is_learned_exactly(name: str) -> None:
    images = torch.full((64, *SHAPE), 153, dtype=torch.uint8)  # 0.2
    network = Exact(name, 0.2, 0.0, timesteps=False)
    runner = runner_of(name, images, timesteps=False)
    index = torch.arange(runner.images)
    assert runner.loss(network, images[index].float() / 127.5 - 1, index).item() < 1e-6
    drawn, _ = runner.sample(network, torch.randn(10, *SHAPE, generator=Generator().manual_seed(2)), 35)
    assert (drawn - 0.2).abs().max().item() < 1e-3


@pytest.fixture(scope="module")
def band_of_digits() -> Any:
    """Picked once for all runners, of which some pick it four times in the next test."""
    return sf.pick_noise_band(sf.Pool(race.open_data("digits")[0]))


@pytest.mark.parametrize("name", runners.RUNNERS)
def test_every_runner_trains_the_same_network_for_its_time(
    name: str, band_of_digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners.sf, "pick_noise_band", lambda _: band_of_digits)
    data, setting = race.open_data("digits")
    setting = dataclasses.replace(setting, network=small)
    _, untrained, took = race.train(name, data, setting, seed=3, seconds=0.0)
    assert took["steps"] == 0
    start = setting.network((1, 8, 8), Generator().manual_seed(3)).state_dict()
    assert all(torch.equal(value, start[key]) for key, value in untrained.state_dict().items())
    rows: list[int] = []

    def counted(shape: tuple[int, ...], generator: Generator) -> nn.Module:
        network = small(shape, generator)
        network.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
        return network

    setting = dataclasses.replace(setting, network=counted)
    runner, trained, took = race.train(name, data, setting, seed=3, seconds=0.1)
    assert set(rows) == {128}
    assert len(rows) == took["steps"] + 1  # and one to warm up
    assert 0.1 <= took["spent"] < 1.6  # to the end of the step that it began in time
    assert not all(torch.equal(value, start[key]) for key, value in trained.named_parameters())

    found = race.measure(runner, trained, data, dataclasses.replace(setting, samples=70), seed=3)
    assert all(0 < row["distance"] < math.inf for row in found)


def test_noise_is_assigned_to_images_at_the_least_cost() -> None:
    from scipy.optimize import linear_sum_assignment

    images = gaussian_images(32)
    runner = runner_of("immiscible", images, timesteps=False)
    x0 = images.float() / 127.5 - 1
    given: list[Tensor] = []

    class Recorder(nn.Module):
        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            sigma = torch.exp(4 * label)[:, None, None, None]
            given.append((x * torch.sqrt(sigma**2 + 0.25) - x0) / sigma)
            return torch.zeros_like(x)

    runner.loss(Recorder(), x0, torch.arange(32))
    cost = torch.cdist(x0.flatten(1).double(), given[0].flatten(1).double()).square()
    _, order = linear_sum_assignment(cost.numpy())
    assert cost[torch.arange(32), torch.from_numpy(order)].sum() == pytest.approx(cost.trace().item(), rel=1e-4)
    assert cost.trace() < 0.99 * cost.mean() * 32


def test_recipes_for_a_cpu_draw_the_noise_levels_that_won_the_race() -> None:
    photos = sf.training.imagefolder((3, 32, 32), 500, accelerated=False)
    for runner, recipe in (
        ("ours", sf.training.DIGITS),
        ("ours-wide", sf.training.MNIST28),
        ("ours-wide", photos),
    ):
        mean, std = runners.LEVERS[runner].levels
        assert recipe.noise_levels == sf.LogNormal(mean, std, stratified=runners.LEVERS[runner].stratified)


def test_the_distance_is_that_of_gaussians() -> None:
    # Averages of 4 x 4 independent pixels have a quarter of their spread.
    generator = Generator().manual_seed(0)
    sets = [
        ((mean + spread * torch.randn(20_000, 1, 8, 8, generator=generator) + 1) * 127.5).round().to(torch.uint8)
        for mean, spread in ((-0.1, 0.1), (0.2, 0.2))
    ]
    found = race.distance_between(*(race.gaussian_of(images, 4) for images in sets)).value
    assert found == pytest.approx(4 * (0.3**2 + 0.025**2), rel=0.01)


def test_a_measurement_counts_what_the_sampler_spends_and_does_not_depend_on_chunks() -> None:
    data, setting = race.open_data("digits", samples=30, batch=16)
    assert (setting.samples, setting.batch) == (30, 16)
    setting = dataclasses.replace(setting, network=small)
    runner, network, _ = race.train("torchcfm", data, setting, seed=0, seconds=0.0)
    calls: list[int] = []
    network.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    found = race.measure(runner, network, data, dataclasses.replace(setting, chunk=30), seed=0)
    assert [(row["evaluations"], row["used"]) for row in found] == [(35, 34), (10, 10)]
    assert calls == [30] * 44
    parts = race.measure(runner, network, data, dataclasses.replace(setting, chunk=7), seed=0)
    for row, part in zip(found, parts, strict=True):
        assert row["distance"] == pytest.approx(part["distance"], rel=1e-3)


def test_the_learning_rate_rises_and_falls_with_the_share_of_the_time() -> None:
    assert [race.learning_rate(share) for share in (0, race.RAMP, 0.5, 1 - race.DECAY, 1)] == [0, 1, 1, 1, 0]
    assert race.learning_rate(1 - race.DECAY / 4) == pytest.approx(0.25)


def rows_of(runner: str, distances: dict[float, list[float]]) -> list[dict[str, Any]]:
    return [
        {"runner": runner, "seed": seed, "seconds": seconds, "evaluations": 35, "distance": distance}
        for seconds, found in distances.items()
        for seed, distance in enumerate(found)
    ]


def test_the_table_tells_when_a_runner_reaches_the_best_peer() -> None:
    rows = rows_of("edm", {10: [3.0, 5.0], 20: [0.7, 0.3]}) + rows_of("ours", {10: [1.0, 1.0], 20: [0.2, 0.3]})
    rows += rows_of("torchcfm", {10: [9.0, 9.0], 20: [4.0, 4.0]})
    rows.append({"runner": "min-snr", "seed": 0, "seconds": 10, "error": "RuntimeError: no"})
    lines = race.table(rows).splitlines()
    assert "35 evaluations" in lines[1]
    assert lines[1].endswith("the best peer, edm, ends at 0.5000")
    # From 1 to 0.25 in ten seconds: 0.5 is half of it in the logarithm.
    assert [(line.split()[0], line.split()[-1]) for line in lines[3:6]] == [
        ("ours", "15"),
        ("edm", "20"),
        ("torchcfm", ">20"),
    ]
    assert "4.0000 (3.000-5.000)" in lines[4]
    assert lines[-1] == "failed: min-snr, seed 0, 10 s: RuntimeError: no"
    assert race.time_to({10: 0.4, 20: 0.1}, 0.5) == "<10"


def test_a_failed_training_is_a_row_and_a_cut_race_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, int, float]] = []

    def start(self: object, name: str, seed: int, seconds: float) -> "subprocess.Popen[str]":
        started.append((name, seed, seconds))
        row = {"runner": name, "seed": seed, "seconds": seconds, "evaluations": 35, "distance": 1.0}
        program = f"print('''{json.dumps([row])}''')" if name == "edm" else "raise ValueError('broken')"
        return subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True)

    monkeypatch.setattr(race.Race, "_start", start)
    saved: list[int] = []
    rows: list[dict[str, Any]] = []
    run = race.Race([], jobs=2, rows=rows, save=lambda rows: saved.append(len(rows)))
    run.run([("edm", 0, 1.0), ("torchcfm", 0, 1.0)])
    assert sorted(saved) == [1, 2]
    assert sorted((row["runner"], row.get("error")) for row in rows) == [
        ("edm", None),
        ("torchcfm", "ValueError: broken"),
    ]
    run.run([("edm", 0, 1.0), ("torchcfm", 0, 1.0), ("edm", 1, 1.0)])
    assert sorted(started[2:]) == [("edm", 1, 1.0), ("torchcfm", 0, 1.0)]
    assert len(rows) == 3
