"""The file: well-formed, told in words too, closed to the outside, the same each time, whole or not at all."""

import base64
import importlib
import io
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hatchling.builders.wheel import WheelBuilder
from PIL import Image
from report_example import example_page, variance_chart
from report_structure import read

import stablefield
from stablefield.report import (
    Bullets,
    Code,
    Details,
    Estimate,
    Figure,
    KeyFigure,
    KeyFigures,
    Line,
    LineChart,
    Page,
    Region,
    Section,
    SideBySide,
    Table,
    Text,
    image_figure,
    json_details,
    render_page,
    write_page,
)

LINE = LineChart(lines=(Line(label="a", x=[1, 2], y=[1, 2]),), x_label="x", y_label="y")
HOSTILE = "<script>alert(1)</script> \"' onload=x &amp; {{ 7 * 7 }} {% raw %} ]]> --> </style> `<b>`"


@pytest.fixture(scope="module")
def example():
    return render_page(example_page())


@pytest.fixture(scope="module")
def tree(example):
    return read(example)


def page(*blocks, **fields):
    return Page(**{"title": "title", "summary": "summary", "blocks": blocks or (Text("text"),), **fields})


# --- structure --------------------------------------------------------------------------------------------------------


def test_every_picture_says_in_words_what_it_shows(tree):
    pictures = list(tree.all("svg", "img"))
    assert len(pictures) == 6  # three charts, three grids
    for picture in pictures:
        if picture.tag == "img":
            assert len(picture.attributes["alt"]) > 10
        else:
            assert picture.attributes["role"] == "img"
            assert len(picture.attributes["aria-label"]) > 10


