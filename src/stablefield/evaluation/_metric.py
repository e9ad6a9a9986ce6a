"""The interface of a metric: a frozen dataclass of its settings; a call with features returns numbers.

A new metric is one new file beside this one:

    from stablefield.evaluation._metric import LOWER, Metric, MetricInput, Value

    @dataclass(frozen=True)
    class MeanDistance(Metric):
        def __call__(self, given: MetricInput) -> tuple[Value, ...]:
            samples, real = given.samples.matrix(), given.references.matrix()  # features, (n, d) and (m, d)
            return (Value(name="mean distance", value=float((samples.mean(0) - real.mean(0)).norm()), better=LOWER),)

and one line in `METRICS` in `_evaluate.py`: `"mean-distance": MeanDistance(),`. Then `python -m stablefield.cli.inventory`
rewrites the command's table of flags. A metric also declares its minimum number of images (`least`) and what to keep of the
features (`rows`, `moments`), so an evaluation can fail before it draws an image.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal, Self

from torch import Tensor

from stablefield.evaluation import _neighbours as neighbours
from stablefield.evaluation._extractor import Extractor
from stablefield.evaluation._features import Gaussian, fit_moments, unpack

__all__ = ["HIGHER", "LOWER", "Features", "Metric", "MetricInput", "Value"]

LOWER = "lower is better"
HIGHER = "higher is better"

# The largest k of any metric in METRICS.
_NEIGHBOURS = 5


@dataclass(frozen=True, kw_only=True)
class Value:
    """One number of a metric."""

    name: str
    """Name of the number."""
    value: float
    """The number."""
    better: str = ""
    """Which direction is better: `LOWER`, `HIGHER`, or a few words; empty if neither."""
    settings: Mapping[str, str | int | float] = field(default_factory=dict[str, str | int | float])
    """Arguments of the metric, for the protocol record."""
    standard_error: float | None = None
    """Standard error of the number over fresh samples, if known."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """Features of samples or of real images, as far as the metrics need them."""

    rows: Tensor | None = None
    """Features in the order of the images' numbers, shape (n, d), float32; None if no metric needs them."""
    moments: Tensor | None = None
    """Mean and covariance, packed as by `moments_of`, shape (d + 2, d), float64; None if no metric needs them."""
    _nearest: list[Tensor] = field(default_factory=list[Tensor], init=False, repr=False)

    def matrix(self) -> Tensor:
        """The rows.

        Raises:
            ValueError: if the extraction did not keep them.
        """
        if self.rows is None:
            raise ValueError("the metric needs the features themselves, which were dropped: set its rows to True.")
        return self.rows

    @cached_property
    def gaussian(self) -> Gaussian:
        """The Gaussian of mean and covariance.

        Raises:
            ValueError: if the extraction did not keep these, or there are fewer than 2 images.
        """
        if self.moments is None:
            raise ValueError("the metric needs mean and covariance, which were dropped: set its moments to True.")
        _, mean, covariance = unpack(self.moments)
        return fit_moments(mean, covariance)

    def radii(self, k: int) -> Tensor | None:
        """Squared distance of every row to its k-th nearest other row, shape (n,); None if there are too few rows.

        Cached for the next metric: they cost all pairs of rows, far more than the metrics that use them.
        """
        rows, kept = self.matrix(), self._nearest
        if len(rows) <= k:
            return None
        if not kept or kept[-1].shape[1] < k:
            kept.append(neighbours.others(rows, min(max(k, _NEIGHBOURS), len(rows) - 1)))
        return kept[-1][:, k - 1]


@dataclass(frozen=True, kw_only=True)
class MetricInput:
    """The input of a metric."""

    samples: Features
    """Features of the samples."""
    references: Features
    """Features of the real images."""
    extractor: Extractor
    """The extractor of both."""
    held_out: Tensor | None = None
    """Features of real images outside the training data, shape (h, d)."""
    mirrored: bool = False
    """Whether the second half of the references are the mirror images of the first half, in the same order."""


class Metric(ABC):
    """A metric with its settings; subclasses are frozen dataclasses."""

    rows: ClassVar[bool] = True
    """Whether it needs the features themselves: 4 d bytes per image."""
    moments: ClassVar[bool] = False
    """Whether it needs mean and covariance: 8 d^2 bytes in all."""
    reads: ClassVar[Literal["extractor", "pixels", "classifier"]] = "extractor"
    """Source of the features: the extractor; pixels, against the whole training set; or a classifier's logits."""

    @property
    def least(self) -> int:
        """The smallest number of samples, and of real images."""
        return 2

    @abstractmethod
    def __call__(self, given: MetricInput) -> tuple[Value, ...]:
        """Compute the numbers.

        Raises:
            ValueError: if there are too few images.
        """

    def cost(self, samples: int, references: int, held_out: int, dim: int) -> tuple[float, float]:  # noqa: ARG002
        """Relative time, in any unit: once for the reference set, and for each repeat."""
        return references**2, samples * references

    def shortened(self) -> Self:
        """A cheaper variant to time, if one call of this metric is slow; the ratio of `cost` scales its time up."""
        return self
