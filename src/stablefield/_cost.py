"""The cost of a target: its time and memory beside the least possible, and beside the naive form.

The least possible are the two bare matrix products of the posterior, (x y^T) y: no softmax, no decoding, no care for
accuracy. The naive form broadcasts twice to B x n x d, for the differences and for the weighted sum, as code that follows
the formulas does. `paired` runs both sides in turn, and reports the median ratio over the pairs, so that other work on the
machine slows both sides of a pair. If that is not enough, `time.process_time` as the clock, with one thread, counts only
this process's own time.
"""

import ctypes
import gc
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stablefield.diffusion._objective import Objective
from stablefield.diffusion._preconditioning import Denoiser, EDMPreconditioning
from stablefield.diffusion._process import EDM, RectifiedFlow
from stablefield.networks._mlp import MLP
from stablefield.networks._sit import SiT
from stablefield.networks._song_unet import SongUNet
from stablefield.targets._engine.matmul import full_precision
from stablefield.targets._pool import Pool
from stablefield.targets._stable_target import DenoisingTarget, StableTarget

__all__ = [
    "Cost",
    "Pairs",
    "StepShare",
    "measure_cost",
    "measure_step",
    "measure_transformer",
    "paired",
    "peak_bytes",
    "wait_for",
]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Two pieces of work, timed in turn.

    Attributes:
        ratio: median of first / second over the pairs.
        first: seconds of the first: ratio x second. The median of its own times would contradict the ratio where other work
            has slowed one side of some pairs.
        second: median seconds of the second.
    """

    ratio: float
    first: float
    second: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one call of a stable target, with all rows above the noise band.

    Attributes:
        batch: rows B.
        references: references n.
        dim: numbers per sample, d.
        pool: dtype of the references.
        seconds: seconds of one call: ratio x products.
        products: seconds of the two bare matrix products, on float32 references, whatever the dtype of the pool.
        ratio: seconds / products, the median of this over pairs.
        peak: bytes above those in use before the call, which include the pool; None if the system cannot measure it.
        naive: seconds of the naive form, in float32; None if too large to run.
        naive_peak: bytes of the naive form.
    """

    batch: int
    references: int
    dim: int
    pool: str
    seconds: float
    products: float
    ratio: float
    peak: int | None
    naive: float | None
    naive_peak: int | None


@dataclass(frozen=True, kw_only=True)
class StepShare:
    """A training step with the stable target beside one with the single-sample target.

    Attributes:
        parameters: number of the network's parameters.
        batch: images per step.
        references: references n.
        noise_band: level below which rows use their source alone.
        stable: seconds of a step with the stable target: ratio x single.
        single: median seconds of a step with the single-sample target.
        ratio: stable / single, the median of this over pairs.
    """

    parameters: int
    batch: int
    references: int
    noise_band: float
    stable: float
    single: float
    ratio: float


