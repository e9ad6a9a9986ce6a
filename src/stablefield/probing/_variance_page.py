"""The page of a variance measurement, and its charts."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stablefield.probing._advice import Advice
from stablefield.probing._batch import BatchVariance
from stablefield.probing._label_shares import LabelShare, label_table
from stablefield.probing._phases import Phases
from stablefield.probing._record import advice_record, curve_record, phases_record
from stablefield.probing._series import Series
from stablefield.probing._variance import VarianceCurve
from stablefield.report import (
    Block,
    Code,
    Estimate,
    Figure,
    KeyFigure,
    KeyFigures,
    Line,
    LineChart,
    Page,
    Region,
    Section,
    Table,
    Text,
    json_details,
)

__all__ = ["phases_chart", "sizes_chart", "variance_chart", "variance_page"]

# The least share of the data's variance that a chart shows.
_LEAST = 1e-4


def variance_chart(curve: VarianceCurve, phases: Phases, advice: Advice) -> LineChart:
    """Variance of the targets against the noise level, as shares of the data's variance."""
    lines = [_line("single sample (DSM)", curve.noise_level, curve.dsm, curve.total, logarithmic=True)]
    lines += [
        _line(f"{size:,} references", curve.noise_level, curve.stf[size], curve.total, logarithmic=True)
        for size in _some(tuple(curve.stf), 5)
    ]
    return LineChart(
        lines=tuple(lines),
        x_label="noise level sigma / alpha",
        y_label="variance of the target / variance of the data",
        log_x=True,
        log_y=True,
        y_min=_LEAST,
        regions=_regions(curve, phases, advice.band),
    )


def phases_chart(curve: VarianceCurve, phases: Phases) -> LineChart:
    """The curves behind the three phases: V_DSM, divergence, source weight, and the variance of the score's target."""
    level = curve.noise_level
    score = curve.dsm.mean * curve.score_factor
    peak = score.max() if float(score.max()) > 0 else 1.0
    return LineChart(
        lines=(
            _line("V_DSM / variance of the data", level, curve.dsm, curve.total),
            _line("divergence D / log N", level, curve.divergence, math.log(curve.samples)),
            _line("source weight", level, curve.source_weight, 1.0),
            Line(label="V_DSM of the score / its largest", x=level.numpy(), y=(score / peak).numpy()),
        ),
        x_label="noise level sigma / alpha",
        y_label="share",
        log_x=True,
        y_min=0.0,
        y_max=1.1,
        regions=_regions(curve, phases, None),
    )


def sizes_chart(curve: VarianceCurve) -> LineChart | None:
    """V_STF(n) / V_DSM against n at several noise levels; None with fewer than two sizes."""
    sizes = [1, *curve.stf]
    if len(sizes) < 3:
        return None
    share = curve.dsm.mean / curve.total
    wanted = [int((share - part).abs().argmin()) for part in (0.1, 0.3, 0.6, 0.9)]
    x = torch.tensor(sizes, dtype=torch.float64)
    lines = []
    for place in sorted(set(wanted)):
        left = [curve.left(size) for size in sizes]
        mean = torch.stack([series.mean[place] for series in left])
        error = torch.stack([series.error[place] for series in left]).nan_to_num(0)
        if bool(mean.isfinite().all()) and bool((mean > 0).all()):
            label = f"noise level {float(curve.noise_level[place]):.2g}"
            lines.append(_line(label, x, Series(mean, error), 1.0))
    if not lines:
        return None
    lines.append(Line(label="1 / n", x=x.numpy(), y=(1 / x).numpy(), reference=True))
    return LineChart(
        lines=tuple(lines), x_label="references n", y_label="V_STF(n) / V_DSM", log_x=True, log_y=True, y_max=1.5
    )


