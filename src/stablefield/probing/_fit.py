r"""How far a network is from the optimum: its squared distance to the exact posterior mean, against the noise level.

    distance    E |D(x_t / alpha; s) - mu(x_t)|^2
    loss        E |D(x_t / alpha; s) - x_0|^2  =  distance + V_DSM
    floor       V_DSM

The distance is measured directly, not as the difference of the other two, so it is accurate even where it is a small part of
the loss. All are in squared units of the data; `LossFloor` and its weighting convert them to those of a loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield._progress import Progress
from stablefield._shapes import array_of_numbers, check_callable, check_kind, flag, whole_number
from stablefield.diffusion._objective import DenoiserLike
from stablefield.probing._exact import ExactPosterior
from stablefield.probing._population import Population
from stablefield.probing._prediction import checked_output, evaluated
from stablefield.probing._series import Series

__all__ = ["Fit", "Optimum", "find_optimum", "measure_fit"]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A network compared with the exact posterior mean.

    Attributes:
        noise_level: sigma / alpha, shape (L,), float64.
        distance: mean squared distance to the posterior mean.
        loss: mean squared distance to the single sample.
        floor: V_DSM on the same rows.
        dim: numbers per sample, d.
        samples: size of the population.
        rows: rows at each noise level.
    """

    noise_level: Tensor
    distance: Series
    loss: Series
    floor: Series
    dim: int
    samples: int
    rows: int


@dataclass(frozen=True)
class _Part:
    """Rows of b sources: x0 and noise (b, d), their labels, and the posterior at each of L levels."""

    x0: Tensor
    noise: Tensor
    labels: Tensor | None
    mean: Tensor
    variance: Tensor


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """Noisy rows with the exact posterior mean at each, to compare any number of networks with.

    The posterior costs a pass over the population for every row, a network none, so make this once for several networks. It
    holds rows x levels x d numbers.

    Attributes:
        noise_level: sigma / alpha, shape (L,), float64, increasing.
        shape: of one sample.
        samples: size of the population.
    """

    noise_level: Tensor
    shape: tuple[int, ...]
    samples: int
    parts: tuple[_Part, ...]

    @torch.no_grad()
    def fit(
        self,
        denoiser: DenoiserLike,
        *,
        labelled: bool = False,
        progress: Callable[[Progress], object] | None = None,
    ) -> Fit:
        """Compare `denoiser`, in evaluation mode if it is a module, with the posterior mean.

        Args:
            denoiser: D(x, sigma, class_labels=None) in noise-to-signal units, on the device of the population.
            labelled: pass the labels to the network.
            progress: called as rows are done.

        Raises:
            ValueError: if labels are missing, or the network returns another shape.
        """
        found: list[Tensor] = []
        with evaluated(denoiser):
            for done, part in enumerate(self.parts):
                if labelled and part.labels is None:
                    raise ValueError("labelled is set, but the population has no labels: pass them.")
                levels = [self._at(k, part, denoiser, labelled) for k in range(len(self.noise_level))]
                found.append(torch.stack(levels, 2).double().cpu())
                if progress is not None:
                    progress(Progress(stage="measuring the network", done=done + 1, total=len(self.parts)))
        distance, loss, floor = (Series.of_sources(column[None], complete=False) for column in torch.cat(found, 1))
        return Fit(
            noise_level=self.noise_level,
            distance=distance,
            loss=loss,
            floor=floor,
            dim=self.parts[0].x0.shape[1],
            samples=self.samples,
            rows=sum(len(part.x0) for part in self.parts),
        )

    def _at(self, k: int, part: _Part, denoiser: DenoiserLike, labelled: bool) -> Tensor:
        """Distance, loss and floor of the rows at level k, shape (3, b)."""
        level = self.noise_level[k]
        x = (part.x0 + level.to(part.x0.dtype) * part.noise).reshape(-1, *self.shape)
        sigma = level.to(x.device).expand(len(x)).to(x.dtype)
        estimate = denoiser(x, sigma) if not labelled or part.labels is None else denoiser(x, sigma, part.labels)
        flat = checked_output("denoiser", estimate, x).to(part.x0.dtype).flatten(1)
        to_mean = (flat - part.mean[k]).square().sum(1)
        return torch.stack([to_mean, (flat - part.x0).square().sum(1), part.variance[k].to(to_mean)])


