"""The flags of every verb that reads images."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro
from rich.markup import escape

from stablefield.cli.console import console
from stablefield.cli.progress import StageBar
from stablefield.data._image_set import ImageSet
from stablefield.data._inspect import classes_text
from stablefield.data._source import open_images

__all__ = ["DataFlags", "open_data", "print_classes", "print_reading"]


@dataclass(frozen=True)
class DataFlags:
    """Which data, and how to read them."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """Images: digits (built in), a folder or .zip of images, .npy, .npz, idx, parquet or CIFAR-10 files, a packed file,
    hf:OWNER/NAME. Or float data, such as latents: .npy, .npz (data, labels) or .safetensors files."""
    resolution: int | None = None
    """Resize every image to this many pixels a side; if sizes differ, train chooses it."""
    resize: Literal["crop", "squash"] = "crop"
    """To make squares: crop to the largest centred square first, or squash the whole image."""
    skip_broken: bool = False
    """Skip unreadable files, and count them."""

    def open(self, *, limit: int | None = None, split: str = "train") -> ImageSet:
        """Open the images.

        Args:
            limit: as for `open_images`.
            split: which split of the data.

        Raises:
            ValueError: if there are no images, or one is damaged.
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
    """Print how the data were read: the size, if resized or not square, and the notes."""
    if data.scaling is not None:
        console.print(f"data:       {escape(data.describe())}")
        height = width = 0
    else:
        _, height, width = data.shape
    resized = str(data.manifest["resized"])
    if resized != "no":
        console.print(f"images:     {escape(resized)}")
    elif height != width:
        console.print(f"images:     {width} x {height}, as they are; --resolution makes squares of them")
    for note in data.notes:
        console.print(f"[yellow]note:[/] {escape(note)}")


def print_classes(data: ImageSet, *, conditional: bool) -> None:
    """Print the classes of training data, and how to use them if the recipe does not."""
    if data.classes > 1:
        use = "the network is conditioned on them" if conditional else "not used; to draw by class: --conditional"
        console.print(f"classes:    {escape(classes_text(data))}; {use}")
