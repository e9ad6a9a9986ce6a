"""Pictures: tiles lie where they should, files hold what was written, tables say what is in a set."""

import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image, ImageFont

from stablefield.data import Origin, make_image_set, open_images, sample_grid, summary, tile, write_png
from stablefield.data._image_set import class_text
from stablefield.data._png import class_grid


def noise(n, shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(3, 4, 6), (1, 8, 8)])
@pytest.mark.parametrize(
    ("n", "columns", "scale", "padding"), [(5, 2, 3, 1), (4, None, 2, 0), (7, 7, 1, 3), (1, 4, 1, 2)]
)
def test_every_image_lies_in_its_cell_and_the_rest_is_white(shape, n, columns, scale, padding):
    images = noise(n, shape)
    picture = tile(images, columns, scale, padding)
    C, H, W = shape
    wide = columns or 2
    rows = -(-n // wide)
    size = (rows * (H * scale + padding) + padding, wide * (W * scale + padding) + padding, C)
    assert picture.shape == size
    expected = np.full(size, 255)
    for i in range(n):
        for y in range(H * scale):
            for x in range(W * scale):
                row = padding + i // wide * (H * scale + padding) + y
                column = padding + i % wide * (W * scale + padding) + x
                expected[row, column] = images[i, :, y // scale, x // scale]
    np.testing.assert_array_equal(picture, expected)


@pytest.mark.parametrize(
    ("n", "side", "scale"), [(64, 8, 15), (1, 8, 16), (64, 28, 4), (64, 32, 3), (4, 64, 2), (64, 512, 1)]
)
def test_small_images_are_enlarged_as_far_as_a_thousand_pixels_go(n, side, scale):
    picture = tile(np.zeros((n, 1, side, side), np.uint8))
    columns = round(n**0.5)
    assert picture.shape == (*(columns * (side * scale + 2) + 2,) * 2, 1)
    assert picture.shape[1] <= 1000 or scale == 1


@pytest.mark.parametrize(
    "arguments",
    [
        (np.zeros((2, 3, 4), np.uint8),),
        (np.zeros((2, 3, 4, 4)),),
        (np.zeros((0, 3, 4, 4), np.uint8),),
        (np.zeros((2, 2, 4, 4), np.uint8),),
        (np.zeros((2, 3, 4, 4), np.uint8), 0),
        (np.zeros((2, 3, 4, 4), np.uint8), 1, 0),
        (np.zeros((2, 3, 4, 4), np.uint8), 1, 1, -1),
    ],
)
def test_what_cannot_be_tiled_is_refused(arguments):
    with pytest.raises(ValueError, match=r"images has|columns="):
        tile(*arguments)


def corners(grid):
    """The upper left pixels of the images of a grid, as (row in pixels, value), row by row."""
    marks = [(y, x) for y, x in zip(*np.nonzero((grid[:, :, 0] > 0) & (grid[:, :, 0] < 40)), strict=True)]
    return [(y, int(grid[y, x, 0])) for y, x in marks if grid[y - 1, x, 0] == 255 and grid[y, x - 1, 0] == 255]


@pytest.mark.parametrize(
    ("classes", "count", "per_row"),
    [(3, 11, 4), (10, 64, 7), (64, 64, 8), (1, 9, 3)],
)
def test_images_with_classes_lie_in_the_order_of_the_classes_with_a_caption_where_one_begins(classes, count, per_row):
    labels = np.arange(count, dtype=np.int64) % classes
    # The value of an image rises with its class; captions are drawn in values from 40.
    values = (1 + labels * 38 // classes).astype(np.uint8)
    grid = class_grid(np.broadcast_to(values[:, None, None, None], (count, 1, 8, 8)), labels)
    found = corners(grid)
    assert [value for _, value in found] == sorted(values)
    tops = sorted({y for y, _ in found})
    assert max(sum(y == top for y, _ in found) for top in tops) == per_row
    captioned = [top for top in tops if ((grid[top - 18 : top] >= 40) & (grid[top - 18 : top] < 200)).any()]
    # Few classes each begin a row; many follow one another, and every row has a caption where a class begins in it.
    assert len(captioned) == (1 if classes == 1 else len(tops))


def captioned(*names: str) -> np.ndarray:
    """A grid of one image of a class per name, 128 pixels wide each."""
    return class_grid(np.zeros((len(names), 1, 64, 64), np.uint8), np.arange(len(names)), names)


@pytest.mark.parametrize(
    "names", [("Füchse", "Föchse"), ("Ωμέγα", "Ωμόγα"), ("Жук", "Жёк"), ("żółw", "žółw"), ("€5", "¥5")]
)
def test_captions_have_latin_greek_and_cyrillic_letters(names: tuple[str, str]) -> None:
    first, second, number = captioned(names[0]), captioned(names[1]), captioned("0")
    assert (first != number).any()
    # Boxes in the place of letters would all look alike.
    assert (first != second).any()
    # Decomposed, as names of folders on a Mac are, it looks the same.
    np.testing.assert_array_equal(captioned(unicodedata.normalize("NFD", names[0])), first)


@pytest.mark.parametrize("name", ["猫", "cat 猫", "قطة", "חתול"])
def test_a_name_of_letters_that_the_font_lacks_is_replaced_by_the_number(name: str) -> None:
    np.testing.assert_array_equal(captioned("ant", name), captioned("ant", "1"))


def test_without_matplotlib_captions_have_the_letters_of_pillows_own_font(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stablefield.data._png.find_spec", lambda _: None)
    assert (captioned("ant") != captioned("0")).any()
    np.testing.assert_array_equal(captioned("Жук"), captioned("0"))
    monkeypatch.setattr("PIL.ImageFont.load_default", lambda size=None: _small(size))
    assert (captioned("ant") != captioned("0")).any()
    np.testing.assert_array_equal(captioned("Жук"), captioned("0"))


def _small(size: float | None) -> ImageFont.ImageFont:
    if size is not None:
        raise ImportError("no FreeType")
    return ImageFont.load_default_imagefont()


def test_a_caption_is_the_number_with_the_name_and_fits_its_image():
    images = np.zeros((9, 3, 8, 8), np.uint8)
    np.testing.assert_array_equal(class_grid(images, None), tile(images))
    labels = np.arange(9, dtype=np.int64)
    plain = class_grid(images, labels)
    for names in (["a"] * 9, ["x" * 500] * 9, ["line\nbreak \x1b[31m"] * 9):
        named = class_grid(images, labels, names)
        assert named.shape == plain.shape
        assert (named != plain).any()
    with pytest.raises(ValueError, match=r"labels has shape \(8,\)"):
        class_grid(images, labels[:8])
    assert [class_text(n, ("ant", "1")) for n in (-1, 0, 1)] == ["no class", "0 (ant)", "1"]
    assert class_text(7, None) == "7"


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
def test_a_png_reads_back_as_it_was_written(tmp_path, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = write_png(tmp_path / "new" / "a.png", array)
    with Image.open(path) as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), array.reshape(np.asarray(image).shape))
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]
    with pytest.raises(ValueError, match="tile first"):
        write_png(tmp_path / "b.png", np.zeros((4, 3, 5, 5), np.uint8))


def test_without_pillow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'pip install "stablefield\[train\]"'):
        write_png(tmp_path / "b.png", np.zeros((5, 5), np.uint8))


def test_the_summary_gives_the_figures_of_the_data():
    images = noise(50, (3, 5, 4)) // np.array([1, 2, 5], np.uint8)[:, None, None]
    labels = np.arange(50) % 3
    made = make_image_set(
        images, labels, Origin(name="toy", source="made up", class_names=("ant", "bee", "cow"), skipped=2)
    )
    rows = dict(summary(made))
    mean, std = images.astype(float).mean((0, 2, 3)), images.astype(float).std((0, 2, 3))
    assert rows["mean"].startswith(", ".join(f"{v:.2f}" for v in mean))
    assert rows["standard deviation"].startswith(", ".join(f"{v:.2f}" for v in std))
    scaled = images / 127.5 - 1
    assert rows["mean"].endswith(f"({', '.join(f'{v:.4f}' for v in scaled.mean((0, 2, 3)))} in [-1, 1])")
    assert rows["standard deviation"].endswith(f"({', '.join(f'{v:.4f}' for v in scaled.std((0, 2, 3)))} in [-1, 1])")
    assert rows["values"] == f"uint8, {images.min()} to {images.max()}"
    assert (rows["  class 0 (ant)"], rows["  class 1 (bee)"], rows["  class 2 (cow)"]) == ("17", "17", "16")
    assert (rows["images"], rows["shape"], rows["skipped files"]) == ("50", "3 x 5 x 4 (RGB)", "2")
    assert rows["sha256"] == made.manifest["sha256"]
    assert rows["memory"] == "2.9 KiB, in memory"


def test_the_summary_of_many_classes_or_none_stays_short():
    images = noise(200, (1, 2, 2))
    rows = dict(summary(make_image_set(images, np.arange(200) % 30, Origin(name="toy", source="made up"))))
    assert rows["  10 more classes"] == "6 to 6 each"
    assert dict(summary(make_image_set(images, None, Origin(name="toy", source="made up"))))["classes"] == "none"


def test_a_sample_grid_shows_distinct_images_of_the_set_and_depends_on_the_seed():
    digits = make_image_set(open_images("digits").images, None, Origin(name="digits", source="without their labels"))
    grid = sample_grid(digits, 9, seed=1)
    scale = 16
    cells = [
        grid[2 + r * (8 * scale + 2) :, 2 + c * (8 * scale + 2) :][: 8 * scale : scale, : 8 * scale : scale, 0]
        for r in range(3)
        for c in range(3)
    ]
    found = [np.flatnonzero((digits.images[:, 0] == cell).all((1, 2))) for cell in cells]
    assert all(len(rows) for rows in found)
    assert len({int(rows[0]) for rows in found}) == 9
    np.testing.assert_array_equal(grid, sample_grid(digits, 9, seed=1))
    assert (grid != sample_grid(digits, 9, seed=2)).any()
    assert sample_grid(make_image_set(noise(3, (1, 4, 4)), None, Origin(name="toy", source="made up")), 64).ndim == 3
    few = make_image_set(np.arange(36, dtype=np.uint8)[:, None, None, None], None, Origin(name="toy", source="made up"))
    assert set(range(36)) <= set(sample_grid(few, 36, seed=3).ravel().tolist())
    with pytest.raises(ValueError, match="count=0"):
        sample_grid(digits, 0)


def test_a_sample_grid_is_in_the_order_of_the_classes() -> None:
    pixels = np.arange(40, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 1, 1), np.uint8)
    images = make_image_set(pixels, np.arange(40) % 10, Origin(name="toy", source="made up"))
    grid = sample_grid(images, 16, seed=0)
    shown = [int(value) for value in dict.fromkeys(grid[grid < 40].tolist())]
    assert [value % 10 for value in shown] == sorted(value % 10 for value in shown)
