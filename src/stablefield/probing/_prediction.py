r"""What a network predicts: its call, and how its output becomes the denoiser D, the estimate of $x_0$.

With $x_t = \alpha x_0 + \sigma \varepsilon$ and a dot for the derivative in t, the denoisers of the outputs, and an output's
error as a multiple of that of D, are

| prediction | output | D | factor |
|---|---|---|---|
| x0 | $x_0$ | the output | $1$ |
| epsilon | $\varepsilon$ | $(x_t - \sigma \varepsilon) / \alpha$ | $\alpha / \sigma$ |
| v | $\alpha \varepsilon - \sigma x_0$ | $(\alpha x_t - \sigma v) / p$ | $p / \sigma$, $p = \alpha^2 + \sigma^2$ |
| velocity | $u = \dot\alpha x_0 + \dot\sigma \varepsilon$ | $(\dot\sigma x_t - \sigma u) / q$ | $q / \sigma$, q below |

with $q = \dot\sigma \alpha - \dot\alpha \sigma$. The factor's square is the weight in the loss of D that makes it the
output's plain mean squared error.

References:
    Salimans, Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", ICLR 2022, appendix D (v); Lipman et al.,
    "Flow Matching for Generative Modeling", ICLR 2023, equation 14 (the velocity of a Gaussian path).
"""

import contextlib
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from stablefield._modules import modules_of
from stablefield._shapes import check_kind, check_tensor, per_row
from stablefield.diffusion._discrete import Discrete
from stablefield.diffusion._from_diffusers import Regression
from stablefield.diffusion._noise_levels import LogNormal, LogUniform, NoiseLevels, Uniform
from stablefield.diffusion._process import EDM, VE, VP, Cosine, Process, RectifiedFlow, rates, scales
from stablefield.diffusion._weighting import EDMWeighting, Weighting

__all__ = [
    "Kind",
    "OutputWeighting",
    "Prediction",
    "ScheduledSteps",
    "Steps",
    "WholeRange",
    "checked_output",
    "evaluated",
    "placement",
    "usual_noise_levels",
]

Kind: TypeAlias = Literal["denoiser", "x0", "epsilon", "v", "velocity"]

_KINDS: dict[str, Kind] = {"noise": "epsilon", "v": "v", "x0": "x0", "velocity": "velocity"}


