"""A real browser, without a window: the page renders on a phone, on a desk, in the dark and on paper."""

import base64
import io
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_example import example_page
from selenium.webdriver import Chrome
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

from stablefield.report import Code, Figure, Line, LineChart, Page, Table, Text, write_page
from stablefield.report._colours import DARK, LIGHT

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)",
)

# No network, no first-run pages. The sandbox cannot start as root, as which containers run.
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)


class Browser:
    def __init__(self, driver):
        self.driver = driver

    def command(self, name, **fields):
        return self.driver.execute_cdp_cmd(name, fields)

    def open(self, path, width=1200, scheme="light", media=""):
        """Load a page as a screen `width` pixels wide shows it; a phone's where narrow."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", media=media, features=features)
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        self.driver.get(Path(path).as_uri())
        # On a busy machine the driver has been seen to return just before.
        WebDriverWait(self.driver, 30).until(lambda _: self.ask("document.readyState") == "complete")

    def ask(self, script):
        return self.driver.execute_script(f"return {script}")

    def wait(self, script, answer):
        """Wait until the page gives this answer: what depends on scrolling is known after the first frames."""
        WebDriverWait(self.driver, 30).until(lambda _: self.ask(script) == answer)

    def picture(self, of="html"):
        """What is seen of the first visible element of a name, at most a screen high; shape (height, width, 3)."""
        box = self.ask(
            f"""(() => {{
              const e = [...document.querySelectorAll("{of}")].find(e => e.checkVisibility()).getBoundingClientRect();
              return {{x: e.x, y: e.y, width: e.width, height: Math.min(e.height, 800), scale: 1}};
            }})()"""
        )
        data = self.command("Page.captureScreenshot", captureBeyondViewport=True, clip=box)["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))

    def messages(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def overflow(self):
        """By how many pixels the page is wider than its window."""
        return self.ask("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = Options()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(DRIVER))
    yield Browser(driver)
    driver.quit()


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return write_page(example_page(), tmp_path_factory.mktemp("page") / "report.html")


SIZES = """[...document.querySelectorAll("svg, img")].map(e => {
  const box = e.getBoundingClientRect(), shown = e.checkVisibility();
  return [e.tagName, shown, box.width, box.height, e.tagName == "IMG" ? e.naturalWidth : 1];
})"""
FONTS = """[...document.querySelectorAll("svg text")].filter(e => e.checkVisibility()).map(e =>
  parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a)"""
COLOURS = """(() => {
  const style = (e, name) => getComputedStyle(e)[name], page = document.documentElement;
  const shown = [...document.querySelectorAll("svg text")].find(e => e.checkVisibility());
  const line = [...document.querySelectorAll("svg path")].find(e => e.style.stroke.includes("--series-1"));
  return [style(page, "backgroundColor"), style(page, "color"), style(shown, "fill"), style(line, "stroke")];
})()"""


def rgb(colour):
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 360, 1200])
def test_it_renders_without_complaint_and_fits_the_screen(browser, example, width, scheme):
    browser.messages()
    browser.open(example, width, scheme)
    assert browser.ask("document.readyState") == "complete"
    assert browser.messages() == []
    assert browser.ask("window.innerWidth") == width
    assert browser.overflow() == 0
    pictures = browser.ask(SIZES)
    assert len(pictures) == 6
    shown = [picture for picture in pictures if picture[1]]
    assert [tag for tag, *_ in shown] == ["svg", "svg", "svg", "IMG", "IMG", "IMG"]
    for _, _, wide, high, natural in shown:
        assert min(0.6 * width, 280) < wide <= width
        assert high > 60
        assert natural > 0


def test_the_browser_would_complain_if_the_page_did_reach_out(browser, example, tmp_path):
    text = example.read_text("utf-8").replace("<main>", '<main><img src="https://example.invalid/a.png" alt="">')
    (tmp_path / "planted.html").write_text(text, "utf-8")
    browser.messages()
    browser.open(tmp_path / "planted.html")
    assert any("Content Security Policy" in message for message in browser.messages())
    assert browser.ask("performance.getEntriesByType('resource').filter(e => e.transferSize > 0).length") == 0


@pytest.mark.parametrize("width", [320, 360, 768, 1200])
def test_text_in_charts_is_large_enough_to_read(browser, example, width):
    browser.open(example, width)
    sizes = browser.ask(FONTS)
    assert len(sizes) > 40
    # Pixels as they appear, after scaling: the page's own small print is 13.6.
    assert min(sizes) >= 9.5


@pytest.mark.parametrize("width", [360, 1200])
def test_no_text_of_a_chart_covers_another_or_leaves_the_screen(browser, example, width):
    browser.open(example, width)
    charts = browser.ask(
        """[...document.querySelectorAll("svg")].filter(e => e.checkVisibility()).map(svg =>
          [...svg.querySelectorAll("text")].map(e => {
            const box = e.getBoundingClientRect();
            // Lines of text have room above and below their letters.
            return [e.textContent, box.left, box.top + box.height * .2, box.right, box.bottom - box.height * .2];
          }))"""
    )
    assert len(charts) == 3
    for texts in charts:
        for i, (name, left, top, right, bottom) in enumerate(texts):
            assert 0 <= left < right <= width, name
            for other, l2, t2, r2, b2 in texts[:i]:
                assert right <= l2 or r2 <= left or bottom <= t2 or b2 <= top, (name, other)


def test_the_dark_scheme_changes_the_ground_and_what_lies_on_it(browser, example):
    for scheme, palette in (("light", LIGHT), ("dark", DARK)):
        browser.open(example, 1200, scheme)
        expected = [palette.ground, palette.ink, palette.ink, palette.series[0]]
        assert browser.ask(COLOURS) == [rgb(colour) for colour in expected]
        picture = browser.picture()
        # What is seen, not what is asked for: the corner, and the darkest and brightest of what is drawn.
        assert rgb(palette.ground) == f"rgb({', '.join(map(str, picture[0, 0]))})"
        share_dark = (picture.mean(2) < 64).mean()
        assert share_dark < 0.2 if scheme == "light" else share_dark > 0.7


def test_every_series_is_drawn_in_both_schemes_and_both_layouts(browser, example):
    for width in (360, 1200):
        for scheme, palette in (("light", LIGHT), ("dark", DARK)):
            browser.open(example, width, scheme)
            picture = browser.picture("svg").astype(int) @ [65536, 256, 1]
            for colour in palette.series[:4]:
                assert (picture == int(colour[1:], 16)).sum() > 20, (width, scheme, colour)


@pytest.mark.parametrize(("width", "beside"), [(360, False), (1200, True)])
def test_pictures_to_compare_stand_beside_each_other_where_there_is_room(browser, example, width, beside):
    browser.open(example, width)
    boxes = browser.ask(
        """[...document.querySelectorAll(".side-by-side img")].map(e => {
          const box = e.getBoundingClientRect();
          return [box.top, box.left, box.width, box.height];
        })"""
    )
    assert len(boxes) == 2
    assert (boxes[0][0] == boxes[1][0]) == beside
    assert (boxes[0][1] < boxes[1][1]) == beside
    assert boxes[0][2:] == boxes[1][2:]


def test_a_wide_table_scrolls_in_its_own_box_and_long_code_is_broken(browser, tmp_path):
    columns = [f"column {i}" for i in range(14)]
    page = Page(
        title="unbroken" * 12,
        summary="s" * 300,
        blocks=(
            Table(columns=columns, rows=[["row", *(i / 7 for i in range(13))]], caption="caption " * 20),
            Code("x" * 400),
            Text("`" + "y" * 300 + "`"),
            Figure(
                LineChart(lines=(Line(label="w" * 90, x=[1, 2], y=[1, 2]),), x_label="x" * 90, y_label="y" * 90),
                alt="a line",
                caption="z" * 200,
            ),
        ),
    )
    browser.open(write_page(page, tmp_path / "wide.html"), 360)
    assert browser.overflow() == 0
    hidden, right, code = browser.ask(
        """(() => {
          const box = document.querySelector("div.scroll"), code = document.querySelector("pre");
          return [box.scrollWidth - box.clientWidth, box.getBoundingClientRect().right, code.scrollWidth - code.clientWidth];
        })()"""
    )
    assert hidden > 100
    assert right <= 360
    assert code == 0
    browser.driver.execute_script("document.querySelector('div.scroll').scrollLeft = 50")
    assert browser.ask("document.querySelector('div.scroll').scrollLeft") == 50
    caption = browser.ask("document.querySelector('figcaption').getBoundingClientRect().right")
    assert caption <= 360


HINTS = '[...document.querySelectorAll(".scroll p")].map(e => e.checkVisibility())'


def test_tables_use_the_width_of_the_screen_and_say_when_they_scroll(browser, tmp_path):
    def table(columns):
        return Table(
            columns=[f"column {i}" for i in range(columns)], rows=[["row", *(i / 7 for i in range(1, columns))]]
        )

    path = write_page(Page(title="t", summary="s", blocks=(table(2), table(10), table(40))), tmp_path / "tables.html")
    browser.open(path, 1280)
    widths = browser.ask('[...document.querySelectorAll(".scroll")].map(e => e.getBoundingClientRect().width)')
    column = browser.ask('document.querySelector("h1").getBoundingClientRect().width')
    # A narrow one is in line with the text, a wide one is wider than it, and only one that is cut off scrolls.
    assert widths[0] == column < widths[1] < widths[2] <= 1280
    browser.wait(HINTS, [False, False, True])
    assert browser.overflow() == 0
    browser.open(path, 360)
    browser.wait(HINTS, [False, True, True])
    assert browser.overflow() == 0
    browser.open(path, 360, media="print")
    browser.wait(HINTS, [False, False, False])


def test_decimal_points_stand_below_each_other(browser, tmp_path):
    rows = [[str(i), value] for i, value in enumerate((0.0373, 29.9, 137.0, 5, None, 1.25))]
    page = Page(title="t", summary="s", blocks=(Table(columns=("row", "value"), rows=rows, marked=1),))
    browser.open(write_page(page, tmp_path / "points.html"))
    lefts = browser.ask('[...document.querySelectorAll("td span")].map(e => e.getBoundingClientRect().left)')
    assert len(lefts) == 6
    assert max(lefts) - min(lefts) < 0.5


def test_details_open_and_are_open_on_paper(browser, example):
    shown = """[...document.querySelectorAll("details > :not(summary)")].map(e =>
      e.checkVisibility({contentVisibilityAuto: true}))"""
    browser.open(example)
    assert browser.ask(shown) == [False, False]
    browser.driver.find_element("css selector", "summary").click()
    assert browser.ask(shown) == [True, False]
    browser.open(example, media="print")
    assert browser.ask(shown) == [True, True]


def test_it_prints_to_pages_on_white_even_in_the_dark(browser, example):
    browser.open(example, 680, "dark", media="print")
    picture = browser.picture()
    assert tuple(picture[0, 0]) == (255, 255, 255)
    assert browser.overflow() == 0
    assert browser.ask(COLOURS)[2:] == [rgb(LIGHT.ink), rgb(LIGHT.series[0])]
    browser.open(example, 1200, "dark")
    data = base64.b64decode(browser.command("Page.printToPDF", preferCSSPageSize=True)["data"])
    assert data.startswith(b"%PDF-")
    assert 2 <= data.count(b"/Type /Page\n") <= 6
    # Vector charts and one bitmap: its image is there, and the streams can be read.
    assert b"/Subtype /Image" in data
    streams = [part.split(b"endstream")[0].strip(b"\r\n") for part in data.split(b"stream\r\n")[1:]]
    streams = streams or [part.split(b"endstream")[0].strip(b"\r\n") for part in data.split(b"stream\n")[1::2]]
    assert sum(len(zlib.decompress(part)) for part in streams if part[:1] == b"x") > 10_000


def test_it_can_be_used_from_the_keyboard(browser, example):
    browser.open(example, 360)
    reached = []
    for _ in range(7):
        browser.driver.switch_to.active_element.send_keys("\ue004")  # tab
        reached.append(browser.ask("document.activeElement.tagName"))
    # The contents, the table that scrolls, what opens.
    assert reached[:7] == ["A", "A", "A", "A", "DIV", "SUMMARY", "SUMMARY"]
