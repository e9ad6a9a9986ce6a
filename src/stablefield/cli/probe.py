"""`stablefield probe DATA|RUN`: measure the variance of targets on data, or a run's network and its gradient."""

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from stablefield._shapes import found_device
from stablefield.cli.console import console, relative
from stablefield.cli.parser import words_of
from stablefield.cli.places import check_folder
from stablefield.cli.progress import StageBar
from stablefield.cli.sources import DataFlags, print_reading
from stablefield.probing._bias_probe import BiasProbe, probe_bias
from stablefield.probing._network_probe import NetworkProbe
from stablefield.probing._population import MOST
from stablefield.probing._probe import Probe as Probed
from stablefield.probing._training import TRAININGS
from stablefield.report._extra import require
from stablefield.training._recipes import largest_resolution
from stablefield.training._run_folder import is_run
from stablefield.training._run_probe import probe, usual_training

__all__ = ["Probe"]

# Flags that say how the data are read.
_READING = {field.name for field in dataclasses.fields(DataFlags)}
_TRAININGS = {training.name.lower(): training for training in TRAININGS}


@dataclass(frozen=True)
class Probe(DataFlags):
    """Measure the variance of targets on your data; or a run: its distance from the optimum, its gradient's variance."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA|RUN")]
    """Images, as for train, or the folder of a run."""
    references: str = "16,64,256,1024,4096,all"
    """Sizes of reference sets to measure; the whole set leaves no variance and is not sampled."""
    noise_levels: str = ""
    """Noise levels to show, or to measure a run at, such as 0.5,1,2,5; by default chosen from the data, as always for the
    advice, and for a run also from its training."""
    plan: Literal["auto", "edm", "ve", "vp", "flow"] = "auto"
    """The training to advise on, with its noise levels and loss weights; auto is what train does with these data."""
    batch: int | None = None
    """Rows per training step, for the variance of the whole batch and the cost; by default as in train."""
    aim: float = 0.1
    """Share of each row's variance that may remain."""
    by_class: bool = False
    """Keep posteriors within classes, as for a conditional network."""
    max_images: int = MOST
    """Most images to represent the data set, drawn at random."""
    sources: int | None = None
    """Images to make noisy rows from; by default all of a small set, else as many as two minutes allow."""
    seed: int = 0
    """Seed of all random draws."""
    check_bias: bool = False
    """Instead, test that reference policies are unbiased on the data, and that the test finds planted faults."""
    false_alarm: float = 0.001
    """Probability that the bias check fails an unbiased policy."""
    out: Path | None = None
    """Folder for numbers, pictures and the report, which replace earlier ones; probes/NAME by default."""
    device: str = ""
    """Where to compute; by default a GPU if there is one."""

    def run(self) -> int:
        """Measure, print the result, and write the files."""
        of_run = is_run(self.data)
        self._check_use(of_run)
        check_folder("--out", self.out or (Path(self.data, "probe") if of_run else Path("probes", "new")))
        for package in ("matplotlib", "jinja2"):
            require(package, "the report of a probe")
        result = dataclasses.replace(self._measured(of_run), command=self._command)
        console.print(str(result), markup=False)
        out = self.out or (Path(self.data, "probe") if of_run else Path("probes") / result.name)
        if isinstance(result, BiasProbe):
            console.print(f"written: {relative(result.save(out / 'bias.json'))}", markup=False)
            return 0 if result.passed else 1
        names = [path.name for path in result.save_all(out, "probe")]
        console.print(f"written to {relative(out)}: {', '.join(names)}", markup=False)
        return 0

    def _check_use(self, of_run: bool) -> None:
        """Refuse flags that would have no effect."""
        if of_run and self.check_bias:
            raise ValueError(f"--check-bias tests reference policies on data, and {self.data} is a run: name its data.")
        used = {"data", "out", "device", "seed", "max_images"}
        if self.check_bias:
            where, used = "with --check-bias", used | {"check_bias", "false_alarm", "plan", "by_class"} | _READING
        elif of_run:
            where, used = "on a run, which has its own data and training", used | {"noise_levels", "sources"}
        else:
            where, used = "without --check-bias", {field.name for field in dataclasses.fields(self)} - {"false_alarm"}
        unused = [word for word in words_of(self, Probe(""), besides=used) if word.startswith("--")]
        if unused:
            raise ValueError(f"{', '.join(unused)}: no effect {where}; leave this out.")

    def _measured(self, of_run: bool) -> Probed | NetworkProbe | BiasProbe:
        device = found_device(self.device or None)
        sizes = _numbers("--references", self.references, "16,256,all")
        if odd := [size for size in sizes if size != int(size)]:
            raise ValueError(f"--references holds {odd[0]:g}: pass whole numbers.")
        references = [int(size) for size in sizes]
        levels = _numbers("--noise-levels", self.noise_levels, "0.5,1,2") or None
        images, training = self.data, _TRAININGS.get(self.plan)
        if not of_run:
            images = self.open(limit=largest_resolution(accelerated=device.type == "cuda"))
            print_reading(images)
            if training is not None:
                training = dataclasses.replace(training, batch=usual_training(images, device).batch)
        with StageBar() as bar:
            if self.check_bias and not isinstance(images, str):
                return probe_bias(
                    images,
                    by_class=self.by_class,
                    process=None if training is None else training.process,
                    false_alarm=self.false_alarm,
                    max_images=self.max_images,
                    seed=self.seed,
                    device=device,
                    progress=bar.update,
                )
            return probe(
                images,
                by_class=self.by_class,
                training=training,
                batch=self.batch,
                references=references,
                noise_levels=levels,
                aim=self.aim,
                max_images=self.max_images,
                sources=self.sources,
                seed=self.seed,
                device=device,
                progress=bar.update,
            )

    @property
    def _command(self) -> str:
        flags = words_of(self, Probe(""), besides=("data", "out", "device"))
        return shlex.join(["stablefield", "probe", self.data, *flags])


def _numbers(flag: str, text: str, example: str) -> list[float]:
    """The numbers in a list, without the word all."""
    words = [word for word in text.split(",") if word.strip().lower() not in ("", "all")]
    try:
        return [float(word) for word in words]
    except ValueError:
        raise ValueError(f"{flag} is {text}: pass numbers such as {example}.") from None
