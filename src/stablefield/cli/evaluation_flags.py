"""What `stablefield evaluate` can be told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from stablefield.cli.drawing import DrawingFlags
from stablefield.cli.extractors import ExtractorFlags
from stablefield.cli.places import check_folder, check_free, check_place, unused
from stablefield.data.resizing import Resize
from stablefield.report.extra import require

__all__ = ["DataFlags", "EvaluationFlags", "MetricName"]

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
    """Bring real images to this many pixels a side; as in the run's training by default."""
    resize: Resize = "crop"
    """Cut them to the largest centred square first, or take the whole image."""
    cache: Path | None = None
    """Where features of real images are kept; the user's cache folder by default."""
    no_cache: bool = False
    """Neither use nor keep them."""


@dataclass(frozen=True)
class EvaluationFlags:
    """What is measured, and how."""

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
    overwrite: bool = False
    """Replace --out and --report if they exist."""
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

    def check(self) -> None:
        """Find out before anything is computed whether the flags fit together, and the results can be written.

        Raises:
            ValueError: naming the flag.
            ImportError: if the report's package is missing.
        """
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
        for flag, place in (("--report", self.report), ("--out", self.out)):
            if place is None:
                continue
            if not place.is_dir():
                check_free(flag, place, overwrite=self.overwrite)
            check_place(flag, place)
        if self.out is None:
            check_folder("--out", self.place().parent)
        if self.first_seed < 0:
            raise ValueError(f"--first-seed is {self.first_seed}: it must not be negative.")

    @property
    def is_run(self) -> bool:
        """Whether the subject is a run, not images."""
        return (Path(self.subject) / "config.json").is_file()

    def place(self) -> Path:
        """Where the results go: --out, or a name that is not taken."""
        if self.out is not None:
            return self.out
        folder = Path(self.subject) / "evaluations" if self.is_run else Path()
        name = f"{self.extractor.extractor}-{self.drawing.sampler}" if self.is_run else "evaluation"
        return unused(folder / f"{name}.json")
