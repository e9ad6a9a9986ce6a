"""Charts show their data: what is drawn is read back from the SVG and held against what was given."""

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

from stablefield.report import BarChart, Bars, Line, LineChart, Region, chart_figure, write_chart
from stablefield.report.colours import LIGHT
from stablefield.report.ticks import tick_texts

RNG = np.random.default_rng(0)


def chart(*lines, **fields):
    return LineChart(**{"lines": lines, "x_label": "x", "y_label": "y", **fields})


def line(label="a", n=9, **fields):
    return Line(**{"label": label, "x": np.arange(1.0, n + 1), "y": RNG.uniform(1, 2, n), **fields})


@cache
def figure_of(what):
    return chart_figure(what, alt="a chart")


def draw(what, narrow=False):
    figure = figure_of(what)
    reader = Reader()
    reader.feed(figure.narrow_svg if narrow else figure.svg)
    return reader.root.one("svg")


def number(text):
    """What an axis says."""
    text = text.replace("−", "-").replace("\u202f", "")
    mantissa, found, power = re.fullmatch(r"(?:(.*?)·)?(10)?([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)|.*", text).groups()
    if not found:
        return float(text)
    return float(mantissa or 1) * 10.0 ** int(power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")))


def scale(svg, axis, log):
    """From pixels to values along x or y, by the texts of the ticks alone."""
    pixels, values = [], []
    for group in svg.all("g"):
        if re.fullmatch(rf"{axis}tick_\d+", group.attributes.get("id", "")) and group.text.strip():
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


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("log_x", "log_y"), list(itertools.product([False, True], repeat=2)))
def test_lines_and_bands_lie_where_their_numbers_are(log_x, log_y, narrow):
    x = np.geomspace(0.02, 80, 12) if log_x else np.linspace(-3, 5, 12)
    y = np.exp(np.sin(np.arange(12)) * (4 if log_y else 1))
    first = Line(label="first", x=x, y=y, low=0.8 * y, high=1.3 * y)
    second = Line(label="second", x=x[:5], y=y[3:8])
    svg = draw(chart(first, second, log_x=log_x, log_y=log_y), narrow)
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


@pytest.mark.parametrize("narrow", [False, True])
def test_regions_are_shaded_between_their_edges_and_named(narrow):
    svg = draw(
        chart(
            Line(label="a", x=[0.1, 100], y=[1, 2]),
            log_x=True,
            regions=(
                Region(label="low", stop=1),
                Region(label="rest", start=1),
                Region(label="over", start=5, stop=20),
            ),
        ),
        narrow,
    )
    to_x = scale(svg, "x", True)
    shaded = paths(svg, "fill: var(--shade")
    assert len(shaded) == 1
    assert to_x(shaded[0][:, 0].max()) == pytest.approx(1, rel=1e-3)
    assert to_x(shaded[0][:, 0].min()) < 0.1
    edges = {round(float(to_x(points[0, 0])), 2) for points in paths(svg, "stroke-dasharray: 1.6") if len(points) == 2}
    assert edges == {1.0, 5.0, 20.0}
    assert {"low", "rest", "over"} <= {node.text for node in svg.all("text")}


def test_a_region_beyond_the_axis_is_left_out():
    svg = draw(chart(line(), regions=(Region(label="far", start=1e6), Region(label="near", start=2, stop=1e9))))
    texts = {node.text for node in svg.all("text")}
    assert "near" in texts
    assert "far" not in texts


@pytest.mark.parametrize("narrow", [False, True])
def test_bars_and_their_errors_are_as_long_as_their_numbers(narrow):
    first = Bars(
        label="first", values=[1.5, -0.5, 3], low=[1, -1, 2], high=[2, 0.25, 3.5], points=([1.2, 1.8], [-0.5], [])
    )
    second = Bars(label="second", values=[2, np.nan, 1])
    svg = draw(BarChart(categories=("a", "b", "c"), series=(first, second), value_label="v"), narrow)
    to_x = scale(svg, "x", False)
    for i, bars in enumerate((first, second), 1):
        drawn = [to_x(points[:, 0]) for points in paths(svg, "fill: var(--series-1," if i == 1 else "fill: url(#")]
        spans = [(round(float(v.min()), 3), round(float(v.max()), 3)) for v in drawn]
        assert spans == [(min(v, 0), max(v, 0)) if v == v else (0, 0) for v in bars.values]
    errors = [
        to_x(points[:, 0])
        for points in paths(svg, "stroke: var(--ink")
        if len(points) == 2 and np.ptp(points[:, 1]) == 0
    ]
    assert sorted((round(v.min(), 3), round(v.max(), 3)) for v in errors) == [(-1, 0.25), (1, 2), (2, 3.5)]
    texts = [node.text for node in svg.all("text")]
    assert [text for text in texts if text in {"1.50", "−0.500", "3.00", "2.00", "–", "1.00"}] == [
        "1.50", "−0.500", "3.00", "2.00", "–", "1.00"
    ]  # fmt: skip


def test_bars_stand_on_the_edge_of_the_axes():
    for values, edge in (([1, 2], "x"), ([-1, -2], None)):
        svg = draw(BarChart(categories=("a", "b"), series=(Bars(label="a", values=values),), value_label="v"))
        box = svg.one("rect").attributes
        zero = float(box["x"]) + (0 if edge else float(box["width"]))
        assert scale(svg, "x", False)(zero) == pytest.approx(0, abs=1e-3)


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
        for narrow in (False, True):
            svg = draw(what, narrow)
            values = [
                value for node in svg.all() for name, value in node.attributes.items() if name not in {"href", "id"}
            ]
            styles = " ".join(values)
            bare = re.sub(r"var\(--[\w-]+, #[0-9a-f]{6}\)", "", styles)
            assert "#" not in bare.replace("url(#", "")
            assert "var(--series-2" in styles
            assert "font-family" not in styles
            for text in svg.all("text"):
                assert "fill: var(--ink" in text.attributes["style"] or "fill: var(--muted" in text.attributes["style"]


