"""Images in a report: a batch as one PNG, transparent between the images, so that it lies well on any ground."""

import io

import numpy as np
from numpy.typing import NDArray

from stablefield.data.pillow import require_pillow
from stablefield.data.png import tile
from stablefield.report.page import Figure

__all__ = ["image_figure"]


def image_figure(
    images: NDArray[np.uint8], *, alt: str, caption: str = "", title: str = "", columns: int | None = None
) -> Figure:
    """A figure of images laid out as a grid.

    Args:
        images: shape (n, C, H, W), uint8, C = 1 or 3. Small images are enlarged by a whole factor.
        alt: what they show, in words.
        caption: the text below.
        title: set in bold in front of the caption.
        columns: images per row; by default as many as make the grid about square.

    Raises:
        ValueError: if `images` is not such an array, or `alt` is empty.
        ImportError: if Pillow is not installed.
    """
    picture = tile(images, columns)
    # Tiling black images shows where the white ground is: that becomes transparent.
    ground = tile(np.zeros_like(images), columns)[:, :, :1]
    require_pillow("drawing images")
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(np.concatenate([picture, 255 - ground], axis=2)).save(data, format="PNG", optimize=True)
    return Figure(alt=alt, caption=caption, title=title, png=data.getvalue())