def paired(
    first: Callable[[], object],
    second: Callable[[], object],
    pairs: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> Pairs:
    """Time two pieces of work in turn, `pairs` times, after one untimed run of each; alternate the order."""

    def seconds(work: Callable[[], object]) -> float:
        wait_for(device)
        start = clock()
        work()
        wait_for(device)
        return clock() - start

    seconds(first)
    seconds(second)
    times: list[tuple[float, float]] = []
    for pair in range(pairs):
        if pair % 2:
            late = seconds(second)
            times.append((seconds(first), late))
        else:
            early = seconds(first)
            times.append((early, seconds(second)))
    ratio, plain = statistics.median(a / b for a, b in times), statistics.median(b for _, b in times)
    return Pairs(ratio=ratio, first=ratio * plain, second=plain)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """The peak memory of `work`, above the memory in use before; None if the system cannot measure it.

    On a GPU torch's allocations; on Linux the resident memory of the process, with all threads and libraries.
    """
    if device.type == "cuda":
        wait_for(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        wait_for(device)
        return torch.cuda.max_memory_allocated(device) - before
    marks = Path("/proc/self/clear_refs")
    if device.type != "cpu" or not marks.exists():
        return None
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # reuse of freed memory that the allocator keeps would go unnoticed
    before = _status("VmRSS")
    try:
        marks.write_text("5", "ascii")
    except OSError:
        return None
    work()
    return _status("VmHWM") - before


def measure_cost(
    images: Tensor,
    batch: int,
    *,
    level: float,
    pairs: int = 5,
    naive_bytes: int = 2**32,
    clock: Callable[[], float] = time.perf_counter,
) -> Cost:
    """Measure a stable target over all of `images` with `batch` rows.

    Args:
        images: the references, shape (n, ...), uint8 or of any floating dtype, which the pool keeps.
        batch: rows B.
        level: noise level of all rows; high, so that every reference has weight and the target can skip nothing.
        pairs: how many times to time target and products in turn.
        naive_bytes: run the naive form if it takes no more than this: twice B x n x d float32 numbers, for the differences
            and their squares.
        clock: returns the time in seconds.
    """
    device, n = images.device, len(images)
    generator = torch.Generator(device).manual_seed(0)
    index = torch.randint(n, (batch,), generator=generator, device=device)
    pool = Pool(images)
    floating = images.float() if images.is_floating_point() else images.float().div_(127.5).sub_(1)
    x0 = floating[index]
    x_t = EDM().perturb(x0, level, generator=generator)
    t = torch.full((batch,), level, device=device)
    target = StableTarget(EDM(), references=pool)
    rows, references = x_t.flatten(1), floating.flatten(1)

    def stable() -> object:
        with warnings.catch_warnings():
            # This code uses one batch again and again.
            warnings.filterwarnings("ignore", "the rows were not drawn", UserWarning)
            return target(x0, x_t, t, index=index)

    def products() -> object:
        with full_precision(device):
            return (rows @ references.T) @ references

    def naive() -> object:
        with full_precision(device):
            square = (rows[:, None] - references[None]).square().sum(2)
            weights = torch.softmax(-square / (2 * level**2), 1)
            return (weights[:, :, None] * references[None]).sum(1)

    times = paired(stable, products, pairs, device, clock)
    fits = 2 * 4 * batch * n * rows.shape[1] <= naive_bytes
    return Cost(
        batch=batch,
        references=n,
        dim=rows.shape[1],
        pool=str(images.dtype).removeprefix("torch."),
        seconds=times.first,
        products=times.second,
        ratio=times.ratio,
        peak=peak_bytes(stable, device),
        naive=paired(naive, stable, 1, device, clock).first if fits else None,
        naive_peak=peak_bytes(naive, device) if fits else None,
    )


def measure_step(
    images: Tensor,
    *,
    noise_band: float,
    batch: int = 64,
    width: int = 64,
    pairs: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> StepShare:
    """Measure a training step with all of `images` as references: of a DDPM++, or of a perceptron where that does not fit.

    A step draws noise levels from EDM's distribution, evaluates the loss, differentiates it and updates the weights (Adam).
    Both kinds of step see the same rows and noise.

    Args:
        images: the references, uint8 or floating point, shape (n, C, H, W); a perceptron takes other shapes (n, ...), and
            those with an H or W that is not a multiple of 4.
        noise_band: as for `StableTarget`.
        batch: images per step.
        width: base channels of the DDPM++; 64 make 4.7 M parameters.
        pairs: how many times to time the two kinds of step in turn.
        clock: returns the time in seconds.
    """
    device = images.device
    torch.manual_seed(0)
    shape = tuple(images.shape[1:])
    halved = len(shape) == 3 and all(side % 4 == 0 for side in shape[1:])  # twice, between three levels
    network = SongUNet.ddpmpp(shape[1:], shape[0], width, (1, 1, 2), 2) if halved else MLP(shape)
    network = network.to(device)
    denoiser = Denoiser(network, EDMPreconditioning(sigma_data=0.5))
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-4)
    stable = StableTarget(EDM(), references=Pool(images), noise_band=noise_band)
    drawn = {True: 0, False: 0}

    def step(kind: bool) -> None:
        objective = Objective(EDM(), target=stable if kind else DenoisingTarget(EDM()))
        generator = torch.Generator(device).manual_seed(drawn[kind])
        drawn[kind] += 1
        index = torch.randint(len(images), (batch,), generator=generator, device=device)
        x0 = images[index].float()
        x0 = x0 if images.is_floating_point() else x0.div_(127.5).sub_(1)
        optimizer.zero_grad(set_to_none=True)
        objective(denoiser, x0, index=index, generator=generator).loss.backward()
        optimizer.step()

    times = paired(lambda: step(True), lambda: step(False), pairs, device, clock)
    return StepShare(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        batch=batch,
        references=len(images),
        noise_band=noise_band,
        stable=times.first,
        single=times.second,
        ratio=times.ratio,
    )


def wait_for(device: torch.device) -> None:
    """Wait until `device` has finished its work, so that a clock measures all of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure_transformer(
    device: torch.device,
    *,
    size: str = "B",
    batch: int = 16,
    per_label: int = 1280,
    labels: int = 10,
    pairs: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> StepShare:
    """Measure a training step of SiT with patches of 2 on random latents, with all latents of each label as references.

    Flow matching on latents of 4 x 32 x 32 numbers in half precision; a tenth of the labels is dropped, and those rows use
    the latents of all labels. Every row uses references, whatever its time, so this is the most that the target can cost.

    Args:
        device: where to compute.
        size: of the network, as in `SiT.sized`; "B" makes 130 M parameters.
        batch: latents per step.
        per_label: latents of each label; ImageNet has about 1,280.
        labels: how many.
        pairs: how many times to time the target and the step in turn.
        clock: returns the time in seconds.
    """
    generator = torch.Generator(device).manual_seed(0)
    count = per_label * labels
    latents = torch.randn(count, 4, 32, 32, generator=generator, device=device).half()
    label = torch.arange(count, device=device) % labels
    network = SiT.sized(size, 32, 2, 4, labels).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    process = RectifiedFlow()
    stable = StableTarget(process, references=Pool(latents, labels=label))
    index = torch.randint(count, (batch,), generator=generator, device=device)
    x0, seen = latents[index].float(), label[index].clone()
    seen[: max(1, batch // 10)] = -1
    t = torch.rand(batch, generator=generator, device=device)
    noise = torch.randn(x0.shape, generator=generator, device=device)
    x_t = process.perturb(x0, t, noise)

    def target() -> object:
        return stable(x0, x_t, t, seen, index, noise=noise).velocity

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        (network(x_t, 1 - t, seen) - (noise - x0)).square().mean().backward()
        optimizer.step()

    times = paired(target, step, pairs, device, clock)
    return StepShare(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        batch=batch,
        references=per_label,
        noise_band=0.0,
        stable=times.first + times.second,  # (1 + ratio) x second
        single=times.second,
        ratio=1 + times.ratio,
    )
