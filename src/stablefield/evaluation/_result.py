"""The result of an evaluation: scores with their protocol, some images, and an earlier evaluation to compare with.

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

from stablefield._regular_file import read_limited, reason
from stablefield.evaluation._metric import HIGHER, LOWER
from stablefield.evaluation._per_class import ClassScores, class_columns, class_notes
from stablefield.evaluation._protocol import Protocol, Score, ScoreComparison, score_of
from stablefield.report._cells import Cell, Estimate, text_table
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
_CLASS = 20
"""Columns that a class's name may take before it is cut."""
_ARROWS = {LOWER: " ↓", HIGHER: " ↑"}
_BIASED = ("FID", "Frechet")
_NO_WEIGHTS = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """Images to look at."""

    images: NDArray[Any]
    """Shape (n, C, H, W), C = 1 or 3; uint8 or floats."""
    labels: NDArray[np.int64] | None = None
    """Their classes, shape (n,), -1 for none; None for images without classes."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes, if known."""

    def figure(self, what: str) -> Figure:
        """A grid of the images.

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
    """Name of the evaluated run or images."""
    scores: tuple[Score, ...]
    """The scores; at least one."""
    classes: tuple[ClassScores, ...] = ()
    """The scores of each class, if asked for."""
    samples: Pictures | None = None
    """Some of the samples."""
    references: Pictures | None = None
    """Some of the real images."""
    earlier: "Evaluation | None" = None
    """Another evaluation to compare with."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", tuple(self.scores))
        if not self.scores:
            raise ValueError("scores is empty: pass at least one.")

    def __getitem__(self, metric: str) -> Score:
        """The score of that name, such as "FID".

        Raises:
            KeyError: if there is none; lists the others.
        """
        return score_of(self.scores, metric, "the evaluation")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read the JSON file of `save`, without the images.

        Raises:
            ValueError: if the file is missing, damaged or has another format, or a record is not valid.
        """
        path = Path(path)
        try:
            record = json.loads(read_limited(path))
            if record["format"] != _FORMAT:
                raise ValueError(f"its format is {record['format']}, this version reads {_FORMAT}")
            found = record.pop("checksum", None)
            # Older files without a checksum have exactly these entries.
            if found != _checksum(record) and (found is not None or set(record) != {"format", "subject", "results"}):
                raise ValueError("it is damaged: its checksum does not match its content")
            return cls(
                name=str(record["subject"]),
                scores=tuple(map(Score.from_dict, record["results"])),
                classes=tuple(map(ClassScores.from_dict, record.get("classes", ()))),
            )
        # Also catches numbers beyond float64, and lists nested a thousand deep.
        except (OSError, KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            why = (error.strerror or error) if isinstance(error, OSError) else reason(error)
            raise ValueError(
                f"{path} holds no results ({why}): name a file that `stablefield evaluate` or Evaluation.save wrote."
            ) from error

    def compare(self, earlier: "Evaluation | str | Path") -> Self:
        """This evaluation with an earlier one, or its JSON file, to compare with: table and page show both.

        Raises:
            ValueError: if the file holds no evaluation.
        """
        other = earlier if isinstance(earlier, Evaluation) else replace(Evaluation.load(earlier), name=str(earlier))
        return replace(self, earlier=other)

    def comparisons(self) -> list[ScoreComparison]:
        """Each score that the earlier evaluation has too, paired with that one."""
        others = {} if self.earlier is None else {score.protocol.metric: score for score in self.earlier.scores}
        pairs = ((score, others.get(score.protocol.metric)) for score in self.scores)
        return [ScoreComparison(first=a, second=b) for a, b in pairs if b is not None]

    def to_dict(self) -> dict[str, Any]:
        """Scores with their protocol and a checksum; neither images nor the earlier evaluation."""
        results = [score.to_dict() for score in self.scores]
        record: dict[str, Any] = {"format": _FORMAT, "subject": self.name, "results": results}
        if self.classes:
            record["classes"] = [one.to_dict() for one in self.classes]
        return record | {"checksum": _checksum(record)}

    def charts(self) -> Mapping[str, Chart]:
        """No charts: the numbers are the result."""
        return {}

    # --- as text and as a page ------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        lines = [*self.protocol_lines(), *(f"note: {note}" for note in self.notes())]
        wrapped = (textwrap.fill(line, _WIDTH, subsequent_indent="  ", break_on_hyphens=False) for line in lines)
        parts = [self.table(), *wrapped]
        parts[1:1] = ["", self.class_table(), ""] if self.classes else []
        return "\n".join([*parts, "", self.comparison_table()] if self.earlier is not None else parts)

    def table(self) -> str:
        """A line per number, at most 80 columns; ↓ and ↑ say which direction is better."""
        columns, rows = self._numbers()
        return _text([("↓ lower, ↑ higher is better", *columns[1:]), *rows])

    def class_table(self) -> str:
        """A line per class with its scores, at most 80 columns: further scores follow below; empty without classes."""
        if not self.classes:
            return ""
        head, rows = class_columns(self.classes)
        longest = max(len(str(line[0])) for line in (head, *rows))
        left, parts = min(_CLASS, longest) + sum(len(name) + 2 for name in head[1:3]), list[list[int]]()
        for column in range(3, len(head)):
            if not parts or left + sum(len(head[k]) + 2 for k in [*parts[-1], column]) > _WIDTH:
                parts.append([])
            parts[-1].append(column)
        tables = ([[line[k] for k in (0, 1, 2, *columns)] for line in (head, *rows)] for columns in parts or [[]])
        return "\n\n".join(map(_text, tables))

    def comparison_table(self) -> str:
        """The scores that both evaluations have, with a warning for different measurements."""
        if self.earlier is None:
            return ""
        rows, warnings = self._beside()
        if not rows:
            return f"warning: {self.earlier.name} has none of these numbers: nothing to compare with."
        marked = [(*row[:-2], f"{row[-2]:+.4g}{'' if row[-1] == 'yes' else ' (!)'}") for row in rows]
        table = _text([(f"against {self.earlier.name}", "here", "there", "difference"), *marked])
        return "\n".join([table, *(f"warning: {warning}" for warning in warnings)])

    def protocol_lines(self, digits: int = _HASH_SHOWN) -> list[str]:
        """The protocol as text, once per extractor and reference set.

        Args:
            digits: digits to show of every checksum.
        """
        lines = [line for one in self.scores for line in _protocol_lines(one.protocol, len(one.values), digits)]
        return list(dict.fromkeys(lines))

    def notes(self) -> list[str]:
        """Cautions for readers of these numbers."""
        return self._own_notes() + class_notes(self.classes)

    def _own_notes(self) -> list[str]:
        """The cautions without those for the scores of classes."""
        return [
            f"{one.metric} on few samples is biased upwards, by about one over their number: compare this one with others "
            f"on {one.sample_count:,} samples only."
            for one in (score.protocol for score in self.scores)
            if one.metric.startswith(_BIASED) and min(one.sample_count, one.reference_count) < 10_000
        ]

    def page(self) -> Page:
        """The numbers, samples beside real images, the earlier evaluation, and every protocol.

        Raises:
            ImportError: if Pillow is not installed and there are images.
        """
        first = self.scores[0]
        columns, rows = self._numbers()
        counts = [(score.protocol.sample_count, score.protocol.reference_count) for score in self.scores]
        numbers = Table(
            columns=(*columns, "Samples", "Real images"),
            rows=tuple((*row, *pair) for row, pair in zip(rows, counts, strict=True)),
            caption="↓ lower, ↑ higher is better. The standard error is that of one value over fresh samples.",
            digits=4,
        )
        blocks: list[Block] = [KeyFigures(tuple(_key_figure(score) for score in self.scores[:_KEY_FIGURES])), numbers]
        if notes := self._own_notes():
            blocks.append(Bullets(tuple(notes)))
        figures = [
            pictures.figure(what)
            for pictures, what in ((self.samples, "samples"), (self.references, "real images"))
            if pictures is not None and len(pictures.images)
        ]
        if len(figures) > 1:
            blocks.append(Section("Samples beside real images", (SideBySide(tuple(figures)),)))
        elif figures:
            blocks.append(Section("Samples", tuple(figures)))
        if self.classes:
            head, lines = class_columns(self.classes)
            table = Table(columns=tuple(head), rows=tuple(map(tuple, lines)), digits=4)
            cautions = class_notes(self.classes)
            blocks.append(Section("Class by class", (table, *([Bullets(tuple(cautions))] if cautions else []))))
        if self.earlier is not None:
            beside, warnings = self._beside()
            heads = ("Metric", "Here", "There", "Difference", "Measured alike")
            table = Table(columns=heads, rows=tuple(beside), caption=f"There: {self.earlier.name}.", digits=4)
            found: Block = table if beside else Text(f"{self.earlier.name} has none of these numbers.")
            added = (Bullets(tuple(warnings)),) if warnings else ()
            blocks.append(Section("Against an earlier result", (found, *added)))
        details = (json_details(f"Protocol of {s.protocol.metric}", s.to_dict()) for s in self.scores)
        blocks.append(Section("How it was measured", (Bullets(tuple(self.protocol_lines(64))), *details)))
        times = "" if len(first.values) == 1 else f", the mean of {len(first.values)} repeats"
        better = f" ({first.better})" if first.better else ""
        on = f"on {first.protocol.sample_count:,} samples{times}"
        return Page(
            title=f"Evaluation of {self.name}",
            summary=f"{first.protocol.metric}{better} is {first.mean:.4g} {on}.",
            blocks=tuple(blocks),
            footer=f"Made by stablefield evaluate {self.name}.",
        )

    def _numbers(self) -> tuple[tuple[str, ...], list[tuple[Cell, ...]]]:
        """Columns and rows of the table."""
        repeated = len(self.scores[0].values) > 1
        rows: list[tuple[Cell, ...]] = []
        for s in self.scores:
            error = "" if s.standard_error is None else f"± {s.standard_error:.2g}"
            rows.append((_title(s), *((s.minimum, s.mean, s.spread) if repeated else (s.mean,)), error))
        return ("Metric", *(("minimum", "mean", "spread") if repeated else ("value",)), "std. error"), rows

    def _beside(self) -> tuple[list[tuple[str, float, float, float, str]], list[str]]:
        """Rows of the scores that both evaluations have, and warnings for different measurements."""
        found = self.comparisons()
        rows = [
            (_title(one.first), one.first.mean, one.second.mean, one.difference, "yes" if one.comparable else "no")
            for one in found
        ]
        return rows, list(dict.fromkeys(one.warning for one in found if one.warning))


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _key_figure(score: Score) -> KeyFigure:
    count = len(score.values)
    notes = [score.better] if score.better else []
    if count > 1:
        notes.append(f"minimum {score.minimum:.4g}, spread {score.spread:.2g} over {count}")
    value = score.mean if score.standard_error is None else Estimate(score.mean, score.standard_error)
    return KeyFigure(value=value, label=score.protocol.metric, note="; ".join(notes))


def _protocol_lines(protocol: Protocol, repeats: int, digits: int) -> list[str]:
    """The protocol as text, with that many digits of every checksum."""
    weights = "" if protocol.extractor_sha256 == _NO_WEIGHTS else f" (sha256 {protocol.extractor_sha256[:digits]})"
    lines = [
        f"{protocol.extractor}{weights}, resize {protocol.resize}: "
        f"{f'{repeats} x ' if repeats > 1 else ''}{protocol.sample_count:,} samples against {protocol.reference_count:,} of "
        f"{protocol.reference} ({protocol.split}; sha256 {protocol.reference_sha256[:digits]})"
    ]
    if protocol.sampler is not None:
        nfe = "" if protocol.nfe is None else f"{protocol.nfe:,.4g} network evaluations per sample (NFE)"
        steps = "" if protocol.steps is None else f"{protocol.steps:,} steps, "
        lines.append(f"{protocol.sampler}: {steps}{nfe}; seeds {', '.join(protocol.seeds)}; EMA {protocol.ema}")
    if protocol.commit is not None:
        lines.append(f"commit {protocol.commit}")
    return lines


def _title(score: Score) -> str:
    """A metric's name, without the inner parentheses of "kernel distance (random convolutions (seed 0))", and an arrow."""
    return re.sub(r" \([^()]*\)\)$", ")", score.protocol.metric) + _ARROWS.get(score.better, "")


def _text(lines: Sequence[Sequence[Cell]]) -> str:
    """A table as text; cuts its first column to fit the width."""
    shown = [[*map(_shown, line)] for line in lines]
    room = _WIDTH - sum(max(map(len, column)) + 2 for column in [*zip(*shown, strict=True)][1:])
    head, *rows = ([name if len(name) <= room else f"{name[: room - 1]}…", *cells] for name, *cells in shown)
    return text_table(head, rows)


def _shown(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        if 0 < abs(cell) < 0.01:
            return f"{cell:.3g}"
        return f"{cell:.4f}" if abs(cell) < 10 else f"{cell:,.2f}"
    return str(cell)
