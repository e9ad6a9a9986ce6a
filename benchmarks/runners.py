"""The runners of a race: losses and the samplers that belong to them, ours and those of other packages.

All run through their own packages, but for immiscible noise, which no package has.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Generator, Tensor, nn

import stablefield as sf
from stablefield.diffusion._objective import Draws, Example

__all__ = ["FLOWS", "LEVERS", "OURS", "PEERS", "RUNNERS", "Levers", "Runner", "make_runner"]

Network = Callable[[Tensor, Tensor], Tensor]


class Runner(Protocol):
    """A loss and its sampler.

    Attributes:
        images: different images per step.
        ahead: batches that `prepare` takes.
    """

    images: int
    ahead: int

    def prepare(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Do what several batches (x0, index) have in common; calls of `loss` with them follow, in order."""
        ...

    def loss(self, network: Network, x0: Tensor, index: Tensor) -> Tensor:
        """The loss of a batch x0 (B, C, H, W) in [-1, 1], the rows `index` of the data."""
        ...

    def sample(self, network: Network, noise: Tensor, evaluations: int) -> tuple[Tensor, int]:
        """Images from standard normal noise (B, C, H, W), and how often the network was evaluated."""
        ...


@dataclass(frozen=True, kw_only=True)
class Levers:
    """EDM's loss with what we change in it.

    Attributes:
        references: the whole data set as references of the stable target, instead of the single sample.
        size: with `references`, draw so many of them for each call, which several batches share; None for all.
        levels: mean and standard deviation of ln sigma.
        stratified: stratify the noise levels of a batch.
        antithetic: make pairs of opposite noise of half as many images.
        steps: number the noise levels from 0 to 999, for which positional embeddings are made, instead of by ln(sigma) / 4.
            Networks without such an embedding see no difference.
    """

    references: bool = False
    size: int | None = None
    levels: tuple[float, float] = (-1.2, 1.2)
    stratified: bool = False
    antithetic: bool = False
    steps: bool = False


OURS = Levers(references=True, levels=(-0.4, 1.0), stratified=True, antithetic=True)
"""All that helps together."""


