"""`stablefield ema RUN`: averages of any length, from a run's snapshots."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.markup import escape

from stablefield.cli.console import console, quoted, relative
from stablefield.cli.places import check_folder
from stablefield.training._ema import LENGTHS, power_exponent
from stablefield.training._run import Run

__all__ = ["Ema"]


@dataclass(frozen=True)
class Ema:
    """Make averages of the weights of any length after training, or list the snapshots."""

    run_folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    length: tuple[float, ...] = ()
    """Standard deviations of the averages as shares of the run, such as 0.05 0.1 0.15."""
    step: int | None = None
    """Step of the averages, one with a snapshot; the last one's by default."""

    def run(self) -> int:
        """Write one file of weights per length."""
        if self.step is not None and not self.length:
            raise ValueError(
                f"--step {self.step} does nothing without --length: name lengths, such as --length 0.05 0.1."
            )
        for length in self.length:
            power_exponent(length)
        run = Run(self.run_folder)
        steps = run.snapshot_steps()
        if not steps:
            raise ValueError(f"{self.run_folder} has no snapshots: train with ema_snapshot_every=STEPS.")
        shown = ", ".join(f"{step:,}" for step in steps[:8]) + (f" ... {steps[-1]:,}" if len(steps) > 8 else "")
        console.print(f"snapshots of lengths {' and '.join(map(str, LENGTHS))} at steps {shown}")
        if self.length:
            check_folder("RUN", run.folder.snapshots)
        for length in self.length:
            path, error = run.average(length, self.step)
            console.print(f"length {length:g}: {escape(relative(path))} (profile within {error:.1%} of the exact one)")
        shown = quoted("stablefield", "sample", run.path, "--ema", f"{(self.length or (0.1,))[0]:g}")
        console.print(f"to sample with an average of the last step, made on the fly: {shown}")
        return 0
