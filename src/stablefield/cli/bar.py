"""A bar for work that tells which share of it is done, and the time left of any work."""

from datetime import timedelta
from typing import Self

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from stablefield.cli.console import console

__all__ = ["Bar", "TimeLeft"]


class TimeLeft(ProgressColumn):
    """The time that the rest takes at the pace so far, however rare the reports of it are.

    A task that begins in the midst of its work says so in its field `begun`. Until there is a pace nothing is shown.
    """

    def __init__(self) -> None:
        super().__init__()
        # What was done when, at the first report of each task and at the last.
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
        # What comes before the first report, such as a compiler's work, is no part of the pace once there are two.
        since, at = first if done > first[0] else (begun, 0.0)
        left = (then - at) / (done - since) * (task.total - done) - (now - then)
        days, rest = divmod(max(0, round(left)), 86_400)
        text = f"{days} d {rest // 3600} h" if days else str(timedelta(seconds=rest))
        return Text(f"{text} left", style="progress.remaining")


class Bar:
    """A bar in a terminal, called with the share that is done; nothing elsewhere.

    Args:
        what: is being done, in a word.
    """

    def __init__(self, what: str) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            TimeLeft(),
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
