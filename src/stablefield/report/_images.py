"""Images in a report: a batch as one PNG, transparent between the images to suit any background."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablefield.data._pillow import require_pillow
from stablefield.data._png import as_pictures, class_grid, tile
from stablefield.report._page import Figure

__all__ = ["grid_figure", "image_figure"]


def image_figure(
    images: NDArray[Any],
    *,
    alt: str,
    caption: str = "",
    title: str = "",
    columns: int | None = None,
    labels: NDArray[np.int64] | None = None,
    class_names: Sequence[str] | None = None,
) -> Figure:
    """A figure of images laid out as a grid.

    Args:
        images: shape (n, C, H, W), C = 1 or 3, uint8 or floats (see `as_pictures`). Small images are enlarged by a
            whole factor.
        alt: a description of the images.
        caption: the text below.
        title: in bold before the caption.
        columns: images per row, without labels; by default as many as make the grid about square.
        labels: class numbers, shape (n,), for a grid in the order of the classes with their names; None for none.
        class_names: class names, if known.

    Raises:
        ValueError: if `images` is not such an array, `labels` does not fit, or `alt` is empty.
        ImportError: if Pillow is not installed.
    """

    def laid_out(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return tile(images, columns) if labels is None else class_grid(images, labels, class_names)

    images = as_pictures(images)
    # Tiling black images shows the white background.
    return grid_figure(laid_out(images), laid_out(np.zeros_like(images)), alt=alt, caption=caption, title=title)


def grid_figure(
    picture: NDArray[np.uint8],
    ground: NDArray[np.uint8] | None,
    *,
    alt: str,
    caption: str = "",
    title: str = "",
    width: int | None = None,
) -> Figure:
    """A figure of a grid that has been drawn.

    Args:
        picture: the grid, shape (height, width, 1 or 3).
        ground: the same grid of black images, whose white becomes transparent; None for an opaque picture.
        alt: a description of the images.
        caption: the text below.
        title: in bold before the caption.
        width: reduce a wider picture to this many pixels.

    Raises:
        ValueError: if `alt` is empty.
        ImportError: if Pillow is not installed.
    """
    require_pillow("drawing images")
    from PIL import Image

    if ground is None:
        drawn = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
    else:
        ground = ground[:, :, :1]
        # Letters are grey, legible on the page's background, light or dark.
        picture = np.where((ground > 0) & (ground < 255), np.uint8(128), picture)
        drawn = Image.fromarray(np.concatenate([picture, 255 - ground], axis=2))
    if width is not None and drawn.width > width:
        drawn = drawn.resize((width, max(1, round(drawn.height * width / drawn.width))), Image.Resampling.BOX)
    data = io.BytesIO()
    drawn.save(data, format="PNG", optimize=True)
    return Figure(data.getvalue(), alt=alt, caption=caption, title=title)
