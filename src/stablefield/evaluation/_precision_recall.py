r"""Precision, recall, density and coverage: separate measures of fidelity and diversity.

The union of balls about the rows of a set represents the set; each ball reaches to the row's k-th nearest other row,
$B_k(x) = \{ z : |z - x| < \mathrm{NND}_k(x) \}$. With real rows $x_i$ (n), generated $y_j$ (m):

    precision    share of the y_j that lie in some B_k(x_i)
    recall       share of the x_i that lie in some B_k(y_j)
    density      mean over j of (number of B_k(x_i) that hold y_j) / k; may exceed 1
    coverage     share of the B_k(x_i) that hold some y_j

Each depends on n, m and k, and coverage of a perfect model is 1 - 2^-k or so, not 1, at n = m. The balls are open, as in
`prdc`, the reference implementation of Naeem et al.: the density of a set beside itself is then 1, not (k + 1) / k. Closed
balls, as Kynkaanniemi et al. write them, differ where distances are equal, as between copies. The ball of a row with k
copies is empty.

References:
    Kynkaanniemi, Karras, Laine, Lehtinen, Aila, "Improved Precision and Recall Metric for Assessing Generative Models",
    NeurIPS 2019, equations 1 and 2 (k = 3).
    Naeem, Oh, Uh, Choi, Yoo, "Reliable Fidelity and Diversity Metrics for Generative Models", ICML 2020, equations 2
    and 3 and lemma 1 (k = 5).
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield._shapes import check_tensor, whole_number
from stablefield.evaluation._features import checked_pair
from stablefield.evaluation._metric import HIGHER, Features, Metric, MetricInput, Value
from stablefield.evaluation._neighbours import blocks, others

__all__ = ["Coverage", "Density", "Precision", "Recall", "coverage", "density", "precision", "recall"]

# Two ways to the same distance differ by up to about this times |x|^2 + |y|^2, far below what float32 features resolve
# (6e-8): within it a point counts as on the sphere, outside the open ball.
_ROUNDING = 1e-12


def precision(real: Tensor, generated: Tensor, k: int = 3, *, radii: Tensor | None = None) -> float:
    """Share of generated rows inside the real manifold.

    Args:
        real: features of real images, shape (n, d), n > k.
        generated: features of generated images, shape (m, d), m > k.
        k: which neighbour the balls reach to.
        radii: squared radii of the balls about the real rows (for `recall`: the generated rows), shape (n,), if known; see
            `neighbours.others`.

    Raises:
        ValueError: if an array is not a valid feature array or has at most `k` rows, if the dimensions disagree, or k
            < 1.
    """
    real, generated = _checked(real, generated, k)
    return _share_inside(real, generated, k, radii)


def recall(real: Tensor, generated: Tensor, k: int = 3, *, radii: Tensor | None = None) -> float:
    """Share of real rows inside the generated manifold; arguments and errors as for `precision`."""
    real, generated = _checked(real, generated, k)
    return _share_inside(generated, real, k, radii)


def density(real: Tensor, generated: Tensor, k: int = 5, *, radii: Tensor | None = None) -> float:
    """Mean number of real balls about a generated row, over k; arguments and errors as for `precision`."""
    real, generated = _checked(real, generated, k)
    count = sum(int(held.sum()) for _, _, held in _held(real, generated, k, radii))
    return count / (k * len(generated))


def coverage(real: Tensor, generated: Tensor, k: int = 5, *, radii: Tensor | None = None) -> float:
    """Share of real balls with a generated row inside; arguments and errors as for `precision`."""
    real, generated = _checked(real, generated, k)
    covered = torch.zeros(len(real), dtype=torch.bool)
    for rows, _, held in _held(real, generated, k, radii):
        covered[rows] |= held.any(dim=1).cpu()
    return int(covered.sum()) / len(real)


def _share_inside(centres: Tensor, points: Tensor, k: int, radii: Tensor | None) -> float:
    """Share of the points inside a ball about some centre."""
    inside = torch.zeros(len(points), dtype=torch.bool)
    for _, columns, held in _held(centres, points, k, radii):
        inside[columns] |= held.any(dim=0).cpu()
    return int(inside.sum()) / len(points)


def _held(centres: Tensor, points: Tensor, k: int, radii: Tensor | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (rows of the centres, rows of the points, whether each ball holds each point) for every block."""
    if radii is None:
        radii = others(centres, k)[:, k - 1]
    check_tensor("radii", radii, floating=True, numbers=True)
    if radii.shape != centres.shape[:1] or radii.device != centres.device:
        raise ValueError(
            f"radii have shape {tuple(radii.shape)} on {radii.device}: pass one for each of the {len(centres)} centres on "
            f"{centres.device}."
        )
    for rows, columns, squared, scale in blocks(centres, points):
        yield rows, columns, squared < radii[rows, None] - _ROUNDING * scale


def _checked(real: Tensor, generated: Tensor, k: int) -> tuple[Tensor, Tensor]:
    whole_number("k", k)
    if k < 1:
        raise ValueError(f"k is {k}: pass 1 or more.")
    return checked_pair(
        ("real", "generated"), real, generated, k + 1, f"every row must have {k} neighbours of its own set"
    )


@dataclass(frozen=True)
class _OfBalls(Metric):
    k: int
    """Which neighbour the balls reach to."""

    @property
    def least(self) -> int:
        return self.k + 1

    @abstractmethod
    def _share(self, real: Features, samples: Features) -> float: ...

    def __call__(self, given: MetricInput) -> tuple[Value, ...]:
        share = self._share(given.references, given.samples)
        # Earlier versions used closed balls, whose numbers differ if distances are equal.
        settings = {"k": self.k, "balls": "open"}
        return (Value(name=type(self).__name__.lower(), value=share, better=HIGHER, settings=settings),)


@dataclass(frozen=True)
class Precision(_OfBalls):
    """Share of samples inside the real manifold."""

    k: int = 3

    def _share(self, real: Features, samples: Features) -> float:
        return precision(real.matrix(), samples.matrix(), self.k, radii=real.radii(self.k))


@dataclass(frozen=True)
class Recall(_OfBalls):
    """Share of real images inside the samples' manifold."""

    k: int = 3

    def _share(self, real: Features, samples: Features) -> float:
        return recall(real.matrix(), samples.matrix(), self.k, radii=samples.radii(self.k))

    def cost(self, samples: int, references: int, held_out: int, dim: int) -> tuple[float, float]:  # noqa: ARG002
        return 0.0, samples * (samples + references)


@dataclass(frozen=True)
class Density(_OfBalls):
    """Real balls about a sample."""

    k: int = 5

    def _share(self, real: Features, samples: Features) -> float:
        return density(real.matrix(), samples.matrix(), self.k, radii=real.radii(self.k))


@dataclass(frozen=True)
class Coverage(_OfBalls):
    """Share of real balls with a sample inside."""

    k: int = 5

    def _share(self, real: Features, samples: Features) -> float:
        return coverage(real.matrix(), samples.matrix(), self.k, radii=real.radii(self.k))
