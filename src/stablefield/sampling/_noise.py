"""Noise of stochastic samplers: standard normal draws, from one generator or from one per sample.

A sampler draws all its noise through one function that returns standard normal values like its argument. `SampleNoise`
is such a function with a stream per row: row k of a batch depends on seeds[k] alone, so image k is the same in a
batch of 1 or 1,000, on one process or eight.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from stablefield._shapes import (
    as_device,
    check_callable,
    check_floating_dtype,
    check_generator,
    check_kind,
    check_tensor,
    shape_of,
    whole_number,
)

__all__ = ["Noise", "SampleNoise", "normal_source"]

Noise = Callable[[Tensor], Tensor]
"""Returns standard normal values of the shape, dtype and device of its argument."""


class SampleNoise:
    """Standard normal noise whose row k depends on `seeds[k]` only.

    Each row has its own generator for its latents and for every later draw of the sampler. The generators run on the CPU, so
    the draws do not depend on the device. Make a new `SampleNoise` for every batch, since every use advances its streams.
    Only the noise is equal: the image may still depend on the batch through a network whose arithmetic depends on the batch
    size (most do, in the last bits), or a solver with one step size for a whole batch (`rk45`).

    Args:
        seeds: one per row, whole numbers from 0 to 2^32 - 1.

    Raises:
        ValueError: if there are no seeds, or one is out of range.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        check_kind("seeds", seeds, (Sequence, Tensor, np.ndarray), "one whole number per sample, such as range(8)")
        if isinstance(seeds, Tensor):
            check_tensor("seeds", seeds, batch=True, numbers=True)
            seeds = seeds.tolist()
        if len(seeds) == 0:
            raise ValueError("seeds is empty: pass one seed per sample.")
        self.seeds = tuple(whole_number(f"seeds[{k}]", seed) for k, seed in enumerate(seeds))
        for seed in self.seeds:
            # torch's CPU generator reads only the low 32 bits: larger seeds would silently repeat smaller ones.
            if not 0 <= seed < 2**32:
                raise ValueError(f"seeds holds {seed}: pass whole numbers from 0 to 2^32 - 1.")
        self._generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]

    def __len__(self) -> int:
        return len(self.seeds)

    def latents(
        self, shape: Sequence[int], *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Draw standard normal latents, to be multiplied by sigmas[0].

        Args:
            shape: shape of one sample, without the batch: (C, H, W).
            device: device of the result.
            dtype: dtype of the result.

        Returns:
            Shape (B, *shape), B the number of seeds.
        """
        shape = shape_of("shape", shape)
        check_floating_dtype("dtype", dtype)
        device = None if device is None else as_device("device", device)
        rows = [torch.randn(shape, generator=generator, dtype=dtype) for generator in self._generators]
        return torch.stack(rows).to(device)

    def __call__(self, x: Tensor) -> Tensor:
        """Draw standard normal noise like `x`.

        Raises:
            ValueError: if the number of rows of `x` differs from that of the seeds.
        """
        check_tensor("x", x, floating=True, batch=True, numbers=True)
        if x.shape[0] != len(self.seeds):
            raise ValueError(f"x has {x.shape[0]} rows, but there are {len(self.seeds)} seeds: pass one seed per row.")
        return self.latents(x.shape[1:], device=x.device, dtype=x.dtype)


def normal_source(noise: Noise | None, generator: torch.Generator | None) -> Noise:
    """A sampler's source of noise: `noise` if given, else `generator`, else torch's global generator.

    Raises:
        ValueError: if both are given, or, at a draw, `noise` returns another shape than its argument's.
    """
    check_generator("generator", generator)
    if noise is not None:
        check_callable("noise", noise, "noise(x), such as SampleNoise(seeds)")
    if noise is not None and generator is not None:
        raise ValueError("noise and generator are both given: pass one of them.")

    def draw(x: Tensor) -> Tensor:
        if noise is None:
            # Draw on the generator's own device: torch rejects a generator of another one.
            device = x.device if generator is None else generator.device
            return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
        z = noise(x)
        check_tensor("what noise returned", z)
        if z.shape != x.shape:
            raise ValueError(
                f"noise returned shape {tuple(z.shape)} for x of shape {tuple(x.shape)}: return the shape of x."
            )
        return z.to(x)

    return draw
