"""What targets are for: FID against training time. Parts of `gpu.py`, which says what they need.

`sanity` holds the metric itself against a known number; `proof` takes the trainer's own steps from one seed, with each of
some settings, for equal times on the clock, and measures all of them at the same moments.
"""

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import stablefield as sf
from stablefield._cost import wait_for
from stablefield.data._image_set import ImageSet
from stablefield.evaluation._extractor import Extractor
from stablefield.evaluation._features import Gaussian, empty_moments, fit_moments, join_moments, moments_of, unpack
from stablefield.evaluation._fid import distance_between
from stablefield.sampling._seeded_images import to_uint8
from stablefield.training._ema import follower
from stablefield.training._feed import Feed
from stablefield.training._recipe import Recipe, SongUNetConfig
from stablefield.training._recipes import CIFAR10_EDM, CIFAR10_VE
from stablefield.training._run_config import RunConfig
from stablefield.training._stepper import Stepper

__all__ = ["ARMS", "RECIPES", "Budget", "proof", "sanity"]

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


ARMS: dict[str, dict[str, Any]] = {
    "dsm": {"target": "dsm"},
    "stf": {"target": "stf"},
    "dsm stratified": {"target": "dsm", "stratified": True},
    "stf stratified": {"target": "stf", "stratified": True},
    "stf antithetic": {"target": "stf", "stratified": True, "draws_per_image": 2, "antithetic": True},
}
"""What may be compared: a target, and levers on top of it. `stratified` is of the noise levels, the rest of the recipe."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What a comparison may take.

    Attributes:
        arms: which of ARMS to train, in this order.
        variances: which of ARMS to measure the gradient's variance with.
        seconds: training time of each arm, without the time of its measurements.
        marks: how often it is measured in that time.
        samples: images per measurement.
        batch: images per step.
        width: base channels of the network.
        blocks: residual blocks per level.
        learning_rate: of Adam, after 100 steps of ramp.
        samplers: of heun (18 steps, 35 evaluations) and rk45.
        gradients: batches whose gradients give the gradient's variance.
        compiled: whether to compile the network, and to replay the steps as CUDA graphs.
    """

    arms: tuple[str, ...] = ("dsm", "stf")
    variances: tuple[str, ...] = tuple(ARMS)
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
    data: ImageSet,
    extractor: Extractor,
    name: str,
    budget: Budget,
    device: torch.device,
    tell: Callable[[dict[str, object]], object] = print,
    show: Callable[[str, Tensor], object] = lambda *_: None,
) -> list[dict[str, object]]:
    """Train with each of the arms and measure them.

    Args:
        data: the images.
        extractor: whose features the distance is of.
        name: which of RECIPES.
        budget: what it may take.
        device: where to train.
        tell: called with every measurement as it is made.
        show: called with the arm's name and its last samples, uint8.

    Returns:
        The measurements.
    """
    images = torch.tensor(data.images).to(device)
    band = sf.pick_noise_band(sf.Pool(images, mirrored=True)).level
    measured = gaussian_of(iter(images.split(500)), extractor)
    arms = {arm: _recipe(name, arm, budget, band) for arm in ARMS}
    # One network for all samples and gradients: compiled once.
    evaluator = _Evaluator(data, {arm: arms[arm] for arm in budget.variances}, budget, device)
    found: list[dict[str, object]] = []
    for arm in budget.arms:
        for mark, average in _train(_stepper(data, arms[arm], device), budget, device):
            row: dict[str, object] = {
                "process": name,
                "target": arm,
                "noise_band": band,
                "batch": budget.batch,
                "compiled": budget.compiled,
                **mark,
            }
            for sampler in budget.samplers:
                drawn, evaluations = evaluator.samples(average, name, sampler)
                row[sampler] = distance_between(gaussian_of(iter(drawn.split(500)), extractor), measured).value
                row[f"{sampler}_nfe"] = evaluations
                show(f"{name}_{arm.replace(' ', '_')}", drawn)
            row["gradient_variance"] = evaluator.gradient_variances(average)
            tell(row)
            found.append(row)
    return found


def _recipe(name: str, arm: str, budget: Budget, band: float) -> Recipe:
    recipe, change = RECIPES[name][0], dict(ARMS[arm])
    assert isinstance(recipe.network, SongUNetConfig)
    levels = dataclasses.replace(recipe.noise_levels, stratified=change.pop("stratified", False))
    return dataclasses.replace(
        recipe,
        network=dataclasses.replace(recipe.network, base_channels=budget.width, blocks=budget.blocks),
        noise_levels=levels,
        noise_band=band,
        references="all",
        batch=budget.batch,
        learning_rate=budget.learning_rate,
        ramp_images=100 * budget.batch,
        max_grad_norm=1.0,
        ema_ramp=0.1,
        augmentation=0.0,
        ema_snapshot_every=0,
        # Rows are mirrored at random, of which the network is not told.
        mirror=True,
        precision="bf16" if torch.cuda.is_available() else "float32",
        compile=budget.compiled,
        **change,
    )


