"""Images of seeds, drawn chunk by chunk, the same whatever the batch size and the number of processes.

The seeds asked for are cut into chunks before they are shared out, so which process draws a chunk changes nothing. A
solver that treats all rows alike (every fixed grid) may be cut anywhere. One that picks one step size for all rows
(`rk45`) makes a row depend on its neighbours within its tolerance; for it a chunk is a whole block of consecutive
seeds, 32 j to 32 j + 31, also where only some of them were asked for, so that every seed always has the same
neighbours.
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

__all__ = ["BLOCK", "Chunk", "chunks_of", "draw", "to_uint8"]

BLOCK = 32
"""Seeds of a block. Few, because the missing ones of a block are solved as well; many enough to fill a small batch."""


@dataclass(frozen=True)
class Chunk:
    """Seeds that are solved as one batch."""

    seeds: tuple[int, ...]
    """All rows of the batch."""
    places: tuple[int, ...]
    """Rows that were asked for, in the order in which they were."""

    @property
    def wanted(self) -> tuple[int, ...]:
        """The seeds that were asked for."""
        return tuple(self.seeds[place] for place in self.places)


def chunks_of(seeds: Sequence[int], batch: int, *, coupled: bool = False) -> list[Chunk]:
    """Cut seeds into chunks.

    Args:
        seeds: whole numbers, each once.
        batch: rows at a time; a coupled solver takes no notice of it.
        coupled: whether the solver lets rows of a batch influence each other.

    Returns:
        Chunks that hold every seed once; those of a coupled solver in the order of the seeds' blocks.

    Raises:
        ValueError: if there are no seeds, one comes twice, or `batch` is below 1.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds holds {len(seeds)} seeds, {len(set(seeds))} of them different: pass each once.")
    if batch < 1:
        raise ValueError(f"batch={batch}: at least 1 image is drawn at a time.")
    if not coupled:
        parts = [tuple(seeds[start : start + batch]) for start in range(0, len(seeds), batch)]
        return [Chunk(part, tuple(range(len(part)))) for part in parts]
    blocks: dict[int, list[int]] = {}
    for seed in seeds:
        blocks.setdefault(seed // BLOCK, []).append(seed % BLOCK)
    return [
        Chunk(tuple(range(BLOCK * number, BLOCK * (number + 1))), tuple(places)) for number, places in blocks.items()
    ]


def draw(
    denoiser_of: Callable[[Tensor], Denoise],
    options: SolverOptions,
    sigmas: Tensor,
    chunks: Sequence[Chunk],
    *,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    progress: Callable[[float, int], object] | None = None,
) -> Iterator[tuple[tuple[int, ...], Tensor, int]]:
    """Draw the images of chunks of seeds: latents from each seed, the solver, 8-bit images.

    Args:
        denoiser_of: D(x, sigma) for rows of these seeds, shape (B,), int64, on `device`: with their classes and guidance, if
            there are any.
        options: the solver.
        sigmas: its grid, shape (steps + 1,).
        chunks: what `chunks_of` returns, or a process's share of it.
        shape: of one image, (C, H, W).
        device: where the network is.
        progress: called before every network evaluation with how many images are drawn, and how many will be.

    Yields:
        Of each chunk the seeds that were asked for, their images, uint8 (B, C, H, W) on the CPU, and the network
        evaluations, one being one call on the whole batch.

    Raises:
        ValueError: if the solver fails (see its own errors).
    """
    device = torch.device(device)
    # float64 where there is such a thing, so that a step's rounding is none of the network's.
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
        yield chunk.wanted, to_uint8(x)[list(chunk.places)], denoiser.nfe
        done += size


def _share_done(sigmas: Tensor, sigma: float) -> float:
    """Which share of the grid lies above a noise level; of the two ends of an adaptive solver, in ln sigma."""
    levels = -np.log(sigmas[sigmas > 0].cpu().numpy())
    place = float(np.interp(-math.log(sigma), levels, np.arange(len(levels)))) if sigma > 0 else len(levels)
    return min(1.0, place / len(levels)) if len(levels) > 2 else min(1.0, place)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to 0..255, clipped and rounded, on the CPU."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
