"""`stablefield bench`: the cost of the target on this machine, beside the least possible."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from stablefield._bench import benchmark
from stablefield._shapes import found_device
from stablefield.cli.console import console, print_table, relative
from stablefield.cli.places import check_folder
from stablefield.cli.progress import StageBar
from stablefield.cli.sources import open_data
from stablefield.report import write_chart
from stablefield.report._extra import require

__all__ = ["Bench"]


@dataclass(frozen=True)
class Bench:
    """Measure time and memory of the target, its share of a training step, and how the cost grows."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA", help_behavior_hint="")] = ""
    """Images to take references from, as for train; random pixels by default."""
    device: str = ""
    """Where to compute, such as cpu or cuda; by default a GPU if there is one."""
    batch: tuple[int, ...] = (64, 512)
    """Batch sizes in the table."""
    references: tuple[int, ...] = (1024, 4096, 50_000)
    """Numbers of references in the table; at most the images of DATA."""
    pairs: int = 3
    """How many times to time the target and its baseline in turn."""
    step: bool = True
    """Also time a training step, batch 64: of a U-Net of 4.7 M parameters, or of a perceptron if a side is not a multiple of
    4."""
    growth: bool = True
    """Also measure how the cost grows with the references, the batch and the size of a sample."""
    transformer: bool = False
    """Also time a training step of SiT-B/2, 130 M parameters, on random latents with labels, batch 16."""
    out: Path | None = None
    """Folder for bench.json and the plot bench.png, which replace earlier ones; without it, only print."""

    def run(self) -> int:
        """Measure, print a table, and write the files to --out."""
        if self.pairs < 1:
            raise ValueError(f"--pairs is {self.pairs}: time at least 1 pair.")
        for flag, sizes in (("--batch", self.batch), ("--references", self.references)):
            if not sizes or min(sizes) < 1:
                raise ValueError(f"{flag} is {' '.join(map(str, sizes)) or 'empty'}: pass numbers of at least 1.")
        if self.out is not None:
            require("matplotlib", "--out, which draws a plot,")
            check_folder("--out", self.out)
        device = found_device(self.device or None)
        images = open_data(self.data) if self.data else None
        with StageBar() as bar:
            found = benchmark(
                images,
                batch=self.batch,
                references=self.references,
                pairs=self.pairs,
                step=self.step,
                growth=self.growth,
                transformer=self.transformer,
                device=device,
                progress=bar.update,
            )
        print_table(*found.cost_table(), title="one call, all rows above the noise band")
        if found.growth:
            print_table(*found.growth_table(), title="how it grows")
        for text in filter(None, (found.step_text, found.transformer_text)):
            console.print(text)
        if self.out is not None:
            numbers = found.save(self.out / "bench.json")
            picture = write_chart(list(found.charts().values()), self.out / "bench.png")
            console.print(f"written: {relative(numbers)}, {relative(picture)}", markup=False)
        return 0
