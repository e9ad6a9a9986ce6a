"""A bar for work that tells which share of it is done."""

from typing import Self

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from stablefield.cli.console import console

__all__ = ["Bar"]


class Bar:
    """A bar in a terminal, called with the share that is done; nothing elsewhere.

    Args:
        what: is being done, in a word.
    """

    def __init__(self, what: str) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(what, total=1.0)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, share: float) -> None:
        """Show that this share is done."""
        self._bar.update(self._task, completed=share)
