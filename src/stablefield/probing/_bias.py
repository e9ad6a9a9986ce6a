r"""Is a target unbiased? A test that treats the target as a black box.

A target is unbiased if its expectation given what the network sees, $(x_t, t, c)$, is that of the source $x_0$. Then the
residual $r = \text{target} - x_0$ is orthogonal to every function of what the network sees:

$$ E\langle r,\, a(x_t, t, c) \rangle = 0 . $$

The test takes a list of directions a and several noise levels, and examines the mean of each product over many training
batches. The directions match common faults:

    noisy row        x_t / alpha - m, m the data's mean: leaving a source out pulls targets away from x_t, including it twice
                     pulls them towards it
    sharper mean     mean of the data (of the row's class) weighted as if the noise were 1 / sqrt(2) of its level, minus the
                     properly weighted mean: a target that includes the source twice moves in this direction
    class mean       mean of the class that the network sees, minus m: references of other classes pull away from it
    component k      principal axes of the data, plain and times tanh of the row's own coordinate along them

Any function of $(x_t, t, c)$ keeps the test valid: a wrongly computed direction costs power, not validity.

Rows of a batch share references and are not independent, so the unit is the batch: for each direction and level the batch
gives one number of mean 0, and the statistic is the largest |t| over all of them. Its null distribution comes from
flipping the signs of whole batches at random, which keeps the dependence between directions and levels. The result is one
p-value, corrected for their number. It is exact if a batch's numbers are symmetric about 0, and otherwise becomes exact with
many batches.

A target that passes may still have a bias too small to detect with this many rows.

References:
    Xu, Tong, Jaakkola, "Stable Target Field for Reduced Variance Score Estimation in Diffusion Models", ICLR 2023,
    section 4. Romano, Wolf, "Exact and Approximate Stepdown Methods for Multiple Hypothesis Testing", Journal of the
    American Statistical Association 2005 (the largest studentised statistic).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stablefield._shapes import array_of_numbers, check_callable, check_kind, number, per_row, whole_number
from stablefield.diffusion._process import EDM, Process
from stablefield.probing._population import Population
from stablefield.probing._variance import find_noise_levels, measure_variance
from stablefield.targets._engine.reference_matrix import ReferenceMatrix
from stablefield.targets._posterior import posterior
from stablefield.targets._target import Target

__all__ = ["BiasCheck", "TargetLike", "check_bias", "largest_t"]

# Principal axes among the directions, and samples from which to compute them.
_AXES, _FOR_AXES = 4, 1024
# Batches share the computation of their products, whose overhead would count: of at most so many rows and numbers.
_ROWS, _NUMBERS = 4096, 2**22


class TargetLike(Protocol):
    """Anything that makes a training target; a `StableTarget` is one."""

    def __call__(
        self,
        x0: Tensor,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        index: Tensor | None = None,
        *,
        reference_labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Target | Tensor:
        """The target of a batch: a `Target`, or the target for x0 itself, shape (B, ...).

        Args:
            x0: clean samples, shape (B, ...).
            x_t: noisy samples, shape (B, ...).
            t: times, shape (B,).
            labels: class that the network sees, integers (B,), -1 for none; None without classes.
            index: each row's index in the data, integers (B,).
            reference_labels: true class of each row, integers (B,); None without classes.
            generator: for random choices.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class BiasCheck:
    """The outcome of a test for bias.

    Attributes:
        passed: whether the p-value is above `false_alarm`.
        p_value: probability that an unbiased target shows as large a |t| anywhere.
        false_alarm: the rate at which unbiased targets fail.
        statistic: the largest |t|.
        direction: the direction of the largest |t|.
        noise_level: the noise level of the largest |t|.
        t: t statistic of every direction and noise level, shape (directions, L); 0 if the target is the source.
        directions: names of the directions.
        noise_levels: shape (L,).
        rows: number of training rows.
    """

    passed: bool
    p_value: float
    false_alarm: float
    statistic: float
    direction: str
    noise_level: float
    t: Tensor
    directions: tuple[str, ...]
    noise_levels: Tensor
    rows: int


