r"""Exact likelihood under the probability-flow ODE.

Along $dx/d\sigma = f(x, \sigma) = (x - D(x, \sigma)) / \sigma$ the log density changes by the divergence, so with the
flow from $x$ at $\sigma_{min}$ to $z$ at $\sigma_{max}$

$$ \log p_{\sigma_{min}}(x)
   = \log N(z; 0, \mathrm{std}^2 I) + \int_{\sigma_{min}}^{\sigma_{max}} \nabla \cdot f\, d\sigma,
   \qquad \nabla \cdot f = \frac{d - \mathrm{tr}\, \partial D / \partial x}{\sigma}. $$

The trace is exact by d vector-Jacobian products, or estimated without bias by Hutchinson's
$e^T (\partial D / \partial x)\, e$ with one draw of signs e per row, so that the ODE stays smooth. As in `rk45` the
clock is $\ln \sigma$.

8-bit images: for pixels u = 0 .. 255 as x = u / 127.5 - 1 a bin is 1 / 127.5 wide, and a density over x becomes a
probability of u by adding log2(127.5) = 6.994 bits per dimension to $-\log_2 p / d$. The number bounds the code length
of the images if you first add uniform noise of one bin's width to them (dequantisation).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield._shapes import flag, number, whole_number
from stablefield.sampling._adaptive import integrate, span
from stablefield.sampling._noise import Noise, normal_source
from stablefield.sampling._solver_loop import Denoise, SolverLoop, start

__all__ = ["Likelihood", "log_likelihood"]


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Log densities, and the flow's images of the data.

    Attributes:
        log_prob: log density in nats, shape (B,), float64.
        latents: the state at the largest noise level, like the data; divided by that level, standard normal under the model.
    """

    log_prob: Tensor
    latents: Tensor

    def bits_per_dimension(self, bin_width: float = 1 / 127.5) -> Tensor:
        """Negative log2 probability of a bin per dimension, shape (B,): -log_prob / (d ln 2) - log2(bin_width).

        Args:
            bin_width: width of one value's bin in the units of the data. The default fits 8-bit images as
                u / 127.5 - 1 and adds 6.994; images as 2 u / 256 - 1 have 1 / 128 and add 7; 1 gives the density.
        """
        if not 0 < number("bin_width", bin_width) < math.inf:
            raise ValueError(f"bin_width={bin_width}: it must be positive; 8-bit images have 1 / 127.5.")
        return -self.log_prob / (self.latents[0].numel() * math.log(2)) - math.log2(bin_width)


