"""`stablefield ema RUN`: averages of any length, from a run's snapshots."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.markup import escape

from stablefield.atomic_file import write_atomically
from stablefield.cli.console import console, quoted, relative
from stablefield.cli.places import check_folder
from stablefield.training.ema import LENGTHS, power_exponent
from stablefield.training.files import write_tensors
from stablefield.training.post_hoc import combine, snapshot_steps
from stablefield.training.run_folder import RunFolder

__all__ = ["Ema"]


@dataclass(frozen=True)
class Ema:
    """Make averages of the weights of any length after training, or say which snapshots there are."""

    run_folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    length: tuple[float, ...] = ()
    """Standard deviations of the averages as shares of the run, such as 0.05 0.1 0.15."""
    step: int | None = None
    """At which step; that of the last snapshot if not given."""

    def run(self) -> int:
        """Write one file of weights per length."""
        if self.step is not None and self.step < 1:
            raise ValueError(f"--step is {self.step}: steps of a run are counted from 1.")
        for length in self.length:
            power_exponent(length)
        folder = RunFolder.open(self.run_folder)
        steps = snapshot_steps(folder.snapshots)
        if not steps:
            raise ValueError(
                f"{self.run_folder} has no snapshots: they are taken with --ema-snapshot-every in training."
            )
        shown = ", ".join(f"{step:,}" for step in steps[:8]) + (f" ... {steps[-1]:,}" if len(steps) > 8 else "")
        console.print(f"snapshots of lengths {' and '.join(map(str, LENGTHS))} at steps {shown}")
        if self.length:
            check_folder("RUN", folder.snapshots)
        for length in self.length:
            self._write(folder, length)
        shown = quoted("stablefield", "sample", folder.path, "--ema", f"{(self.length or (0.1,))[0]:g}")
        console.print(f"to sample with an average of the last step, made on the fly: {shown}")
        return 0

    def _write(self, folder: RunFolder, length: float) -> None:
        parameters, error = combine(folder.snapshots, length, self.step)
        name = f"length-{length:g}" + ("" if self.step is None else f"-step-{self.step:08d}")
        path = folder.snapshots / f"{name}.safetensors"
        metadata = {"length": f"{length:g}"}
        write_atomically(path, lambda temporary: write_tensors(temporary, parameters, metadata))
        console.print(f"length {length:g}: {escape(relative(path))} (profile within {error:.1%} of the exact one)")
