"""Targets with a planted fault, to see what the test for bias sees on one's own data.

Each has the signature of a `StableTarget` and a pool of `size` references; each is wrong in the one way that its name says.
"""

from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from stablefield.diffusion.process import EDM, Process
from stablefield.probing.population import Population
from stablefield.shapes import per_row
from stablefield.targets.pool import Pool
from stablefield.targets.posterior import posterior
from stablefield.targets.stable_target import StableTarget

__all__ = ["ClassesMixed", "SourceLeftOut", "SourceTwice"]


@dataclass(frozen=True)
class _Faulty:
    """A target over `size` samples of `population`, the whole of it if None."""

    population: Population
    size: int | None = None
    _: KW_ONLY
    process: Process = field(default_factory=EDM)


class SourceLeftOut(_Faulty):
    """References drawn from all samples but those that the batch was made from.

    A row whose class has no other sample keeps its own: there is nothing to get wrong.
    """

    def __call__(  # noqa: D102
        self,
        x0: Tensor,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        index: Tensor | None = None,
        *,
        reference_labels: Tensor | None = None,  # noqa: ARG002
        generator: torch.Generator | None = None,
    ) -> Tensor:
        data = self.population.data
        free = torch.ones(len(data), dtype=torch.bool, device=data.device)
        free[index] = False
        places = free.nonzero()[:, 0]
        chosen = places[torch.randperm(len(places), generator=generator).to(places.device)[: self.size]]
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        if labels is None or self.population.labels is None:
            return posterior(x_t, alpha, sigma, data[chosen]).mean
        groups = self.population.labels[chosen]
        served = ((labels[:, None] == groups).any(1) | (labels == -1)).nonzero()[:, 0]
        found = posterior(
            x_t[served], alpha[served], sigma[served], data[chosen], labels=labels[served], reference_labels=groups
        )
        return x0.index_copy(0, served, found.mean)


class ClassesMixed(_Faulty):
    """References of all classes, for a network that is told the class."""

    def __call__(  # noqa: D102
        self,
        x0: Tensor,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor | None = None,  # noqa: ARG002
        index: Tensor | None = None,
        *,
        reference_labels: Tensor | None = None,  # noqa: ARG002
        generator: torch.Generator | None = None,
    ) -> Tensor:
        stable = StableTarget(self.process, references=Pool(self.population.data, self.size))
        return stable(x0, x_t, t, index=index, generator=generator).x0


class SourceTwice(_Faulty):
    """Each row's source is among its references twice."""

    def __call__(  # noqa: D102
        self,
        x0: Tensor,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        index: Tensor | None = None,
        *,
        reference_labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        pool = Pool(self.population.data, self.size, self.population.labels)
        stable = StableTarget(self.process, references=pool)
        once = stable(x0, x_t, t, labels, index, reference_labels=reference_labels, generator=generator)
        # With a second copy the weights w become w / (1 + w_own), and the source's 2 w_own / (1 + w_own).
        own = per_row(once.source_weight, x0)
        return once.x0 + own / (1 + own) * (x0 - once.x0)
