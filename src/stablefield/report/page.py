"""A page: what a report says, before it is drawn.

    Page(title, summary, blocks)      a block is Text, Bullets, a Table, a Figure, Details, a Section, ...

Every value is checked where it is made, so that a mistake shows in the line that made it and not in a browser: all raise
ValueError where something is empty or does not fit. Text is plain; between `backticks` it is set as code, and a blank line
begins a paragraph.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from stablefield.report.cells import Cell, check_cell
from stablefield.report.chart import Chart
from stablefield.shapes import check_kind

__all__ = [
    "Block",
    "Bullets",
    "Code",
    "Details",
    "Figure",
    "KeyFigure",
    "KeyFigures",
    "Page",
    "Section",
    "SideBySide",
    "Table",
    "Text",
    "json_details",
]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
DEEPEST = 5
"""Sections within sections: the page has the heading h1, and HTML ends at h6."""


def _filled(owner: str, name: str, value: str, remedy: str) -> None:
    if not value.strip():
        raise ValueError(f"{name}={value!r} of a {owner} is empty: {remedy}.")


@dataclass(frozen=True)
class Text:
    """One or more paragraphs."""

    text: str

    def __post_init__(self) -> None:
        _filled("Text", "text", self.text, "leave the block out")


@dataclass(frozen=True)
class Bullets:
    """A list of points."""

    items: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "items", _strings("Bullets", "items", self.items))


@dataclass(frozen=True)
class Code:
    """Text of fixed width, shown as it is: a command, JSON."""

    text: str

    def __post_init__(self) -> None:
        _filled("Code", "text", self.text, "leave the block out")


@dataclass(frozen=True, kw_only=True)
class KeyFigure:
    """One number to see first."""

    value: Cell
    label: str
    """What the number is."""
    note: str = ""
    """A second, smaller line: a unit, an interval, a condition."""

    def __post_init__(self) -> None:
        check_cell("value of a KeyFigure", self.value)
        if self.value is None:
            raise ValueError("value=None of a KeyFigure: leave the figure out, or pass a text such as 'not measured'.")
        if isinstance(self.value, str):
            _filled("KeyFigure", "value", self.value, "leave the figure out")
        _filled("KeyFigure", "label", self.label, "say what the number is")


@dataclass(frozen=True)
class KeyFigures:
    """The few numbers that answer the question, in large type."""

    figures: tuple[KeyFigure, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "figures", tuple(self.figures))
        if not self.figures:
            raise ValueError("figures of KeyFigures is empty: pass at least one KeyFigure.")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under column titles. The first column names its row; columns of numbers are set on their decimal points."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    """Cells: numbers are shown to `digits` significant digits, integers in full, strings as they are."""
    caption: str = ""
    digits: int = 3
    marked: int | None = None
    """Index of a row to set off from the others: a recommendation, the best."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", _strings("Table", "columns", self.columns))
        object.__setattr__(self, "rows", tuple(tuple(row) for row in self.rows))
        if not self.rows:
            raise ValueError("rows of a Table is empty: pass at least one row, or leave the table out.")
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"row {i} of a Table has {len(row)} cells, but there are {len(self.columns)} columns: "
                    "pass one cell per column, None for an empty one."
                )
            for title, cell in zip(self.columns, row, strict=True):
                check_cell(f"cell {title!r} of row {i} of a Table", cell)
        if self.digits < 1:
            raise ValueError(f"digits={self.digits} of a Table: show at least one significant digit.")
        if self.marked is not None and not 0 <= self.marked < len(self.rows):
            raise ValueError(f"marked={self.marked} of a Table: its rows are 0 to {len(self.rows) - 1}.")

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers (and gaps) alone."""
        cells = [row[column] for row in self.rows if row[column] is not None]
        return bool(cells) and not any(isinstance(cell, str) for cell in cells)


@dataclass(frozen=True)
class Figure:
    """A picture: a chart, or the bytes of a PNG file."""

    picture: Chart | bytes
    """A chart is drawn when the page is rendered, which needs matplotlib."""
    _: KW_ONLY
    alt: str
    """What the picture shows, in words, for those who do not see it."""
    caption: str = ""
    title: str = ""
    """Set in bold in front of the caption."""

    def __post_init__(self) -> None:
        _filled("Figure", "alt", self.alt, "say in a sentence what the picture shows")
        check_kind("picture of a Figure", self.picture, (Chart, bytes), "a chart, or the bytes of a PNG file")
        if isinstance(self.picture, bytes):
            if not self.picture.startswith(PNG_SIGNATURE):
                raise ValueError(f"picture of a Figure begins with {self.picture[:8]!r}: pass the bytes of a PNG file.")
            if len(self.picture) < 24 or 0 in self.size:
                raise ValueError("picture of a Figure has no pixels: pass the bytes of a whole PNG file.")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a PNG in pixels; (0, 0) of a chart, which has no pixels."""
        if not isinstance(self.picture, bytes):
            return (0, 0)
        # After the signature and the length and name of the first chunk.
        width, height = struct.unpack(">II", self.picture[16:24])
        return (width, height)


