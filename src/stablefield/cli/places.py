"""Where results go: found out before the work, not after it, whether they can."""

import os
from pathlib import Path

__all__ = ["check_place"]


def check_place(flag: str, path: Path, *, folder: bool = False) -> None:
    """Make sure that a file, or files in a folder, can be written; folders on the way are made.

    Args:
        flag: that named the place, for the error.
        path: the file, or the folder.
        folder: whether it is a folder.

    Raises:
        ValueError: if it cannot.
    """
    home = path if folder else path.parent
    try:
        home.mkdir(parents=True, exist_ok=True)
        probe = home / f".stablefield-probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written ({error.strerror}): name another place.") from error
    if not folder and path.is_dir():
        raise ValueError(f"{flag} {path} is a folder: name a file, or a folder without {path.suffix} in its name.")
