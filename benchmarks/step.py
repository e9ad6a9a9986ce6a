"""What a training step of a DDPM++ is made of, and how many images it trains per second.

    python benchmarks/step.py DATA [--base-channels 64] [--batch 32] [--steps 5] [--compile] [--threads N]

DATA is what `stablefield train` takes, 32 x 32 RGB images such as CIFAR-10's binary folder. The step is the trainer's own:
target over all images, augmentation, network, optimiser, average of the weights. Writes results/step_cpu.json, or
step_gpu.json where there is one.
"""

import argparse
import dataclasses
import itertools
import math
import statistics
import sys
import time
from unittest import mock

import torch
from accelerate import Accelerator
from record import write
from torch.profiler import ProfilerActivity, profile

from stablefield.data._image_set import ImageSet
from stablefield.data._source import open_images
from stablefield.training import _target_blocks
from stablefield.training._allocator import keep_freed_memory
from stablefield.training._feed import Feed
from stablefield.training._noise_band import resolve_band
from stablefield.training._recipe import Recipe, SongUNetConfig
from stablefield.training._recipes import CIFAR10_EDM
from stablefield.training._run_config import RunConfig
from stablefield.training._stepper import Stepper

# Names of operators, in part, and what they are for; the first that fits counts.
KINDS = {
    "convolution": ("conv",),
    "attention": ("attention", "bmm", "softmax"),
    "matrix products": ("addmm", "::mm", "linear"),
    "normalisation and activation": ("norm", "silu"),
    "masks of dropout": ("bernoulli", "random_", "dropout"),
    "optimiser": ("adam",),
    "averages of the weights": ("foreach",),
    "copies and fills": ("copy", "fill", "zero", "cat", "contiguous"),
}


def stepper(recipe: Recipe, data: ImageSet, device: torch.device) -> Stepper:
    classes = data.classes if recipe.conditional else 0
    config = RunConfig(
        data="data", shape=data.shape, classes=classes, manifest=data.manifest, recipe=recipe, version="benchmark"
    )
    feed = Feed(data, recipe, device, labelled=classes > 0, placement="resident")
    return Stepper(config, feed, Accelerator(cpu=device.type == "cpu"))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def speed(found: Stepper, batch: int, steps: int, device: torch.device, warm: int = 2) -> dict[str, float]:
    """Images per second, from the median step, and the target's share of the time.

    Where several steps share a call of the target, from the mean over the steps of whole calls.
    """
    seconds: list[float] = []
    together = found.steps_together
    if together > 1:
        warm, steps = together, math.ceil(steps / together) * together
    before = 0.0
    for step in range(warm + steps):
        if step == warm:
            wait(device)
            before = found.target_watch.seconds()
        start = time.perf_counter()
        found.take(step)
        wait(device)
        seconds.append(time.perf_counter() - start)
    middle = statistics.median(seconds[warm:]) if together == 1 else statistics.fmean(seconds[warm:])
    share = (found.target_watch.seconds() - before) / sum(seconds[warm:])
    return {"seconds": middle, "images_per_second": batch / middle, "target_share": share}


def shares(found: Stepper, device: torch.device) -> dict[str, float]:
    """Shares of a step's time by what the operators are for; of the device's time on a GPU.

    Over as many steps as share a call of the target.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    together = found.steps_together
    for step in range(together):
        found.take(step)
    with profile(activities=activities) as profiled:
        for step in range(together, 2 * together):
            found.take(step)
        wait(device)
    totals = dict.fromkeys([*KINDS, "all else"], 0.0)
    for event in profiled.key_averages():
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        name = event.key.lower()
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "all else")
        totals[kind] += spent
    whole = sum(totals.values())
    return {kind: spent / whole for kind, spent in totals.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--base-channels", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="also measure the compiled network")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = open_images(options.data)
    network = dataclasses.replace(CIFAR10_EDM.network, base_channels=options.base_channels)
    assert isinstance(network, SongUNetConfig)
    recipe = dataclasses.replace(CIFAR10_EDM, network=network, batch=options.batch, references="all")
    recipe = dataclasses.replace(recipe, noise_band=resolve_band(recipe, data, device)[0])
    found: list[dict[str, object]] = []

    def measure(name: str, recipe: Recipe) -> None:
        row = speed(stepper(recipe, data, device), options.batch, options.steps, device)
        found.append({"setting": name, "precision": recipe.precision, "compiled": recipe.compile, **row})
        print(f"{name:<44} {row['images_per_second']:8.1f} images/s, target {row['target_share']:.1%}", flush=True)

    if device.type == "cpu":
        measure("float32, freed memory given back", recipe)
        keep_freed_memory()  # as the command does
        with mock.patch.object(_target_blocks, "_STEPS", 1):
            measure("float32, each step's target by itself", recipe)
    for precision, compiled in itertools.product(("float32", "bf16"), (False, True) if options.compile else (False,)):
        name = precision + (", compiled" if compiled else "")
        measure(name, dataclasses.replace(recipe, precision=precision, compile=compiled))
    parts = stepper(recipe, data, device)
    whole = shares(parts, device)
    for kind, share in whole.items():
        print(f"{kind:<44} {share:8.1%}")
    flags = f"--base-channels {options.base_channels} --batch {options.batch} --steps {options.steps}"
    flags += f" --threads {options.threads}" + (" --compile" if options.compile else "")
    path = write(
        "step_gpu" if device.type == "cuda" else "step_cpu",
        f"python benchmarks/step.py DATA {flags}",
        {
            "parameters": sum(parameter.numel() for parameter in parts.trained.model.parameters()),
            "batch": options.batch,
            "references": len(data.images),
            "noise_band": recipe.noise_band,
            "throughput": found,
            "shares_of_a_float32_step": whole,
        },
    )
    print(f"written: {path.name}")


if __name__ == "__main__":
    sys.exit(main())
