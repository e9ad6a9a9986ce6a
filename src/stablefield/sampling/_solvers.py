"""The solvers by name, and what goes with the choice of one: its options, steps, network evaluations and grid.

`SOLVERS` is the table. A new solver has its own module beside this one, and one line in the table; CONTRIBUTING shows it.
`SolverOptions` are the settings of any of them. A solver integrates from noise to data; what users call a sampler, as in
`run.sample(sampler="heun")`, is a solver with its settings, a run's weights, classes and guidance.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from stablefield.diffusion._process import VE, VP, Process
from stablefield.sampling._adaptive import rk45
from stablefield.sampling._corrector import predictor_corrector
from stablefield.sampling._dpm_solver import dpmpp_2m, dpmpp_2m_sde
from stablefield.sampling._euler_heun import euler, heun
from stablefield.sampling._grids import cosine_sigmas, edm_sigmas, ve_sigmas, vp_sigmas
from stablefield.sampling._noise import SampleNoise
from stablefield.sampling._sde import ancestral, euler_maruyama
from stablefield.sampling._solver_loop import Denoise

__all__ = ["SOLVERS", "Grid", "SamplerName", "Solve", "Solver", "SolverOptions", "option_text"]

Grid = Literal["edm", "ve", "vp", "cosine"]

Solve = Callable[[Denoise, Tensor, Tensor], Tensor]
"""A solver: from the denoiser, x at the first noise level (B, ...) and the grid of noise levels (steps + 1,) to the samples
(B, ...)."""

# Network evaluations that rk45 takes at its usual tolerances, about.
_ADAPTIVE = 150


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A solver, and what of `SolverOptions` goes with it."""

    solve: Callable[["SolverOptions", SampleNoise], Solve]
    """From the options and the noise of each step to the solver."""
    options: tuple[str, ...] = ()
    """Fields of `SolverOptions` that are for this solver; given to another one they would go unnoticed."""
    steps: int | None = 18
    """Steps by default; None where the solver chooses them."""
    calls: Callable[["SolverOptions", int], int] = lambda _, steps: steps
    """Evaluations of the denoiser in so many steps."""
    grid: Grid = "edm"
    """Its grid by default."""
    coupled: bool = False
    """Whether rows of a batch influence each other."""


def _corrector(process: Literal["ve", "vp"]) -> Solver:
    return Solver(
        solve=lambda options, noise: partial(
            predictor_corrector,
            process=process,
            predictor=options.predictor,
            corrector_steps=options.corrector_steps,
            snr=options.snr,
            # A seed is one image, whatever the batch that it is drawn in.
            average_norms=False,
            noise=noise,
        ),
        options=("predictor", "corrector_steps", "snr"),
        steps=1000,
        calls=lambda options, steps: steps * (1 + options.corrector_steps),
        grid=process,
    )


SOLVERS: Mapping[str, Solver] = {
    "heun": Solver(
        solve=lambda options, noise: partial(
            heun,
            s_churn=options.churn,
            s_min=options.churn_range[0],
            s_max=options.churn_range[1],
            s_noise=options.churn_noise,
            noise=noise,
        ),
        options=("churn", "churn_range", "churn_noise"),
        calls=lambda _, steps: 2 * steps - 1,
    ),
    "euler": Solver(solve=lambda _, __: euler),
    "dpmpp-2m": Solver(solve=lambda _, __: dpmpp_2m),
    "dpmpp-2m-sde": Solver(
        solve=lambda options, noise: partial(dpmpp_2m_sde, eta=options.eta, noise=noise), options=("eta",)
    ),
    "euler-maruyama": Solver(solve=lambda _, noise: partial(euler_maruyama, noise=noise), steps=1000),
    "ancestral": Solver(solve=lambda _, noise: partial(ancestral, noise=noise)),
    "pc-ve": _corrector("ve"),
    "pc-vp": _corrector("vp"),
    "rk45": Solver(
        solve=lambda options, _: partial(rk45, rtol=options.rtol, atol=options.atol),
        options=("rtol", "atol"),
        steps=None,
        coupled=True,
    ),
}
"""The solvers by name. A new one is listed here."""

