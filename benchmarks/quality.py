"""What targets are for: FID against training time. Parts of `gpu.py`, which says what they need.

`sanity` holds the metric itself against a known number; `proof` trains a network twice from one seed, with the single-sample
and with the stable target, for equal times on the clock, and measures both at the same moments.
"""

import copy
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import stablefield as sf
from stablefield._cost import wait_for
from stablefield.evaluation._extractor import Extractor
from stablefield.evaluation._features import Gaussian, empty_moments, fit_moments, join_moments, moments_of, unpack
from stablefield.evaluation._fid import distance_between
from stablefield.sampling._seeded_images import to_uint8
from stablefield.training._ema import ema_decay, follower, update_ema
from stablefield.training._recipe import Recipe, SongUNetConfig
from stablefield.training._recipes import CIFAR10_EDM, CIFAR10_VE

__all__ = ["RECIPES", "Budget", "proof", "sanity"]

FLOW = dataclasses.replace(
    CIFAR10_EDM,
    process=sf.RectifiedFlow(),
    noise_levels=sf.Uniform(1e-3, 0.999),
    weighting=sf.FlowWeighting(),
    network=SongUNetConfig(architecture="ddpmpp"),
)
"""Flow matching: times uniform, the loss that of the velocity, EDM's preconditioning around the network."""

