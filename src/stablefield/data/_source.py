"""Open any source of images as an image set.

A source is recognised by its content, not by its name. `SOURCES` lists the kinds; add a new one there, in its own module.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield._progress import Progress
from stablefield._regular_file import open_regular
from stablefield._shapes import check_callable, check_kind, flag, whole_number
from stablefield._warning import warn
from stablefield.data._archive import Archive, is_archive
from stablefield.data._arrays import AS_THEY_ARE, open_npy, open_npz
from stablefield.data._cifar10 import cifar10_folder, open_cifar10
from stablefield.data._collector import MEMORY_BUDGET, cache_folder
from stablefield.data._colour import Colour, background_name, check_colour, converted_set
from stablefield.data._digits import open_digits
from stablefield.data._hub import hub_files
from stablefield.data._idx import idx_images, is_idx, open_idx
from stablefield.data._image_files import ImageFiles, folder_files, zip_files
from stablefield.data._image_loader import load_image_files
from stablefield.data._image_set import ImageSet, MissingSplitError, Origin, make_image_set
from stablefield.data._latent_folder import is_encoded, open_latents
from stablefield.data._packed import is_packed, open_tensors
from stablefield.data._resizing import Resize, Resolution, check_resize, natural_resolution, resized_set
from stablefield.data._tables import is_saved, parquet_files, saved_files

__all__ = ["SUPPORTED", "Images", "as_image_set", "open_images", "warned"]

Images = str | Path | ImageSet | NDArray[Any] | Tensor
"""A path or name that `open_images` opens, an image set, uint8 of shape (n, C, H, W), or float data (n, ...)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of `open_images`, under the same names."""

    source: str | Path
    path: Path
    resolution: Resolution | None
    limit: int | None
    resize: Resize
    colour: Colour
    background: str
    split: str
    skip_broken: bool
    progress: Callable[[Progress], object] | None
    memory_budget: int
    cache: Path

    def decoded(self, files: ImageFiles) -> ImageSet:
        """Decode image files and bring them to one size."""
        return load_image_files(
            files,
            resolution=self.resolution,
            limit=self.limit,
            resize=self.resize,
            colour=self.colour,
            background=self.background,
            skip_broken=self.skip_broken,
            progress=self.progress,
            memory_budget=self.memory_budget,
            cache=self.cache,
        )

    def sized(self, images: ImageSet) -> ImageSet:
        """Bring images of one size to the requested resolution, or to one that suits a U-Net."""
        resolution = self.resolution
        if images.scaling is not None:
            if resolution is not None:
                raise ValueError(
                    f"resolution={resolution}: {self.source} holds {images.images.dtype} data, which are never resized: "
                    "leave resolution out, or save images as uint8."
                )
            return images
        if resolution is None and self.limit is not None:
            resolution = natural_resolution([(images.shape[1], images.shape[2])], self.limit)
        if resolution is None:
            return images
        return resized_set(images, resolution, self.resize, memory_budget=self.memory_budget, cache=self.cache)

    def coloured(self, images: ImageSet) -> ImageSet:
        """Make greyscale or RGB images of those that came as arrays; image files already have the requested colour."""
        if images.scaling is not None:
            if self.colour != "auto":
                raise ValueError(
                    f"colour={self.colour}: {self.source} holds {images.images.dtype} data, which stay as they are: leave "
                    "colour out, or save images as uint8."
                )
            return images
        return converted_set(images, self.colour, memory_budget=self.memory_budget, cache=self.cache)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """The location of a source: its name as given, its path, and its first bytes, if it is a file."""

    source: str | Path
    path: Path
    head: bytes = b""
    folder: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A kind of source."""

    recognise: Callable[[Place], bool]
    """Whether a place holds this kind; called only if no kind listed earlier recognised it."""
    open: Callable[[Request], ImageSet]
    """Open it."""
    text: str = ""
    """Its description in errors; empty if another kind's description covers it."""


