"""The planned training, which decides how much each noise level counts."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from stablefield._shapes import check_callable, check_kind, whole_number
from stablefield.diffusion._noise_levels import LogNormal, LogUniform, NoiseLevels, Uniform
from stablefield.diffusion._preconditioning import (
    EDMPreconditioning,
    FlowPreconditioning,
    Preconditioning,
    VEPreconditioning,
)
from stablefield.diffusion._process import EDM, VE, VP, Process, RectifiedFlow
from stablefield.diffusion._weighting import EDMWeighting, FlowWeighting, SNRWeighting, Weighting

__all__ = ["TRAININGS", "Training"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """The planned training, which decides how much each noise level counts.

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

    @property
    def name(self) -> str:
        """Its name in sentences: EDM, VE, VP, flow."""
        return "flow" if isinstance(self.process, RectifiedFlow) else type(self.process).__name__

    @property
    def noise(self) -> str:
        """Its distribution of noise levels in sentences, such as LogNormal(-1.2, 1.2)."""
        levels = self.noise_levels
        if not isinstance(levels, LogNormal | LogUniform | Uniform):
            return str(levels)
        kind = type(levels).__name__
        first, second = (getattr(levels, field.name) for field in fields(levels) if field.name != "stratified")
        return f"{kind}({first:g}, {second:g})"

    @property
    def preconditioning(self) -> Preconditioning | None:
        """The scalings around the network whose output this loss weights equally at all noise levels; None if unknown.

        The weighting tells them, by weight c_out^2 = 1: those of `EDMPreconditioning` with the same sigma_data for
        `EDMWeighting`, of noise prediction (c_skip = 1) for `SNRWeighting()`, of `FlowPreconditioning` for `FlowWeighting`.
        For any other weighting nothing is known of the network, and the probe takes c_skip = 0: a network that returns x0
        over the root of the weight.
        """
        weighting = self.weighting
        if isinstance(weighting, EDMWeighting):
            return EDMPreconditioning(weighting.sigma_data)
        if isinstance(weighting, FlowWeighting):
            return FlowPreconditioning()
        return VEPreconditioning() if weighting == SNRWeighting() else None

    def same_noise(self, other: "Training") -> bool:
        """Whether both draw noise levels from the same distribution, stratified or not."""
        mine, others = self.levels(64), other.levels(64)
        return mine.shape == others.shape and torch.allclose(mine, others)

    def record(self) -> dict[str, Any]:
        """The training as JSON values."""
        return {
            "process": str(self.process),
            "noise_levels": str(self.noise_levels),
            "weighting": str(self.weighting),
            "batch": self.batch,
        }

    def levels(self, count: int) -> Tensor:
        """Noise levels in the middle of `count` equally probable parts of their distribution, float64, increasing.

        Omits levels of 0 or infinity, at the ends of the time range.
        """
        u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        level = self.process.noise_level(self.noise_levels.quantile(u, self.process))
        return level[(level > 0) & level.isfinite()]


TRAININGS = (
    Training(),
    Training(process=VE(), noise_levels=LogUniform(), weighting=SNRWeighting()),
    Training(process=VP(), noise_levels=Uniform(), weighting=SNRWeighting()),
    Training(process=RectifiedFlow(), noise_levels=Uniform(0.0, 1.0), weighting=FlowWeighting()),
)
"""The usual ones: EDM, VE, VP and rectified flow."""
