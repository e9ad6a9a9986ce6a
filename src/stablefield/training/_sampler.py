"""How images are drawn from a run: the solver, its grid of noise levels, guidance and classes.

`SOLVERS` is the table of solvers; a new one is a line there, and has its own module in `stablefield.sampling`.
`SamplerOptions` says how; `SamplerOptions.open` loads a run's model and returns the `RunSampler` that draws images of seeds.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from stablefield import sampling
from stablefield._distributed import Ranks
from stablefield.data._image_set import class_text
from stablefield.diffusion._process import VE, VP, Process
from stablefield.sampling._noise import SampleNoise
from stablefield.sampling._samples import Chunk, Drawing, Solve, chunks_of
from stablefield.sampling._solver_loop import Denoise
from stablefield.training._model import OpenModel, open_model
from stablefield.training._run_folder import RunConfig

__all__ = ["SOLVERS", "RunSampler", "SamplerName", "SamplerOptions", "Solver"]

Grid = Literal["edm", "ve", "vp", "cosine"]

# Classes that an error lists.
_LISTED = 20
# Network evaluations that rk45 takes at its usual tolerances, about.
_ADAPTIVE = 150


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A solver, and what of `SamplerOptions` goes with it."""

    solve: Callable[["SamplerOptions", Tensor, Denoise, Tensor, SampleNoise], Tensor]
    """From the options, the grid of noise levels (steps + 1,), the denoiser, x at the first level (B, ...) and the noise of
    each step to the samples (B, ...)."""
    options: tuple[str, ...] = ()
    """Fields of `SamplerOptions` that are for this solver; given to another one they would go unnoticed."""
    steps: int | None = 18
    """Steps by default; None where the solver chooses them."""
    calls: Callable[["SamplerOptions", int], int] = lambda _, steps: steps
    """Evaluations of the denoiser in so many steps."""
    grid: Grid = "edm"
    """Its grid by default."""
    coupled: bool = False
    """Whether rows of a batch influence each other."""


def _heun(options: "SamplerOptions", sigmas: Tensor, denoise: Denoise, x: Tensor, noise: SampleNoise) -> Tensor:
    low, high = options.churn_range
    churn, scale = options.churn, options.churn_noise
    return sampling.heun(denoise, x, sigmas, s_churn=churn, s_min=low, s_max=high, s_noise=scale, noise=noise)


def _corrected(
    process: Literal["ve", "vp"],
    options: "SamplerOptions",
    sigmas: Tensor,
    denoise: Denoise,
    x: Tensor,
    noise: SampleNoise,
) -> Tensor:
    return sampling.predictor_corrector(
        denoise,
        x,
        sigmas,
        process=process,
        predictor=options.predictor,
        corrector_steps=options.corrector_steps,
        snr=options.snr,
        # A seed is one image, whatever the batch that it is drawn in.
        average_norms=False,
        noise=noise,
    )


def _corrector(process: Literal["ve", "vp"]) -> Solver:
    return Solver(
        solve=partial(_corrected, process),
        options=("predictor", "corrector_steps", "snr"),
        steps=1000,
        calls=lambda options, steps: steps * (1 + options.corrector_steps),
        grid=process,
    )


