"""A measurement: metrics on one extractor's features, over repeats, as results with their protocol."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, sqrt

from torch import Tensor

from stablefield.evaluation.extractor import Extractor
from stablefield.evaluation.feature_pass import Features, Lens
from stablefield.evaluation.metric import Metric, Sides, Value
from stablefield.evaluation.protocol import Protocol
from stablefield.evaluation.reference import Reference
from stablefield.evaluation.result import Result

__all__ = ["Making", "Measurement", "check_counts", "lens_for"]


@dataclass(frozen=True, kw_only=True)
class Making:
    """How samples were made, for the protocol; all None for images that were found."""

    sampler: str | None = None
    """The sampler with its options."""
    steps: int | None = None
    """Its steps; None also for an adaptive one."""
    nfe: float | None = None
    """Network evaluations per sample."""
    ema: str | None = None
    """Which average of the weights, of which step."""
    commit: str | None = None
    """Of the code that drew them."""


def lens_for(extractor: Extractor, metrics: Sequence[Metric]) -> Lens:
    """The extractor, and all that these metrics need of its features."""
    return Lens(
        extractor=extractor,
        rows=any(metric.rows for metric in metrics),
        moments=any(metric.moments for metric in metrics),
    )


def check_counts(metrics: Sequence[Metric], samples: int | None, references: int | None) -> None:
    """Find out before any image is read or drawn whether there will be enough.

    Args:
        metrics: what is to be measured.
        samples: of each repeat; None while that is not known.
        references: real images to measure against; None likewise.

    Raises:
        ValueError: naming the metric that takes more.
    """
    for metric in metrics:
        for side, count in (("samples", samples), ("reference images", references)):
            if count is not None and count < metric.least:
                name = type(metric).__name__
                raise ValueError(
                    f"there are {count} {side}, but {name} takes at least {metric.least}: use more of them (thousands, for "
                    "a number that means something), or leave this metric out."
                )


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Metrics on the features of one extractor against one reference set."""

    extractor: Extractor
    """From images to features."""
    metrics: tuple[Metric, ...]
    """Which numbers."""
    reference: Reference
    """The other side, as this extractor sees it."""
    held_out: Tensor | None = None
    """Features of real images that were not trained on, shape (h, d)."""

    @property
    def lens(self) -> Lens:
        """What must be kept of the samples' features."""
        return lens_for(self.extractor, self.metrics)

    def values(self, samples: Features) -> list[Value]:
        """The numbers of one repeat.

        Raises:
            ValueError: if there are too few samples, or a part of the features is missing.
        """
        sides = Sides(samples=samples, reference=self.reference, held_out=self.held_out)
        return [value for metric in self.metrics for value in metric(sides, self.extractor)]

    def results(
        self, repeats: Sequence[Sequence[Value]], samples: int, seeds: Sequence[str], making: Making
    ) -> list[Result]:
        """One result per number, from the `values` of every repeat.

        Args:
            repeats: at least one.
            samples: images of each.
            seeds: the range of seeds of each, such as "0-49999"; empty for images that were found.
            making: how the samples were made.
        """
        return [
            Result(
                values=tuple(value.value for value in same),
                standard_error=_mean_error(same),
                protocol=Protocol(
                    metric=same[0].name,
                    settings=same[0].settings,
                    extractor=self.extractor.name,
                    extractor_sha256=self.extractor.sha256,
                    resize=self.extractor.resize,
                    sample_count=samples,
                    reference=self.reference.name,
                    reference_sha256=self.reference.sha256,
                    reference_count=self.reference.features.count,
                    split=self.reference.split,
                    seeds=tuple(seeds),
                    sampler=making.sampler,
                    steps=making.steps,
                    nfe=making.nfe,
                    ema=making.ema,
                    commit=making.commit,
                ),
            )
            for same in zip(*repeats, strict=True)
        ]


def _mean_error(values: Sequence[Value]) -> float | None:
    """Root mean square of the repeats' standard errors, where all have one."""
    errors = [value.standard_error for value in values if value.standard_error is not None]
    return sqrt(fsum(error**2 for error in errors) / len(errors)) if len(errors) == len(values) else None