def whole(open_file: Callable[[Path], ImageSet]) -> Callable[[Request], ImageSet]:
    """Make `Source.open` for a source without splits from a function that opens its file."""

    def opened(request: Request) -> ImageSet:
        if request.split != "train":
            raise MissingSplitError(f"split={request.split!r}: {request.source} has no splits; leave split out.")
        return request.sized(open_file(request.path))

    return opened


def _scaled(open_arrays: Callable[..., ImageSet]) -> Callable[[Request], ImageSet]:
    """Make `Source.open` for arrays that are resized while they are read."""
    return lambda request: request.sized(
        open_arrays(
            request.path,
            request.split,
            resolution=request.resolution,
            limit=request.limit,
            resize=request.resize,
            memory_budget=request.memory_budget,
            cache=request.cache,
        )
    )


def _open_zip(request: Request) -> ImageSet:
    with zip_files(request.path, request.split) as files:
        return request.decoded(files)


def _open_hub(request: Request) -> ImageSet:
    with hub_files(str(request.source).removeprefix("hf:"), request.split) as files:
        return request.decoded(files)


def _is_cifar10(place: Place) -> bool:
    folder = place.path
    if not place.folder:
        return False
    if cifar10_folder(folder) is not None:
        return True
    if (folder / "data_batch_1").is_file() or (folder / "cifar-10-batches-py").is_dir():
        raise ValueError(
            f"{folder} holds CIFAR-10 as pickles, which are never read, because they may run code: take the binary version "
            "(cifar-10-binary.tar.gz) instead."
        )
    return False


def _is_npz(place: Place) -> bool:
    if not is_archive(place.path):
        return False
    try:
        with Archive(place.path) as archive:
            names = [entry.filename for entry in archive.entries]
    except ValueError:
        return place.path.suffix == ".npz"
    return bool(names) and all(name.endswith(".npy") for name in names)


_DIGITS = Source(
    recognise=lambda place: place.source == "digits",
    open=whole(lambda _: open_digits()),
    text="`digits` (built in)",
)
_HUB = Source(
    recognise=lambda place: str(place.source).startswith("hf:"),
    open=_open_hub,
    text="hf:OWNER/NAME for a data set of the Hugging Face hub",
)
SOURCES: tuple[Source, ...] = (
    Source(
        recognise=lambda place: place.folder and is_encoded(place.path),
        open=whole(open_latents),
        text="a folder of latents that `stablefield data encode` made",
    ),
    Source(
        recognise=lambda place: place.folder and is_saved(place.path),
        open=lambda request: request.decoded(saved_files(request.path, request.split)),
        text="a folder of parquet files, or one that `datasets` saved by save_to_disk",
    ),
    Source(
        recognise=_is_cifar10,
        open=lambda request: request.sized(open_cifar10(cifar10_folder(request.path) or request.path, request.split)),
        text="CIFAR-10's binary folder",
    ),
    Source(
        recognise=lambda place: place.folder and bool(idx_images(place.path)),
        open=_scaled(open_idx),
        text="idx files of the MNIST family or a folder of them, also gzipped",
    ),
    Source(
        recognise=lambda place: place.folder,
        open=lambda request: request.decoded(folder_files(request.path, request.split, parquet_files)),
        text="a folder of images, with sub-folders or dataset.json for classes",
    ),
    Source(recognise=_is_npz, open=_scaled(open_npz)),
    Source(recognise=lambda place: is_archive(place.path), open=_open_zip, text="a .zip of the same"),
    Source(
        recognise=lambda place: place.head[:6] == b"\x93NUMPY",
        open=whole(open_npy),
        text="uint8 images, or float data, in .npy or .npz files",
    ),
    Source(
        recognise=lambda place: place.head[:4] == b"PAR1",
        open=lambda request: request.decoded(parquet_files([request.path], request.path, request.split)),
    ),
    Source(recognise=lambda place: is_idx(place.path), open=_scaled(open_idx)),
    Source(
        recognise=lambda place: is_packed(place.path),
        open=whole(open_tensors),
        text="a file that `stablefield data pack` made, or float data in a .safetensors file",
    ),
)
"""The kinds of folders, then of files, in the order in which they are tried. Add a new kind here."""

