"""The bars: time left at any pace, from where a run goes on, and a variance that is not read as negative."""

import io
import re

import pytest
from rich.console import Console
from rich.progress import Progress

from stablefield.cli import progress
from stablefield.cli.progress import TimeLeft
from stablefield.training._meter import Report


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("pace", [0.001, 1.0, 47.0, 600.0])
def test_the_time_left_is_that_of_the_pace_however_rare_the_reports_are(pace: float) -> None:
    clock, column = Clock(), TimeLeft()
    bar = Progress(column, console=Console(file=io.StringIO()), get_time=clock)
    number = bar.add_task("", total=1000, completed=400, begun=400)
    task = bar.tasks[0]
    assert column.render(task).plain == ""
    seen = []
    for step in (410, 420, 430):
        clock.now += 10 * pace
        bar.update(number, completed=step)
        seen.append(column.render(task).plain)
    left = 570 * pace
    days, rest = divmod(round(left), 86_400)
    told = f"{days} d {rest // 3600} h left" if days else f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d} left"
    assert seen[-1] == told
    assert "-" not in "".join(seen)
    clock.now += 5 * pace  # between two reports the time goes on
    assert column.render(task).plain != told or pace < 0.2
    bar.update(number, completed=1000)
    assert column.render(task).plain == ""


def test_what_comes_before_the_first_report_is_no_part_of_the_pace() -> None:
    clock, column = Clock(), TimeLeft()
    bar = Progress(column, console=Console(file=io.StringIO()), get_time=clock)
    number = bar.add_task("", total=100)
    for now, done in ((300.0, 10), (310.0, 20)):  # five minutes of a compiler
        clock.now = now
        bar.update(number, completed=done)
        text = column.render(bar.tasks[0]).plain
    assert text == "0:01:20 left"


def test_a_bar_after_resume_starts_where_the_run_is_and_a_variance_of_zero_is_not_negative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=out, force_terminal=True, width=80))
    shown = progress.TrainingBar(1000, begun=740)
    assert (shown._bar.tasks[0].completed, shown._bar.tasks[0].fields["text"]) == (740, "first numbers at step 750")
    report = Report(step=750, loss=0.5, variance_removed=0.0, images_per_second=12_757.0, target_share=0.1)
    with shown:
        shown.update(report)
    text = shown._bar.tasks[0].fields["text"]
    assert "variance 0% less" in text
    assert "-" not in text
    lines = [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", line) for line in out.getvalue().replace("\r", "\n").splitlines()]
    assert max(map(len, lines)) <= 80
