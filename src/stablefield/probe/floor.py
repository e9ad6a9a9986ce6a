r"""The floor of a training loss: what is left of it with a perfect network.

At noise level s a network D has, in expectation over the batch,

$$ w(s) \tfrac1d E|D - \hat x_0|^2 = w(s) \tfrac1d \left( E|D - \mu|^2 + V(s) \right), $$

with $\mu$ the exact posterior mean and V the variance of the target: V_DSM for the single sample, V_STF(n) with n
references, 0 with the whole data set. The second part is the floor. "Loss minus floor" says how far the network is from the
optimum, which the loss alone hides: most of it is floor where noise is large.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stablefield.diffusion.weighting import EDMWeighting, Weighting
from stablefield.probe.advice import Training
from stablefield.probe.series import interpolate
from stablefield.probe.variance import VarianceCurve

__all__ = ["LossFloor"]

# Noise levels that stand for the training distribution.
_POINTS = 16_384


@dataclass(frozen=True, kw_only=True)
class LossFloor:
    """The floor against the noise level.

    Attributes:
        noise_level: where it is known, increasing, shape (L,).
        variance: variance of the target there, in squared units of the data, shape (L,).
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
        if size == 1:
            variance = curve.dsm.mean
        elif size >= curve.samples:
            variance = torch.zeros_like(curve.dsm.mean)
        elif size in curve.stf:
            variance = curve.stf[size].mean
        else:
            known = ", ".join(map(str, (1, *curve.stf, curve.samples)))
            raise ValueError(f"size is {size}: it was not measured; the sizes {known} were.")
        return cls(noise_level=curve.noise_level, variance=variance, dim=curve.dim, weighting=weighting)

    def __call__(self, noise_level: Tensor) -> Tensor:
        """w(s) V(s) / d at `noise_level`, any shape, float64; see `interpolate` for levels beyond those measured."""
        level = noise_level.double()
        return self.weighting(level) * interpolate(level, self.noise_level, self.variance) / self.dim

    def bins(self, edges: Sequence[float], training: Training) -> Tensor:
        """Mean floor of the training rows in each bin of a trainer's log, shape (len(edges) + 1,), float64.

        Args:
            edges: noise levels between the bins, increasing; the outer bins are open.
            training: where the process and the distribution of the noise levels are taken from.

        Returns:
            The means; nan where no row falls.
        """
        level = training.levels(_POINTS)
        place = torch.bucketize(level, torch.as_tensor(edges, dtype=torch.float64), right=True)
        total = torch.zeros(len(edges) + 1, dtype=torch.float64).index_add_(0, place, self(level))
        return total / torch.bincount(place, minlength=len(edges) + 1)

    def excess(self, loss: Tensor, noise_level: Tensor) -> Tensor:
        """Loss minus floor: `loss` at `noise_level`, of one shape, as a trainer logs them. Noise may take it below 0."""
        return loss.double() - self(noise_level)
