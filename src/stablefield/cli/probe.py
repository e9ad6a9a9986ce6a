"""`stablefield probe DATA|RUN`: see the variance of targets on data, or a run's network against the optimum."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from stablefield.cli.places import check_folder
from stablefield.cli.probing import Probing, read_levels
from stablefield.cli.probing_bias import probe_bias
from stablefield.cli.probing_data import Plan, probe_data, recipe_for, training_for
from stablefield.cli.probing_run import probe_run
from stablefield.cli.recipes import limit
from stablefield.cli.settling import pick_device
from stablefield.cli.sources import open_data, print_reading
from stablefield.cli.words import flags_of
from stablefield.probing.population import MOST
from stablefield.report.extra import require

__all__ = ["Probe"]


@dataclass(frozen=True)
class Probe:
    """See the variance of training targets on your data; or how far a run's network is from the optimum."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA|RUN")]
    """The data (digits, a folder or .zip of images, .npy, .npz, idx or CIFAR-10 files), or the folder of a run."""
    references: str = "16,64,256,1024,4096,all"
    """Sizes of reference sets to measure; the whole set leaves no variance and is not sampled."""
    noise_levels: str = ""
    """Where to measure, such as 0.5,1,2,5; chosen from the data if not given."""
    plan: Plan = "auto"
    """The training to advise on: its noise levels and loss weights; auto is what train does with these data."""
    batch: int | None = None
    """Rows per training step: for the variance of the whole batch, and the cost; as train has them if not given."""
    aim: float = 0.1
    """Share of each row's variance that may stay."""
    by_class: bool = False
    """Keep posteriors within classes, as for a network that is told the class."""
    images: int = MOST
    """Take at most so many images for the data set, drawn at random."""
    sources: int | None = None
    """Images that noisy rows are made from; all of a small set, else as many as two minutes allow."""
    seed: int = 0
    """Decides all that is drawn."""
    check_bias: bool = False
    """Test instead that reference policies are unbiased on the data, and that planted faults are seen."""
    false_alarm: float = 0.001
    """Rate at which the bias check may fail an unbiased policy."""
    resolution: int | None = None
    """Bring every image to this many pixels a side; where sizes differ, chosen as train would."""
    resize: Literal["crop", "squash"] = "crop"
    """Cut to the largest centred square first, or take the whole image."""
    skip_broken: bool = False
    """Leave out files that cannot be read, and count them."""
    out: Path | None = None
    """Folder for numbers, pictures and the report; probes/NAME if not given.
    Files of an earlier probe there are replaced."""
    device: str = ""
    """Where to compute; a GPU if there is one."""

    def run(self) -> int:
        """Measure, write and say what follows."""
        probing = Probing(
            most=self.images,
            sources=self.sources,
            seed=self.seed,
            out=self.out,
            device=pick_device(self.device),
            command=self._command,
        )
        is_run = (Path(self.data) / "config.json").is_file()
        check_folder("--out", self.out or (Path(self.data, "probe") if is_run else Path("probes", "new")))
        if is_run:
            probe_run(Path(self.data), probing, noise_levels=self.noise_levels)
            return 0
        require("matplotlib", "drawing the variance")
        require("jinja2", "writing the report")
        sizes = _sizes(self.references)
        levels = read_levels(self.noise_levels)
        bound = None if self.resolution else limit("auto", accelerated=probing.device.type == "cuda")
        images = open_data(self.data, self.resolution, self.resize, "train", self.skip_broken, bound)
        print_reading(images)
        if self.check_bias:
            recipe = recipe_for(images, probing, by_class=self.by_class)
            process = training_for(self.plan, self.batch, recipe).process
            passed = probe_bias(images, probing, process=process, by_class=self.by_class, false_alarm=self.false_alarm)
            return 0 if passed else 1
        probe_data(
            images,
            probing,
            sizes=sizes,
            levels=levels,
            plan=self.plan,
            batch=self.batch,
            aim=self.aim,
            by_class=self.by_class,
        )
        return 0

    @property
    def _command(self) -> str:
        return shlex.join(
            ["stablefield", "probe", self.data, *flags_of(self, Probe(""), besides=("data", "out", "device"))]
        )


def _sizes(text: str) -> tuple[int, ...]:
    sizes: list[int] = []
    for word in text.split(","):
        if word.strip().lower() in ("", "all"):
            continue
        try:
            sizes.append(int(word))
        except ValueError:
            raise ValueError(f"--references is {text}: {word} is no number; pass sizes such as 16,256,all.") from None
    if any(size < 1 for size in sizes):
        raise ValueError(f"--references is {text}: a set has at least 1 reference.")
    return tuple(sizes)
