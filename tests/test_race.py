"""The race is fair: every runner's loss and sampler agree with exact solutions, and the time given is kept."""

import dataclasses
import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn

pytest.importorskip("diffusers")
pytest.importorskip("torchcfm")
pytest.importorskip("scipy")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
race = importlib.import_module("race")
sys.path.remove(str(ROOT / "benchmarks"))

MEAN, SPREAD = 0.1, 0.25
SHAPE = (1, 4, 4)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


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
        if self.runner in race.LEVERS or self.runner == "immiscible":
            out = self._edm(x, torch.exp(4 * label))
        elif self.runner.startswith("torchcfm"):
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


def runner_of(name: str, images: Tensor, *, timesteps: bool, seed: int = 0) -> "race.Runner":
    setting = dataclasses.replace(race.SETTINGS[1, 8, 8], batch=len(images), timesteps=timesteps)
    torch.manual_seed(seed)
    return race.make_runner(name, images, setting, Generator().manual_seed(seed))


def gaussian_images(count: int) -> Tensor:
    """uint8 images whose pixels are N(MEAN, SPREAD^2), cut at 0 and 255."""
    values = MEAN + SPREAD * torch.randn(count, *SHAPE, generator=Generator().manual_seed(1))
    return ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("timesteps", [False, True], ids=["numbers", "steps"])
@pytest.mark.parametrize("name", race.RUNNERS)
def test_the_sampler_makes_the_distribution_of_an_exact_network(name: str, timesteps: bool) -> None:
    noise = torch.randn(2000, *SHAPE, generator=Generator().manual_seed(2))
    runner = runner_of(name, gaussian_images(100), timesteps=timesteps)
    drawn, used = runner.sample(Exact(name, MEAN, SPREAD, timesteps=timesteps), noise, 199)
    assert used in (198, 199)
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert drawn.std().item() == pytest.approx(SPREAD, rel=0.02)
    # The same noise in the same place: an image follows its noise, it is not mirrored.
    assert torch.corrcoef(torch.stack([drawn.flatten(), noise.flatten()]))[0, 1] > 0.999


@pytest.mark.parametrize("timesteps", [False, True], ids=["numbers", "steps"])
@pytest.mark.parametrize("name", [name for name in race.RUNNERS if name not in ("immiscible", "torchcfm-ot")])
def test_the_exact_network_has_the_least_loss(name: str, timesteps: bool) -> None:
    # Pairings within a batch change what is the best, so they are not here.
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


@pytest.mark.parametrize("name", race.RUNNERS)
def test_one_image_is_learned_exactly(name: str) -> None:
    images = torch.full((64, *SHAPE), 153, dtype=torch.uint8)  # 0.2
    network = Exact(name, 0.2, 0.0, timesteps=False)
    runner = runner_of(name, images, timesteps=False)
    index = torch.arange(runner.images)
    assert runner.loss(network, images[index].float() / 127.5 - 1, index).item() < 1e-6
    drawn, _ = runner.sample(network, torch.randn(10, *SHAPE, generator=Generator().manual_seed(2)), 35)
    assert (drawn - 0.2).abs().max().item() < 1e-3
