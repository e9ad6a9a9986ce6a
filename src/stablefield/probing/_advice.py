r"""How many references to take: the variance that each size leaves in training, and its cost.

A training row at noise level s counts with the loss weight w(s). So the share of the targets' variance that a size n leaves,
as training sees it, is

$$ \frac{E_s[w(s) V_{STF}(n, s)]}{E_s[w(s) V_{DSM}(s)]} $$

over the distribution of the noise levels. Only rows in the noise band cost anything: two matrix products of
2 (rows) n d flops each.

This is for each row alone. Rows of a batch share their references, so `_batch` measures the variance of the batch's
gradient separately, and `advise` recommends a set only if it lowers that, too.

If no size does, the advice is the whole set. Of a population that is a sample, no size stands for all: with the sample as
references the variance is not 0, but unknown.
"""

from dataclasses import dataclass

from stablefield._shapes import check_kind, number
from stablefield.probing._batch import BatchVariance
from stablefield.probing._phases import share_above
from stablefield.probing._series import interpolate
from stablefield.probing._training import Training
from stablefield.probing._variance import VarianceCurve

__all__ = ["Advice", "SizeAdvice", "Training", "advise"]

# Points of the quadrature over the distribution of noise levels.
_POINTS = 4096


@dataclass(frozen=True, kw_only=True)
class SizeAdvice:
    """The effect of a reference set of one size.

    Attributes:
        size: n; of the whole set, its number of samples, whether the population is all of them or a sample.
        left: share of each row's variance that remains, weighted as in training.
        error: a bound on its standard error (the sum over levels).
        batch: variance of a batch's gradient when training starts, as a share of that with the single sample; None if not
            measured. Of the whole set, that with the whole population.
        batch_error: its standard error.
        flops: of the target per training step.
        seconds: of the target per training step on this machine, at the speed of the probe.
    """

    size: int
    left: float
    error: float
    batch: float | None
    batch_error: float | None
    flops: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The meaning of the measurement for a training run.

    Attributes:
        band: noise level where the band begins; 0 if it holds all levels, infinite if none.
        share: share of a batch in the band: the rows that can gain.
        sizes: every measured size, and the whole set, in order.
        recommended: the one to take.
        aim: share of the variance that may remain.
    """

    band: float
    share: float
    sizes: tuple[SizeAdvice, ...]
    recommended: SizeAdvice
    aim: float


def advise(
    curve: VarianceCurve,
    training: Training,
    *,
    band: float,
    batch: BatchVariance | None = None,
    aim: float = 0.1,
) -> Advice:
    """The smallest reference set that leaves at most `aim` of each row's variance and lowers that of the batch.

    Args:
        curve: the measurement; its noise levels must span those of the training.
        training: its noise levels and their weights.
        band: noise level from which rows use references, from `stablefield.pick_noise_band`.
        batch: the variance of the gradients of whole batches; without it, only rows decide.
        aim: share of the variance that may remain, between 0 and 1.

    Raises:
        ValueError: if `aim` is not between 0 and 1, `band` is negative, or the curve leaves out levels of the training.
    """
    check_kind("curve", curve, VarianceCurve, "what measure_variance returns")
    check_kind("training", training, Training, "a Training, such as Training()")
    number("band", band)
    if batch is not None:
        check_kind("batch", batch, BatchVariance, "what measure_batch returns, or None")
    number("aim", aim)
    if not 0 < aim < 1:
        raise ValueError(f"aim is {aim}: pass the share of the variance that may remain, between 0 and 1.")
    share = share_above(band, training.noise_levels, training.process)
    level = training.levels(_POINTS)
    curve.check_covers(level)
    weight = training.weighting(level).double()
    whole = float((weight * interpolate(level, curve.noise_level, curve.dsm.mean)).sum())
    sizes: list[SizeAdvice] = []
    for size in (*curve.stf, curve.set_size):
        left = error = 0.0
        if size in curve.stf and whole > 0:
            stf = curve.stf[size]
            left = float((weight * interpolate(level, curve.noise_level, stf.mean)).sum()) / whole
            error = float((weight * interpolate(level, curve.noise_level, stf.error.nan_to_num(0))).sum()) / whole
        pairs = training.batch * share * size
        seconds = pairs * curve.seconds_per_pair
        together = None if batch is None else batch.of(size, curve.samples)
        sizes.append(
            SizeAdvice(
                size=size,
                left=left,
                error=error,
                batch=None if together is None else float(together.mean),
                batch_error=None if together is None else float(together.error),
                flops=4 * pairs * curve.dim,
                seconds=seconds,
            )
        )
    recommended = next(
        entry
        for entry in sizes
        if entry.size >= curve.samples or (entry.left <= aim and (batch is None or _lowers(entry)))
    )
    return Advice(band=band, share=share, sizes=tuple(sizes), recommended=recommended, aim=aim)


def _lowers(entry: SizeAdvice) -> bool:
    """Whether references lower the variance of the batch by more than its error."""
    return entry.batch is not None and entry.batch + 2 * (entry.batch_error or 0.0) < 1
