"""Drawing a `BarChart`: horizontal bars, whose names need no turning, and their values in a column at the right."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stablefield.report.cells import show
from stablefield.report.chart import BarChart
from stablefield.report.colours import LIGHT
from stablefield.report.layout import Layout, wrap
from stablefield.report.ticks import label_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["draw_bars", "height_of"]

HATCHES = ("", "////", "....", "\\\\\\\\", "xx", "--")
BAR = 20
"""Height of a bar, in pixels."""
BETWEEN = 14
"""Room between two groups."""


def height_of(chart: BarChart, layout: Layout) -> int:
    """Height of the drawing in pixels: as much as its bars need."""
    key = 2 * layout.font * math.ceil(len(chart.series) / 2) if len(chart.series) > 1 else 0
    bars = sum(_group_heights(chart, layout))
    return round(bars + key + 6 * layout.font)


def draw_bars(canvas: "Canvas", chart: BarChart, layout: Layout) -> None:
    """Draw the chart into an empty canvas of the height that `height_of` gives."""
    axes = canvas.add_subplot()
    heights = _group_heights(chart, layout)
    middles = [sum(heights[:i]) + height / 2 for i, height in enumerate(heights)]
    axes.set_ylim(sum(heights), 0)
    reach: list[float] = [0.0]
    for k, bars in enumerate(chart.series):
        values = np.asarray(bars.values, dtype=np.float64)
        at = np.asarray(middles) + (k - (len(chart.series) - 1) / 2) * BAR
        axes.barh(
            at,
            np.nan_to_num(values),
            height=BAR - 2,
            color=LIGHT.series[k],
            edgecolor=LIGHT.ground,
            linewidth=0,
            hatch=HATCHES[k],
            label=wrap(bars.label, 2 * layout.name_length),
            zorder=2,
        )
        reach += values[np.isfinite(values)].tolist()
        if bars.low is not None and bars.high is not None:
            low, high = np.asarray(bars.low, dtype=np.float64), np.asarray(bars.high, dtype=np.float64)
            axes.hlines(at, low, high, color=LIGHT.ink, linewidth=1.5, zorder=3)
            for ends in (low, high):
                axes.plot(ends, at, **CAP)
            reach += [*low[np.isfinite(low)].tolist(), *high[np.isfinite(high)].tolist()]
        for y, points in zip(at, bars.points or (), strict=False):
            dots = _finite(points)
            axes.plot(dots, np.full(len(dots), y), **DOT)
            reach += dots.tolist()
        for y, value in zip(at, values, strict=True):
            text = show(None if math.isnan(value) else float(value))
            axes.annotate(
                text,
                (1.0, y),
                xycoords=("axes fraction", "data"),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
            )
    low, high = min(reach), max(reach)
    pad = 0.04 * (high - low) or 1.0
    axes.set_xlim(low - pad if low < 0 else 0.0, 0.0 if high <= 0 < high - low else high + pad)
    if low < 0:
        axes.axvline(0, color=LIGHT.ink, linewidth=1, zorder=4)
    axes.set_yticks(middles, [wrap(name, layout.name_length) for name in chart.categories])
    axes.tick_params(axis="y", length=0, pad=6)
    axes.spines["left"].set_visible(low >= 0)
    axes.grid(axis="x", color=LIGHT.grid, linewidth=1)
    axes.set_axisbelow(True)
    label_ticks(axes.xaxis, log=False, most=layout.most_ticks, minor=False)
    axes.set_xlabel(wrap(chart.value_label, layout.width // 9))
    if len(chart.series) > 1:
        canvas.legend(
            loc="outside upper left", ncols=2, frameon=False, borderaxespad=0.2, borderpad=0.1, handleheight=1.0
        )


CAP: dict[str, Any] = {"marker": "|", "markersize": 9, "color": LIGHT.ink, "linestyle": "", "zorder": 3}
DOT: dict[str, Any] = {
    "marker": "o",
    "markersize": 4.5,
    "markerfacecolor": LIGHT.ground,
    "markeredgecolor": LIGHT.ink,
    "markeredgewidth": 1.0,
    "color": LIGHT.ink,
    "linestyle": "",
    "zorder": 4,
}


def _group_heights(chart: BarChart, layout: Layout) -> list[float]:
    """For each category, room for its bars or its name, whichever is higher."""
    lines = [wrap(name, layout.name_length).count("\n") + 1 for name in chart.categories]
    return [max(len(chart.series) * BAR, 1.25 * layout.font * count) + BETWEEN for count in lines]


def _finite(values: Any) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    return array[np.isfinite(array)]
