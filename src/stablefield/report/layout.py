"""Layouts: how large a chart is, and where its names stand."""

import textwrap
from dataclasses import dataclass

__all__ = ["NARROW", "WIDE", "Layout", "wrap"]


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
NARROW = Layout(width=344, height=340, font=12, names_at_ends=False, name_length=14, most_ticks=6)


def wrap(text: str, length: int) -> str:
    """The text in lines of at most `length` characters, a longer word on a line of its own."""
    return "\n".join(textwrap.wrap(text, length, break_long_words=False)) or text
