"""Draws the images of seeds in chunks; they are the same for any batch size and number of processes.

The cut into chunks precedes the split over processes, so the images do not depend on which process draws a chunk. With a
solver on a fixed grid, rows are independent, so the cut may be anywhere. A solver with one step size for all rows (`rk45`)
makes a row depend on its neighbours within its tolerance; for it a chunk is a whole block of consecutive seeds, 32 j to
32 j + 31, even if the caller wants only some of them, so that every seed always has the same neighbours.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stablefield.sampling._counting import Counted
from stablefield.sampling._noise import SampleNoise
from stablefield.sampling._solver_loop import Denoise
from stablefield.sampling._solvers import SolverOptions

__all__ = ["BLOCK", "Chunk", "chunks_of", "draw", "in_turn", "to_uint8"]

BLOCK = 32
"""Seeds per block: few, because the solver also runs the unwanted ones, but enough to fill a small batch."""


@dataclass(frozen=True)
class Chunk:
    """Seeds that the solver runs as one batch."""

    seeds: tuple[int, ...]
    """All rows of the batch."""
    places: tuple[int, ...]
    """Wanted rows, in the caller's order."""

    @property
    def wanted(self) -> tuple[int, ...]:
        """The wanted seeds."""
        return tuple(self.seeds[place] for place in self.places)


def chunks_of(seeds: Sequence[int], batch: int, *, coupled: bool = False) -> list[Chunk]:
    """Cut seeds into chunks.

    Args:
        seeds: whole numbers, each once.
        batch: rows at a time; a coupled solver ignores it.
        coupled: whether the solver lets rows of a batch influence each other.

    Returns:
        Chunks that hold every seed once; those of a coupled solver in the order of the seeds' blocks.

    Raises:
        ValueError: if there are no seeds, one repeats, or `batch` is below 1.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds holds {len(seeds)} seeds, {len(set(seeds))} of them different: pass each once.")
    if batch < 1:
        raise ValueError(f"batch={batch}: pass at least 1 image at a time.")
    if not coupled:
        parts = [tuple(seeds[start : start + batch]) for start in range(0, len(seeds), batch)]
        return [Chunk(part, tuple(range(len(part)))) for part in parts]
    blocks: dict[int, list[int]] = {}
    for seed in seeds:
        blocks.setdefault(seed // BLOCK, []).append(seed % BLOCK)
    return [
        Chunk(tuple(range(BLOCK * number, BLOCK * (number + 1))), tuple(places)) for number, places in blocks.items()
    ]


def in_turn(classes: Sequence[int], seeds: Sequence[int] | Tensor) -> Tensor:
    """The class of each seed, shape (B,): seed k has the one at place k modulo their number."""
    wanted = torch.as_tensor(seeds, dtype=torch.int64)
    return torch.tensor(classes, device=wanted.device)[wanted % len(classes)]


def draw(
    denoiser_of: Callable[[Tensor], Denoise],
    options: SolverOptions,
    sigmas: Tensor,
    chunks: Sequence[Chunk],
    *,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    progress: Callable[[float, int], object] | None = None,
    finish: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[tuple[int, ...], Tensor, int]]:
    """Draw the images of chunks of seeds: latents from each seed, the solver, 8-bit images.

    Args:
        denoiser_of: maps seeds, shape (B,), int64, on `device`, to D(x, sigma) for their rows, with classes and guidance if
            any.
        options: the solver.
        sigmas: its grid, shape (steps + 1,).
        chunks: the result of `chunks_of`, or a process's share of it.
        shape: shape of one image, (C, H, W).
        device: the network's device.
        progress: called before every network evaluation with the number of images drawn, and their total.
        finish: makes data of the solver's result, (B, ...); `to_uint8` if None.

    Yields:
        For each chunk the wanted seeds, their images, uint8 (B, C, H, W) on the CPU or what `finish` returns, and the
        network evaluations, each one call on the whole batch.

    Raises:
        ValueError: if the solver fails (see its own errors).
    """
    device = torch.device(device)
    # float64 if the device has it, to keep the steps' rounding below the network's.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    done, total = 0, sum(len(chunk.places) for chunk in chunks)
    for chunk in chunks:
        size = len(chunk.places)

        def report(sigma: Tensor, before: int = done, size: int = size) -> None:
            if progress is not None:
                progress(before + size * _share_done(sigmas, float(sigma[0])), total)

        seeds = torch.tensor(chunk.seeds, dtype=torch.int64, device=device)
        denoiser = Counted(denoiser_of(seeds), None if progress is None else report)
        noise = SampleNoise(chunk.seeds)
        latents = noise.latents(shape, dtype=torch.float64).to(dtype).to(device)
        # The solver, such as `heun` in _euler_heun.py, calls the denoiser at every noise level: `Counted`, then for a run
        # `Denoiser.forward` in diffusion/_preconditioning.py, which calls the network.
        x = options.solve(noise)(denoiser, latents * float(sigmas[0]), sigmas)
        yield chunk.wanted, (finish or to_uint8)(x)[list(chunk.places)], denoiser.nfe
        done += size


def _share_done(sigmas: Tensor, sigma: float) -> float:
    """The share of the grid above a noise level; for an adaptive solver, the share between its ends in ln sigma."""
    levels = -np.log(sigmas[sigmas > 0].cpu().numpy())
    place = float(np.interp(-math.log(sigma), levels, np.arange(len(levels)))) if sigma > 0 else len(levels)
    return min(1.0, place / len(levels)) if len(levels) > 2 else min(1.0, place)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to 0..255, clipped and rounded, on the CPU."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