class Separate:
    """What batches of other packages have in common: nothing."""

    ahead = 1

    def prepare(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See `Runner`."""


class Together:
    """Batches of an objective of ours, whose targets are computed in one call, as stablefield's trainer does on a CPU.

    Eight batches share a call, or 16 if they are of 32 rows or fewer.
    """

    def __init__(self, objective: sf.Objective, batch: int, generator: Generator) -> None:
        self.ahead = 16 if batch <= 32 else 8
        self._objective, self._generator = objective, generator
        self._ready: deque[Example] = deque()
        self.images = batch // objective.draws_per_image

    def prepare(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See `Runner`."""
        draws_per_image = self._objective.draws_per_image
        draws = [self._objective.draw((draws_per_image * len(x0), *x0.shape[1:]), self._generator) for x0, _ in batches]
        x0, index = (
            torch.cat([batch[part] for batch in batches]).repeat_interleave(draws_per_image, 0) for part in (0, 1)
        )
        both = Draws(torch.cat([one.t for one in draws]), torch.cat([one.noise for one in draws]))
        whole = self._objective.example(x0, both, index=index, generator=self._generator)
        rows = draws_per_image * self.images
        self._ready.extend(whole[first : first + rows] for first in range(0, len(x0), rows))

    def denoiser(self, network: Network) -> Network:
        """The denoiser around the network."""
        raise NotImplementedError

    def loss(self, network: Network, x0: Tensor, index: Tensor) -> Tensor:
        """See `Runner`."""
        if not self._ready:
            self.prepare([(x0, index)])
        return self._objective.evaluate(self.denoiser(network), self._ready.popleft()).loss


class Edm(Together):
    """EDM's preconditioning, noise levels and Heun's method, with our levers."""

    def __init__(self, levers: Levers, data: Tensor, batch: int, generator: Generator, *, timesteps: bool) -> None:
        process = sf.EDM()
        target = stable_target(process, data, levers.size) if levers.references else sf.DenoisingTarget(process)
        draws = 2 if levers.antithetic else 1
        mean, std = levers.levels
        objective = sf.Objective(
            process,
            target=target,
            noise_levels=sf.LogNormal(mean, std, stratified=levers.stratified),
            weighting=sf.EDMWeighting(),
            draws_per_image=draws,
            antithetic=levers.antithetic,
        )
        super().__init__(objective, batch, generator)
        self._steps = levers.steps and timesteps

    def _numbered(self, network: Network) -> Network:
        if not self._steps:
            return network
        # EDM's grid, 0.002 to 80, has labels from -1.55 to 1.1.
        return Relabelled(network, lambda label: 999 * ((label + 1.55) / 2.65).clamp(0, 1))

    def denoiser(self, network: Network) -> Network:
        return preconditioned(self._numbered(network))

    def sample(self, network: Network, noise: Tensor, evaluations: int) -> tuple[Tensor, int]:
        return edm_samples(self._numbered(network), noise, evaluations)


class Relabelled(nn.Module):
    """A network that sees other noise labels."""

    def __init__(self, network: Network, label: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._network, self._label = network, label

    def forward(self, x: Tensor, noise_label: Tensor) -> Tensor:
        """The network's output for rows x (B, C, H, W) and EDM's labels (B,)."""
        return self._network(x, self._label(noise_label))


class Immiscible(Separate):
    """Immiscible diffusion (Li et al., arXiv 2406.12303) on EDM's single-sample loss.

    No package has it; this is our implementation of the paper's algorithm: within a batch, noise is assigned to images so
    that the sum of their squared distances is smallest.
    """

    def __init__(self, data: Tensor, batch: int, generator: Generator) -> None:  # noqa: ARG002
        from scipy.optimize import linear_sum_assignment

        self._assign = linear_sum_assignment
        self._levels, self._weight = sf.LogNormal(), sf.EDMWeighting()
        self._process = sf.EDM()
        self._generator = generator
        self.images = batch

    def loss(self, network: Network, x0: Tensor, index: Tensor) -> Tensor:  # noqa: ARG002
        sigma = self._levels.sample(self._process, len(x0), self._generator)
        noise = torch.randn(x0.shape, generator=self._generator)
        _, order = self._assign(torch.cdist(x0.flatten(1), noise.flatten(1)).square().numpy())
        x_t = x0 + sigma[:, None, None, None] * noise[torch.from_numpy(order)]
        error = preconditioned(network)(x_t, sigma) - x0
        return (self._weight(sigma) * error.square().flatten(1).mean(1)).mean()

    def sample(self, network: Network, noise: Tensor, evaluations: int) -> tuple[Tensor, int]:
        return edm_samples(network, noise, evaluations)


class Diffusers(Separate):
    """The training loop of diffusers' examples, with the cosine table, and its DPM-Solver++.

    The solver has the options that its documentation asks for. Without `lambda_min_clipped` it begins where the cosine table
    leaves no signal, and divides by it; -5.1 is the value of its authors. `thresholding`, for images in pixels, limits the
    estimated image to [-1, 1]; without it, an error in the predicted noise becomes one of the image that is 160 times
    larger. The velocity has no such factor, and its samples are better without it.

    Args:
        prediction: "epsilon" or "v_prediction".
        gamma: of the min-SNR weights (Hang et al., ICCV 2023), as in diffusers' examples; None for no weights.
    """

    def __init__(
        self, prediction: str, gamma: float | None, batch: int, generator: Generator, *, timesteps: bool
    ) -> None:
        from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

        self._table = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction)
        self._solver = DPMSolverMultistepScheduler.from_config(
            self._table.config, lambda_min_clipped=-5.1, thresholding=prediction == "epsilon"
        )
        self._prediction, self._gamma, self._generator = prediction, gamma, generator
        # A positional embedding gets the time step, for which it was made; one for numbers of order one gets EDM's label.
        square = self._table.alphas_cumprod
        self._labels = torch.arange(len(square)).float() if timesteps else torch.log(1 / square - 1) / 8
        self.images = batch

    def loss(self, network: Network, x0: Tensor, index: Tensor) -> Tensor:  # noqa: ARG002
        steps = torch.randint(len(self._labels), (len(x0),), generator=self._generator)
        noise = torch.randn(x0.shape, generator=self._generator)
        x_t = self._table.add_noise(x0, noise, steps)
        velocity = self._prediction == "v_prediction"
        target = self._table.get_velocity(x0, noise, steps) if velocity else noise
        error = (network(x_t, self._labels[steps]) - target).square()
        if self._gamma is None:
            return error.mean()
        from diffusers.training_utils import compute_snr

        snr = compute_snr(self._table, steps)
        weight = snr.clamp(max=self._gamma) / (snr + 1 if velocity else snr)
        return (weight * error.flatten(1).mean(1)).mean()

    def sample(self, network: Network, noise: Tensor, evaluations: int) -> tuple[Tensor, int]:
        self._solver.set_timesteps(evaluations)
        x = noise
        for step in self._solver.timesteps:
            out = network(x, self._labels[step].expand(len(x)))
            x = self._solver.step(out, step, x).prev_sample
        return x, len(self._solver.timesteps)


class Velocity:
    """A network that estimates the velocity from noise, at time 0, to data, at time 1, and the midpoint rule."""

    def __init__(self, *, timesteps: bool) -> None:
        self._timesteps = timesteps

    def label(self, t: Tensor) -> Tensor:
        """What the network sees of times (B,): as for diffusers time steps, or numbers of order one."""
        return 999 * t if self._timesteps else 2 * t - 1

    def sample(self, network: Network, noise: Tensor, evaluations: int) -> tuple[Tensor, int]:
        """See `Runner`."""
        steps = evaluations // 2

        def velocity(x: Tensor, t: float) -> Tensor:
            return network(x, self.label(torch.full((len(x),), t)))

        x = noise
        for k in range(steps):
            middle = x + velocity(x, k / steps) / (2 * steps)
            x = x + velocity(middle, (k + 0.5) / steps) / steps
        return x, 2 * steps


class Flow(Velocity, Together):
    """Flow matching with the stable target and with our levers: stratified times and antithetic pairs.

    Args:
        lognormal: logit-normal times (ln sigma / alpha is normal), instead of uniform ones.
    """

    def __init__(self, data: Tensor, batch: int, generator: Generator, *, lognormal: bool, timesteps: bool) -> None:
        Velocity.__init__(self, timesteps=timesteps)
        process = sf.RectifiedFlow()
        objective = sf.Objective(
            process,
            target=stable_target(process, data),
            noise_levels=sf.LogNormal(0.0, 1.0, stratified=True)
            if lognormal
            else sf.Uniform(0.0, 1.0, stratified=True),
            weighting=sf.FlowWeighting(),
            draws_per_image=2,
            antithetic=True,
        )
        Together.__init__(self, objective, batch, generator)

    def denoiser(self, network: Network) -> Network:
        # FlowPreconditioning has the same times and velocity.
        return sf.Denoiser(Relabelled(network, self.label), sf.FlowPreconditioning())


class TorchCfm(Velocity, Separate):
    """torchcfm's flow matching.

    Args:
        optimal: pair noise and images of a batch by optimal transport.
        target: a stable target, in place of the package's velocity.
    """

    def __init__(self, batch: int, *, optimal: bool, timesteps: bool, target: sf.StableTarget | None = None) -> None:
        from torchcfm import ConditionalFlowMatcher, ExactOptimalTransportConditionalFlowMatcher

        super().__init__(timesteps=timesteps)
        self._matcher = (ExactOptimalTransportConditionalFlowMatcher if optimal else ConditionalFlowMatcher)(sigma=0.0)
        self._target = target
        self.images = batch

    def loss(self, network: Network, x0: Tensor, index: Tensor) -> Tensor:
        # The package draws from torch's and numpy's global generators. It calls noise x0 and data x1, at time 1.
        t, x_t, velocity = self._matcher.sample_location_and_conditional_flow(torch.randn_like(x0), x0)
        if self._target is not None:
            velocity = -self._target(x0, x_t, 1 - t, index=index).velocity
        return (network(x_t, self.label(t)) - velocity).square().mean()


def stable_target(process: sf.Process, data: Tensor, size: int | None = None) -> sf.StableTarget:
    """The stable target with the whole data set as references, or a number of them drawn for each call."""
    pool = sf.Pool(data, None if size is None else min(size, len(data)))
    return sf.StableTarget(process, references=pool, noise_band=sf.pick_noise_band(pool).level)


def preconditioned(network: Network) -> Network:
    """EDM's denoiser around the network."""
    assert isinstance(network, nn.Module)
    return sf.Denoiser(network, sf.EDMPreconditioning(sigma_data=0.5))


def edm_samples(network: Network, noise: Tensor, evaluations: int) -> tuple[Tensor, int]:
    """Samples on EDM's grid: Heun's method, or for few evaluations DPM-Solver++(2M)."""
    few = evaluations < 20
    steps = evaluations if few else (evaluations + 1) // 2
    sigmas = sf.sampling.edm_sigmas(steps)
    solve = sf.sampling.dpmpp_2m if few else sf.sampling.heun
    x = solve(preconditioned(network), noise * float(sigmas[0]), sigmas)
    return x, steps if few else 2 * steps - 1


LEVERS: dict[str, Levers] = {
    "ours": OURS,
    "ours-wide": replace(OURS, levels=(0.0, 1.4)),
    "ours-wide-4096": replace(OURS, levels=(0.0, 1.4), size=4096),
    "ours-unpaired": replace(OURS, levels=(0.0, 1.4), size=4096, antithetic=False),
    "ours-steps": replace(OURS, steps=True),
    "edm": Levers(),
    "stf": Levers(references=True),
    "stf-stratified": Levers(references=True, stratified=True),
    "stf-antithetic": Levers(references=True, antithetic=True),
    "stf-levels": Levers(references=True, levels=OURS.levels),
    "edm-stratified": Levers(stratified=True),
    "edm-antithetic": Levers(antithetic=True),
    "edm-levels": Levers(levels=OURS.levels),
}
PEERS = (
    "edm",
    "immiscible",
    "diffusers-eps",
    "diffusers-v",
    "min-snr",
    "min-snr-v",
    "torchcfm",
    "torchcfm-ot",
)
"""What people would pick instead of us: EDM's plain loss and the others' packages."""
FLOWS = ("torchcfm-stf", "ours-flow", "ours-flow-lognormal")
"""Flow matching with the stable target: in torchcfm's own loop, and with all levers."""
RUNNERS = (*LEVERS, *FLOWS, *PEERS[1:])


def make_runner(name: str, data: Tensor, batch: int, generator: Generator, *, timesteps: bool) -> Runner:
    """The runner of a name for uint8 data (n, C, H, W); `timesteps` as in the setting of a race."""
    if name in LEVERS:
        return Edm(LEVERS[name], data, batch, generator, timesteps=timesteps)
    match name:
        case "immiscible":
            return Immiscible(data, batch, generator)
        case "diffusers-eps":
            return Diffusers("epsilon", None, batch, generator, timesteps=timesteps)
        case "diffusers-v":
            return Diffusers("v_prediction", None, batch, generator, timesteps=timesteps)
        case "min-snr":
            return Diffusers("epsilon", 5.0, batch, generator, timesteps=timesteps)
        case "min-snr-v":
            return Diffusers("v_prediction", 5.0, batch, generator, timesteps=timesteps)
        case "torchcfm-stf":
            return TorchCfm(batch, optimal=False, timesteps=timesteps, target=stable_target(sf.RectifiedFlow(), data))
        case "ours-flow" | "ours-flow-lognormal":
            return Flow(data, batch, generator, lognormal=name != "ours-flow", timesteps=timesteps)
        case "torchcfm" | "torchcfm-ot":
            return TorchCfm(batch, optimal=name == "torchcfm-ot", timesteps=timesteps)
        case _:
            raise ValueError(f"{name}: choose among {', '.join(RUNNERS)}.")