RECIPES: dict[str, tuple[Recipe, float, float]] = {
    # Recipe, and the noise levels between which its samplers go.
    "ve": (CIFAR10_VE, 0.02, 100.0),
    "edm": (CIFAR10_EDM, 0.002, 80.0),
    "flow": (FLOW, 0.002, 80.0),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What a comparison may take.

    Attributes:
        seconds: training time of each target, without the time of its measurements.
        marks: how often it is measured in that time.
        samples: images per measurement.
        batch: images per step.
        width: base channels of the network.
        blocks: residual blocks per level.
        learning_rate: of Adam, after 100 steps of ramp.
        samplers: of heun (18 steps, 35 evaluations) and rk45.
        gradients: batches whose gradients give the gradient's variance.
        compiled: whether torch.compile makes the network; one that fails there runs as it is, and the rows say so.
    """

    seconds: float = 240.0
    marks: int = 3
    samples: int = 10_000
    batch: int = 256
    width: int = 64
    blocks: int = 2
    learning_rate: float = 1e-3
    samplers: tuple[str, ...] = ("heun", "rk45")
    gradients: int = 32
    compiled: bool = False


def gaussian_of(batches: Iterator[Tensor], extractor: Extractor) -> Gaussian:
    """The Gaussian of the features of uint8 images."""
    total = empty_moments(extractor.dim)
    for batch in batches:
        features = extractor(batch)
        # Summed where the features are: a d x d matrix in float64 is a GPU's work.
        total = join_moments(total.to(features.device), moments_of(features))
    _, mean, covariance = unpack(total.cpu())
    return fit_moments(mean, covariance)


def sanity(train: Tensor, test: Tensor, extractor: Extractor) -> dict[str, object]:
    """Frechet distance of two sets of images, uint8 (n, C, H, W)."""
    gaussians = [gaussian_of(iter(part.split(500)), extractor) for part in (train, test)]
    distance = distance_between(*gaussians).value
    return {"extractor": extractor.name, "images": [len(train), len(test)], "distance": distance}


def proof(
    images: Tensor,
    extractor: Extractor,
    name: str,
    budget: Budget,
    tell: Callable[[dict[str, object]], object] = print,
    show: Callable[[str, Tensor], object] = lambda *_: None,
) -> list[dict[str, object]]:
    """Train with both targets and measure them.

    Args:
        images: the data, uint8 (n, C, H, W), on the device.
        extractor: whose features the distance is of.
        name: which of RECIPES.
        budget: what it may take.
        tell: called with every measurement as it is made.
        show: called with the target's name and its last samples, uint8.

    Returns:
        The measurements.
    """
    recipe = RECIPES[name][0]
    # Rows are mirrored at random, of which the network is not told.
    pool = sf.Pool(images, mirrored=True)
    band = sf.pick_noise_band(pool).level
    targets = {
        "dsm": sf.DenoisingTarget(recipe.process),
        "stf": sf.StableTarget(recipe.process, references=pool, noise_band=band),
    }
    data = gaussian_of(iter(images.split(500)), extractor)
    trainer = _Trainer(images, recipe, budget)
    found: list[dict[str, object]] = []
    for target_name, target in targets.items():
        # Unmeasured: what a device does once, it does here.
        for _ in trainer.train(target, budget.seconds / 20, 1, seed=1):
            pass
        for mark in trainer.train(target, budget.seconds, budget.marks, seed=0):
            row: dict[str, object] = {
                "process": name,
                "target": target_name,
                "noise_band": band,
                "batch": budget.batch,
                "compiled": trainer.compiled,
                **mark,
            }
            for sampler in budget.samplers:
                drawn, evaluations = _samples(trainer.average, images, name, sampler, budget.samples)
                row[sampler] = distance_between(gaussian_of(iter(drawn.split(500)), extractor), data).value
                row[f"{sampler}_nfe"] = evaluations
                show(f"{name}_{target_name}", drawn)
            row["gradient_variance"] = {name: trainer.gradient_variance(one) for name, one in targets.items()}
            tell(row)
            found.append(row)
    return found


class _Trainer:
    """One network, made and compiled once, which each training starts anew from the same weights."""

    def __init__(self, images: Tensor, recipe: Recipe, budget: Budget) -> None:
        assert isinstance(recipe.network, SongUNetConfig)
        layout = dataclasses.replace(recipe.network, base_channels=budget.width, blocks=budget.blocks)
        network = layout.build(tuple(images.shape[1:]), 0, 0, torch.Generator().manual_seed(0))
        self._images, self._recipe, self._budget = images, recipe, budget
        self._denoiser = sf.Denoiser(network, recipe.preconditioning).to(images.device)
        self._start = copy.deepcopy(self._denoiser.state_dict())
        self._average = follower(self._denoiser)
        self._called, self.average, self.compiled = self._denoiser, self._average, False
        if budget.compiled:
            self._compile()

    def gradient_variance(self, target: sf.StableTarget) -> float:
        """Variance of a batch's gradient, summed over the weights, where the network stands now.

        The single-sample and the stable target have the same mean gradient; what one adds to the other's variance is what
        the stable target removes.
        """
        images, device = self._images, self._images.device
        objective = self._objective(target)
        generator = torch.Generator(device).manual_seed(2)
        mean, squares = torch.zeros((), device=device), torch.zeros((), device=device)
        for count in range(1, self._budget.gradients + 1):
            index = torch.randint(len(images), (self._budget.batch,), generator=generator, device=device)
            x0 = images[index].float().div_(127.5).sub_(1)
            self._denoiser.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = objective(
                    self._called, x0, index=index, flip=torch.zeros_like(index).bool(), generator=generator
                ).loss
            loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in self._denoiser.parameters() if p.grad is not None]).double()
            # Welford's recursion.
            change = gradient - mean
            mean = mean + change / count
            squares = squares + (change * (gradient - mean)).sum()
        self._denoiser.zero_grad(set_to_none=True)
        return float(squares / (self._budget.gradients - 1))

    def _objective(self, target: sf.StableTarget) -> sf.Objective:
        recipe = self._recipe
        return sf.Objective(recipe.process, noise_levels=recipe.noise_levels, weighting=recipe.weighting, target=target)

    def train(self, target: sf.StableTarget, seconds: float, marks: int, seed: int) -> Iterator[dict[str, object]]:
        """Train for so long, and stop the clock at the marks: what was done until then."""
        images, budget, device = self._images, self._budget, self._images.device
        self._denoiser.load_state_dict(self._start)
        self._average.load_state_dict(self._start)
        parameters = list(self._denoiser.parameters())
        optimizer = torch.optim.Adam(parameters, lr=budget.learning_rate, fused=device.type == "cuda")
        objective = self._objective(target)
        generator = torch.Generator(device).manual_seed(seed)
        torch.manual_seed(seed)  # dropout
        step, spent, losses = 0, 0.0, []
        for mark in range(1, marks + 1):
            wait_for(device)
            began, wanted = time.perf_counter() - spent, seconds * mark / marks
            while spent < wanted:
                index = torch.randint(len(images), (budget.batch,), generator=generator, device=device)
                x0 = images[index].float().div_(127.5).sub_(1)
                flip = torch.rand(budget.batch, generator=generator, device=device) < 0.5
                x0 = torch.where(flip[:, None, None, None], x0.flip(-1), x0)
                optimizer.param_groups[0]["lr"] = budget.learning_rate * min(1, (step + 1) / 100)
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    loss = objective(self._called, x0, index=index, flip=flip, generator=generator).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                update_ema(self._average, self._denoiser, ema_decay(budget.batch, step * budget.batch, 500_000, 0.1))
                step += 1
                losses.append(loss.detach())
                # Now and then only: a device that is waited for after every step idles while the next is prepared.
                if step % 8 == 0 or device.type != "cuda":
                    wait_for(device)
                    spent = time.perf_counter() - began
            recent = float(torch.stack(losses[-200:]).mean())
            yield {"seconds": round(spent, 2), "steps": step, "images": step * budget.batch, "loss": recent}

    def _compile(self) -> None:
        device, shape = self._images.device, self._images.shape[1:]
        average = torch.compile(self._average)
        # A CUDA graph replays a step of a small network without Python, which takes longer than the GPU does.
        called = torch.compile(self._denoiser, mode="reduce-overhead" if device.type == "cuda" else "default")
        noise = torch.ones(self._budget.batch, device=device)
        try:
            for _ in range(4):  # eager, recorded, and replayed twice
                self._denoiser.zero_grad(set_to_none=True)
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    called(torch.zeros(len(noise), *shape, device=device), noise).square().mean().backward()
        except Exception as error:
            warnings.warn(f"the network was not compiled: {error}", stacklevel=2)
            return
        finally:
            self._denoiser.zero_grad(set_to_none=True)
        self._called, self.average, self.compiled = called, average, True


def _samples(denoiser: nn.Module, images: Tensor, name: str, sampler: str, count: int) -> tuple[Tensor, float]:
    """Images, uint8, the same noise each time, and the evaluations that each took."""
    _, sigma_min, sigma_max = RECIPES[name]
    device, shape = images.device, tuple(images.shape[1:])
    sigmas = sf.sampling.edm_sigmas(18, sigma_min=sigma_min, sigma_max=sigma_max, device=device)
    solve = sf.sampling.heun if sampler == "heun" else sf.sampling.rk45
    generator = torch.Generator(device).manual_seed(1)
    drawn, evaluations, chunks = [], 0, 0

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and sampler == "heun"):
            return denoiser(x, sigma).float()

    for start in range(0, count, 1000):
        noise = torch.randn(min(1000, count - start), *shape, generator=generator, device=device) * sigmas[0].float()
        drawn.append(to_uint8(solve(counted, noise, sigmas)))
        chunks += 1
    return torch.cat(drawn), evaluations / chunks
