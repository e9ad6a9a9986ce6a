"""Readable numbers: significant digits, separated thousands, a true minus, an error beside its value."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

__all__ = ["Cell", "Estimate", "check_cell", "duration", "printable", "show", "text_table"]

MINUS = "\u2212"
THIN_SPACE = "\u202f"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML or UTF-8 cannot hold: controls, and surrogates such as those from file names that are not UTF-8."""


@dataclass(frozen=True)
class Estimate:
    """A number with its error, shown to the error's two leading digits: 0.312 ± 0.015.

    Raises:
        ValueError: if `error` is negative.
    """

    value: float
    error: float
    """Half the width of the interval; name the kind of interval in a caption."""

    def __post_init__(self) -> None:
        if self.error < 0:
            raise ValueError(f"error={self.error} of an Estimate is negative: pass its size.")


Cell = str | int | float | Estimate | None
"""A cell of a table. None is an empty cell, shown as a dash. NumPy's numbers are numbers too."""


def check_cell(name: str, cell: object) -> None:
    """Refuse a value that is not a cell.

    Raises:
        ValueError: if it is not one; the message begins with `name`.
    """
    if cell is not None and not isinstance(cell, str | Real | Estimate):
        raise ValueError(
            f"{name} is of type {type(cell).__name__}: pass a string, a number (`.item()` of a tensor), an Estimate or None."
        )


def show(cell: Cell, digits: int = 3) -> str:
    """A cell as text.

    Args:
        cell: a string is unchanged, an integer in full, a boolean as yes or no, an Estimate to the second digit of its
            error, None as a dash.
        digits: significant digits of a float.
    """
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Estimate):
        return _estimate(cell, digits)
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return _grouped(str(int(cell))) if isinstance(cell, Integral) else _float(float(cell), digits)


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of texts under their columns for a terminal; the first column aligns left and the others right."""
    lines = [columns, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def printable(text: str) -> str:
    """The text with the replacement character for each character that cannot be written."""
    return UNPRINTABLE.sub("\ufffd", text)


def _grouped(text: str) -> str:
    """A number's text with separated thousands from five digits on, and a true minus."""
    whole, point, rest = text.partition(".")
    if len(whole.lstrip("-")) > 4:
        whole = f"{int(whole):,}".replace(",", THIN_SPACE)
    return (whole + point + rest).replace("-", MINUS)


def _plain(power: int) -> bool:
    """Whether a number of this order of magnitude is written without a power."""
    return -4 <= power < 7


def _float(value: float, digits: int) -> str:
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    power = int(exponent)
    if not _plain(power):
        return f"{_grouped(mantissa)}·10{str(power).translate(SUPERSCRIPTS)}"
    return _grouped(f"{value:.{max(0, digits - 1 - power)}f}")


def _estimate(estimate: Estimate, digits: int) -> str:
    value, error = estimate.value, estimate.error
    if not (math.isfinite(value) and math.isfinite(error)) or error == 0:
        return f"{_float(value, digits)} ± {_float(error, 2)}"
    power = int(f"{error:.1e}".partition("e")[2])
    decimals = max(0, 1 - power)
    if _plain(power) and abs(value) < 1e7:
        return f"{_grouped(f'{value:.{decimals}f}')} ± {_grouped(f'{error:.{decimals}f}')}"
    return f"{_float(value, digits)} ± {_float(error, 2)}"


def duration(seconds: float) -> str:
    """A time in its two largest units: 12 s, 3 min 20 s, 2 h 5 min, 4 d 3 h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
