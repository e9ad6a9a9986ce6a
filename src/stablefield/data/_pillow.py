"""The check for Pillow, which reads and writes image files and is imported only where needed."""

from importlib.util import find_spec

__all__ = ["require_pillow"]


def require_pillow(purpose: str) -> None:
    """Make sure that `from PIL import Image` will work.

    Args:
        purpose: the start of the error ("reading image files").

    Raises:
        ImportError: if Pillow is not installed, with the command that installs it.
    """
    if find_spec("PIL") is None:
        raise ImportError(f'{purpose} needs Pillow: pip install "stablefield[train]"')