SUPPORTED = f"Supported sources: {'; '.join(kind.text for kind in (_DIGITS, *SOURCES, _HUB) if kind.text)}."


def open_images(
    source: str | Path,
    *,
    resolution: Resolution | None = None,
    limit: int | None = None,
    resize: Resize = "crop",
    colour: Colour = "auto",
    background: str = "white",
    split: str = "train",
    skip_broken: bool = False,
    progress: Callable[[Progress], object] | None = None,
    memory_budget: int = MEMORY_BUDGET,
    cache: str | Path | None = None,
) -> ImageSet:
    """Open a source of images, or of float data: latents (n, C, H, W), signals (n, C, L) or vectors (n, d).

    Args:
        source: "digits", "hf:OWNER/NAME", or the path of a folder or file (`./digits` for a folder of that name).
        resolution: bring every image to this many pixels a side, or to this height and width; None keeps their size, which
            must be the same for all.
        limit: without a resolution, choose one that suits a U-Net, up to this many pixels a side; images of one size keep
            it, or their shape, if it can be halved (see `natural_resolution`).
        resize: "crop" first cuts out the largest centred square, or part with the shape of `resolution`; "squash" takes the
            whole image.
        colour: "grey" or "rgb" makes all images greyscale (ITU-R 601, as Pillow) or RGB; "auto" makes a set of image files
            greyscale only if all of them are, and keeps arrays as they are. Image files become greyscale before they are
            resized, arrays after it, so their grey levels may differ a little.
        background: the colour behind the transparent pixels of image files, "white", "black" or "#rrggbb"; in greyscale, its
            luma.
        split: which split, for sources that have several.
        skip_broken: skip files that cannot be read, and count them in the manifest.
        progress: called with the stage ("reading headers", "decoding") and how many files are done.
        memory_budget: decoded images of more bytes than this go into a packed file that is mapped into memory.
        cache: the folder for that file; by default `stablefield` in $XDG_CACHE_HOME or ~/.cache.

    Returns:
        The set, in an order that depends only on the source.

    Raises:
        MissingSplitError: if the source lacks the split.
        ValueError: if the source is not supported, damaged or empty, or its images differ in size.
        ImportError: if a package is missing, with the command that installs it.
    """
    check_kind("source", source, (str, Path), "the name or path of a source of images")
    check_kind("split", split, str, "the name of a split, such as 'train'")
    if isinstance(resolution, list | tuple):
        sides = tuple(whole_number(f"resolution[{k}]", side, 1) for k, side in enumerate(resolution))
        if len(sides) != 2:
            raise ValueError(f"resolution is {resolution}: pass one side of squares, or (height, width).")
        resolution = sides
    elif resolution is not None:
        resolution = whole_number("resolution", resolution, 1)
    if limit is not None:
        limit = whole_number("limit", limit, 1)
    if cache is not None:
        check_kind("cache", cache, (str, Path), "a folder")
        cache = Path(cache)
    whole_number("memory_budget", memory_budget, 0)
    flag("skip_broken", skip_broken)
    if progress is not None:
        check_callable("progress", progress, "progress(report), with a Progress")
    check_resize(resolution, resize)
    check_colour(colour)
    background = background_name(background)
    request = Request(
        source=source,
        path=Path(source).expanduser(),
        resolution=resolution,
        limit=limit,
        resize=resize,
        colour=colour,
        background=background,
        split=split,
        skip_broken=skip_broken,
        progress=progress,
        memory_budget=memory_budget,
        cache=cache_folder() if cache is None else cache,
    )
    kind = _kind(source, request.path)
    try:
        images = request.coloured(kind.open(request))
    except ValueError as error:
        # Code that checks labels or sizes does not know the file: name it here.
        if request.path.name in str(error) or kind in (_DIGITS, _HUB):
            raise
        kept = MissingSplitError if isinstance(error, MissingSplitError) else ValueError
        raise kept(f"{source}: {error}") from error
    if split != "train":
        return images
    side: Resolution | None = None
    if images.manifest["resized"] != "no":
        _, height, width = images.shape
        side = height if height == width else (height, width)
    opening = {"source": str(source), "resolution": side, "resize": resize, "skip_broken": skip_broken}
    # Earlier versions read the configuration of a run that leaves them out.
    opening |= {"colour": colour} if colour != "auto" else {}
    opening |= {"background": background} if background != "white" else {}
    return dataclasses.replace(images, opening=opening)


