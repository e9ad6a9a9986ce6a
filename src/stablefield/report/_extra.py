"""The check for the packages that a report needs, which are imported only where needed."""

from importlib.util import find_spec

__all__ = ["require"]


def require(package: str, purpose: str) -> None:
    """Make sure that a package of the extra can be imported.

    Args:
        package: its import name.
        purpose: the start of the error ("drawing a chart").

    Raises:
        ImportError: if it is not installed, with the command that installs it.
    """
    if find_spec(package) is None:
        raise ImportError(f'{purpose} needs {package}: pip install "stablefield[report]"')
