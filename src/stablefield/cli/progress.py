"""Progress bars in a terminal, and a line now and then elsewhere."""

import time
from datetime import timedelta
from typing import Self

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
)
from rich.text import Text

from stablefield._progress import Progress as Stage
from stablefield.cli.console import console
from stablefield.training._loop import Report

__all__ = ["EVERY", "StageBar", "TimeLeft", "TrainingBar"]

EVERY = 10
"""Steps between reports of a training."""

# Seconds between lines where there is no terminal.
_QUIET = 15.0
# Columns of a terminal wide enough to show the target's share of a step, too.
_ROOMY = 100
# Weight of the newest report in the displayed averages.
_SMOOTH = 0.1


class TimeLeft(ProgressColumn):
    """The time left at the pace so far, even if reports are rare.

    A task that resumes earlier work has the finished part in its field `begun`. The column is empty until there is a pace.
    """

    def __init__(self) -> None:
        super().__init__()
        # Progress and time of each task's first report, and of its last.
        self._first: dict[int, tuple[float, float]] = {}
        self._last: dict[int, tuple[float, float]] = {}

    def render(self, task: Task) -> Text:
        """The time left, such as 1:02:03, or nothing."""
        begun, now = float(task.fields.get("begun", 0)), task.elapsed
        if task.finished or task.total is None or task.completed <= begun or now is None:
            return Text("")
        first = self._first.setdefault(task.id, (task.completed, now))
        if self._last.get(task.id, (-1.0, 0.0))[0] != task.completed:
            self._last[task.id] = (task.completed, now)
        done, then = self._last[task.id]
        # From the second report on, the pace leaves out the time before the first, such as a compiler's work.
        since, at = first if done > first[0] else (begun, 0.0)
        left = (then - at) / (done - since) * (task.total - done) - (now - then)
        days, rest = divmod(max(0, round(left)), 86_400)
        text = f"{days} d {rest // 3600} h" if days else str(timedelta(seconds=rest))
        return Text(f"{text} left", style="progress.remaining")


class StageBar:
    """Shows the stages of a long call of the library."""

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

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, report: Stage) -> None:
        """Show a report."""
        text = f"{report.done:,} of {report.total:,}"
        if self._task is None or report.stage != self._stage:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._stage, self._task = report.stage, self._bar.add_task(report.stage, total=report.total, text=text)
        self._bar.update(self._task, completed=report.done, text=text)
        now = time.monotonic()
        if not console.is_terminal and now - self._last_line > _QUIET:
            self._last_line = now
            console.print(f"{report.stage}: {text}", markup=False)


class TrainingBar:
    """Shows reports of a run of `steps` steps.

    Args:
        steps: number of steps of the whole run.
        begun: number of steps done before, in a resumed run.
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

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, report: Report) -> None:
        """Show a report."""
        blend = _SMOOTH if self._loss is not None else 1.0
        self._loss = report.loss if self._loss is None else self._loss + blend * (report.loss - self._loss)
        self._share += blend * (report.share_removed - self._share)
        self._target += blend * (report.target_share - self._target)
        self._steps = report.steps or self._steps
        speed = report.images_per_second
        rate, removed = f"{speed:{',.0f' if speed >= 10 else '.1f'}}", round(100 * self._share)
        text = f"{rate} img/s loss {self._loss:.3f} variance {removed}% less"
        cost = f" target {self._target:.0%}"
        roomy = console.width >= _ROOMY
        self._bar.update(self._task, total=self._steps, completed=report.step, text=text + cost if roomy else text)
        now = time.monotonic()
        if not console.is_terminal and (now - self._last_line > _QUIET or report.step == self._steps):
            self._last_line = now
            console.print(f"step {report.step:,} of {self._steps:,}  {text}{cost}")
