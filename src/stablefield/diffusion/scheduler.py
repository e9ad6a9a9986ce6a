r"""Schedulers of diffusers, read as what they are: a Gaussian process, a clock and a thing to regress on.

A training loop around a scheduler makes noisy samples with `scheduler.add_noise` (or `scale_noise`), hands `timesteps`
to its network and compares the output with the noise, with v, with the clean sample, or with a flow's velocity.
`from_diffusers` says which process the first is, which time of it a timestep is, and which view of a `Target` the last is:

| scheduler | process | time | view |
|---|---|---|---|
| with `alphas_cumprod` $a_t$ | $\alpha = \sqrt{a_t}$, $\sigma = \sqrt{1 - a_t}$ | the step | by `prediction_type` |
| EDM | $\alpha = 1$, $\sigma = t$ | $e^{4 \cdot \text{timestep}}$ | x0 |
| flow matching | $\alpha = 1 - t$, $\sigma = t$ | timestep / steps | velocity |

They are recognised by what they do: a scheduler with a table is asked to noise two samples, and refused if that is not
what its table says. diffusers itself is not imported.

References:
    Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, equation 4; Karras, Aittala, Aila, Laine,
    "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022, table 1; Esser et al., "Scaling
    Rectified Flow Transformers for High-Resolution Image Synthesis", ICML 2024, section 2.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from stablefield.diffusion.process import EDM, Process, RectifiedFlow
from stablefield.targets.target import Target

__all__ = ["Regression", "ScheduleTable", "from_diffusers"]

View: TypeAlias = Literal["noise", "v", "x0", "velocity"]
Clock: TypeAlias = Literal["step", "log level", "share"]

_VIEWS: dict[str, View] = {"epsilon": "noise", "v_prediction": "v", "sample": "x0"}
# Relative error of noised samples that is rounding.
_CLOSE = 1e-4


class ScheduleTable(Process):
    """A scheduler's table as a process: t is a step, and all numbers are those of its `add_noise`, to the last bit.

    It differs from `Discrete` in two things: it computes in float32, as schedulers do, and the last step may have no
    signal left (`rescale_betas_zero_snr`).

    Args:
        alphas_cumprod: shape (T,), decreasing, from below 1 to 0 or above.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        table = alphas_cumprod.detach().float().cpu()
        if (
            table.ndim != 1
            or len(table) == 0
            or not ((table >= 0) & (table < 1)).all()
            or not (table.diff() <= 0).all()
        ):
            raise ValueError(
                f"the scheduler's alphas_cumprod have shape {tuple(table.shape)} and run from {table.max():.4g} to "
                f"{table.min():.4g}: they must decrease within 1 to 0."
            )
        self._table = table
        self._on_device: dict[torch.device, Tensor] = {table.device: table}

    def __len__(self) -> int:
        return len(self._table)

    def __repr__(self) -> str:
        return f"ScheduleTable(<{len(self._table)} steps>)"

    def _at(self, t: Tensor) -> Tensor:
        if t.device not in self._on_device:
            self._on_device[t.device] = self._table.to(t.device)
        index = t.long()
        if t.device.type == "cpu" and not ((index >= 0) & (index < len(self._table)) & (index == t)).all():
            raise ValueError(
                f"timesteps must be whole step numbers from 0 to {len(self._table) - 1}, got {t.min()} to {t.max()}."
            )
        return self._on_device[t.device][index]

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data at step `t`, float32."""
        return self._at(t) ** 0.5

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at step `t`, float32."""
        return (1 - self._at(t)) ** 0.5

    def alpha_dot(self, t: Tensor) -> Tensor:  # noqa: ARG002
        """Not defined between the entries of a table: raises ValueError."""
        raise ValueError("a table of steps has no time derivative: regress on noise, v or x0, not on velocity.")

    def sigma_dot(self, t: Tensor) -> Tensor:
        """Not defined between the entries of a table: raises ValueError."""
        return self.alpha_dot(t)

    def time(self, noise_level: Tensor) -> Tensor:
        """The step whose sigma / alpha is nearest to `noise_level` on a logarithmic scale."""
        levels = torch.log((1 - self._table.double()) / self._table.double()).to(noise_level.device) / 2
        wanted = torch.log(noise_level.double())
        return (wanted[..., None] - levels).abs().argmin(-1)


