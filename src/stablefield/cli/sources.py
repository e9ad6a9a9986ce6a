"""The flags of every verb that reads images, and how they were read."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro
from rich.markup import escape

from stablefield.cli.console import console
from stablefield.cli.progress import StageBar
from stablefield.data._image_set import ImageSet
from stablefield.data._source import open_images

__all__ = ["DataFlags", "open_data", "print_reading"]


@dataclass(frozen=True)
class DataFlags:
    """Which images, and how they are read."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """Images: digits (built in), a folder or .zip of images, .npy, .npz, idx, parquet or CIFAR-10 files, a packed file,
    hf:OWNER/NAME."""
    resolution: int | None = None
    """Bring every image to this many pixels a side; where sizes differ, train chooses it."""
    resize: Literal["crop", "squash"] = "crop"
    """Cut to the largest centred square first, or take the whole image."""
    skip_broken: bool = False
    """Leave out files that cannot be read, and count them."""

    def open(self, *, limit: int | None = None, split: str = "train") -> ImageSet:
        """Open the images.

        Args:
            limit: as for `open_images`.
            split: which part.

        Raises:
            ValueError: if there are none, or they are damaged.
        """
        return open_data(
            self.data,
            resolution=self.resolution,
            resize=self.resize,
            skip_broken=self.skip_broken,
            limit=limit,
            split=split,
        )


def open_data(source: str, **opening: Any) -> ImageSet:
    """Open images as `stablefield.data.open_images` does, with a bar."""
    with StageBar() as bar:
        return open_images(source, **opening, progress=bar.update)


def print_reading(data: ImageSet) -> None:
    """Print how the data were read: their size, if anything was done to it or they are not square, and notes."""
    _, height, width = data.shape
    resized = str(data.manifest["resized"])
    if resized != "no":
        console.print(f"images:     {escape(resized)}")
    elif height != width:
        console.print(f"images:     {width} x {height}, as they are; --resolution makes squares of them")
    for note in data.notes:
        console.print(f"[yellow]note:[/] {escape(note)}")
