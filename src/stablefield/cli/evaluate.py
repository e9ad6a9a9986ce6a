"""`stablefield evaluate RUN_OR_IMAGES --data DATA`: numbers of samples, each with its protocol."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from stablefield.cli.console import console, relative
from stablefield.cli.evaluation_flags import EvaluationFlags
from stablefield.cli.results import print_against, print_results
from stablefield.evaluation.page import Earlier, evaluation_page
from stablefield.evaluation.processes import Processes
from stablefield.evaluation.result import Result
from stablefield.evaluation.result_file import read_results, write_results
from stablefield.report.render import write_page

if TYPE_CHECKING:
    from stablefield.cli.measuring import Measured

__all__ = ["Evaluate"]


@dataclass(frozen=True)
class Evaluate:
    """Measure the samples of a run, or images from anywhere, against real images.

    Started by torchrun or `accelerate launch`, the processes share the images; the numbers are the same.
    """

    flags: Annotated[EvaluationFlags, tyro.conf.arg(name="")]
    """What is measured, and how."""

    def run(self) -> int:
        """Measure, print a table and write the results."""
        flags = self.flags
        flags.check()
        earlier = None if flags.against is None else read_results(flags.against)[1]
        with Processes() as processes:
            console.quiet = not processes.first
            try:
                # Imported here: it needs torchmetrics, which the other verbs do not.
                from stablefield.cli.measuring import measure

                measured = measure(flags, processes)
                if processes.first:
                    self._tell(measured, earlier)
            finally:
                console.quiet = False
        return 0

    def _tell(self, measured: "Measured", earlier: list[Result] | None) -> None:
        flags, results = self.flags, measured.results
        print_results(results)
        if earlier is not None and flags.against is not None:
            print_against(results, earlier, relative(flags.against))
        out = write_results(flags.place(), flags.subject, results)
        console.print(f"written: {relative(out)}")
        if flags.report is None:
            return
        beside = None if earlier is None else Earlier(name=str(flags.against), results=tuple(earlier))
        footer = f"Made by stablefield evaluate {flags.subject}."
        page = evaluation_page(
            flags.subject,
            results,
            images=measured.images,
            labels=measured.labels,
            class_names=measured.class_names,
            earlier=beside,
            footer=footer,
        )
        console.print(f"report:  {relative(write_page(page, flags.report))}")
