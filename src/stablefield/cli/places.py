"""Where results go: found out before the work, not after it, whether they can."""

import os
from collections.abc import Collection
from pathlib import Path

from stablefield.data._png import PICTURES

__all__ = [
    "check_file",
    "check_folder",
    "check_free",
    "check_new_folder",
    "check_suffix",
    "looks_like_file",
    "unused",
]

# What a folder is not called, but a file: who writes `--out grid.gif` does not want a folder of that name.
_PICTURES = (*PICTURES, ".gif", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".svg", ".pdf", ".mp4")
_ARRAYS = (".npy", ".npz", ".pt", ".pth", ".ckpt", ".pkl", ".safetensors", ".parquet")
_TEXTS = (".json", ".jsonl", ".csv", ".txt", ".html", ".htm", ".md", ".py")
_FILES = frozenset((*_PICTURES, *_ARRAYS, *_TEXTS, ".zip", ".tar", ".gz", ".tgz"))


def check_file(flag: str, path: Path) -> None:
    """Make sure that a file can be written; folders on the way are made.

    Args:
        flag: that named the place, for the error.
        path: the file.

    Raises:
        ValueError: if it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _try_writing(path.parent)
        is_folder = path.is_dir()
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written ({error.strerror}): name another place.") from error
    if is_folder:
        without = f", or a folder without {path.suffix} in its name" if path.suffix else ""
        raise ValueError(f"{flag} {path} is a folder: name a file{without}.")


def check_folder(flag: str, path: Path) -> None:
    """Make sure that a folder can be made, or written if it is there; nothing is made.

    Args:
        flag: that named the place, for the error.
        path: the folder.

    Raises:
        ValueError: if it cannot.
    """
    if looks_like_file(path):
        raise ValueError(f"{flag} {path} is called like a file: name a folder.")
    try:
        home = path
        while not home.exists() and home != home.parent:
            home = home.parent
        _try_writing(home)
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written ({error.strerror}): name another place.") from error


def check_new_folder(flag: str, path: Path, advice: str = "name a new folder") -> None:
    """Make sure that a folder is new or empty and can be written; nothing is made.

    Hidden files may be what a run left that was killed at its very beginning: whoever makes the folder knows.

    Args:
        flag: that named the place, for the error.
        path: the folder.
        advice: what to do if it is not empty.

    Raises:
        ValueError: if it is not empty or cannot be written.
    """
    check_folder(flag, path)
    if path.is_dir() and any(not found.name.startswith(".") for found in path.iterdir()):
        raise ValueError(f"{flag} {path} is not empty: {advice}.")


def check_free(flag: str, path: Path, *, overwrite: bool) -> None:
    """Make sure that nothing is written over or among files that are there, unless it is asked for.

    Args:
        flag: that named the place, for the error.
        path: the file, or the folder, which may be there if it is empty.
        overwrite: whether files may be replaced.

    Raises:
        ValueError: saying what is there.
    """
    if overwrite:
        return
    try:
        if path.exists() and not path.is_dir():
            raise ValueError(f"{flag} {path} exists: name another file, or replace it with --overwrite.")
        found = (
            sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(".")) if path.is_dir() else []
        )
    except OSError:
        return  # whoever tries to write there says why that cannot be
    if found:
        many = "1 file" if len(found) == 1 else f"{len(found):,} files"
        raise ValueError(
            f"{flag} {path} holds {many}, such as {found[0]}: name a new folder, or write among them with --overwrite, "
            "which replaces those of the same names."
        )


def unused(path: Path) -> Path:
    """The file of that name, or with the first number from 2 at which there is none."""
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return found


def check_suffix(flag: str, path: Path, suffixes: Collection[str], what: str) -> None:
    """Make sure that a file is called as what it will be.

    Args:
        flag: that named the file, for the error.
        path: the file.
        suffixes: that it may have.
        what: it will be, for the error.

    Raises:
        ValueError: if it has another.
    """
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{flag} {path}: {what} is written as {' or '.join(suffixes)}; name such a file.")


def looks_like_file(path: Path) -> bool:
    """Whether a path is called as files are, and is no folder."""
    return path.suffix.lower() in _FILES and not path.is_dir()


def _try_writing(home: Path) -> None:
    probe = home / f".stablefield-probe-{os.getpid()}"
    probe.touch()
    probe.unlink()
