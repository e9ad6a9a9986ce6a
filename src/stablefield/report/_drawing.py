"""Draw charts with matplotlib: PNG files, and SVG embedded in a page.

This uses only matplotlib's objects (no pyplot), under its default settings and our style whatever the user's are, so that
the same chart gives the same bytes. Text in SVG stays text, in the page's own font, so it can be searched and scales with
the rest. Its space is measured in DejaVu Sans, which is wider than the fonts that browsers choose.
"""

import html
import io
import math
import re
import textwrap
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stablefield._atomic_file import write_atomically
from stablefield.report._cells import printable
from stablefield.report._chart import LineChart, Region
from stablefield.report._colours import LIGHT
from stablefield.report._extra import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure, FigureBase

__all__ = ["chart_svg", "write_chart"]

WIDTH = 400
"""Width of a chart in points: 30 times the font size, so that text stays legible at 290 pixels, on a phone."""
HEIGHT = 220
"""Approximate height of its axes; names and regions add to it."""
FONT = 13.5
LETTER = 0.57 * FONT
"""Width of a letter, on average."""
DPI = 216
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)), (0, (10, 3)), (0, (4, 1.5, 1, 1.5, 1, 1.5)))
REFERENCE: dict[str, Any] = {"color": LIGHT.muted, "linewidth": 1.3, "linestyle": (0, (1, 2)), "marker": ""}
MOST_MARKERS = 12


def write_chart(charts: LineChart | Sequence[LineChart], path: str | Path) -> Path:
    """Write a chart, or several side by side, as a PNG file on a white background, each 1,200 pixels wide.

    Args:
        charts: the charts, each drawn with its title above it.
        path: the file, which is replaced if it exists; missing folders are created.

    Returns:
        The path.

    Raises:
        ValueError: if there is no chart.
        ImportError: if matplotlib is not installed.
    """
    charts = (charts,) if isinstance(charts, LineChart) else tuple(charts)
    if not charts:
        raise ValueError(f"charts={charts}: pass at least one.")
    path = Path(path)
    with _style():
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure = _figure(max(_height(chart) + 2 * FONT * bool(chart.title) for chart in charts), len(charts), dpi=DPI)
        for panel, chart in zip(figure.subfigures(1, len(charts), squeeze=False)[0], charts, strict=True):
            _draw(panel, chart, chart.title)
        # The canvas draws once; `savefig` draws a second time, for the layout alone.
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        small = _with_palette(np.asarray(canvas.buffer_rgba()))
    write_atomically(path, lambda temporary: temporary.write_bytes(small))
    return path


def _with_palette(picture: NDArray[np.uint8]) -> bytes:
    """An opaque picture (height, width, 4) as PNG in 256 colours: a third of the bytes, and no difference to be seen."""
    from PIL import Image  # which matplotlib itself needs

    drawn, small = Image.fromarray(picture).convert("RGB"), io.BytesIO()
    few = drawn.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    # Each entry becomes the commonest of its colours, so that the ground and the lines keep exactly theirs.
    pixels = picture.reshape(-1, 4)
    colours = pixels.view(">u4")[:, 0]
    # Sort runs of one colour and not pixels, which are a hundred times as many.
    starts = np.append(0, np.flatnonzero(colours[1:] != colours[:-1]) + 1)
    _, places, run = np.unique(colours[starts], return_index=True, return_inverse=True)
    counts = np.bincount(run, np.diff(starts, append=len(colours)))
    places = starts[places[counts.argsort(kind="stable")]]
    palette = np.zeros((256, 3), np.uint8)
    palette[np.asarray(few).flat[places]] = pixels[places, :3]
    few.putpalette(palette.tobytes())
    few.save(small, format="PNG", dpi=(DPI, DPI))
    return small.getvalue()


