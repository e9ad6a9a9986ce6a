"""What an evaluation found: scores with their protocol, some of the images, and an earlier evaluation beside them.

The file is JSON; the checksum covers the other entries, not their layout:

{"format": 1, "subject": "runs/digits-stf", "results": [{"values": [...], "protocol": {...}, ...}, ...], "checksum": "..."}
"""

import hashlib
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from stablefield._regular_file import JSON_LIMIT, open_regular, reason
from stablefield.evaluation._metric import HIGHER, LOWER
from stablefield.evaluation._protocol import Protocol, Score, ScoreComparison
from stablefield.report._cells import Cell, Estimate
from stablefield.report._chart import Chart
from stablefield.report._images import image_figure
from stablefield.report._page import (
    Block,
    Bullets,
    Figure,
    KeyFigure,
    KeyFigures,
    Page,
    Section,
    SideBySide,
    Table,
    Text,
    json_details,
)
from stablefield.report._result import Result

__all__ = ["Evaluation", "Pictures"]

_FORMAT = 1
_KEY_FIGURES = 4
_HASH_SHOWN = 12
_WIDTH = 80
_ARROWS = {LOWER: " ↓", HIGHER: " ↑"}
_BIASED = ("FID", "Frechet")
_NO_WEIGHTS = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """Images to look at."""

    images: NDArray[np.uint8]
    """Shape (n, C, H, W)."""
    labels: NDArray[np.int64] | None = None
    """Their classes, shape (n,), -1 for none; None for images without classes."""
    class_names: tuple[str, ...] | None = None
    """What the classes are called, if that is known."""

    def figure(self, what: str) -> Figure:
        """A grid of them.

        Raises:
            ImportError: if Pillow is not installed.
        """
        count = len(self.images)
        alt, caption = f"{count} {what} in a grid", f"{count} {what}."
        return image_figure(self.images, alt=alt, caption=caption, labels=self.labels, class_names=self.class_names)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Evaluation(Result):
    """Scores of samples against real images; `print` shows a table with the protocol beneath.

    Raises:
        ValueError: if there are no scores.
    """

    name: str
    """What was evaluated."""
    scores: tuple[Score, ...]
    """One per number; at least one."""
    samples: Pictures | None = None
    """Some of the samples."""
    references: Pictures | None = None
    """Some of the real images."""
    earlier: "Evaluation | None" = None
    """Another evaluation to compare with."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", tuple(self.scores))
        if not self.scores:
            raise ValueError("scores is empty: an evaluation has at least one number.")

    def __getitem__(self, metric: str) -> Score:
        """The score of that name, such as "FID".

        Raises:
            KeyError: if there is none, with those that there are.
        """
        found = {score.protocol.metric: score for score in self.scores}
        if metric not in found:
            raise KeyError(f"there is no score {metric!r}; there are {', '.join(found)}.")
        return found[metric]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` has written as JSON, without the images.

        Raises:
            ValueError: if there is no such file, it is damaged or of another format, or a record is not valid.
        """
        path = Path(path)
        try:
            with open_regular(path) as file:
                text = file.read(JSON_LIMIT + 1)
            if len(text) > JSON_LIMIT:
                raise ValueError(f"it has more than {JSON_LIMIT:,} bytes")
            record = json.loads(text)
            if record["format"] != _FORMAT:
                raise ValueError(f"its format is {record['format']}, this version reads {_FORMAT}")
            found = record.pop("checksum", None)
            # Files from before they carried one have these entries and no other.
            if found != _checksum(record) and (found is not None or set(record) != {"format", "subject", "results"}):
                raise ValueError("it is damaged: its checksum is not that of its content")
            return cls(name=str(record["subject"]), scores=tuple(map(Score.from_dict, record["results"])))
        # Besides what is missing or of another type: numbers beyond float64, and lists within lists a thousand deep.
        except (OSError, KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            why = (error.strerror or error) if isinstance(error, OSError) else reason(error)
            raise ValueError(
                f"{path} holds no results ({why}): name a file that `stablefield evaluate` or Evaluation.save wrote."
            ) from error

    def compare(self, earlier: "Evaluation | str | Path") -> Self:
        """The same evaluation with an earlier one, or its JSON file, beside it: its table and its page show both.

        Raises:
            ValueError: if the file holds no evaluation.
        """
        other = earlier if isinstance(earlier, Evaluation) else replace(Evaluation.load(earlier), name=str(earlier))
        return replace(self, earlier=other)

    def comparisons(self) -> list[ScoreComparison]:
        """Each score that the earlier evaluation has too, beside that."""
        others = {} if self.earlier is None else {score.protocol.metric: score for score in self.earlier.scores}
        pairs = ((score, others.get(score.protocol.metric)) for score in self.scores)
        return [ScoreComparison(first=a, second=b) for a, b in pairs if b is not None]

    def to_dict(self) -> dict[str, Any]:
        """Scores with their protocol and a checksum; neither images nor the earlier evaluation."""
        results = [score.to_dict() for score in self.scores]
        record: dict[str, Any] = {"format": _FORMAT, "subject": self.name, "results": results}
        return record | {"checksum": _checksum(record)}

    def charts(self) -> Mapping[str, Chart]:
        """None: the numbers are the result."""
        return {}

    # --- as text ------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        lines = [*self.protocol_lines(), *(f"note: {note}" for note in self.notes())]
        wrapped = (textwrap.fill(line, _WIDTH, subsequent_indent="  ", break_on_hyphens=False) for line in lines)
        parts = [self.table(), *wrapped]
        return "\n".join([*parts, "", self.comparison_table()] if self.earlier is not None else parts)

    def table(self) -> str:
        """A line per number, at most 80 columns; ↓ and ↑ say which direction is better."""
        repeated = len(self.scores[0].values) > 1
        rows = [
            ["↓ lower, ↑ higher is better", *(("minimum", "mean", "spread") if repeated else ("value",)), "std. error"]
        ]
        for score in self.scores:
            numbers = (score.minimum, score.mean, score.spread) if repeated else (score.mean,)
            error = "" if score.standard_error is None else f"± {score.standard_error:.2g}"
            name = _short(score.protocol.metric) + _ARROWS.get(score.better, "")
            rows.append([name, *map(_number, numbers), error])
        return _aligned(rows)

    def comparison_table(self) -> str:
        """The scores that the earlier evaluation has too, with a warning where they were measured differently."""
        if self.earlier is None:
            return ""
        found = self.comparisons()
        if not found:
            return f"warning: {self.earlier.name} has none of these numbers: nothing to compare with."
        rows = [[f"against {self.earlier.name}", "here", "there", "difference"]]
        for one in found:
            mark = "" if one.comparable else " (!)"
            name = _short(one.first.protocol.metric) + _ARROWS.get(one.first.better, "")
            means = (_number(score.mean) for score in (one.first, one.second))
            rows.append([name, *means, f"{one.difference:+.4g}{mark}"])
        return "\n".join([_aligned(rows), *(f"warning: {warning}" for warning in _warnings(found))])

    def protocol_lines(self) -> list[str]:
        """What was measured how: what the scores share, once per extractor and reference set."""
        lines = [
            line for score in self.scores for line in _protocol_lines(score.protocol, len(score.values), _HASH_SHOWN)
        ]
        return list(dict.fromkeys(lines))

    def notes(self) -> list[str]:
        """What to mind when these numbers are read."""
        return [
            f"{one.metric} on few samples is biased upwards, by about one over their number: compare this one with others "
            f"on {one.sample_count:,} samples only."
            for one in (score.protocol for score in self.scores)
            if one.metric.startswith(_BIASED) and min(one.sample_count, one.reference_count) < 10_000
        ]

    # --- as a page ----------------------------------------------------------------------------------------------------

    def page(self) -> Page:
        """The numbers, samples beside real images, the earlier evaluation, and every protocol.

        Raises:
            ImportError: if Pillow is not installed and there are images.
        """
        first = self.scores[0]
        repeats = len(first.values)
        blocks: list[Block] = [
            KeyFigures(tuple(_key_figure(score) for score in self.scores[:_KEY_FIGURES])),
            self._numbers(),
        ]
        figures = [
            pictures.figure(what)
            for pictures, what in ((self.samples, "samples"), (self.references, "real images"))
            if pictures is not None and len(pictures.images)
        ]
        if len(figures) > 1:
            blocks.append(Section("Samples beside real images", (SideBySide(tuple(figures)),)))
        elif figures:
            blocks.append(Section("Samples", tuple(figures)))
        if self.earlier is not None:
            blocks.append(Section("Against an earlier result", self._beside(self.earlier)))
        lines = dict.fromkeys(line for s in self.scores for line in _protocol_lines(s.protocol, len(s.values)))
        details = (json_details(f"Protocol of {s.protocol.metric}", s.to_dict()) for s in self.scores)
        blocks.append(Section("How it was measured", (Bullets(tuple(lines)), *details)))
        times = "" if repeats == 1 else f", the mean of {repeats} repeats"
        better = f" ({first.better})" if first.better else ""
        on = f"on {first.protocol.sample_count:,} samples{times}"
        return Page(
            title=f"Evaluation of {self.name}",
            summary=f"{first.protocol.metric}{better} is {first.mean:.4g} {on}.",
            blocks=tuple(blocks),
            footer=f"Made by stablefield evaluate {self.name}.",
        )

    def _numbers(self) -> Table:
        repeated = len(self.scores[0].values) > 1
        names = ("Minimum", "Mean", "Spread") if repeated else ("Value",)
        rows: list[tuple[Cell, ...]] = []
        for score in self.scores:
            numbers = (score.minimum, _cell(score), score.spread) if repeated else (_cell(score),)
            protocol = score.protocol
            counts = (protocol.sample_count, protocol.reference_count)
            rows.append((protocol.metric, *numbers, score.better.removesuffix(" is better") or None, *counts))
        return Table(
            columns=("Metric", *names, "Better", "Samples", "Real images"),
            rows=tuple(rows),
            caption="After ±: the standard error of one value over fresh samples, where the metric has one.",
            digits=4,
        )

    def _beside(self, earlier: "Evaluation") -> tuple[Block, ...]:
        found = self.comparisons()
        rows = tuple(
            (
                one.first.protocol.metric,
                one.first.mean,
                one.second.mean,
                one.difference,
                one.first.better.removesuffix(" is better") or None,
                "yes" if one.comparable else "no",
            )
            for one in found
        )
        if not rows:
            return (Text(f"{earlier.name} has none of these numbers."),)
        columns = ("Metric", "Here", "There", "Difference", "Better", "Measured alike")
        table = Table(columns=columns, rows=rows, caption=f"There: {earlier.name}.", digits=4)
        return (table, Bullets(tuple(warnings))) if (warnings := _warnings(found)) else (table,)


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _warnings(comparisons: Sequence[ScoreComparison]) -> list[str]:
    return list(dict.fromkeys(one.warning for one in comparisons if one.warning))


def _key_figure(score: Score) -> KeyFigure:
    count = len(score.values)
    notes = [score.better] if score.better else []
    if count > 1:
        notes.append(f"minimum {score.minimum:.4g}, spread {score.spread:.2g} over {count}")
    return KeyFigure(value=_cell(score), label=score.protocol.metric, note="; ".join(notes))


def _cell(score: Score) -> Cell:
    return score.mean if score.standard_error is None else Estimate(score.mean, score.standard_error)


def _protocol_lines(protocol: Protocol, repeats: int, digits: int = 64) -> list[str]:
    """The protocol as text, with that many digits of every checksum."""
    weights = "" if protocol.extractor_sha256 == _NO_WEIGHTS else f" (sha256 {protocol.extractor_sha256[:digits]})"
    lines = [
        f"{protocol.extractor}{weights}, resize {protocol.resize}: "
        f"{f'{repeats} x ' if repeats > 1 else ''}{protocol.sample_count:,} samples against {protocol.reference_count:,} of "
        f"{protocol.reference} ({protocol.split}; sha256 {protocol.reference_sha256[:digits]})"
    ]
    if protocol.sampler is not None:
        nfe = "" if protocol.nfe is None else f"{protocol.nfe:,.4g} network evaluations a sample (NFE)"
        steps = "" if protocol.steps is None else f"{protocol.steps:,} steps, "
        lines.append(f"{protocol.sampler}: {steps}{nfe}; seeds {', '.join(protocol.seeds)}; EMA {protocol.ema}")
    if protocol.commit is not None:
        lines.append(f"commit {protocol.commit}")
    return lines


def _short(name: str) -> str:
    """A metric's name for a column: "kernel distance (random convolutions (seed 0))" without the inner parentheses."""
    return re.sub(r" \([^()]*\)\)$", ")", name)


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left and cut where the table would be too wide, the others to the right."""
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    first = min(first, _WIDTH - sum(width + 2 for width in widths))
    lines: list[str] = []
    for name, *cells in rows:
        name = name if len(name) <= first else f"{name[: first - 1]}…"
        parts = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append("  ".join([name.ljust(first), *parts]).rstrip())
    return "\n".join(lines)
