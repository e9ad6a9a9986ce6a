r"""The noise band: it begins at the noise level below which a row's own source has nearly all the weight.

At low noise only one reference could have made $x_t$, and the stable target is the single-sample one. Rows at such noise
levels need no references at all. The level depends only on the distances between samples. Beside the source, a reference at
distance $r s$ has at noise level $s$ the expected weight

$$ S(r) = E\left[ \frac{1}{1 + e^{r^2/2 - r z}} \right]
        = e^{-r^2/8}\, E\left[ \frac{1}{2 \cosh(r z / 2)} \right], \qquad z \sim N(0, 1), $$

and more references only reduce it, so on average the source loses to all of them a weight of at most

$$ L(s) = E_{\mathrm{source}} \min\Bigl(1, \sum_k S(|y_k - y_{\mathrm{source}}| / s)\Bigr), $$

which grows with $s$. If samples have prior weights $\pi$, sources are drawn with them, and a reference counts
$\max(1, \pi_k / \pi_{\mathrm{source}})$ times, or not at all if its weight is 0: it remains a bound, because
$\rho a / (1 + \rho a) \le \max(1, \rho)\, a / (1 + a)$.

A probe of the pool counts the distances from some of its samples to all others and finds the level at which this bound
reaches a tolerance. The probe only determines one number before training. The rule that uses it depends only on the noise
level, so the target stays exactly unbiased, whatever the number.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from stablefield._shapes import as_device, check_generator, check_kind, number, whole_number
from stablefield.targets._engine.matmul import full_precision
from stablefield.targets._engine.reference_matrix import ReferenceMatrix, wide_dtype
from stablefield.targets._pool import Pool

__all__ = ["NoiseBand", "pick_noise_band"]

# References that the probe measures; the others are taken in proportion.
_REFERENCES = 65_536
# Squared distances are counted in bins of a 64th of an octave, 0.5 % in distance.
_BINS_PER_OCTAVE = 64
# Octaves covered below the squared size of the data, where float32 can still resolve a distance, and above it.
_BELOW, _ABOVE = 18, 6
# Rows of each label that the probe takes, and samples of each at least, if it has more.
_ROWS_PER_LABEL, _FEWEST_OF_LABEL = 32, 256
# Labels beyond which they have one level, since the probe takes 3 ms for each.
_MOST_LABELS = 2048
# Half steps of a bin that the level may lie below the smallest distance and above the largest: a factor of 100.
_MARGIN = 850


@dataclass(frozen=True, kw_only=True)
class NoiseBand:
    """The noise band and the measurements behind it.

    Attributes:
        level: the noise level sigma / alpha for `StableTarget(noise_band=...)`, with labels that of rows that have one; 0 if
            no level is low enough (too many equal samples), infinite if the source has all the weight at every level (a
            single reference, or classes of one).
        tolerance: how far below 1 the bound on the mean source weight may be at the level.
        lost: bound on the mean weight lost at the level; at most the tolerance.
        rows: number of samples from which distances were counted.
        references: number of references to which they were counted.
        nearest: median distance of a row from its nearest reference, in units of the data; infinite without another one.
        by_label: the level of each label from 0 on, for a pool of up to 2,048 labels that is no part of a set (`total`);
            infinite for a label of one sample, or of none that can be drawn.
        unlabelled: the level of rows without a label, which compete with all references; None for a pool without labels.
    """

    level: float
    tolerance: float
    lost: float
    rows: int
    references: int
    nearest: float
    by_label: tuple[float, ...] | None = None
    unlabelled: float | None = None

    def __float__(self) -> float:
        return self.level

    def record(self) -> dict[str, Any]:
        """As JSON values: None stands for an infinite level or distance."""
        return {
            "level": _finite(self.level),
            "tolerance": self.tolerance,
            "lost": self.lost,
            "rows": self.rows,
            "references": self.references,
            "nearest": _finite(self.nearest),
            "by_label": None if self.by_label is None else [_finite(level) for level in self.by_label],
            "unlabelled": None if self.unlabelled is None else _finite(self.unlabelled),
        }


@torch.no_grad()
def pick_noise_band(
    pool: Pool,
    *,
    tolerance: float = 0.1,
    rows: int = 256,
    generator: torch.Generator | None = None,
    total: int | None = None,
    device: torch.device | None = None,
) -> NoiseBand:
    """Find the noise level below which the stable target is the single-sample one, up to a tolerance.

    A Gaussian posterior depends only on the noise level sigma / alpha, so the result holds for every process. For the
    heavier tails of `StudentTKernel` it is too high. If the pool has labels, only references of the row's own label compete;
    the result then has a level for each label, and one for rows whose label is dropped: pass the whole result as the
    `noise_band` of a `StableTarget` to use them. If the pool has weights, rows are drawn with them. For pools of more than
    65,536 samples, the probe uses that many of them and scales up their weight.

    Args:
        pool: the references.
        tolerance: how far below 1 the bound on the mean source weight may be, between 0 and 0.5; the weight itself loses
            less (on images a third to two thirds of it at 0.1). The loss is small: on CIFAR-10, going from 0.05 to 0.1 gives
            up 0.4 % of what references take from the loss, for a seventh of the rows (benchmarks/results/band.json).
        rows: number of samples from which to count distances to the references, at the cost of one matrix product.
        generator: draws the samples; by default one seeded with 0, so that a pool always has the same band.
        total: number of samples of the whole set, if the pool is a random part of it: `pick_noise_band(sharded.pool,
            total=sharded.total)` for a `ShardedPool`. Each rank may have its own band.
        device: where to compute, for a pool of a numpy array; a tensor is probed on its own device.

    Returns:
        The band's level with the measurements.

    Raises:
        ValueError: if `tolerance` is not between 0 and 0.5, `rows` is below 1, `total` below the pool, the data are not
            finite, or all weights of the shard of a `ShardedPool` are 0.
    """
    check_kind("pool", pool, Pool, "a Pool of the data, Pool(data)")
    number("tolerance", tolerance)
    whole_number("rows", rows)
    check_generator("generator", generator)
    if total is not None:
        whole_number("total", total)
    if not 0 < tolerance < 0.5:
        raise ValueError(f"tolerance is {tolerance}: pass how far below 1 the source weight may be, between 0 and 0.5.")
    if rows < 1:
        raise ValueError(f"rows is {rows}: pass at least 1.")
    if device is None:
        device = pool.data.device if isinstance(pool.data, Tensor) else torch.device("cpu")
    device = as_device("device", device)
    n = len(pool.data)
    if total is not None and total < n:
        raise ValueError(f"total is {total}, but the pool alone has {n} samples: pass the size of the whole set.")
    labels = None if pool.labels is None else pool.labels.to(device, torch.long)
    generator = generator or torch.Generator().manual_seed(0)
    weights = None if pool.weights is None else pool.weights.cpu().double()
    # Samples of weight 0 are never references.
    possible = torch.arange(n, device="cpu") if weights is None else weights.nonzero()[:, 0]
    count = len(possible)
    if count == 0:
        raise ValueError("the Pool's weights are all 0: probe the shard of a rank whose samples can be drawn.")
    some = possible
    if count > _REFERENCES:
        order = torch.randperm(count, generator=generator, device=generator.device).cpu()
        some = possible[order[:_REFERENCES].sort()[0]]
    matrix = _probed(pool, some, device)
    sides = len(matrix) // len(some)
    every = labels
    if len(some) < n:
        labels = None if labels is None else labels[some.to(device)]
    labels = None if labels is None else labels.repeat(sides)
    given, weights = weights, None if weights is None else weights[some].repeat(sides)
    index, shares = _drawn(len(matrix), weights, rows, generator)
    if not matrix.norms(torch.float32).finite:
        raise ValueError("the Pool's data hold NaN or inf (or overflow when squared): clean the data first.")
    with full_precision(device):
        wide = wide_dtype(device)
        prior = None if weights is None else weights.to(device, wide).clamp(min=torch.finfo(wide).tiny)
        counts, distances = _count(matrix, index.to(device), labels, prior, pool.mirrored)
    # How many references of a training step each counted one represents.
    if weights is None or pool.size is None:
        taken = pool.size or (total or n) * count / n
    else:  # drawn from all, besides the row's own
        taken = (count - 1) * pool.size / n + 1
    scale = (sides * taken - 1) / max(1, len(matrix) - 1)
    counts = counts * scale
    if pool.label_size is not None and every is not None and labels is not None:
        held = torch.bincount(every)[labels[index.to(device)]].cpu()
        counts = counts * (pool.label_size / held).clamp(max=1)[:, None]
    level = _level(counts, distances, shares, tolerance)
    first = torch.where(counts.sum(1) > 0, distances[(counts > 0).double().argmax(1)], torch.inf)
    band = NoiseBand(
        level=level,
        tolerance=tolerance,
        lost=_lost(counts, distances, shares, level),
        rows=len(index),
        references=len(matrix),
        nearest=_median(first, shares),
    )
    if labels is None or every is None:
        return band
    with full_precision(device):
        counts, distances = _count(matrix, index.to(device), None, prior, pool.mirrored)
        share = 1.0 if pool.unlabelled_size is None else pool.unlabelled_size / n
        unlabelled = _level(counts * scale * share, distances, shares, tolerance)
        # A part of a set does not know how many samples the others have of a label.
        by_label = (
            None if total is not None else _levels_by_label(pool, every.cpu(), given, device, tolerance, generator)
        )
    return replace(band, by_label=by_label, unlabelled=unlabelled)


def _probed(pool: Pool, index: Tensor, device: torch.device) -> ReferenceMatrix:
    """The samples at `index` (m,), and then their flipped ones, if they are references, too."""
    matrix = pool.matrix(device)
    some = matrix if len(index) == len(matrix) else matrix.take(index.to(device))
    if pool.flipped is None:
        return some
    other = ReferenceMatrix(pool.flipped, device)
    every = torch.arange(len(some), device=device)
    return ReferenceMatrix(torch.cat([some.stored(every), other.stored(index.to(device))]))


def _levels_by_label(
    pool: Pool,
    labels: Tensor,
    weights: Tensor | None,
    device: torch.device,
    tolerance: float,
    generator: torch.Generator,
) -> tuple[float, ...] | None:
    """The level of each label, from distances among the samples of that label; None for too many labels."""
    sizes = torch.bincount(labels).tolist()
    if len(sizes) > _MOST_LABELS:
        return None
    most = max(_FEWEST_OF_LABEL, _REFERENCES // len(sizes))
    found = [math.inf] * len(sizes)
    for label, members in enumerate(labels.argsort(stable=True).split(sizes)):
        members = members if weights is None else members[weights[members] > 0]
        number = len(members)
        # One sample that has no flipped one has all the weight at every level.
        if number * (1 + (pool.flipped is not None)) < 2:
            continue
        if number > most:
            order = torch.randperm(number, generator=generator, device=generator.device).cpu()
            members = members[order[:most].sort().values]
        part = _probed(pool, members, device)
        sides = len(part) // len(members)
        held = None if weights is None else weights[members].repeat(sides)
        rows, shares = _drawn(len(part), held, _ROWS_PER_LABEL, generator)
        prior = None if held is None else held.to(device, wide_dtype(device))
        counts, distances = _count(part, rows.to(device), None, prior, pool.mirrored)
        taken = number if pool.size is None else number * pool.size / len(labels)
        taken = taken if pool.label_size is None else min(taken, pool.label_size)
        found[label] = _level(
            counts * max(0.0, sides * taken - 1) / max(1, len(part) - 1), distances, shares, tolerance
        )
    return tuple(found)


def _drawn(n: int, weights: Tensor | None, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sources among n samples, and each one's share of the draws, (m,) each, m at most `rows`, on the CPU.

    All of them if they are few; otherwise distinct ones drawn uniformly, or as evenly as their weights (n,) allow.
    """
    device = generator.device
    if weights is None:
        index = torch.randperm(n, generator=generator, device=device)[:rows].cpu()
        return index, torch.full((len(index),), 1 / len(index), dtype=torch.float64, device="cpu")
    if n <= rows:
        return torch.arange(n, device="cpu"), weights / weights.sum()
    reached = weights.cumsum(0)
    start = torch.rand(1, generator=generator, device=device, dtype=torch.float64).cpu()
    drawn = torch.searchsorted(
        reached, (torch.arange(rows, device="cpu") + start) / rows * reached[-1], right=True
    ).clamp(max=n - 1)
    index, times = drawn.unique(return_counts=True)
    return index, times / times.sum().double()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _median(values: Tensor, shares: Tensor) -> float:
    ordered, order = values.sort()
    return float(ordered[shares[order].cumsum(0) >= 0.5 - 1e-9][0])


