"""Error against network evaluations of ODE samplers here, in diffusers and in azula, on a distribution that is known.

    pip install --no-deps azula einops    # besides what `make test` installs
    python benchmarks/samplers.py

The distribution is a mixture of 64 digits, each with a standard deviation of 0.2, in 64 dimensions: its denoiser is exact,
and its ODE is solved to 1e-10 for comparison. All begin at the same noise and use EDM's grid (rho 7, from 80 to 0.002, then
to 0). Also the time that a step takes beside the network, for a batch of 16 images of 3 x 32 x 32. Writes
results/samplers.json.
"""

import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace

import torch
from azula.denoise import Denoiser, DiracPosterior
from azula.noise import Schedule
from azula.sample import EulerSampler, HeunSampler, xEABSampler
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from record import write
from torch import Tensor

import stablefield as sf
from stablefield.data._digits import open_digits
from stablefield.sampling import counted, dpmpp_2m, edm_sigmas, euler, heun, rk45

Denoise = Callable[[Tensor, Tensor], Tensor]
Sampler = Callable[[Denoise, Tensor, int], Tensor]
SPREAD, SIGMA_DATA = 0.2, 0.5


def mixture() -> Denoise:
    """D(x, sigma) of the mixture, for one sigma for all rows."""
    pixels = torch.tensor(open_digits().images[:64]).double().flatten(1) / 127.5 - 1

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.double().reshape(-1)[0]
        whole = sigma**2 + SPREAD**2
        centre = sf.posterior(x.double(), 1.0, whole.sqrt(), pixels).mean
        return (centre + (SPREAD**2 / whole) * (x - centre)).to(x.dtype)

    return denoise


def ours(sampler: Callable[..., Tensor]) -> Sampler:
    return lambda denoise, x, steps: sampler(denoise, x, edm_sigmas(steps, dtype=x.dtype))


def diffusers(kind: type, **options: object) -> Sampler:
    """A scheduler of diffusers, whose network is the one that its preconditioning makes D of."""

    def run(denoise: Denoise, x: Tensor, steps: int) -> Tensor:
        scheduler = kind(sigma_min=0.002, sigma_max=80.0, sigma_data=SIGMA_DATA, rho=7.0, **options)
        scheduler.set_timesteps(steps)
        for k, t in enumerate(scheduler.timesteps):
            sigma = scheduler.sigmas[k].to(x.dtype)
            square = sigma**2 + SIGMA_DATA**2
            skip, out = SIGMA_DATA**2 / square, sigma * SIGMA_DATA / square.sqrt()
            scheduler.scale_model_input(x, t)
            network = (denoise(x, sigma.expand(len(x))) - skip * x) / out
            x = scheduler.step(network, t, x).prev_sample
        return x

    return run


def azula(kind: type, **options: object) -> Sampler:
    class Exact(Denoiser):
        def __init__(self, denoise: Denoise) -> None:
            super().__init__()
            self.denoise, self.schedule = denoise, Level()

        def forward(self, x_t: Tensor, t: Tensor, **_: object) -> DiracPosterior:
            return DiracPosterior(mean=self.denoise(x_t, t.expand(len(x_t))))

    class Level(Schedule):
        """Time is the noise level itself."""

        def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return torch.ones_like(t), t

    def run(denoise: Denoise, x: Tensor, steps: int) -> Tensor:
        class OnGrid(kind):
            timesteps = edm_sigmas(steps, dtype=x.dtype).clamp(min=1e-6)  # it takes logarithms of the last one, too

        return OnGrid(Exact(denoise), steps=steps, silent=True, **options)(x)

    return run


SAMPLERS: dict[str, tuple[str, Sampler]] = {
    "stablefield euler": ("Euler", ours(euler)),
    "diffusers EDMEulerScheduler": ("Euler", diffusers(EDMEulerScheduler)),
    "azula EulerSampler": ("Euler", azula(EulerSampler)),
    "stablefield heun": ("Heun", ours(heun)),
    "azula HeunSampler": ("Heun", azula(HeunSampler)),
    "stablefield dpmpp_2m": ("DPM-Solver++(2M)", ours(dpmpp_2m)),
    "diffusers EDMDPMSolverMultistepScheduler": ("DPM-Solver++(2M)", diffusers(EDMDPMSolverMultistepScheduler)),
    "azula xEABSampler": ("DPM-Solver++(2M)", azula(xEABSampler, order=2)),
}


def overhead(sampler: Sampler) -> float:
    """Median microseconds of a step beside the network, over 9 runs of 32 steps."""
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 80
    calls = SimpleNamespace(count=0)

    def nothing(x: Tensor, sigma: Tensor) -> Tensor:  # noqa: ARG001
        calls.count += 1
        return x

    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        sampler(nothing, x, 32)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:]) / 32 * 1e6


def main() -> None:
    torch.set_num_threads(1)
    denoise = mixture()
    x = 80 * torch.randn(256, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = rk45(denoise, x, edm_sigmas(2, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    size = truth.square().mean().sqrt()
    rows = []
    for name, (method, sampler) in SAMPLERS.items():
        row: dict[str, object] = {"sampler": name, "method": method, "microseconds_per_step": overhead(sampler)}
        for steps in (9, 18, 36):
            network = counted(denoise)
            found = sampler(network, x, steps)
            row[f"nfe_{steps}"] = network.nfe
            row[f"error_{steps}"] = float((found - truth).square().mean().sqrt() / size)
        rows.append(row)
        print({key: f"{value:.2e}" if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    libraries = {name: version(name) for name in ("diffusers", "azula")}
    print(write("samplers", "python benchmarks/samplers.py", {"libraries": libraries, "samplers": rows}))


if __name__ == "__main__":
    main()
