"""The sample grids that a run keeps: the same seeds over training, as pictures and as one animation."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablefield._atomic_file import write_atomically
from stablefield._regular_file import open_regular
from stablefield.data._image_set import PIXEL_LIMIT
from stablefield.data._pillow import require_pillow
from stablefield.data._png import caption

__all__ = ["grid_steps", "picked", "read_grid", "write_animation"]

WIDTH = 480
"""Width of an animation in pixels, at most."""
FRAMES = 48
"""Its pictures, at most."""
BYTES = 4 * 2**20
"""Its size, at most: larger ones are reduced."""
COLOURS = 128
# Milliseconds of a picture, and of the last one.
_EACH, _LAST = 300, 2500
_LEAST = 64


def grid_steps(samples: Path, until: int | None = None) -> dict[int, Path]:
    """The grids in a run's folder of samples by their steps, in order.

    Args:
        samples: the folder.
        until: the newest step of the run; files of later ones are from a training that was taken back.
    """
    found: dict[int, Path] = {}
    for path in samples.glob("step-*.png"):
        named = re.fullmatch(r"step-(\d{8,})\.png", path.name)
        if named is not None and (until is None or int(named[1]) <= until):
            found[int(named[1])] = path
    return dict(sorted(found.items()))


def picked(steps: Sequence[int], most: int) -> list[int]:
    """At most so many of the steps, evenly spread in their order, with the first and the last."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(place)] for place in np.linspace(0, len(steps) - 1, most)]


def read_grid(path: Path) -> NDArray[np.uint8]:
    """A grid, shape (height, width, 1 or 3), uint8.

    Raises:
        ValueError: if the file is no picture, or one that is too large.
        OSError: if it cannot be read.
        ImportError: if Pillow is not installed.
    """
    require_pillow("reading a picture")
    from PIL import Image

    with open_regular(path) as file:
        try:
            with Image.open(file, formats=["PNG"]) as picture:
                if picture.width * picture.height > PIXEL_LIMIT:
                    raise ValueError(f"{picture.width} x {picture.height} pixels")
                pixels = np.asarray(picture if picture.mode == "L" else picture.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"{path} is not a sample grid: {error}.") from error
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def write_animation(samples: Path, path: Path, until: int | None = None) -> bool:
    """Write the grids as a GIF, each with its step: at most 480 pixels wide, 48 pictures and 4 MiB.

    Args:
        samples: a run's folder of samples.
        path: the file, which is replaced if it exists.
        until: see `grid_steps`.

    Returns:
        Whether it was written: it takes two grids of equal size.

    Raises:
        ValueError: if a grid is no picture.
        OSError: if a file cannot be read or written.
        ImportError: if Pillow is not installed.
    """
    found = grid_steps(samples, until)
    grids = {step: read_grid(found[step]) for step in picked(list(found), FRAMES)}
    # A run may have been continued by a version that draws other grids.
    last = next(reversed(grids.values())).shape if grids else ()
    grids = {step: grid for step, grid in grids.items() if grid.shape == last}
    if len(grids) < 2:
        return False
    width = min(WIDTH, int(last[1]))

    def write(temporary: Path) -> None:
        nonlocal width
        while True:
            first, *others = (_frame(step, grid, width) for step, grid in grids.items())
            durations = [_EACH] * len(others) + [_LAST]
            first.save(temporary, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)
            if temporary.stat().st_size <= BYTES or width <= _LEAST:
                return
            width = max(_LEAST, int(0.7 * width))

    write_atomically(path, write)
    return True


def _frame(step: int, grid: NDArray[np.uint8], width: int) -> Any:
    """A picture of the animation."""
    from PIL import Image

    picture = Image.fromarray(grid[:, :, 0] if grid.shape[2] == 1 else grid).convert("RGB")
    height = max(1, round(picture.height * width / picture.width))
    if picture.width != width:
        picture = picture.resize((width, height), Image.Resampling.BOX)
    strip = caption(f"step {step:,}", width, 3)
    frame = Image.fromarray(np.concatenate([strip, np.asarray(picture)]))
    return frame.quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
