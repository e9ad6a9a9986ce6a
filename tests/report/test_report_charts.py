"""Charts show their data: what is drawn is read back from the SVG and held against what was given."""

import dataclasses
import itertools
import re
import sys
from functools import cache

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image
from report_example import score_chart, variance_chart
from report_structure import Reader

from stablefield.report import Line, LineChart, Region, write_chart
from stablefield.report._colours import LIGHT
from stablefield.report._drawing import chart_svg

RNG = np.random.default_rng(0)


def chart(*lines, **fields):
    return LineChart(**{"lines": lines, "x_label": "x", "y_label": "y", **fields})


def line(label="a", n=9, **fields):
    return Line(**{"label": label, "x": np.arange(1.0, n + 1), "y": RNG.uniform(1, 2, n), **fields})


@cache
def svg_of(what):
    return chart_svg(what, alt="a chart", prefix="p1-")


def draw(what):
    reader = Reader()
    reader.feed(svg_of(what))
    return reader.root.one("svg")


def number(text):
    """What an axis says."""
    return float(text.replace("\u2212", "-").replace(",", ""))


def scale(svg, axis, log):
    """From pixels to values along x or y, by the texts of the ticks alone."""
    pixels, values = [], []
    for group in svg.all("g"):
        if re.fullmatch(rf"p1-{axis}tick_\d+", group.attributes.get("id", "")) and group.text.strip():
            place = next((use for use in group.all("use")), None) or next(iter(group.all("path")))
            at = place.attributes.get(axis) or re.findall(r"[-\d.]+", place.attributes["d"])[axis == "y"]
            pixels.append(float(at))
            values.append(number(group.text.strip()))
    assert len(pixels) >= 2
    values = np.log10(values) if log else np.array(values)
    fit = np.polyfit(pixels, values, 1)
    # The texts themselves lie on a line: no tick is mislabelled.
    np.testing.assert_allclose(np.polyval(fit, pixels), values, atol=1e-6 * np.ptp(values) + 1e-9)
    return lambda at: 10 ** np.polyval(fit, at) if log else np.polyval(fit, at)


def path_nodes(svg, wanted):
    """Paths within the axes whose style has this in it."""
    return [node for node in svg.all("path") if "clip-path" in node.attributes and wanted in node.attributes["style"]]