@torch.no_grad()
def find_optimum(
    population: Population,
    noise_levels: Sequence[float] | Tensor,
    *,
    rows: int = 512,
    batch: int = 256,
    seed: int = 0,
    progress: Callable[[Progress], object] | None = None,
) -> Optimum:
    """The exact posterior mean over `population` at noisy rows.

    Args:
        population: the training data; with labels, posteriors stay within classes.
        noise_levels: where to measure, positive, shape (L,).
        rows: number of sources, which share their noise over all levels; at most the population.
        batch: rows at a time.
        seed: of sources and noise.
        progress: called as rows are done.

    Raises:
        ValueError: if a noise level is not positive, or `rows` or `batch` is too small.
    """
    check_kind("population", population, Population, "a Population of the data, Population(data)")
    whole_number("rows", rows)
    whole_number("batch", batch)
    whole_number("seed", seed, 0)
    levels = array_of_numbers("noise_levels", noise_levels).to(torch.float64).flatten().sort().values
    if len(levels) == 0 or not bool(((levels > 0) & levels.isfinite()).all()):
        raise ValueError(f"noise_levels={levels.tolist()}: pass at least one, all positive and finite.")
    if progress is not None:
        check_callable("progress", progress, "progress(report), with a Progress")
    if rows < 2 or batch < 1:
        raise ValueError(f"rows is {rows}, batch is {batch}: pass at least 2 rows and a batch of 1.")
    device, shape = population.data.device, tuple(population.data.shape[1:])
    whole = ExactPosterior(population.data, population.labels)
    generator = torch.Generator().manual_seed(seed)
    parts: list[_Part] = []
    for index in torch.randperm(len(population), generator=generator)[:rows].split(batch):
        index = index.to(device)
        x0 = whole.matrix.rows(index, whole.matrix.dtype)
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(device)
        means: list[Tensor] = []
        variances: list[Tensor] = []
        for level in levels:
            sigma = level.to(device).expand(len(index))
            x = (x0 + level.to(x0.dtype) * noise).reshape(-1, *shape)
            exact = whole(x, torch.ones_like(sigma), sigma, index).posterior
            means.append(exact.mean.flatten(1))
            variances.append(exact.variance)
        labels = None if population.labels is None else population.labels[index]
        parts.append(_Part(x0, noise, labels, torch.stack(means), torch.stack(variances)))
        if progress is not None:
            done = sum(len(part.x0) for part in parts)
            progress(Progress(stage="measuring the optimum", done=done, total=min(rows, len(population))))
    return Optimum(noise_level=levels, shape=shape, samples=len(population), parts=tuple(parts))


def measure_fit(
    denoiser: DenoiserLike,
    population: Population,
    noise_levels: Sequence[float] | Tensor,
    *,
    labelled: bool = False,
    rows: int = 512,
    batch: int = 256,
    seed: int = 0,
    progress: Callable[[Progress], object] | None = None,
) -> Fit:
    """Compare `denoiser` with the posterior mean over `population`.

    The population should be the network's training data: other data have another posterior mean. Arguments and errors as for
    `find_optimum` and `Optimum.fit`, which this calls; call them yourself to share one optimum among several networks.
    """
    check_callable("denoiser", denoiser, "denoiser(x, sigma)")
    flag("labelled", labelled)
    check_kind("population", population, Population, "a Population of the data, Population(data)")
    if labelled and population.labels is None:
        raise ValueError("labelled is set, but the population has no labels: pass them.")
    if rows >= 2 and len(population) >= 2:
        # A network that does not fit is refused before the posteriors take their time.
        find_optimum(population, [1.0], rows=2, batch=1, seed=seed).fit(denoiser, labelled=labelled)
    found = find_optimum(population, noise_levels, rows=rows, batch=batch, seed=seed, progress=progress)
    return found.fit(denoiser, labelled=labelled, progress=progress)
