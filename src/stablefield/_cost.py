"""The cost of a target: its time and memory beside the least that it could take, and beside the naive form.

The least are the two matrix products of the posterior, (x y^T) y, bare: no softmax, no decoding, no care for accuracy. The
naive form broadcasts twice to B x n x d, for the differences and for the weighted sum, as code that follows the formulas
does. What is compared is run in turn, in
pairs, and the ratio reported is the median over the pairs: other work on the machine then slows both sides of a pair.
Where that is not enough, `time.process_time` as the clock, with one thread, counts this process's own time alone.
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
from stablefield.diffusion._process import EDM
from stablefield.networks._song_unet import SongUNet
from stablefield.targets._engine.matmul import full_precision
from stablefield.targets._pool import Pool
from stablefield.targets._stable_target import DenoisingTarget, StableTarget

__all__ = ["Cost", "Pairs", "StepShare", "measure_cost", "measure_step", "paired", "peak_bytes", "wait_for"]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Two pieces of work, timed in turn.

    Attributes:
        ratio: median of first / second over the pairs.
        first: median seconds of the first.
        second: median seconds of the second.
    """

    ratio: float
    first: float
    second: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one call of a stable target takes, with all rows above the noise band.

    Attributes:
        batch: rows B.
        references: n.
        dim: numbers per sample, d.
        pool: dtype of the references.
        seconds: of one call.
        products: of the two bare matrix products, on float32 references.
        ratio: seconds / products, the median over pairs.
        peak: bytes above what was there before, the pool included in that; None where it cannot be measured.
        naive: seconds of the naive form; None where it was not run.
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
        parameters: of the network.
        batch: images per step.
        references: n.
        noise_band: level below which rows use their source alone.
        stable: median seconds of a step with the stable target.
        single: median seconds of a step with the single-sample target.
        ratio: stable / single, the median over pairs.
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
    """Time two pieces of work in turn, `pairs` times, after one unmeasured run of each; which goes first alternates."""

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
    return Pairs(
        ratio=statistics.median(a / b for a, b in times),
        first=statistics.median(a for a, _ in times),
        second=statistics.median(b for _, b in times),
    )


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that `work` has in use at a time, above what is in use before; None where the system does not tell.

    On a GPU what torch allocates; on Linux the resident memory of the process, all threads and libraries included.
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
        trim(0)  # freed memory that is kept for reuse would hide what is used of it again
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
        images: the references, shape (n, ...), float32 or uint8.
        batch: rows B.
        level: noise level of all rows; high, so that every reference has weight and nothing can be skipped.
        pairs: how often target and products are timed in turn.
        naive_bytes: the naive form is run if its B x n x d numbers take no more than this.
        clock: what tells the time, in seconds.
    """
    device, n = images.device, len(images)
    generator = torch.Generator(device).manual_seed(0)
    index = torch.randint(n, (batch,), generator=generator, device=device)
    pool = Pool(images)
    floating = images if images.is_floating_point() else images.float().div_(127.5).sub_(1)
    x0 = floating[index]
    x_t = EDM().perturb(x0, level, generator=generator)
    t = torch.full((batch,), level, device=device)
    target = StableTarget(EDM(), references=pool)
    rows, references = x_t.flatten(1), floating.flatten(1)

    def stable() -> object:
        with warnings.catch_warnings():
            # One batch is drawn again and again here.
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
    fits = 4 * batch * n * rows.shape[1] <= naive_bytes
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
    """Measure a training step of a DDPM++ with all of `images` as references.

    A step draws noise levels from EDM's distribution, evaluates the loss, differentiates it and updates the weights (Adam).
    Both kinds of step see the same rows and noise.

    Args:
        images: uint8 images, shape (n, C, H, W) with H = W a multiple of 4.
        noise_band: as for `StableTarget`.
        batch: images per step.
        width: base channels; 64 make 4.7 M parameters.
        pairs: how often the two kinds of step are timed in turn.
        clock: what tells the time, in seconds.
    """
    device = images.device
    torch.manual_seed(0)
    network = SongUNet.ddpmpp(images.shape[-1], images.shape[1], width, (1, 1, 2), 2).to(device)
    denoiser = Denoiser(network, EDMPreconditioning(sigma_data=0.5))
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-4)
    stable = StableTarget(EDM(), references=Pool(images), noise_band=noise_band)
    drawn = {True: 0, False: 0}

    def step(kind: bool) -> None:
        objective = Objective(EDM(), target=stable if kind else DenoisingTarget(EDM()))
        generator = torch.Generator(device).manual_seed(drawn[kind])
        drawn[kind] += 1
        index = torch.randint(len(images), (batch,), generator=generator, device=device)
        x0 = images[index].float().div_(127.5).sub_(1)
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
    """Wait until `device` has done what it was given, so that a clock tells how long that took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
