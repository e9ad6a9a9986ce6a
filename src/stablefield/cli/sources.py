"""What DATA may be: from the word on the command line to an image set, with a line of progress for slow ones."""

from pathlib import Path

from rich.markup import escape
from rich.progress import Progress

from stablefield.cli.console import console
from stablefield.data._image_set import ImageSet
from stablefield.data._resizing import Resize, Resolution
from stablefield.data._source import open_images

__all__ = ["open_data", "print_reading"]


def open_data(
    name: str,
    resolution: Resolution | None = None,
    resize: Resize = "crop",
    split: str = "train",
    skip_broken: bool = False,
    limit: int | None = None,
) -> ImageSet:
    """Open the data that `name` means, as `stablefield.data._source.open_images` does.

    Raises:
        ValueError: if it means nothing, or is damaged; with what would be understood.
    """
    if name and not name.startswith("hf:") and name != "digits" and not Path(name).exists():
        raise ValueError(
            f"DATA is {name}, and there is no such file or folder; the built-in data set is called digits."
        )
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        return open_images(
            name,
            resolution=resolution,
            limit=limit,
            resize=resize,
            split=split,
            skip_broken=skip_broken,
            progress=lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total),
        )


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
