r"""Interpret schedulers of diffusers as a Gaussian process, a clock and a regression target.

A training loop around a scheduler makes noisy samples with `scheduler.add_noise` (or `scale_noise`), passes `timesteps` to
its network and compares the output with the noise, with v, with the clean sample, or with a flow's velocity.
`from_diffusers` finds the process, its time at each timestep, and the view of a `Target` to compare with:

| scheduler | process | time | view |
|---|---|---|---|
| with `alphas_cumprod` $a_t$ | $\alpha = \sqrt{a_t}$, $\sigma = \sqrt{1 - a_t}$ | the step | by `prediction_type` |
| EDM | $\alpha = 1$, $\sigma = t$ | $e^{4 \cdot \text{timestep}}$, or by its own table | x0 |
| flow matching | $\alpha = 1 - t$, $\sigma = t$ | timestep / steps, or by its own table | velocity |

It recognises schedulers by their behaviour, not by their name: it noises samples at all of their timesteps, and rejects a
scheduler whose results fit none of these processes. It does not import diffusers itself.

References:
    Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, equation 4; Karras, Aittala, Aila, Laine,
    "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022, table 1; Esser et al., "Scaling
    Rectified Flow Transformers for High-Resolution Image Synthesis", ICML 2024, section 2.
"""

import copy
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from stablefield._reading import readable
from stablefield._shapes import check_kind, check_tensor, whole_number
from stablefield.diffusion._discrete import Discrete
from stablefield.diffusion._process import EDM, Process, RectifiedFlow
from stablefield.targets._target import Target

__all__ = ["Regression", "from_diffusers"]

View: TypeAlias = Literal["noise", "v", "x0", "velocity"]
Clock: TypeAlias = Literal["step", "log level", "share", "table"]

_VIEWS: dict[str, View] = {"epsilon": "noise", "v_prediction": "v", "sample": "x0"}


