r"""Preconditioning: a denoiser D built around a raw network F by the scalings c_skip, c_out, c_in and c_noise.

$$ D(x; s) = c_{skip}(s)\, x + c_{out}(s)\, F(c_{in}(s)\, x;\; c_{noise}(s)), $$

where $x = x_t / \alpha$ and $s = \sigma / \alpha$: all processes in noise-to-signal units, the units of the samplers. EDM's
own scalings, with the standard deviation $\sigma_d$ of the data (sigma_data):

    c_skip = sigma_data^2 / (sigma^2 + sigma_data^2)        c_in = 1 / sqrt(sigma^2 + sigma_data^2)
    c_out = sigma sigma_data / sqrt(sigma^2 + sigma_data^2)  c_noise = ln(sigma) / 4

References:
    Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022,
    equation 7 and table 1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from stablefield._shapes import (
    check_callable,
    check_kind,
    check_numbers,
    check_tensor,
    number,
    per_row,
    row_values,
    whole_number,
)

__all__ = [
    "PRECONDITIONINGS",
    "DDPMPreconditioning",
    "Denoiser",
    "EDMPreconditioning",
    "FlowPreconditioning",
    "Preconditioning",
    "Scalings",
    "VEPreconditioning",
    "VPPreconditioning",
]


class Scalings(NamedTuple):
    """The four functions of the noise level, each with its shape: c_skip, c_out, c_in and c_noise of EDM's equation 7."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class Preconditioning(Protocol):
    """The scalings of a denoiser."""

    def __call__(self, sigma: Tensor) -> Scalings:
        """Scalings at noise levels `sigma` (sigma / alpha), shape (B,)."""
        ...


