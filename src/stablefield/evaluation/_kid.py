r"""The kernel distance, squared maximum mean discrepancy with a polynomial kernel: KID, on FID's own Inception.

With $k(x, y) = (x \cdot y / d + 1)^3$ and m rows from each side,

$$ \widehat{\mathrm{MMD}}^2 = \frac{\sum_{i \ne j} k(x_i, x_j)}{m (m - 1)} + \frac{\sum_{i \ne j} k(y_i, y_j)}{m (m - 1)}
   - \frac{2}{m^2} \sum_{i, j} k(x_i, y_j) , $$

which is unbiased, unlike the Frechet distance, and hence may fall below 0. As in the literature it is averaged over
random subsets of m rows. Tables often give KID times 1,000.

References:
    Binkowski, Sutherland, Arbel, Gretton, "Demystifying MMD GANs", ICLR 2018, section 4.
    Gretton, Borgwardt, Rasch, Schoelkopf, Smola, "A Kernel Two-Sample Test", JMLR 2012, equation 3.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from stablefield._shapes import check_kind, whole_number
from stablefield.evaluation._features import checked_pair, in_float64
from stablefield.evaluation._inception import metric_name
from stablefield.evaluation._metric import LOWER, Metric, MetricInput, Value

__all__ = ["Kernel", "KernelDistance", "kernel_distance"]


@dataclass(frozen=True, kw_only=True)
class KernelDistance:
    """A kernel distance over random subsets, with its spread."""

    mean: float
    """Mean over subsets: the distance. Unbiased, so it may be negative."""
    standard_deviation: float
    """Standard deviation over subsets, as tables usually print after the plus-minus sign."""
    standard_error: float
    """Estimated standard error of `mean` over fresh samples and subsets; see `kernel_distance`."""
    subsets: int
    """How many subsets."""
    subset_size: int
    """Rows m from each side in each subset."""


def kernel_distance(
    a: Tensor, b: Tensor, *, generator: torch.Generator, subsets: int = 100, subset_size: int | None = None
) -> KernelDistance:
    r"""Unbiased kernel distance between two feature arrays, averaged over random subsets.

    Subsets of m of the n rows share rows, so the spread s between them is not that of fresh samples. For a statistic
    like this one, whose variance over fresh samples of n is m / n of that of m, the standard error of the mean of S
    subsets is $s \sqrt{(m / n) / (1 - m / n) + 1 / S}$, with n the smaller side. It is too large, hence safe, where the
    two distributions are nearly equal.

    Args:
        a: features, shape (n, d).
        b: features, shape (n', d).
        generator: where the subsets are drawn from; on the CPU.
        subsets: how many subsets, at least 2.
        subset_size: rows from each side per subset, at least 2; by default 1,000, or half the smaller side if that is
            less.

    Raises:
        ValueError: if an array is no valid feature array or the dimensions disagree; if a side has fewer than 4 rows or
            fewer than twice `subset_size`; if `subsets` or `subset_size` is below 2.
    """
    check_kind("generator", generator, torch.Generator, "a torch.Generator, such as torch.Generator().manual_seed(0)")
    whole_number("subsets", subsets)
    if subset_size is not None:
        whole_number("subset_size", subset_size)
    a, b = checked_pair(("a", "b"), a, b, 4, "a spread between subsets takes two subsets of two rows")
    n = min(len(a), len(b))
    size = min(1000, n // 2) if subset_size is None else subset_size
    if subsets < 2 or size < 2:
        raise ValueError(f"subsets is {subsets}, subset_size {size}: both must be at least 2.")
    if 2 * size > n:
        raise ValueError(
            f"subset_size is {size}, but the smaller side has {n} rows: at least {2 * size} are needed, because subsets "
            f"of more than half the rows hardly differ. Use more samples, or subset_size={n // 2} (and say so)."
        )
    values = torch.stack([_unbiased(_draw(a, size, generator), _draw(b, size, generator)) for _ in range(subsets)])
    spread = float(values.std())
    part = size / n
    return KernelDistance(
        mean=float(values.mean()),
        standard_deviation=spread,
        standard_error=spread * math.sqrt(part / (1 - part) + 1 / subsets),
        subsets=subsets,
        subset_size=size,
    )


def _draw(features: Tensor, size: int, generator: torch.Generator) -> Tensor:
    rows = torch.randperm(len(features), generator=generator, device=generator.device)[:size]
    return in_float64(features[rows.to(features.device)])


def _unbiased(x: Tensor, y: Tensor) -> Tensor:
    size = len(x)
    within = sum((_kernel(z, z).sum() - _kernel_of_itself(z)) for z in (x, y)) / (size * (size - 1))
    return within - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernel_of_itself(x: Tensor) -> Tensor:
    return ((x.square().mean(dim=1) + 1) ** 3).sum()


@dataclass(frozen=True)
class Kernel(Metric):
    """Kernel distance with its spread; KID on FID's own Inception."""

    subsets: int = 100
    """Random subsets."""
    subset_size: int = 1000
    """Rows of each side in a subset; half the smaller side if that is less."""
    seed: int = 0
    """Of the subsets."""

    @property
    def least(self) -> int:
        return 4

    def __call__(self, given: MetricInput) -> tuple[Value, ...]:
        a, b = given.samples.matrix(), given.references.matrix()
        found = kernel_distance(
            a,
            b,
            generator=torch.Generator().manual_seed(self.seed),
            subsets=self.subsets,
            subset_size=self._size(len(a), len(b)),
        )
        settings = {"subsets": found.subsets, "subset_size": found.subset_size, "seed": self.seed}
        return (
            Value(
                name=metric_name("KID", "kernel distance", given.extractor),
                value=found.mean,
                better=LOWER,
                standard_error=found.standard_error,
                settings=settings,
            ),
        )

    def cost(self, samples: int, references: int, held_out: int, dim: int) -> tuple[float, float]:  # noqa: ARG002
        return 0.0, self.subsets * self._size(samples, references) ** 2

    def shortened(self) -> Self:
        return replace(self, subsets=2)

    def _size(self, samples: int, references: int) -> int:
        return min(self.subset_size, samples // 2, references // 2)
