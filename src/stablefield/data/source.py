"""Anything that holds images, opened as an image set.

A source is recognised by what is in it, not by its name: see `UNDERSTOOD` for the list.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stablefield.data.archive import Archive, is_archive
from stablefield.data.arrays import open_npy, open_npz
from stablefield.data.cifar10 import cifar10_folder, open_cifar10
from stablefield.data.collector import MEMORY_BUDGET, cache_folder
from stablefield.data.digits import open_digits
from stablefield.data.hub import hub_files
from stablefield.data.idx import idx_images, is_idx, open_idx
from stablefield.data.image_files import ImageFiles, folder_files, zip_files
from stablefield.data.image_loader import Progress, load_image_files
from stablefield.data.image_set import ImageSet, Origin, make_image_set
from stablefield.data.packed import is_packed, open_packed
from stablefield.data.resizing import Resize, Resolution, check_resize, natural_resolution, resized_set
from stablefield.data.tables import is_saved, parquet_files, saved_files
from stablefield.regular_file import open_regular
from stablefield.shapes import check_callable, check_kind, flag, whole_number

__all__ = ["UNDERSTOOD", "as_image_set", "open_images"]

UNDERSTOOD = (
    "Supported sources: `digits` (built in); a folder of images, with sub-folders or dataset.json for classes; a .zip of "
    "the same; a folder of parquet files, or one that `datasets` saved by save_to_disk; CIFAR-10's binary folder; idx files "
    "of the MNIST family or a folder of them, also gzipped; uint8 arrays in .npy or .npz files; a file that `stablefield "
    "data pack` made; and hf:OWNER/NAME for a data set of the Hugging Face hub."
)


def open_images(
    source: str | Path,
    *,
    resolution: Resolution | None = None,
    limit: int | None = None,
    resize: Resize = "crop",
    split: str = "train",
    skip_broken: bool = False,
    progress: Progress | None = None,
    memory_budget: int = MEMORY_BUDGET,
    cache: str | Path | None = None,
) -> ImageSet:
    """Open a source of images.

    Args:
        source: "digits", "hf:OWNER/NAME", or the path of a folder or file (`./digits` for a folder of that name).
        resolution: bring every image to this many pixels a side, or to this height and width; None keeps their size, in
            which all must agree.
        limit: where no resolution is given, choose one that suits a U-Net, up to this many pixels a side; images of one size
            keep it, or their shape, where they can be halved (see `natural_resolution`).
        resize: "crop" cuts to the largest centred square or other part of that shape first, "squash" takes the whole image.
        split: which part, for sources that have several.
        skip_broken: leave out files that cannot be read, and count them in the manifest.
        progress: called with stage, files done, and files in all.
        memory_budget: decoded images of more bytes than this are written to a packed file and mapped, not held.
        cache: the folder for that file; by default `stablefield` in $XDG_CACHE_HOME or ~/.cache.

    Returns:
        The set, in an order that depends on nothing but the source.

    Raises:
        ValueError: if the source is not understood, damaged, empty, lacks the split, or its images differ in size.
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
        whole_number("resolution", resolution, 1)
    if limit is not None:
        whole_number("limit", limit, 1)
    if cache is not None:
        check_kind("cache", cache, (str, Path), "a folder")
        cache = Path(cache)
    whole_number("memory_budget", memory_budget, 0)
    flag("skip_broken", skip_broken)
    if progress is not None:
        check_callable("progress", progress, "progress(stage, done, total)")
    check_resize(resolution, resize)
    cache = cache_folder() if cache is None else cache

    def loaded(files: ImageFiles) -> ImageSet:
        return load_image_files(
            files,
            resolution=resolution,
            limit=limit,
            resize=resize,
            skip_broken=skip_broken,
            progress=progress,
            memory_budget=memory_budget,
            cache=cache,
        )

    images = _opened(source, resolution, limit, resize, split, memory_budget, cache, loaded)
    if split != "train":
        return images
    _, height, width = images.shape
    side: Resolution | None = height if height == width else (height, width)
    if images.manifest["resized"] == "no":
        side = None
    opening = {"source": str(source), "resolution": side, "resize": resize, "skip_broken": skip_broken}
    return dataclasses.replace(images, opening=opening)


