"""A page: the content of a report, before it is drawn.

    Page(title, summary, blocks)      a block is Text, Bullets, a Table, a Figure, Details, a Section, ...

Constructors raise ValueError if something is empty or does not fit, so that a mistake shows in the line that made it and not
in a browser. Text is plain; text between `backticks` is set as code, and a blank line begins a paragraph.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import KW_ONLY, MISSING, dataclass, fields
from typing import Any, cast

from stablefield._shapes import check_kind
from stablefield.report._cells import Cell, check_cell
from stablefield.report._chart import Chart

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
"""Nesting of sections: the page title is h1, and HTML ends at h6."""


@dataclass(frozen=True)
class _Filled:
    """Texts and tuples without a default must not be empty. Lists become tuples."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, owner = getattr(self, field.name), type(self).__name__
            if isinstance(value, list):
                value = tuple(cast("list[Any]", value))
                object.__setattr__(self, field.name, value)
            if str(field.type).startswith("tuple") and not isinstance(value, tuple):
                raise ValueError(f"{field.name}={value!r} of a {owner}: pass a tuple or a list.")
            if field.default is not MISSING:
                continue
            texts = (value, *value) if isinstance(value, tuple) else (value,)
            if any(text in (None, ()) or (isinstance(text, str) and not text.strip()) for text in texts):
                raise ValueError(f"{field.name}={value!r} of a {owner} is empty: fill it, or leave the {owner} out.")


@dataclass(frozen=True)
class Text(_Filled):
    """One or more paragraphs."""

    text: str


@dataclass(frozen=True)
class Bullets(_Filled):
    """A list of points."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Code(_Filled):
    """Verbatim text of fixed width: a command, JSON."""

    text: str


@dataclass(frozen=True, kw_only=True)
class KeyFigure(_Filled):
    """One number to see first."""

    value: Cell
    label: str
    """The name of the number."""
    note: str = ""
    """A second, smaller line: a unit, an interval, a condition."""

    def __post_init__(self) -> None:
        check_cell("value of a KeyFigure", self.value)
        super().__post_init__()


@dataclass(frozen=True)
class KeyFigures(_Filled):
    """The few numbers that answer the question, in large type."""

    figures: tuple[KeyFigure, ...]


@dataclass(frozen=True, kw_only=True)
class Table(_Filled):
    """Rows under column titles. The first column names its row; columns of numbers align on their decimal points."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    """Cells: numbers show `digits` significant digits, integers all, strings are unchanged."""
    caption: str = ""
    digits: int = 3
    marked: int | None = None
    """Index of a row to set off from the others: a recommendation, the best."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "rows", tuple(tuple(row) for row in self.rows))
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
        """Whether a column holds only numbers and gaps."""
        cells = [row[column] for row in self.rows if row[column] is not None]
        return bool(cells) and not any(isinstance(cell, str) for cell in cells)


@dataclass(frozen=True)
class Figure(_Filled):
    """A picture: a chart, or the bytes of a PNG file."""

    picture: Chart | bytes
    """A chart is drawn when the page is rendered, which needs matplotlib."""
    _: KW_ONLY
    alt: str
    """A description of the picture, for those who cannot see it."""
    caption: str = ""
    title: str = ""
    """In bold before the caption."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind("picture of a Figure", self.picture, (Chart, bytes), "a chart, or the bytes of a PNG file")
        if isinstance(self.picture, bytes):
            if not self.picture.startswith(PNG_SIGNATURE):
                raise ValueError(f"picture of a Figure begins with {self.picture[:8]!r}: pass the bytes of a PNG file.")
            if len(self.picture) < 24 or 0 in self.size:
                raise ValueError("picture of a Figure has no pixels: pass the bytes of a complete PNG file.")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a PNG in pixels; (0, 0) for a chart, which has no pixels."""
        if not isinstance(self.picture, bytes):
            return (0, 0)
        # After the signature and the length and name of the first chunk.
        width, height = struct.unpack(">II", self.picture[16:24])
        return (width, height)


@dataclass(frozen=True)
class SideBySide(_Filled):
    """Figures to compare, such as real images and samples, side by side if the screen is wide enough."""

    figures: tuple[Figure, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.figures) < 2:
            raise ValueError(f"figures of SideBySide are {len(self.figures)}: pass at least two, or a Figure alone.")


@dataclass(frozen=True)
class Details(_Filled):
    """Blocks that a line opens and closes. On paper they are open."""

    summary: str
    blocks: "tuple[Block, ...]"


@dataclass(frozen=True)
class Section(_Filled):
    """Blocks under a heading. A section in a section has a smaller heading."""

    title: str
    blocks: "tuple[Block, ...]"


Block = Text | Bullets | Code | KeyFigures | Table | Figure | SideBySide | Details | Section
"""What pages, sections and details are made of."""


@dataclass(frozen=True, kw_only=True)
class Page(_Filled):
    """A complete report."""

    title: str
    summary: str
    """The result in a sentence or two; many read nothing else."""
    blocks: tuple[Block, ...]
    footer: str = ""
    """The last line: the command, when it ran. The library's version is always added."""
    refresh: int | None = None
    """Seconds after which a browser loads the file again; None for a page that does not change."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refresh is not None and not (isinstance(self.refresh, int) and self.refresh > 0):
            raise ValueError(f"refresh={self.refresh!r} of Page {self.title!r}: pass a positive number of seconds.")
        if _depth(self.blocks) > DEEPEST:
            raise ValueError(
                f"sections of Page {self.title!r} are nested more than {DEEPEST} deep: HTML has no more headings."
            )


def json_details(summary: str, value: Any) -> Details:
    """A record (a protocol, a configuration) as JSON that opens.

    Args:
        summary: the line that opens it.
        value: mappings, sequences, strings, finite numbers, booleans and None.
    """
    return Details(summary, (Code(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)),))


def _depth(blocks: "Sequence[Block]") -> int:
    inner = [
        _depth(block.blocks) + isinstance(block, Section) for block in blocks if isinstance(block, Section | Details)
    ]
    return max(inner, default=0)
