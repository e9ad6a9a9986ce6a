"""Numbers as people read them: significant digits, an error beside its value, a true minus sign."""

import math
from dataclasses import dataclass

__all__ = ["Cell", "Estimate", "show"]

MINUS = "\u2212"
THIN_SPACE = "\u202f"


@dataclass(frozen=True)
class Estimate:
    """A number with its error, shown to the error's two leading digits: 0.312 ± 0.015.

    Raises:
        ValueError: if `error` is negative.
    """

    value: float
    error: float
    """Half the width of the interval that is meant; say in a caption which."""

    def __post_init__(self) -> None:
        if self.error < 0:
            raise ValueError(f"error={self.error} of an Estimate is negative: pass its size.")


Cell = str | int | float | Estimate | None
"""What a table holds. None is an empty cell, shown as a dash."""


def show(cell: Cell, digits: int = 3) -> str:
    """A cell as text: `digits` significant digits for a float, no trailing exponent between 1e-4 and 1e6, a true minus.

    An Estimate shows its value to the second digit of its error.
    """
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Estimate):
        return _show_estimate(cell, digits)
    if isinstance(cell, int):
        return (
            f"{cell:,}".replace(",", "\u202f").replace("-", "\u2212")
            if abs(cell) >= 10_000
            else f"{cell}".replace("-", "\u2212")
        )
    return _show_float(cell, digits)


def _show_float(value: float, digits: int) -> str:
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "\u2212∞"
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    power = int(exponent)
    text = f"{value:.{max(0, digits - 1 - power)}f}" if -4 <= power < 6 else f"{mantissa}e{power}"
    return text.replace("-", "\u2212")


def _show_estimate(estimate: Estimate, digits: int) -> str:
    value, error = estimate.value, estimate.error
    if not (math.isfinite(value) and math.isfinite(error)) or error == 0:
        return f"{_show_float(value, digits)} ± {_show_float(error, 2)}"
    power = int(f"{error:.1e}".partition("e")[2])
    if -4 <= power < 6 and abs(value) < 1e6:
        decimals = max(0, 1 - power)
        return f"{value:.{decimals}f} ± {error:.{decimals}f}".replace("-", "\u2212")
    return f"{_show_float(value, digits)} ± {_show_float(error, 2)}"