def chart_svg(chart: LineChart, *, alt: str, prefix: str) -> str:
    """A chart as an <svg> element whose colours are the page's variables.

    Args:
        chart: the chart.
        alt: its description.
        prefix: letters, digits and hyphens before each of its ids, different for each chart of the page.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    height = _height(chart)
    stream = io.StringIO()
    with _style(), warnings.catch_warnings():
        # The browser draws characters that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        figure = _figure(height, 1, facecolor="none", edgecolor="none")
        _draw(figure, chart, "")
        for axes in figure.axes:
            axes.patch.set(facecolor="none", edgecolor="none")
        FigureCanvasSVG(figure).print_svg(stream, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    named = {colour: f"var(--{name}, {colour})" for name, colour in LIGHT.variables().items()}

    def tag(found: re.Match[str]) -> str:
        text = " ".join(found[0].split()).replace("xlink:href=", "href=")
        text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}", text)
        text = re.sub(
            r"font: ([\d.]+px)[^;]*|font-family: [^;]*; ", lambda font: f"font-size: {font[1]}" * bool(font[1]), text
        )
        return re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda colour: named.get(colour[0], colour[0]), text)

    # Matplotlib escapes texts, so everything between < and > is one of its own tags.
    drawn = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|(?<=>)\s+(?=<)", "", stream.getvalue(), flags=re.DOTALL)
    inner = re.sub(r"<[^>]*>", tag, drawn[drawn.index("<svg") :]).partition(">")[2]
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{html.escape(alt)}" '
        f'style="stroke-linejoin: round">{inner}'
    )


@contextmanager
def _style() -> Generator[None]:
    """Apply matplotlib's defaults and our style while drawing a chart; then restore the user's settings."""
    require("matplotlib", "drawing a chart")
    from cycler import cycler
    from matplotlib import style

    ours: dict[str, Any] = {
        "axes.axisbelow": True,
        "axes.edgecolor": LIGHT.ink,
        "axes.labelcolor": LIGHT.ink,
        "axes.linewidth": 1.0,
        "axes.prop_cycle": cycler(color=LIGHT.series, linestyle=DASHES, marker=("o", "s", "^", "D", "v", "P")),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": FONT,
        "axes.xmargin": 0.015,
        "figure.dpi": 72,
        "font.family": "DejaVu Sans",
        "font.size": FONT,
        "grid.color": LIGHT.grid,
        "grid.linewidth": 1.0,
        "legend.borderaxespad": 0.2,
        "legend.borderpad": 0.1,
        "legend.columnspacing": 1.2,
        "legend.fontsize": FONT,
        "legend.frameon": False,
        "legend.labelspacing": 0.35,
        "legend.title_fontsize": FONT * 1.15,
        "lines.linewidth": 2.0,
        "lines.markeredgecolor": LIGHT.ground,
        "lines.markersize": 6.5,
        "savefig.facecolor": LIGHT.ground,
        "svg.fonttype": "none",
        "svg.hashsalt": "stablefield",
        "text.color": LIGHT.ink,
        "text.parse_math": False,
        "xtick.color": LIGHT.ink,
        "ytick.color": LIGHT.ink,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
    }
    with style.context(["default", ours]):
        yield


def _figure(height: float, panels: int, **look: Any) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(panels * WIDTH / 72, height / 72), **look)
    figure.set_layout_engine("constrained", w_pad=4 / 72, h_pad=4 / 72, hspace=0, wspace=0.02)
    return figure


def _height(chart: LineChart) -> float:
    return HEIGHT + FONT * (4 + 1.4 * len(chart.regions) + 1.4 * math.ceil(len(chart.lines) / _columns(chart)))


def _columns(chart: LineChart) -> int:
    """Columns of the legend that fit, at most three."""
    widths = [4.2 * FONT + LETTER * len(line.label) for line in chart.lines]
    for columns in (3, 2):
        # Matplotlib fills them from the left, each as wide as the longest of its labels.
        if sum(part.max() for part in np.array_split(widths, columns) if part.size) < WIDTH + 0.6 * FONT:
            return columns
    return 1


def _wrap(text: str, length: int) -> str:
    return "\n".join(textwrap.wrap(printable(text), length, break_long_words=False))


def _draw(canvas: "FigureBase", chart: LineChart, title: str) -> None:
    ratios = [HEIGHT, 1.4 * FONT * len(chart.regions)] if chart.regions else [1]
    axes, *tracks = canvas.subplots(len(ratios), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for each in (axes, *tracks):
        each.set_xscale("log" if chart.log_x else "linear")
    axes.set_yscale("log" if chart.log_y else "linear")
    drawn = []
    for line in chart.lines:
        every = max(1, math.ceil(len(_array(line.x)) / MOST_MARKERS))
        look = {**REFERENCE, "zorder": 2} if line.reference else {"zorder": 3}
        drawn += axes.plot(_array(line.x), _array(line.y), markevery=(every // 2, every), **look)
    _set_limits(axes, chart)
    for line, artist in zip(chart.lines, drawn, strict=True):
        if line.low is not None and line.high is not None:
            # Clip an edge without a logarithm to the axis.
            low, high = (np.maximum(_array(edge), axes.get_ylim()[0]) for edge in (line.low, line.high))
            axes.fill_between(_array(line.x), low, high, color=artist.get_color(), alpha=0.2, linewidth=0, zorder=2)
    if tracks:
        # The axis of the track serves both; ticks that nobody sees take time.
        for minor in (False, True):
            axes.set_xticks([], minor=minor)
        tracks[0].set_xlim(axes.get_xlim())
    lowest = (axes, *tracks)[-1]
    for axis, log, most in ((lowest.xaxis, chart.log_x, 6), (axes.yaxis, chart.log_y, 7)):
        _set_ticks(axis, log, most)
    _draw_minor_ticks(lowest)
    # Minor ticks of this axis have no size, but each takes time.
    axes.set_yticks([], minor=True)
    axes.grid(axis="y")
    # Above its axis and horizontal, so that it is easy to read and takes no width on a phone.
    axes.set_title(_wrap(chart.y_label, 52))
    lowest.set_xlabel(_wrap(chart.x_label, 48))
    if tracks:
        _draw_regions(axes, tracks[0], chart.regions)
    canvas.legend(
        drawn,
        [_wrap(line.label, 44) for line in chart.lines],
        loc="outside upper left",
        ncols=_columns(chart),
        handlelength=2.2,
        alignment="left",
        title=_wrap(title, 42) or None,
        title_fontproperties={"weight": "bold"},
    )


def _set_limits(axes: "Axes", chart: LineChart) -> None:
    """Set limits that fit the lines and their bands, or those of the chart."""
    least = np.nanmin(np.concatenate([_array(line.y) for line in chart.lines]))
    edges = [_array(edge) for line in chart.lines for edge in (line.low, line.high) if edge is not None]
    seen = np.concatenate([*edges, [least]])
    # A band may come arbitrarily near to zero; on a logarithmic axis the lines decide the lower limit.
    seen = seen[np.isfinite(seen) & ((seen >= least / 3) | (not chart.log_y))]
    axes.update_datalim(np.column_stack([np.full(len(seen), _array(chart.lines[0].x)[0]), seen]))
    axes.autoscale_view()
    low, high = axes.get_ylim()
    if not chart.log_y and 0 <= seen.min() < 0.3 * high:
        low = 0.0  # so near that omitting zero would mislead
    low = low if chart.y_min is None else chart.y_min
    high = high if chart.y_max is None else chart.y_max
    if not low < high:  # all values are beyond the given end
        high = 10 * low if chart.log_y else low + 1
    axes.set_ylim(low, high)
    axes.set_xlim(axes.get_xlim())


def _set_ticks(axis: "Axis", log: bool, most: int) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    if not log:
        axis.set_major_locator(MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10]))
        return
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    # Few decades would leave two or three ticks, so label numbers in between as well.
    subs = (1.0,) if decades > 2.2 else (1.0, 2.0, 5.0) if decades > 0.7 else tuple(range(1, 10))
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=most))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter(NullFormatter())


def _draw_minor_ticks(axes: "Axes") -> None:
    """Draw the minor ticks of the x axis as one line: matplotlib's own, twenty objects, take half the time of a chart."""
    from matplotlib.lines import Line2D

    low, high = axes.get_xlim()
    places = [place for place in axes.xaxis.get_minorticklocs() if low <= place <= high]
    axes.set_xticks([], minor=True)
    look = {"markersize": 2.0, "markeredgewidth": 0.6, "markeredgecolor": LIGHT.ink, "zorder": 2.01}
    ticks = Line2D(places, [0.0] * len(places), linestyle="", marker=3, clip_on=False, **look)  # TICKDOWN
    ticks.set_transform(axes.get_xaxis_transform())
    ticks.set_in_layout(False)
    axes.add_artist(ticks)


