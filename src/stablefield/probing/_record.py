"""Measurements as JSON values and as rows of a table."""

import math
from typing import Any

from stablefield.probing._advice import Advice
from stablefield.probing._batch import BatchVariance
from stablefield.probing._bias import BiasCheck
from stablefield.probing._fit import Fit
from stablefield.probing._phases import Edge, Phases
from stablefield.probing._series import Series
from stablefield.probing._text import finite
from stablefield.probing._variance import VarianceCurve

__all__ = ["advice_record", "bias_record", "curve_record", "curve_table", "fit_record", "fit_table", "phases_record"]


def curve_record(curve: VarianceCurve) -> dict[str, Any]:
    """The measurement: every figure per noise level, each with its standard error; None where there is none."""
    return {
        "samples": curve.samples,
        "drawn_from": curve.drawn_from,
        "numbers_per_sample": curve.dim,
        "sources": curve.sources,
        "every_sample_a_source": curve.complete,
        "noise_draws": curve.draws,
        "variance_of_the_data": curve.total,
        "divergence": "Kullback-Leibler, f(u) = u log u, in nats",
        "seconds": curve.seconds,
        "seconds_per_pair": curve.seconds_per_pair,
        "levels": _records(curve_table(curve)),
    }


def curve_table(curve: VarianceCurve) -> tuple[tuple[str, ...], tuple[tuple[float | None, ...], ...]]:
    """Column names, and a row of figures per noise level."""
    columns: dict[str, list[float | None]] = {"noise_level": _numbers(curve.noise_level)}
    _add(columns, "v_dsm", curve.dsm)
    for size, series in curve.stf.items():
        _add(columns, f"v_stf_{size}", series)
        _add(columns, f"share_left_{size}", curve.left(size))
    for name, series in (("divergence", curve.divergence), ("source_weight", curve.source_weight), ("ess", curve.ess)):
        _add(columns, name, series)
    columns["score_factor"] = _numbers(curve.score_factor)
    return tuple(columns), tuple(zip(*columns.values(), strict=True))


def phases_record(phases: Phases) -> dict[str, Any]:
    """The edges of the phases."""
    return {
        "one_sample_below": _edge(phases.single_below),
        "prior_above": _edge(phases.prior_above),
        "peak_of_the_score_target": phases.peak,
        "tolerance": phases.tolerance,
    }


def advice_record(advice: Advice, batch: BatchVariance) -> dict[str, Any]:
    """The advice for a training run."""
    return {
        "band_from": finite(advice.band),
        "share_of_batch_in_band": advice.share,
        "aim": advice.aim,
        "recommended_references": advice.recommended.size,
        "batch": batch.batch,
        "batch_variance_in_batch": float(batch.in_batch.mean),
        "batch_variance_in_batch_se": float(batch.in_batch.error),
        "sizes": [
            {
                "references": entry.size,
                "variance_left": entry.left,
                "standard_error_at_most": entry.error,
                "batch_variance": entry.batch,
                "batch_variance_se": entry.batch_error,
                "flops_per_step": entry.flops,
                "seconds_per_step_here": entry.seconds,
            }
            for entry in advice.sizes
        ],
    }


def fit_record(fit: Fit) -> dict[str, Any]:
    """A network compared with the optimum."""
    return {
        "samples": fit.samples,
        "numbers_per_sample": fit.dim,
        "rows_per_level": fit.rows,
        "levels": _records(fit_table(fit)),
    }


def fit_table(fit: Fit) -> tuple[tuple[str, ...], tuple[tuple[float | None, ...], ...]]:
    """Column names, and a row of figures per noise level."""
    columns: dict[str, list[float | None]] = {"noise_level": _numbers(fit.noise_level)}
    for name, series in (("distance_to_mean", fit.distance), ("loss", fit.loss), ("floor", fit.floor)):
        _add(columns, name, series)
    return tuple(columns), tuple(zip(*columns.values(), strict=True))


def bias_record(check: BiasCheck) -> dict[str, Any]:
    """The outcome of a test for bias."""
    return {
        "passed": check.passed,
        "p_value": check.p_value,
        "false_alarm": check.false_alarm,
        "largest_t": check.statistic,
        "direction": check.direction,
        "noise_level": check.noise_level,
        "rows": check.rows,
        "noise_levels": _numbers(check.noise_levels),
        "t": {name: _numbers(row) for name, row in zip(check.directions, check.t, strict=True)},
    }


def _edge(edge: Edge | None) -> dict[str, float | None] | None:
    if edge is None:
        return None
    return {
        "noise_level": edge.noise_level,
        "low": edge.low if edge.low > 0 else None,
        "high": edge.high if math.isfinite(edge.high) else None,
    }


def _add(columns: dict[str, list[float | None]], name: str, series: Series) -> None:
    columns[name] = _numbers(series.mean)
    columns[f"{name}_se"] = _numbers(series.error)


def _numbers(values: Any) -> list[float | None]:
    return [finite(value) for value in values.double().tolist()]


def _records(table: tuple[tuple[str, ...], tuple[tuple[float | None, ...], ...]]) -> list[dict[str, float | None]]:
    names, rows = table
    return [dict(zip(names, row, strict=True)) for row in rows]
