"""Layouts: how large a chart is, and where its names stand."""

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stablefield.report.svg import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from matplotlib.transforms import Transform

__all__ = ["NARROW", "WIDE", "Layout", "pixels", "place", "wrap"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to draw a chart. Lengths in pixels."""

    width: int
    height: int
    font: float
    names_at_ends: bool
    """Whether lines are named where they end, at the right; otherwise in a key above."""
    name_length: int
    """Characters after which a name is broken."""
    most_ticks: int
    """On the x axis."""


WIDE = Layout(width=720, height=400, font=13, names_at_ends=True, name_length=22, most_ticks=9)
NARROW = Layout(width=328, height=330, font=12, names_at_ends=False, name_length=14, most_ticks=6)


def wrap(text: str, length: int) -> str:
    """The text in lines of at most `length` characters, a longer word on a line of its own; no sign that is not printed."""
    return "\n".join(textwrap.wrap(printable(text), length, break_long_words=False))


def pixels(canvas: "Canvas") -> "Transform":
    """Pixels of the layout from the lower left corner, whatever the resolution the canvas is saved at."""
    from matplotlib.transforms import Affine2D

    return Affine2D().scale(1 / canvas.dpi) + canvas.dpi_scale_trans


def place(axes: "Axes", left: float, bottom: float, right: float, top: float) -> None:
    """Put the axes there, in pixels of the layout."""
    width, height = axes.figure.bbox.width, axes.figure.bbox.height
    axes.set_position((left / width, bottom / height, (right - left) / width, (top - bottom) / height))