def _stepper(data: ImageSet, recipe: Recipe, device: torch.device) -> Stepper:
    config = RunConfig(
        data=data.name, shape=data.shape, classes=0, manifest=data.manifest, recipe=recipe, version=sf.__version__
    )
    feed = Feed(data, recipe, device, labelled=False, placement="resident")
    alone: Any = SimpleNamespace(device=device, backward=lambda loss: loss.backward())
    return Stepper(config, feed, alone)


def _train(
    stepper: Stepper, budget: Budget, device: torch.device
) -> Iterator[tuple[dict[str, object], dict[str, Tensor]]]:
    """Train for so long, and stop the clock at the marks: what was done until then, and the average of the weights."""
    trained = stepper.trained
    optimizer = trained.optimizer
    assert optimizer is not None
    start = copy.deepcopy(trained.model.state_dict())
    for step in range(3):  # unmeasured: what is compiled, recorded and allocated once
        stepper.take(step)
    optimizer.state.clear()
    for module in (trained.model, *trained.averages.values()):
        module.load_state_dict(start)
    step, spent, losses = 0, 0.0, []
    for mark in range(1, budget.marks + 1):
        wait_for(device)
        began, wanted = time.perf_counter() - spent, budget.seconds * mark / budget.marks
        while spent < wanted:
            (value,) = stepper.take(step)
            step += 1
            losses.append(value.loss.detach())
            # Now and then only: a device that is waited for after every step idles while the next is prepared.
            if step % 8 == 0 or device.type != "cuda":
                wait_for(device)
                spent = time.perf_counter() - began
        recent = float(torch.stack(losses[-200:]).mean())
        yield (
            {"seconds": round(spent, 2), "steps": step, "images": step * budget.batch, "loss": recent},
            trained.averages["ema"].state_dict(),
        )


class _Evaluator:
    """Measures weights: the samples of the network that has them, and the variance of its gradient with every arm."""

    def __init__(self, data: ImageSet, arms: dict[str, Recipe], budget: Budget, device: torch.device) -> None:
        plain = {arm: dataclasses.replace(recipe, compile=False, seed=1) for arm, recipe in arms.items()}
        self._steppers = {arm: _stepper(data, recipe, device) for arm, recipe in plain.items()}
        self._denoiser = follower(next(iter(self._steppers.values())).trained.model)
        self._called = torch.compile(self._denoiser) if budget.compiled else self._denoiser
        self._budget, self._shape, self._device = budget, data.shape, device

    def gradient_variances(self, weights: dict[str, Tensor]) -> dict[str, float]:
        """Variance of a batch's gradient, summed over the weights, with every arm.

        All arms have the same mean gradient; what one adds to another's variance is what the other removes.
        """
        count, found = self._budget.gradients, dict[str, float]()
        for arm, stepper in self._steppers.items():
            stepper.trained.model.load_state_dict(weights)
            # Welford's recursion.
            mean = squares = torch.zeros((), device=self._device)
            for step in range(count):
                with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
                    change = stepper.gradient(step).double() - mean
                mean = mean + change / (step + 1)
                squares = squares + change.square().sum() * (step / (step + 1))
            found[arm] = float(squares / (count - 1))
        return found

    def samples(self, weights: dict[str, Tensor], name: str, sampler: str) -> tuple[Tensor, float]:
        """Images, uint8, from the same noise each time, and the evaluations that each took."""
        self._denoiser.load_state_dict(weights)
        _, sigma_min, sigma_max = RECIPES[name]
        device, count = self._device, self._budget.samples
        sigmas = sf.sampling.edm_sigmas(18, sigma_min=sigma_min, sigma_max=sigma_max, device=device)
        solve = sf.sampling.heun if sampler == "heun" else sf.sampling.rk45
        generator = torch.Generator(device).manual_seed(1)
        drawn, evaluations, chunks = [], 0, 0

        def counted(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and sampler == "heun"):
                return self._called(x, sigma).float()

        for start in range(0, count, 1000):
            size = min(1000, count - start)
            noise = torch.randn(size, *self._shape, generator=generator, device=device) * sigmas[0].float()
            drawn.append(to_uint8(solve(counted, noise, sigmas)))
            chunks += 1
        return torch.cat(drawn), evaluations / chunks
