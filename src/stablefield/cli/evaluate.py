"""`stablefield evaluate RUN_OR_IMAGES --data DATA`: numbers of samples, each with its protocol."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from stablefield.cli.console import console, relative
from stablefield.cli.drawing import DrawingFlags
from stablefield.cli.extractors import ExtractorFlags
from stablefield.cli.results import print_against, print_results
from stablefield.data.resizing import Resize
from stablefield.evaluation.processes import Processes
from stablefield.evaluation.result import Result
from stablefield.evaluation.result_file import read_results, write_results
from stablefield.report.evaluation import Earlier, evaluation_page
from stablefield.report.extra import require
from stablefield.report.render import write_page

if TYPE_CHECKING:
    from stablefield.cli.measuring import Measured

__all__ = ["DataFlags", "Evaluate", "MetricName"]

MetricName = Literal[
    "frechet", "kernel", "precision", "recall", "density", "coverage", "nearest", "classifier-score"
]  # fmt: skip

_DEFAULT: tuple[MetricName, ...] = ("frechet", "kernel", "precision", "recall", "density", "coverage", "nearest")


@dataclass(frozen=True)
class DataFlags:
    """What is measured against."""

    data: str = ""
    """Real images to measure against: as for train. By default those that the run was trained on."""
    split: Literal["train", "test"] = "train"
    """Which part of them, where there are several."""
    references: int | None = None
    """How many of them, drawn at random; all by default."""
    held_out: str = ""
    """Real images that were not trained on, to compare nearest with; by default the test part of --data, if any."""
    resolution: int | None = None
    """Bring real images to this many pixels a side, as in training."""
    resize: Resize = "crop"
    """Cut them to the largest centred square first, or take the whole image."""
    cache: Path | None = None
    """Where features of real images are kept; the user's cache folder by default."""
    no_cache: bool = False
    """Neither use nor keep them."""


@dataclass(frozen=True)
class Evaluate:
    """Measure the samples of a run, or images from anywhere, against real images.

    Started by torchrun or `accelerate launch`, the processes share the images; the numbers are the same.
    """

    subject: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_IMAGES")]
    """A run's folder, or images: whatever DATA may be, such as a folder, a .zip or an .npz file."""
    metrics: tuple[MetricName, ...] = _DEFAULT
    """Which numbers. frechet is FID, kernel KID with inception; nearest is memorisation, in pixels."""
    samples: int | None = None
    """How many samples for each number: 5,000 of a run by default, all of given images. Published FIDs take 50,000."""
    repeats: int = 1
    """Measure so often, each time on other samples; 3 gives minimum, mean and spread as the literature does."""
    first_seed: int = 0
    """Seed of the first sample; the others follow it."""
    images_split: Literal["train", "test"] = "train"
    """Which part of RUN_OR_IMAGES, where images have several."""
    against: Path | None = None
    """An earlier result file to compare with."""
    out: Path | None = None
    """The result file, JSON; RUN/evaluations/NAME.json, or evaluation.json here."""
    report: Path | None = None
    """An HTML page with the numbers, some images and every protocol, such as report.html."""
    feature_batch: int = 64
    """Images at a time in the extractor."""
    device: str = ""
    """Where to compute; a GPU if there is one."""
    real: Annotated[DataFlags, tyro.conf.arg(name="")] = field(default_factory=DataFlags)
    """What is measured against."""
    extractor: Annotated[ExtractorFlags, tyro.conf.arg(name="")] = field(default_factory=ExtractorFlags)
    """What looks at the images."""
    drawing: Annotated[DrawingFlags, tyro.conf.arg(name="")] = field(default_factory=DrawingFlags)
    """How a run's samples are drawn."""

    def run(self) -> int:
        """Measure, print a table and write the results."""
        self._check()
        earlier = None if self.against is None else read_results(self.against)
        with Processes() as processes:
            console.quiet = not processes.first
            try:
                # Imported here: it needs torchmetrics, which the other verbs do not.
                from stablefield.cli.measuring import measure

                measured = measure(self, processes)
                if processes.first:
                    self._tell(measured, earlier)
            finally:
                console.quiet = False
        return 0

    def _check(self) -> None:
        self.drawing.check()
        self.extractor.check()
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"--metrics {' '.join(self.metrics)}: name at least one, and each once.")
        if ("classifier-score" in self.metrics) != (self.extractor.classifier is not None):
            raise ValueError(
                "--metrics classifier-score and --classifier FILE go together: the score is of the probabilities of a "
                "classifier, which neither FID's Inception as packaged nor the other extractors have."
            )
        for name, value in (
            ("samples", self.samples),
            ("repeats", self.repeats),
            ("feature_batch", self.feature_batch),
        ):
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be at least 1.")
        if self.report is not None:
            require("jinja2", "--report")
        if self.first_seed < 0:
            raise ValueError(f"--first-seed is {self.first_seed}: it must not be negative.")

    @property
    def is_run(self) -> bool:
        """Whether the subject is a run, not images."""
        return (Path(self.subject) / "config.json").is_file()

    def _tell(self, measured: "Measured", earlier: tuple[str, list[Result]] | None) -> None:
        results = measured.results
        print_results(results)
        if earlier is not None:
            print_against(results, earlier[1], relative(Path(self.against or "")))
        out = self.out
        if out is None:
            sampler = self.drawing.sampler
            folder = Path(self.subject) / "evaluations"
            out = folder / f"{self.extractor.extractor}-{sampler}.json" if self.is_run else Path("evaluation.json")
        try:
            write_results(out, self.subject, results)
        except OSError as error:
            raise ValueError(f"--out {out} cannot be written ({error.strerror}): name another place.") from error
        console.print(f"written: {relative(out)}")
        if self.report is not None:
            from_file = None if earlier is None else Earlier(name=str(self.against), results=tuple(earlier[1]))
            footer = f"Made by stablefield evaluate {self.subject}."
            page = evaluation_page(self.subject, results, images=measured.images, earlier=from_file, footer=footer)
            try:
                write_page(page, self.report)
            except OSError as error:
                raise ValueError(f"--report {self.report} cannot be written ({error.strerror}).") from error
            console.print(f"report:  {relative(self.report)}")