def as_image_set(name: str, images: Images, labels: NDArray[np.int64] | Tensor | None = None) -> ImageSet:
    """Turn an argument that holds images into an image set, with a warning for each of its notes if it was none.

    Args:
        name: the argument's name, for errors.
        images: an image set, a source for `open_images`, uint8 of shape (n, C, H, W), or float data (n, ...).
        labels: class numbers from 0 for an array of images, shape (n,); image sets and files have their own.

    Raises:
        ValueError: if it holds no images, or the labels do not fit.
        TypeError: if it is of another kind.
    """
    if labels is not None and isinstance(images, ImageSet | str | Path):
        raise ValueError(f"labels is only for {name} that is an array: an image set or a file has its own labels.")
    if isinstance(images, ImageSet):
        return images
    if isinstance(images, str | Path):
        return warned(name, open_images(images))
    if isinstance(images, Tensor):
        # NumPy has no bfloat16.
        images = (images.float() if images.dtype == torch.bfloat16 else images).detach().cpu().numpy()
    array = images
    check_kind(
        name, array, np.ndarray, "an image set, the path of data, uint8 of shape (n, C, H, W), or floats (n, ...)"
    )
    numbers = labels.cpu().numpy() if isinstance(labels, Tensor) else labels
    made = make_image_set(array, numbers, Origin(name=name, source="an array"))
    return warned(name, made)


def warned(name: str, images: ImageSet) -> ImageSet:
    """The image set that a caller gave as a path, a name or an array, after a warning for each of its notes.

    Who passes an image set has opened it, as the command does, and can read its notes.

    Args:
        name: the argument's name.
        images: what it holds.
    """
    for note in images.notes if os.environ.get("RANK", "0") == "0" else ():
        if not note.startswith(AS_THEY_ARE):  # says what was done, and not that something is wrong
            warn(f"{name}: {note}")
    return images


def _kind(source: str | Path, path: Path) -> Source:
    """The kind of a source."""
    for kind in (_DIGITS, _HUB):
        if kind.recognise(Place(source=source, path=path)):
            return kind
    try:
        place = _place(source, path)
        for kind in SOURCES:
            if kind.recognise(place):
                return kind
    except OSError as error:
        raise ValueError(f"{source} cannot be read: {error.strerror or error}.") from error
    head, hint = place.head, ""
    if (
        head[257:262] == b"ustar"
        or head[:2] == b"\x1f\x8b"
        or path.suffix in (".tar", ".7z", ".rar", ".xz", ".bz2", ".zst")
    ):
        hint = " It looks like an archive: unpack it, and name the folder."
    elif head[:8] == b"\x89PNG\r\n\x1a\n" or head[:3] == b"\xff\xd8\xff":
        hint = " It is a single image: name its folder."
    raise ValueError(f"{path} is not a supported source.{hint} {SUPPORTED}")


def _place(source: str | Path, path: Path) -> Place:
    if path.is_dir():
        return Place(source=source, path=path, folder=True)
    if not path.exists():
        raise ValueError(f"{source} does not exist. {SUPPORTED}")
    with open_regular(path) as file:
        return Place(source=source, path=path, head=file.read(512))
