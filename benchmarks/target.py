"""The cost of the target on a CPU: beside two bare products, the naive form, itself without a band, and a training step.

    python benchmarks/target.py CIFAR_FOLDER [--threads N] [--pairs N] [--clock wall|cpu]

CIFAR_FOLDER holds data_batch_1.bin to data_batch_5.bin. Writes benchmarks/results/target.json. Where other work shares the
machine, --clock cpu --threads 1 counts this process's own time alone.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import write

import stablefield as sf
from stablefield._cost import measure_cost, measure_step, paired, peak_bytes
from stablefield.data._source import open_images
from stablefield.training._allocator import keep_freed_memory

CPU = torch.device("cpu")


def band_cost(images: torch.Tensor, pairs: int, clock: Callable[[], float]) -> dict[str, object]:
    """All images as references, batches of 512 under EDM's noise distribution, with and without the picked band."""
    pool = sf.Pool(images)
    start = clock()
    band = sf.pick_noise_band(pool)
    probe = clock() - start
    whole = sf.StableTarget(sf.EDM(), references=pool)
    some = sf.StableTarget(sf.EDM(), references=pool, noise_band=band.level)
    found = []
    # The number of rows in the band is random, so there are many batches, each timed in three pairs.
    for seed in range(2 * pairs + 1):
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(len(images), (512,), generator=generator)
        x0 = images[index].float().div_(127.5).sub_(1)
        level = sf.LogNormal().sample(sf.EDM(), 512, generator)
        x_t = sf.EDM().perturb(x0, level, generator=generator)

        def run(target: sf.StableTarget, x0=x0, x_t=x_t, level=level, index=index) -> sf.Target:
            return target(x0, x_t, level, index=index)

        times = paired(lambda run=run: run(some), lambda run=run: run(whole), 3, CPU, clock)
        above = level >= band.level
        gap = (run(some).x0 - run(whole).x0)[above].abs().max()
        found.append(
            {
                "rows_in_band": int(above.sum()),
                "ratio": times.ratio,
                "seconds": times.first,
                "seconds_without_band": times.second,
                "largest_difference": float(gap),
            }
        )
        print(found[-1])
    ratios = sorted(one["ratio"] for one in found)
    return {
        "references": len(images),
        "batch": 512,
        "noise_band": dataclasses.asdict(band),
        "probe_seconds_with_norms": probe,
        "ratio": ratios[len(ratios) // 2],
        "peak_bytes_above_pool": peak_bytes(lambda: run(some), CPU),
        "peak_bytes_above_pool_without_band": peak_bytes(lambda: run(whole), CPU),
        "pairs": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the command does
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    images = torch.tensor(open_images(str(options.folder)).images)
    plain = images[:4096].float().div_(127.5).sub_(1)
    products = measure_cost(plain, 256, level=100.0, pairs=options.pairs, naive_bytes=0, clock=clock)
    print(f"target / two products, B = 256, n = 4096, d = 3072: {products.ratio:.3f}")
    naive = measure_cost(plain[:1024], 128, level=100.0, pairs=options.pairs, clock=clock)
    assert naive.naive is not None
    print(f"naive / target, B = 128, n = 1024: {naive.naive / naive.seconds:.0f} in time")
    band = band_cost(images, options.pairs, clock)
    print(f"all images, batch 512: {band['ratio']:.3f} of the time without a band")
    step = measure_step(images, noise_band=band["noise_band"]["level"], pairs=2 * options.pairs + 1, clock=clock)
    print(f"a training step: {step.ratio - 1:+.1%}")
    path = write(
        "target",
        f"python benchmarks/target.py CIFAR_FOLDER --threads {options.threads} --pairs {options.pairs} "
        f"--clock {options.clock}",
        {
            "clock": options.clock,
            "beside_two_products": dataclasses.asdict(products),
            "beside_the_naive_form": dataclasses.asdict(naive),
            "with_a_band": band,
            "training_step": dataclasses.asdict(step),
        },
    )
    print(f"written: {path.name}")


if __name__ == "__main__":
    sys.exit(main())
