"""The solvers by name, each with its options, steps, network evaluations and grid.

`SOLVERS` is the table. A new solver has its own module beside this one, and one line in the table; CONTRIBUTING shows it.
`SolverOptions` are the settings of any of them. A solver integrates from noise to data; a sampler, as in
`run.sample(sampler="heun")`, is a solver with its settings, a run's weights, classes and guidance.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

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
Predictor = Literal["reverse_diffusion", "ancestral"]

Solve = Callable[[Denoise, Tensor, Tensor], Tensor]
"""A solver: from the denoiser, x at the first noise level (B, ...) and the grid of noise levels (steps + 1,) to the samples
(B, ...)."""

# Options without effect where another one is 0, and a usual value of that one.
_NEEDED = {"churn_range": ("churn", 40), "churn_noise": ("churn", 40), "snr": ("corrector_steps", 1)}

# Rough number of network evaluations of rk45 at its usual tolerances.
_ADAPTIVE = 150


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A solver and its part of `SolverOptions`."""

    solve: Callable[["SolverOptions", SampleNoise], Solve]
    """Makes the solver from the options and the noise of its steps."""
    options: tuple[str, ...] = ()
    """Fields of `SolverOptions` for this solver; others reject them, since they would ignore them."""
    steps: int | None = 18
    """Default steps; None if the solver chooses them."""
    calls: Callable[["SolverOptions", int], int] = lambda _, steps: steps
    """Evaluations of the denoiser for a number of steps."""
    grid: Grid = "edm"
    """Its default grid."""
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
            # A seed gives the same image in any batch.
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
"""The solvers by name. Add a new one here."""

SamplerName = str
if not TYPE_CHECKING:  # the command's choices
    SamplerName = Literal[tuple(SOLVERS)]


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """A solver with its settings."""

    sampler: SamplerName = "heun"
    """The solver: heun (EDM's; stochastic with churn), euler, dpmpp-2m and rk45 solve the ODE; the others the SDE."""
    steps: int | None = None
    """Number of solver steps; 18 by default, 1,000 for euler-maruyama, pc-ve and pc-vp. rk45 chooses its own."""
    grid: Grid | None = None
    """Spacing of the noise levels; edm by default, for pc-ve and pc-vp their process's own."""
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
    """Standard deviation of the churn noise."""
    eta: float = 1.0
    """Share of noise in dpmpp-2m-sde; 0 is dpmpp-2m."""
    predictor: Predictor = "reverse_diffusion"
    """Rule of pc-ve and pc-vp for a step to the next noise level."""
    corrector_steps: int = 1
    """Langevin steps per level of pc-ve and pc-vp. Each image's own norm sets their size, so that a seed gives the same
    image in any batch; that makes the variance too large by 2 / d for d numbers in an image (0.07 % at 32 x 32 x 3)."""
    snr: float = 0.16
    """Signal-to-noise ratio of a Langevin step."""
    rtol: float = 1e-5
    """Relative tolerance of rk45."""
    atol: float = 1e-5
    """Absolute tolerance of rk45."""

    def check(self) -> None:
        """Check that the options fit together, before loading anything.

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
        for name, kind in (("grid", Grid), ("predictor", Predictor)):
            value = getattr(self, name)
            if value is not None and value not in get_args(kind):
                raise ValueError(f"{name}={value!r:.40} is none of {', '.join(get_args(kind))}: pass one of these.")
        for name in dict.fromkeys(name for solver in SOLVERS.values() for name in solver.options):
            value = getattr(self, name)
            if name not in self.solver.options and value != defaults[name]:
                owners = " and ".join(owner for owner, solver in SOLVERS.items() if name in solver.options)
                raise ValueError(
                    f"{name}={option_text(value)} is an option of {owners}, not of {self.sampler}: leave it out, or choose "
                    "that sampler."
                )
        for name, (needed, usual) in _NEEDED.items():
            value = getattr(self, name)
            if name in self.solver.options and getattr(self, needed) == 0 and value != defaults[name]:
                raise ValueError(
                    f"{name}={option_text(value)} does nothing at {needed}=0: pass more, such as {needed}={usual}, or leave "
                    "it out."
                )
        low, high = self.churn_range
        if low > high:
            raise ValueError(f"churn_range={low} {high} holds no noise level: pass the lower one first.")
        if self.rho != defaults["rho"] and self._grid_name != "edm":
            raise ValueError(
                f"rho={self.rho:g} is an option of grid=edm, not of grid={self._grid_name}: leave it out, or choose that "
                "grid."
            )
        if self.rho != defaults["rho"] and self.solver.steps is None:
            raise ValueError(
                f"rho={self.rho:g} does nothing with {self.sampler}, which chooses its steps: leave it out."
            )
        if self.grid == "cosine" and self.solver.steps is None:
            raise ValueError(
                f"grid=cosine does nothing with {self.sampler}, which chooses its steps between the same ends: leave it out."
            )
        if self.solver.steps is None and self.steps is not None:
            instead = " and ".join(f"{name}=..." for name in self.solver.options)
            raise ValueError(f"steps={self.steps}: {self.sampler} chooses its own; set {instead} instead.")
        self.sigmas(None)

    def check_churn(self, process: Process | None) -> None:
        """Check that the churn meets a noise level of the grid, of which a run's process may set the ends.

        Raises:
            ValueError: naming churn_range.
        """
        (low, high), sigmas = self.churn_range, self.sigmas(process)
        if self.churn and not bool(((sigmas >= low) & (sigmas <= high) & (sigmas > 0)).any()):
            raise ValueError(
                f"churn_range={option_text(self.churn_range)} holds none of the grid's noise levels, "
                f"{float(sigmas[-2]):.3g} to {float(sigmas[0]):.3g}, so there is no churn: pass a wider range."
            )

    @property
    def solver(self) -> Solver:
        """The entry in `SOLVERS`."""
        return SOLVERS[self.sampler]

    def solve(self, noise: SampleNoise) -> Solve:
        """The solver with these options and the noise of its steps; call it with the denoiser, x and the grid."""
        return self.solver.solve(self, noise)

    @property
    def steps_taken(self) -> int | None:
        """Steps of the grid; None if the solver chooses them."""
        usual = self.solver.steps
        return usual if self.steps is None or usual is None else self.steps

    @property
    def calls(self) -> int:
        """Calls of the denoiser per batch; a rough number for rk45."""
        steps = self.steps_taken
        return _ADAPTIVE if steps is None else self.solver.calls(self, steps)

    def sigmas(self, process: Process | None = None) -> Tensor:
        """The grid of noise levels; for ve and vp, a model's own process sets the ends.

        Raises:
            ValueError: if the options make no valid grid.
        """
        steps = 2 if self.steps_taken is None else self.steps_taken
        name = self._grid_name
        ends = [("sigma_min", self.sigma_min), ("sigma_max", self.sigma_max)]
        given = {end: value for end, value in ends if value is not None}
        if name == "vp":
            if given:
                name, value = next(iter(given.items()))
                raise ValueError(
                    f"{name}={value:g}: grid=vp takes its ends from its process; leave it out, or choose another grid."
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
    """A value as text, for the command line and for Python."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
