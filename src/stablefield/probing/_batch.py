r"""The variance of a batch's sum of targets, which determines that of the gradient.

References never raise the variance of one row's target. But the rows of a batch share them, so their targets are correlated,
and a training step follows the sum over rows:

$$ R = \frac{\operatorname{Tr} \operatorname{Var}(\sum_i \hat x_0^i)}{\operatorname{Tr} \operatorname{Var}(\sum_i x_0^i)} $$

over sources, noise levels, noise and references: the variance of the gradient of an output bias with the stable target,
divided by that with the single sample. With the batch as its own references R may exceed 1. With the whole data set the
targets are a fixed function of each noisy row, the rows are independent, and R = 1 - E[V_DSM] / Tr Cov(x_0), below 1.

Rows are drawn independently, so the denominator is known, B Tr Cov(x_0), and the batch's sum of x_0 serves as a control
variate. Rows below the noise band count with their single sample, as in training.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield._progress import Progress
from stablefield.probing._population import Population
from stablefield.probing._series import Series, interpolate
from stablefield.probing._training import Training
from stablefield.probing._variance import VarianceCurve
from stablefield.targets._engine.reference_matrix import ReferenceMatrix
from stablefield.targets._pool import Pool
from stablefield.targets._references import InBatch, References
from stablefield.targets._stable_target import StableTarget

__all__ = ["BatchVariance", "measure_batch"]

# Minimum and maximum of batches, and the work for a size in flops: a few seconds on two CPU cores.
_FEWEST, _MOST = 24, 128
_WORK = 5e10
# As in `_variance`: exp and sums for one pair, in flops that take as long.
_PER_PAIR = 1500
# Noise levels that represent the training distribution.
_POINTS = 4096


@dataclass(frozen=True, kw_only=True)
class BatchVariance:
    """Variances of a batch's sum of targets, as shares of that with the single sample.

    Attributes:
        batch: rows, B.
        in_batch: with the batch as its own references.
        pools: with a pool of each size above the batch and below the population.
        whole: with the whole population.
    """

    batch: int
    in_batch: Series
    pools: dict[int, Series]
    whole: Series

    def of(self, size: int, samples: int) -> Series | None:
        """With pools of `size` of `samples`; None if not measured, such as for pools smaller than the batch."""
        return self.whole if size >= samples else self.pools.get(size)


@torch.no_grad()
def measure_batch(
    population: Population,
    curve: VarianceCurve,
    training: Training,
    *,
    band: float,
    batches: int | None = None,
    seed: int = 0,
    progress: Callable[[Progress], object] | None = None,
) -> BatchVariance:
    """Measure how much the targets of a whole batch vary together.

    Args:
        population: the data.
        curve: their variance row by row; its sizes are measured, and its noise levels must span those of the training.
        training: rows per step and the distribution of their noise levels.
        band: noise level below which rows use only their source.
        batches: number of batches for each size; by default as many as a few seconds allow.
        seed: of all random draws.
        progress: called as sizes are done.

    Raises:
        ValueError: if `batches` is below 3, or the curve leaves out noise levels of the training.
    """
    if batches is not None and batches < 3:
        raise ValueError(f"batches is {batches}: pass at least 3, to estimate the error.")
    job = _Job(population, training, band)
    curve.check_covers(training.levels(_POINTS))
    n, rows = len(population), training.batch
    sizes = [size for size in curve.stf if rows < size < n]
    found: list[Series] = []
    for place, size in enumerate((rows, *sizes)):
        references = InBatch() if place == 0 else Pool(population.data, size, population.labels)
        pairs = max(1.0, job.share * rows) * size
        count = batches or int(min(_MOST, max(_FEWEST, _WORK / (pairs * (4 * population.dim + _PER_PAIR)))))
        found.append(job.measure(references, count, seed))
        if progress is not None:
            progress(Progress(stage="measuring batches", done=place + 1, total=1 + len(sizes)))
    return BatchVariance(
        batch=rows, in_batch=found[0], pools=dict(zip(sizes, found[1:], strict=True)), whole=job.whole(curve)
    )


class _Job:
    def __init__(self, population: Population, training: Training, band: float) -> None:
        self._population, self._training, self._band = population, training, band
        self._matrix = ReferenceMatrix(population.data)
        self._level = training.levels(_POINTS)
        self.share = float((self._level >= band).double().mean())
        # Rows come from all classes, so the denominator includes the variance between them.
        self._total = Population(population.data).variance() if population.labels is not None else population.variance()
        self._mean = _mean(self._matrix)

    def measure(self, references: References, batches: int, seed: int) -> Series:
        """R with these references, from this many batches."""
        population, training = self._population, self._training
        device, process, rows = population.data.device, training.process, training.batch
        # The rows are made here: to compare x_t with x0 and t would take a quarter of the time.
        target = StableTarget(process, references=references, noise_band=self._band, validate_args=False)
        generator = torch.Generator().manual_seed(seed)
        sums: list[Tensor] = []
        for _ in range(batches):
            index = torch.randint(len(population), (rows,), generator=generator)
            level = self._level[torch.randint(len(self._level), (rows,), generator=generator)]
            t = process.time(level).to(device)
            index = index.to(device)
            flat = self._matrix.rows(index, self._matrix.dtype)
            x0 = flat.reshape(rows, *population.data.shape[1:])
            x_t = process.perturb(x0, t, torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(device))
            labels = None if population.labels is None else population.labels[index]
            mean = target(x0, x_t, t, labels, index, generator=generator).x0
            sums.append(torch.stack([(part.flatten(1) - self._mean).double().sum(0) for part in (mean, flat)]))
        squares = torch.stack(sums).square().sum(2).cpu() / (rows * self._total)
        stable, single = squares[:, :1], squares[:, 1:]
        # The second estimate subtracts the deviation of the batch's sum of x_0 from its known variance.
        return Series.of_sets(stable, stable - single + 1, torch.ones(batches, dtype=torch.float64))

    def whole(self, curve: VarianceCurve) -> Series:
        """R with the whole population: the rows are independent."""
        inside = self._level >= self._band
        removed, error = (
            float(torch.where(inside, interpolate(self._level, curve.noise_level, values), 0).mean()) / self._total
            for values in (curve.dsm.mean, curve.dsm.error.nan_to_num(0))
        )
        return Series(torch.tensor([1 - removed]).double(), torch.tensor([error]).double())


def _mean(matrix: ReferenceMatrix) -> Tensor:
    total = torch.zeros(matrix.dim, dtype=torch.float64)
    for _, part in matrix.chunks(matrix.chunk_size(1), matrix.dtype):
        total += part.double().sum(0).cpu()
    return (total / len(matrix)).to(matrix.device, matrix.dtype)
