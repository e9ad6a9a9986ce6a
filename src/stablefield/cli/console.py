"""Where the command prints: one console for its results, plain where it is no terminal."""

from pathlib import Path

from rich.console import Console

__all__ = ["console", "relative"]

console = Console(highlight=False, soft_wrap=True)


def relative(path: Path) -> str:
    """The path as one would type it from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