def paths(svg, wanted):
    """Their points, shape (points, 2)."""
    found = path_nodes(svg, wanted)
    return [np.array(re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", node.attributes["d"]), dtype=float) for node in found]


def band_of(svg):
    """Points of the one band, which is defined in one place and used in another."""
    (use,) = [node for node in svg.all("use") if "fill-opacity: 0.2" in node.attributes["style"]]
    (path,) = [node for node in svg.all("path") if node.attributes.get("id") == use.attributes["href"][1:]]
    points = np.array(re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path.attributes["d"]), dtype=float)
    return points + np.array([float(use.attributes["x"]), float(use.attributes["y"])])


@pytest.mark.parametrize(("log_x", "log_y"), list(itertools.product([False, True], repeat=2)))
def test_lines_and_bands_lie_where_their_numbers_are(log_x, log_y):
    x = np.geomspace(0.02, 80, 12) if log_x else np.linspace(-3, 5, 12)
    y = np.exp(np.sin(np.arange(12)) * (4 if log_y else 1))
    first = Line(label="first", x=x, y=y, low=0.8 * y, high=1.3 * y)
    second = Line(label="second", x=x[:5], y=y[3:8])
    svg = draw(chart(first, second, log_x=log_x, log_y=log_y))
    to_x, to_y = scale(svg, "x", log_x), scale(svg, "y", log_y)
    for i, drawn in enumerate((first, second), 1):
        (points,) = paths(svg, f"stroke: var(--series-{i},")
        np.testing.assert_allclose(to_x(points[:, 0]), drawn.x, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(to_y(points[:, 1]), drawn.y, rtol=1e-4, atol=1e-4)
    band = band_of(svg)
    corners = {(round(float(to_x(a)), 3), round(float(to_y(b)), 2)) for a, b in band}
    for a, low, high in zip(x, 0.8 * y, 1.3 * y, strict=True):
        assert (round(a, 3), round(low, 2)) in corners
        assert (round(a, 3), round(high, 2)) in corners


def test_a_gap_is_left_where_there_is_no_number():
    svg = draw(chart(Line(label="a", x=range(6), y=[1, 2, np.nan, 4, 5, 3])))
    (node,) = path_nodes(svg, "stroke: var(--series-1")
    assert node.attributes["d"].count("M") == 2
    assert len(paths(svg, "stroke: var(--series-1")[0]) == 5


def test_a_band_that_reaches_zero_ends_at_a_logarithmic_axis():
    drawn = Line(label="a", x=[1, 2, 3], y=[1.0, 2.0, 1.0], low=[-1.0, 0.0, 0.5], high=[2.0, 3.0, 2.0])
    svg = draw(chart(drawn, log_y=True))
    band = band_of(svg)
    assert np.isfinite(band).all()
    axes_bottom = max(float(node.attributes["y"]) + float(node.attributes["height"]) for node in svg.all("rect"))
    assert band[:, 1].max() == pytest.approx(axes_bottom, abs=0.01)


def test_regions_are_shaded_between_their_edges_and_named():
    svg = draw(
        chart(
            Line(label="a", x=[0.1, 100], y=[1, 2]),
            log_x=True,
            regions=(
                Region(label="low", stop=1),
                Region(label="rest", start=1),
                Region(label="over", start=5, stop=20),
            ),
        )
    )
    to_x = scale(svg, "x", True)
    shaded = paths(svg, "fill: var(--grid")
    spans = [(float(to_x(points[:, 0].min())), float(to_x(points[:, 0].max()))) for points in shaded]
    assert spans == [
        (pytest.approx(0.09, rel=0.02), pytest.approx(1, rel=1e-3)),
        (pytest.approx(1, rel=1e-3), pytest.approx(111, rel=0.02)),
        (pytest.approx(5, rel=1e-3), pytest.approx(20, rel=1e-3)),
    ]
    edges = {round(float(to_x(points[0, 0])), 2) for points in paths(svg, "stroke-dasharray: 1.6") if len(points) == 2}
    assert edges == {1.0, 5.0, 20.0}
    assert {"low", "rest", "over"} <= {node.text for node in svg.all("text")}


def test_a_region_beyond_the_axis_is_left_out():
    svg = draw(chart(line(), regions=(Region(label="far", start=1e6), Region(label="near", start=2, stop=1e9))))
    texts = {node.text for node in svg.all("text")}
    assert "near" in texts
    assert "far" not in texts


def test_the_name_of_a_region_too_narrow_for_it_stands_beside_it():
    regions = (Region(label="wide enough", stop=5), Region(label="the posterior is the prior", start=90))
    svg = draw(chart(Line(label="a", x=[0.1, 100], y=[1, 2]), log_x=True, regions=regions))
    inside, beside = (next(node for node in svg.all("text") if node.text == region.label) for region in regions)
    assert "text-anchor: end" not in inside.attributes["style"]
    assert "text-anchor: end" in beside.attributes["style"]


def test_lines_are_told_apart_without_colour():
    svg = draw(chart(*(line(f"line {i}") for i in range(6))))
    styles = [dash(svg, i) for i in range(1, 7)]
    assert len(set(styles)) == 6
    markers = {
        node.inner[0].attributes["d"]
        for node in svg.all("defs")
        if node.inner and "stroke: var(--ground" in node.inner[0].attributes.get("style", "")
    }
    assert len(markers) == 6


def dash(svg, i):
    (node,) = path_nodes(svg, f"stroke: var(--series-{i},")
    found = re.search(r"stroke-dasharray: ([\d., ]+)", node.attributes["style"])
    return found[1] if found else "unbroken"


def test_every_colour_is_named_so_that_the_page_can_change_it():
    for what in (variance_chart(), score_chart()):
        svg = draw(what)
        values = [value for node in svg.all() for name, value in node.attributes.items() if name not in {"href", "id"}]
        styles = " ".join(values)
        bare = re.sub(r"var\(--[\w-]+, #[0-9a-f]{6}\)", "", styles)
        assert "#" not in bare.replace("url(#", "")
        assert "var(--series-2" in styles
        assert "DejaVu" not in styles
        assert all("fill: var(--ink" in text.attributes["style"] for text in svg.all("text"))


def test_the_users_settings_change_nothing_and_are_left_as_they_were(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # whoever imports it now, fails
    before = svg_of(variance_chart())
    mine = {
        "font.size": 31.0,
        "axes.facecolor": "pink",
        "svg.fonttype": "path",
        "axes.prop_cycle": mpl.cycler(color="k"),
    }
    with mpl.rc_context(mine):
        assert chart_svg(variance_chart(), alt="a chart", prefix="p1-") == before
        assert {name: mpl.rcParams[name] for name in mine} == mine


def test_a_chart_is_the_same_each_time_and_as_a_picture(tmp_path):
    titled = dataclasses.replace(variance_chart(), title="Variance")
    one, two = (write_chart(titled, tmp_path / "new" / f"{i}.png") for i in range(2))
    assert one.read_bytes() == two.read_bytes()
    assert sorted(file.name for file in one.parent.iterdir()) == ["0.png", "1.png"]
    with Image.open(one) as image:
        assert image.width == 1200
        assert image.mode == "P"  # a third of the bytes
        assert not image.info.keys() & {"Software", "Creation Time"}
        pixels = np.asarray(image.convert("RGB")).astype(int) @ [65536, 256, 1]
    assert pixels[0, 0] == 0xFFFFFF
    for colour in LIGHT.series[:4]:
        assert (pixels == int(colour[1:], 16)).sum() > 200
    with pytest.raises(ValueError, match="at least one"):
        write_chart([], tmp_path / "x.png")


def test_several_charts_stand_beside_each_other_in_one_picture(tmp_path):
    path = write_chart([variance_chart(), score_chart()], tmp_path / "two.png")
    with Image.open(path) as image:
        assert image.width == 2400
        pixels = np.asarray(image.convert("RGB"))
    assert all((half < 128).any() for half in (pixels[:, :1200], pixels[:, 1200:]))


@pytest.mark.parametrize(
    ("values", "log", "texts"),
    [
        ([0.01, 100], True, {"0.01", "0.1", "1", "10", "100"}),
        ([1e3, 1e5], True, {"1,000", "10,000", "100,000"}),
        ([1e-12, 1e4], True, {"1e\u221212", "0.001", "1"}),
        ([1.1, 6], True, {"2", "5"}),
        ([0, 1], False, {"0.0", "0.2", "1.0"}),
        ([-2, 2], False, {"\u22122", "0", "2"}),
        ([0, 15000], False, {"0", "5000", "15000"}),
    ],
)
def test_axes_speak_plainly(values, log, texts):
    svg = draw(chart(Line(label="a", x=values, y=[1, 2]), log_x=log))
    shown = {node.text.strip() for node in svg.all("g") if re.search(r"-xtick_\d+$", node.attributes.get("id", ""))}
    assert texts <= shown


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: line(label=" "), "label=' ' of a Line is empty"),
        (lambda: line(y=[1.0, 2.0]), r"'a' has fields of different lengths \(x 9, y 2\)"),
        (lambda: line(x=[[1.0]], y=[1.0]), r"x of 'a' has shape \(1, 1\)"),
        (lambda: line(x=[], y=[]), r"x of 'a' has shape \(0,\)"),
        (lambda: line(x=["one"], y=[1.0]), "x of 'a' is not a sequence of numbers"),
        (lambda: line(x=[1.0, 1.0], y=[1.0, 1.0]), "x of Line 'a' does not increase"),
        (lambda: line(x=[1.0, np.nan], y=[1.0, 1.0]), "does not increase"),
        (lambda: line(x=[1.0, 2.0], y=[np.nan, np.nan]), "has no numbers"),
        (lambda: line(x=[1.0, 2.0], y=[1.0, np.inf]), "y of 'a' holds an infinite value: use nan for gaps"),
        (lambda: line(low=[0.0] * 9), "one edge of a band"),
        (lambda: line(low=[3.0] * 9, high=[2.0] * 9), "low of Line 'a' is above high"),
        (lambda: chart(), "draw 1 to 6"),
        (lambda: chart(*(line(f"{i}") for i in range(7))), "are 7"),
        (lambda: chart(line(), x_label=" "), "labels of axes"),
        (lambda: chart(line(x=[0.0, 1.0], y=[1.0, 1.0]), log_x=True), r"x of Line 'a' holds 0\.0, and log_x is set"),
        (lambda: chart(line(x=[1.0, 2.0], y=[1.0, -1.0]), log_y=True), r"y of Line 'a' holds -1\.0, and log_y is set"),
        (lambda: chart(line(), y_min=3, y_max=2), "y_min must be below"),
        (lambda: chart(line(), log_y=True, y_min=0), "y_min=0, which is not on this y axis"),
        (lambda: chart(line(), log_x=True, regions=(Region(label="r", start=0),)), "Region 'r' has an edge at 0"),
        (lambda: Region(label="r", start=2, stop=2), "start must be below stop"),
        (lambda: Region(label=""), "label='' of a Region"),
    ],
)
def test_a_chart_that_cannot_be_drawn_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "what",
    [
        chart(Line(label="one point", x=[3], y=[2])),
        chart(Line(label="one point", x=[3], y=[2], low=[1], high=[3]), log_x=True, log_y=True),
        chart(Line(label="flat at zero", x=[0, 1], y=[0, 0])),
        chart(Line(label="all above", x=[0, 1], y=[3, 4]), y_max=2),
        chart(Line(label="all below", x=[1, 2], y=[3, 4]), y_min=5, log_y=True),
        chart(
            Line(label="vast", x=np.geomspace(1e-9, 1e9, 50), y=np.geomspace(1e-30, 1e30, 50)), log_x=True, log_y=True
        ),
        chart(Line(label="thin", x=[1, 2], y=[1e9, 1e9 + 1e-3])),
        chart(Line(label="only a law", x=[1, 2], y=[1, 2], reference=True)),
        chart(*(Line(label="long name " * 5 + str(i), x=[0, 1], y=[1, 1]) for i in range(6))),
    ],
    ids=lambda what: what.lines[0].label[:12],
)
def test_edges_are_drawn_without_a_warning(what):
    assert len(list(draw(what).all("text"))) >= 3
