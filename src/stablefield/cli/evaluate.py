"""`stablefield evaluate RUN_OR_IMAGES --data DATA`: measure samples; each number with its protocol."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from rich.markup import escape

from stablefield._distributed import Ranks
from stablefield._shapes import found_device
from stablefield.cli.console import console, relative, shown_warnings
from stablefield.cli.drawing import DrawingFlags
from stablefield.cli.extractors import ExtractorFlags
from stablefield.cli.parser import parse_resolution, words_of
from stablefield.cli.places import check_file, check_folder, check_free, unused
from stablefield.cli.progress import StageBar
from stablefield.cli.sources import open_data
from stablefield.cli.usage import as_flags
from stablefield.data._colour import Colour, background_name
from stablefield.data._image_set import ImageSet
from stablefield.data._latent_folder import is_encoded
from stablefield.data._resizing import Resize
from stablefield.evaluation._evaluate import DEFAULT_METRICS, METRICS, check_counts, evaluate
from stablefield.evaluation._reference import ProtocolWarning
from stablefield.evaluation._result import Evaluation
from stablefield.evaluation._time_estimate import TimeEstimate
from stablefield.report._cells import duration
from stablefield.report._extra import require
from stablefield.training._run import Run
from stablefield.training._run_data import MEASURE_OTHERS, data_of, require_same
from stablefield.training._run_folder import is_run
from stablefield.training._run_source import RunSource

if TYPE_CHECKING:
    MetricName = str
else:
    MetricName = tyro.extras.literal_type_from_choices(METRICS)

__all__ = ["Evaluate"]

# How images are opened if nothing else is said.
_OPENING = {"colour": "auto", "background": "white", "resize": "crop", "resolution": None}
_FLAGS = {"count": "--samples", "seed": "--first-seed", "batch": "--feature-batch"}


@dataclass(frozen=True)
class Evaluate:
    """Measure the samples of a run, or images from anywhere, against real images.

    Started by torchrun or `accelerate launch`, the processes share the images; the numbers are the same.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_IMAGES")]
    """A run's folder, or images: anything that DATA may be, such as a folder, a .zip or an .npz file."""
    metrics: tuple[MetricName, ...] = DEFAULT_METRICS
    """Which numbers. With inception, frechet is FID and kernel is KID; nearest is memorisation, in pixels."""
    samples: int | None = None
    """Samples per repeat: by default 5,000 of a run, or all given images. Published FIDs take 50,000."""
    repeats: int = 1
    """How many times to measure, each time on fresh samples; 3 gives minimum, mean and spread, as papers report."""
    per_class: bool = False
    """Also measure the samples of each class against the real images of that class."""
    first_seed: int = 0
    """Seed of the first sample; the others count up from it."""
    images_split: Literal["train", "test"] | None = None
    """Which split of RUN_OR_IMAGES, if images have several; by default train."""
    against: Path | None = None
    """An earlier result file to compare with."""
    out: Path | None = None
    """The result file, JSON; by default RUN/evaluations/NAME.json, or evaluation.json here."""
    report: Path | None = None
    """An HTML page with the numbers, some images and every protocol, such as report.html."""
    overwrite: bool = False
    """Replace --out and --report if they exist."""
    feature_batch: int = 64
    """Images at a time in the extractor."""
    device: str = ""
    """Where to compute; by default a GPU if there is one."""
    data: str = ""
    """Real images to measure against, as for train; by default the run's training data, decoded if they are latents."""
    split: Literal["train", "test"] = "train"
    """Which split of the real images, if there are several."""
    references: int | None = None
    """Number of real images, drawn at random; all by default."""
    held_out: str = ""
    """Real images outside the training data, the control for nearest; by default the test split of --data, if any, or what
    the run held out of its data."""
    resolution: str = ""
    """Resize real images to this many pixels a side, or to height x width; by default as in the run's training."""
    resize: Resize | None = None
    """To change the shape: crop to the largest centred part of the new shape first, or squash the whole image; by default as
    in the run's training, or crop."""
    colour: Colour | None = None
    """Make all images greyscale or RGB, the given ones as the real ones; by default as in the run's training, or auto."""
    background: str = ""
    """Colour behind transparent pixels of both: white, black or #rrggbb; by default as in the run's training, or white."""
    cache: Path | None = None
    """Folder for the features of real images; the user's cache folder by default."""
    no_cache: bool = False
    """Neither read nor write features in the cache."""
    classifier: Path | None = None
    """TorchScript file of a classifier that returns logits, for classifier-score; images as for --extractor torchscript."""
    extractor: Annotated[ExtractorFlags, tyro.conf.arg(name="")] = field(default_factory=ExtractorFlags)
    """The network that measures the images."""
    drawing: Annotated[DrawingFlags, tyro.conf.arg(name="")] = field(default_factory=DrawingFlags)
    """How to draw a run's samples."""

    def run(self) -> int:
        """Measure, print a table and write the results."""
        self._check()
        earlier = None if self.against is None else replace(Evaluation.load(self.against), name=relative(self.against))
        with Ranks.launched() as ranks:
            try:
                found = self._evaluate()
            except ValueError as error:
                raise ValueError(as_flags(str(error), _FLAGS)) from error
            if ranks.first:
                self._finish(found if earlier is None else found.compare(earlier))
        return 0

    def _check(self) -> None:
        """Check, before any computation, that the flags fit together and the results can be written."""
        self.drawing.check()
        if not is_run(self.source):
            self._opening({})
            self._check_nothing_drawn()
        elif self.images_split is not None:
            raise ValueError(
                f"--images-split {self.images_split}: {self.source} is a run, whose samples have no splits; leave it out, "
                "or pass --split for the real images."
            )
        parse_resolution(self.resolution)
        self._conversions()
        if self.held_out and not any(METRICS[name].reads == "pixels" for name in self.metrics):
            raise ValueError(
                f"--held-out {self.held_out} is the control for --metrics nearest: add nearest, or leave --held-out out."
            )
        if self.cache is not None and self.no_cache:
            raise ValueError(f"--cache {self.cache} and --no-cache: pass one of them.")
        self.extractor.check(self.classifier)
        if self.report is not None:
            require("jinja2", "--report")
        for flag, place in (("--report", self.report), ("--out", self.out)):
            if place is not None:
                if not place.is_dir():
                    check_free(flag, place, overwrite=self.overwrite)
                check_file(flag, place)
        if self.out is None:
            check_folder("--out", self._place().parent)
        check_counts([METRICS[name] for name in self.metrics], self.samples, self.references)

    def _check_nothing_drawn(self) -> None:
        """Reject flags of drawing beside images, for which they would do nothing."""
        words = words_of(self.drawing, DrawingFlags())
        if words:
            flag = {"--class-label": "--class"}.get(words[0], words[0])
            raise ValueError(
                f"{flag} says how to draw the samples of a run, and {self.source} is not a run: leave it out."
            )

    def _evaluate(self) -> Evaluation:
        device = found_device(self.device or None)
        with StageBar() as bar, shown_warnings({ProtocolWarning: " To recompute it: --no-cache, or delete the file."}):
            samples, name, opening = (
                self._samples_of_run(device) if is_run(self.source) else (self._images(), self.data, {})
            )
            trained, opening = dict(opening), self._opening(opening)

            def real(split: str, name: str = name) -> ImageSet:
                found = open_data(name, split=split, **opening)
                own = not self.data and _OPENING | opening == _OPENING | trained
                if isinstance(samples, RunSource) and split == "train" and own:
                    require_same(samples.config, found, MEASURE_OTHERS)
                return found

            uses_extractor = any(METRICS[name].reads == "extractor" for name in self.metrics)
            found = evaluate(
                samples,
                data=real,
                metrics=self.metrics,
                extractor=self.extractor.open(samples.shape, device, floating=_floating(samples))
                if uses_extractor
                else None,
                classifier=None if self.classifier is None else self.extractor.network(self.classifier, device),
                count=None if is_run(self.source) else self.samples,
                references=self.references,
                split=self.split,
                held_out=open_data(self.held_out, **opening) if self.held_out else None,
                repeats=self.repeats,
                seed=self.first_seed,
                per_class=self.per_class,
                device=device,
                batch=self.feature_batch,
                cache=False if self.no_cache else self.cache or True,
                progress=bar.update,
                on_estimate=_print_estimate,
            )
        return replace(found, name=self.source)

    def _samples_of_run(self, device: torch.device) -> tuple[RunSource, str, Mapping[str, Any]]:
        """The run's samples, the name of its training data, and the arguments that opened them."""
        sampler = Run(self.source).sampler(self.drawing, device=device)
        samples = RunSource(sampler, self.source, self.samples or 5000, self.first_seed)
        opening = sampler.config.opening
        if self.data and sampler.autoencoder is not None and not is_encoded(Path(self.data)):
            # The images of the latents had this size.
            height, width = sampler.shape[1:]
            opening = {"resolution": height if height == width else (height, width)}
        return samples, self.data or data_of(sampler.config), opening

    def _images(self) -> ImageSet:
        if not (Path(self.source).exists() or self.source == "digits" or self.source.startswith("hf:")):
            raise ValueError(f"RUN_OR_IMAGES is {self.source}, which is not a file or folder: name a run or images.")
        if not self.data:
            raise ValueError("--data is missing: name the real images to measure against, such as --data digits.")
        return open_data(self.source, split=self.images_split or "train", **self._conversions())

    def _opening(self, trained: Mapping[str, Any]) -> dict[str, Any]:
        """How to open real images: as in a run's training, unless the flags say otherwise."""
        opening, resolution = dict(trained), parse_resolution(self.resolution)
        if resolution is not None:
            opening["resolution"] = resolution
        if self.resize is not None:
            if opening.get("resolution") is None:
                raise ValueError(
                    f"--resize {self.resize}: nothing resizes the real images; add --resolution, or leave --resize out."
                )
            opening["resize"] = self.resize
        return opening | self._conversions()

    def _conversions(self) -> dict[str, str]:
        """The conversions of images that the flags ask for."""
        found = {} if self.colour is None else {"colour": self.colour}
        return found | ({"background": background_name(self.background)} if self.background else {})

    def _finish(self, found: Evaluation) -> None:
        console.print(found.table(), markup=False)
        if found.classes:
            console.print(f"\n{found.class_table()}\n", markup=False)
        for line in found.protocol_lines():
            console.print(line, style="dim", markup=False)
        for note in found.notes():
            console.print(f"[yellow]note:[/] {escape(note)}")
        if found.earlier is not None:
            console.print(found.comparison_table(), markup=False)
        console.print(f"written: {relative(found.save(self._place()))}")
        if self.report is not None:
            console.print(f"report:  {relative(found.save(self.report))}")

    def _place(self) -> Path:
        """The results' file: --out, or an unused name."""
        if self.out is not None:
            return self.out
        if not is_run(self.source):
            return unused(Path("evaluation.json"))
        config, drawing = Run(self.source).config, self.drawing
        decoded = bool(drawing.vae) or (drawing.decode and config.autoencoder is not None)
        floating = config.dtype != "uint8" and not decoded
        extractor = self.extractor.named(floating=floating)
        return unused(Path(self.source, "evaluations", f"{extractor}-{self.drawing.sampler}.json"))


def _floating(samples: RunSource | ImageSet) -> bool:
    return samples.floating if isinstance(samples, RunSource) else samples.scaling is not None


def _print_estimate(estimate: TimeEstimate) -> None:
    """Print the estimated time."""
    named = {"drawing": estimate.sampling, "features": estimate.features, "metrics": estimate.metrics}
    parts = [f"{duration(seconds)} of {what}" for what, seconds in named.items() if seconds >= 1]
    known = f": {', '.join(parts)}" if len(parts) > 1 else ""
    console.print(f"takes about {duration(estimate.total)} from here{known}")
