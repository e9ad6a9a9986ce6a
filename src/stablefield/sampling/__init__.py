r"""Samplers: from noise to data with anybody's denoiser.

A denoiser `D(x, sigma)` returns $E[x_0 | x]$ for data with noise of standard deviation `sigma` added. It is all a
sampler needs: the score is $(D(x, \sigma) - x) / \sigma^2$ and the probability-flow ODE is $dx/d\sigma = (x - D(x,
\sigma)) / \sigma$.

Every sampler is a function in k-diffusion's calling habit, `sampler(denoiser, x, sigmas, *, ...)`:

- `denoiser` is called with `x` (B, ...) and `sigma` (B,), both of the dtype and on the device of `x`;
- `x` is the state at `sigmas[0]`, float32 or float64: `sigmas[0]` times standard normal noise to draw from the model;
- `sigmas` decreases strictly and is used as given, a last 0 included or not;
- the state at the end of the grid is returned, a tensor like `x`. No gradients are recorded.

Units are noise-to-signal throughout: a state is x_t / alpha, a sigma is sigma / alpha. Models of every Gaussian process
(VE, VP, cosine, flow matching) are one and the same denoiser in these units.
"""

from stablefield.sampling._adaptive import rk45
from stablefield.sampling._corrector import predictor_corrector
from stablefield.sampling._counting import Counted, counted
from stablefield.sampling._dpm_solver import dpmpp_2m, dpmpp_2m_sde
from stablefield.sampling._euler_heun import euler, heun
from stablefield.sampling._grids import cosine_sigmas, edm_sigmas, ve_sigmas, vp_sigmas
from stablefield.sampling._guidance import autoguidance, classifier_free
from stablefield.sampling._likelihood import Likelihood, log_likelihood
from stablefield.sampling._noise import SampleNoise
from stablefield.sampling._sde import ancestral, euler_maruyama

__all__ = [
    "Counted",
    "Likelihood",
    "SampleNoise",
    "ancestral",
    "autoguidance",
    "classifier_free",
    "cosine_sigmas",
    "counted",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "edm_sigmas",
    "euler",
    "euler_maruyama",
    "heun",
    "log_likelihood",
    "predictor_corrector",
    "rk45",
    "ve_sigmas",
    "vp_sigmas",
]
