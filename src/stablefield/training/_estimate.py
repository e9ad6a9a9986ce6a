"""Estimate what a run would cost, from a few trial steps that are discarded."""

import math
import resource
import statistics
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from stablefield._distributed import Ranks
from stablefield._memory import size_text
from stablefield.data._image_set import ImageSet
from stablefield.report._cells import duration
from stablefield.training._accelerator import make_accelerator
from stablefield.training._feed import Feed
from stablefield.training._pace import Costs
from stablefield.training._placement import placed
from stablefield.training._recipe import Recipe
from stablefield.training._report_writer import report_seconds
from stablefield.training._run_config import RunConfig
from stablefield.training._stepper import Stepper

__all__ = ["PICTURE", "RunEstimate", "decoding_seconds", "estimate_run"]

PICTURE = 64
"""Images of a sample grid."""
# A sample takes 35 evaluations of the network. A training step takes three evaluations of its rows.
_NFE, _TRAINED = 35, 3
# Bytes per second that a checkpoint is written with, its checksum included.
_WRITTEN = 2e8
# Share of the time from which the table shows what else than steps takes it, and from which it shows a part.
_OTHER, _PART = 0.1, 0.01

# Fewest and most trial steps, and the seconds that are enough: a single step says little on a busy machine.
STEPS, MOST, ENOUGH = 3, 30, 1.0


@dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """The estimated cost of a run; `print` shows the table.

    Attributes:
        images: the training data, in words.
        parameters: number of the network's parameters.
        state_bytes: bytes of weights, averages, gradients and the optimiser's moments; with fsdp, of all processes together.
        peak_bytes: peak memory on the device (for a CPU: of the process, including the data).
        steps: remaining steps, in words.
        references: references per step, in words; empty for the single-sample target.
        seconds_per_step: median over the trial steps, without the first.
        target_seconds: the part of seconds_per_step for noise and target.
        setup_seconds: time to build a network with its optimiser and averages.
        seconds: time for all that is left, the sum of `parts`.
        parts: seconds of the start, the steps, sample grids, checkpoints, looks at held-out samples, the samples of
            observers, and the report.
        costs: what one of each takes.
        device: where the trial steps ran.
    """

    images: str
    parameters: int
    state_bytes: int
    peak_bytes: int
    steps: str
    references: str
    seconds_per_step: float
    target_seconds: float
    setup_seconds: float
    seconds: float
    parts: dict[str, float]
    costs: Costs
    device: torch.device

    def rows(self) -> list[tuple[str, str]]:
        """The table."""
        memory = f"{size_text(self.state_bytes)} of weights, averages, gradients and moments; "
        rows = [
            ("images", self.images),
            ("parameters", f"{self.parameters:,}"),
            ("memory", f"{memory}{size_text(self.peak_bytes)} at the peak on {self.device}"),
            ("steps", self.steps),
        ]
        if self.references:
            rows.append(("references", self.references))
        share = self.target_seconds / self.seconds_per_step
        return [
            *rows,
            ("a step here", f"{self.seconds_per_step:.3f} s, of which noise and target {share:.1%}"),
            ("all of it", f"about {duration(self.seconds)} on {self.device}{self._shares()}"),
        ]

    def _shares(self) -> str:
        """The parts of the time in words, if much of it is for other things than steps."""
        if self.seconds - self.parts["steps"] <= _OTHER * self.seconds:
            return ""
        shown = [f"{name} {duration(part)}" for name, part in self.parts.items() if part > _PART * self.seconds]
        return f": {', '.join(shown)}"

    def __str__(self) -> str:
        return "\n".join(f"{name:12}{text}" for name, text in self.rows())