def as_image_set(name: str, images: "ImageSet | str | Path | NDArray[np.uint8] | Tensor") -> ImageSet:
    """An argument that holds images, as an image set.

    Args:
        name: of the argument, for errors.
        images: an image set, what `open_images` opens, or uint8 of shape (n, C, H, W).

    Raises:
        ValueError: if it holds no images.
        TypeError: if it is of another kind.
    """
    if isinstance(images, ImageSet):
        return images
    if isinstance(images, str | Path):
        return open_images(images)
    array = images.cpu().numpy() if isinstance(images, Tensor) else images
    check_kind(name, array, np.ndarray, "an image set, the path of images, or uint8 of shape (n, C, H, W)")
    return make_image_set(array, None, Origin(name=name, source="an array"))


def _opened(
    source: str | Path,
    resolution: Resolution | None,
    limit: int | None,
    resize: Resize,
    split: str,
    memory_budget: int,
    cache: Path,
    loaded: Callable[[ImageFiles], ImageSet],
) -> ImageSet:
    kind, path = _kind(source)
    try:
        match kind:
            case "hub":
                with hub_files(str(source).removeprefix("hf:"), split) as files:
                    return loaded(files)
            case "folder":
                return loaded(folder_files(path, split, parquet_files))
            case "saved":
                return loaded(saved_files(path, split))
            case "parquet":
                return loaded(parquet_files([path], path, split))
            case "zip":
                with zip_files(path, split) as files:
                    return loaded(files)
            case "cifar10":
                images = open_cifar10(cifar10_folder(path) or path, split)
            case "idx":
                images = open_idx(
                    path,
                    split,
                    resolution=resolution,
                    limit=limit,
                    resize=resize,
                    memory_budget=memory_budget,
                    cache=cache,
                )
            case "npz":
                images = open_npz(
                    path,
                    split,
                    resolution=resolution,
                    limit=limit,
                    resize=resize,
                    memory_budget=memory_budget,
                    cache=cache,
                )
            case _:
                if split != "train":
                    raise ValueError(f"split={split!r}: {source} has no splits; leave split out.")
                images = open_digits() if kind == "digits" else open_npy(path) if kind == "npy" else open_packed(path)
        if resolution is None and limit is not None:
            resolution = natural_resolution([images.shape[1:]], limit)
        if resolution is None:
            return images
        return resized_set(images, resolution, resize, memory_budget=memory_budget, cache=cache)
    except ValueError as error:
        # What is wrong with labels or sizes is found where no file is known any more.
        if path.name in str(error) or kind in ("hub", "digits"):
            raise
        raise ValueError(f"{source}: {error}") from error


def _kind(source: str | Path) -> tuple[str, Path]:
    """What a source is, and its path."""
    path = Path(source).expanduser()
    if source == "digits":
        return "digits", path
    if str(source).startswith("hf:"):
        return "hub", path
    try:
        if path.is_dir():
            return _folder_kind(path), path
        if path.exists():
            return _file_kind(path), path
    except OSError as error:
        raise ValueError(f"{source} cannot be read: {error.strerror or error}.") from error
    raise ValueError(f"{source} does not exist. {UNDERSTOOD}")


def _folder_kind(folder: Path) -> str:
    if is_saved(folder):
        return "saved"
    if cifar10_folder(folder) is not None:
        return "cifar10"
    if (folder / "data_batch_1").is_file() or (folder / "cifar-10-batches-py").is_dir():
        raise ValueError(
            f"{folder} holds CIFAR-10 as pickles, which are never read, because they may run code: take the binary version "
            "(cifar-10-binary.tar.gz) instead."
        )
    return "idx" if idx_images(folder) else "folder"


def _file_kind(path: Path) -> str:
    with open_regular(path) as file:
        head = file.read(512)
    if is_archive(path):
        return "npz" if _holds_arrays(path) else "zip"
    if head[:6] == b"\x93NUMPY":
        return "npy"
    if head[:4] == b"PAR1":
        return "parquet"
    if is_idx(path):
        return "idx"
    if is_packed(path):
        return "packed"
    hint = ""
    if (
        head[257:262] == b"ustar"
        or head[:2] == b"\x1f\x8b"
        or path.suffix in (".tar", ".7z", ".rar", ".xz", ".bz2", ".zst")
    ):
        hint = " It looks like an archive: unpack it, and name the folder."
    elif head[:8] == b"\x89PNG\r\n\x1a\n" or head[:3] == b"\xff\xd8\xff":
        hint = " It is one image: name the folder that it lies in."
    raise ValueError(f"{path} is not understood.{hint} {UNDERSTOOD}")


def _holds_arrays(path: Path) -> bool:
    try:
        with Archive(path) as archive:
            names = [entry.filename for entry in archive.entries]
    except ValueError:
        return path.suffix == ".npz"
    return bool(names) and all(name.endswith(".npy") for name in names)
