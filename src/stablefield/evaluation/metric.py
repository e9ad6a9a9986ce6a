"""Metrics as values: which numbers are wanted, what they need, and what they are called.

A metric is a frozen dataclass of its settings. It says how many samples it takes at least and what must be kept of the
features, so that a measurement finds out before any image is drawn, and is then called with the features of both sides.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from stablefield.evaluation.extractor import Extractor
from stablefield.evaluation.feature_pass import Features
from stablefield.evaluation.frechet import distance_between, fit_moments
from stablefield.evaluation.inception_score import inception_score
from stablefield.evaluation.kernel import kernel_distance
from stablefield.evaluation.manifold import coverage, density, precision, recall
from stablefield.evaluation.memorisation import nearest_ratio
from stablefield.evaluation.names import frechet_name, kernel_name
from stablefield.evaluation.neighbours import Neighbours
from stablefield.evaluation.reference import Reference

__all__ = [
    "ClassifierScore", "Coverage", "Density", "Frechet", "Kernel", "Metric", "Nearest", "Precision", "Recall", "Sides",
    "Value",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Value:
    """One number of a metric."""

    name: str
    """What to call it."""
    value: float
    """The number."""
    settings: Mapping[str, str | int | float] = field(default_factory=dict[str, str | int | float])
    """Arguments of the metric, for the protocol record."""
    standard_error: float | None = None
    """Of the number over fresh samples, where the metric knows it."""


@dataclass(frozen=True, kw_only=True)
class Sides:
    """What metrics are functions of."""

    samples: Features
    """Features of the samples."""
    reference: Reference
    """Features of the reference images."""
    held_out: Tensor | None = None
    """Features of real images that were not trained on, shape (h, d)."""
    near: Neighbours = field(default_factory=Neighbours)
    """Of the samples."""

    def radii(self, side: Literal["real", "generated"], k: int) -> Tensor | None:
        """Squared distance of every row of a side to its k-th nearest other one, shape (n,); None if there is none."""
        generated, real = _rows(self)
        return self.reference.near(real, k) if side == "real" else self.near(generated, k)


class Metric(Protocol):
    """A metric with its settings."""

    @property
    def rows(self) -> bool:
        """Whether it needs the features themselves."""
        ...

    @property
    def moments(self) -> bool:
        """Whether it needs mean and covariance."""
        ...

    @property
    def least(self) -> int:
        """The smallest number of images on either side."""
        ...

    def __call__(self, sides: Sides, extractor: Extractor) -> tuple[Value, ...]:
        """The numbers.

        Raises:
            ValueError: if there are too few images.
        """
        ...


@dataclass(frozen=True)
class Frechet:
    """Frechet distance; FID on FID's own Inception."""

    rows = False
    moments = True
    least = 2

    def __call__(self, sides: Sides, extractor: Extractor) -> tuple[Value, ...]:  # noqa: D102
        of_samples, real = sides.samples.statistics, sides.reference.gaussian
        if of_samples is None or real is None:
            raise ValueError("a Frechet distance needs the moments of both sides: keep them in the lens.")
        distance = distance_between(fit_moments(of_samples.mean, of_samples.covariance), real)
        return (Value(name=frechet_name(extractor), value=distance.value),)


