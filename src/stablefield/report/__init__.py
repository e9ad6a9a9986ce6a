"""Reports and pictures: one self-contained HTML file, and the charts in it.

A `Page` consists of blocks, and `write_page` writes it. A chart is data (`LineChart`) until a page with a `Figure` of it is
rendered, or `write_chart` makes a PNG file of it. `image_figure` shows images.

Drawing needs matplotlib, writing a page needs Jinja2: the extra `stablefield[report]`. Both are imported where they are
used.
"""

from stablefield.report._cells import Estimate
from stablefield.report._chart import Line, LineChart, Region
from stablefield.report._drawing import write_chart
from stablefield.report._images import image_figure
from stablefield.report._page import (
    Block,
    Bullets,
    Code,
    Details,
    Figure,
    KeyFigure,
    KeyFigures,
    Page,
    Section,
    SideBySide,
    Table,
    Text,
    json_details,
)
from stablefield.report._render import render_page, write_page

__all__ = [
    "Block",
    "Bullets",
    "Code",
    "Details",
    "Estimate",
    "Figure",
    "KeyFigure",
    "KeyFigures",
    "Line",
    "LineChart",
    "Page",
    "Region",
    "Section",
    "SideBySide",
    "Table",
    "Text",
    "image_figure",
    "json_details",
    "render_page",
    "write_chart",
    "write_page",
]
