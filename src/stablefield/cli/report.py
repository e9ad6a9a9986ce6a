"""`stablefield report RUN`: write the page of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.markup import escape

from stablefield.cli.console import console, relative
from stablefield.cli.places import check_file, check_free, check_suffix
from stablefield.report._extra import require
from stablefield.training._run import Run

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """Write the report of a run, finished or in training: losses, samples over training, speed, settings and environment.

    `train` writes the same page to RUN/report.html now and then; a browser that shows it follows the training.
    """

    run_folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    out: Path | None = None
    """FILE.html, or FILE.json for the numbers; by default RUN/report.html, which is replaced."""
    gif: Path | None = None
    """Also write the samples over training to this FILE.gif."""
    overwrite: bool = False
    """Replace --out and --gif if they exist."""

    def run(self) -> int:
        """Write the files, and print the last numbers."""
        run = Run(self.run_folder)
        for flag, path, suffixes in (("--out", self.out, (".html", ".json")), ("--gif", self.gif, (".gif",))):
            if path is not None:
                check_suffix(flag, path, suffixes, "the report" if flag == "--out" else "an animation")
                check_free(flag, path, overwrite=self.overwrite)
                check_file(flag, path)
        out = self.out or run.path / "report.html"
        check_file("--out", out)
        if out.suffix.lower() == ".html":
            require("jinja2", "a report")
            require("matplotlib", "a report")
        report = run.report()
        # Before the report, since a run of fewer than two grids has none.
        animation = [] if self.gif is None else [run.animation(self.gif)]
        console.print(str(report), markup=False)
        for path in (report.save(out), *animation):
            console.print(f"written: {escape(relative(path))}")
        return 0
