r"""Grids of noise levels, from noise to data.

Every grid takes a number of steps N and returns N + 1 values: N positive ones, strictly decreasing, and a last 0. They
are in noise-to-signal units (sigma / alpha), computed in float64 and cast at the end. `sigmas[:-1]` is the grid without
its 0.

With $u_i = i / (N - 1)$ for i = 0 .. N - 1, from noise to data:

    edm      (sigma_max^(1/rho) + u (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho
    ve       sigma_max (sigma_min / sigma_max)^u
    vp       sqrt(exp(b(t)) - 1),  b(t) = (beta_max - beta_min) t^2 / 2 + beta_min t,  t = 1 + u (epsilon - 1)
    cosine   tan(theta),  theta = arctan(sigma_max) + u (arctan(sigma_min) - arctan(sigma_max))
"""

import math

import torch
from torch import Tensor

from stablefield._shapes import as_device, check_floating_dtype, number, whole_number
from stablefield.diffusion._process import VE, VP, Cosine

__all__ = ["cosine_sigmas", "edm_sigmas", "ve_sigmas", "vp_sigmas"]

# More than any use needs; 16 MB.
_MOST_STEPS = 1_000_000


def edm_sigmas(
    steps: int,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The grid of EDM: uniform in sigma^(1/rho).

    Args:
        steps: number of steps N >= 1; Heun's method spends 2 N - 1 evaluations on them.
        sigma_min: last noise level before 0.
        sigma_max: first noise level.
        rho: how strongly the levels concentrate near the data; 1 is uniform.
        device: device of the result.
        dtype: dtype of the result.

    Returns:
        Noise levels, shape (N + 1,), the last one 0.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if `steps` < 1, not 0 < sigma_min < sigma_max, or `rho` is not positive;
            or the levels do not decrease, or are not finite, in `dtype`.

    References:
        Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022,
        equation 5.
    """
    sigma_min, sigma_max = _ends(sigma_min, sigma_max)
    rho = number("rho", rho)
    if not 0 < rho < math.inf:
        raise ValueError(f"rho={rho}: it must be positive (7 is the usual choice, 1 is a uniform grid).")
    try:
        low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    except OverflowError:
        raise ValueError(f"rho={rho}: sigma_max={sigma_max} to the power 1 / rho is too large: 7 is usual.") from None
    sigmas = _uniform(steps, high, low) ** rho
    return _finish(_pin(sigmas, sigma_max, sigma_min), device, dtype, f"rho={rho}")


def ve_sigmas(
    steps: int,
    *,
    sigma_min: float = 0.02,
    sigma_max: float = 100.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """A geometric grid: the variance-exploding process at uniform times.

    Args:
        steps: number of steps N >= 1.
        sigma_min: last noise level before 0.
        sigma_max: first noise level.
        device: device of the result.
        dtype: dtype of the result.

    Returns:
        Noise levels, shape (N + 1,), the last one 0.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if `steps` < 1 or not 0 < sigma_min < sigma_max;
            or the levels do not decrease, or are not finite, in `dtype`.

    References:
        Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, "Score-Based Generative Modeling through Stochastic
        Differential Equations", ICLR 2021, appendix C.
    """
    sigma_min, sigma_max = _ends(sigma_min, sigma_max)
    sigmas = VE(sigma_min=sigma_min, sigma_max=sigma_max).sigma(_uniform(steps, 1.0, 0.0))
    return _finish(_pin(sigmas, sigma_max, sigma_min), device, dtype, f"sigma_min={sigma_min}, sigma_max={sigma_max}")


def vp_sigmas(
    steps: int,
    *,
    beta_min: float = 0.1,
    beta_max: float = 20.0,
    epsilon: float = 1e-3,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Noise levels of the variance-preserving process at uniform times from 1 to `epsilon`: 152 to 0.010 by default.

    Args:
        steps: number of steps N >= 1.
        beta_min: rate of noise at time 0.
        beta_max: rate of noise at time 1.
        epsilon: last time before 0, in (0, 1).
        device: device of the result.
        dtype: dtype of the result.

    Returns:
        Noise levels sigma / alpha, shape (N + 1,), the last one 0.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if `steps` < 1, not 0 < beta_min < beta_max, or `epsilon` is not in (0, 1);
            or the levels do not decrease, or are not finite, in `dtype`.

    References:
        Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021, appendix C.
    """
    epsilon = number("epsilon", epsilon)
    if not 0 < epsilon < 1:
        raise ValueError(
            f"epsilon={epsilon}: the last time lies between 0 and 1 (1e-3 for sampling, 1e-5 for likelihood)."
        )
    sigmas = VP(beta_min=beta_min, beta_max=beta_max).noise_level(_uniform(steps, 1.0, epsilon))
    return _finish(sigmas, device, dtype, f"beta_min={beta_min}, beta_max={beta_max}, epsilon={epsilon}")


def cosine_sigmas(
    steps: int,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Noise levels of the cosine process at uniform times: uniform in the angle whose tangent they are.

    Args:
        steps: number of steps N >= 1.
        sigma_min: last noise level before 0.
        sigma_max: first noise level (the process itself begins at infinity).
        device: device of the result.
        dtype: dtype of the result.

    Returns:
        Noise levels sigma / alpha, shape (N + 1,), the last one 0.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if `steps` < 1 or not 0 < sigma_min < sigma_max;
            or the levels do not decrease, or are not finite, in `dtype`.

    References:
        Salimans, Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", ICLR 2022, section 2.
    """
    sigma_min, sigma_max = _ends(sigma_min, sigma_max)
    process = Cosine()
    first, last = process.time(torch.tensor([sigma_max, sigma_min], dtype=torch.float64)).tolist()
    sigmas = _pin(process.noise_level(_uniform(steps, first, last)), sigma_max, sigma_min)
    return _finish(sigmas, device, dtype, f"sigma_min={sigma_min}, sigma_max={sigma_max}")


def _ends(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    low, high = number("sigma_min", sigma_min), number("sigma_max", sigma_max)
    if not 0 < low < high < math.inf:
        raise ValueError(f"sigma_min={sigma_min}, sigma_max={sigma_max}: 0 < sigma_min < sigma_max must hold.")
    return low, high


def _uniform(steps: int, first: float, last: float) -> Tensor:
    steps = whole_number("steps", steps)
    if steps < 1:
        raise ValueError(f"steps={steps}: pass at least 1.")
    if steps > _MOST_STEPS:
        raise ValueError(f"steps={steps}: a grid has at most {_MOST_STEPS:,} steps; 18 to 1,000 are usual.")
    return torch.linspace(first, last, steps, dtype=torch.float64)


def _pin(sigmas: Tensor, sigma_max: float, sigma_min: float) -> Tensor:
    """Set the ends exactly: powers and tangents return them with a rounding error."""
    sigmas[-1] = sigma_min
    sigmas[0] = sigma_max
    return sigmas


def _finish(sigmas: Tensor, device: torch.device | str | None, dtype: torch.dtype, given: str) -> Tensor:
    """Append 0 and check the grid in `dtype`; `given` names its arguments for errors."""
    check_floating_dtype("dtype", dtype)
    # Cast first: some devices have no float64.
    grid = torch.cat([sigmas, sigmas.new_zeros(1)]).to(dtype)
    wide = grid.double()
    if not wide.isfinite().all():
        raise ValueError(
            f"{given}: the noise levels reach {float(sigmas.max()):.4g}, too much for {dtype}: use less noise."
        )
    if not (wide.diff() < 0).all():
        k = int((wide.diff() >= 0).nonzero()[0, 0])
        raise ValueError(
            f"{given}, steps={len(sigmas)}: two neighbours are the noise level {float(wide[k]):.6g} in {dtype}, so the grid "
            "does not decrease: take fewer steps, a wider dtype, or values nearer to the defaults."
        )
    return grid.to(as_device("device", device))
