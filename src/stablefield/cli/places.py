"""Checks, before the work, that its results can be written."""

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

# Suffixes of files: `--out grid.gif` asks for a file, not for a folder of that name.
_PICTURES = (*PICTURES, ".gif", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".svg", ".pdf", ".mp4")
_ARRAYS = (".npy", ".npz", ".pt", ".pth", ".ckpt", ".pkl", ".safetensors", ".parquet")
_TEXTS = (".json", ".jsonl", ".csv", ".txt", ".html", ".htm", ".md", ".py")
_FILES = frozenset((*_PICTURES, *_ARRAYS, *_TEXTS, ".zip", ".tar", ".gz", ".tgz"))


def check_file(flag: str, path: Path) -> None:
    """Check that a file can be written; create its folder.

    Args:
        flag: the flag that names the path, for the error.
        path: the file.

    Raises:
        ValueError: if the file cannot be written.
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
    """Check that a folder is writable or can be created; create nothing.

    Args:
        flag: the flag that names the path, for the error.
        path: the folder.

    Raises:
        ValueError: if it cannot be created or written.
    """
    if looks_like_file(path):
        raise ValueError(f"{flag} {path} has the suffix of a file: name a folder.")
    try:
        home = path
        while not home.exists() and home != home.parent:
            home = home.parent
        _try_writing(home)
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written ({error.strerror}): name another place.") from error


def check_new_folder(flag: str, path: Path, advice: str = "name a new folder") -> None:
    """Check that a folder is new or empty and can be written; create nothing.

    Ignores hidden files, which a killed run may have left: `RunFolder.create` checks those.

    Args:
        flag: the flag that names the path, for the error.
        path: the folder.
        advice: remedy for a folder that is not empty.

    Raises:
        ValueError: if it is not empty or cannot be written.
    """
    check_folder(flag, path)
    if path.is_dir() and any(not found.name.startswith(".") for found in path.iterdir()):
        raise ValueError(f"{flag} {path} is not empty: {advice}.")


def check_free(flag: str, path: Path, *, overwrite: bool) -> None:
    """Check that the path does not exist, or is an empty folder, unless `overwrite` is set.

    Args:
        flag: the flag that names the path, for the error.
        path: the file or the folder.
        overwrite: whether to accept existing files.

    Raises:
        ValueError: naming an existing file.
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
        return  # the first write there reports the reason
    if found:
        many = "1 file" if len(found) == 1 else f"{len(found):,} files"
        raise ValueError(
            f"{flag} {path} holds {many}, such as {found[0]}: name a new folder, or write among them with --overwrite, "
            "which replaces those of the same names."
        )


def unused(path: Path) -> Path:
    """The path itself if unused, else with the first unused number from 2."""
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return found


def check_suffix(flag: str, path: Path, suffixes: Collection[str], what: str) -> None:
    """Check a file's suffix.

    Args:
        flag: the flag that names the file, for the error.
        path: the file.
        suffixes: the allowed suffixes.
        what: the kind of file, for the error.

    Raises:
        ValueError: if it has another suffix.
    """
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{flag} {path}: {what} has the suffix {' or '.join(suffixes)}; name such a file.")


def looks_like_file(path: Path) -> bool:
    """Whether a path has the suffix of a file, and is not a folder."""
    return path.suffix.lower() in _FILES and not path.is_dir()


def _try_writing(home: Path) -> None:
    probe = home / f".stablefield-probe-{os.getpid()}"
    probe.touch()
    probe.unlink()