def _count(
    matrix: ReferenceMatrix, index: Tensor, labels: Tensor | None, weights: Tensor | None, mirrored: bool
) -> tuple[Tensor, Tensor]:
    """Count the references at each distance from each sample.

    Returns:
        Counts (m, bins) without the sample itself, and the distances of the bins (bins,), both float64 on the CPU. The first
        bin is distance 0.
    """
    own = matrix.rows(index, torch.float32)
    # Shifting all data does not change distances, and near zero they keep their digits.
    origin = own.mean(0)
    own = own - origin
    size = float(own.square().sum(1).max()) or 1.0
    bins = (_BELOW + _ABOVE) * _BINS_PER_OCTAVE
    shape = (-1, *matrix.data.shape[1:])
    images = [own, (own + origin).reshape(shape).flip(-1).reshape(own.shape) - origin] if mirrored else [own]
    counts = torch.zeros(len(own), bins, device=matrix.device)
    for where, moved in matrix.chunks(matrix.chunk_size(len(index)), torch.float32, origin):
        squares = moved.square().sum(1)
        for which, image in enumerate(images):
            gap = (squares + image.square().sum(1)[:, None]).addmm_(image, moved.T, alpha=-2)
            place = (gap.div_(size).clamp_(min=2.0**-_BELOW).log2_() + _BELOW).mul_(_BINS_PER_OCTAVE)
            place = place.round_().clamp_(max=bins - 1).long()
            one = torch.ones((), device=matrix.device).expand(place.shape)
            if labels is not None:
                one = (labels[index][:, None] == labels[where]).float()
            if weights is not None:
                # Clamp the ratio far beyond any number of references.
                one = one * (weights[where] / weights[index][:, None]).clamp(min=1, max=1e20).float()
            if which == 0:
                one = torch.where(torch.arange(where.start, where.stop, device=matrix.device) == index[:, None], 0, one)
            counts.scatter_add_(1, place, one)
    octaves = torch.arange(bins, dtype=torch.float64, device="cpu") / _BINS_PER_OCTAVE - _BELOW
    distances = (size * 2.0**octaves).sqrt()
    distances[0] = 0
    return counts.cpu().double(), distances


