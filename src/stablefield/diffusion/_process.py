r"""Gaussian noising processes: how clean data become noise.

A process corrupts $x_0$ by

$$ x_t = \alpha(t)\, x_0 + \sigma(t)\, \varepsilon, \qquad \varepsilon \sim N(0, I), $$

where $t$ grows with noise. Processes differ only in scale and in how noise depends on time: the posterior of $x_0$ depends
on $(x_t, t)$ only through $x_t / \alpha$ and the noise level $\sigma / \alpha$.

Times are tensors of any shape; results have the shape, dtype and device of `t`. Every formula keeps its relative accuracy at
both ends of the time range, in float32 and float64.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield._reading import readable
from stablefield._shapes import check_generator, check_kind, check_numbers, check_tensor, drawn_by, per_row, row_values

__all__ = ["EDM", "VE", "VP", "Cosine", "Process", "RectifiedFlow", "rates", "scales"]

# How far rounding may take a time out of the range of its process.
_MARGIN = 1e-6


class Process(ABC):
    """A Gaussian process: x_t = alpha(t) x0 + sigma(t) noise.

    Define `alpha`, `sigma` and `time` for one of your own.
    """

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data at time `t`, of the shape of `t`."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at time `t`, of the shape of `t`."""

    def alpha_dot(self, t: Tensor) -> Tensor:
        """Derivative of `alpha` with respect to time, of the shape of `t`: by default torch differentiates."""
        return _derivative(self, "alpha", t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """Derivative of `sigma` with respect to time, of the shape of `t`: by default torch differentiates."""
        return _derivative(self, "sigma", t)

    @abstractmethod
    def time(self, noise_level: Tensor) -> Tensor:
        """The time at which sigma / alpha equals `noise_level`: the inverse of `noise_level`."""

    @property
    def time_range(self) -> tuple[float, float]:
        """The first and the last time that a batch may have; `StableTarget` rejects others, such as step numbers."""
        return -math.inf, math.inf

    def has_time(self, t: Tensor) -> Tensor:
        """Which of the times `t` are in `time_range`, up to rounding: bool, of the shape of `t`."""
        low, high = self.time_range
        return (t >= low - _MARGIN) & (t <= high + _MARGIN)

    def noise_level(self, t: Tensor) -> Tensor:
        """Noise-to-signal ratio sigma / alpha at time `t`."""
        check_tensor("t", t, real=True)
        alpha, sigma = scales(self, t)
        return sigma / alpha

    def perturb(
        self, x0: Tensor, t: float | Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw $x_t$ given $x_0$.

        Args:
            x0: clean data, shape (B, ...), floating point.
            t: times, one float or shape (B,).
            noise: standard normal noise of the shape of `x0`; drawn if not given.
            generator: draws the noise; torch's global generator if not given.

        Returns:
            `x_t`, of the shape, dtype and device of `x0`.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if `x0` is not floating point, shapes do not agree, or a time is outside the process's range (not
                checked on a GPU).
        """
        check_tensor("x0", x0, batch=True)
        if not x0.is_floating_point():
            raise ValueError(
                f"x0 has dtype {x0.dtype}: perturb takes floating point data (uint8 images: x0 / 127.5 - 1)."
            )
        check_generator("generator", generator)
        if noise is None:
            noise = torch.randn(x0.shape, dtype=x0.dtype, device=x0.device, **drawn_by(generator))
        else:
            check_tensor("noise", noise)
            if noise.shape != x0.shape or noise.device != x0.device or noise.is_complex():
                raise ValueError(
                    f"noise has shape {tuple(noise.shape)}, x0 has {tuple(x0.shape)}: they must be equal, and noise real "
                    f"and on the same device (noise has dtype {noise.dtype} on {noise.device}, x0 is on {x0.device})."
                )
        t = row_values("t", t, x0)
        if t.device.type == "cpu" and readable(t.device):
            low, high = self.time_range
            if not bool(self.has_time(t).all()):
                raise ValueError(
                    f"t runs from {t.min().item():g} to {t.max().item():g}, but the times of {self} run from {low:g} to "
                    f"{high:g}: pass times of this process."
                )
        alpha, sigma = scales(self, t)
        return per_row(alpha, x0) * x0 + per_row(sigma, x0) * noise.to(x0.dtype)


def scales(process: Process, t: Tensor) -> tuple[Tensor, Tensor]:
    """The scales alpha and sigma of `process` at times `t` (B,), each (B,).

    Raises:
        TypeError: if the process returns one that is not a tensor.
        ValueError: if it returns one of another shape.
    """
    found = process.alpha(t), process.sigma(t)
    _check_rows(process, ("alpha", "sigma"), found, t)
    return found


def rates(process: Process, t: Tensor) -> tuple[Tensor, Tensor]:
    """Their derivatives alpha_dot and sigma_dot at times `t` (B,), each (B,); errors as of `scales`."""
    found = process.alpha_dot(t), process.sigma_dot(t)
    _check_rows(process, ("alpha_dot", "sigma_dot"), found, t)
    return found


def _derivative(process: Process, name: str, t: Tensor) -> Tensor:
    """The derivative of the scale `name` of a process.

    Raises:
        ValueError: if the scale is no differentiable function of the time.
    """
    graph = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        own = t.detach().clone().requires_grad_()
        value = getattr(process, name)(own)
        found = None
        if value.requires_grad:
            (found,) = torch.autograd.grad(value.sum(), own, create_graph=graph, allow_unused=True)
    if found is None:  # a constant, or a table
        raise ValueError(
            f"{name} of {process} is no differentiable function of t: define {name}_dot(t), its derivative, of the "
            "shape of t."
        )
    return found if graph else found.detach()


def _check_rows(process: Process, names: tuple[str, str], values: tuple[Tensor, Tensor], t: Tensor) -> None:
    for name, value in zip(names, values, strict=True):
        # The words are made only for an error, so that a compiled program has no text.
        if isinstance(value, Tensor) and value.shape == t.shape:
            continue
        remedy = f"return one value per row, shape (B,), here {tuple(t.shape)}, such as torch.full_like(t, 1.0)"
        check_kind(f"{name} of {process}", value, Tensor, f"a tensor: {remedy}")
        raise ValueError(
            f"{name} of {process} has shape {tuple(value.shape)} at t of shape {tuple(t.shape)}: {remedy}."
        )


@dataclass(frozen=True)
class EDM(Process):
    """Unscaled data, time is the noise level: alpha = 1, sigma = t.

    References:
        Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models",
        NeurIPS 2022, table 1.
    """

    @property
    def time_range(self) -> tuple[float, float]:
        return 0.0, math.inf

    def alpha(self, t: Tensor) -> Tensor:
        check_tensor("t", t, real=True)
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        check_tensor("t", t, real=True)
        return t

    def alpha_dot(self, t: Tensor) -> Tensor:
        check_tensor("t", t, real=True)
        return torch.zeros_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        check_tensor("t", t, real=True)
        return torch.ones_like(t)

    def time(self, noise_level: Tensor) -> Tensor:
        check_tensor("noise_level", noise_level, real=True)
        return noise_level


@dataclass(frozen=True)
class VE(Process):
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t for t in [0, 1].

    Args:
        sigma_min: noise at t = 0.
        sigma_max: noise at t = 1.

    References:
        Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, "Score-Based Generative Modeling through Stochastic
        Differential Equations", ICLR 2021, equation 9 and appendix C.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def __post_init__(self) -> None:
        check_numbers(self, "sigma_min", "sigma_max")
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"VE(sigma_min={self.sigma_min}, sigma_max={self.sigma_max}): 0 < sigma_min < sigma_max must hold."
            )

    @property
    def _rate(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    @property
    def time_range(self) -> tuple[float, float]:
        """From -1 to 2: noise levels beyond sigma_min and sigma_max are valid, too."""
        return -1.0, 2.0

    def alpha(self, t: Tensor) -> Tensor:
        check_tensor("t", t, real=True)
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        check_tensor("t", t, real=True)
        return self.sigma_min * torch.exp(self._rate * t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        check_tensor("t", t, real=True)
        return torch.zeros_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        check_tensor("t", t, real=True)
        return self._rate * self.sigma(t)

    def time(self, noise_level: Tensor) -> Tensor:
        check_tensor("noise_level", noise_level, real=True)
        return torch.log(noise_level / self.sigma_min) / self._rate


@dataclass(frozen=True)
class VP(Process):
    """Variance preserving with a linear beta(t) on t in [0, 1]: alpha^2 + sigma^2 = 1.

    The marginal of x_t given x0 (the perturbation kernel) is N(alpha x0, sigma^2 I). With beta(t) = beta_min + (beta_max -
    beta_min) t and its integral b(t) = (beta_max - beta_min) t^2 / 2 + beta_min t: alpha = exp(-b / 2), sigma = sqrt(1 -
    exp(-b)).

    Args:
        beta_min: rate of noise at t = 0.
        beta_max: rate of noise at t = 1.

    References:
        Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021,
        equation 11, equation 29 (the marginal) and appendix C (beta_min, beta_max).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        check_numbers(self, "beta_min", "beta_max")
        if not 0 < self.beta_min < self.beta_max < math.inf:
            raise ValueError(
                f"VP(beta_min={self.beta_min}, beta_max={self.beta_max}): 0 < beta_min < beta_max must hold."
            )

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def _integral(self, t: Tensor) -> Tensor:
        return (0.5 * (self.beta_max - self.beta_min) * t + self.beta_min) * t

    @property
    def time_range(self) -> tuple[float, float]:
        """From 0 to 2: occasional noise levels have times a little beyond 1."""
        return 0.0, 2.0

    def alpha(self, t: Tensor) -> Tensor:
        check_tensor("t", t, real=True)
        return torch.exp(-0.5 * self._integral(t))

    def sigma(self, t: Tensor) -> Tensor:
        check_tensor("t", t, real=True)
        # 1 - exp(-b) by expm1: near t = 0, b is 1e-6 or less, and the plain difference loses all digits in float32.
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def alpha_dot(self, t: Tensor) -> Tensor:
        check_tensor("t", t, real=True)
        return -0.5 * self._beta(t) * self.alpha(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        check_tensor("t", t, real=True)
        return 0.5 * self._beta(t) * self.alpha(t) ** 2 / self.sigma(t)

    def noise_level(self, t: Tensor) -> Tensor:
        check_tensor("t", t, real=True)
        return torch.sqrt(torch.expm1(self._integral(t)))

    def time(self, noise_level: Tensor) -> Tensor:
        check_tensor("noise_level", noise_level, real=True)
        b = 2 * torch.log1p(noise_level**2)
        slope = self.beta_max - self.beta_min
        # The root of slope t^2 / 2 + beta_min t = b / 2, in a form that does not cancel at small b.
        return b / (self.beta_min + torch.sqrt(self.beta_min**2 + slope * b))


@dataclass(frozen=True)
class Cosine(Process):
    """Variance preserving on a quarter circle: alpha = cos(pi t / 2), sigma = sin(pi t / 2) for t in [0, 1].

    References:
        Salimans, Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", ICLR 2022, section 2; after
        Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", ICML 2021, equation 17 (without its offset).
    """

    @property
    def time_range(self) -> tuple[float, float]:
        return 0.0, 1.0

    def alpha(self, t: Tensor) -> Tensor:
        check_tensor("t", t, real=True)
        # cos(pi t / 2) as a sine: exactly 0, and never negative, at t = 1.
        return torch.sin(0.5 * math.pi * (1 - t))

    def sigma(self, t: Tensor) -> Tensor:
        check_tensor("t", t, real=True)
        return torch.sin(0.5 * math.pi * t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        check_tensor("t", t, real=True)
        return -0.5 * math.pi * self.sigma(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        check_tensor("t", t, real=True)
        return 0.5 * math.pi * self.alpha(t)

    def time(self, noise_level: Tensor) -> Tensor:
        check_tensor("noise_level", noise_level, real=True)
        return torch.atan(noise_level) * (2 / math.pi)


@dataclass(frozen=True)
class RectifiedFlow(Process):
    """Straight lines between data and noise: alpha = 1 - t, sigma = t for t in [0, 1]; t = 1 is noise.

    Libraries whose time runs from noise to data use 1 - t for this t, and the negative of this velocity. Regress on
    `Target.velocity`.

    References:
        Liu, Gong, Liu, "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow", ICLR 2023.
        Lipman, Chen, Ben-Hamu, Nickel, Le, "Flow Matching for Generative Modeling", ICLR 2023, equation 20 (sigma_min 0).
    """

    @property
    def time_range(self) -> tuple[float, float]:
        return 0.0, 1.0

    def alpha(self, t: Tensor) -> Tensor:
        check_tensor("t", t, real=True)
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        check_tensor("t", t, real=True)
        return t

    def alpha_dot(self, t: Tensor) -> Tensor:
        check_tensor("t", t, real=True)
        return -torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        check_tensor("t", t, real=True)
        return torch.ones_like(t)

    def time(self, noise_level: Tensor) -> Tensor:
        check_tensor("noise_level", noise_level, real=True)
        # s / (1 + s), in a form that is 1 rather than nan at infinite noise.
        return 1 / (1 + 1 / noise_level)
