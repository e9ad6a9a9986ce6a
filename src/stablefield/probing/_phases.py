r"""The three phases, and the share of a training batch in a noise band.

Low noise: the posterior concentrates on the one sample that made x_t, and its variance is 0. Middle: several samples
compete, and the single-sample target varies. High noise: the posterior is nearly the prior. The edges are at a stated
tolerance $\tau$:

    one sample      V_DSM < tau Tr Cov(x_0)
    prior           D < tau log N           all but a share tau of the information in x_t about x_0 is lost

`stablefield.pick_noise_band` decides where the noise band begins, here as in training: one rule, one number.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield._shapes import check_kind, number
from stablefield.diffusion._noise_levels import NoiseLevels
from stablefield.diffusion._process import Process
from stablefield.probing._series import Series
from stablefield.probing._variance import VarianceCurve

__all__ = ["Edge", "Phases", "find_phases", "share_above"]


@dataclass(frozen=True)
class Edge:
    """A noise level at which a curve crosses a threshold.

    Attributes:
        noise_level: where the mean crosses it.
        low: where the curve two standard errors to one side crosses it; 0 if outside the measured levels.
        high: where the other side crosses it; infinity if outside.
    """

    noise_level: float
    low: float
    high: float


@dataclass(frozen=True)
class Phases:
    """The edges of the three phases.

    Attributes:
        single_below: below this noise level the posterior is on one sample; None if the measured levels do not show it.
        prior_above: above this one the posterior is nearly the prior; None if the measured levels do not show it.
        peak: noise level at which the variance of the score's target, V_DSM alpha^2 / sigma^4, is largest.
        tolerance: tau.
    """

    single_below: Edge | None
    prior_above: Edge | None
    peak: float
    tolerance: float


def find_phases(curve: VarianceCurve, tolerance: float = 0.01) -> Phases:
    """The edges of the three phases at `tolerance`.

    Raises:
        ValueError: if `tolerance` is not between 0 and 1.
    """
    check_kind("curve", curve, VarianceCurve, "what measure_variance returns")
    _check(tolerance)
    return Phases(
        single_below=_edge(curve.noise_level, curve.dsm, tolerance * curve.total, rising=True),
        prior_above=_edge(curve.noise_level, curve.divergence, tolerance * math.log(curve.samples), rising=False),
        peak=float(curve.noise_level[int((curve.dsm.mean * curve.score_factor).argmax())]),
        tolerance=tolerance,
    )


def share_above(level: float, noise_levels: NoiseLevels, process: Process) -> float:
    """Share of training rows with a noise level of at least `level`: the share of a batch in a band.

    Raises:
        ValueError: if `level` is negative or NaN.
    """
    number("level", level)
    check_kind("noise_levels", noise_levels, NoiseLevels, "a distribution of noise levels, such as LogNormal()")
    check_kind("process", process, Process, "a Process, such as EDM()")
    if not level >= 0:
        raise ValueError(f"level is {level}: pass a noise level sigma / alpha, 0 or more.")
    # The noise level is an increasing function of the quantile, so bisection inverts it for any distribution.
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        u = torch.tensor(middle, dtype=torch.float64)
        if float(process.noise_level(noise_levels.quantile(u, process))) < level:
            low = middle
        else:
            high = middle
    return 1 - high if high > 2**-49 else 1.0


def _edge(level: Tensor, series: Series, threshold: float, *, rising: bool) -> Edge | None:
    middle = _crossing(level, series.mean, threshold, rising)
    if middle is None:
        return None
    spread = 2 * series.error.nan_to_num(0)
    ends = [_crossing(level, series.mean + sign * spread, threshold, rising) for sign in (1, -1)]
    early, late = ends if rising else ends[::-1]
    return Edge(middle, early if early is not None else 0.0, late if late is not None else math.inf)


def _crossing(level: Tensor, value: Tensor, threshold: float, rising: bool) -> float | None:
    """Where `value` first rises to the threshold, or last falls below it; None if it does not."""
    beyond: Callable[[Tensor], Tensor] = (lambda v: v >= threshold) if rising else (lambda v: v < threshold)
    if rising:
        places = beyond(value).nonzero()[:, 0]
        right = int(places[0]) if len(places) else 0
    else:
        places = (~beyond(value)).nonzero()[:, 0]
        right = int(places[-1]) + 1 if len(places) else 0
    if not 0 < right < len(level):
        return None
    # Linear on logarithmic axes; the clamp gives a value of 0 a logarithm.
    a, b = (max(float(v), 1e-6 * threshold) for v in value[right - 1 : right + 1])
    part = math.log(threshold / a) / math.log(b / a)
    return float(torch.lerp(level[right - 1].log(), level[right].log(), part).exp())


def _check(tolerance: float) -> None:
    number("tolerance", tolerance)
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}: pass a share, between 0 and 1.")
