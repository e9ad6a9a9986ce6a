"""An estimate: what a run would take, from a few steps taken here and thrown away."""

import resource
import sys
import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from stablefield.training._feed import Feed
from stablefield.training._run_folder import RunConfig
from stablefield.training._stepper import Stepper

__all__ = ["Estimate", "estimate"]

# Steps at least and at most, and the seconds after which there are enough: a single step tells little on a busy machine.
STEPS, MOST, ENOUGH = 3, 30, 1.0


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Attributes:
        parameters: of the network.
        state_bytes: of weights, averages, gradients and the optimiser's moments.
        peak_bytes: the most memory that the steps took on the device (for a CPU: that the process took, data included).
        seconds_per_step: median over the steps, without the first.
        target_seconds: of these, spent on noise and target.
    """

    parameters: int
    state_bytes: int
    peak_bytes: int
    seconds_per_step: float
    target_seconds: float


def estimate(config: RunConfig, feed: Feed, accelerator: Accelerator) -> Estimate:
    """Take a few steps of a run and say what they took; nothing is written."""
    device = accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    stepper = Stepper(config, feed, accelerator)
    parameters = sum(p.numel() for p in stepper.trained.model.parameters())
    copies = len(stepper.trained.averages) + 4
    times: list[tuple[float, float]] = []
    for step in range(MOST):
        if step >= STEPS and sum(taken for taken, _ in times) > ENOUGH:
            break
        began, target_began = time.perf_counter(), stepper.target_watch.seconds()
        stepper.take(step)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - began, stepper.target_watch.seconds() - target_began))
    seconds, target_seconds = sorted(times[1:])[len(times[1:]) // 2]
    return Estimate(parameters, 4 * copies * parameters, _peak(device), seconds, target_seconds)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
