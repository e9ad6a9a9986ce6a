r"""Memorisation: do samples repeat training images?

Let $d_1(x) \le d_2(x)$ be the distances of a sample to its nearest and next nearest training image. A sample that
repeats one image lies much nearer to it than to any other:

$$ \mathrm{ratio}(x) = d_1(x) / d_2(x) \in [0, 1], \qquad \text{memorised if } \mathrm{ratio}(x) < 1/3. $$

Held-out real images are the control. Their ratios show how often the threshold is met by chance. And for a
perfect model, the probability that a sample lies nearer to the training set than a held-out image is 1/2:

    closer = P(d_1(sample) < d_1(held out)) + P(equal) / 2

Distances are Euclidean, in pixels or in features. Near a training image that is in the set twice, d_1 = d_2, so its
copies go unnoticed: remove duplicates first. A ratio 0 / 0 counts as 0.

References:
    Yoon, Choi, Kwon, Ryu, "Diffusion Probabilistic Models Generalize when They Fail to Memorize", ICML 2023 workshop on
    Structured Probabilistic Inference and Generative Modeling (the ratio and 1/3).
    Meehan, Chaudhuri, Dasgupta, "A Non-Parametric Test to Detect Data-Copying in Generative Models", AISTATS 2020 (the
    control: a Mann-Whitney comparison of distances to the training set).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield._shapes import number
from stablefield.evaluation._features import checked_pair
from stablefield.evaluation._metric import LOWER, Metric, MetricInput, Value
from stablefield.evaluation._neighbours import nearest

__all__ = ["Nearest", "NearestRatio", "nearest_ratio"]


@dataclass(frozen=True, kw_only=True)
class NearestRatio:
    """How near samples come to training images."""

    ratio: Tensor
    """d_1 / d_2 of every sample, shape (n,), float64."""
    distance: Tensor
    """d_1 of every sample, shape (n,), float64."""
    index: Tensor
    """Row of the nearest training image of every sample, shape (n,)."""
    memorised: float
    """Share of samples with a ratio below the threshold."""
    threshold: float
    """The threshold."""
    held_out_memorised: float | None = None
    """The same share of held-out images, if given: the rate by chance."""
    closer: float | None = None
    """Probability that a sample is nearer to the training set than a held-out image, if given; 1/2 is ideal."""


def nearest_ratio(
    samples: Tensor, training: Tensor, held_out: Tensor | None = None, *, threshold: float = 1 / 3
) -> NearestRatio:
    """Compare every sample with its two nearest training images.

    Args:
        samples: features (or flattened pixels) of samples, shape (n, d).
        training: features of the whole training set, shape (m, d), m >= 2.
        held_out: features of real images outside the training data, shape (h, d); any h.
        threshold: ratio below which a sample counts as memorised, in (0, 1).

    Raises:
        ValueError: if an array is not a valid feature array, `training` has fewer than 2 rows, dimensions disagree, or the
            threshold is not in (0, 1).
    """
    number("threshold", threshold)
    if not 0 < threshold < 1:
        raise ValueError(f"threshold is {threshold}: pass a number between 0 and 1; the literature's is 1/3.")
    samples, training = checked_pair(("samples", "training"), samples, training)
    if len(training) < 2:
        raise ValueError(
            f"training has {len(training)} rows: at least 2 are needed, because a ratio takes two neighbours."
        )
    ratio, distance, index = _ratio(samples, training)
    chance = closer = None
    if held_out is not None:
        held_out, _ = checked_pair(("held_out", "training"), held_out, training)
        control, control_distance, _ = _ratio(held_out, training)
        chance = float((control < threshold).double().mean())
        closer = _probability_less(distance, control_distance)
    return NearestRatio(
        ratio=ratio,
        distance=distance,
        index=index,
        memorised=float((ratio < threshold).double().mean()),
        threshold=threshold,
        held_out_memorised=chance,
        closer=closer,
    )


def _ratio(points: Tensor, training: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    distances, index = nearest(points, training, 2)
    first, second = distances.unbind(dim=1)
    # 0 / 0 counts as 0: the sample equals two training images.
    return first / second.clamp(min=torch.finfo(second.dtype).tiny), first, index[:, 0]


def _probability_less(a: Tensor, b: Tensor) -> float:
    """P(a < b) + P(a = b) / 2 over all pairs, by ranks."""
    ordered = b.sort().values
    a = a.contiguous()
    not_above = torch.searchsorted(ordered, a, side="right").double()
    below = torch.searchsorted(ordered, a, side="left").double()
    return float(1 - (not_above + below).mean() / (2 * len(b)))


@dataclass(frozen=True)
class Nearest(Metric):
    """Share of samples much nearer to one training image than to any other, with held-out images as the control.

    The references are the whole training set.
    """

    threshold: float = 1 / 3
    """Ratio of the two smallest distances below which a sample counts as memorised."""

    reads = "pixels"

    def __call__(self, given: MetricInput) -> tuple[Value, ...]:
        samples, training = given.samples.matrix(), given.references.matrix()
        found = nearest_ratio(samples, training, given.held_out, threshold=self.threshold)
        share = found.memorised
        # For a share of 0 or 1 the binomial formula gives an error of 0, which is wrong.
        error = math.sqrt(share * (1 - share) / len(samples)) if 0 < share < 1 else None
        settings = {"threshold": self.threshold}
        own = Value(name="memorised share", value=share, better=LOWER, standard_error=error, settings=settings)
        if given.held_out is None or found.held_out_memorised is None or found.closer is None:
            return (own,)
        control = {"held_out": len(given.held_out)}
        chance = Value(
            name="memorised share of held-out images", value=found.held_out_memorised, settings=settings | control
        )
        closer = Value(name="nearer than held-out images", value=found.closer, better="0.5 is ideal", settings=control)
        return own, chance, closer

    def cost(self, samples: int, references: int, held_out: int, dim: int) -> tuple[float, float]:  # noqa: ARG002
        return 0.0, (samples + held_out) * references