def variance_page(
    name: str,
    description: str,
    curve: VarianceCurve,
    phases: Phases,
    advice: Advice,
    together: BatchVariance,
    sentences: Sequence[str],
    command: str,
    labels: Sequence[LabelShare] = (),
    *,
    as_given: bool = False,
) -> Page:
    """The page.

    Args:
        name: of the data.
        description: a line that describes them.
        curve: the measurement.
        phases: its phases.
        advice: the advice.
        together: the variance of the gradients of whole batches.
        sentences: the advice in words, line by line.
        command: the command that made it; empty if there is none.
        labels: what the rows of each label can gain.
        as_given: whether the data are floats that `train` would scale first.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    best = advice.recommended
    band = f"{advice.band:.3g}" if 0 < advice.band < math.inf else "everywhere" if advice.band == 0 else "nowhere"
    everything, is_sample = best.size >= curve.samples, curve.drawn_from is not None
    shown = _some(tuple(curve.stf), 4)
    size = f"all {curve.set_size:,}" if everything else f"{best.size:,}"
    left = 0.0 if everything else Estimate(best.left, best.error)
    # How much remains with as many of a larger set as fit is unknown.
    remains = (
        () if everything and is_sample else (KeyFigure(value=left, label="of each row's variance remains with them"),)
    )
    blocks: list[Block] = [
        KeyFigures(
            (
                KeyFigure(
                    value=band,
                    label="noise band from",
                    note="for these values as they are" if as_given else "as train uses it",
                ),
                KeyFigure(value=f"{advice.share:.1%}", label="of a training batch can gain", note="rows in the band"),
                KeyFigure(
                    value=size,
                    label="references recommended",
                    note="or as many as fit" if everything and is_sample else "",
                ),
                *remains,
            )
        ),
        Text("\n\n".join(sentences[1:])),
        Section(
            "Variance against noise level",
            (
                Figure(
                    variance_chart(curve, phases, advice),
                    alt="Variance of the target against the noise level, for the single sample and for sets of references. "
                    "All rise from nothing; the more references, the later and the lower.",
                    title="Variance of the target.",
                    caption=f"{_protocol(curve)} Bands: two standard errors."
                    + ("" if is_sample else " With all samples as references it is 0."),
                ),
                Table(
                    columns=(
                        "noise level",
                        "V_DSM",
                        *(f"left, n = {n:,}" for n in shown),
                        "source weight",
                        "ESS",
                        "D",
                    ),
                    rows=tuple(
                        (
                            float(curve.noise_level[i]),
                            _estimate(curve.dsm, i),
                            *(_left(curve, n, i) for n in shown),
                            float(curve.source_weight.mean[i]),
                            float(curve.ess.mean[i]),
                            float(curve.divergence.mean[i]),
                        )
                        for i in range(len(curve.noise_level))
                    ),
                    caption="V_DSM in squared units of the data, summed over its numbers; the share that n "
                    "references leave; source weight and effective sample size with all; D in nats. One standard error.",
                ),
            ),
        ),
        Section(
            "The three phases",
            (
                Figure(
                    phases_chart(curve, phases),
                    alt="Four curves between 0 and 1 against the noise level: source weight and divergence fall from 1 to "
                    "0, the variance rises from 0 to 1, and the variance of the score's target has a peak between.",
                    title="The quantities behind the phases.",
                    caption="D is the mean Kullback-Leibler divergence (f(u) = u log u) of the posterior from the prior.",
                ),
            ),
        ),
    ]
    blocks.append(Section("How many references", _sizes(curve, advice, together)))
    if labels:
        blocks.append(Section("Labels", (label_table(labels),)))
    blocks.append(
        Section(
            "Numbers",
            (
                *((Code(command),) if command else ()),
                json_details(
                    "Phases and advice", {"phases": phases_record(phases), "advice": advice_record(advice, together)}
                ),
                json_details("All figures", curve_record(curve)),
            ),
        )
    )
    return Page(
        title=f"Target variance of {name}",
        summary=sentences[0],
        blocks=tuple(blocks),
        footer=f"{description}. `{command}`" if command else description,
    )


def _sizes(curve: VarianceCurve, advice: Advice, together: BatchVariance) -> tuple[Block, ...]:
    """The variance of a row and of a batch's gradient that each size leaves, and its cost."""
    rows: list[tuple[str | float | Estimate | None, ...]] = [
        (f"the batch, {together.batch:,}", None, _estimate(together.in_batch, 0), None, None)
    ]
    for entry in advice.sizes:
        batch = None if entry.batch is None else Estimate(entry.batch, entry.batch_error or 0.0)
        rows.append(
            (
                f"all {entry.size:,}" if entry.size >= curve.samples else f"{entry.size:,}",
                Estimate(entry.left, entry.error) if entry.error else entry.left,
                batch if batch is None or batch.error else batch.value,
                entry.flops / 1e9,
                1000 * entry.seconds,
            )
        )
    table = Table(
        columns=("references", "row variance left", "gradient's variance", "Gflop per step", "ms per step here"),
        rows=tuple(rows),
        caption="What a training run sees. Row variance: the share of each row's variance that remains, weighted by noise "
        "levels and loss weights. Gradient's variance: that of the loss's gradient with respect to the network's output "
        f"when training starts, summed over {together.batch:,} rows, divided by that with the single sample. Rows share "
        "references, so it can be above 1, and it falls only with references well beyond the batch; a pool cannot be "
        "smaller than the batch."
        + (f" That with all is of the {curve.samples:,} sampled." if curve.drawn_from is not None else "")
        + " Cost: of the target for the rows in the band.",
        marked=1 + advice.sizes.index(advice.recommended),
    )
    chart = sizes_chart(curve)
    if chart is None:
        return (table,)
    figure = Figure(
        chart,
        alt="The share of the variance left against the number of references, falling towards one part in n.",
        title="More references.",
        caption="At high noise V_STF falls as 1 / n; where few samples compete, only sets that include them help.",
    )
    return (figure, table)