@torch.no_grad()
def log_likelihood(
    denoiser: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    exact: bool = False,
    probes: int = 1,
    prior_std: float | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_nfe: int = 10_000,
    noise: Noise | None = None,
    generator: torch.Generator | None = None,
) -> Likelihood:
    """Log density of data under the model, by `rk45` from the smallest noise level up to the largest.

    Unlike the samplers, it goes from data to noise: `x` is the state at the grid's smallest positive noise level (clean
    data, if that is small), not at `sigmas[0]`. Rows may not influence each other in the denoiser (batch norm in training
    mode does).

    Args:
        denoiser: D(x, sigma), differentiable by autograd.
        x: data, shape (B, ...), float32 or float64; images with dequantisation noise.
        sigmas: noise levels, strictly decreasing, with at least two positive ones; only the ends matter; skips a
            last 0.
        exact: exact trace by d vector-Jacobian products per evaluation; for small d.
        probes: Hutchinson probes per row; the variance falls as 1 / probes, each costs a vector-Jacobian product.
        prior_std: standard deviation of the model's state at `sigmas[0]`: `sigmas[0]` by default. The VP process in
            noise-to-signal units has sqrt(1 + sigmas[0]^2).
        rtol: tolerance relative to the state.
        atol: absolute tolerance.
        max_nfe: most evaluations before an error.
        noise: source of the probes' signs (the signs of normal noise), such as `SampleNoise`; not with `exact`.
        generator: a generator instead of `noise`.

    Returns:
        Log densities in nats, the latents, and a method for bits per dimension.

    Raises:
        ValueError: if an argument is unusable, the denoiser's output has another shape than `x`, is not finite or does
            not depend on `x` by autograd, or `max_nfe` evaluations do not reach the tolerance.
        ImportError: if SciPy is not installed.

    References:
        Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, "Score-Based Generative Modeling through Stochastic
        Differential Equations", ICLR 2021, equation 39 and appendix D.2.
        Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines", 1990.
        Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud, "FFJORD", ICLR 2019, section 3.1.
    """
    loop = start("log_likelihood", denoiser, x, sigmas, noisy=False)
    sigma_max, sigma_min = span(loop)
    flag("log_likelihood: exact", exact)
    whole_number("log_likelihood: probes", probes)
    if prior_std is not None:
        number("log_likelihood: prior_std", prior_std)
    std = sigma_max if prior_std is None else prior_std
    if probes < 1 or not 0 < std < math.inf:
        raise ValueError(f"log_likelihood: probes={probes}, prior_std={prior_std}: both must be positive.")
    if exact and probes != 1:
        raise ValueError(f"log_likelihood: probes={probes} does nothing with exact=True: leave one of the two out.")
    for name, value in (("noise", noise), ("generator", generator)):
        if exact and value is not None:
            raise ValueError(
                f"log_likelihood: {name} does nothing with exact=True, which draws no signs: leave it out."
            )
    draw = normal_source(noise, generator)
    vectors = _unit_vectors(x) if exact else [torch.where(draw(x) < 0, -1.0, 1.0).to(x) for _ in range(probes)]
    rows, size = x.shape[0], x[0].numel()

    def slope(sigma: float, state: Tensor) -> Tensor:
        point = state[: rows * size].reshape(x.shape).to(x)
        denoised, products = _quadratic_forms(loop, point, sigma, vectors)
        trace = products.sum(0) if exact else products.mean(0)
        flow = (point - denoised).flatten().double().cpu()
        return torch.cat([flow, (size - trace).cpu()])

    state = torch.cat([x.flatten().double().cpu(), torch.zeros(rows, dtype=torch.float64)])
    state = integrate("log_likelihood", slope, state, sigma_min, sigma_max, rtol, atol, max_nfe)
    latents, divergence = state[: rows * size].reshape(rows, size), state[rows * size :]
    prior = -0.5 * latents.square().sum(1) / std**2 - size * (math.log(std) + 0.5 * math.log(2 * math.pi))
    return Likelihood(log_prob=(prior + divergence).to(x.device), latents=latents.reshape(x.shape).to(x))


def _quadratic_forms(loop: SolverLoop, x: Tensor, sigma: float, vectors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """D(x, sigma), and e^T (dD/dx) e for every vector e and row, shape (vectors, B), float64."""
    with torch.inference_mode(False), torch.enable_grad():
        point = x.detach().clone().requires_grad_()
        denoised = loop.denoise(point, sigma)
        if not denoised.requires_grad:
            raise ValueError(
                "log_likelihood: the denoiser's output carries no gradient: its divergence needs one, "
                "so call it without torch.no_grad, detach or a compiled inference engine."
            )
        forms: list[Tensor] = []
        for k, vector in enumerate(vectors):
            (product,) = torch.autograd.grad(denoised, point, vector, retain_graph=k + 1 < len(vectors))
            forms.append((product.double() * vector.double()).flatten(1).sum(1))
    return denoised.detach(), torch.stack(forms)


def _unit_vectors(x: Tensor) -> list[Tensor]:
    """The d unit vectors, each for every row."""
    return [row.expand_as(x) for row in torch.eye(x[0].numel()).to(x).reshape(-1, 1, *x.shape[1:])]
