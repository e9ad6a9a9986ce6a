"""Drawing charts with matplotlib: SVG for a page, in a wide and a narrow layout, and PNG files.

Only matplotlib's objects are used (no pyplot), under its default settings whatever the user's are, so that the same
chart gives the same bytes. Text in SVG stays text, in the page's own font: it can be searched and scales with the rest.
Its room is measured in DejaVu Sans, which is wider than what browsers choose.
"""

import io
import re
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stablefield.atomic_file import write_atomically
from stablefield.report.chart import Chart, LineChart
from stablefield.report.colours import LIGHT
from stablefield.report.extra import require
from stablefield.report.layout import NARROW, WIDE, Layout, wrap
from stablefield.report.page import Figure
from stablefield.report.svg import parse_svg, write_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["chart_figure", "write_chart"]

DPI = 72
"""Dots per inch of a drawing: a point is a pixel."""


def chart_figure(chart: Chart, *, alt: str, caption: str = "", title: str = "") -> Figure:
    """A chart as a figure of a page.

    Args:
        chart: what to draw.
        alt: what it shows, in words.
        caption: the text below.
        title: set in bold in front of the caption.

    Raises:
        ValueError: if `alt` is empty.
        ImportError: if matplotlib is not installed.
    """
    return Figure(alt=alt, caption=caption, title=title, svg=_svg(chart, WIDE), narrow_svg=_svg(chart, NARROW))


def write_chart(chart: Chart, path: str | Path, *, title: str = "", scale: float = 2.0) -> Path:
    """Write a chart as a PNG file on white ground, whole or not at all.

    Args:
        chart: what to draw.
        path: the file; folders on the way are made, a file of that name is replaced.
        title: set above the chart.
        scale: pixels per unit of the wide layout, which is 720 by 400 units.

    Returns:
        The path.

    Raises:
        ValueError: if `scale` is not positive.
        ImportError: if matplotlib is not installed.
    """
    if not scale > 0:
        raise ValueError(f"scale={scale}: pass how many pixels a unit has, such as 2.")
    path = Path(path)
    look: dict[str, Any] = {"facecolor": LIGHT.ground, "metadata": {"Software": None}}
    with _settings(WIDE):
        canvas = _draw(chart, WIDE, title)
        write_atomically(path, lambda temporary: canvas.savefig(temporary, format="png", dpi=DPI * scale, **look))
    return path


def _svg(chart: Chart, layout: Layout) -> str:
    stream = io.StringIO()
    with _settings(layout), warnings.catch_warnings():
        # Text stays text: a character that matplotlib's own font lacks is the browser's to draw.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        canvas = _draw(chart, layout, "")
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.savefig(stream, format="svg", transparent=True, metadata=nothing)
    return _for_a_page(stream.getvalue())


@contextmanager
def _settings(layout: Layout) -> Generator[None]:
    """Matplotlib's defaults, and ours over them, while a chart is drawn; the user's come back after."""
    require("matplotlib", "drawing a chart")
    from matplotlib import style

    ours: dict[str, Any] = {
        "axes.edgecolor": LIGHT.ink,
        "axes.labelcolor": LIGHT.ink,
        "axes.linewidth": 1.0,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.dpi": DPI,
        "font.family": "DejaVu Sans",
        "font.size": layout.font,
        "hatch.linewidth": 1.0,
        "legend.fontsize": layout.font,
        "svg.fonttype": "none",
        "svg.hashsalt": "stablefield",
        "text.color": LIGHT.ink,
        "text.parse_math": False,
        "xtick.color": LIGHT.ink,
        "ytick.color": LIGHT.ink,
    }
    with style.context(["default", ours]):
        yield


def _draw(chart: Chart, layout: Layout, title: str) -> "Canvas":
    from matplotlib.figure import Figure as Canvas

    from stablefield.report.bars import draw_bars, height_of
    from stablefield.report.lines import draw_lines

    height = layout.height if isinstance(chart, LineChart) else height_of(chart, layout)
    canvas = Canvas(figsize=(layout.width / DPI, height / DPI), dpi=DPI)
    canvas.set_layout_engine("constrained", w_pad=4 / DPI, h_pad=4 / DPI)
    if title:
        canvas.suptitle(
            wrap(title, layout.width // 9),
            x=4 / layout.width,
            ha="left",
            fontsize=layout.font * 1.15,
            fontweight="bold",
        )
    if isinstance(chart, LineChart):
        draw_lines(canvas, chart, layout)
    else:
        draw_bars(canvas, chart, layout)
    return canvas


def _for_a_page(text: str) -> str:
    """Matplotlib's SVG without prologue, style sheet and fixed size, its colours named and its font the page's."""
    root = parse_svg("svg", text[text.index("<svg") :])
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in {"metadata", "style"} or (child.tag == "defs" and all(e.tag == "style" for e in child)):
                parent.remove(child)
    named = {colour: f"var(--{name}, {colour})" for name, colour in LIGHT.variables().items()}
    for element in root.iter():
        for name, value in element.attrib.items():
            element.set(name, " ".join(value.split()))
        for name in {"fill", "stroke"} & element.attrib.keys():
            # An attribute of its own, as on the ground of a hatch, cannot be relied on to take a variable.
            element.set("style", f"{name}: {element.attrib.pop(name)}; {element.get('style', '')}")
        if (style := element.get("style")) is not None:
            style = re.sub(r"#[0-9a-f]{6}\b", lambda found: named.get(found[0], found[0]), style)
            # The short form, "font: 700 13px 'DejaVu Sans'", is what older versions write.
            style = re.sub(r"font: (?:(\d+) )?([\d.]+px)[^;]*", _font, style)
            element.set("style", re.sub(r"font-family: [^;]*(; )?", "", style))
        if element.tag != "text":
            element.text = None
        element.tail = None
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    return write_svg(root)


def _font(found: re.Match[str]) -> str:
    weight = f"font-weight: {found[1]}; " if found[1] else ""
    return f"{weight}font-size: {found[2]}"
