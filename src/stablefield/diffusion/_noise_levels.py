"""Distributions of training noise: which noise levels a network sees, and how often.

EDM's is `LogNormal`, ln(sigma) ~ N(P_mean, P_std^2); `LogUniform` is that of VE, `Uniform` that of VP and of flows.

A distribution is its quantile function, which maps uniform numbers to times of a process. So all of them draw in the same
way, stratified or not, and a batch's times depend only on the generator.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from stablefield._shapes import (
    as_device,
    check_generator,
    check_kind,
    check_numbers,
    check_tensor,
    drawn_by,
    flag,
    whole_number,
)
from stablefield.diffusion._process import Process

__all__ = ["LogNormal", "LogUniform", "NoiseLevels", "Uniform", "times_at", "uniform_numbers"]


@dataclass(frozen=True)
class NoiseLevels(ABC):
    """A distribution of noise over training rows.

    State your own by its `quantile`:

        @dataclass(frozen=True)
        class Squared(sf.NoiseLevels):
            def quantile(self, u, process):
                return u**2  # times in [0, 1], most of them near the data

    Args:
        stratified: draw one row from each of B equally probable parts of the distribution, in random order. This keeps each
            row's distribution, but the batch covers it evenly, which lowers the variance of the loss.
    """

    _: KW_ONLY
    stratified: bool = False

    def __post_init__(self) -> None:
        flag("stratified", self.stratified)

    @abstractmethod
    def quantile(self, u: Tensor, process: Process) -> Tensor:
        """Times of `process` at the probabilities `u` in (0, 1), of the shape of `u`; the noise grows with `u`."""

    def sample(
        self,
        process: Process,
        batch: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw the times of a batch, shape (`batch`,), float32, on `device`.

        Raises:
            TypeError: if an argument is of another type.
            ValueError: if `batch` is negative, or there is no such device.
        """
        _check_process(process)
        device = None if device is None else as_device("device", device)
        u = uniform_numbers(self, batch, generator)
        return times_at(self, u, process).to(device or u.device)


@dataclass(frozen=True)
class LogNormal(NoiseLevels):
    """ln(sigma / alpha) ~ N(mean, std^2): EDM's distribution, N(P_mean, P_std^2) there.

    Args:
        mean: of ln(sigma / alpha), EDM's P_mean.
        std: its standard deviation, EDM's P_std.

    References:
        Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022,
        table 1 and section 5. With std 1, mean 0 and a rectified flow it is the logit-normal distribution of Esser et al.,
        "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", ICML 2024, equation 19.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "mean", "std")
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ValueError(f"LogNormal(mean={self.mean}, std={self.std}): mean must be finite and std positive.")

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        check_tensor("u", u, real=True)
        _check_process(process)
        return process.time(torch.exp(self.mean + self.std * torch.special.ndtri(u)))


@dataclass(frozen=True)
class LogUniform(NoiseLevels):
    """ln(sigma / alpha) uniform between ln(minimum) and ln(maximum): the VE schedule.

    Args:
        minimum: lowest noise level sigma / alpha.
        maximum: highest noise level.

    References:
        Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021, appendix C.
    """

    minimum: float = 0.02
    maximum: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "minimum", "maximum")
        if not 0 < self.minimum < self.maximum < math.inf:
            raise ValueError(
                f"LogUniform(minimum={self.minimum}, maximum={self.maximum}): 0 < minimum < maximum must hold."
            )

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        check_tensor("u", u, real=True)
        _check_process(process)
        return process.time(self.minimum * torch.exp(u * math.log(self.maximum / self.minimum)))


@dataclass(frozen=True)
class Uniform(NoiseLevels):
    """Time uniform between `start` and `end`: VP from 1e-5 to 1, flow matching from 0 to 1.

    Args:
        start: earliest time.
        end: latest time.

    References:
        Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021, appendix C
        (the start 1e-5); Lipman et al., "Flow Matching for Generative Modeling", ICLR 2023, equation 6.
    """

    start: float = 1e-5
    end: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "start", "end")
        if not 0 <= self.start < self.end < math.inf:
            raise ValueError(f"Uniform(start={self.start}, end={self.end}): 0 <= start < end must hold.")

    def quantile(self, u: Tensor, process: Process) -> Tensor:  # noqa: ARG002
        check_tensor("u", u, real=True)
        return self.start + u * (self.end - self.start)


def uniform_numbers(levels: NoiseLevels, batch: int, generator: torch.Generator | None) -> Tensor:
    """Draw `batch` numbers uniform in (0, 1), stratified if the levels are, on the generator's device."""
    batch = whole_number("batch", batch, 0)
    check_generator("generator", generator)
    source = torch.device("cpu") if generator is None else generator.device
    # float64: a float32 uniform is exactly 0 once in 17 million rows, for a noise level of 0 or infinity.
    wide = torch.float32 if source.type == "mps" else torch.float64
    u = torch.rand(batch, **drawn_by(generator), dtype=wide, device=source)
    if levels.stratified:
        u = (torch.randperm(batch, **drawn_by(generator), device=source) + u) / batch
    return u


def times_at(levels: NoiseLevels, u: Tensor, process: Process) -> Tensor:
    """Times at the probabilities `u` in [0, 1], float32; none of them has no noise or no signal."""
    tiny = torch.finfo(u.dtype).eps
    wide_t = levels.quantile(u.clamp(tiny, 1 - tiny), process)
    t = wide_t.to(torch.float32)
    # float32 rounds the last 3e-8 of [0, 1] to 1, where flows have no signal left and an infinite noise level.
    rounded_up = process.noise_level(wide_t).isfinite() & process.noise_level(t).isinf()
    return torch.where(rounded_up, torch.nextafter(t, torch.zeros_like(t)), t)


def _check_process(process: Process) -> None:
    check_kind("process", process, Process, "a Process, such as EDM()")
