"""What a step of several processes takes: gradients summed by DistributedDataParallel, and in a fixed order (`exact`).

    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/processes.py [--width 1024] [--pairs 20]

On the CPU, with gloo and one thread for each process; the data are the digits. The two sides take their steps in turn, in
groups of three, and take turns in going first, after two unmeasured steps. A group's time is the processor time of all
processes and, beside it, the wall time of the first. Writes results/processes.json.
"""

import argparse
import dataclasses
import statistics
import sys
import time

import torch
from accelerate import Accelerator
from record import write

from stablefield._distributed import Ranks
from stablefield.data._digits import open_digits
from stablefield.training._allocator import keep_freed_memory
from stablefield.training._feed import Feed
from stablefield.training._recipe import MLPConfig, Recipe, SongUNetConfig
from stablefield.training._recipes import DIGITS
from stablefield.training._run_config import RunConfig
from stablefield.training._stepper import Stepper

GROUP = 3
SIDES = {"DistributedDataParallel": False, "fixed order": True}


def stepper(recipe: Recipe) -> Stepper:
    data = open_digits()
    config = RunConfig(
        data="digits", shape=data.shape, classes=0, manifest=data.manifest, recipe=recipe, version="benchmark"
    )
    feed = Feed(data, recipe, torch.device("cpu"), labelled=False, placement="resident")
    return Stepper(config, feed, Accelerator(cpu=True))


def measure(recipe: Recipe, pairs: int, ranks: Ranks) -> dict[str, object]:
    """Seconds of a step of both sides, as medians, and the median ratio of the pairs."""
    sides = {name: stepper(dataclasses.replace(recipe, exact=exact)) for name, exact in SIDES.items()}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    wall: dict[str, list[float]] = {name: [] for name in sides}
    for found in sides.values():
        for step in range(2):
            found.take(step)
    for pair in range(pairs):
        for name in list(sides)[:: 1 if pair % 2 else -1]:
            ranks.barrier("to begin together")
            began, cpu = time.perf_counter(), time.process_time()
            for step in range(GROUP):
                sides[name].take(2 + GROUP * pair + step)
            (spent,) = ranks.total(time.process_time() - cpu, purpose="to add their times")
            processor[name].append(spent / GROUP)
            wall[name].append((time.perf_counter() - began) / GROUP)
    first, second = sides
    result: dict[str, object] = {
        "parameters": sum(p.numel() for p in sides[first].trained.model.parameters()),
        "batch": recipe.batch,
        "processes": ranks.world_size,
    }
    for kind, times in (("processor", processor), ("wall", wall)):
        ratios = [a / b for a, b in zip(times[first], times[second], strict=True)]
        quarters = statistics.quantiles(ratios, n=4)
        result[f"{kind}_seconds"] = {name: statistics.median(values) for name, values in times.items()}
        result[f"{kind}_ratio"] = {"median": statistics.median(ratios), "quartiles": [quarters[0], quarters[2]]}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="of the perceptron")
    parser.add_argument("--channels", type=int, default=64, help="of the U-Net")
    parser.add_argument("--pairs", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as the command does
    recipe = dataclasses.replace(DIGITS, target="dsm", batch=64)
    unet = SongUNetConfig(base_channels=options.channels, multipliers=(1, 2), blocks=1, dropout=0.0)
    networks = {"perceptron": MLPConfig(width=options.width, depth=4), "U-Net": unet}
    with Ranks.launched() as ranks:
        rows = []
        for name, network in networks.items():
            row = {"network": name, **measure(dataclasses.replace(recipe, network=network), options.pairs, ranks)}
            rows.append(row)
            if ranks.first:
                print(row, flush=True)
        if ranks.first:
            flags = f"--width {options.width} --channels {options.channels} --pairs {options.pairs}"
            launch = f"python -m torch.distributed.run --standalone --nproc-per-node {ranks.world_size}"
            print(f"written: {write('processes', f'{launch} benchmarks/processes.py {flags}', {'rows': rows}).name}")


if __name__ == "__main__":
    sys.exit(main())