@dataclass(frozen=True)
class SideBySide:
    """Figures to compare, such as real images and samples, beside each other where the screen is wide enough."""

    figures: tuple[Figure, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "figures", tuple(self.figures))
        if len(self.figures) < 2:
            raise ValueError(f"figures of SideBySide are {len(self.figures)}: pass at least two, or a Figure alone.")


@dataclass(frozen=True)
class Details:
    """Blocks behind a line that opens and closes them. On paper they are open."""

    summary: str
    blocks: "tuple[Block, ...]"

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        _filled("Details", "summary", self.summary, "say what opens")
        if not self.blocks:
            raise ValueError(f"blocks of Details {self.summary!r} is empty: pass at least one block.")


@dataclass(frozen=True)
class Section:
    """Blocks under a heading. A section in a section has a smaller heading."""

    title: str
    blocks: "tuple[Block, ...]"

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        _filled("Section", "title", self.title, "give it a heading")
        if not self.blocks:
            raise ValueError(f"blocks of Section {self.title!r} is empty: pass at least one block.")


Block = Text | Bullets | Code | KeyFigures | Table | Figure | SideBySide | Details | Section
"""What pages, sections and details are made of."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole report."""

    title: str
    summary: str
    """What came out, in a sentence or two: all that many will read."""
    blocks: tuple[Block, ...]
    footer: str = ""
    """The last line: the command, when it ran. The library's version stands there anyway."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        _filled("Page", "title", self.title, "give it a heading")
        _filled("Page", "summary", self.summary, "say in a sentence what came out")
        if not self.blocks:
            raise ValueError(f"blocks of Page {self.title!r} is empty: pass at least one block.")
        if _depth(self.blocks) > DEEPEST:
            raise ValueError(
                f"sections of Page {self.title!r} lie more than {DEEPEST} deep: HTML has no more headings."
            )


def json_details(summary: str, value: Any) -> Details:
    """A record (a protocol, a configuration) as JSON that opens.

    Args:
        summary: the line that opens it.
        value: mappings, sequences, strings, finite numbers, booleans and None.
    """
    return Details(summary, (Code(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)),))


def _strings(owner: str, name: str, values: Sequence[str]) -> tuple[str, ...]:
    if isinstance(values, str) or not values:
        raise ValueError(f"{name}={values!r} of {owner}: pass at least one string, in a tuple or a list.")
    for value in values:
        _filled(owner, f"{name} element", value, "leave it out, or write what it is")
    return tuple(values)


def _depth(blocks: "Sequence[Block]") -> int:
    inner = [
        _depth(block.blocks) + isinstance(block, Section) for block in blocks if isinstance(block, Section | Details)
    ]
    return max(inner, default=0)
