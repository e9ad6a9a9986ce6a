"""Samples: images of seeds, chunk by chunk, the same whatever the batch size and the number of processes.

The seeds asked for are cut into chunks before they are shared out, so which process draws a chunk changes nothing. A
solver that treats all rows alike (every fixed grid) may be cut anywhere. One that picks one step size for all rows
(`rk45`) makes a row depend on its neighbours within its tolerance; for it a chunk is a whole block of consecutive
seeds, 32 j to 32 j + 31, also where only some of them were asked for, so that every seed always has the same
neighbours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield.sampling._counting import counted
from stablefield.sampling._noise import SampleNoise
from stablefield.sampling._solver_loop import Denoise

__all__ = ["BLOCK", "Chunk", "Drawing", "Solve", "chunks_of", "to_uint8"]

BLOCK = 32
"""Seeds of a block. Few, because the missing ones of a block are solved as well; many enough to fill a small batch."""

Solve = Callable[[Denoise, Tensor, SampleNoise], Tensor]
"""A sampler with its grid and options: denoiser, state at the first noise level and noise of the rows to clean data."""


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


class Drawing:
    """Draws images of seeds, and counts what it took.

    Attributes:
        evaluations: network evaluations so far, one being one call on a whole batch.
        chunks: chunks drawn so far.
    """

    def __init__(
        self,
        denoiser_of: Callable[[Tensor], Denoise],
        solve: Solve,
        *,
        shape: Sequence[int],
        sigma_max: float,
        device: torch.device | str = "cpu",
        progress: Callable[[float], object] | None = None,
    ) -> None:
        """Nothing is drawn yet.

        Args:
            denoiser_of: D(x, sigma) for rows of these seeds, shape (B,), int64, on `device`: with their classes and
                guidance, if there are any.
            solve: the sampler.
            shape: of one image, (C, H, W).
            sigma_max: first noise level.
            device: where the network is.
            progress: told before every evaluation at which noise level it is.
        """
        self._denoiser_of, self._solve, self._progress = denoiser_of, solve, progress
        self._shape, self._sigma_max, self._device = tuple(shape), sigma_max, torch.device(device)
        self.evaluations = 0
        self.chunks = 0

    def __call__(self, chunk: Chunk) -> Tensor:
        """Images of the chunk's wanted seeds, uint8, shape (len(places), C, H, W), on the CPU.

        Raises:
            ValueError: if the sampler fails (see its own errors).
        """
        seeds = torch.tensor(chunk.seeds, dtype=torch.int64, device=self._device)
        denoiser = counted(self._denoiser_of(seeds))

        def watched(x: Tensor, sigma: Tensor) -> Tensor:
            if self._progress is not None:
                self._progress(float(sigma[0]))
            return denoiser(x, sigma)

        noise = SampleNoise(chunk.seeds)
        # float64 where there is such a thing, so that a step's rounding is none of the network's.
        dtype = torch.float32 if self._device.type == "mps" else torch.float64
        start = noise.latents(self._shape, dtype=torch.float64).to(dtype).to(self._device) * self._sigma_max
        images = to_uint8(self._solve(watched, start, noise))
        self.evaluations += denoiser.nfe
        self.chunks += 1
        return images[list(chunk.places)]

    def images(self, seeds: Sequence[int], batch: int, *, coupled: bool = False) -> Tensor:
        """Images of seeds in their order, uint8, shape (len(seeds), C, H, W); arguments and errors as `chunks_of`."""
        parts = chunks_of(seeds, batch, coupled=coupled)
        row = {seed: place for place, seed in enumerate(seed for part in parts for seed in part.wanted)}
        drawn = torch.cat([self(part) for part in parts])
        return drawn[[row[seed] for seed in seeds]]

    @property
    def nfe(self) -> float:
        """Network evaluations per image: the mean over chunks."""
        return self.evaluations / self.chunks if self.chunks else 0.0


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to 0..255, clipped and rounded, on the CPU."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
