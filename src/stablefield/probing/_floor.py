r"""The floor of a training loss: the part that remains with a perfect network.

At noise level s a network D has, in expectation over the batch,

$$ w(s) \tfrac1d E|D - \hat x_0|^2 = w(s) \tfrac1d \left( E|D - \mu|^2 + V(s) \right), $$

with $\mu$ the exact posterior mean and V the variance of the target: V_DSM for the single sample, V_STF(n) with n
references, 0 with the whole data set. The second part is the floor. "Loss minus floor" shows how far the network is from the
optimum, which the loss alone hides: at high noise most of it is floor.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stablefield._shapes import check_callable, check_kind, whole_number
from stablefield.diffusion._weighting import EDMWeighting, Weighting
from stablefield.probing._advice import Training
from stablefield.probing._series import interpolate
from stablefield.probing._variance import VarianceCurve

__all__ = ["LoggedExcess", "LossFloor", "logged_excess"]

# Noise levels that represent the training distribution.
_POINTS = 16_384


@dataclass(frozen=True, kw_only=True)
class LossFloor:
    """The floor against the noise level.

    Attributes:
        noise_level: levels at which it is known, increasing, shape (L,).
        variance: variance of the target at these levels, in squared units of the data, shape (L,).
        dim: numbers per sample, d.
        weighting: the weight of the loss.
    """

    noise_level: Tensor
    variance: Tensor
    dim: int
    weighting: Weighting = field(default_factory=EDMWeighting)

    @classmethod
    def of(cls, curve: VarianceCurve, weighting: Weighting, size: int = 1) -> "LossFloor":
        """The floor for targets over `size` references: 1 for the single sample, the population's size for all of it.

        Raises:
            ValueError: if the size was not measured.
        """
        check_kind("curve", curve, VarianceCurve, "what measure_variance returns")
        check_callable("weighting", weighting, "weighting(noise_level), such as EDMWeighting()")
        whole_number("size", size)
        if size == 1:
            variance = curve.dsm.mean
        elif size >= curve.samples:
            variance = torch.zeros_like(curve.dsm.mean)
        elif size in curve.stf:
            variance = curve.stf[size].mean
        else:
            known = ", ".join(map(str, (1, *curve.stf, curve.samples)))
            raise ValueError(f"size is {size}, which was not measured: pass one of {known}.")
        return cls(noise_level=curve.noise_level, variance=variance, dim=curve.dim, weighting=weighting)

    def __call__(self, noise_level: Tensor) -> Tensor:
        """w(s) V(s) / d at `noise_level`, any shape, float64; see `interpolate` for levels beyond those measured.

        It is 0 where the variance is, also at a noise level of 0 with a weight that is infinite there.
        """
        level = noise_level.double()
        variance = interpolate(level, self.noise_level, self.variance)
        return torch.where(variance == 0, 0, self.weighting(level) * variance) / self.dim

    def bins(self, edges: Sequence[float], training: Training) -> Tensor:
        """Mean floor of the training rows in each bin of a trainer's log, shape (len(edges) + 1,), float64.

        Args:
            edges: noise levels between the bins, increasing; the outer bins are open.
            training: gives the process and the distribution of the noise levels.

        Returns:
            The means; nan for bins without rows.
        """
        level = training.levels(_POINTS)
        place = torch.bucketize(level, torch.as_tensor(edges, dtype=torch.float64), right=True)
        total = torch.zeros(len(edges) + 1, dtype=torch.float64).index_add_(0, place, self(level))
        return total / torch.bincount(place, minlength=len(edges) + 1)

    def excess(self, loss: Tensor, noise_level: Tensor) -> Tensor:
        """Loss minus floor: `loss` at `noise_level`, of one shape, as a trainer logs them. Noise may take it below 0."""
        return loss.double() - self(noise_level)


@dataclass(frozen=True, kw_only=True)
class LoggedExcess:
    """The distance to the optimum, from a line of a trainer's log.

    Attributes:
        step: steps done.
        edges: noise levels between the bins; the outer bins are open.
        excess: loss minus floor of each bin; None for bins without rows. Noise may take it below 0.
    """

    step: int
    edges: tuple[float, ...]
    excess: tuple[float | None, ...]

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {"step": self.step, "bin_edges": list(self.edges), "bin_excess": list(self.excess)}


def logged_excess(entries: Sequence[Mapping[str, Any]], floor: LossFloor, training: Training) -> list[LoggedExcess]:
    """Loss minus floor per bin of noise levels, from the lines of a run's metrics.jsonl.

    The logged loss and the logged variance removed add up to the loss with the single-sample target, whatever the references
    were, so one floor serves all runs.

    Args:
        entries: lines of the log; those without bins are skipped.
        floor: that of the single-sample target.
        training: how the run draws noise levels.
    """
    floors: dict[tuple[float, ...], list[float]] = {}
    found: list[LoggedExcess] = []
    for entry in entries:
        if "bin_edges" not in entry or "bin_loss" not in entry:
            continue
        edges = tuple(float(edge) for edge in entry["bin_edges"])
        if edges not in floors:
            floors[edges] = floor.bins(edges, training).tolist()
        removed = entry.get("bin_variance_removed") or [0.0] * len(entry["bin_loss"])
        excess = tuple(
            None if loss is None or math.isnan(least) else loss + (taken or 0.0) - least
            for loss, taken, least in zip(entry["bin_loss"], removed, floors[edges], strict=True)
        )
        found.append(LoggedExcess(step=int(entry["step"]), edges=edges, excess=excess))
    return found
