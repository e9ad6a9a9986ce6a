"""DDPM's process: a table of alphas_cumprod over discrete steps, as in DDPM code and diffusers' schedulers."""

import torch
from torch import Tensor

from stablefield._reading import readable
from stablefield._shapes import array_of_numbers, check_tensor
from stablefield.diffusion._process import Process

__all__ = ["Discrete"]


class Discrete(Process):
    """A variance-preserving process given by a table: t is an index into `alphas_cumprod`, as in DDPM code.

    alpha = sqrt(alphas_cumprod[t]), sigma = sqrt(1 - alphas_cumprod[t]), computed in the dtype of the table, at least
    float32: for the table of a diffusers scheduler, bit for bit equal to its `add_noise`.

    Step 0 is the first entry of the table, the one with the least noise, not data without noise. For a loop that counts its
    steps from 1 pass t - 1; if its table begins with a 1 for clean data, leave that out, too. A `StableTarget` finds a table
    that is off by one if the call passes `noise=`; without it, neighbouring steps are too much alike.

    Args:
        alphas_cumprod: shape (T,), strictly decreasing, between 0 and 1; diffusers' `scheduler.alphas_cumprod`. The last
            entry may be 0, without any signal (zero terminal SNR).

    Raises:
        TypeError: if the table is not a tensor, an array or a list of numbers.
        ValueError: if the table is not one-dimensional, decreasing and between 0 and 1, or a time is outside the table.

    References:
        Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, equation 4; Lin, Liu, Li, Yang, "Common
        Diffusion Noise Schedules and Sample Steps are Flawed", WACV 2024, section 3.1 (zero terminal SNR).
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        table = array_of_numbers("alphas_cumprod", alphas_cumprod).detach().cpu()
        table = table if table.dtype in (torch.float32, torch.float64) else table.double()
        if table.ndim != 1 or len(table) == 0:
            raise ValueError(f"alphas_cumprod has shape {tuple(table.shape)}: pass one number per step, shape (T,).")
        if fault := _fault_of(table):
            raise ValueError(f"alphas_cumprod must decrease strictly and lie between 0 and 1, but {fault}")
        self._table = table
        self._on_device: dict[torch.device, Tensor] = {table.device: table}

    def __repr__(self) -> str:
        return f"Discrete(<{len(self._table)} steps>)"

    def __len__(self) -> int:
        """Number of steps, T."""
        return len(self._table)

    @property
    def time_range(self) -> tuple[float, float]:
        """Step 0 and the last step."""
        return 0.0, len(self._table) - 1.0

    def has_time(self, t: Tensor) -> Tensor:
        """Which of `t` are steps of the table: bool, of the shape of `t`."""
        return super().has_time(t) & (t == t.long())

    def _at(self, t: Tensor) -> Tensor:
        check_tensor("t", t, real=True)
        if t.device not in self._on_device:
            self._on_device[t.device] = self._table.to(t.device, torch.float32 if t.device.type == "mps" else None)
        index = t.long()
        checked = t.device.type == "cpu" and readable(t.device)
        if checked and not ((index >= 0) & (index < len(self._table)) & (index == t)).all():
            raise ValueError(
                f"t must hold whole step numbers from 0 to {len(self._table) - 1}, got {t.min()} to {t.max()}: "
                "this process is a table."
            )
        # Without a check here, a step outside the table must not crash a GPU program: `StableTarget` checks it.
        return self._on_device[t.device][index if checked else index.clamp(0, len(self._table) - 1)]

    def _like(self, value: Tensor, t: Tensor) -> Tensor:
        return value.to(t.dtype if t.is_floating_point() else torch.float32)

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data at step `t`, in the dtype of `t` if that is floating, else float32."""
        return self._like(torch.sqrt(self._at(t)), t)

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at step `t`, in the dtype of `t` if that is floating, else float32."""
        return self._like(torch.sqrt(1 - self._at(t)), t)

    def alpha_dot(self, t: Tensor) -> Tensor:  # noqa: ARG002
        """Not defined between the entries of a table: raises ValueError."""
        raise ValueError(
            "a Discrete process has no time derivative: regress on noise, v, score or x0, not on velocity."
        )

    def sigma_dot(self, t: Tensor) -> Tensor:
        """Not defined between the entries of a table: raises ValueError."""
        return self.alpha_dot(t)

    def time(self, noise_level: Tensor) -> Tensor:
        """The step whose sigma / alpha is nearest to `noise_level` on a logarithmic scale."""
        check_tensor("noise_level", noise_level, real=True)
        table = self._table.double()
        levels = torch.log((1 - table) / table) / 2
        # Use midpoints between neighbours, which also work for an infinite level (no signal at the last step).
        middles = (levels[:-1] + levels[1:]) / 2
        wide = torch.float32 if noise_level.device.type == "mps" else torch.float64
        return torch.bucketize(torch.log(noise_level.to(wide)), middles.to(noise_level.device, wide), right=True)


def _fault_of(table: Tensor) -> str | None:
    """Why `table` (T,) does not hold cumulative products, with the remedy; None if it does."""
    if not table.isfinite().all():
        step = int((~table.isfinite()).nonzero()[0, 0])
        return f"alphas_cumprod[{step}] is {table[step]:g}: recompute it in float64."
    rises = (table.diff() >= 0).nonzero()[:, 0].tolist()
    outside = ((table < 0) | (table >= 1)).nonzero()[:, 0].tolist()
    if len(table) > 1 and len(rises) == len(table) - 1 and not outside:
        return (
            f"it runs from {table[0]:.4g} to {table[-1]:.4g}: pass the cumulative products, torch.cumprod(1 - betas, 0), "
            "not the betas, and step 0 first."
        )
    if outside:
        step = outside[0]
        return (
            f"alphas_cumprod[{step}] is {table[step]:.6g}: leave out steps without noise (1), and pass the cumulative "
            "products themselves, neither their squares, roots nor logarithms."
        )
    if rises:
        step = rises[0]
        return (
            f"alphas_cumprod[{step}] is {table[step]:.6g} and the next {table[step + 1]:.6g}: only the last step may have "
            "no signal (0), so cut the table there, or compute it in float64."
        )
    return None
