"""The regions of an x axis: shaded under the lines, named above the axes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stablefield.report.chart import Region
from stablefield.report.colours import LIGHT
from stablefield.report.layout import Layout, pixels, wrap
from stablefield.report.spacing import lanes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from matplotlib.text import Text

__all__ = ["draw_regions"]

LANE = 6.0
"""Height of a row beside its names, in pixels."""
APART = 4.0
"""Room at each side of a name."""


@dataclass(frozen=True, kw_only=True)
class _Placed:
    text: "Text"
    """Its name, in its place along the axis."""
    start: float
    stop: float
    """Edges on the axis, within its limits."""
    begin: float
    end: float
    """Edges in pixels."""

    @property
    def extent(self) -> tuple[float, float]:
        """From where to where it takes room, in pixels: the region or its name, whichever is wider."""
        half = self.text.get_window_extent().width / 2 + APART
        middle = self.text.get_position()[0]
        return min(self.begin, middle - half), max(self.end, middle + half)


def draw_regions(canvas: "Canvas", axes: "Axes", regions: Sequence[Region], layout: Layout) -> float:
    """Shade the regions, and name each above the axes, in as many rows as keep the names apart.

    The rows take the upper part of the axes' present place; the caller moves the axes down below them.

    Returns:
        The height of the rows, in pixels.
    """
    from matplotlib.lines import Line2D

    top, (left, right) = axes.get_window_extent().y1, axes.get_xlim()
    placed = [found for region in regions if (found := _placed(canvas, axes, region, layout))]
    rows = lanes([each.extent for each in placed])
    heights = [0.0] * (max(rows, default=-1) + 1)
    for each, row in zip(placed, rows, strict=True):
        heights[row] = max(heights[row], each.text.get_window_extent().height + LANE)
    for i, (each, row) in enumerate(zip(placed, rows, strict=True)):
        base = top - sum(heights[row:]) + 2
        each.text.set_y(base + 3)
        bar = [each.begin + 1, each.end - 1]
        canvas.add_artist(Line2D(bar, [base, base], transform=pixels(canvas), color=LIGHT.muted, linewidth=2.0))
        if row == 0 and i % 2 == 0:
            # Every other one: neighbours stay apart.
            axes.axvspan(each.start, each.stop, color=LIGHT.shade, linewidth=0, zorder=0)
        for x, limit in ((each.start, left), (each.stop, right)):
            if x != limit:
                axes.axvline(x, color=LIGHT.muted, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
    return sum(heights)


def _placed(canvas: "Canvas", axes: "Axes", region: Region, layout: Layout) -> _Placed | None:
    """The region within the axes, its name in the middle of it; None if it lies beyond them."""
    box, (left, right) = axes.get_window_extent(), axes.get_xlim()
    start = left if region.start is None else max(region.start, left)
    stop = right if region.stop is None else min(region.stop, right)
    if start >= stop:
        return None
    begin, end = (float(axes.transData.transform((x, 1.0))[0]) for x in (start, stop))
    name = wrap(region.label, 2 * layout.name_length)
    text = canvas.text(0, 0, name, transform=pixels(canvas), ha="center", va="bottom", color=LIGHT.muted)
    text.set_fontsize(layout.font * 0.92)
    half = text.get_window_extent().width / 2
    text.set_x(min(max((begin + end) / 2, box.x0 + half), box.x1 - half))
    return _Placed(text=text, start=start, stop=stop, begin=begin, end=end)
