r"""Steps on the reverse SDE: Euler-Maruyama and ancestral.

In the clock $v = \sigma^2$ the forward process is a Brownian motion and its reverse is
$dx = \frac{D - x}{v}\, d\bar v + d\bar w$, $\bar v$ running down. From $\sigma$ to $\sigma'$ both samplers have
the same mean,

$$ m = D + \frac{\sigma'^2}{\sigma^2} (x - D), $$

and add noise of variance $\sigma^2 - \sigma'^2$ (Euler-Maruyama: that of the Brownian motion) or
$\sigma'^2 (\sigma^2 - \sigma'^2) / \sigma^2$ (ancestral: that of $x_{\sigma'}$ given $x_\sigma$ and $x_0 = D$). Both
have weak order 1. A step to 0 is the mean alone, the denoiser's output: noise from that step would stay in the sample.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stablefield.sampling._noise import Noise, normal_source
from stablefield.sampling._solver_loop import Callback, Denoise, SolverLoop, start

__all__ = ["ancestral", "euler_maruyama"]


@torch.no_grad()
def euler_maruyama(
    denoiser: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler-Maruyama on the reverse SDE in the clock sigma^2: one evaluation a step.

    This is also the reverse-diffusion sampler of Song et al. (2021) for the VE process.

    Args:
        denoiser: D(x, sigma).
        x: state at `sigmas[0]`, shape (B, ...), float32 or float64.
        sigmas: noise levels, shape (N + 1,), strictly decreasing, a last 0 or not.
        noise: source of the noise, such as `SampleNoise`.
        generator: a generator instead of `noise`.
        callback: called before every step with its number, the state and the denoiser's output.

    Returns:
        The state at `sigmas[-1]`, like `x`, after N evaluations.

    Raises:
        ValueError: if an argument is unusable, or the denoiser's output has another shape than `x` or is not finite.

    References:
        Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, "Score-Based Generative Modeling through Stochastic
        Differential Equations", ICLR 2021, equation 6 and appendix E.
    """
    loop = start("euler_maruyama", denoiser, x, sigmas, callback)
    return _reverse(loop, x, lambda v, v_next: v - v_next, normal_source(noise, generator))


@torch.no_grad()
def ancestral(
    denoiser: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling: every step draws from the exact Gaussian q(x' | x, x_0 = D). One evaluation a step.

    Args:
        denoiser: D(x, sigma).
        x: state at `sigmas[0]`, shape (B, ...), float32 or float64.
        sigmas: noise levels, shape (N + 1,), strictly decreasing, a last 0 or not.
        noise: source of the noise, such as `SampleNoise`.
        generator: a generator instead of `noise`.
        callback: called before every step with its number, the state and the denoiser's output.

    Returns:
        The state at `sigmas[-1]`, like `x`, after N evaluations.

    Raises:
        ValueError: if an argument is unusable, or the denoiser's output has another shape than `x` or is not finite.

    References:
        Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, equations 6 and 7, in
        noise-to-signal units.
    """
    loop = start("ancestral", denoiser, x, sigmas, callback)
    return _reverse(loop, x, lambda v, v_next: v_next * (v - v_next) / v, normal_source(noise, generator))


def _reverse(loop: SolverLoop, x: Tensor, variance: Callable[[float, float], float], draw: Noise) -> Tensor:
    """Both samplers; `variance` is that of the noise from sigma^2 to the next sigma^2."""
    for step, sigma, sigma_next in loop.steps():
        denoised = loop.denoise(x, sigma)
        loop.report(step, x, denoised)
        if sigma_next == 0:
            return denoised
        mean = denoised + (sigma_next / sigma) ** 2 * (x - denoised)
        x = mean + math.sqrt(variance(sigma**2, sigma_next**2)) * draw(x)
    return loop.arrive(x)
