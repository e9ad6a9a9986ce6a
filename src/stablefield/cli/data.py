"""`stablefield data pack SRC DEST` and `stablefield data inspect DATA`: what is in a data set, and one fast file of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.markup import escape
from rich.table import Table

from stablefield.cli.console import console, relative
from stablefield.cli.places import PICTURES, check_free, check_place, check_suffix, looks_like_file
from stablefield.cli.sources import open_data, print_reading
from stablefield.data._inspect import sample_grid, summary
from stablefield.data._packed import pack
from stablefield.data._png import write_picture

__all__ = ["Data"]


@dataclass(frozen=True)
class _Reading:
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """What to read: digits, a folder or .zip of images, .npy, .npz, idx, parquet or CIFAR-10 files, a packed file,
    hf:OWNER/NAME."""
    resolution: int | None = None
    """Bring every image to this many pixels a side; needed if sizes differ."""
    resize: Literal["crop", "squash"] = "crop"
    """Cut to the largest centred square first, or take the whole image."""
    split: Literal["train", "test"] = "train"
    """Which part, where the source has several."""
    skip_broken: bool = False
    """Leave out files that cannot be read, and count them."""


@dataclass(frozen=True)
class _Destination:
    dest: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DEST")]
    """The file to write, such as images.safetensors."""
    overwrite: bool = False
    """Replace DEST if it exists."""


@dataclass(frozen=True)
class Pack:
    """Write images, labels and a manifest as one file that is mapped into memory, not read."""

    source: Annotated[_Reading, tyro.conf.arg(name="")]
    destination: Annotated[_Destination, tyro.conf.arg(name="")]

    def run(self) -> int:
        """Pack, and say what was packed."""
        s, dest = self.source, self.destination.dest
        if looks_like_file(dest):
            check_suffix("DEST", dest, (".safetensors",), "a packed file")
        if not dest.is_dir():
            check_free("DEST", dest, overwrite=self.destination.overwrite)
        check_place("DEST", dest)
        images = open_data(s.data, s.resolution, s.resize, s.split, s.skip_broken)
        path = pack(images, self.destination.dest, overwrite=self.destination.overwrite)
        print_reading(images)
        console.print(escape(images.describe()))
        console.print(f"written: {relative(path)} ({path.stat().st_size / 2**20:,.1f} MiB)")
        return 0


@dataclass(frozen=True)
class Inspect:
    """Print what is in a data set, and write a picture of some of its images."""

    source: Annotated[_Reading, tyro.conf.arg(name="")]
    out: Path = Path("samples.png")
    """The picture."""
    overwrite: bool = False
    """Replace it if it exists."""
    count: int = 64
    """Images in the picture."""
    seed: int = 0
    """Which images."""

    def run(self) -> int:
        """Print a table and write the picture."""
        s = self.source
        check_suffix("--out", self.out, PICTURES, "a picture")
        if not self.out.is_dir():
            check_free("--out", self.out, overwrite=self.overwrite)
        check_place("--out", self.out)
        if self.count < 1:
            raise ValueError(f"--count is {self.count}: show at least 1 image.")
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}: it must not be negative.")
        images = open_data(s.data, s.resolution, s.resize, s.split, s.skip_broken)
        table = Table("", "", show_header=False, box=None, pad_edge=False)
        table.columns[1].overflow = "fold"  # a checksum is of use only whole
        for what, figure in summary(images):
            table.add_row(escape(what), escape(figure))
        console.print(table)
        try:
            write_picture(self.out, sample_grid(images, self.count, self.seed))
        except OSError as error:
            raise ValueError(f"--out {self.out} cannot be written ({error.strerror}): name another place.") from error
        console.print(f"written: {relative(self.out)}")
        return 0


@dataclass(frozen=True)
class Data:
    """Look at a data set, or pack it into one file."""

    action: Annotated[
        Annotated[Pack, tyro.conf.subcommand("pack")] | Annotated[Inspect, tyro.conf.subcommand("inspect")],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> int:
        """Do it."""
        return self.action.run()
