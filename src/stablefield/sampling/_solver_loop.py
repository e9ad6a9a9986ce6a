r"""A loop: one sampler's way down a grid of noise levels, with the checks that all samplers share.

It checks the state and the grid before the first evaluation, calls the denoiser with noise levels of shape (B,), and
checks state and output after every evaluation, and the state at the end. A check is a reduction and one wait for the
device, cheap beside a network, and it stops a run of thousands of evaluations at the first bad one, with the noise level in
the message.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from stablefield._modules import varies
from stablefield._shapes import check_callable, check_tensor
from stablefield._warning import warn

__all__ = ["Callback", "Denoise", "SolverLoop", "derivative", "grid_levels", "start"]

Denoise = Callable[[Tensor, Tensor], Tensor]
"""D(x, sigma): x (B, ...) and sigma (B,) to E[x_0 | x], shape (B, ...)."""

Callback = Callable[[int, Tensor, Tensor], object]
"""Called once a step, before the state moves: the step's number from 0, the state, the denoiser's output there."""


@dataclass(frozen=True, kw_only=True)
class SolverLoop:
    """A sampler, its denoiser and the noise levels it visits, in order."""

    sampler: str
    denoiser: Denoise
    levels: tuple[float, ...]
    callback: Callback | None = None

    def steps(self) -> Iterator[tuple[int, float, float]]:
        """Number, noise level and next noise level of every step."""
        for step, (sigma, sigma_next) in enumerate(pairwise(self.levels)):
            yield step, sigma, sigma_next

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        """Call the denoiser at one noise level for all rows; the result has the shape and dtype of `x`.

        A `Denoiser` (`stablefield.diffusion._preconditioning`) calls its network there.

        Raises:
            ValueError: if the output has another shape or is not finite, or the state is not.
        """
        denoised = self.denoiser(x, x.new_full((x.shape[0],), sigma))
        check_tensor(f"{self.sampler}: the denoiser's output", denoised)
        if denoised.is_complex():
            raise ValueError(f"{self.sampler}: the denoiser returned complex numbers: return data like x.")
        if denoised.shape != x.shape:
            raise ValueError(
                f"{self.sampler}: the denoiser returned shape {tuple(denoised.shape)} for a state of shape "
                f"{tuple(x.shape)}: return the expected clean data, with the shape of x."
            )
        denoised = denoised.to(x.dtype)
        if not _finite(denoised, x):
            self.arrive(x, sigma)
            raise ValueError(
                f"{self.sampler}: the denoiser returned NaN or infinite values at sigma={sigma:.6g} "
                "for a finite state: check its weights and its precision at this noise level."
            )
        return denoised

    def arrive(self, x: Tensor, sigma: float | None = None) -> Tensor:
        """Check that the state is finite, and return it; `sigma` is its level, by default the grid's end.

        Raises:
            ValueError: if it is not finite.
        """
        if not _finite(x):
            level = self.levels[-1] if sigma is None else sigma
            raise ValueError(
                f"{self.sampler}: the state is NaN or infinite at sigma={level:.6g}: "
                "the solver diverged; use more steps."
            )
        return x

    def report(self, step: int, x: Tensor, denoised: Tensor) -> None:
        """Call the callback, if there is one."""
        if self.callback is not None:
            self.callback(step, x, denoised)


def start(
    sampler: str,
    denoiser: Denoise,
    x: Tensor,
    sigmas: Tensor,
    callback: Callback | None = None,
    *,
    noisy: bool = True,
) -> SolverLoop:
    """Check a sampler's arguments and make its loop; `noisy` if `x` is to be a state at the first noise level.

    Raises:
        ValueError: if `x` is not a batch of finite float32 or float64 values, or `sigmas` is not a grid (see
            `grid_levels`).

    Warns:
        UserWarning: if the denoiser is in training mode, or `x` is too small for a state at the first noise level.
    """
    check_callable(f"{sampler}: denoiser", denoiser, "denoiser(x, sigma)")
    if callback is not None:
        check_callable(f"{sampler}: callback", callback, "callback(step, x, denoised)")
    check_tensor(f"{sampler}: x", x, numbers=True)
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{sampler}: x has dtype {x.dtype}: pass float32 or float64, whatever the network uses.")
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(
            f"{sampler}: x has shape {tuple(x.shape)}: pass a batch with at least one row, shape (B, ...)."
        )
    if not torch.isfinite(x).all():
        raise ValueError(f"{sampler}: x holds NaN or infinite values: pass sigmas[0] times standard normal noise.")
    if varies(denoiser):
        warn(
            f"{sampler}: the denoiser, or a network that it calls, is in training mode, so its dropout or batch "
            "normalisation makes its output depend on chance or on the other rows: call denoiser.eval(), or eval() of the "
            "network.",
        )
    levels = grid_levels(sampler, sigmas)
    # Data plus noise is not smaller than the noise, of which 32 numbers tell the size. Padding has neither.
    count = max(1, int(x.count_nonzero()))
    if noisy and x.numel() >= 32 and float(rms := (x.square().sum() / count).sqrt()) < levels[0] / 2:
        warn(
            f"{sampler}: x has a root mean square of {float(rms):.3g}, too small for a state at sigmas[0]={levels[0]:.6g}: "
            "pass sigmas[0] times standard normal noise.",
        )
    return SolverLoop(sampler=sampler, denoiser=denoiser, levels=levels, callback=callback)


def grid_levels(sampler: str, sigmas: Tensor) -> tuple[float, ...]:
    """The noise levels of a grid as Python floats, so that step sizes are float64 on every device.

    Raises:
        ValueError: if `sigmas` is not one-dimensional, shorter than 2, not finite, negative or not strictly decreasing.
    """
    check_tensor(f"{sampler}: sigmas", sigmas, numbers=True)
    if sigmas.is_complex() or sigmas.dtype == torch.bool:
        raise ValueError(f"{sampler}: sigmas has dtype {sigmas.dtype}: pass noise levels, real numbers.")
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(
            f"{sampler}: sigmas has shape {tuple(sigmas.shape)}: pass at least two noise levels, one per grid point."
        )
    grid = sigmas.detach().cpu().double()
    if not torch.isfinite(grid).all():
        raise ValueError(f"{sampler}: sigmas holds NaN or infinite values: {grid.tolist()}.")
    if grid.min() < 0:
        raise ValueError(
            f"{sampler}: sigmas holds {grid.min():.6g}: noise levels are positive, only the last may be 0."
        )
    rise = (grid.diff() >= 0).nonzero().flatten().tolist()
    if rise:
        k = rise[0]
        raise ValueError(
            f"{sampler}: sigmas must decrease strictly, but sigmas[{k}]={grid[k]:.6g} is followed by "
            f"{grid[k + 1]:.6g}: sort the grid from noise to data and drop repeated values."
        )
    return tuple(grid.tolist())


def _finite(*states: Tensor) -> bool:
    # A sum of finite numbers is finite unless it overflows: only then check every number.
    total = sum((state.sum() for state in states), start=states[0].new_zeros(()))
    return bool(torch.isfinite(total)) or all(bool(torch.isfinite(state).all()) for state in states)


def derivative(x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    r"""Slope of the probability-flow ODE, $(x - D(x, \sigma)) / \sigma$ (Karras et al. 2022, equation 3)."""
    return (x - denoised) / sigma
