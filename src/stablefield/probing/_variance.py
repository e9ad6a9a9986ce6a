r"""The variance of training targets against the noise level, for one process and one data set.

With the exact posterior over the whole data set, weights $w$ and mean $\mu(x_t)$:

    V_DSM     E Tr Cov(x_0 | x_t)                   variance of the single-sample target
    V_STF(n)  E |STF target over n references - mu(x_t)|^2      variance left with n references; V_DSM for n = 1
    D         E D_f(p(x_0 | x_t) || p(x_0))         f(u) = u log u, in nats (see `_exact`)
    source    E w_source                            weight of the sample that made x_t
    ESS       E 1 / sum_k w_k^2

Variances are in squared units of the data, for the target of x0; multiplied by $\alpha^2 / \sigma^4$ they are those of the
score.

Expectations are over sources, noise and references. In a small set every sample is a source, in a large one a random part of
them; all noise levels share sources, noise and references, so that curves are smooth and levels comparable. The n references
of a set are the rows of a small batch and others drawn without replacement, as in a training step: for each row a uniformly
random set of n that includes its source. Rows of one set depend on each other, so errors are those between sets. V_STF is
measured in two ways, as the mean squared distance to $\mu$ and, by the law of total variance, as V_DSM minus the mean
posterior variance V over the set. The first is accurate if little is left, the second if little is removed; the two are
combined with the factor that minimises the variance.

References:
    Xu, Tong, Jaakkola, "Stable Target Field for Reduced Variance Score Estimation in Diffusion Models", ICLR 2023,
    section 3 (V_DSM and D) and section 4 (V_STF). The paper leaves f open.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield._progress import Progress
from stablefield._shapes import array_of_numbers, check_callable, check_kind, shape_of, whole_number
from stablefield.diffusion._process import EDM, Process
from stablefield.probing._exact import ExactPosterior
from stablefield.probing._population import Population
from stablefield.probing._series import Series
from stablefield.targets._posterior import Posterior

__all__ = ["SIZES", "VarianceCurve", "find_noise_levels", "measure_variance", "widened"]

SIZES = (16, 64, 256, 1024, 4096)
"""Sizes of reference sets that are measured by default."""

# Work of the default measurement: one to two minutes on two CPU cores.
_WORK = 4e12
# Work for one pair of a row and a sample besides the 4 d flops of its products, in flops that take as long: exp and sums.
_PER_PAIR = 1500
# Minimum and maximum of rows at each noise level, unless every sample is a source.
_FEWEST, _MOST = 64, 1024
# If every sample is a source, approximate number of rows per noise level, from several draws of the noise.
_ROWS = 4096
# Queries of one pass over the population.
_QUERIES = 2048
# A small population, whose passes are so short that each call's overhead counts: draws share a pass, of at most so many
# pairs and numbers, and reference sets a call, of at most so many pairs.
_SMALL, _PAIRS, _NUMBERS, _SET_PAIRS = 512, 2**20, 2**21, 2**16
# Minimum number of reference sets to draw for each size, and maximum number of rows that share one.
_SETS, _SHARING = 32, 64
# Largest ratio of neighbouring noise levels that may be interpolated, and of those chosen by default.
_STEP, _NEAR = 2.0, 1.9
# Shares of the data's variance that count as none below the lowest level, and as all of it above the highest.
_NONE, _ALL = 1e-3, 0.9
# float32 may have rounded a level.
_ROUNDED = 1 + 1e-5


@dataclass(frozen=True, kw_only=True)
class VarianceCurve:
    """The measured variances.

    Attributes:
        noise_level: sigma / alpha, increasing, shape (L,), float64.
        dsm: V_DSM.
        stf: V_STF(n) for each size n of a reference set below that of the population; for all of it, V_STF is 0.
        divergence: D in nats.
        source_weight: source weight in the whole population.
        ess: effective sample size in the whole population.
        score_factor: alpha^2 / sigma^4, which converts variances of the x0 target to those of the score, shape (L,).
        total: V_DSM at infinite noise: trace of the data's covariance (within classes if there are any).
        samples: size of the population.
        drawn_from: size of the set that it was drawn from; None if it is all of it.
        dim: numbers per sample, d.
        sources: distinct sources of rows.
        draws: noise draws for each source.
        seconds: time of the posteriors over the whole population.
    """

    noise_level: Tensor
    dsm: Series
    stf: dict[int, Series]
    divergence: Series
    source_weight: Series
    ess: Series
    score_factor: Tensor
    total: float
    samples: int
    drawn_from: int | None
    dim: int
    sources: int
    draws: int
    seconds: float

    @property
    def set_size(self) -> int:
        """Size of the data set, whether the population is all of it or a sample."""
        return self.samples if self.drawn_from is None else self.drawn_from

    @property
    def complete(self) -> bool:
        """Whether every sample of the population was a source."""
        return self.sources == self.samples

    @property
    def seconds_per_pair(self) -> float:
        """Measured time of a posterior on this machine for each pair of a row and a reference."""
        return self.seconds / (self.sources * self.draws * len(self.noise_level) * self.samples)

    def left(self, size: int) -> Series:
        """V_STF(size) / V_DSM at each noise level; nan if V_DSM is 0, and 0 for the whole population.

        Raises:
            ValueError: if the size was not measured.
        """
        if size >= self.samples:
            return Series(torch.zeros_like(self.noise_level), torch.zeros_like(self.noise_level))
        if size == 1:
            return Series(torch.ones_like(self.noise_level), torch.zeros_like(self.noise_level))
        if size not in self.stf:
            raise ValueError(
                f"size is {size}, which was not measured: pass one of {', '.join(map(str, self.stf))} and {self.samples}."
            )
        stf, dsm = self.stf[size], self.dsm
        ratio = stf.mean / dsm.mean
        return Series(ratio, torch.hypot(stf.error / dsm.mean, ratio * dsm.error / dsm.mean))

    def check_covers(self, noise_level: Tensor) -> None:
        """Check that the curve tells the variance at these noise levels, shape (L,), such as those of a training.

        Raises:
            ValueError: if some of them lie in a gap, or beyond an end where the variance is neither 0 nor that of the data.
        """
        at = noise_level.double().cpu()
        first, last = float(self.noise_level[0]), float(self.noise_level[-1])
        left_out = torch.zeros_like(at, dtype=torch.bool)
        if float(self.dsm.mean[0]) > _NONE * self.total:
            left_out |= at < first / _ROUNDED
        # Few sources may have less variance than the data.
        if float(self.dsm.mean[-1] + 3 * self.dsm.error[-1].nan_to_num(math.inf)) < _ALL * self.total:
            left_out |= at > last * _ROUNDED
        low, high = self.noise_level[:-1], self.noise_level[1:]
        for gap in (high > _STEP * _ROUNDED * low).nonzero()[:, 0].tolist():
            left_out |= (at > low[gap] * _ROUNDED) & (at < high[gap] / _ROUNDED)
        if bool(left_out.any()):
            there = at[left_out]
            raise ValueError(
                f"curve was measured at {len(self.noise_level)} noise levels from {first:.3g} to {last:.3g}, which say too "
                f"little about those of the training from {float(there.min()):.3g} to {float(there.max()):.3g}: measure "
                "without noise_levels, or at levels that span these, each at most twice the one below."
            )


@torch.no_grad()
def measure_variance(
    population: Population,
    noise_levels: Sequence[float] | Tensor | None = None,
    *,
    process: Process | None = None,
    sizes: Sequence[int] = SIZES,
    sources: int | None = None,
    draws: int | None = None,
    seed: int = 0,
    progress: Callable[[Progress], object] | None = None,
) -> VarianceCurve:
    """Measure the variance of targets.

    Args:
        population: the data.
        noise_levels: sigma / alpha, positive; `find_noise_levels` if None. A `Discrete` process takes the nearest.
        process: how data become noise; EDM if None. The variance of the x0 target does not depend on it.
        sizes: sizes of reference sets; those from 2 to below the population are measured.
        sources: samples to make rows from; by default all of a small population, else as many as two minutes allow.
        draws: noise draws for each source; chosen if None, at least 2 if every sample is a source, to estimate the error.
        seed: of all random draws.
        progress: called as sources are done.

    Raises:
        ValueError: if a noise level or a number is out of its range.
    """
    check_kind("population", population, Population, "a Population of the data, Population(data)")
    process = EDM() if process is None else process
    check_kind("process", process, Process, "a Process, such as EDM()")
    sizes = shape_of("sizes", sizes)
    whole_number("seed", seed, 0)
    if progress is not None:
        check_callable("progress", progress, "progress(report), with a Progress")
    for name, value in (("sources", sources), ("draws", draws)):
        if value is not None:
            whole_number(name, value)
    found = (
        find_noise_levels(population, seed=seed)
        if noise_levels is None
        else array_of_numbers("noise_levels", noise_levels)
    )
    asked = found.to(torch.float64).flatten()
    _check(asked, sizes, sources, draws)
    t = process.time(asked)
    level, order = process.noise_level(t).double().sort()
    # A table has one level for several that were asked for.
    distinct = level.diff(prepend=level[:1] - 1) > 0
    level, t = level[distinct], t[order][distinct]
    if not bool(((level > 0) & level.isfinite()).all()):
        raise ValueError(f"noise_levels={asked.tolist()}: under {process} they must be positive and finite.")
    n = len(population)
    sources, draws = _plan(population, len(level), sources, draws)
    whole = ExactPosterior(population.data, population.labels)
    job = _Job(process, t.to(population.data.device), whole, n, torch.Generator().manual_seed(seed))
    wanted = sorted({size for size in sizes if 1 < size < n})
    sharing = max(1, min(_SHARING, sources * draws // _SETS))
    small, queries = n <= _SMALL, _QUERIES
    if small:
        queries = max(queries, min(_PAIRS // n, _NUMBERS // population.dim))
    block = max(sharing, queries // len(level) // sharing * sharing)
    # Draws of all sources that one block holds.
    together = max(1, block // sources) if small else 1
    moments: list[list[Tensor]] = []
    gaps: dict[int, list[Tensor]] = {size: [] for size in wanted}
    rests: dict[int, list[Tensor]] = {size: [] for size in wanted}
    weights: dict[int, list[int]] = {size: [] for size in wanted}
    seconds, done = 0.0, 0
    chosen = torch.randperm(n, generator=job.generator)[:sources]
    for first in range(0, draws, together):
        count = min(together, draws - first)
        shuffled = torch.cat([torch.randperm(sources, generator=job.generator) for _ in range(count)])
        parts: list[Tensor] = []
        for index in chosen[shuffled].split(block):
            rows = job.rows(index)
            begun = time.perf_counter()
            exact = whole(rows.x_t, rows.alpha, rows.sigma, rows.source)
            seconds += time.perf_counter() - begun
            p = exact.posterior
            assert p.source_weight is not None
            columns = (p.variance, exact.divergence, p.source_weight, p.ess)
            parts.append(torch.stack([job.by_level(column) for column in columns]))
            for size in wanted:
                for own, sets in _shared(len(index), sources, min(sharing, size), size * len(level), small):
                    gap, rest = job.over_sets(rows.of(own, len(index)), p, index[own], own, len(index), size, sets)
                    gaps[size] += gap
                    rests[size] += rest
                    weights[size] += [(own.stop - own.start) // sets] * sets
            done += len(index)
            if progress is not None:
                progress(Progress(stage="measuring the variance", done=done, total=sources * draws))
        # Restore the order of the sources, so that draws of the same source align.
        joined = torch.cat(parts, 1).unflatten(1, (count, sources))
        for draw, order in enumerate(shuffled.split(sources)):
            moments.append([column[draw][order.argsort()] for column in joined])
    dsm, divergence, source_weight, ess = (
        Series.of_sources(torch.stack(column), complete=sources == n) for column in zip(*moments, strict=True)
    )
    alpha, sigma = process.alpha(t).double(), process.sigma(t).double()
    return VarianceCurve(
        noise_level=level,
        dsm=dsm,
        stf={
            size: Series.of_sets(
                torch.stack(gaps[size]), torch.stack(rests[size]), torch.tensor(weights[size]).double()
            )
            for size in wanted
        },
        divergence=divergence,
        source_weight=source_weight,
        ess=ess,
        score_factor=alpha**2 / sigma**4,
        total=population.variance(),
        samples=n,
        drawn_from=population.drawn_from,
        dim=population.dim,
        sources=sources,
        draws=draws,
        seconds=seconds,
    )


@torch.no_grad()
def find_noise_levels(population: Population, count: int = 21, *, seed: int = 0) -> Tensor:
    """Noise levels that span the three phases, evenly on a logarithmic axis, shape (`count` or more,), float64.

    From half the level where a few rows first show variance to where the posterior is the prior to about a percent: at high
    noise D is S^2 / 2 sigma^2 for data of spread S, and four times S is enough except for very few samples. A rare sample
    at a distance R from the mean counts in every row from about sigma = R on.

    Args:
        population: the data.
        count: how many; more if their ratio would be above 1.9.
        seed: of the rows.

    Raises:
        ValueError: if `count` is below 2.
    """
    check_kind("population", population, Population, "a Population of the data, Population(data)")
    whole_number("count", count)
    whole_number("seed", seed, 0)
    if count < 2:
        raise ValueError(f"count is {count}: pass at least 2.")
    total = population.variance()
    whole = ExactPosterior(population.data, population.labels)
    generator = torch.Generator().manual_seed(seed)
    job = _Job(EDM(), torch.zeros(1), whole, len(population), generator)
    low = math.sqrt(total) / 2
    top = max(
        population.radius(), math.sqrt(total) * max(4.0, 1.4 * math.sqrt(1 / (2 * 0.01 * math.log(len(population)))))
    )
    index = torch.randperm(len(population), generator=generator)[:32]
    # Near-duplicates have variance at all levels above their distance; 2^-12 of the spread is below what images resolve.
    for _ in range(12):
        job.t = torch.tensor([low], dtype=torch.float64, device=population.data.device)
        rows = job.rows(index)
        if float(whole(rows.x_t, rows.alpha, rows.sigma, rows.source).posterior.variance.mean()) < 1e-4 * total:
            break
        low /= 2
    count = max(count, 1 + math.ceil(math.log(2 * top / low) / math.log(_NEAR)))
    return torch.logspace(math.log10(low / 2), math.log10(top), count, dtype=torch.float64)


def widened(noise_level: Tensor, low: float, high: float) -> Tensor:
    """Noise levels (L,), increasing, with more on either side where these end short of `low` or `high`, both positive."""
    first, last = float(noise_level[0]), float(noise_level[-1])
    below, above = _spaced_levels(first, min(first, low)), _spaced_levels(last, max(last, high))
    return torch.cat([below.flip(0), noise_level, above])


def _spaced_levels(start: float, end: float) -> Tensor:
    """Levels from after `start` to `end`, at ratios of at most 1.9."""
    count = math.ceil(abs(math.log(end / start)) / math.log(_NEAR))
    return torch.logspace(math.log10(start), math.log10(end), count + 1, dtype=torch.float64)[1:]


@dataclass
class _Rows:
    """Noisy rows of b sources at L levels, level by level: row l b + i is source i at level l."""

    x_t: Tensor
    alpha: Tensor
    sigma: Tensor
    source: Tensor

    def of(self, own: slice, block: int) -> "_Rows":
        """The rows of some of the sources at all levels."""
        parts = [value.reshape(-1, block, *value.shape[1:])[:, own].flatten(0, 1) for value in vars(self).values()]
        return _Rows(*parts)


@dataclass
class _Job:
    process: Process
    t: Tensor
    whole: ExactPosterior
    population: int
    generator: torch.Generator

    def rows(self, index: Tensor) -> _Rows:
        matrix, levels = self.whole.matrix, len(self.t)
        device = matrix.data.device
        index = index.to(device)
        x0 = matrix.rows(index, matrix.dtype)
        noise = torch.randn(x0.shape, generator=self.generator, dtype=x0.dtype).to(device).repeat(levels, 1)
        t = self.t.repeat_interleave(len(index))
        x_t = self.process.perturb(x0.repeat(levels, 1), t, noise)
        shaped = x_t.reshape(len(x_t), *matrix.data.shape[1:])
        return _Rows(shaped, self.process.alpha(t), self.process.sigma(t), index.repeat(levels))

    def by_level(self, column: Tensor) -> Tensor:
        """Shape (L b,) to (b, L), in float64 on the CPU."""
        return column.double().cpu().reshape(len(self.t), -1).T

    def over_sets(
        self, rows: _Rows, exact: Posterior, index: Tensor, own: slice, block: int, size: int, sets: int
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """V_STF at each level from the rows of each set: squared distance to the exact mean, and V_DSM - V, (L,) each."""
        device = exact.mean.device
        shared = index.split(len(index) // sets)
        chosen = torch.cat([part for one in shared for part in (one, self.others(one, size - len(one)))]).to(device)
        place = (torch.arange(sets)[:, None] * size + torch.arange(len(shared[0]))).flatten().to(device)
        among = self.whole.among(chosen, sets)
        found = among(rows.x_t, rows.alpha, rows.sigma, place.repeat(len(self.t))).posterior
        mean = exact.mean.reshape(len(self.t), block, -1)[:, own].flatten(0, 1)
        variance = exact.variance.reshape(len(self.t), block)[:, own].flatten()
        gap = (found.mean.flatten(1) - mean).square().sum(1)
        gaps, rests = (
            self.by_level(value).unflatten(0, (sets, -1)).mean(1).unbind() for value in (gap, variance - found.variance)
        )
        return gaps, rests

    def others(self, own: Tensor, count: int) -> Tensor:
        """`count` random samples of the population that are not in `own`, without replacement."""
        if 4 * (count + len(own)) > self.population:
            free = torch.ones(self.population, dtype=torch.bool)
            free[own] = False
            left = free.nonzero()[:, 0]
            return left[torch.randperm(len(left), generator=self.generator)[:count]]
        # Draw with replacement and drop repeats until there are enough; this avoids a pass over the population.
        found = own
        while len(found) < count + len(own):
            drawn = torch.randint(self.population, (count,), generator=self.generator)
            fresh = drawn[~torch.isin(drawn, found)]
            found = torch.cat([found, fresh[_first_of_each(fresh)]])
        return found[len(own) : len(own) + count]


def _shared(rows: int, sources: int, sharing: int, pairs: int, small: bool) -> Iterator[tuple[slice, int]]:
    """Slices of a block's sources for which one call is made, and over how many sets; no set serves a source twice.

    Args:
        rows: sources in the block, which is whole draws of all sources or a part of one.
        sources: number of all sources.
        sharing: sources that share a set.
        pairs: of one source with its set, at all levels.
        small: whether sets share calls.
    """
    together = max(1, math.isqrt(_SET_PAIRS // (sharing * pairs))) if small else 1
    for draw in range(0, rows, sources):
        stop = min(draw + sources, rows)
        start, whole = draw, stop - (stop - draw) % sharing
        while start < whole:
            sets = min(together, (whole - start) // sharing)
            yield slice(start, start + sets * sharing), sets
            start += sets * sharing
        if whole < stop:
            yield slice(whole, stop), 1


def _first_of_each(values: Tensor) -> Tensor:
    """Indices of each value's first occurrence, in order: which repeats are dropped does not depend on the values."""
    kinds, place = torch.unique(values, return_inverse=True)
    first = torch.full((len(kinds),), len(values)).scatter_reduce(0, place, torch.arange(len(values)), "amin")
    return first.sort().values


