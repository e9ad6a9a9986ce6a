"""A page as HTML: one file with its pictures and style, which runs no script and fetches nothing.

The template and the style are beside this module. The page's content security policy forbids every request, so a browser
would omit a picture rather than load it from elsewhere.
"""

import base64
import re
from collections.abc import Iterator
from importlib.resources import files
from itertools import count
from pathlib import Path

import stablefield
from stablefield._atomic_file import write_atomically
from stablefield.report._cells import Cell, printable, show
from stablefield.report._colours import DARK, LIGHT, Palette
from stablefield.report._drawing import chart_svg
from stablefield.report._extra import require
from stablefield.report._page import Block, Figure, Page, Section, Table

__all__ = ["render_page", "write_page"]

CONTENTS_FROM = 4
"""Number of sections from which a page begins with a list of them."""


def render_page(page: Page) -> str:
    """The page as the text of an HTML file. The same page gives the same text.

    Raises:
        ImportError: if Jinja2 is not installed.
    """
    require("jinja2", "writing a report")
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = files("stablefield.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    numbers = count(1)

    def number() -> int:
        return next(numbers)

    def picture(figure: Figure) -> Markup:
        if isinstance(figure.picture, bytes):
            data, (width, height) = base64.b64encode(figure.picture).decode(), figure.size
            image = '<img src="data:image/png;base64,{}" alt="{}" width="{}" height="{}">'
            return Markup(image).format(data, figure.alt, width, height)
        # Safe, because matplotlib escapes the texts in it.
        return Markup(chart_svg(figure.picture, alt=figure.alt, prefix=f"p{number()}-"))

    sections = [block for block in page.blocks if isinstance(block, Section)]
    template = environment.from_string((folder / "page.html.jinja").read_text("utf-8"))
    text = template.render(
        page=page,
        contents=sections if len(sections) >= CONTENTS_FROM else [],
        style=Markup(_colours() + (folder / "page.css").read_text("utf-8")),
        version=stablefield.__version__,
        picture=picture,
        number=number,
        table=_cells,
        kind=_kind,
        key_value=_key_value,
        paragraphs=_paragraphs,
        spans=_spans,
    )
    return printable(text)


def write_page(page: Page, path: str | Path) -> Path:
    """Write the page to a file atomically.

    Args:
        page: the page.
        path: the file, which is replaced if it exists; missing folders are created.

    Returns:
        The path.

    Raises:
        ImportError: if Jinja2 is not installed.
    """
    text = render_page(page)
    path = Path(path)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))
    return path


def _colours() -> str:
    """The palettes as CSS; the dark one only on screens that ask for it, since paper is white."""

    def root(palette: Palette) -> str:
        return ":root { " + " ".join(f"--{name}: {colour};" for name, colour in palette.variables().items()) + " }"

    return f"{root(LIGHT)}\n@media screen and (prefers-color-scheme: dark) {{ {root(DARK)} }}\n"


def _kind(block: Block) -> str:
    return type(block).__name__


def _key_value(value: Cell) -> tuple[str, str]:
    """A number in large type, without trailing zeros, and its error in smaller type."""
    number, _, error = show(value).partition(" ± ")
    if isinstance(value, float) and "." in number and "·" not in number:
        number = number.rstrip("0").rstrip(".")
    return number, f"± {error}" if error else ""


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _spans(text: str) -> Iterator[tuple[bool, str]]:
    """Pieces of text, and whether each was between backticks. An unpaired backtick is literal."""
    pieces = text.split("`")
    if len(pieces) % 2 == 0:
        pieces[-2:] = ["`".join(pieces[-2:])]
    for i, piece in enumerate(pieces):
        if piece:
            yield i % 2 == 1, piece


def _cells(table: Table) -> list[list[tuple[str, str, int]]]:
    """Each cell as the text before its decimal point, the rest, and the width to keep for the rest.

    Only cells of numeric columns are split; right-aligned with rests of equal width, they line up on their points.
    """
    columns = [
        _column([row[i] for row in table.rows], table.digits, table.numeric(i)) for i in range(len(table.columns))
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def _column(cells: list[Cell], digits: int, numeric: bool) -> list[tuple[str, str, int]]:
    texts = [show(cell, digits) for cell in cells]
    if not numeric:
        return [(text, "", 0) for text in texts]
    split = [re.fullmatch(r"([^.± ]*)(.*)", text, re.DOTALL) for text in texts]
    parts = [(found[1], found[2]) if found else (text, "") for found, text in zip(split, texts, strict=True)]
    width = max(len(rest) for _, rest in parts)
    return [(whole, rest, width) for whole, rest in parts]
