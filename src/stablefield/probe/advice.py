r"""How many references: what each size leaves of the variance in training, and what it costs.

A training row at noise level s counts with the loss weight w(s). So what a size n leaves of the targets' variance, as
training sees it, is

$$ \frac{E_s[w(s) V_{STF}(n, s)]}{E_s[w(s) V_{DSM}(s)]} $$

over the distribution of the noise levels. Only rows in the noise band cost anything: two matrix products of
2 (rows) n d flops each.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from stablefield.diffusion.noise_levels import LogNormal, NoiseLevels
from stablefield.diffusion.process import EDM, Process
from stablefield.diffusion.weighting import EDMWeighting, Weighting
from stablefield.probe.phases import Edge, find_band, share_above
from stablefield.probe.series import interpolate
from stablefield.probe.variance import VarianceCurve
from stablefield.shapes import check_callable, check_kind, number, whole_number

__all__ = ["Advice", "SizeAdvice", "Training", "advise"]

# Points of the quadrature over the distribution of noise levels.
_POINTS = 4096


@dataclass(frozen=True, kw_only=True)
class Training:
    """How somebody means to train: what decides which noise levels count.

    Raises:
        ValueError: if the batch is below 1.
    """

    process: Process = field(default_factory=EDM)
    noise_levels: NoiseLevels = field(default_factory=LogNormal)
    weighting: Weighting = field(default_factory=EDMWeighting)
    batch: int = 512
    """Rows per step."""

    def __post_init__(self) -> None:
        check_kind("process", self.process, Process, "a Process, such as EDM()")
        check_kind(
            "noise_levels", self.noise_levels, NoiseLevels, "a distribution of noise levels, such as LogNormal()"
        )
        check_callable("weighting", self.weighting, "weighting(noise_level), such as EDMWeighting()")
        whole_number("batch", self.batch)
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}: it must be at least 1.")

    def levels(self, count: int) -> Tensor:
        """Noise levels in the middle of `count` equally probable parts of their distribution, float64, increasing.

        Those that are 0 or infinite, at the ends of a clock, are left out.
        """
        u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        level = self.process.noise_level(self.noise_levels.quantile(u, self.process))
        return level[(level > 0) & level.isfinite()]


@dataclass(frozen=True, kw_only=True)
class SizeAdvice:
    """What a reference set of one size does.

    Attributes:
        size: n.
        left: share of the targets' variance that stays, weighted as training weighs it.
        error: a bound on its standard error (that of each level, added up).
        flops: of the target per training step.
        seconds: the same on this machine, at the speed that the probe ran at.
    """

    size: int
    left: float
    error: float
    flops: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What the measurement means for a training run.

    Attributes:
        band: where the useful noise band begins; None if it begins below the lowest level measured.
        share: share of a batch that falls in the band.
        sizes: every size measured, and the whole population, in order.
        recommended: the one to take.
        aim: share of the variance that may stay.
    """

    band: Edge | None
    share: float
    sizes: tuple[SizeAdvice, ...]
    recommended: SizeAdvice
    aim: float


def advise(curve: VarianceCurve, training: Training, *, aim: float = 0.1, tolerance: float = 0.001) -> Advice:
    """The smallest reference set that leaves at most `aim` of the variance.

    Args:
        curve: the measurement.
        training: which noise levels count, and how much.
        aim: share of the variance that may stay, between 0 and 1.
        tolerance: of the noise band, see `find_band`.

    Raises:
        ValueError: if `aim` or `tolerance` is not between 0 and 1.
    """
    check_kind("curve", curve, VarianceCurve, "what measure_variance returns")
    check_kind("training", training, Training, "a Training, such as Training()")
    number("aim", aim)
    if not 0 < aim < 1:
        raise ValueError(f"aim is {aim}: it is the share of the variance that may stay, between 0 and 1.")
    band = find_band(curve, tolerance)
    share = 1.0 if band is None else share_above(band.noise_level, training.noise_levels, training.process)
    level = training.levels(_POINTS)
    weight = training.weighting(level).double()
    whole = float((weight * interpolate(level, curve.noise_level, curve.dsm.mean)).sum())
    sizes: list[SizeAdvice] = []
    for size in (*curve.stf, curve.samples):
        left = error = 0.0
        if size in curve.stf and whole > 0:
            stf = curve.stf[size]
            left = float((weight * interpolate(level, curve.noise_level, stf.mean)).sum()) / whole
            error = float((weight * interpolate(level, curve.noise_level, stf.error.nan_to_num(0))).sum()) / whole
        pairs = training.batch * share * size
        seconds = pairs * curve.seconds_per_pair
        sizes.append(SizeAdvice(size=size, left=left, error=error, flops=4 * pairs * curve.dim, seconds=seconds))
    recommended = next(entry for entry in sizes if entry.left <= aim)
    return Advice(band=band, share=share, sizes=tuple(sizes), recommended=recommended, aim=aim)
