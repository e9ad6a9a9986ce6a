"""The page of `stablefield evaluate`: the numbers, some of the images, an earlier result beside them, and every protocol."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stablefield.evaluation.protocol import Protocol
from stablefield.evaluation.result import Result, compare_all
from stablefield.report.cells import Cell, Estimate
from stablefield.report.images import image_figure
from stablefield.report.page import (
    Block,
    Bullets,
    KeyFigure,
    KeyFigures,
    Page,
    Section,
    Table,
    Text,
    json_details,
)

__all__ = ["Earlier", "evaluation_page"]

_KEY_FIGURES = 4


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """Results to compare with."""

    name: str
    """Where they are from."""
    results: tuple[Result, ...]
    """At least one."""


def evaluation_page(
    subject: str,
    results: Sequence[Result],
    *,
    images: NDArray[np.uint8] | None = None,
    labels: NDArray[np.int64] | None = None,
    class_names: Sequence[str] | None = None,
    earlier: Earlier | None = None,
    footer: str = "",
) -> Page:
    """The page.

    Args:
        subject: what was measured.
        results: at least one.
        images: some of the samples, shape (n, C, H, W), uint8.
        labels: their classes, shape (n,), -1 for none; None for samples without classes.
        class_names: what the classes are called, if that is known.
        earlier: results to compare with; where their protocols differ the page says so.
        footer: the last line.

    Raises:
        ValueError: if there are no results.
        ImportError: if Pillow is not installed and there are images.
    """
    if not results:
        raise ValueError("results is empty: a page is about at least one number.")
    first = results[0]
    repeats = len(first.values)
    blocks: list[Block] = [
        KeyFigures(tuple(_key_figure(result) for result in results[:_KEY_FIGURES])),
        _numbers(results),
    ]
    if images is not None and len(images):
        figure = image_figure(
            images,
            alt=f"{len(images)} samples in a grid",
            caption=f"The first {len(images)} samples.",
            labels=labels,
            class_names=class_names,
        )
        blocks.append(Section("Samples", (figure,)))
    if earlier is not None:
        blocks.append(Section("Against an earlier result", _comparison(results, earlier)))
    blocks.append(
        Section(
            "How it was measured",
            (
                Bullets(tuple(dict.fromkeys(line for result in results for line in _lines(result.protocol)))),
                *(json_details(f"Protocol of {result.protocol.metric}", result.to_dict()) for result in results),
            ),
        )
    )
    times = "" if repeats == 1 else f", the mean of {repeats} repeats"
    return Page(
        title=f"Evaluation of {subject}",
        summary=f"{first.protocol.metric} is {first.mean:.4g} on {first.protocol.sample_count:,} samples{times}.",
        blocks=tuple(blocks),
        footer=footer,
    )


def _key_figure(result: Result) -> KeyFigure:
    count = len(result.values)
    note = f"minimum {result.minimum:.4g}, spread {result.spread:.2g} over {count}" if count > 1 else ""
    return KeyFigure(value=_value(result), label=result.protocol.metric, note=note)


def _value(result: Result) -> Cell:
    return result.mean if result.standard_error is None else Estimate(result.mean, result.standard_error)


def _numbers(results: Sequence[Result]) -> Table:
    repeated = len(results[0].values) > 1
    columns = ("Metric", *(("Minimum", "Mean", "Spread") if repeated else ("Value",)), "Samples", "Real images")
    return Table(
        columns=columns,
        rows=tuple(
            (
                result.protocol.metric,
                *((result.minimum, _value(result), result.spread) if repeated else (_value(result),)),
                result.protocol.sample_count,
                result.protocol.reference_count,
            )
            for result in results
        ),
        caption="After ±: the standard error of one value over fresh samples, where the metric has one.",
        digits=4,
    )


def _comparison(results: Sequence[Result], earlier: Earlier) -> tuple[Block, ...]:
    found, messages = compare_all(results, earlier.results)
    rows: list[tuple[Cell, ...]] = []
    for result, other, comparison in found:
        verdict = "yes" if comparison.comparable else "no"
        rows.append((result.protocol.metric, result.mean, other.mean, comparison.difference, verdict))
    if not rows:
        return (Text(f"{earlier.name} has none of these numbers."),)
    columns = ("Metric", "Here", "There", "Difference", "Measured alike")
    table = Table(columns=columns, rows=tuple(rows), caption=f"There: {earlier.name}.", digits=4)
    return (table, Bullets(tuple(messages))) if messages else (table,)


def _lines(protocol: Protocol) -> list[str]:
    lines = [
        f"{protocol.extractor} (sha256 {protocol.extractor_sha256}), resize {protocol.resize}; real images "
        f"{protocol.reference}, {protocol.split} (sha256 {protocol.reference_sha256})."
    ]
    if protocol.sampler is not None:
        steps = "steps of its own choice" if protocol.steps is None else f"{protocol.steps} steps"
        nfe = "" if protocol.nfe is None else f", {protocol.nfe:.4g} network evaluations a sample"
        lines.append(
            f"Sampler {protocol.sampler}, {steps}{nfe}; seeds {', '.join(protocol.seeds)}; EMA {protocol.ema}; commit "
            f"{protocol.commit}."
        )
    return lines
