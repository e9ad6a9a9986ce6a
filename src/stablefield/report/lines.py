"""Drawing a `LineChart`: lines, their bands, the regions under them, and names that do not cover each other.

The axes' place is known only after a first layout, so names are measured and placed in a second.
"""

import math
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from stablefield.report.chart import Line, LineChart, Region
from stablefield.report.colours import LIGHT
from stablefield.report.layout import Layout, wrap
from stablefield.report.spacing import lanes, spread
from stablefield.report.ticks import label_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from matplotlib.text import Text
    from matplotlib.transforms import Transform

__all__ = ["draw_lines"]

DASHES = ((), (6, 2), (2, 1.5), (7, 2, 1.5, 2), (10, 3), (4, 1.5, 1, 1.5, 1, 1.5))
"""Lengths of dash and gap, in line widths; the first is unbroken."""
MARKERS = ("o", "s", "^", "D", "v", "P")
REFERENCE_DASH = (1, 2)
MOST_MARKERS = 12
SWATCH = 26.0
"""Length of the sample of a line before its name, in pixels, as all that follow."""
LEAD = 10.0
"""From the axes to the sample."""
NAME_AT = LEAD + SWATCH + 6
"""From the axes to the name."""
LANE = 6.0
"""Height of a row of regions beside their names."""
TITLE_PAD = 8.0