def test_nothing_points_out_of_the_file(example, tree):
    for node in tree.all():
        for name, value in node.attributes.items():
            if name in {"src", "href", "xlink:href", "data", "action", "poster", "srcset"}:
                assert value.startswith(("#", "data:")), (node.tag, name, value[:60])
    assert all(found.startswith("#") for found in re.findall(r"url\((.*?)\)", example))
    assert "@import" not in example
    assert not list(tree.all("script", "iframe", "object", "embed", "base", "form"))
    policy = next(n for n in tree.all("meta") if n.attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.attributes["content"].startswith("default-src 'none'")
    assert not re.findall(r"https?://[\w./-]+", example)


def test_ids_are_unique_and_every_reference_within_the_page_finds_one(example, tree):
    ids = [node.attributes["id"] for node in tree.all() if "id" in node.attributes]
    assert len(set(ids)) == len(ids) > 50
    inward = [node.attributes["href"][1:] for node in tree.all() if node.attributes.get("href", "").startswith("#")]
    inward += re.findall(r"url\(#(.*?)\)", example)
    inward += [node.attributes["aria-labelledby"] for node in tree.all() if "aria-labelledby" in node.attributes]
    assert len(inward) > 50
    assert set(inward) <= set(ids)


def test_headings_are_in_order_and_the_first_is_the_title(tree):
    levels = [int(node.tag[1]) for node in tree.all(*(f"h{i}" for i in range(1, 7)))]
    assert levels.count(1) == 1
    assert levels == [1, 2, 2, 3, 2, 2]
    assert tree.one("h1").text.strip() == tree.one("title").text.strip() == "Target variance of digits"
    assert tree.one("html").attributes["lang"] == "en"


def test_sections_can_be_reached_from_the_contents(tree):
    links = list(tree.one("nav").all("a"))
    sections = {node.attributes["id"]: node for node in tree.all("section") if "id" in node.attributes}
    assert len(links) == len(sections) == 4
    for link in links:
        section = sections[link.attributes["href"][1:]]
        assert next(section.all("h2")).text.strip() == link.text.strip()
    assert not list(read(render_page(page(Section("a", (Text("b"),))))).all("nav"))


def test_columns_of_numbers_are_set_on_their_points_and_others_are_not():
    table = Table(
        columns=("name", "value", "count", "note"),
        rows=(("a", 0.0373, 12, "1.5 of 2"), ("b", 29.9, None, "x"), ("c", Estimate(1.5, 0.25), 50_000, "y")),
        caption="About these",
        marked=1,
    )
    tree = read(render_page(page(table)))
    rows = [list(row.all("th", "td")) for row in tree.one("tbody").all("tr")]
    assert [[cell.text for cell in row] for row in rows] == [
        ["a", "0.0373", "12", "1.5 of 2"],
        ["b", "29.9", "–", "x"],
        ["c", "1.50 ± 0.25", "50\u202f000", "y"],
    ]
    numeric = [["number" in cell.attributes.get("class", "") for cell in row] for row in rows]
    assert numeric == [[False, True, True, False]] * 3
    # What follows the point is as wide in every row: as the longest of them.
    rests = [row[1].one("span") for row in rows]
    assert [rest.text for rest in rests] == [".0373", ".9", ".50 ± 0.25"]
    assert {rest.attributes["style"] for rest in rests} == {f"min-width:{len('.50 ± 0.25')}ch"}
    assert [row[0].attributes for row in rows] == [{"scope": "row"}] * 3
    assert [node.attributes.get("class") for node in tree.one("tbody").all("tr")] == [None, "marked", None]
    assert all(node.attributes["scope"] == "col" for node in tree.one("thead").all("th"))
    box = next(node for node in tree.all("div") if node.attributes.get("class") == "scroll")
    assert box.attributes["tabindex"] == "0"
    assert tree.one("figcaption").attributes["id"] == box.attributes["aria-labelledby"]


def test_paragraphs_and_code_are_marked():
    tree = read(render_page(page(Text("one `a < b` two\n\nthree ` four"), Bullets(["x", "`y`"]), Code("  z\n"))))
    paragraphs = [node.text.strip() for node in tree.one("main").all("p")]
    assert paragraphs == ["summary", "one a < b two", "three ` four"]
    assert [node.text for node in tree.all("code")] == ["a < b", "y", "  z\n"]


# --- what is written is what is meant ---------------------------------------------------------------------------------


def test_hostile_text_stays_text_wherever_it_stands():
    everywhere = Page(
        title=HOSTILE,
        summary=HOSTILE,
        footer=HOSTILE,
        blocks=(
            KeyFigures((KeyFigure(value=HOSTILE, label=HOSTILE, note=HOSTILE),)),
            Section(HOSTILE, (Text(HOSTILE), Bullets((HOSTILE,)), Code(HOSTILE))),
            Table(columns=(HOSTILE, "n"), rows=((HOSTILE, 1),), caption=HOSTILE),
            Table(columns=(HOSTILE, "n"), rows=((HOSTILE, 1),)),
            Figure(LINE, alt=HOSTILE, caption=HOSTILE, title=HOSTILE),
            image_figure(np.zeros((1, 1, 2, 2), np.uint8), alt=HOSTILE),
            Figure(
                LineChart(
                    lines=(Line(label=HOSTILE, x=[1, 2], y=[1, 2]),),
                    x_label=HOSTILE,
                    y_label=HOSTILE,
                    regions=(Region(label=HOSTILE),),
                ),
                alt=HOSTILE,
            ),
            Details(HOSTILE, (Text(HOSTILE),)),
            json_details("record", {HOSTILE: HOSTILE}),
        ),
    )
    text = render_page(everywhere)
    tree = read(text)
    assert not list(tree.all("script", "b"))
    assert len(list(tree.all("style"))) == 1
    assert not [name for node in tree.all() for name in node.attributes if name.startswith("on")]
    shown = HOSTILE.replace("`", "")
    assert tree.one("title").text == HOSTILE
    assert tree.one("h1").text.strip() == shown
    assert next(tree.all("img")).attributes["alt"] == HOSTILE
    assert {node.attributes["aria-label"] for node in tree.all("svg")} == {HOSTILE}
    assert shown in tree.one("footer").text
    drawn = " ".join(node.text for node in tree.all("svg"))
    assert "<script>alert(1)</script>" in drawn
    assert "{{ 7 * 7 }}" in drawn


def test_signs_that_no_file_can_hold_are_replaced(tmp_path):
    odd = "a\x00b\x1b[31m\udce9 \ufffe 数字 🙂"
    chart = LineChart(lines=(Line(label=odd, x=[1, 2], y=[1, 2]),), x_label=odd, y_label=odd)
    path = write_page(page(Text(odd), Figure(chart, alt=odd), title=odd), tmp_path / "a.html")
    text = path.read_text("utf-8")
    assert "a\ufffdb\ufffd[31m\ufffd \ufffd 数字 🙂" in text
    read(text)


def test_a_grid_of_images_holds_the_pixels_and_is_clear_between_them():
    images = np.random.default_rng(0).integers(0, 255, (6, 3, 5, 7), dtype=np.uint8)
    figure = image_figure(images, alt="noise", columns=3)
    picture = np.asarray(Image.open(io.BytesIO(figure.picture)))
    scale = 18  # the largest whole factor that keeps an image within 128 pixels
    assert figure.size == (3 * (7 * scale + 2) + 2, 2 * (5 * scale + 2) + 2) == picture.shape[1::-1]
    opaque = np.zeros(picture.shape[:2], bool)
    for i, image in enumerate(images):
        top, left = 2 + i // 3 * (5 * scale + 2), 2 + i % 3 * (7 * scale + 2)
        cell = picture[top : top + 5 * scale, left : left + 7 * scale]
        np.testing.assert_array_equal(cell[::scale, ::scale, :3].transpose(2, 0, 1), image)
        opaque[top : top + 5 * scale, left : left + 7 * scale] = True
    np.testing.assert_array_equal(picture[:, :, 3], np.where(opaque, 255, 0))
    tree = read(render_page(page(figure)))
    image = tree.one("img").attributes
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == figure.picture
    assert (int(image["width"]), int(image["height"])) == figure.size


def test_grey_images_are_shown_grey_and_white_pixels_stay_white():
    images = np.full((1, 1, 2, 2), 255, np.uint8)
    picture = np.asarray(Image.open(io.BytesIO(image_figure(images, alt="white").picture)))
    assert picture.shape[2] == 2  # grey and opacity
    assert (picture[2:-2, 2:-2] == 255).all()


def test_images_with_classes_lie_in_the_order_of_the_classes_under_letters_for_light_and_dark_pages():
    images = np.full((4, 1, 8, 8), 7, np.uint8)
    images[[1, 3]] = 9
    labels = np.array([1, 0, 1, 0])
    figure = image_figure(images, alt="two classes", labels=labels, class_names=("ant", "bee"))
    grey, opacity = np.asarray(Image.open(io.BytesIO(figure.picture))).transpose(2, 0, 1)
    rows = [np.unique(row[opacity[y] == 255]).tolist() for y, row in enumerate(grey)]
    assert rows.index([9]) < rows.index([7])  # class 0 comes first
    letters = (opacity > 0) & (opacity < 255)
    assert letters.sum() > 50
    assert (grey[letters] == 128).all()


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_same_page_is_the_same_bytes_in_another_process(example):
    code = "import sys; from report_example import example_page; from stablefield.report import render_page; "
    code += "sys.stdout.buffer.write(render_page(example_page()).encode())"
    paths = [str(Path(stablefield.__file__).parents[1]), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True, timeout=120)
    assert done.stdout.decode() == example
    assert not re.search(r"\b20[2-9]\d-\d\d-\d\d", example)


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.html"
    assert write_page(page(Text("first")), path) == path
    first = path.read_bytes()
    assert b"first" in first

    def fail(self, target):
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", fail)
        with pytest.raises(OSError, match="disk is full"):
            write_page(page(Text("second")), path)
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    write_page(page(Text("second")), path)
    assert b"second" in path.read_bytes()


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("jinja2", lambda: render_page(page())),
        ("matplotlib", lambda: render_page(page(Figure(variance_chart(), alt="curves")))),
    ],
)
def test_without_the_extra_the_error_names_it(monkeypatch, package, use):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'needs {package}: pip install "stablefield\[report\]"'):
        use()