@dataclass(frozen=True)
class Regression:
    """The regression target of a training loop around a scheduler.

    Calling it with a `Target` returns the tensor to compare the network's output with.

    Attributes:
        process: the process whose `perturb` is the scheduler's noising.
        view: of the target: "noise", "v", "x0" or "velocity". For an EDM scheduler it is x0, to compare with the result of
            `scheduler.precondition_outputs`.
        clock: how a timestep of the scheduler determines the process's time: it is the time ("step"); exp(4 timestep)
            ("log level"); timestep / steps ("share"); or by the scheduler's table ("table").
        steps: the scheduler's number of timesteps in training.
        timesteps: the scheduler's timesteps in ascending order, shape (T,), float64, of EDM and flow matching; the clock
            "table" needs them.
        times: the process's time at each of them, shape (T,), float64.
    """

    process: Process
    view: View
    clock: Clock
    steps: int
    timesteps: Tensor | None = field(default=None, repr=False, compare=False)
    times: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_kind("process", self.process, Process, "a Process, such as EDM()")
        for name, value, words in (("view", self.view, get_args(View)), ("clock", self.clock, get_args(Clock))):
            check_kind(name, value, str, f"one of {', '.join(words)}")
            if value not in words:
                raise ValueError(f"{name} is {value!r:.40}: pass one of {', '.join(words)}.")
        whole_number("steps", self.steps, 1)
        given = [table is not None for table in (self.timesteps, self.times)]
        if given not in ([True, True], [False, False]) or (self.clock == "table" and not all(given)):
            raise ValueError("timesteps and times are one table, which the clock 'table' needs: pass both, or neither.")

    def time(self, timesteps: Tensor) -> Tensor:
        """The process's times of the scheduler's timesteps (B,), for `StableTarget`.

        Raises:
            TypeError: if `timesteps` is not a tensor.
            ValueError: if a timestep is not in the scheduler's table; on a GPU, where a check would wait, its time is NaN,
                which `StableTarget` rejects.
        """
        check_tensor("timesteps", timesteps, real=True)
        floating = torch.promote_types(timesteps.dtype, torch.float32)
        match self.clock:
            case "step":
                return timesteps
            case "log level":
                return torch.exp(4 * timesteps.to(floating))
            case "share":
                return timesteps.to(floating) / self.steps
            case "table":
                return self._looked_up(timesteps).to(floating)

    def _looked_up(self, timesteps: Tensor) -> Tensor:
        assert self.timesteps is not None
        assert self.times is not None
        wide = torch.float32 if timesteps.device.type == "mps" else torch.float64
        known, times = (table.to(timesteps.device, wide) for table in (self.timesteps, self.times))
        wanted = timesteps.to(wide)
        # The nearest entry, found by the midpoints between neighbours. Timesteps may have been rounded to float32.
        nearest = torch.bucketize(wanted, (known[:-1] + known[1:]) / 2)
        there = (known[nearest] - wanted).abs() <= 1e-6 * known.abs().max()
        if timesteps.device.type == "cpu" and readable(timesteps.device) and not there.all():
            raise ValueError(
                f"timesteps hold {timesteps[~there][0].item():g}, which is not one of the scheduler's {len(known)} "
                f"timesteps from {known[0]:g} to {known[-1]:g}: draw them from scheduler.timesteps, and call from_diffusers "
                "again after set_timesteps."
            )
        return torch.where(there, times[nearest], torch.nan)

    def __call__(self, target: Target) -> Tensor:
        """The view of `target` that replaces the loop's previous regression target, shape (B, ...).

        Raises:
            TypeError: if `target` is not a `Target`.
        """
        check_kind("target", target, Target, "the Target that StableTarget returns, regression(stable(...))")
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
    """The regression for stable targets in a loop around a diffusers scheduler.

    Three lines change in such a loop:

        regression = sf.from_diffusers(noise_scheduler)
        stable = sf.StableTarget(regression.process, references=sf.Pool(images))
        ...
        target = regression(stable(clean, noisy, regression.time(timesteps), index=index, noise=noise))  # was: noise

    This reads the scheduler's current state and does not change it: call it again after `set_timesteps`.

    Args:
        scheduler: DDPM-like (with `alphas_cumprod`, of any prediction type), EDM or flow matching.

    Returns:
        The process, its clock, and the view of the target.

    Raises:
        ValueError: if the scheduler does not noise samples like one of these processes, or is of another kind; the message
            names an alternative.
    """
    if isinstance(scheduler, type):
        raise ValueError(
            f"scheduler is the class {scheduler.__name__}: pass an instance, such as {scheduler.__name__}()."
        )
    kind, config = type(scheduler).__name__, getattr(scheduler, "config", None)
    if config is None:
        raise ValueError(f"scheduler is a {kind}: pass a scheduler of diffusers, such as DDPMScheduler().")
    if hasattr(scheduler, "precondition_outputs"):
        return _edm(scheduler, kind)
    if isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
        return _table(scheduler, kind)
    if hasattr(scheduler, "scale_noise"):
        return _flow(scheduler, kind)
    raise ValueError(
        f"{kind} is neither DDPM-like (no alphas_cumprod), nor of EDM or flow matching, so its process is unknown: "
        "make x_t with process.perturb, where process is sf.VE(), sf.EDM(), sf.VP(), sf.Cosine() or sf.RectifiedFlow(), "
        "or train with a DDPMScheduler."
    )


def _table(scheduler: Any, kind: str) -> Regression:
    prediction = getattr(scheduler.config, "prediction_type", None)
    if prediction is not None and prediction not in _VIEWS:
        raise ValueError(
            f"{kind} has the prediction type {prediction}: with a table of steps it must be one of {', '.join(_VIEWS)}. "
            "For flow matching pass a FlowMatchEulerDiscreteScheduler."
        )
    table = scheduler.alphas_cumprod
    try:
        process = Discrete(table)
    except ValueError as error:
        raise ValueError(f"{kind} has a table that is not a noise schedule: {error}") from error
    remedy = "Train with DDPMScheduler.from_config(scheduler.config)."
    steps = torch.arange(len(process))
    data, noise = _noising(scheduler, kind, steps, remedy)
    alpha, sigma = process.alpha(steps.double()), process.sigma(steps.double())
    if not (_close(data, alpha) and _close(noise, sigma)):
        step = int(((data - alpha).abs() + (noise - sigma).abs()).argmax())
        raise ValueError(
            f"{kind} does not noise samples according to its alphas_cumprod (at step {step} it scales data by "
            f"{data[step]:.4g} and noise by {noise[step]:.4g}, the table by {alpha[step]:.4g} and {sigma[step]:.4g}): "
            f"it is made for sampling. {remedy}"
        )
    if prediction is None:
        raise ValueError(f"{kind} does not state what the network predicts (no prediction_type). {remedy}")
    return Regression(process, _VIEWS[prediction], "step", len(process))


