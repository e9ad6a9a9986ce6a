r"""Perturbation kernels p_{t|0}(x_t | y): the density of x_t around a reference, in the form that a posterior needs.

A kernel with location $\alpha y$ and scale $\sigma$ depends only on $q = |x_t - \alpha y|^2$. Comparing a reference with an
anchor $a$ takes only the relative distance $\Delta = q(y) - q(a)$, which can be computed without cancellation if both are
close (see `_engine/logits.py`), so kernels are functions of it.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stablefield._shapes import check_generator, check_tensor, drawn_by, number

__all__ = ["GaussianKernel", "PerturbationKernel", "StudentTKernel"]


class PerturbationKernel(Protocol):
    """The interface of a perturbation kernel in `dim` dimensions."""

    def log_ratio(self, distance: Tensor, anchor_square: Tensor, sigma: Tensor, dim: int) -> Tensor:
        """Log of the kernel at a reference over the kernel at the anchor.

        Args:
            distance: q(reference) - q(anchor), shape (B, n).
            anchor_square: q(anchor), shape (B, 1).
            sigma: noise scale, shape (B, 1).
            dim: number of dimensions of the data.
        """
        ...

    def log_density(self, square: Tensor, sigma: Tensor, dim: int) -> Tensor:
        """Log density at q = `square`, shapes (B,)."""
        ...


@dataclass(frozen=True)
class GaussianKernel:
    """The normal density N(x_t; alpha y, sigma^2 I)."""

    def log_ratio(self, distance: Tensor, anchor_square: Tensor, sigma: Tensor, dim: int) -> Tensor:  # noqa: ARG002
        # Below 1e-19, 1 / sigma^2 overflows float32; a large number gives the same softmax, but infinity does not.
        return distance * (-0.5 / sigma**2).clamp(min=torch.finfo(distance.dtype).min).to(distance.dtype)

    def log_density(self, square: Tensor, sigma: Tensor, dim: int) -> Tensor:
        return -0.5 * (square / sigma**2 + dim * torch.log(2 * math.pi * sigma**2))


@dataclass(frozen=True)
class StudentTKernel:
    """The kernel of PFGM++: a multivariate Student t with `dof` degrees of freedom, location alpha y and scale sigma.

    Its density is proportional to (q + r^2)^(-(N + D) / 2) with D = `dof` the number of augmented dimensions, N the
    dimension of the data and r = sigma sqrt(D). It tends to the Gaussian kernel as D grows.

    Args:
        dof: D > 0.

    References:
        Xu, Liu, Tian, Tong, Tegmark, Jaakkola, "PFGM++: Unlocking the Potential of Physics-Inspired Generative Models",
        ICML 2023, equation 5 and section 4 (r = sigma sqrt(D)).
    """

    dof: float

    def __post_init__(self) -> None:
        number("dof", self.dof)
        if not 0 < self.dof < math.inf:
            raise ValueError(f"StudentTKernel(dof={self.dof}): the degrees of freedom must be positive and finite.")

    def log_ratio(self, distance: Tensor, anchor_square: Tensor, sigma: Tensor, dim: int) -> Tensor:
        scale = (1 / (anchor_square + self.dof * sigma**2)).to(distance.dtype)
        # The ratio is above -1 except for rounding, which must not produce nan.
        ratio = (distance * scale).clamp(min=-1 + torch.finfo(distance.dtype).eps)
        return -0.5 * (dim + self.dof) * torch.log1p(ratio)

    def log_density(self, square: Tensor, sigma: Tensor, dim: int) -> Tensor:
        d = self.dof
        constant = math.lgamma(0.5 * (dim + d)) - math.lgamma(0.5 * d) - 0.5 * dim * math.log(math.pi * d)
        return constant - dim * torch.log(sigma) - 0.5 * (dim + d) * torch.log1p(square / (d * sigma**2))

    def noise(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw noise of unit scale of the shape (B, ...), dtype and device of `like`: pass it to `Process.perturb`.

        A normal vector over the root of an independent chi-square over its degrees of freedom, one per row.
        """
        check_tensor("like", like, floating=True, batch=True)
        check_generator("generator", generator)
        normal = torch.randn(like.shape, dtype=like.dtype, device=like.device, **drawn_by(generator))
        shape = torch.full((like.shape[0],), 0.5 * self.dof, dtype=torch.float64, device=like.device)
        # torch's gamma sampler is the only chi-square that takes a generator.
        chi_square = 2 * torch._standard_gamma(shape, **drawn_by(generator))
        scale = torch.sqrt(self.dof / chi_square).to(like.dtype)
        return normal * scale.reshape(-1, *(1,) * (like.ndim - 1))
