"""The names of lines: beside their ends, each after a sample of its line, or in a key above the chart."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stablefield.report.chart import Line
from stablefield.report.layout import Layout, pixels, wrap
from stablefield.report.spacing import spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from matplotlib.text import Text

__all__ = ["draw_key", "draw_names", "name_texts", "room_for_names"]

SWATCH = 26.0
"""Length of the sample of a line before its name, in pixels, as all that follow."""
LEAD = 10.0
"""From the axes to the sample."""
NAME_AT = LEAD + SWATCH + 6
"""From the axes to the name."""


def draw_key(canvas: "Canvas", lines: Sequence[Line], styles: Sequence[dict[str, Any]], layout: Layout) -> None:
    """Names above the chart, in as many columns as there is room for."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **style) for style in styles]
    names = [wrap(line.label, 3 * layout.name_length) for line in lines]
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


def name_texts(canvas: "Canvas", lines: Sequence[Line], layout: Layout) -> "list[Text]":
    """The names as texts that have a size, but no place yet."""
    names = [wrap(line.label, layout.name_length) for line in lines]
    return [canvas.text(0, 0, name, transform=pixels(canvas), va="center", linespacing=1.1) for name in names]


def room_for_names(texts: "Sequence[Text]") -> float:
    """Pixels to keep free at the right of the axes."""
    return max(text.get_window_extent().width for text in texts) + NAME_AT if texts else 0.0


def draw_names(
    canvas: "Canvas",
    axes: "Axes",
    lines: Sequence[Line],
    styles: Sequence[dict[str, Any]],
    texts: "Sequence[Text]",
) -> None:
    """Place the names at the right of the axes, moved apart where lines end near each other."""
    from matplotlib.lines import Line2D

    box = axes.get_window_extent()
    ends = [_end(axes, line) for line in lines]
    heights = [text.get_window_extent().height for text in texts]
    begin, middle, stop = box.x1 + LEAD, box.x1 + LEAD + SWATCH / 2, box.x1 + LEAD + SWATCH
    places = spread([y for _, y in ends], heights, box.y0, box.y1, gap=3)
    for (x, end), style, text, y in zip(ends, styles, texts, places, strict=True):
        # A long lead would look like data: dots do not.
        dots = (0, (1, 3)) if box.x1 - x > LEAD else "-"
        lead = Line2D(
            [x, begin], [end, y], transform=pixels(canvas), color=style["color"], linewidth=0.8, linestyle=dots
        )
        canvas.add_artist(lead)
        canvas.add_artist(Line2D([begin, middle, stop], [y] * 3, transform=pixels(canvas), markevery=[1], **style))
        text.set_position((box.x1 + NAME_AT, y))


def _end(axes: "Axes", line: Line) -> tuple[float, float]:
    """Where a line ends, in pixels; within the axes."""
    y = np.asarray(line.y, dtype=np.float64)
    last = int(np.flatnonzero(np.isfinite(y))[-1])
    bottom, top = axes.get_ylim()
    place = axes.transData.transform((np.asarray(line.x, dtype=np.float64)[last], min(max(y[last], bottom), top)))
    return float(place[0]), float(place[1])
