"""`stablefield data`: `pack DATA DEST` writes images as one fast file, `encode DATA DEST` their latents; `inspect DATA`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.markup import escape

from stablefield.cli.console import console, print_rows, relative
from stablefield.cli.places import check_file, check_folder, check_free, check_suffix, looks_like_file
from stablefield.cli.progress import StageBar
from stablefield.cli.sources import DataFlags, print_reading
from stablefield.cli.usage import as_flags
from stablefield.data._inspect import sample_grid, summary
from stablefield.data._latents import encode
from stablefield.data._packed import pack
from stablefield.data._png import PICTURES, is_picture, write_picture

__all__ = ["Encode", "Inspect", "Pack"]


@dataclass(frozen=True)
class _Reading(DataFlags):
    split: Literal["train", "test"] = "train"
    """Which split of the data, if there are several."""
    overwrite: bool = False
    """Replace the file if it exists."""


@dataclass(frozen=True)
class Pack(_Reading):
    """Write images, labels and a manifest as one file, which opens at once by memory mapping."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """Images: digits (built in), a folder or .zip of images, .npy, .npz, idx, parquet or CIFAR-10 files, a packed file,
    hf:OWNER/NAME."""
    dest: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DEST")] = field(kw_only=True)
    """The file to write, such as images.safetensors."""

    def run(self) -> int:
        """Pack, and describe the result."""
        if looks_like_file(self.dest):
            check_suffix("DEST", self.dest, (".safetensors",), "a packed file")
        if not self.dest.is_dir():
            check_free("DEST", self.dest, overwrite=self.overwrite)
        check_file("DEST", self.dest)
        images = self.open(split=self.split)
        path = pack(images, self.dest, overwrite=self.overwrite)
        print_reading(images)
        console.print(escape(images.describe()))
        console.print(f"written: {relative(path)} ({path.stat().st_size / 2**20:,.1f} MiB)")
        return 0


@dataclass(frozen=True)
class Encode(DataFlags):
    """Encode images by an autoencoder, once; train, probe and evaluate then take the folder of latents as DATA.

    A call that was stopped goes on where it was: repeat it.
    """

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """Images: digits (built in), a folder or .zip of images, .npy, .npz, idx, parquet or CIFAR-10 files, a packed file,
    hf:OWNER/NAME."""
    dest: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DEST")] = field(kw_only=True)
    """The folder to write, new or of a call that was stopped."""
    vae: str = field(kw_only=True)
    """The folder of a diffusers AutoencoderKL (config.json and safetensors), or its name on a hub."""
    mirror: bool = False
    """Also encode the mirrored images, for train --mirror: the latent of a mirrored image is no mirror image."""
    dtype: Literal["float16", "float32"] = "float16"
    """Of what is written; float16 rounds a mean by at most its 2048th part."""
    split: Literal["train", "test"] = "train"
    """Which split of the data, if there are several."""
    batch: int = 16
    """Images at a time."""
    device: str = ""
    """Where to compute; by default a GPU if there is one."""

    def run(self) -> int:
        """Encode the images with a bar, and describe the result."""
        check_folder("DEST", self.dest)
        images = self.open(split=self.split)
        print_reading(images)
        try:
            with StageBar() as bar:
                latents = encode(
                    images,
                    self.dest,
                    vae=self.vae,
                    batch=self.batch,
                    mirror=self.mirror,
                    dtype=self.dtype,
                    device=self.device or None,
                    progress=bar.update,
                )
        except ValueError as error:
            raise ValueError(as_flags(str(error), {"out": "DEST"}, "data encode")) from error
        console.print(escape(latents.describe()))
        console.print(f"written: {escape(relative(self.dest))}")
        return 0


@dataclass(frozen=True)
class Inspect(_Reading):
    """Print the content of a data set, and write a picture of some of its images."""

    out: Path = Path("samples.png")
    """The picture's file."""
    count: int = 64
    """Number of images in the picture."""
    seed: int = 0
    """Seed of the choice of images."""
    vae: str = ""
    """Of encoded images: the autoencoder's folder or name on a hub, if it has moved."""

    def run(self) -> int:
        """Print a table and write the picture."""
        check_suffix("--out", self.out, PICTURES, "a picture")
        if not self.out.is_dir():
            check_free("--out", self.out, overwrite=self.overwrite)
        check_file("--out", self.out)
        if self.count < 1:
            raise ValueError(f"--count is {self.count}: show at least 1 image.")
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}: it must not be negative.")
        images = self.open(split=self.split)
        rows = summary(images)
        if images.classes > 1:
            rows.append(("use of classes", "train --conditional, then sample --class and evaluate --per-class"))
        print_rows(rows)
        if images.autoencoder is None and not is_picture(images.shape):
            console.print("no picture: these samples are not (1, H, W) or (3, H, W)")
            return 0
        try:
            write_picture(self.out, sample_grid(images, self.count, self.seed, self.vae))
        except OSError as error:
            raise ValueError(f"--out {self.out} cannot be written ({error.strerror}): name another place.") from error
        console.print(f"written: {relative(self.out)}")
        return 0