@dataclass(frozen=True)
class Prediction:
    """How to call a network and read its output.

    Args:
        process: what makes x_t.
        kind: "denoiser" is called as D(x_t / alpha, sigma / alpha); a raw model as model(x_t, t) with the process's t, and
            returns what the other names say.
        steps: a raw model gets t times this, as with diffusers' flow matching; None for t itself.

    Raises:
        ValueError: for another kind, or for a velocity of a process without derivatives.
    """

    process: Process
    kind: Kind
    steps: int | None = None

    def __post_init__(self) -> None:
        check_kind("prediction", self.kind, str, f"one of {', '.join(get_args(Kind))}")
        if self.kind not in get_args(Kind):
            raise ValueError(f"prediction={self.kind[:40]!r}: pass one of {', '.join(get_args(Kind))}.")
        if self.kind == "velocity":
            rates(self.process, torch.zeros(1, dtype=torch.float64))  # raises if there are none

    @classmethod
    def of_scheduler(cls, regression: Regression, kind: Kind | None) -> "Prediction":
        """That of a training loop around a scheduler of diffusers, whose network gets timesteps.

        Raises:
            ValueError: if the timesteps follow a table or an EDM scheduler, whose network has its own scalings.
        """
        kind = _KINDS[regression.view] if kind is None else kind
        if regression.clock not in ("step", "share") and kind != "denoiser":
            raise ValueError(
                f"process is the regression of a scheduler whose timesteps follow the clock {regression.clock!r}: pass "
                "prediction='denoiser' and call with a function denoiser(x, sigma) that applies the scheduler's scalings."
            )
        return cls(regression.process, kind, regression.steps if regression.clock == "share" else None)

    def denoised(
        self, model: Callable[..., Any], x_t: Tensor, t: Tensor, labels: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """D of the noisy rows x_t (B, ...) at times t (B,), float64 (float32 on MPS), of the shape of x_t.

        Args:
            model: called with tensors on the device of `x_t` and in `dtype`; returns a tensor, or an object that holds it
                as `sample`, like the networks of diffusers.
            x_t: noisy rows.
            t: times, float64 on the CPU.
            labels: a third argument, if given.
            dtype: of the network.

        Raises:
            TypeError: if the model returns no tensor.
            ValueError: if it returns another shape.
        """
        wide = torch.float32 if x_t.device.type == "mps" else torch.float64
        alpha, sigma = (per_row(scale.to(x_t.device, wide), x_t.to(wide)) for scale in scales(self.process, t))
        seen = x_t.to(wide) / alpha if self.kind == "denoiser" else x_t
        time = self.process.noise_level(t) if self.kind == "denoiser" else t * (self.steps or 1)
        whole = self.kind != "denoiser" and isinstance(self.process, Discrete)
        # Not in 16 bits, which cannot tell neighbouring timesteps apart; networks cast their embedding of it.
        time = time.to(x_t.device, torch.int64 if whole else torch.promote_types(dtype, torch.float32))
        out = model(seen.to(dtype), time) if labels is None else model(seen.to(dtype), time, labels)
        out = checked_output("model", out if isinstance(out, Tensor) else getattr(out, "sample", out), x_t)
        return self._converted(out.to(wide), x_t.to(wide), alpha, sigma, t)

    def _converted(self, out: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, t: Tensor) -> Tensor:
        match self.kind:
            case "denoiser" | "x0":
                return out
            case "epsilon":
                return (x_t - sigma * out) / alpha
            case "v":
                return (alpha * x_t - sigma * out) / (alpha**2 + sigma**2)
            case "velocity":
                alpha_dot, sigma_dot = (per_row(rate.to(x_t.device), x_t) for rate in rates(self.process, t))
                return (sigma_dot * x_t - sigma * out) / (sigma_dot * alpha - alpha_dot * sigma)

    def weighting(self) -> Weighting:
        """The weight of the usual loss: the output's mean squared error, or EDM's for a denoiser."""
        return EDMWeighting() if self.kind == "denoiser" else OutputWeighting(self.process, self.kind)


@dataclass(frozen=True)
class OutputWeighting:
    """The weight that makes the loss of D the plain mean squared error of a raw model's output."""

    process: Process
    kind: Kind

    def __call__(self, noise_level: Tensor) -> Tensor:
        level = noise_level.double()
        t = self.process.time(level).double()
        match self.kind:
            case "denoiser" | "x0":
                return torch.ones_like(level)
            case "epsilon":
                return 1 / level**2
            case "v":
                alpha, sigma = self.process.alpha(t), self.process.sigma(t)
                return ((alpha**2 + sigma**2) / sigma) ** 2
            case "velocity":
                # With sigma / alpha for the level, so that nothing cancels at the ends of the time range.
                rates = self.process.sigma_dot(t) / level - self.process.alpha_dot(t)
                return rates**2


@dataclass(frozen=True)
class Steps(NoiseLevels):
    """Every step of a `Discrete` process equally often, but not one without signal."""

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        assert isinstance(process, Discrete)
        last = torch.tensor(len(process) - 1.0)
        count = len(process) - int(process.noise_level(last).isinf())
        return (u * count).floor().clamp(max=count - 1)


@dataclass(frozen=True)
class ScheduledSteps(NoiseLevels):
    """Every step of a scheduler equally often: its process's `times`, increasing, each with noise and signal."""

    times: tuple[float, ...] = field(repr=False)

    def quantile(self, u: Tensor, process: Process) -> Tensor:  # noqa: ARG002
        count = len(self.times)
        place = (u * count).floor().clamp(max=count - 1).long()
        return torch.tensor(self.times, dtype=u.dtype, device=u.device)[place]


@dataclass(frozen=True)
class WholeRange(NoiseLevels):
    """Time uniform over the `time_range` of a process."""

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        first, last = process.time_range
        return first + u * (last - first)


def checked_output(who: str, out: Any, rows: Tensor) -> Tensor:
    """The output of a network for `rows` (B, ...), if it has their shape.

    Args:
        who: the network in words, for errors.
        out: what it returned.
        rows: what it was called with.

    Raises:
        TypeError: if it returned no tensor.
        ValueError: if it returned another shape.
    """
    check_tensor(f"the {who}'s output", out)
    if out.shape != rows.shape:
        raise ValueError(
            f"the {who} returned shape {tuple(out.shape)} for rows of shape {tuple(rows.shape)}: return the shape of the "
            "rows."
        )
    return out


def usual_noise_levels(process: Process | Regression) -> NoiseLevels:
    """The noise levels with which each process is usually trained; of a scheduler its steps, equally often.

    Raises:
        ValueError: if they are unknown: for EDM schedulers, and for a process of the caller's without a finite `time_range`.
    """
    if isinstance(process, Regression):
        return _of_scheduler(process)
    if isinstance(process, Discrete):
        return Steps()
    if isinstance(process, EDM):
        return LogNormal()
    if isinstance(process, VE):
        return LogUniform()
    if isinstance(process, RectifiedFlow):
        return Uniform(0.0, 1.0)
    if isinstance(process, VP | Cosine):
        return Uniform()
    first, last = process.time_range
    if not (math.isfinite(first) and math.isfinite(last) and first < last):
        raise ValueError(
            f"noise_levels=None: how training draws the times of {process} is unknown, since its time_range is from "
            f"{first:g} to {last:g}: pass noise_levels=Uniform(start, end), or another distribution of your training."
        )
    return WholeRange()


def _of_scheduler(regression: Regression) -> NoiseLevels:
    if isinstance(regression.process, Discrete):
        return Steps()
    if isinstance(regression.process, EDM) or regression.times is None:
        raise ValueError(
            f"noise_levels=None: the scheduler of process={regression} does not say how training draws its steps, by the "
            "log-normal distribution of EDM or equally often: pass noise_levels=LogNormal(), or a NoiseLevels of your "
            "own whose quantile returns regression.times[(u * len(regression.times)).long()]."
        )
    level = regression.process.noise_level(regression.times)
    times = regression.times[(level > 0) & level.isfinite()]
    if len(times) == 0:
        raise ValueError(
            f"process={regression} has no step with both noise and signal: call from_diffusers(scheduler) with the "
            "scheduler as in training."
        )
    return ScheduledSteps(tuple(times.tolist()))


def placement(model: object, x: Tensor) -> tuple[torch.device, torch.dtype]:
    """Device and floating dtype of a model's weights; those of `x` for a plain function."""
    if isinstance(model, nn.Module):
        for weight in (*model.parameters(), *model.buffers()):
            if weight.is_floating_point():
                return weight.device, weight.dtype
    return x.device, x.dtype


@contextlib.contextmanager
def evaluated(model: Callable[..., Any]) -> Generator[None]:
    """The modules that a model calls (see `modules_of`) in evaluation mode.

    The mode of each of their parts and torch's random state are as before, afterwards.
    """
    found = modules_of(model)
    modules = {part: part.training for module in found for part in module.modules()}
    devices = {placement(module, torch.empty(0))[0] for module in found}
    with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
        for module in modules:
            module.training = False
        try:
            yield
        finally:
            for module, mode in modules.items():
                module.training = mode
