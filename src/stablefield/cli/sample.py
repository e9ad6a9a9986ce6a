"""`stablefield sample RUN`: draw images from a trained run."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from torch import Tensor

from stablefield import sampling
from stablefield.cli.console import console, relative
from stablefield.cli.train import pick_device
from stablefield.data.png import tile, write_png
from stablefield.sampling.noise import SampleNoise
from stablefield.training.model import draw, open_model

__all__ = ["Sample"]

Sampler = Literal["heun", "euler", "dpmpp-2m", "ancestral"]


@dataclass(frozen=True)
class Sample:
    """Draw images from a run: a grid as one PNG file, or a folder of them."""

    run_folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    seeds: str = "0-63"
    """Which images: numbers and ranges, such as 0-63 or 1,5,8-12. Image k is the same in every call."""
    sampler: Sampler = "heun"
    """The solver."""
    steps: int = 18
    """Steps of the solver; Heun evaluates the network 2 steps - 1 times."""
    sigma_min: float = 0.002
    """Last noise level before 0."""
    sigma_max: float = 80.0
    """First noise level."""
    out: Path | None = None
    """A file name ending in .png for a grid, or a folder for one file per image; RUN/samples/SAMPLER.png if not given."""
    batch: int = 256
    """Images at a time."""
    ema: str = "half-life"
    """Which weights: half-life, none (those of the last step), or the length of an average made of snapshots: 0.1."""
    device: str = ""
    """Where to compute; a GPU if there is one."""

    def run(self) -> int:
        """Draw, write, and say how many network evaluations it took."""
        seeds = _seeds(self.seeds)
        if self.batch < 1:
            raise ValueError(f"--batch is {self.batch}: it must be at least 1.")
        sigmas = sampling.edm_sigmas(self.steps, sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        device = pick_device(self.device)
        opened = open_model(self.run_folder, self.ema, device)
        config = opened.config
        out = self.out or self.run_folder / "samples" / f"{self.sampler}-{self.steps}.png"
        as_grid = out.suffix.lower() == ".png"
        _check_writable(out, as_grid)
        denoiser = sampling.counted(opened.denoiser)
        solve = _solver(self.sampler, denoiser, sigmas)
        began = time.perf_counter()
        parts = [seeds[start : start + self.batch] for start in range(0, len(seeds), self.batch)]
        images = [draw(solve, config.shape, part, float(sigmas[0]), device) for part in parts]
        seconds = time.perf_counter() - began
        every = np.concatenate(images)
        if as_grid:
            write_png(out, tile(every))
        else:
            for seed, image in zip(seeds, every, strict=True):
                write_png(out / f"{seed:06d}.png", image.transpose(1, 2, 0))
        console.print(
            f"{len(seeds)} images of step {opened.step:,}, {self.sampler}, {denoiser.nfe // len(parts)} network "
            f"evaluations each (NFE), {seconds:.1f} s"
        )
        console.print(f"written: {relative(out)}")
        return 0


def _solver(name: Sampler, denoiser: Callable[..., Tensor], sigmas: Tensor) -> Callable[[Tensor, SampleNoise], Tensor]:
    solvers: dict[Sampler, Callable[[Tensor, SampleNoise], Tensor]] = {
        "heun": lambda x, _: sampling.heun(denoiser, x, sigmas),
        "euler": lambda x, _: sampling.euler(denoiser, x, sigmas),
        "dpmpp-2m": lambda x, _: sampling.dpmpp_2m(denoiser, x, sigmas),
        "ancestral": lambda x, noise: sampling.ancestral(denoiser, x, sigmas, noise=noise),
    }
    return solvers[name]


def _seeds(text: str) -> list[int]:
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            start, stop = int(first), int(last if dash else first)
        except ValueError:
            raise ValueError(f"--seeds {text}: write numbers and ranges, such as 0-63 or 1,5,8-12.") from None
        if stop < start:
            raise ValueError(f"--seeds {text}: the range {part.strip()} ends before it begins.")
        if stop - start + len(seeds) >= 1_000_000:
            raise ValueError(f"--seeds {text}: that is over a million images; draw them in several calls.")
        seeds.extend(range(start, stop + 1))
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {text}: a seed is named twice.")
    return seeds


def _check_writable(out: Path, as_grid: bool) -> None:
    """Find out before the sampling, not after it."""
    folder = out.parent if as_grid else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".stablefield-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error.strerror}): name another place.") from error
    if as_grid and out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file, or a folder without .png in its name.")
