"""Pillow, which reads and writes image files: imported only where one is, and asked for by name where it is missing."""

from importlib.util import find_spec

__all__ = ["require_pillow"]


def require_pillow(purpose: str) -> None:
    """Make sure that `from PIL import Image` will work.

    Args:
        purpose: what it is needed for, to begin the error with ("reading image files").

    Raises:
        ImportError: if Pillow is not installed, with the command that installs it.
    """
    if find_spec("PIL") is None:
        raise ImportError(f'{purpose} needs Pillow: pip install "stablefield[train]"')