@dataclass(frozen=True)
class EDMPreconditioning:
    """EDM's scalings: unit variance for the input and the target of the network at every noise level (table 1, "Ours").

    Args:
        sigma_data: standard deviation of the data.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_numbers(self, "sigma_data")
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(f"EDMPreconditioning(sigma_data={self.sigma_data}): pass a positive number.")

    def __call__(self, sigma: Tensor) -> Scalings:
        check_tensor("sigma", sigma, real=True)
        square = sigma**2 + self.sigma_data**2
        root = torch.sqrt(square)
        return Scalings(
            c_skip=self.sigma_data**2 / square,
            c_out=sigma * self.sigma_data / root,
            c_in=1 / root,
            c_noise=torch.log(sigma) / 4,
        )


@dataclass(frozen=True)
class VPPreconditioning:
    """Noise prediction with the discrete time labels of DDPM++ (table 1, column "VP").

    Args:
        beta_min: lower end of the linear schedule.
        beta_slope: slope of the schedule, beta_max - beta_min (EDM's beta_d).
        steps: number of time labels, 1,000 in the published networks.
    """

    beta_min: float = 0.1
    beta_slope: float = 19.9
    steps: int = 1000

    def __post_init__(self) -> None:
        check_numbers(self, "beta_min", "beta_slope", "steps")
        if not (self.beta_min >= 0 and 0 < self.beta_slope < math.inf and self.steps >= 1):
            raise ValueError(
                f"VPPreconditioning(beta_min={self.beta_min}, beta_slope={self.beta_slope}, steps={self.steps}): "
                "pass beta_min of at least 0, a positive beta_slope, and steps of at least 1."
            )

    def __call__(self, sigma: Tensor) -> Scalings:
        check_tensor("sigma", sigma, real=True)
        one = torch.ones_like(sigma)
        # A plain log of (1 + s^2), not log1p: the published networks were trained with its float32 rounding.
        log = torch.log(1 + sigma**2)
        t = (torch.sqrt(self.beta_min**2 + 2 * self.beta_slope * log) - self.beta_min) / self.beta_slope
        return Scalings(c_skip=one, c_out=-sigma, c_in=1 / torch.sqrt(sigma**2 + 1), c_noise=(self.steps - 1) * t)


@dataclass(frozen=True)
class VEPreconditioning:
    """Noise prediction without input scaling, as in NCSN++ (table 1, column "VE")."""

    def __call__(self, sigma: Tensor) -> Scalings:
        check_tensor("sigma", sigma, real=True)
        one = torch.ones_like(sigma)
        return Scalings(c_skip=one, c_out=sigma, c_in=one, c_noise=torch.log(sigma / 2))


@dataclass(frozen=True)
class FlowPreconditioning:
    r"""Velocity prediction on straight lines, in SiT's convention: its time u runs from noise (0) to data (1).

    The network sees $x_u = u\, x_0 + (1 - u)\, \varepsilon$ and the label $u = 1 / (1 + s)$, and estimates the velocity
    $x_0 - \varepsilon$. So $x_0 = x_u + (1 - u) F$. In terms of `RectifiedFlow`, u is 1 - t and F minus its velocity.

    Args:
        label_scale: factor on the label; 1 in SiT, about 1,000 for a network with a positional embedding of labels in the
            hundreds, such as DDPM++.

    References:
        Ma, Goldstein, Albergo, Boffi, Vanden-Eijnden, Xie, "SiT: Exploring Flow and Diffusion-based Generative Models with
        Scalable Interpolant Transformers", ECCV 2024, the linear path and its velocity; Lipman et al., "Flow Matching
        for Generative Modeling", ICLR 2023, equation 20.
    """

    label_scale: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self, "label_scale")
        if not 0 < self.label_scale < math.inf:
            raise ValueError(f"FlowPreconditioning(label_scale={self.label_scale}): pass a positive number.")

    def __call__(self, sigma: Tensor) -> Scalings:
        check_tensor("sigma", sigma, real=True)
        u = 1 / (1 + sigma)
        return Scalings(c_skip=u, c_out=sigma * u, c_in=u, c_noise=self.label_scale * u)


@dataclass(frozen=True)
class DDPMPreconditioning:
    r"""Noise prediction with the steps of DDPM's table as labels, as in DiT and the networks of DDPM and ADM.

    The table is $\bar\alpha_k = \prod_{i \le k} (1 - \beta_i)$ with $\beta$ linear in the step. At its noise levels
    $\sqrt{(1 - \bar\alpha_k) / \bar\alpha_k}$ the label is the step k, exactly up to rounding; between two of them it is
    interpolated linearly in the logarithm of the noise level, and beyond them it is the first or the last step.

    Args:
        beta_start: of the first step.
        beta_end: of the last step.
        steps: number of steps.

    References:
        Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, section 4 (the schedule); Peebles, Xie,
        "Scalable Diffusion Models with Transformers", ICCV 2023, section 4.
    """

    beta_start: float = 1e-4
    beta_end: float = 0.02
    steps: int = 1000

    def __post_init__(self) -> None:
        check_numbers(self, "beta_start", "beta_end")
        whole_number("steps", self.steps, 2, 100_000)
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"DDPMPreconditioning(beta_start={self.beta_start}, beta_end={self.beta_end}): "
                "0 < beta_start <= beta_end < 1 must hold."
            )

    def __call__(self, sigma: Tensor) -> Scalings:
        check_tensor("sigma", sigma, real=True)
        one = torch.ones_like(sigma)
        return Scalings(c_skip=one, c_out=-sigma, c_in=1 / torch.sqrt(sigma**2 + 1), c_noise=self._step(sigma))

    def _step(self, sigma: Tensor) -> Tensor:
        # Made anew on the device of sigma, where a copy from the host would make it wait.
        wide = torch.float32 if sigma.device.type == "mps" else torch.float64
        betas = torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=wide, device=sigma.device)
        logs = torch.log(torch.expm1(-torch.log1p(-betas).cumsum(0))) / 2
        level = torch.log(sigma.to(wide)).clamp(logs[0], logs[-1])
        low = torch.searchsorted(logs, level, right=True).clamp(1, self.steps - 1) - 1
        step = low + (level - logs[low]) / (logs[low + 1] - logs[low])
        return step.to(sigma.dtype if sigma.is_floating_point() else torch.float32)


NamedPreconditioning = (
    EDMPreconditioning | VPPreconditioning | VEPreconditioning | FlowPreconditioning | DDPMPreconditioning
)
PRECONDITIONINGS: Mapping[str, type[NamedPreconditioning]] = {
    "edm": EDMPreconditioning,
    "vp": VPPreconditioning,
    "ve": VEPreconditioning,
    "flow": FlowPreconditioning,
    "ddpm": DDPMPreconditioning,
}
"""The kinds that an export states by name."""


class Denoiser(nn.Module):
    """D(x; sigma): the network's estimate of x0, in noise-to-signal units.

    Args:
        network: called as network(x, noise_label), with the keywords class_labels and augment_labels only if they are
            given; x of shape (B, ...), noise_label of shape (B,), both in the dtype of its weights. A network with an
            attribute `float32_labels` that is true, as all of `stablefield.networks`, gets noise labels in float32 even if
            its weights have 16 bits, which cannot tell neighbouring labels apart.
        preconditioning: the scalings around it.
    """

    def __init__(self, network: nn.Module, preconditioning: Preconditioning | None = None) -> None:
        super().__init__()
        check_kind("network", network, nn.Module, "a torch.nn.Module")
        if preconditioning is not None:
            check_callable("preconditioning", preconditioning, "preconditioning(sigma), such as EDMPreconditioning()")
        self.network = network
        self.preconditioning: Preconditioning = preconditioning or EDMPreconditioning()

    def forward(
        self,
        x: Tensor,
        sigma: float | Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Estimate x0.

        Computes and applies the scalings in float32 or better, even under autocast; the network gets its own dtype.

        Args:
            x: x_t / alpha, shape (B, ...), floating point.
            sigma: noise level sigma / alpha, a float or shape (B,).
            class_labels: integers (B,), -1 for no class; passed to the network if given.
            augment_labels: shape (B, augment_dim); passed to the network if given.

        Returns:
            The estimate, of the shape and dtype of x (float32 if x is of lower precision).

        Raises:
            ValueError: if a float `sigma` is negative or NaN; a tensor is not read, since a GPU would have to wait for it.
        """
        check_tensor("x", x, floating=True, batch=True)
        if not isinstance(sigma, Tensor) and not number("sigma", sigma) >= 0:
            raise ValueError(f"sigma={sigma}: pass a noise level, sigma / alpha, of 0 or more.")
        dtype = torch.promote_types(x.dtype, torch.float32)
        inner = next((p.dtype for p in self.network.parameters() if p.is_floating_point()), dtype)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(dtype)
            # Compute the label in float32, as published, and round it at most once.
            level = row_values("sigma", sigma, x)
            scale = self.preconditioning(level.to(dtype))
            exact = torch.float64 if inner == torch.float64 else torch.float32
            label = self.preconditioning(level.to(exact)).c_noise
            label = label.to(exact if getattr(self.network, "float32_labels", False) else inner)
            scaled = (per_row(scale.c_in, x) * x).to(inner)
        if class_labels is None and augment_labels is None:
            raw = self.network(scaled, label)
        elif augment_labels is None:
            raw = self.network(scaled, label, class_labels=class_labels)
        elif class_labels is None:
            raw = self.network(scaled, label, augment_labels=augment_labels)
        else:
            raw = self.network(scaled, label, class_labels=class_labels, augment_labels=augment_labels)
        check_tensor("the network's output", raw)
        if raw.shape != x.shape:
            raise ValueError(
                f"the network returned shape {tuple(raw.shape)} for x of shape {tuple(x.shape)}: return the shape of x."
            )
        with torch.autocast(x.device.type, enabled=False):
            return per_row(scale.c_skip, x) * x + per_row(scale.c_out, x) * raw.to(dtype)