def _draw_regions(axes: "Axes", track: "Axes", regions: Sequence[Region]) -> None:
    """Mark where regions begin and end, and name each in its own row below the lines."""
    left, right = axes.get_xlim()
    track.set_ylim(len(regions), 0)
    track.set_yticks([])
    track.spines["left"].set_visible(False)
    for row, region in enumerate(regions):
        start, stop = max(left, region.start or left), min(right, region.stop or right)
        if start >= stop:
            continue
        track.barh(row + 0.5, stop - start, left=start, height=0.8, color=LIGHT.grid, zorder=0)
        for edge in {start, stop} - {left, right}:
            axes.axvline(edge, color=LIGHT.muted, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
        text = _wrap(region.label, 60)
        # As shares of the axis. A name that is longer than its region stands beside it, where there is more room.
        first, last = track.transAxes.inverted().transform(track.transData.transform([(start, 0), (stop, 0)]))[:, 0]
        inside = (last - first) * 0.8 * WIDTH > LETTER * len(text) + 8
        to_the_right = (first < 0.5) if inside else (1 - last > first)
        name = track.annotate(
            text,
            (start if inside == to_the_right else stop, row + 0.5),
            xytext=(4 if to_the_right else -4, 0),
            textcoords="offset points",
            ha="left" if to_the_right else "right",
            va="center_baseline",
        )
        # A name that finds no room may be cut off, but may not take the room of the axes.
        name.set_in_layout(False)


def _array(values: Any) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)
