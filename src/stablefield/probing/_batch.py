r"""The variance of the gradient of a batch, at the start of training, and the share of it that references leave.

References never raise the variance of one row's target. But the rows of a batch share them, so their targets are correlated,
and a training step follows the sum over rows. What it sums depends on the loss: with the weight $\lambda(s)$ of $|D -
\hat x_0|^2$ at the noise level s, and $D = c_{skip}(s)\, x + c_{out}(s)\, F$ with $\lambda c_{out}^2 = 1$, the gradient with
respect to the network's output F is $\sqrt\lambda\, (D - \hat x_0)$ up to a factor. Networks start with an output of 0, so
$D = c_{skip}\, x$, and we measure

$$ R = \frac{\operatorname{Tr} \operatorname{Var}(\sum_i \sqrt{\lambda_i}\, (\hat x_0^i - c_{skip}^i x^i))}
   {\operatorname{Tr} \operatorname{Var}(\sum_i \sqrt{\lambda_i}\, (x_0^i - c_{skip}^i x^i))} $$

over sources, noise levels, noise and references: the variance of the gradient of an output bias with the stable target,
divided by that with the single sample. `Training.preconditioning` says how c_skip follows from the loss weight.

Here $x = x_t / \alpha = x_0 + s \varepsilon$. Its noise stays in the gradient whatever the target is. With c_skip near 1, as
in noise prediction, it is most of the variance, and references can remove little.

With the batch as its own references R may exceed 1. With the whole data set the targets are a fixed function of each noisy
row, the rows are independent, and with the mean $m$ and the variance $v = \operatorname{Tr} \operatorname{Cov}(x_0)$

$$ R = 1 - E[\lambda V_{DSM}] / w \le 1, \qquad
   w = E[\lambda\, ((1 - c_{skip})^2 v + c_{skip}^2 s^2 d)] + |m|^2 \operatorname{Var}(\sqrt\lambda\, (1 - c_{skip})). $$

The last term, the variance between noise levels, is 0 for noise prediction and flows. Stratified noise levels remove it, and
then it is left out.

Rows are drawn independently, so the denominator is known, B w. The same sum with the single samples
serves as a control variate. Rows below the noise band count with their single sample, as in training.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield._progress import Progress
from stablefield.diffusion._noise_levels import uniform_numbers
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
    """Variances of a batch's gradient at the start of training, as shares of that with the single sample.

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
    """Measure how much the gradient of a whole batch varies at the start of training, with each set of references.

    Args:
        population: the data.
        curve: their variance row by row; its sizes are measured, and its noise levels must span those of the training.
        training: rows per step, the distribution of their noise levels, and the weights of the loss.
        band: noise level below which rows use only their source.
        batches: number of batches for each size; by default as many as a few seconds allow.
        seed: of all random draws.
        progress: called as sizes are done.

    Raises:
        ValueError: if `batches` is below 3, the curve leaves out noise levels of the training, or a weight of the loss is
            negative or not finite, or all are 0.
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
        total = Population(population.data).variance() if population.labels is not None else population.variance()
        self._mean = _mean(self._matrix)
        self._weight = training.weighting(self._level).double()
        if not bool((self._weight >= 0).all() and self._weight.isfinite().all() and self._weight.any()):
            raise ValueError(
                f"training.weighting is {training.weighting}, with weights from {float(self._weight.min()):g} to "
                f"{float(self._weight.max()):g}: pass one that is finite and not negative, and not 0 everywhere."
            )
        scalings = training.preconditioning
        self._skip = torch.zeros_like(self._level) if scalings is None else scalings(self._level).c_skip
        noise = (self._skip * self._level) ** 2 * population.dim
        # The mean of a row's gradient, as a multiple of that of the data. At stratified levels, its sum does not vary.
        slope = self._weight.sqrt() * (1 - self._skip)
        self._drift = torch.zeros_like(slope) if training.noise_levels.stratified else slope - slope.mean()
        between = float(self._mean.double().square().sum() * self._drift.square().mean())
        # Variance of a row's gradient with the single sample.
        self._single = float((self._weight * ((1 - self._skip) ** 2 * total + noise)).mean()) + between

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
            place = (uniform_numbers(training.noise_levels, rows, generator) * len(self._level)).long()
            t = process.time(self._level[place]).to(device)
            index = index.to(device)
            flat = self._matrix.rows(index, self._matrix.dtype)
            x0 = flat.reshape(rows, *population.data.shape[1:])
            noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(device)
            labels = None if population.labels is None else population.labels[index]
            mean = target(x0, process.perturb(x0, t, noise), t, labels, index, generator=generator).x0
            sums.append(torch.stack(self._gradients(place, flat, noise.flatten(1), mean.flatten(1))))
        squares = torch.stack(sums).square().sum(2).cpu() / (rows * self._single)
        stable, single = squares[:, :1], squares[:, 1:]
        # The second estimate subtracts the deviation of the single samples' sum from its known variance.
        return Series.of_sets(stable, stable - single + 1, torch.ones(batches, dtype=torch.float64))

    def _gradients(self, place: Tensor, x0: Tensor, noise: Tensor, target: Tensor) -> list[Tensor]:
        """The batch's sums of sqrt(lambda) (target - c_skip x), less their expectation: the stable target's, the x0's."""
        weight, skip, level = (values[place, None] for values in (self._weight, self._skip, self._level))
        # No row differs from its expectation by x0 itself, so data far from zero lose no digits.
        of_image, of_noise, removed = (
            (factor.to(part) * part).double().sum(0)
            for factor, part in (
                (weight.sqrt() * (1 - skip), x0 - self._mean),
                (weight.sqrt() * skip * level, noise),
                (weight.sqrt(), target - x0),
            )
        )
        single = of_image - of_noise + float(self._drift[place].sum()) * self._mean
        return [single + removed, single]

    def whole(self, curve: VarianceCurve) -> Series:
        """R with the whole population: the rows are independent."""
        weight = torch.where(self._level >= self._band, self._weight, 0)
        removed, error = (
            float((weight * interpolate(self._level, curve.noise_level, values)).mean()) / self._single
            for values in (curve.dsm.mean, curve.dsm.error.nan_to_num(0))
        )
        return Series(torch.tensor([1 - removed]).double(), torch.tensor([error]).double())


def _mean(matrix: ReferenceMatrix) -> Tensor:
    total = torch.zeros(matrix.dim, dtype=torch.float64)
    for _, part in matrix.chunks(matrix.chunk_size(1), matrix.dtype):
        total += part.double().sum(0).cpu()
    return (total / len(matrix)).to(matrix.device, matrix.dtype)