def test_the_users_settings_change_nothing_and_are_left_as_they_were(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # whoever imports it now, fails
    before = figure_of(variance_chart())
    mine = {
        "font.size": 31.0,
        "axes.facecolor": "pink",
        "svg.fonttype": "path",
        "axes.prop_cycle": mpl.cycler(color="k"),
    }
    with mpl.rc_context(mine):
        assert chart_figure(variance_chart(), alt="a chart") == before
        assert {name: mpl.rcParams[name] for name in mine} == mine


def test_a_chart_is_the_same_each_time_and_as_a_picture(tmp_path):
    one, two = (write_chart(variance_chart(), tmp_path / "new" / f"{i}.png", title="Variance") for i in range(2))
    assert one.read_bytes() == two.read_bytes()
    assert sorted(file.name for file in one.parent.iterdir()) == ["0.png", "1.png"]
    with Image.open(one) as image:
        assert image.size == (1440, 800)
        assert not image.info.keys() & {"Software", "Creation Time"}
        pixels = np.asarray(image.convert("RGB")).astype(int) @ [65536, 256, 1]
    assert pixels[0, 0] == 0xFFFFFF
    for colour in LIGHT.series[:4]:
        assert (pixels == int(colour[1:], 16)).sum() > 200
    with pytest.raises(ValueError, match="scale=0"):
        write_chart(variance_chart(), tmp_path / "x.png", scale=0)


@pytest.mark.parametrize(
    ("values", "log", "texts"),
    [
        ([0.01, 0.1, 1, 10, 100], True, ["0.01", "0.1", "1", "10", "100"]),
        ([1e-12, 1e-4, 1e4], True, ["10⁻¹²", "10⁻⁴", "10⁴"]),
        ([2e-5, 1e-4], True, ["2·10⁻⁵", "10⁻⁴"]),
        ([10000.0, 100000.0], True, ["10\u202f000", "100\u202f000"]),
        ([0, 0.5, 1], False, ["0.0", "0.5", "1.0"]),
        ([-2, 0, 2], False, ["−2", "0", "2"]),
        ([0, 0.25, 0.5], False, ["0.00", "0.25", "0.50"]),
        ([0, 50e6, 100e6], False, ["0", "50·10⁶", "100·10⁶"]),
        ([0, 2e-7], False, ["0", "200·10⁻⁹"]),
        ([0, 7500, 15000], False, ["0", "7500", "15\u202f000"]),
    ],
)
def test_axes_speak_plainly(values, log, texts):
    assert tick_texts(values, log=log) == texts


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
        (lambda: line(x=[1.0, 2.0], y=[np.nan, np.nan]), "has no number at all"),
        (lambda: line(x=[1.0, 2.0], y=[1.0, np.inf]), "y of 'a' holds an infinite value: put nan"),
        (lambda: line(low=[0.0] * 9), "one edge of a band"),
        (lambda: line(low=[3.0] * 9, high=[2.0] * 9), "low of Line 'a' lies above high"),
        (lambda: chart(), "draw 1 to 6"),
        (lambda: chart(*(line(f"{i}") for i in range(7))), "are 7"),
        (lambda: chart(line(), x_label=" "), "labels of axes"),
        (lambda: chart(line(x=[0.0, 1.0], y=[1.0, 1.0]), log_x=True), r"x of Line 'a' holds 0\.0, and log_x is set"),
        (lambda: chart(line(x=[1.0, 2.0], y=[1.0, -1.0]), log_y=True), r"y of Line 'a' holds -1\.0, and log_y is set"),
        (lambda: chart(line(), y_min=3, y_max=2), "y_min must lie below"),
        (lambda: chart(line(), log_y=True, y_min=0), "y_min=0, which this y axis does not have"),
        (lambda: chart(line(), log_x=True, regions=(Region(label="r", start=0),)), "Region 'r' has an edge at 0"),
        (lambda: Region(label="r", start=2, stop=2), "start must lie below stop"),
        (lambda: Region(label=""), "label='' of a Region"),
        (lambda: Bars(label="b", values=[1], low=[2], high=[3]), r"1\.0, lies outside its error bar, 2\.0 to 3\.0"),
        (lambda: Bars(label="b", values=[1], high=[3]), "one end of error bars"),
        (lambda: Bars(label="b", values=[1, 2], points=([1],)), "points of Bars 'b' are for 1 bars, values for 2"),
        (lambda: BarChart(categories=(), series=(Bars(label="b", values=[1]),), value_label="v"), "categories"),
        (lambda: BarChart(categories=("a",), series=(), value_label="v"), "of 0 series"),
        (
            lambda: BarChart(categories=("a",), series=(Bars(label="b", values=[1, 2]),), value_label="v"),
            "2 values, but",
        ),
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
        BarChart(categories=("a",), series=(Bars(label="zero", values=[0]),), value_label="v"),
        BarChart(categories=("a", "b"), series=(Bars(label="below", values=[-1, -2]),), value_label="v"),
        BarChart(categories=("a",), series=(Bars(label="none", values=[np.nan]),), value_label="v"),
    ],
    ids=lambda what: (what.lines[0] if isinstance(what, LineChart) else what.series[0]).label[:12],
)
def test_edges_are_drawn_without_a_warning(what):
    for narrow in (False, True):
        assert len(list(draw(what, narrow).all("text"))) >= 3