def _edm(scheduler: Any, kind: str) -> Regression:
    remedy = "Train with a new EDMEulerScheduler()."
    timesteps, data, noise = _asked(scheduler, kind, remedy)
    if not _close(data, torch.ones_like(data)):
        raise ValueError(
            f"{kind} scales data by {data.min():.4g} to {data.max():.4g}, but EDM does not scale them. {remedy}"
        )
    return _clocked(EDM(), "x0", "log level", timesteps, noise, torch.exp(4 * timesteps), _steps(scheduler, timesteps))


def _flow(scheduler: Any, kind: str) -> Regression:
    remedy = "Train with a new FlowMatchEulerDiscreteScheduler()."
    # The noising does not show it: sampling starts from noise, but here the first step has none.
    if getattr(scheduler.config, "invert_sigmas", False):
        raise ValueError(
            f"{kind} inverts its noise levels (invert_sigmas), but time must run from data to noise. {remedy}"
        )
    timesteps, data, noise = _asked(scheduler, kind, remedy)
    if not _close(data, 1 - noise):
        row = int((data + noise - 1).abs().argmax())
        raise ValueError(
            f"{kind} is not a rectified flow: at timestep {timesteps[row]:g} it scales data by {data[row]:.4g} and noise by "
            f"{noise[row]:.4g}, which do not add up to 1. {remedy}"
        )
    steps = _steps(scheduler, timesteps)
    return _clocked(RectifiedFlow(), "velocity", "share", timesteps, noise, timesteps / steps, steps)


def _steps(scheduler: Any, timesteps: Tensor) -> int:
    return int(getattr(scheduler.config, "num_train_timesteps", None) or len(timesteps))


def _clocked(
    process: Process, view: View, clock: Clock, timesteps: Tensor, times: Tensor, formula: Tensor, steps: int
) -> Regression:
    """The regression with the clock's formula if the scheduler follows it, else with its table."""
    return Regression(process, view, clock if _close(times, formula) else "table", steps, timesteps, times)


def _asked(scheduler: Any, kind: str, remedy: str) -> tuple[Tensor, Tensor, Tensor]:
    """A scheduler's timesteps in ascending order, and its scales of data and noise there; each (T,), float64.

    Raises:
        ValueError: if noise does not grow with the timestep.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if not isinstance(timesteps, Tensor) or timesteps.ndim != 1 or len(timesteps) == 0:
        raise ValueError(f"{kind} has no timesteps, so its process is unknown. {remedy}")
    # In their own dtype: schedulers look for the exact number.
    timesteps = timesteps.detach().cpu().unique()
    data, noise = _noising(scheduler, kind, timesteps, remedy)
    if len(timesteps) > 1 and torch.equal(noise, noise[:1].expand_as(noise)):
        raise ValueError(
            f"{kind} noises samples at {noise[0]:.4g} whatever the timestep: it is in the middle of sampling. {remedy}"
        )
    if not (noise.diff() >= 0).all():
        raise ValueError(
            f"{kind} inverts its noise levels (noise {noise[0]:.4g} at timestep {timesteps[0]:g}, {noise[-1]:.4g} at "
            f"{timesteps[-1]:g}), but time must run from data to noise. {remedy}"
        )
    return timesteps.double(), data, noise


def _noising(scheduler: Any, kind: str, timesteps: Tensor, remedy: str) -> tuple[Tensor, Tensor]:
    """A scheduler's scales of data and noise at each timestep (T,), both (T,), float64.

    Raises:
        ValueError: if it fails, or does anything other than scale and add.
    """
    # Only data, only noise, and both.
    one = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    x0, noise = (column.reshape(1, 1, 1, 3) for column in one.unbind(1))

    def ask(timestep: Tensor) -> Tensor:
        # A copy each time: some schedulers remember their first timestep.
        fresh = copy.copy(scheduler)
        if hasattr(fresh, "scale_noise"):
            return fresh.scale_noise(x0, timestep, noise)
        return fresh.add_noise(x0, noise, timestep)

    try:
        answers = torch.cat([ask(timesteps[k : k + 1]) for k in range(len(timesteps))])
        scales = answers.double().reshape(len(timesteps), 3)
    except Exception as error:
        raise ValueError(f"{kind} cannot noise samples at its own timesteps ({error}). {remedy}") from error
    if not scales.isfinite().all() or not _close(scales[:, 2], scales[:, 0] + scales[:, 1]):
        raise ValueError(f"{kind} does not noise samples as alpha x0 + sigma noise. {remedy}")
    return scales[:, 0], scales[:, 1]


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether noised samples differ only by rounding."""
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