def _level(counts: Tensor, distances: Tensor, shares: Tensor, tolerance: float) -> float:
    # At an infinite level every reference has S = 1/2.
    if float((0.5 * counts.sum(1)).clamp(max=1) @ shares) <= tolerance:
        return math.inf
    # Levels and distances are on one grid, so the ratios are, too.
    step, table = 2 ** (0.5 / _BINS_PER_OCTAVE), _table()
    unit, bins, middle = float(distances[1]) / step, len(distances), len(table) // 2

    def lost(place: int) -> float:
        start = middle - place
        beside = torch.cat([table.new_full((1,), 0.5), table[start + 1 : start + bins]])
        return float((counts @ beside).clamp(max=1) @ shares)

    low, high = -_MARGIN, bins + _MARGIN
    if lost(low) > tolerance:
        return 0.0
    while high > low + 1:
        place = (low + high) // 2
        low, high = (place, high) if lost(place) <= tolerance else (low, place)
    return unit * step**low


@cache
def _table() -> Tensor:
    """S at the ratios 2^(k / 2 bins per octave), for k from -K to K."""
    most = (_BELOW + _ABOVE) * _BINS_PER_OCTAVE + 2 * _MARGIN
    return _beside(2.0 ** (torch.arange(-most, most + 1, dtype=torch.float64, device="cpu") / (2 * _BINS_PER_OCTAVE)))


def _lost(counts: Tensor, distances: Tensor, shares: Tensor, level: float) -> float:
    """The bound L on the mean weight lost at a noise level."""
    ratio = torch.zeros_like(distances) if math.isinf(level) else distances / max(level, 1e-300)
    return float((counts @ _beside(ratio)).clamp(max=1) @ shares)


def _beside(ratio: Tensor) -> Tensor:
    """S at the ratios (bins,), by the trapezoidal rule, which is exact up to rounding for such smooth functions."""
    z = torch.linspace(-8, 8, 257, dtype=torch.float64, device="cpu")
    density = torch.exp(-z.square() / 2) * ((z[1] - z[0]) / math.sqrt(2 * math.pi))
    # Beyond 30 the weight is below 1e-49, and the grid is too coarse for it.
    ratio = ratio.clamp(max=30)
    return torch.exp(-ratio.square() / 8) * ((0.5 / torch.cosh(ratio[:, None] * z / 2)) @ density)
