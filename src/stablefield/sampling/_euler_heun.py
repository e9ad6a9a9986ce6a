r"""Solvers of the probability-flow ODE on a fixed grid: Euler and Heun.

$$ \frac{dx}{d\sigma} = \frac{x - D(x, \sigma)}{\sigma} $$

carries $p_{\sigma_0}$ exactly to $p_{\sigma_N}$. With the slope $d_i$ at $(x_i, \sigma_i)$, Euler's step is
$x_{i+1} = x_i + (\sigma_{i+1} - \sigma_i)\, d_i$. Heun's also takes the slope $d'_i$ there, and uses the mean of both,
$x_{i+1} = x_i + (\sigma_{i+1} - \sigma_i) (d_i + d'_i) / 2$. Euler's global error is of order 1 in the step, Heun's of order
2. A step to sigma 0 is Euler's in both, and returns the denoiser's output.

References:
    Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022,
    algorithm 1 (Heun), algorithm 2 (with churn).
"""

import math

import torch
from torch import Tensor

from stablefield._shapes import number
from stablefield.sampling._noise import Noise, normal_source
from stablefield.sampling._solver_loop import Callback, Denoise, derivative, start

__all__ = ["euler", "heun"]


@torch.no_grad()
def euler(denoiser: Denoise, x: Tensor, sigmas: Tensor, *, callback: Callback | None = None) -> Tensor:
    """Euler's method: one evaluation a step, order 1. It is DDIM in noise-to-signal units.

    Args:
        denoiser: D(x, sigma).
        x: state at `sigmas[0]`, shape (B, ...), float32 or float64.
        sigmas: noise levels, shape (N + 1,), strictly decreasing, a last 0 or not.
        callback: called before every step with its number, the state and the denoiser's output.

    Returns:
        The state at `sigmas[-1]`, like `x`, after N evaluations.

    Raises:
        ValueError: if an argument is unusable, or the denoiser's output has another shape than `x` or is not finite.

    References:
        Song, Meng, Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, equation 13.
    """
    loop = start("euler", denoiser, x, sigmas, callback)
    for step, sigma, sigma_next in loop.steps():
        denoised = loop.denoise(x, sigma)
        loop.report(step, x, denoised)
        x = x + (sigma_next - sigma) * derivative(x, denoised, sigma)
    return loop.arrive(x)


@torch.no_grad()
def heun(
    denoiser: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    noise: Noise | None = None,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's method of EDM, with optional churn: two evaluations a step, one for a step to 0, order 2.

    18 steps on a grid that ends in 0 are 35 evaluations. With churn, fresh noise raises the noise level before a step;
    the callback sees the raised state.

    Args:
        denoiser: D(x, sigma).
        x: state at `sigmas[0]`, shape (B, ...), float32 or float64.
        sigmas: noise levels, shape (N + 1,), strictly decreasing, a last 0 or not.
        s_churn: amount of noise added over all steps; 0 is deterministic and draws nothing.
        s_min: lowest noise level with churn.
        s_max: highest noise level with churn.
        s_noise: standard deviation of the added noise; slightly above 1 restores lost detail.
        noise: source of the noise, such as `SampleNoise`.
        generator: a generator instead of `noise`.
        callback: called once a step with its number, the state and the denoiser's output.

    Returns:
        The state at `sigmas[-1]`, like `x`, after 2 N evaluations, 2 N - 1 if the grid ends in 0.

    Raises:
        ValueError: if an argument is unusable, or the denoiser's output has another shape than `x` or is not finite.

    References:
        Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022,
        algorithms 1 and 2.
    """
    loop = start("heun", denoiser, x, sigmas, callback)
    draw = normal_source(noise, generator)
    for name, value in (("s_churn", s_churn), ("s_min", s_min), ("s_max", s_max), ("s_noise", s_noise)):
        number(f"heun: {name}", value)
    if math.isnan(s_min) or math.isnan(s_max):
        raise ValueError(f"heun: s_min={s_min}, s_max={s_max}: neither may be NaN.")
    if s_min > s_max:
        raise ValueError(
            f"heun: s_min={s_min} is above s_max={s_max}, so no noise is added: pass the lower level as s_min."
        )
    if not 0 <= s_churn < math.inf or not 0 <= s_noise < math.inf:
        raise ValueError(f"heun: s_churn={s_churn}, s_noise={s_noise}: neither may be negative or infinite.")
    gamma = min(s_churn / (len(loop.levels) - 1), math.sqrt(2) - 1)
    for step, sigma, sigma_next in loop.steps():
        if gamma > 0 and s_min <= sigma <= s_max:
            raised = sigma * (1 + gamma)
            x = x + math.sqrt(raised**2 - sigma**2) * s_noise * draw(x)
        else:
            raised = sigma
        denoised = loop.denoise(x, raised)
        loop.report(step, x, denoised)
        slope = derivative(x, denoised, raised)
        end = x + (sigma_next - raised) * slope
        if sigma_next > 0:
            slope_end = derivative(end, loop.denoise(end, sigma_next), sigma_next)
            end = x + (sigma_next - raised) * (slope + slope_end) / 2
        x = end
    return loop.arrive(x)
