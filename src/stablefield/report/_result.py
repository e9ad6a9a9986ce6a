"""The result of an experiment: numbers that save themselves as JSON, as tables, as a report and as pictures.

`Probe`, `Evaluation` and `Comparison` are results. Each defines its numbers, charts and page; saving and display in a
notebook work the same way for all.
"""

import csv
import io
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stablefield._atomic_file import write_atomically
from stablefield.report._chart import Chart
from stablefield.report._drawing import write_chart
from stablefield.report._page import Page
from stablefield.report._render import render_page, write_page

__all__ = ["Result", "Tables"]

Tables = Mapping[str, tuple[Sequence[str], Sequence[Sequence[str | float | None]]]]
"""Tables by name, each as its column names and its rows; None is an empty cell."""


class Result(ABC):
    """Measured numbers, with their context.

    `print(result)` shows a table of at most 80 columns (`text_table` makes one); a notebook shows the report.
    """

    @abstractmethod
    def __str__(self) -> str:
        """The table."""

    def __repr__(self) -> str:
        # A prompt shows this; subclasses are dataclasses with repr=False so that it applies.
        return str(self)

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """All numbers and their protocol, as JSON values."""

    @abstractmethod
    def charts(self) -> Mapping[str, Chart]:
        """The charts by name, the most important one first; empty if there is nothing to draw."""

    @abstractmethod
    def page(self) -> Page:
        """The report."""

    def tables(self) -> Tables:
        """The tables of numbers by name, the most important one first; none by default."""
        return {}

    def save_all(self, folder: str | Path, name: str) -> list[Path]:
        """Write everything into a folder: `name`.json, a .csv file per table, a .png file per chart, report.html.

        Raises:
            ImportError: if matplotlib or Jinja2 is not installed.
        """
        folder = Path(folder)
        written = [self.save(folder / f"{name}.json")]
        for table, (columns, rows) in self.tables().items():
            written.append(_write(folder / f"{table}.csv", _csv(columns, rows)))
        written += [write_chart(chart, folder / f"{title}.png") for title, chart in self.charts().items()]
        return [*written, self.save(folder / "report.html")]

    def save(self, path: str | Path) -> Path:
        """Write the numbers to a .json file, the report to .html, the first table to .csv, the first chart to .png.

        Args:
            path: the file, which is replaced if it exists; its suffix decides what is written. Missing folders are created.

        Returns:
            The path.

        Raises:
            ValueError: if the suffix is a different one, or there is no table or chart for it.
            ImportError: if matplotlib (for .png and .html) or Jinja2 (for .html) is not installed.
        """
        path = Path(path)
        match path.suffix.lower():
            case ".json":
                _write(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")
            case ".html":
                write_page(self.page(), path)
            case ".csv":
                tables = self.tables()
                if not tables:
                    raise ValueError(f"path={str(path)!r}: this result has no table; save it as .json or .html.")
                _write(path, _csv(*next(iter(tables.values()))))
            case ".png":
                charts = self.charts()
                if not charts:
                    raise ValueError(f"path={str(path)!r}: this result has no chart; save it as .json or .html.")
                write_chart(next(iter(charts.values())), path)
            case _:
                raise ValueError(
                    f"path={str(path)!r}: name a .json file for the numbers, .html for the report, .csv for the first table "
                    "or .png for the first chart."
                )
        return path

    def _repr_png_(self) -> bytes | None:
        charts = self.charts()
        if not charts:
            return None
        with tempfile.TemporaryDirectory() as folder:
            return write_chart(next(iter(charts.values())), Path(folder) / "chart.png").read_bytes()

    def _repr_html_(self) -> str:
        # A frame keeps the page's style away from the notebook's.
        text = render_page(self.page()).replace("&", "&amp;").replace('"', "&quot;")
        return f'<iframe srcdoc="{text}" style="width: 100%; height: 40em; border: 0"></iframe>'


def _csv(columns: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue()


def _write(path: Path, text: str) -> Path:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))
    return path