@torch.no_grad()
def check_bias(
    target: TargetLike,
    population: Population,
    *,
    process: Process | None = None,
    noise_levels: Sequence[float] | Tensor | None = None,
    batch: int = 128,
    batches: int = 300,
    label_dropout: float = 0.0,
    false_alarm: float = 0.001,
    seed: int = 0,
) -> BiasCheck:
    """Test that `target` is unbiased on `population`, as a class-conditional target if it has labels.

    Args:
        target: the target to test.
        population: the data to draw rows from, without replacement within a batch.
        process: the process that the target was made for; EDM if None.
        noise_levels: where to test; if None, five in the middle phase, where references compete and faults show. Each batch
            has rows at all of them.
        batch: rows per batch, at most the population.
        batches: number of batches, which are the unit of the statistics.
        label_dropout: share of rows with a hidden class (labels -1), if there are labels.
        false_alarm: rate at which unbiased targets fail.
        seed: of rows, noise, references and sign flips.

    Raises:
        ValueError: if a number is out of its range, or the target returns another shape or something not finite.
    """
    check_callable("target", target, "target(x0, x_t, t), such as StableTarget(process, references=Pool(data))")
    check_kind("population", population, Population, "a Population of the data, Population(data)")
    number("false_alarm", false_alarm)
    number("label_dropout", label_dropout)
    whole_number("batch", batch, 1)
    whole_number("batches", batches)
    whole_number("seed", seed, 0)
    if not 0 < false_alarm < 1:
        raise ValueError(f"false_alarm is {false_alarm}: pass a probability between 0 and 1.")
    if not 0 <= label_dropout <= 1:
        raise ValueError(f"label_dropout is {label_dropout}: pass a probability from 0 to 1.")
    if batches < 20:
        raise ValueError(f"batches is {batches}: pass at least 20; the default is 300.")
    process = EDM() if process is None else process
    check_kind("process", process, Process, "a Process, such as EDM()")
    levels = _middle(population, seed) if noise_levels is None else array_of_numbers("noise_levels", noise_levels)
    levels = levels.to(torch.float64).flatten()
    batch = min(batch, len(population))
    if len(levels) == 0 or not bool(((levels > 0) & levels.isfinite()).all()):
        raise ValueError(f"noise_levels={levels.tolist()}: pass at least one, all positive and finite.")
    if batch < len(levels):
        if noise_levels is not None:
            raise ValueError(
                f"noise_levels has {len(levels)} levels for a batch of {batch} rows, each of which has one of them: pass at "
                f"most {batch} levels."
            )
        levels = levels[torch.linspace(0, len(levels) - 1, batch).round().long()]
    generator = torch.Generator().manual_seed(seed)
    device = population.data.device
    matrix, labels = ReferenceMatrix(population.data), population.labels
    directions = _Directions(population)
    place = torch.arange(batch) % len(levels)
    count = torch.bincount(place, minlength=len(levels))
    t = process.time(levels)[place].to(device)
    level = process.noise_level(t)

    def drawn() -> tuple[Tensor, Tensor, Tensor | None]:
        """Residuals of a batch, its rows divided by alpha, and the classes that the network sees."""
        index = _distinct(len(population), batch, generator).to(device)
        flat = matrix.rows(index, matrix.dtype)
        x0 = flat.reshape(batch, *population.data.shape[1:])
        x_t = process.perturb(x0, t, torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(device))
        truth = None if labels is None else labels[index].long()
        seen = truth
        if truth is not None and label_dropout > 0:
            hidden = (torch.rand(batch, generator=generator) < label_dropout).to(device)
            seen = truth.masked_fill(hidden, -1)
        found = target(x0, x_t, t, seen, index, reference_labels=truth, generator=generator)
        estimate = found.x0 if isinstance(found, Target) else found
        if estimate.shape != x0.shape or not bool(estimate.isfinite().all()):
            raise ValueError(
                f"the target has shape {tuple(estimate.shape)} for rows of shape {tuple(x0.shape)}, or is not finite: "
                "return one finite estimate of x0 for each row."
            )
        return (estimate - x0).flatten(1), (x_t / per_row(process.alpha(t), x0)).flatten(1), seen

    sums: list[Tensor] = []
    together = max(1, min(_ROWS // batch, _NUMBERS // (batch * population.dim)))
    for first in range(0, batches, together):
        residuals, rows, classes = zip(*(drawn() for _ in range(min(together, batches - first))), strict=True)
        seen = None if labels is None else torch.cat(classes)
        products = directions.products(torch.cat(residuals), torch.cat(rows), level.repeat(len(rows)), seen)
        total = torch.zeros(len(rows), len(levels), products.shape[1], dtype=torch.float64)
        sums.append(total.index_add_(1, place, products.double().cpu().unflatten(0, (len(rows), batch))))
    means = torch.cat(sums) / count[:, None]
    flat_t, p_value = largest_t(means.flatten(1), false_alarm, generator)
    table = flat_t.reshape(len(levels), -1).T
    top = int(table.abs().argmax())
    return BiasCheck(
        passed=p_value > false_alarm,
        p_value=p_value,
        false_alarm=false_alarm,
        statistic=float(table.abs().max()),
        direction=directions.names[top // len(levels)],
        noise_level=float(levels[top % len(levels)]),
        t=table,
        directions=directions.names,
        noise_levels=levels,
        rows=batch * batches,
    )


def largest_t(values: Tensor, false_alarm: float, generator: torch.Generator | None = None) -> tuple[Tensor, float]:
    """Test that all columns of `values` have mean 0, by the largest |t| and random signs of the rows.

    Args:
        values: independent rows, shape (T, M), float64.
        false_alarm: the rate to compare the p-value with; decides how many sign flips are drawn.
        generator: of the signs.

    Returns:
        The t statistics, shape (M,), 0 for a column of zeros; and the p-value, never below 1 / (1 + flips).
    """
    units = len(values)
    flips = max(1999, math.ceil(20 / false_alarm))
    # Scaled so that squares sum to 1, which sign flips do not change; zeros up to rounding count as 0.
    norm = values.square().sum(0).sqrt()
    scaled = torch.where(norm > 0, values / norm.clamp(min=torch.finfo(values.dtype).tiny), 0)
    observed = _studentised(scaled.sum(0), units)
    peak = float(observed.abs().max())
    beaten = 0
    for start in range(0, flips, 1000):
        signs = torch.randint(0, 2, (min(1000, flips - start), units), generator=generator).to(values) * 2 - 1
        beaten += int((_studentised(signs @ scaled, units).abs().amax(1) >= peak * (1 - 1e-9)).sum())
    return observed, (1 + beaten) / (1 + flips)


def _studentised(total: Tensor, units: int) -> Tensor:
    """T statistics from sums of `units` values whose squares sum to 1."""
    return total * ((units - 1) / (units - total**2).clamp(min=1e-12)).sqrt()


class _Directions:
    """The directions of a population."""

    def __init__(self, population: Population) -> None:
        self._data, self._matrix = population.data, ReferenceMatrix(population.data)
        self._labels = population.labels
        self._mean, self._class_means = _means(population)
        self._axes, self._spread = _axes(self._matrix, self._mean)
        axes = [f"component {k + 1}" for k in range(len(self._axes))]
        names = ["noisy row", "sharper mean", *axes, *(f"{name} x place" for name in axes)]
        self.names = (*names, *([] if self._labels is None else ["class mean"]))

    def products(self, residual: Tensor, row: Tensor, level: Tensor, seen: Tensor | None) -> Tensor:
        """Products of the residual with each direction, shape (B, directions).

        Every direction depends only on the row's own arguments. It must not depend on other rows of the batch: these are
        references, and their noisy versions reveal them.

        Args:
            residual: shape (B, d).
            row: x_t / alpha, shape (B, d).
            level: sigma / alpha, shape (B,).
            seen: class that the network sees, shape (B,), or None.
        """
        centred = row - self._mean
        along = residual @ self._axes.T
        own = centred @ self._axes.T
        width = (self._spread + level[:, None] ** 2).sqrt().to(own.dtype)
        sharp, plain = self._means_at(row, (0.5**0.5 * level, level), seen)
        columns = [
            (residual * centred).sum(1, keepdim=True),
            (residual * (sharp - plain)).sum(1, keepdim=True),
            along,
            along * torch.tanh(own / width),
        ]
        if seen is not None:
            towards = self._class_means[seen + 1] - self._mean
            columns.append((residual * towards).sum(1, keepdim=True))
        return torch.cat(columns, 1)

    def _means_at(self, row: Tensor, levels: Sequence[Tensor], seen: Tensor | None) -> Sequence[Tensor]:
        """Posterior means of the rows at each of several noise levels (B,), in one call."""
        data, many = self._data, len(levels)
        shaped = row.reshape(len(row), *data.shape[1:]).repeat(many, *[1] * (data.ndim - 1))
        labels = None if seen is None else self._labels
        own = None if seen is None else seen.repeat(many)
        found = posterior(shaped, 1.0, torch.cat(list(levels)), data, labels=own, reference_labels=labels)
        return found.mean.flatten(1).chunk(many)


def _middle(population: Population, seed: int) -> Tensor:
    """Five noise levels at which the posterior's variance is 3 % to 75 % of the data's, from a few rows."""
    grid = find_noise_levels(population, seed=seed)
    curve = measure_variance(population, grid, sizes=(), sources=min(64, len(population)), draws=2, seed=seed)
    share = curve.dsm.mean / curve.total
    inside = ((share > 0.03) & (share < 0.75)).nonzero()[:, 0]
    if not len(inside):
        inside = (share - 0.3).abs().argmin().reshape(1)
    low, high = grid[inside[0]].log(), grid[inside[-1]].log()
    return torch.linspace(float(low), float(high), 5, dtype=torch.float64).exp()


def _means(population: Population) -> tuple[Tensor, Tensor]:
    """Mean of the data, shape (d,), and the mean of each class k in row k + 1, with the data's in row 0 (no class)."""
    matrix = ReferenceMatrix(population.data)
    labels = population.labels
    kinds = 0 if labels is None else int(labels.max()) + 1
    total = torch.zeros(kinds + 1, matrix.dim, dtype=torch.float64)
    for where, rows in matrix.chunks(matrix.chunk_size(1), matrix.dtype):
        wide = rows.double().cpu()
        total[0] += wide.sum(0)
        if labels is not None:
            total.index_add_(0, labels[where].long().cpu() + 1, wide)
    count = torch.ones(kinds + 1, dtype=torch.float64)
    count[0] = len(matrix)
    if labels is not None:
        count[1:] = torch.bincount(labels.long().cpu(), minlength=kinds).clamp(min=1)
    means = (total / count[:, None]).to(population.data.device, matrix.dtype)
    return means[0], means


def _axes(matrix: ReferenceMatrix, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The first principal axes of the data, unit vectors, shape (axes, d), and the variances along them, (axes,)."""
    step = max(1, len(matrix) // _FOR_AXES)
    index = torch.arange(0, len(matrix), step, device=mean.device)[:_FOR_AXES]
    rows = matrix.rows(index, matrix.dtype) - mean
    wide = rows.double()
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    kept = values > 1e-9 * values[-1]
    most = vectors[:, kept][:, -_AXES:].T @ wide
    return (most / most.norm(dim=1, keepdim=True)).to(rows.dtype), values[kept][-_AXES:] / len(rows)


def _distinct(n: int, count: int, generator: torch.Generator) -> Tensor:
    if count**2 > n:
        return torch.randperm(n, generator=generator)[:count]
    while True:
        # A few out of many: most draws have no repeat, so draw again if there is one.
        drawn = torch.randint(n, (count,), generator=generator)
        if len(torch.unique(drawn)) == count:
            return drawn
