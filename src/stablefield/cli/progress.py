"""Progress of a training run: a bar in a terminal, a line now and then elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from stablefield.cli.bar import TimeLeft
from stablefield.cli.console import console
from stablefield.training._loop import Report

__all__ = ["EVERY", "TrainingProgress"]

EVERY = 10
"""Steps between reports."""

# Seconds between lines where there is no terminal.
_QUIET = 15.0
# Columns of a terminal that also show which share of a step the target takes.
_ROOMY = 100
# Smoothing of the numbers shown.
_SMOOTH = 0.1


class TrainingProgress:
    """Shows reports of a run of `steps` steps.

    Args:
        steps: of the whole run.
        begun: that were done before, where a run goes on.
    """

    def __init__(self, steps: int, begun: int = 0) -> None:
        self._steps = steps
        self._last_line = time.monotonic()
        self._loss: float | None = None
        self._share = 0.0
        self._target = 0.0
        self._bar = Progress(
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            TimeLeft(),
            console=console,
            disable=not console.is_terminal,
        )
        text = f"first numbers at step {min(begun // EVERY * EVERY + EVERY, steps):,}" if begun < steps else ""
        self._task = self._bar.add_task("train", total=steps, completed=begun, begun=begun, text=text)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, report: Report) -> None:
        """Show a report."""
        blend = _SMOOTH if self._loss is not None else 1.0
        self._loss = report.loss if self._loss is None else self._loss + blend * (report.loss - self._loss)
        self._share += blend * (report.share_removed - self._share)
        self._target += blend * (report.target_share - self._target)
        speed = report.images_per_second
        rate, removed = f"{speed:{',.0f' if speed >= 10 else '.1f'}}", round(100 * self._share)
        text = f"{rate} img/s loss {self._loss:.3f} variance {removed}% less"
        cost = f" target {self._target:.0%}"
        roomy = console.width >= _ROOMY
        self._bar.update(self._task, completed=report.step, text=text + cost if roomy else text)
        now = time.monotonic()
        if not console.is_terminal and (now - self._last_line > _QUIET or report.step == self._steps):
            self._last_line = now
            console.print(f"step {report.step:,} of {self._steps:,}  {text}{cost}")