def test_the_room_is_imported_without_its_extra(monkeypatch):
    missing = {"jinja2", "markupsafe", "matplotlib", "PIL"}
    for name in {name for name in sys.modules if name.partition(".")[0] in missing} | missing:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(stablefield, "report", stablefield.report)  # pyrefly: ignore[implicit-import]
    for name in [name for name in sys.modules if name.startswith("stablefield.report")]:
        monkeypatch.delitem(sys.modules, name)
    report = importlib.import_module("stablefield.report")
    assert report.Page is not Page  # imported anew
    with pytest.raises(ImportError, match=r"stablefield\[report\]"):
        report.render_page(report.Page(title="a", summary="b", blocks=(report.Text("c"),)))


def test_the_wheel_carries_the_template_and_the_style(tmp_path):
    root = Path(__file__).resolve().parents[2]
    built = next(WheelBuilder(str(root)).build(directory=str(tmp_path)))
    with zipfile.ZipFile(built) as wheel:
        names = set(wheel.namelist())
    assert {"stablefield/report/page.html.jinja", "stablefield/report/page.css"} <= names


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Figure(LINE, alt=" "), r"alt=' ' of a Figure is empty: fill it"),
        (lambda: Figure("<svg/>", alt="a"), "picture of a Figure is .*: pass a chart, or the bytes"),
        (lambda: Figure(b"GIF89a", alt="a"), r"begins with b'GIF89a'"),
        (lambda: Figure(b"\x89PNG\r\n\x1a\n", alt="a"), "no pixels"),
        (lambda: Text(""), "text='' of a Text is empty"),
        (lambda: Code("\n"), "of a Code is empty"),
        (lambda: Bullets("abc"), "items='abc' of a Bullets: pass a tuple or a list"),
        (lambda: Bullets(()), r"items=\(\) of a Bullets is empty"),
        (lambda: Section("", (Text("a"),)), "title='' of a Section is empty"),
        (lambda: Section("a", ()), r"blocks=\(\) of a Section is empty"),
        (lambda: Details("a", ()), r"blocks=\(\) of a Details is empty"),
        (lambda: SideBySide((Figure(LINE, alt="a"),)), "figures of SideBySide are 1: pass at least two"),
        (lambda: KeyFigures(()), r"figures=\(\) of a KeyFigures is empty"),
        (lambda: KeyFigure(value=None, label="a"), "value=None of a KeyFigure"),
        (lambda: KeyFigure(value=1, label=""), "label='' of a KeyFigure"),
        (lambda: KeyFigure(value=[1], label="a"), "value of a KeyFigure is of type list"),
        (lambda: Table(columns=("a",), rows=()), r"rows=\(\) of a Table is empty"),
        (
            lambda: Table(columns=("a", "b"), rows=((1, 2), (1,))),
            "row 1 of a Table has 1 cells, but there are 2 columns",
        ),
        (lambda: Table(columns=("a",), rows=((1,),), marked=1), "marked=1 of a Table: its rows are 0 to 0"),
        (lambda: Table(columns=("a",), rows=((1,),), digits=0), "digits=0"),
        (lambda: Table(columns=("a",), rows=((np.zeros(2),),)), "cell 'a' of row 0 of a Table is of type ndarray"),
        (lambda: page(title=" "), "title=' ' of a Page is empty"),
        (lambda: page(summary=""), "summary='' of a Page is empty"),
        (lambda: Page(title="a", summary="b", blocks=()), r"blocks=\(\) of a Page is empty"),
        (lambda: json_details("a", {"b": float("nan")}), "JSON compliant"),
    ],
)
def test_a_mistake_is_refused_where_it_is_made(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_sections_are_no_deeper_than_headings_go():
    nested = Text("deep")
    for level in range(5):
        nested = Section(f"level {level}", (nested,))
    levels = [int(n.tag[1]) for n in read(render_page(page(nested))).all(*(f"h{i}" for i in range(1, 7)))]
    assert levels == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="more than 5 deep"):
        page(Section("too deep", (Details("inside", (nested,)),)))