def _line(label: str, x: Tensor, series: Series, unit: float, *, logarithmic: bool = False) -> Line:
    y = series.mean / unit
    spread = 2 * series.error.nan_to_num(0) / unit
    low, high = y - spread, y + spread
    if logarithmic:
        # Points below the axis are not drawn; a line needs at least one point, so keep one entirely below it.
        hidden = y < _LEAST / 10
        y, high = y.masked_fill(hidden, math.nan), high.masked_fill(hidden, math.nan)
        low = low.masked_fill(hidden, math.nan)
        if bool(y.isnan().all()):
            y = torch.full_like(y, _LEAST / 10)
            low = high = y
    return Line(label=label, x=x.numpy(), y=y.numpy(), low=low.numpy(), high=high.numpy())


def _regions(curve: VarianceCurve, phases: Phases, band: float | None) -> tuple[Region, ...]:
    first, last = float(curve.noise_level[0]), float(curve.noise_level[-1])
    start = None if phases.single_below is None else phases.single_below.noise_level
    stop = None if phases.prior_above is None else phases.prior_above.noise_level
    found = []
    if start is not None and first < start:
        found.append(Region(label="one sample", stop=start))
    if start is None or stop is None or start < stop:
        found.append(Region(label="samples compete", start=start, stop=stop))
    if stop is not None and stop < last:
        found.append(Region(label="posterior = prior", start=stop))
    if band is not None and first < band < last:
        found.append(Region(label="noise band", start=band))
    return tuple(found)


def _protocol(curve: VarianceCurve) -> str:
    of = "" if curve.drawn_from is None else f" drawn from {curve.drawn_from:,}"
    if curve.complete:
        return f"Exact over all {curve.samples:,} samples{of}, each the source of {curve.draws} noisy rows per level."
    return f"Posteriors over {curve.samples:,} samples{of}; {curve.sources:,} of them are the sources of the rows."


def _estimate(series: Series, place: int) -> Estimate | float | None:
    mean, error = float(series.mean[place]), float(series.error[place])
    if not math.isfinite(mean):
        return None
    return Estimate(mean, error) if math.isfinite(error) and error > 0 else mean


def _left(curve: VarianceCurve, size: int, place: int) -> Estimate | float | None:
    # The ratio of two values near 0 is meaningless.
    return _estimate(curve.left(size), place) if curve.dsm.mean[place] > _LEAST * curve.total else None


def _some(sizes: tuple[int, ...], most: int) -> tuple[int, ...]:
    if len(sizes) <= most:
        return sizes
    places = torch.linspace(0, len(sizes) - 1, most).round().long().tolist()
    return tuple(sizes[place] for place in places)