@dataclass(frozen=True)
class Kernel:
    """Kernel distance with its spread; KID on FID's own Inception."""

    subsets: int = 100
    """Random subsets."""
    subset_size: int = 1000
    """Rows of each side in a subset; half the smaller side if that is less."""
    seed: int = 0
    """Of the subsets."""

    rows = True
    moments = False
    least = 4

    def __call__(self, sides: Sides, extractor: Extractor) -> tuple[Value, ...]:  # noqa: D102
        a, b = _rows(sides)
        found = kernel_distance(
            a,
            b,
            generator=torch.Generator().manual_seed(self.seed),
            subsets=self.subsets,
            subset_size=min(self.subset_size, len(a) // 2, len(b) // 2),
        )
        settings = {"subsets": found.subsets, "subset_size": found.subset_size, "seed": self.seed}
        return (
            Value(
                name=kernel_name(extractor), value=found.mean, standard_error=found.standard_error, settings=settings
            ),
        )


@dataclass(frozen=True)
class _Manifold:
    k: int
    """Which neighbour the balls reach to."""

    rows = True
    moments = False

    @property
    def least(self) -> int:
        return self.k + 1

    @property
    def _settings(self) -> dict[str, str | int | float]:
        # With closed balls, as earlier versions had them, numbers differ where distances are equal.
        return {"k": self.k, "balls": "open"}


@dataclass(frozen=True)
class Precision(_Manifold):
    """Share of samples inside the real manifold."""

    k: int = 3

    def __call__(self, sides: Sides, extractor: Extractor) -> tuple[Value, ...]:  # noqa: ARG002, D102
        samples, real = _rows(sides)
        score = precision(real, samples, self.k, radii=sides.radii("real", self.k))
        return (Value(name="precision", value=score.value, settings=self._settings),)


@dataclass(frozen=True)
class Recall(_Manifold):
    """Share of real images inside the samples' manifold."""

    k: int = 3

    def __call__(self, sides: Sides, extractor: Extractor) -> tuple[Value, ...]:  # noqa: ARG002, D102
        samples, real = _rows(sides)
        score = recall(real, samples, self.k, radii=sides.radii("generated", self.k))
        return (Value(name="recall", value=score.value, settings=self._settings),)


@dataclass(frozen=True)
class Density(_Manifold):
    """Real balls about a sample."""

    k: int = 5

    def __call__(self, sides: Sides, extractor: Extractor) -> tuple[Value, ...]:  # noqa: ARG002, D102
        samples, real = _rows(sides)
        score = density(real, samples, self.k, radii=sides.radii("real", self.k))
        return (Value(name="density", value=score.value, settings=self._settings),)


@dataclass(frozen=True)
class Coverage(_Manifold):
    """Share of real balls with a sample inside."""

    k: int = 5

    def __call__(self, sides: Sides, extractor: Extractor) -> tuple[Value, ...]:  # noqa: ARG002, D102
        samples, real = _rows(sides)
        score = coverage(real, samples, self.k, radii=sides.radii("real", self.k))
        return (Value(name="coverage", value=score.value, settings=self._settings),)


@dataclass(frozen=True)
class Nearest:
    """Share of samples much nearer to one training image than to any other, with held-out images as the control.

    The reference is the whole training set.
    """

    threshold: float = 1 / 3
    """Ratio of the two smallest distances below which a sample counts as memorised."""

    rows = True
    moments = False
    least = 2

    def __call__(self, sides: Sides, extractor: Extractor) -> tuple[Value, ...]:  # noqa: ARG002, D102
        samples, training = _rows(sides)
        found = nearest_ratio(samples, training, sides.held_out, threshold=self.threshold)
        share = found.memorised
        # Of a share of 0 or 1 the binomial formula would say 0, which is not known.
        error = math.sqrt(share * (1 - share) / len(samples)) if 0 < share < 1 else None
        settings = {"threshold": self.threshold}
        values = [Value(name="memorised share", value=share, standard_error=error, settings=settings)]
        if sides.held_out is not None and found.held_out_memorised is not None and found.closer is not None:
            control = {"held_out": len(sides.held_out)}
            values.append(
                Value(
                    name="memorised share of held-out images",
                    value=found.held_out_memorised,
                    settings=settings | control,
                )
            )
            values.append(Value(name="nearer than held-out images", value=found.closer, settings=control))
        return tuple(values)


@dataclass(frozen=True)
class ClassifierScore:
    """The formula of the Inception Score, on features that are a classifier's logits.

    It is named after the classifier: the Inception Score proper is that of the classifier of 2015, which no file of
    ours holds.
    """

    splits: int = 10
    """Parts that are scored apart."""

    rows = True
    moments = False

    @property
    def least(self) -> int:  # noqa: D102
        return self.splits

    def __call__(self, sides: Sides, extractor: Extractor) -> tuple[Value, ...]:  # noqa: D102
        if sides.samples.rows is None:
            raise ValueError("a classifier's score needs the features themselves: keep the rows in the lens.")
        score = inception_score(torch.softmax(sides.samples.rows.double(), dim=1), self.splits)
        error = score.standard_deviation / math.sqrt(self.splits - 1) if self.splits > 1 else None
        name = f"classifier score ({extractor.name})"
        return (Value(name=name, value=score.mean, standard_error=error, settings={"splits": self.splits}),)


def _rows(sides: Sides) -> tuple[Tensor, Tensor]:
    """Samples, reference."""
    samples, real = sides.samples.rows, sides.reference.features.rows
    if samples is None or real is None:
        raise ValueError("this metric needs the features of both sides: keep the rows in both lenses.")
    return samples, real
