r"""How far a network is from the optimum: its squared distance to the exact posterior mean, against the noise level.

    distance    E |D(x_t / alpha; s) - mu(x_t)|^2
    loss        E |D(x_t / alpha; s) - x_0|^2  =  distance + V_DSM
    floor       V_DSM

The distance is measured itself, not as the difference of the other two, so it is known well where it is a small part of the
loss. All are in squared units of the data; `LossFloor` and its weighting turn them into those of a loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield.diffusion.objective import DenoiserLike
from stablefield.probe.exact import ExactPosterior
from stablefield.probe.population import Population
from stablefield.probe.series import Series
from stablefield.shapes import array_of_numbers, check_callable, check_kind, check_tensor, flag, whole_number

__all__ = ["Fit", "measure_fit"]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A network held against the exact posterior mean.

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


@torch.no_grad()
def measure_fit(
    denoiser: DenoiserLike,
    population: Population,
    noise_levels: Sequence[float] | Tensor,
    *,
    labelled: bool = False,
    rows: int = 512,
    batch: int = 256,
    seed: int = 0,
) -> Fit:
    """Hold `denoiser` against the posterior mean over `population`.

    The population should be what the network was trained on: of other data, the posterior mean is another function.

    Args:
        denoiser: D(x, sigma, class_labels=None) in noise-to-signal units, on the device of the population.
        population: the training data; with groups, posteriors stay within classes.
        noise_levels: where to measure, positive, shape (L,).
        labelled: tell the network the groups as class labels.
        rows: sources drawn, the same with the same noise at every level; at most the population.
        batch: rows at a time.
        seed: of sources and noise.

    Raises:
        ValueError: if a noise level is not positive, `rows` or `batch` is too small, labels are missing, or the network
            returns another shape.
    """
    check_callable("denoiser", denoiser, "denoiser(x, sigma)")
    check_kind("population", population, Population, "a Population of the data, Population(data)")
    flag("labelled", labelled)
    whole_number("rows", rows)
    whole_number("batch", batch)
    whole_number("seed", seed, 0, 2**63)
    levels = array_of_numbers("noise_levels", noise_levels).to(torch.float64).flatten().sort().values
    if len(levels) == 0 or not bool(((levels > 0) & levels.isfinite()).all()):
        raise ValueError(f"noise_levels are {levels.tolist()}: pass at least one, all positive and finite.")
    if rows < 2 or batch < 1:
        raise ValueError(f"rows is {rows}, batch is {batch}: at least 2 rows and a batch of 1 are needed.")
    if labelled and population.group is None:
        raise ValueError("labelled is set, but the population has no groups: pass them, they are the class labels.")
    device = population.data.device
    whole = ExactPosterior(population.data, population.group)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(population), generator=generator)[:rows]
    shape = population.data.shape[1:]
    columns: list[list[Tensor]] = []
    for index in chosen.split(batch):
        index = index.to(device)
        x0 = whole.bank.rows(index, whole.bank.dtype)
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(device)
        labels = population.group[index] if labelled and population.group is not None else None
        for level in levels:
            sigma = level.to(device).expand(len(index))
            x = (x0 + level.to(x0.dtype) * noise).reshape(-1, *shape)
            exact = whole(x, torch.ones_like(sigma), sigma, index).posterior
            narrow = sigma.to(x.dtype)
            estimate = denoiser(x, narrow) if labels is None else denoiser(x, narrow, labels)
            check_tensor("the denoiser's output", estimate)
            if estimate.shape != x.shape:
                raise ValueError(
                    f"the denoiser returned shape {tuple(estimate.shape)} for rows of shape {tuple(x.shape)}: "
                    "they must be equal."
                )
            flat = estimate.to(x0.dtype).flatten(1)
            to_mean = (flat - exact.mean.flatten(1)).square().sum(1)
            columns.append([to_mean, (flat - x0).square().sum(1), exact.variance])
    parts = len(chosen.split(batch))
    distance, loss, floor = (
        torch.cat(
            [
                torch.stack([entry[k] for entry in columns[i * len(levels) : (i + 1) * len(levels)]], 1)
                for i in range(parts)
            ]
        )
        .double()
        .cpu()
        for k in range(3)
    )

    def series(values: Tensor) -> Series:
        return Series.of_sources(values[None], complete=False)

    return Fit(
        noise_level=levels,
        distance=series(distance),
        loss=series(loss),
        floor=series(floor),
        dim=population.dim,
        samples=len(population),
        rows=len(chosen),
    )
