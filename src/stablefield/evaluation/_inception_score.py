r"""The Inception Score: how certain and how diverse a classifier's predictions for the samples are.

$$ \mathrm{IS} = \exp \Big( \frac{1}{n} \sum_i \mathrm{KL}\big( p(y \mid x_i) \,\|\, \bar p(y) \big) \Big), \qquad
   \bar p(y) = \frac{1}{n} \sum_i p(y \mid x_i), $$

between 1 and the number of classes, over each of several equal splits of the samples in random order. It uses no reference
images. The name belongs to the probabilities of the 2015 Inception-v3: with another classifier the same formula gives
numbers that compare with no published ones.

References:
    Salimans, Goodfellow, Zaremba, Cheung, Radford, Chen, "Improved Techniques for Training GANs", NeurIPS 2016,
    section 4.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from stablefield._shapes import whole_number
from stablefield.evaluation._features import checked, in_float64
from stablefield.evaluation._metric import HIGHER, Metric, MetricInput, Value

__all__ = ["ClassifierScore", "InceptionScore", "inception_score"]


@dataclass(frozen=True, kw_only=True)
class InceptionScore:
    """A score over splits of the samples."""

    mean: float
    """Mean over splits: the score."""
    standard_deviation: float
    """Population standard deviation over splits, as in the original code; 0 for one split."""
    splits: int
    """Number of splits."""


def inception_score(probabilities: Tensor, splits: int = 10, seed: int | None = 0) -> InceptionScore:
    """Score of class probabilities.

    Args:
        probabilities: one distribution over classes per sample, shape (n, classes), in any order; rows sum to 1.
        splits: number of parts, each of n // splits rows or one more.
        seed: of the random order in which rows are cut into parts. None keeps the order of the rows: for rows in random
            order only, since parts of sorted rows hold few classes each and score near 1.

    Raises:
        ValueError: if `probabilities` is not a valid array of distributions, or has fewer rows than `splits`.
    """
    whole_number("splits", splits)
    if seed is not None:
        whole_number("seed", seed, 0)
    if splits < 1:
        raise ValueError(f"splits is {splits}: pass at least 1.")
    p = in_float64(checked("probabilities", probabilities, splits, f"each of {splits} splits must hold a sample"))
    off = (p.sum(dim=1) - 1).abs() > 1e-3
    wrong = off | (p < 0).any(dim=1)
    if wrong.any():
        row = int(torch.nonzero(wrong)[0])
        raise ValueError(
            f"probabilities: row {row} sums to {float(p[row].sum()):.6g} with least entry {float(p[row].min()):.3g}: "
            "pass probabilities (softmax of the logits), not logits."
        )
    if seed is not None:
        # Sets are often sorted by class.
        p = p[torch.randperm(len(p), generator=torch.Generator().manual_seed(seed)).to(p.device)]
    bounds = [len(p) * i // splits for i in range(splits + 1)]
    scores = torch.stack([_score(p[start:end]) for start, end in pairwise(bounds)])
    return InceptionScore(mean=float(scores.mean()), standard_deviation=float(scores.std(correction=0)), splits=splits)


def _score(p: Tensor) -> Tensor:
    marginal = p.mean(dim=0)
    return torch.exp((torch.xlogy(p, p) - torch.xlogy(p, marginal)).sum(dim=1).mean())


@dataclass(frozen=True)
class ClassifierScore(Metric):
    """The formula of the Inception Score, on features that are a classifier's logits.

    The name includes the classifier: the true Inception Score needs the classifier of 2015, which this package does not
    have.
    """

    splits: int = 10
    """Number of splits to score separately."""
    seed: int = 0
    """Seed of the order in which samples are split, so that files sorted by class do not matter."""

    reads = "classifier"

    @property
    def least(self) -> int:
        return self.splits

    def __call__(self, given: MetricInput) -> tuple[Value, ...]:
        logits = given.samples.matrix().double()
        if logits.min() >= 0 and (logits.sum(dim=1) - 1).abs().max() < 1e-3:
            raise ValueError(
                f"{given.extractor.name} gives rows that sum to 1, which are probabilities: return logits, or the "
                "logarithms of the probabilities."
            )
        score = inception_score(torch.softmax(logits, dim=1), self.splits, self.seed)
        error = score.standard_deviation / math.sqrt(self.splits - 1) if self.splits > 1 else None
        name = f"classifier score ({given.extractor.name})"
        settings = {"splits": self.splits, "seed": self.seed}
        return (Value(name=name, value=score.mean, better=HIGHER, standard_error=error, settings=settings),)

    def cost(self, samples: int, references: int, held_out: int, dim: int) -> tuple[float, float]:  # noqa: ARG002
        return 0.0, samples
