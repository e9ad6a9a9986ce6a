r"""DPM-Solver++(2M), a multistep solver, and its form for the reverse SDE.

With $\lambda = -\ln \sigma$ and $h = \lambda_{i+1} - \lambda_i$, the solution over one step for a denoiser output $D$
that does not change is exact:

$$ x_{i+1} = D + e^{-(1 + \eta) h} (x_i - D) + \sigma_{i+1} \sqrt{1 - e^{-2 \eta h}}\, z, $$

$\eta = 0$ the ODE, $\eta = 1$ the reverse SDE (the exact Gaussian posterior step). The second order comes from the last
step's output, extrapolated to the middle of this one: $D + (D - D_{last}) h / (2 h_{last})$. So one evaluation
per step gives order 2.
"""

import math

import torch
from torch import Tensor

from stablefield._shapes import number
from stablefield.sampling._noise import Noise, normal_source
from stablefield.sampling._solver_loop import Callback, Denoise, SolverLoop, start

__all__ = ["dpmpp_2m", "dpmpp_2m_sde"]


@torch.no_grad()
def dpmpp_2m(denoiser: Denoise, x: Tensor, sigmas: Tensor, *, callback: Callback | None = None) -> Tensor:
    """DPM-Solver++(2M): one evaluation a step, order 2.

    The first step, and a step to 0, are of order 1; a step to 0 returns the denoiser's output.

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
        Lu, Zhou, Bao, Chen, Li, Zhu, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
        2022, algorithm 2.
    """
    return _multistep(start("dpmpp_2m", denoiser, x, sigmas, callback), x, eta=0.0)


@torch.no_grad()
def dpmpp_2m_sde(
    denoiser: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Noise | None = None,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """SDE-DPM-Solver++(2M), midpoint rule: one evaluation a step.

    Args:
        denoiser: D(x, sigma).
        x: state at `sigmas[0]`, shape (B, ...), float32 or float64.
        sigmas: noise levels, shape (N + 1,), strictly decreasing, a last 0 or not.
        eta: 0 is `dpmpp_2m`, 1 the reverse SDE.
        s_noise: factor on the added noise.
        noise: source of the noise, such as `SampleNoise`.
        generator: a generator instead of `noise`.
        callback: called before every step with its number, the state and the denoiser's output.

    Returns:
        The state at `sigmas[-1]`, like `x`, after N evaluations.

    Raises:
        ValueError: if an argument is unusable, or the denoiser's output has another shape than `x` or is not finite.

    References:
        Lu, Zhou, Bao, Chen, Li, Zhu, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
        2022, section 3.4 and appendix B (SDE-DPM-Solver++(2M)).
    """
    loop = start("dpmpp_2m_sde", denoiser, x, sigmas, callback)
    number("dpmpp_2m_sde: eta", eta)
    number("dpmpp_2m_sde: s_noise", s_noise)
    if not 0 <= eta < math.inf or not 0 <= s_noise < math.inf:
        raise ValueError(f"dpmpp_2m_sde: eta={eta}, s_noise={s_noise}: neither may be negative or infinite.")
    return _multistep(loop, x, eta=eta, s_noise=s_noise, draw=normal_source(noise, generator))


def _multistep(loop: SolverLoop, x: Tensor, *, eta: float, s_noise: float = 1.0, draw: Noise | None = None) -> Tensor:
    last: tuple[Tensor, float] | None = None
    for step, sigma, sigma_next in loop.steps():
        denoised = loop.denoise(x, sigma)
        loop.report(step, x, denoised)
        if sigma_next == 0:
            return denoised
        h = math.log(sigma / sigma_next)
        middle = denoised
        if last is not None:
            last_denoised, last_h = last
            middle = denoised + (denoised - last_denoised) * (h / (2 * last_h))
        x = middle + math.exp(-(1 + eta) * h) * (x - middle)
        if draw is not None and eta > 0:
            x = x + sigma_next * math.sqrt(-math.expm1(-2 * eta * h)) * s_noise * draw(x)
        last = denoised, h
    return loop.arrive(x)