@dataclass(frozen=True)
class Regression:
    """What a training loop around a scheduler regresses on.

    Calling it with a `Target` gives the tensor to compare the network's output with.

    Attributes:
        process: the process whose `perturb` is the scheduler's noising.
        view: of the target: "noise", "v", "x0" or "velocity". For an EDM scheduler it is x0, to be compared with what
            `scheduler.precondition_outputs` makes of the network's output.
        clock: how a timestep of the scheduler tells the process's time.
        steps: how many timesteps there are.
    """

    process: Process
    view: View
    clock: Clock
    steps: int

    def time(self, timesteps: Tensor) -> Tensor:
        """The process's times of the scheduler's timesteps (B,), for `StableTarget`."""
        match self.clock:
            case "step":
                return timesteps
            case "log level":
                return torch.exp(4 * timesteps.to(torch.promote_types(timesteps.dtype, torch.float32)))
            case "share":
                return timesteps.to(torch.promote_types(timesteps.dtype, torch.float32)) / self.steps

    def __call__(self, target: Target) -> Tensor:
        """The view of `target` that takes the place of what the loop compared with before, shape (B, ...)."""
        match self.view:
            case "noise":
                return target.noise
            case "v":
                return target.v
            case "x0":
                return target.x0
            case "velocity":
                return target.velocity


def from_diffusers(scheduler: Any) -> Regression:
    """What to regress on with stable targets in a loop around a diffusers scheduler.

    Three lines change in such a loop:

        regression = sf.from_diffusers(noise_scheduler)
        stable = sf.StableTarget(regression.process)
        ...
        target = regression(stable(clean, noisy, regression.time(timesteps), noise=noise))  # was: target = noise

    Args:
        scheduler: a DDPM-like one (with `alphas_cumprod`, of any prediction type), an EDM one, or a flow-matching one.

    Returns:
        The process, its clock, and the view of the target.

    Raises:
        ValueError: if the scheduler does not noise as its table says, or is of another kind, with what to use instead.
    """
    kind, config = type(scheduler).__name__, getattr(scheduler, "config", None)
    if config is None:
        raise ValueError(f"scheduler is a {kind}: pass a scheduler of diffusers, such as DDPMScheduler().")
    steps = int(config.num_train_timesteps)
    if hasattr(scheduler, "precondition_outputs"):
        return Regression(EDM(), "x0", "log level", steps)
    prediction = getattr(config, "prediction_type", "flow_prediction")
    if hasattr(scheduler, "alphas_cumprod"):
        if prediction not in _VIEWS:
            raise ValueError(
                f"{kind} has the prediction type {prediction}: with a table of steps it is one of {', '.join(_VIEWS)}. "
                "For flow matching pass a FlowMatchEulerDiscreteScheduler."
            )
        process = ScheduleTable(scheduler.alphas_cumprod)
        _check_noising(scheduler, process, kind)
        return Regression(process, _VIEWS[prediction], "step", steps)
    if hasattr(scheduler, "scale_noise"):
        if getattr(config, "invert_sigmas", False):
            raise ValueError(f"{kind} inverts its noise levels (invert_sigmas): time from data to noise is needed.")
        return Regression(RectifiedFlow(), "velocity", "share", steps)
    raise ValueError(
        f"{kind} is neither DDPM-like (no alphas_cumprod), nor of EDM or flow matching: the process cannot be told from it."
    )


def _check_noising(scheduler: Any, process: ScheduleTable, kind: str) -> None:
    last = len(process) - 1
    steps = torch.tensor([0, last // 2, last])
    one, zero = torch.ones(3, 1), torch.zeros(3, 1)
    device = scheduler.alphas_cumprod.device

    def noised(x0: Tensor, noise: Tensor) -> Tensor:
        return scheduler.add_noise(x0.to(device), noise.to(device), steps.to(device)).cpu()[:, 0]

    try:
        data, noise = noised(one, zero), noised(zero, one)
    except (IndexError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{kind} cannot noise samples at its own steps ({error}): train with a DDPMScheduler."
        ) from error
    alpha, sigma = process.alpha(steps), process.sigma(steps)
    if not (torch.allclose(data, alpha, _CLOSE, 1e-6) and torch.allclose(noise, sigma, _CLOSE, 1e-6)):
        raise ValueError(
            f"{kind} does not noise samples as its alphas_cumprod say (it scales by {data.tolist()} where the table gives "
            f"{alpha.tolist()}): it is made for sampling. Train with DDPMScheduler.from_config({kind}.config)."
        )