def estimate_run(
    config: RunConfig,
    data: ImageSet,
    device: torch.device,
    done: int = 0,
    *,
    evaluate_every: int = 0,
    evaluate_samples: int = 0,
    decoding: float = 0.0,
) -> RunEstimate:
    """Estimate what a run would cost, from a few trial steps; write nothing.

    Args:
        config: the run's configuration.
        data: its images.
        device: where to compute.
        done: steps that the run has done already.
        evaluate_every: steps between evaluations of samples by an observer; 0 for none.
        evaluate_samples: samples of each of them.
        decoding: seconds to decode a sample grid.
    """
    recipe, accelerator = config.recipe, make_accelerator(device)
    device = accelerator.device
    placement = placed(recipe, data, device, accelerator.num_processes)
    labelled, rows = config.classes > 0, config.training_rows(len(data))
    with closing(Feed(data, recipe, device, labelled=labelled, placement=placement, rows=rows)) as feed:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        stepper = Stepper(config, feed, accelerator)
        seconds, target_seconds = _timed(stepper, device)
        peak, copies = _peak(device), len(stepper.trained.averages) + 4
        parameters = sum(p.numel() for p in stepper.trained.model.parameters())
        del stepper  # two networks may be more than the device holds
        # Time the second one: building the first loads modules, once.
        began = time.perf_counter()
        Stepper(config, feed, accelerator)
        setup = time.perf_counter() - began
    costs = _costs(recipe, seconds, target_seconds, setup, 4 * copies * parameters, decoding)
    parts = _parts(config, costs, done, evaluate_every, evaluate_samples)
    left = recipe.steps - done
    images = left * recipe.images_per_step
    epochs = images / (len(data) if rows is None else len(rows))
    batch = recipe.batch_in_words if recipe.draws_per_image > 1 else f"{recipe.batch}"
    many = f"all, in {accelerator.num_processes} parts" if placement == "sharded" else str(recipe.references)
    return RunEstimate(
        images=f"{len(data):,} of {'x'.join(map(str, data.shape))}, {size_text(data.images.nbytes)}",
        parameters=parameters,
        state_bytes=4 * copies * parameters,
        peak_bytes=peak,
        steps=f"{left:,}{f' of {recipe.steps:,} left,' if done else ''} of {batch}: {images:,} images, "
        f"{f'{epochs:,.0f}' if epochs >= 10 else f'{epochs:.2g}'} epochs",
        references=f"{many} per step" if recipe.target == "stf" else "",
        seconds_per_step=seconds,
        target_seconds=target_seconds,
        setup_seconds=setup,
        seconds=sum(parts.values()),
        parts=parts,
        costs=costs,
        device=device,
    )


def decoding_seconds(config: RunConfig, vae: str | Path, device: torch.device) -> float:
    """What it takes to decode a sample grid of latents of images; 0 for a run of other data.

    Args:
        config: the run's configuration.
        vae: the autoencoder's place, if it has moved.
        device: where to compute.
    """
    if config.autoencoder is None:
        return 0.0
    return config.autoencoder.open(vae, device).decoding_seconds(config.shape, PICTURE)


def _costs(recipe: Recipe, step: float, target: float, setup: float, state: int, decoding: float) -> Costs:
    """The costs of a run, from the seconds of a trial step, of its target and of the start, and the bytes of its state."""
    row = max(0.0, step - target) / (_TRAINED * recipe.batch)
    picture = _NFE * PICTURE * row + decoding
    return Costs(setup=setup, step=step, picture=picture, checkpoint=state / _WRITTEN, row=row)


def _parts(config: RunConfig, costs: Costs, done: int, evaluate_every: int, evaluate_samples: int) -> dict[str, float]:
    """What the parts of a run take from step `done` to its end."""
    recipe, held_out = config.recipe, config.held_out
    steps = recipe.steps
    if done >= steps:
        return {"steps": 0.0}
    grids = _times(recipe.sample_every, done, steps) + sum(done < step < steps for step in recipe.early_grids)
    looks = 0 if held_out is None else _times(held_out.every, done, steps)
    # At every look the loss may be the best so far, whose checkpoint the run keeps.
    saves = _times(recipe.checkpoint_every, done, steps) + looks
    found = {
        "start": costs.setup,
        "steps": (steps - done) * costs.step,
        "pictures": grids * costs.picture,
        "checkpoints": saves * costs.checkpoint,
    }
    if held_out is not None:
        found["held-out samples"] = looks * held_out.evaluations * costs.row
    if evaluate_every:
        found["evaluations"] = _times(evaluate_every, done, steps) * _NFE * evaluate_samples * costs.row
    found["report"] = report_seconds(sum(found.values()))
    return found


def _times(every: int, done: int, steps: int) -> int:
    """How often something is due after step `done` that is due at multiples of `every`, if that is not 0, and at the end."""
    return math.ceil(steps / every) - done // every if every else 1


def _timed(stepper: Stepper, device: torch.device) -> tuple[float, float]:
    """Seconds per step, and for its noise and target: the median over a few steps.

    Of a target that is computed for several steps together, each step has its share.
    """
    times, ranks = list[tuple[float, float]](), Ranks.launched(device)
    for step in range(MOST):
        enough = sum(taken for taken, _ in times) > ENOUGH
        # Processes measure different times, but all of them must take part in a step.
        if step >= STEPS and ranks.broadcast(enough, "to time a step"):
            break
        began, target_began = time.perf_counter(), stepper.target_watch.seconds()
        stepper.take(step)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - began, stepper.target_watch.seconds() - target_began))
    together = stepper.steps_together
    if together == 1:
        return sorted(times[1:])[len(times[1:]) // 2]
    network = statistics.median(taken - target for taken, target in times[1:])
    began = stepper.target_watch.seconds()
    list(stepper.examples(MOST * together))
    target = (stepper.target_watch.seconds() - began) / together
    return network + target, target


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