SamplerName = str
if not TYPE_CHECKING:  # what the command offers
    SamplerName = Literal[tuple(SOLVERS)]


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """A solver with its settings."""

    sampler: SamplerName = "heun"
    """The solver: heun (EDM's, with churn stochastic), euler, dpmpp-2m and rk45 of the ODE; the others of the SDE."""
    steps: int | None = None
    """Steps of the solver; 18 by default, 1,000 for euler-maruyama, pc-ve and pc-vp. rk45 chooses its own."""
    grid: Grid | None = None
    """How noise levels are spaced; edm by default, for pc-ve and pc-vp their process's own."""
    sigma_min: float | None = None
    """Last noise level before 0; by default the grid's: 0.002, and 0.02 for ve."""
    sigma_max: float | None = None
    """First noise level; by default the grid's: 80, and 100 for ve."""
    rho: float = 7.0
    """Exponent of the edm grid."""
    churn: float = 0.0
    """Noise that heun adds over all steps; 0 for none."""
    churn_range: tuple[float, float] = (0.0, math.inf)
    """Lowest and highest noise level with churn."""
    churn_noise: float = 1.0
    """Standard deviation of churn's noise."""
    eta: float = 1.0
    """Share of noise of dpmpp-2m-sde; 0 is dpmpp-2m."""
    predictor: Literal["reverse_diffusion", "ancestral"] = "reverse_diffusion"
    """Rule from one noise level to the next of pc-ve and pc-vp."""
    corrector_steps: int = 1
    """Langevin steps a level of pc-ve and pc-vp. Their step follows from each image's own norm, so that a seed is one image
    whatever the batch; that makes the variance too large by 2 / d for d numbers in an image (0.07 % at 32 x 32 x 3)."""
    snr: float = 0.16
    """Signal-to-noise ratio of a Langevin step."""
    rtol: float = 1e-5
    """Relative tolerance of rk45."""
    atol: float = 1e-5
    """Absolute tolerance of rk45."""

    def check(self) -> None:
        """Check before anything is loaded that the options fit together.

        Raises:
            ValueError: naming the option.
        """
        defaults = {item.name: item.default for item in fields(self)}
        if self.sampler not in SOLVERS:
            near = get_close_matches(str(self.sampler), SOLVERS, 1)
            raise ValueError(
                f"sampler={self.sampler!r} is none of {', '.join(SOLVERS)}: pass one of these."
                + (f" Did you mean {near[0]}?" if near else "")
            )
        for name in dict.fromkeys(name for solver in SOLVERS.values() for name in solver.options):
            value = getattr(self, name)
            if name not in self.solver.options and value != defaults[name]:
                owners = " and ".join(owner for owner, solver in SOLVERS.items() if name in solver.options)
                raise ValueError(
                    f"{name}={option_text(value)} is an option of {owners}, not of {self.sampler}: leave it out, or choose "
                    "that sampler."
                )
        if self.solver.steps is None and self.steps is not None:
            instead = " and ".join(f"{name}=..." for name in self.solver.options)
            raise ValueError(f"steps={self.steps}: {self.sampler} chooses its own; set {instead} instead.")
        self.sigmas(None)

    @property
    def solver(self) -> Solver:
        """The line of `SOLVERS`."""
        return SOLVERS[self.sampler]

    def solve(self, noise: SampleNoise) -> Solve:
        """The solver with these options and the noise of its steps: call it with the denoiser, x and the grid."""
        return self.solver.solve(self, noise)

    @property
    def steps_taken(self) -> int | None:
        """Steps of the grid; None where the solver chooses."""
        usual = self.solver.steps
        return usual if self.steps is None or usual is None else self.steps

    @property
    def calls(self) -> int:
        """Calls of the denoiser for a batch, about: rk45 chooses its own."""
        steps = self.steps_taken
        return _ADAPTIVE if steps is None else self.solver.calls(self, steps)

    def sigmas(self, process: Process | None = None) -> Tensor:
        """The grid of noise levels, on which a model's own process gives ve and vp their ends.

        Raises:
            ValueError: if they are no grid.
        """
        steps = 2 if self.steps_taken is None else self.steps_taken
        name = self._grid_name
        ends = [("sigma_min", self.sigma_min), ("sigma_max", self.sigma_max)]
        given = {end: value for end, value in ends if value is not None}
        if name == "vp":
            if given:
                name, value = next(iter(given.items()))
                raise ValueError(
                    f"{name}={value:g}: the ends of grid=vp are those of its process; leave it out, or take another grid."
                )
            vp = process if isinstance(process, VP) else VP()
            return vp_sigmas(steps, beta_min=vp.beta_min, beta_max=vp.beta_max)
        if name == "ve":
            ve = process if isinstance(process, VE) else VE()
            low, high = given.get("sigma_min", ve.sigma_min), given.get("sigma_max", ve.sigma_max)
            return ve_sigmas(steps, sigma_min=low, sigma_max=high)
        low, high = given.get("sigma_min", 0.002), given.get("sigma_max", 80.0)
        if name == "cosine":
            return cosine_sigmas(steps, sigma_min=low, sigma_max=high)
        return edm_sigmas(steps, sigma_min=low, sigma_max=high, rho=self.rho)

    def settings(self, process: Process | None = None) -> list[str]:
        """The grid and the solver's own options, in words."""
        sigmas = self.sigmas(process)
        parts = [f"{self._grid_name} grid {float(sigmas[0]):.6g} to {float(sigmas[-2]):.6g}"]
        if self._grid_name == "edm" and self.steps_taken is not None:
            parts[0] += f", rho {self.rho:g}"
        for name in self.solver.options:
            if not (name.startswith("churn") and self.churn == 0):
                value = getattr(self, name)
                text = " to ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)
                parts.append(f"{name.replace('_', ' ')} {text}")
        return parts

    @property
    def _grid_name(self) -> Grid:
        return self.grid or self.solver.grid


def option_text(value: object) -> str:
    """A value as it stands on a command line and in Python alike."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