SOLVERS: Mapping[str, Solver] = {
    "heun": Solver(solve=_heun, options=("churn", "churn_range", "churn_noise"), calls=lambda _, steps: 2 * steps - 1),
    "euler": Solver(solve=lambda _, sigmas, denoise, x, __: sampling.euler(denoise, x, sigmas)),
    "dpmpp-2m": Solver(solve=lambda _, sigmas, denoise, x, __: sampling.dpmpp_2m(denoise, x, sigmas)),
    "dpmpp-2m-sde": Solver(
        solve=lambda options, sigmas, denoise, x, noise: sampling.dpmpp_2m_sde(
            denoise, x, sigmas, eta=options.eta, noise=noise
        ),
        options=("eta",),
    ),
    "euler-maruyama": Solver(
        solve=lambda _, sigmas, denoise, x, noise: sampling.euler_maruyama(denoise, x, sigmas, noise=noise), steps=1000
    ),
    "ancestral": Solver(solve=lambda _, sigmas, denoise, x, noise: sampling.ancestral(denoise, x, sigmas, noise=noise)),
    "pc-ve": _corrector("ve"),
    "pc-vp": _corrector("vp"),
    "rk45": Solver(
        solve=lambda options, sigmas, denoise, x, _: sampling.rk45(
            denoise, x, sigmas, rtol=options.rtol, atol=options.atol
        ),
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
class SamplerOptions:
    """How to draw images from a run."""

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
    class_label: str = ""
    """Class of all images of a conditional run: its name, or its number if no class is called that; -1 for none. By
    default seed k is of class k modulo their number."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance, or of guidance by a worse run (guide); 1 for none."""
    guidance_interval: tuple[float, float] | None = None
    """Noise levels to guide in, such as 0.19 1.61; all by default."""
    guide: Path | None = None
    """A worse run of the same data, smaller or less trained, to guide by (autoguidance)."""
    ema: str = "half-life"
    """Which average of the weights: half-life, none for those of the last step, or another that the run has."""
    guide_ema: str = "half-life"
    """The same of the guide."""
    batch: int = 256
    """Images at a time. It changes no image but for the network's rounding."""

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
            if name not in self._solver.options and value != defaults[name]:
                owners = " and ".join(owner for owner, solver in SOLVERS.items() if name in solver.options)
                raise ValueError(
                    f"{name}={_text(value)} is an option of {owners}, not of {self.sampler}: leave it out, or choose that "
                    "sampler."
                )
        if self._solver.steps is None and self.steps is not None:
            instead = " and ".join(f"{name}=..." for name in self._solver.options)
            raise ValueError(f"steps={self.steps}: {self.sampler} chooses its own; set {instead} instead.")
        if self.batch < 1:
            raise ValueError(f"batch={self.batch}: it must be at least 1.")
        for name in ("guide", "guidance_interval"):
            value = getattr(self, name)
            if value is not None and self.guidance_scale == 1:
                raise ValueError(
                    f"{name}={_text(value)} does nothing at guidance_scale=1: pass a scale, such as guidance_scale=2."
                )
        self.sigmas(None)

    @property
    def coupled(self) -> bool:
        """Whether rows of a batch influence each other."""
        return self._solver.coupled

    @property
    def steps_taken(self) -> int | None:
        """Steps of the grid; None where the solver chooses."""
        usual = self._solver.steps
        return usual if self.steps is None or usual is None else self.steps

    @property
    def calls(self) -> int:
        """Calls of what is guided, or of the network, for a sample, about: rk45 chooses its own."""
        steps = self.steps_taken
        return _ADAPTIVE if steps is None else self._solver.calls(self, steps)

    def sigmas(self, process: Process | None) -> Tensor:
        """The grid of noise levels, on which a run's own process gives ve and vp their ends.

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
            return sampling.vp_sigmas(steps, beta_min=vp.beta_min, beta_max=vp.beta_max)
        if name == "ve":
            ve = process if isinstance(process, VE) else VE()
            low, high = given.get("sigma_min", ve.sigma_min), given.get("sigma_max", ve.sigma_max)
            return sampling.ve_sigmas(steps, sigma_min=low, sigma_max=high)
        low, high = given.get("sigma_min", 0.002), given.get("sigma_max", 80.0)
        if name == "cosine":
            return sampling.cosine_sigmas(steps, sigma_min=low, sigma_max=high)
        return sampling.edm_sigmas(steps, sigma_min=low, sigma_max=high, rho=self.rho)

    def open(self, run: str | Path, device: torch.device | str = "cpu") -> "RunSampler":
        """Open a run's model, and the guide's.

        Args:
            run: the run's folder.
            device: where to compute.

        Raises:
            ValueError: if there is no such run or EMA, or the options do not fit the run.
        """
        self.check()
        device = torch.device(device)
        own = open_model(Path(run), self.ema, device)
        guide = None if self.guide is None else open_model(self.guide, self.guide_ema, device)
        classes = own.config.classes
        number = self.class_number(own.config)
        if self.guidance_scale != 1 and guide is None and (classes == 0 or number == -1):
            raise ValueError(
                f"guidance_scale={self.guidance_scale:g}: classifier-free guidance takes a run with classes, and images of "
                "one; guide by a worse run with guide=RUN."
            )
        if guide is not None and (guide.config.shape != own.config.shape or guide.config.classes != classes):
            raise ValueError(
                f"guide={self.guide} draws {'x'.join(map(str, guide.config.shape))} images of {guide.config.classes} "
                f"classes, the run {'x'.join(map(str, own.config.shape))} of {classes}: take a run of the same data."
            )
        other = None if guide is None else guide.config.class_names
        if other is not None and own.config.class_names is not None and other != own.config.class_names:
            raise ValueError(
                f"guide={self.guide} numbers its classes otherwise, {_listed(classes, other)}, than the run, "
                f"{_listed(classes, own.config.class_names)}: take a run of the same data and version."
            )
        return RunSampler(options=self, model=own, guide=guide, device=device)

    def class_number(self, config: RunConfig) -> int | None:
        """The number of the class of all images, -1 for none; None if seeds are of classes in turn.

        Raises:
            ValueError: if the run has no such class, with those that it has.
        """
        wanted, classes, names = self.class_label, config.classes, config.class_names or ()
        if not wanted:
            return None
        if classes == 0:
            raise ValueError(f"class_label={wanted}: the run has no classes; leave it out.")
        if wanted in names:
            return names.index(wanted)
        if wanted == "-1" or (re.fullmatch("[0-9]{1,9}", wanted) and int(wanted) < classes):
            return int(wanted)
        near = [] if wanted.isdecimal() else get_close_matches(wanted, names, 1)
        raise ValueError(
            f"class_label={wanted}: the run knows classes {_listed(classes, names)}, or -1 for none."
            + (f" Did you mean {near[0]}?" if near else "")
        )

    def labels(self, seeds: Tensor, config: RunConfig) -> Tensor | None:
        """Classes of the images of seeds (B,), or None for a run without classes."""
        if config.classes == 0:
            return None
        number = self.class_number(config)
        return seeds % config.classes if number is None else torch.full_like(seeds, number)

    def describe_classes(self, config: RunConfig) -> str | None:
        """Which classes the images are of, in words; None for a run without classes."""
        if config.classes == 0:
            return None
        number = self.class_number(config)
        return (
            f"classes 0 to {config.classes - 1} in turn: seed k is of class k modulo {config.classes}"
            if number is None
            else "no class"
            if number == -1
            else f"class {class_text(number, config.class_names)}"
        )

    def describe(self, config: RunConfig) -> str:
        """The sampler with all that decides what it draws from a run, for the protocol."""
        sigmas = self.sigmas(config.recipe.process)
        parts = [f"{self._grid_name} grid {float(sigmas[0]):.6g} to {float(sigmas[-2]):.6g}"]
        if self._grid_name == "edm" and self.steps_taken is not None:
            parts[0] += f", rho {self.rho:g}"
        for name in self._solver.options:
            if not (name.startswith("churn") and self.churn == 0):
                value = getattr(self, name)
                text = " to ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)
                parts.append(f"{name.replace('_', ' ')} {text}")
        classes = self.describe_classes(config)
        if classes is not None:
            parts.append(classes)
        if self.guidance_scale != 1:
            kind = (
                "classifier-free guidance"
                if self.guide is None
                else f"autoguidance by {self.guide.name} (EMA {self.guide_ema})"
            )
            inside = (
                ""
                if self.guidance_interval is None
                else f" in {self.guidance_interval[0]:g} to {self.guidance_interval[1]:g}"
            )
            parts.append(f"{kind} {self.guidance_scale:g}{inside}")
        return f"{self.sampler} ({'; '.join(parts)})"

    @property
    def _grid_name(self) -> Grid:
        return self.grid or self._solver.grid

    @property
    def _solver(self) -> Solver:
        return SOLVERS[self.sampler]

    def solver(self, sigmas: Tensor) -> Solve:
        """The sampler on a grid, with its options."""
        return partial(self._solver.solve, self, sigmas)


@dataclass(frozen=True, kw_only=True)
class RunSampler:
    """A run's model with a solver: draws images of seeds, as `RunSamples` and `Run.sample` ask for them.

    Attributes:
        options: how to draw.
        model: the run's model.
        guide: the worse model that guides it, if there is one.
        device: where both are.
    """

    options: SamplerOptions
    model: OpenModel
    guide: OpenModel | None
    device: torch.device

    @property
    def config(self) -> RunConfig:
        """Of the run."""
        return self.model.config

    @property
    def ema(self) -> str:
        """Which average of the weights, of which step, for the protocol."""
        return f"{self.model.ema}, step {self.model.step}"

    @property
    def batch(self) -> int:
        """Images at a time."""
        return self.options.batch

    @property
    def coupled(self) -> bool:
        """Whether rows of a batch influence each other."""
        return self.options.coupled

    @property
    def steps(self) -> int | None:
        """Steps of the solver; None where it chooses them itself."""
        return self.options.steps_taken

    @property
    def calls(self) -> int:
        """Calls of the network for a batch, about."""
        return self.options.calls

    @property
    def description(self) -> str:
        """The solver with all that decides what it draws, for the protocol."""
        return self.options.describe(self.config)

    def labels(self, seeds: Tensor) -> Tensor | None:
        """Classes of the images of seeds (B,), or None for a run without classes."""
        return self.options.labels(seeds, self.config)

    def drawing(self, progress: Callable[[float], object] | None = None) -> Drawing:
        """What draws the images.

        Args:
            progress: called before every evaluation with the share of the chunk that is done.
        """
        options = self.options
        sigmas = options.sigmas(self.config.recipe.process)
        denoiser, guide = self.model.denoiser, None if self.guide is None else self.guide.denoiser
        scale, interval = options.guidance_scale, options.guidance_interval

        def denoiser_of(seeds: Tensor) -> Denoise:
            labels = self.labels(seeds)
            if scale != 1 and guide is not None:
                return sampling.autoguidance(denoiser, guide, scale, interval, class_labels=labels)
            if labels is None:
                return denoiser
            if scale != 1:
                return sampling.classifier_free(denoiser, labels, scale, interval)
            return lambda x, sigma: denoiser(x, sigma, labels)

        return Drawing(
            denoiser_of,
            options.solver(sigmas),
            shape=self.config.shape,
            sigma_max=float(sigmas[0]),
            device=self.device,
            progress=None if progress is None else lambda sigma: progress(_share_done(sigmas, sigma)),
        )

    def draw(
        self, seeds: Sequence[int], ranks: Ranks, progress: Callable[[float, int], object] | None = None
    ) -> Iterator[tuple[Chunk, Tensor, int]]:
        """This process's part of the images of seeds, batch by batch.

        Args:
            seeds: of all ranks.
            ranks: the processes that share them.
            progress: called before every evaluation with how many images this process has drawn, and how many it will.

        Yields:
            The batch, the images of its wanted seeds, uint8 (B, C, H, W) on the CPU, and the network evaluations it took.
        """
        chunks = ranks.share(chunks_of(seeds, self.batch, coupled=self.coupled))
        total = sum(len(chunk.places) for chunk in chunks)
        done = size = 0

        def report(share: float) -> None:
            if progress is not None:
                progress(done + share * size, total)

        drawing = self.drawing(report)
        for chunk in chunks:
            size, before = len(chunk.places), drawing.evaluations
            images = drawing(chunk)
            done += size
            yield chunk, images, drawing.evaluations - before


def _text(value: object) -> str:
    """A value as it stands on a command line and in Python alike."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _listed(classes: int, names: Sequence[str]) -> str:
    """The classes of a run: all where they have names and are few, else the first and the last."""
    if classes <= _LISTED and any(name != str(number) for number, name in enumerate(names)):
        return ", ".join(class_text(number, names) for number in range(classes))
    return f"{class_text(0, names)} to {class_text(classes - 1, names)}"


def _share_done(sigmas: Tensor, sigma: float) -> float:
    """Which share of the grid lies above a noise level; of the two ends of an adaptive solver, in ln sigma."""
    levels = -np.log(sigmas[:-1].numpy())
    place = float(np.interp(-math.log(sigma), levels, np.arange(len(levels)))) if sigma > 0 else len(levels)
    return min(1.0, place / len(levels)) if len(levels) > 2 else min(1.0, place)
