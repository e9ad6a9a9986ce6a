"""Numbers on axes, as plain as they can be: 0.01, 0.1, 1, 10 rather than powers, until powers are shorter."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stablefield.report.cells import grouped, power_of_ten

if TYPE_CHECKING:
    from matplotlib.axis import Axis

__all__ = ["label_ticks", "tick_texts"]

MOST_DECADES = 8
"""Decades below which a logarithmic axis has minor ticks."""


def label_ticks(axis: "Axis", *, log: bool, most: int, minor: bool) -> None:
    """Choose an axis' ticks and their texts.

    Args:
        axis: with its scale and limits set.
        log: whether the scale is logarithmic.
        most: number of ticks to stay below, about.
        minor: whether to mark 2 to 9 times each power of ten on a logarithmic scale, without texts.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    low, high = axis.get_view_interval()
    if log:
        decades = math.log10(high / low)
        # Few decades would leave two or three ticks: then the numbers between are named as well.
        subs = (1.0,) if decades > 2 else (1.0, 2.0, 5.0) if decades > 0.7 else tuple(range(1, 10))
        axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=most))
        # Hundreds of small ticks would say nothing, and take seconds.
        few = minor and decades < MOST_DECADES
        axis.set_minor_locator(LogLocator(base=10, subs=range(2, 10), numticks=100) if few else NullLocator())
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10]))
    values = [float(value) for value in axis.get_majorticklocs() if low <= value <= high]
    texts = dict(zip(values, tick_texts(values, log=log), strict=True))

    def text(value: float, _: object) -> str:
        return texts.get(float(value), "")

    axis.set_major_formatter(FuncFormatter(text))


def tick_texts(values: Sequence[float], *, log: bool) -> list[str]:
    """The values as texts of one kind.

    On a logarithmic axis each is as long as it must be; on a linear one all have the same number of decimals. Very large
    and very small numbers are powers of ten or multiples of them.
    """
    largest = max((abs(value) for value in values), default=0.0)
    if log:
        least = min(values, default=1.0)
        if least >= 0.9e-3 and largest < 2e5:
            return [grouped(f"{value:.10f}".rstrip("0").rstrip(".")) for value in values]
        return [_power(value) for value in values]
    if largest == 0 or 1e-4 <= largest < 1e7:
        decimals = next(
            (d for d in range(9) if all(math.isclose(round(v, d), v, abs_tol=largest * 1e-9) for v in values)), 9
        )
        return [grouped(f"{value:.{decimals}f}") for value in values]
    exponent = 3 * math.floor(math.log10(largest) / 3)
    scaled = tick_texts([value / 10.0**exponent for value in values], log=False)
    factor = f"·{power_of_ten(exponent)}"
    return ["0" if value == 0 else text + factor for value, text in zip(values, scaled, strict=True)]


def _power(value: float) -> str:
    exponent = math.floor(math.log10(value) + 1e-9)
    mantissa = value / 10.0**exponent
    power = power_of_ten(exponent)
    return power if math.isclose(mantissa, 1) else f"{mantissa:g}·{power}"
