"""The flags of every verb that reads images."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro
from rich.markup import escape

from stablefield.cli.console import console
from stablefield.cli.parser import parse_resolution
from stablefield.cli.progress import StageBar
from stablefield.cli.usage import as_flags
from stablefield.data._image_set import ImageSet
from stablefield.data._inspect import classes_text
from stablefield.data._source import open_images

__all__ = ["DataFlags", "open_data", "print_classes", "print_reading"]


@dataclass(frozen=True)
class DataFlags:
    """Which data, and how to read them."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """Images: digits (built in), a folder or .zip of images, .npy, .npz, idx, parquet or CIFAR-10 files, a packed file,
    hf:OWNER/NAME. Or float data: .npy, .npz (data, labels) or .safetensors files, or a folder of
    latents from data encode."""
    resolution: str = ""
    """Resize every image to this many pixels a side, such as 32, or to height x width, such as 32x48. By default images of
    one size keep their shape; if sizes differ, train chooses squares."""
    resize: Literal["crop", "squash"] = "crop"
    """To change the shape: crop to the largest centred part of the new shape first, or squash the whole image."""
    colour: Literal["auto", "grey", "rgb"] = "auto"
    """Make all images greyscale or RGB; auto makes image files greyscale only if all of them are."""
    background: str = "white"
    """Colour behind the transparent pixels of image files: white, black or #rrggbb."""
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
            resolution=parse_resolution(self.resolution),
            resize=self.resize,
            colour=self.colour,
            background=self.background,
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
        console.print(f"images:     {width} wide, {height} high, as they are; --resolution changes that, such as 32x48")
    for note in data.notes:
        console.print(f"[yellow]note:[/] {escape(as_flags(note))}")


def print_classes(data: ImageSet, *, conditional: bool) -> None:
    """Print the classes of training data, and how to use them if the recipe does not."""
    if data.classes > 1:
        use = "the network is conditioned on them" if conditional else "not used; to draw by class: --conditional"
        console.print(f"classes:    {escape(classes_text(data))}; {use}")
