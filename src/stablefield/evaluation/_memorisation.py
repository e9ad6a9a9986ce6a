r"""Memorisation: do samples repeat training images?

Let $d_1(x)$ be the distance of a sample to its nearest training image, and $d_2(x) \ge d_1(x)$ that to the nearest other
one. A sample that repeats one image lies much nearer to it than to any other:

$$ \mathrm{ratio}(x) = d_1(x) / d_2(x) \in [0, 1], \qquad \text{memorised if } \mathrm{ratio}(x) < 1/3. $$

Held-out real images are the control. Their ratios show how often the threshold is met by chance. And for a
perfect model, the probability that a sample lies nearer to the training set than a held-out image is 1/2:

    closer = P(d_1(sample) < d_1(held out)) + P(equal) / 2

Distances are Euclidean, in pixels or in features. Another image is one with other values: an image that is in the training
set several times is one image, and so are an image and its mirror image, where both are training images. Otherwise the
second of a pair would be the next nearest, with d_1 / d_2 near 1, and no copy of the pair would count. Images that differ
however little, such as one image under two compressions, are two: remove such near-duplicates first. So are copies whose
features differ in the last bit, as a network may compute them in batches of different size.

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

from stablefield._shapes import flag, number
from stablefield.data._copies import digests
from stablefield.evaluation._features import checked_pair, in_float64
from stablefield.evaluation._metric import LOWER, Metric, MetricInput, Value
from stablefield.evaluation._neighbours import nearest

__all__ = ["Nearest", "NearestRatio", "nearest_ratio"]


@dataclass(frozen=True, kw_only=True)
class NearestRatio:
    """How near samples come to training images."""

    ratio: Tensor
    """d_1 / d_2 of every sample, with d_2 that to the nearest other image, shape (n,), float64."""
    distance: Tensor
    """d_1 of every sample, shape (n,), float64."""
    index: Tensor
    """Row of the nearest training image of every sample, shape (n,); any one of equal rows."""
    memorised: float
    """Share of samples with a ratio below the threshold."""
    threshold: float
    """The threshold."""
    held_out_memorised: float | None = None
    """The same share of held-out images, if given: the rate by chance."""
    closer: float | None = None
    """Probability that a sample is nearer to the training set than a held-out image, if given; 1/2 is ideal."""


def nearest_ratio(
    samples: Tensor,
    training: Tensor,
    held_out: Tensor | None = None,
    *,
    threshold: float = 1 / 3,
    mirrored: bool = False,
) -> NearestRatio:
    """Compare every sample with its two nearest training images; equal rows of `training` are one image.

    Args:
        samples: features (or flattened pixels) of samples, shape (n, d).
        training: features of the whole training set, shape (m, d), m >= 2.
        held_out: features of real images outside the training data, shape (h, d); any h.
        threshold: ratio below which a sample counts as memorised, in (0, 1).
        mirrored: whether the second half of `training` are the mirror images of the first half, in the same order; an
            image and its mirror image are then one.

    Raises:
        ValueError: if an array is not a valid feature array, `training` has fewer than 2 rows or shows a single image,
            `mirrored` is set and it has an odd number of rows, dimensions disagree, or the threshold is not in (0, 1).
    """
    number("threshold", threshold)
    flag("mirrored", mirrored)
    if not 0 < threshold < 1:
        raise ValueError(f"threshold is {threshold}: pass a number between 0 and 1; the literature's is 1/3.")
    samples, training = checked_pair(("samples", "training"), samples, training)
    if len(training) < 2:
        raise ValueError(
            f"training has {len(training)} rows: at least 2 are needed, because a ratio takes two neighbours."
        )
    if mirrored and len(training) % 2:
        raise ValueError(f"mirrored=True, and training has {len(training)} rows: pass each image's mirror image, too.")
    images = _images(training, mirrored=mirrored)
    if images is not None and bool((images == images[0]).all()):
        raise ValueError(
            f"training shows a single image, {len(training)} times: at least 2 are needed, because a ratio takes two "
            "neighbours; leave this metric out."
        )
    ratio, distance, index = _ratio(samples, training, images)
    chance = closer = None
    if held_out is not None:
        held_out, _ = checked_pair(("held_out", "training"), held_out, training)
        control, control_distance, _ = _ratio(held_out, training, images)
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


def _images(training: Tensor, *, mirrored: bool) -> Tensor | None:
    """The number of the image that each row shows, shape (m,); None if each shows another one."""
    count = len(training)
    half = count // 2 if mirrored else count
    rows = (digest for part in training.split(1024) for digest in digests(in_float64(part).cpu().numpy()))
    first, known = list(range(count)), dict[bytes, int]()

    def root(row: int) -> int:
        while first[row] != row:
            first[row] = row = first[first[row]]
        return row

    for row, digest in enumerate(rows):
        same = [known.setdefault(digest, row)] + ([row - half] if row >= half else [])
        for other in same:
            first[root(row)] = root(other)
    if not mirrored and len(known) == count:
        return None
    return torch.tensor([root(row) for row in range(count)], device=training.device)


def _ratio(points: Tensor, training: Tensor, images: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    distances, index = nearest(points, training, 2, groups=images)
    first, second = distances.unbind(dim=1)
    # Images may differ by less than their distance can show, which is 0 / 0.
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

    The references are the whole training set. Copies of an image in it are one image, and so is the mirror image of a model
    that trained on mirror images, too.
    """

    threshold: float = 1 / 3
    """Ratio of the two smallest distances below which a sample counts as memorised."""

    reads = "pixels"

    def __call__(self, given: MetricInput) -> tuple[Value, ...]:
        samples, training = given.samples.matrix(), given.references.matrix()
        found = nearest_ratio(samples, training, given.held_out, threshold=self.threshold, mirrored=given.mirrored)
        share = found.memorised
        # For a share of 0 or 1 the binomial formula gives an error of 0, which is wrong.
        error = math.sqrt(share * (1 - share) / len(samples)) if 0 < share < 1 else None
        # Values of before, which took copies for other images, do not compare.
        settings = {"threshold": self.threshold, "copies": "one image"}
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
