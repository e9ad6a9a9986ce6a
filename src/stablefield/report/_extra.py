"""The packages that a report needs: imported only where one is made, and asked for by name where they are missing."""

from importlib.util import find_spec

__all__ = ["require"]


def require(package: str, purpose: str) -> None:
    """Make sure that a package of the extra can be imported.

    Args:
        package: its import name.
        purpose: what it is needed for, to begin the error with ("drawing a chart").

    Raises:
        ImportError: if it is not installed, with the command that installs it.
    """
    if find_spec(package) is None:
        raise ImportError(f'{purpose} needs {package}: pip install "stablefield[report]"')