def draw_lines(canvas: "Canvas", chart: LineChart, layout: Layout) -> None:
    """Draw the chart into an empty canvas."""
    axes = canvas.add_subplot()
    _limits(axes, chart)
    series = [line for line in chart.lines if not line.reference]
    for line in chart.lines:
        style = _style(series.index(line) if not line.reference else None)
        _draw_line(axes, line, style, floor=axes.get_ylim()[0] if chart.log_y else -math.inf)
    label_ticks(axes.xaxis, log=chart.log_x, most=layout.most_ticks, minor=True)
    label_ticks(axes.yaxis, log=chart.log_y, most=7, minor=False)
    axes.grid(axis="y", color=LIGHT.grid, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(wrap(chart.x_label, layout.width // 8))
    # Above its axis, and level: read at once, and no width lost on a phone.
    axes.set_title(wrap(chart.y_label, layout.width // 8), loc="left", fontsize=layout.font, pad=TITLE_PAD)
    styles = [_style(None if line.reference else series.index(line)) for line in chart.lines]
    if not layout.names_at_ends:
        _key(canvas, chart, styles, layout)
    engine = canvas.get_layout_engine()
    assert engine is not None
    engine.execute(canvas)
    canvas.set_layout_engine("none")
    # From here on all is placed by hand, in pixels of the layout.
    box = axes.get_window_extent()
    names = [wrap(line.label, layout.name_length) for line in chart.lines] if layout.names_at_ends else []
    texts = [canvas.text(0, 0, name, transform=_pixels(canvas), va="center", linespacing=1.1) for name in names]
    widths = [text.get_window_extent().width for text in texts]
    right = box.x1 - (max(widths) + NAME_AT if widths else 0)
    _place(axes, box.x0, box.y0, right, box.y1)
    above = _draw_regions(axes, chart, layout)
    _place(axes, box.x0, box.y0, right, box.y1 - above)
    axes.set_title(axes.get_title(loc="left"), loc="left", fontsize=layout.font, pad=TITLE_PAD + above)
    for line, text, style, place in zip(chart.lines, texts, styles, _places(axes, chart, texts), strict=False):
        _draw_name(axes, line, text, style, place)


def _array(values: Any) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


def _style(index: int | None) -> dict[str, Any]:
    """How to draw the series of this index; None for a reference line."""
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
    if not chart.log_y and ys.min() >= 0 and ys.min() < 0.3 * ys.max():
        low = 0.0
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


def _key(canvas: "Canvas", chart: LineChart, styles: list[dict[str, Any]], layout: Layout) -> None:
    """Names above the chart, in as many columns as there is room for."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **style) for style in styles]
    names = [wrap(line.label, 3 * layout.name_length) for line in chart.lines]
    for columns in range(min(3, len(names)), 0, -1):
        legend = canvas.legend(
            handles,
            names,
            loc="outside upper left",
            ncols=columns,
            frameon=False,
            handlelength=SWATCH / layout.font,
            borderaxespad=0.2,
            borderpad=0.1,
            columnspacing=1.2,
            labelspacing=0.35,
        )
        if columns == 1 or legend.get_window_extent().width <= layout.width - 8:
            return
        legend.remove()


def _pixels(canvas: "Canvas") -> "Transform":
    """Pixels of the layout from the lower left corner, whatever the resolution the canvas is saved at."""
    from matplotlib.transforms import Affine2D

    return Affine2D().scale(1 / canvas.dpi) + canvas.dpi_scale_trans


def _place(axes: "Axes", left: float, bottom: float, right: float, top: float) -> None:
    width, height = axes.figure.bbox.width, axes.figure.bbox.height
    axes.set_position((left / width, bottom / height, (right - left) / width, (top - bottom) / height))


def _end(axes: "Axes", line: Line) -> tuple[float, float]:
    """Where a line ends, in pixels; within the axes."""
    y = _array(line.y)
    last = int(np.flatnonzero(np.isfinite(y))[-1])
    bottom, top = axes.get_ylim()
    place = axes.transData.transform((_array(line.x)[last], min(max(y[last], bottom), top)))
    return float(place[0]), float(place[1])


def _places(axes: "Axes", chart: LineChart, texts: "list[Text]") -> list[float]:
    """Heights of the names, in pixels."""
    if not texts:
        return []
    box = axes.get_window_extent()
    heights = [text.get_window_extent().height for text in texts]
    return spread([_end(axes, line)[1] for line in chart.lines], heights, box.y0, box.y1, gap=3)


def _draw_name(axes: "Axes", line: Line, text: "Text", style: dict[str, Any], y: float) -> None:
    """A name at the right of the axes: a thin lead from the line's end, a sample of the line, the text."""
    from matplotlib.lines import Line2D

    canvas, right, end = text.get_figure(root=True), axes.get_window_extent().x1, _end(axes, line)
    assert canvas is not None
    pixels = _pixels(canvas)
    begin, middle, stop = right + LEAD, right + LEAD + SWATCH / 2, right + LEAD + SWATCH
    # A long lead would look like data: dots do not.
    dots = (0, (1, 3)) if right - end[0] > LEAD else "-"
    canvas.add_artist(
        Line2D([end[0], begin], [end[1], y], transform=pixels, color=style["color"], linewidth=0.8, linestyle=dots)
    )
    canvas.add_artist(Line2D([begin, middle, stop], [y] * 3, transform=pixels, markevery=[1], **style))
    text.set_position((right + NAME_AT, y))


def _draw_regions(axes: "Axes", chart: LineChart, layout: Layout) -> float:
    """Shade the regions and name each above the axes, in as many rows as keep the names apart.

    Returns:
        The height of the rows, in pixels.
    """
    from matplotlib.lines import Line2D

    canvas = cast("Canvas", axes.figure)
    box, (left, right) = axes.get_window_extent(), axes.get_xlim()
    texts: list[Text] = []
    spans: list[tuple[float, float]] = []
    extents: list[tuple[float, float]] = []
    shown: list[Region] = []
    for region in chart.regions:
        start = left if region.start is None else max(region.start, left)
        stop = right if region.stop is None else min(region.stop, right)
        if start >= stop:
            continue  # beyond what is drawn
        begin, end = (float(axes.transData.transform((x, 1.0))[0]) for x in (start, stop))
        name = wrap(region.label, 2 * layout.name_length)
        text = canvas.text(
            0,
            0,
            name,
            transform=_pixels(canvas),
            ha="center",
            va="bottom",
            color=LIGHT.muted,
            fontsize=layout.font * 0.92,
        )
        half = text.get_window_extent().width / 2
        middle = min(max((begin + end) / 2, box.x0 + half), box.x1 - half)
        text.set_x(middle)
        texts.append(text)
        shown.append(region)
        spans.append((start, stop))
        extents.append((min(begin, middle - half - 4), max(end, middle + half + 4)))
    rows = lanes(extents)
    heights = [
        max(text.get_window_extent().height for text, row in zip(texts, rows, strict=True) if row == each) + LANE
        for each in range(max(rows, default=-1) + 1)
    ]
    above = sum(heights)
    for i, (text, row, (start, stop)) in enumerate(zip(texts, rows, spans, strict=True)):
        base = box.y1 - above + sum(heights[:row]) + 2
        text.set_y(base + 3)
        ends = [float(axes.transData.transform((x, 1.0))[0]) for x in (start, stop)]
        canvas.add_artist(
            Line2D(
                [ends[0] + 1, ends[1] - 1], [base, base], transform=_pixels(canvas), color=LIGHT.muted, linewidth=2.0
            )
        )
        if row == 0 and i % 2 == 0:
            axes.axvspan(start, stop, color=LIGHT.shade, linewidth=0, zorder=0)
        for x, edge in zip((start, stop), (left, right), strict=True):
            if x != edge:
                axes.axvline(x, color=LIGHT.muted, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
    return above
