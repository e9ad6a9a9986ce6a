"""Drawing a `LineChart`: its lines and bands on their axes.

The axes' place is known only after a first layout, so what stands around them (`names`, `regions`) is measured and placed
in a second.
"""

import math
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from stablefield.report.chart import Line, LineChart
from stablefield.report.colours import LIGHT
from stablefield.report.layout import Layout, place, wrap
from stablefield.report.names import draw_key, draw_names, name_texts, room_for_names
from stablefield.report.regions import draw_regions
from stablefield.report.ticks import label_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from matplotlib.layout_engine import LayoutEngine

__all__ = ["draw_lines"]

DASHES = ((), (6, 2), (2, 1.5), (7, 2, 1.5, 2), (10, 3), (4, 1.5, 1, 1.5, 1, 1.5))
"""Lengths of dash and gap, in line widths; the first is unbroken."""
MARKERS = ("o", "s", "^", "D", "v", "P")
REFERENCE_DASH = (1, 2)
MOST_MARKERS = 12
TITLE_PAD = 8.0
"""From the axes, or the regions above them, to the label of the y axis."""


def draw_lines(canvas: "Canvas", chart: LineChart, layout: Layout) -> None:
    """Draw the chart into an empty canvas."""
    axes = canvas.add_subplot()
    _limits(axes, chart)
    styles = _styles(chart)
    for line, style in zip(chart.lines, styles, strict=True):
        _draw_line(axes, line, style, floor=axes.get_ylim()[0] if chart.log_y else -math.inf)
    label_ticks(axes.xaxis, log=chart.log_x, most=layout.most_ticks, minor=True)
    label_ticks(axes.yaxis, log=chart.log_y, most=7, minor=False)
    axes.grid(axis="y", color=LIGHT.grid, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(wrap(chart.x_label, layout.width // 8))
    # Above its axis, and level: read at once, and no width lost on a phone.
    y_label = wrap(chart.y_label, layout.width // 8)
    axes.set_title(y_label, loc="left", fontsize=layout.font, pad=TITLE_PAD)
    if not layout.names_at_ends:
        draw_key(canvas, chart.lines, styles, layout)
    cast("LayoutEngine", canvas.get_layout_engine()).execute(canvas)
    canvas.set_layout_engine("none")
    # From here on all is placed by hand, in pixels of the layout.
    box = axes.get_window_extent()
    texts = name_texts(canvas, chart.lines, layout) if layout.names_at_ends else []
    right = box.x1 - room_for_names(texts)
    place(axes, box.x0, box.y0, right, box.y1)
    above = draw_regions(canvas, axes, chart.regions, layout)
    place(axes, box.x0, box.y0, right, box.y1 - above)
    axes.set_title(y_label, loc="left", fontsize=layout.font, pad=TITLE_PAD + above)
    if texts:
        draw_names(canvas, axes, chart.lines, styles, texts)


def _array(values: Any) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


def _styles(chart: LineChart) -> list[dict[str, Any]]:
    """How to draw each line: series in the order of the palette, reference lines all alike."""
    styles: list[dict[str, Any]] = []
    series = 0
    for line in chart.lines:
        styles.append(_style(None if line.reference else series))
        series += not line.reference
    return styles


def _style(index: int | None) -> dict[str, Any]:
    if index is None:
        return {"color": LIGHT.muted, "linewidth": 1.3, "linestyle": (0, REFERENCE_DASH), "marker": ""}
    return {
        "color": LIGHT.series[index],
        "linewidth": 2.0,
        "linestyle": (0, DASHES[index]) if DASHES[index] else "-",
        "marker": MARKERS[index],
        "markersize": 6.5,
        "markeredgecolor": LIGHT.ground,
        "markeredgewidth": 1.0,
    }


def _limits(axes: "Axes", chart: LineChart) -> None:
    xs = np.concatenate([_array(line.x) for line in chart.lines])
    ys = np.concatenate(
        [_array(edge) for line in chart.lines for edge in (line.y, line.low, line.high) if edge is not None]
    )
    ys = ys[np.isfinite(ys) & ((ys > 0) | (not chart.log_y))]
    if chart.log_y:
        # The edge of a band may come as near to zero as it likes; the lines say how far down to look.
        middle = np.concatenate([_array(line.y) for line in chart.lines])
        ys = ys[ys >= np.nanmin(middle) / 3]
    axes.set_xscale("log" if chart.log_x else "linear")
    axes.set_yscale("log" if chart.log_y else "linear")
    axes.set_xlim(*_padded(xs.min(), xs.max(), chart.log_x, 0.015))
    low, high = _padded(ys.min(), ys.max(), chart.log_y, 0.05)
    if not chart.log_y and 0 <= ys.min() < 0.3 * ys.max():
        low = 0.0  # near enough that leaving zero out would mislead
    low = low if chart.y_min is None else chart.y_min
    high = high if chart.y_max is None else chart.y_max
    if not low < high:
        # One end was given, and all values lie beyond it.
        low, high = (
            (low, low * 10 if chart.log_y else low + 1)
            if chart.y_max is None
            else ((high / 10 if chart.log_y else high - 1), high)
        )
    axes.set_ylim(low, high)


def _padded(low: float, high: float, log: bool, share: float) -> tuple[float, float]:
    if log:
        low, high = math.log10(low), math.log10(high)
    pad = share * (high - low) or (0.3 if log else abs(high) * 0.1 or 1.0)
    low, high = low - pad, high + pad
    return (10.0**low, 10.0**high) if log else (low, high)


def _draw_line(axes: "Axes", line: Line, style: dict[str, Any], floor: float) -> None:
    x, y = _array(line.x), _array(line.y)
    every = max(1, math.ceil(len(x) / MOST_MARKERS))
    # A long line has markers at a part of its points; of a short one each point is marked.
    axes.plot(x, y, **style, markevery=(every // 2, every), zorder=2 if line.reference else 3)
    if line.low is not None and line.high is not None:
        low, high = np.maximum(_array(line.low), floor), np.maximum(_array(line.high), floor)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0, zorder=2)