def _plan(population: Population, levels: int, sources: int | None, draws: int | None) -> tuple[int, int]:
    n = len(population)
    affordable = int(_WORK / (levels * n * (4 * population.dim + _PER_PAIR)))
    if sources is None:
        rows = max(_FEWEST, min(_MOST, affordable))
        sources = n if 2 * n <= min(max(affordable, _FEWEST), 2 * _ROWS) else min(n, rows)
    sources = min(sources, n)
    if draws is None:
        # At least two draws if every sample is a source: then only the noise is random, and its spread must be measured.
        draws = max(2, -(-min(affordable, _ROWS) // n)) if sources == n else 1
    if sources == n and draws == 1:
        raise ValueError("draws is 1, with every sample as a source: pass at least 2, to estimate the error.")
    return sources, draws


def _check(levels: Tensor, sizes: Sequence[int], sources: int | None, draws: int | None) -> None:
    if len(levels) == 0 or not bool(((levels > 0) & levels.isfinite()).all()):
        raise ValueError(f"noise_levels={levels.tolist()}: pass at least one, all positive and finite.")
    if float(levels.min()) < 1e-60:
        raise ValueError(f"noise_levels={levels.tolist()}: pass 1e-60 or more; variances of the score overflow below.")
    if any(size < 1 for size in sizes):
        raise ValueError(f"sizes are {tuple(sizes)}: pass sizes of at least 1.")
    if sources is not None and sources < 3:
        raise ValueError(f"sources is {sources}: pass at least 3, to estimate the error.")
    if draws is not None and draws < 1:
        raise ValueError(f"draws is {draws}: pass at least 1.")
