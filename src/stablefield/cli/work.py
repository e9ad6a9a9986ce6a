"""Progress of work in stages: a bar in a terminal, a line now and then elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from stablefield._progress import Progress as Report
from stablefield.cli.bar import TimeLeft
from stablefield.cli.console import console

__all__ = ["Work"]

# Seconds between lines where there is no terminal.
_QUIET = 15.0


class Work:
    """Shows how far each stage is; called with the stage, how much of it is done, and how much there is."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            TimeLeft(),
            console=console,
            transient=True,
            disable=not console.is_terminal or console.quiet,
        )
        self._stage: str | None = None
        self._task: TaskID | None = None
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, report: Report) -> None:
        """Show a report of the library."""
        self(report.stage, report.done, report.total)

    def __call__(self, stage: str, done: float, total: float) -> None:
        """Show that `done` of `total` images of a stage are done."""
        text = f"{int(done):,} of {int(total):,}"
        if self._task is None or stage != self._stage:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._stage, self._task = stage, self._bar.add_task(stage, total=total, text=text)
        self._bar.update(self._task, completed=done, text=text)
        now = time.monotonic()
        if not console.is_terminal and now - self._last_line > _QUIET:
            self._last_line = now
            console.print(f"{stage}: {text}", markup=False)
