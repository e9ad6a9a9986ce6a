"""Draw images from a run: a model with classes and guidance, and a solver of `stablefield.sampling`.

`SamplerOptions.open` loads a run's model and returns the `RunSampler` that draws the images of given seeds.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield._distributed import Ranks
from stablefield._progress import Progress
from stablefield._shapes import as_device, check_kind, flag, found_device, number, whole_number
from stablefield.data._autoencoder import Autoencoder
from stablefield.data._image_set import class_text
from stablefield.diffusion._process import Process
from stablefield.sampling._guidance import autoguidance, classifier_free
from stablefield.sampling._seeded_images import chunks_of, draw, in_turn
from stablefield.sampling._solver_loop import Denoise
from stablefield.sampling._solvers import SamplerName, SolverOptions, option_text
from stablefield.training._model import OpenModel, average_name, open_model
from stablefield.training._run_config import RunConfig
from stablefield.training._run_data import check_vae
from stablefield.training._run_folder import checkpoint_name
from stablefield.training._samples import Samples

__all__ = ["RunSampler", "SamplerOptions", "labels_named", "open_sampler"]

# Most classes that an error lists.
_LISTED = 20
_NEVER = "was trained without dropping labels, so its network never learned to draw without a class"


@dataclass(frozen=True, kw_only=True)
class SamplerOptions(SolverOptions):
    """How to draw images from a run."""

    class_label: str | int | Sequence[str | int] = ()
    """Class of all images of a conditional run, or several that the seeds take in turn, seed k the one at place k modulo
    their number: names, or numbers if no class has that name; -1 for none. By default the seeds take in turn all classes
    that the training data have images of, and in an evaluation the classes have the proportions of the training data."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance, or of guidance by a worse run (guide); 1 for none."""
    guidance_interval: tuple[float, float] | None = None
    """Noise levels to guide in, such as 0.19 1.61; all by default."""
    guide: Path | None = None
    """A worse run of the same data, smaller or less trained, to guide by (autoguidance)."""
    ema: str = "half-life"
    """Which average of the weights: half-life, none for the last step's weights, or a length such as 0.1."""
    guide_ema: str = "half-life"
    """Which average of the guide's weights."""
    checkpoint: str = "newest"
    """Which checkpoint: newest, best for the one with the lowest held-out loss, or a step that is kept."""
    batch: int = 256
    """Images at a time; changes the images only by the network's rounding."""
    decode: bool = True
    """Decode the samples of a run on latents of images. Undecoded ones are the latents, in the autoencoder's units; of an
    imported network whose file states no scaling, as it sees them."""
    vae: str = ""
    """The autoencoder's folder or name on a hub, if it has moved, or for an imported network, which does not know its
    place."""

    def __post_init__(self) -> None:
        # As the command gives them.
        plain = {
            "class_label": labels_named(self.class_label),
            "guide": None if self.guide is None else Path(getattr(self.guide, "path", self.guide)),
            "ema": average_name("ema", self.ema),
            "guide_ema": average_name("guide_ema", self.guide_ema),
            "checkpoint": checkpoint_name(self.checkpoint),
            "vae": str(self.vae),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    def check(self) -> None:
        """Check that the options fit together, before loading anything.

        Raises:
            ValueError: naming the option.
        """
        super().check()
        whole_number("batch", self.batch, 1)
        number("guidance_scale", self.guidance_scale)
        flag("decode", self.decode)
        if self.vae and not self.decode:
            raise ValueError(f"vae={self.vae} does nothing with decode=False: leave one of the two out.")
        for name in ("guide", "guidance_interval"):
            value = getattr(self, name)
            if value is not None and self.guidance_scale == 1:
                raise ValueError(
                    f"{name}={option_text(value)} does nothing at guidance_scale=1: pass a scale, such as guidance_scale=2."
                )
        if self.guidance_interval is not None and not 0 <= self.guidance_interval[0] < self.guidance_interval[1]:
            raise ValueError(
                f"guidance_interval={option_text(self.guidance_interval)} holds no noise level: pass the lower one first, "
                "such as guidance_interval=0.19 1.61."
            )
        if self.guide is None and self.guide_ema != "half-life":
            raise ValueError(
                f"guide_ema={self.guide_ema} does nothing without a guide: name its run, guide=RUN, or leave it out."
            )

    def _check_interval(self, process: Process | None) -> None:
        """Check that the guidance meets a noise level of the grid, or of an adaptive solver's range."""
        if self.guidance_interval is None:
            return
        (low, high), sigmas = self.guidance_interval, self.sigmas(process)
        first, last = float(sigmas[0]), float(sigmas[-2])
        met = low < first and high >= last if self.steps_taken is None else ((sigmas > low) & (sigmas <= high)).any()
        if not met:
            raise ValueError(
                f"guidance_interval={option_text(self.guidance_interval)} holds none of the grid's noise levels, {last:.3g} "
                f"to {first:.3g}, so nothing is guided: pass noise levels among them, such as guidance_interval=0.19 1.61."
            )

    def open(self, run: str | Path, device: torch.device | str = "cpu") -> "RunSampler":
        """Open a run's model, and the guide's.

        Args:
            run: the run's folder.
            device: where to compute.

        Raises:
            ValueError: if there is no such run or EMA, or the options do not fit the run.
        """
        self.check()
        device = torch.device(device)
        own = open_model(Path(run), self.ema, device, self.checkpoint)
        self.check_churn(own.config.recipe.process)
        self._check_interval(own.config.recipe.process)
        guide = None if self.guide is None else open_model(self.guide, self.guide_ema, device)
        classes = own.config.classes
        numbers = self.class_numbers(own.config)
        for opened, who in ((own, "the run"), (guide, f"guide={self.guide}")):
            if opened is not None and opened.config.label_dropout == 0 and -1 in (numbers or ()):
                raise ValueError(
                    f"class_label=-1: {who} {_NEVER}: train with a label dropout such as 0.1, or name classes."
                )
        if self.guidance_scale != 1 and guide is None and set(numbers or ()) <= {-1}:
            raise ValueError(
                f"guidance_scale={self.guidance_scale:g}: classifier-free guidance takes a run with classes, and images "
                "with one; guide by a worse run with guide=RUN."
            )
        if self.guidance_scale != 1 and guide is None and own.config.label_dropout == 0:
            raise ValueError(
                f"guidance_scale={self.guidance_scale:g}: the run {_NEVER}, which guidance needs: train with a label "
                "dropout such as 0.1, or guide by a worse run with guide=RUN."
            )
        if guide is not None and (guide.config.shape != own.config.shape or guide.config.classes != classes):
            raise ValueError(
                f"guide={self.guide} draws {'x'.join(map(str, guide.config.shape))} images of {guide.config.classes} "
                f"classes, the run {'x'.join(map(str, own.config.shape))} of {classes}: take a run of the same data."
            )
        if guide is not None and (guide.average, guide.step) == (own.average, own.step) and _same(self.guide, run):
            raise ValueError(
                f"guide={self.guide} is the run itself, at the same step and with the same average, ema={self.ema}, so it "
                "guides nothing: name a worse run, or another average of the guide's weights by guide_ema."
            )
        encoder, other = own.config.autoencoder, None if guide is None else guide.config.autoencoder
        if encoder is not None and other is not None and encoder.differs(other):
            raise ValueError(
                f"guide={self.guide} draws latents of the autoencoder {other.sha256:.12}, the run of "
                f"{encoder.sha256:.12}: take a run of the same data."
            )
        if guide is not None and guide.config.scaling != own.config.scaling:
            raise ValueError(
                f"guide={self.guide} scales its data differently from the run: take a run of the same data."
            )
        names = None if guide is None else guide.config.class_names
        if names is not None and own.config.class_names is not None and names != own.config.class_names:
            raise ValueError(
                f"guide={self.guide} numbers its classes differently, {_listed(classes, names)}, from the run, "
                f"{_listed(classes, own.config.class_names)}: take a run of the same data and version."
            )
        return RunSampler(
            options=self,
            classes=numbers,
            path=Path(run),
            model=own,
            guide=guide,
            device=device,
            autoencoder=self.autoencoder(own.config, device),
        )

    def autoencoder(self, config: RunConfig, device: torch.device) -> Autoencoder | None:
        """The autoencoder that decodes the samples; None if they are not decoded.

        Raises:
            ValueError: if it cannot be opened, or the samples are no latents that it decodes.
        """
        record = config.autoencoder
        if record is not None:
            return record.open(self.vae, device) if self.decode else None
        if not self.vae:
            return None
        if "imported" not in config.manifest:
            check_vae(self.vae, config)
        found = Autoencoder.open(self.vae, device)
        if config.scaling is not None or len(config.shape) != 3 or found.channels != config.shape[0]:
            shape = " x ".join(map(str, config.shape))
            raise ValueError(
                f"vae={self.vae} decodes latents of {found.channels} channels, and the run's samples, {shape}, are no such "
                "latents: leave it out."
            )
        return found

    @property
    def names_classes(self) -> bool:
        """Whether classes are named, among which class 0 counts."""
        return isinstance(self.class_label, str | int) or len(self.class_label) > 0

    def class_numbers(self, config: RunConfig) -> tuple[int, ...] | None:
        """The numbers of the classes that the seeds take in turn, -1 for none; None for a run without classes.

        Raises:
            ValueError: if the run has no such class; lists its classes.
        """
        wanted = [self.class_label] if isinstance(self.class_label, str | int) else self.class_label
        if config.classes == 0:
            if self.names_classes:
                raise ValueError(f"class_label={option_text(tuple(wanted))}: the run has no classes; leave it out.")
            return None
        return tuple(_class_number(one, config) for one in wanted) or config.learned_classes


@dataclass(frozen=True, kw_only=True)
class RunSampler:
    """A run's model with a solver: draws the images of seeds for `Run.sample` and `RunSource`.

    Attributes:
        options: how to draw.
        classes: numbers of the classes that the seeds take in turn, -1 for none; None for a run without classes.
        path: the run's folder.
        model: the run's model.
        guide: the worse model that guides it, if any.
        device: of both models.
        autoencoder: decodes the samples; None if they are not decoded.
    """

    options: SamplerOptions
    classes: tuple[int, ...] | None
    path: Path
    model: OpenModel
    guide: OpenModel | None
    device: torch.device
    autoencoder: Autoencoder | None = None

    @property
    def floating(self) -> bool:
        """Whether samples are float data rather than images."""
        return self.config.dtype != "uint8" and self.autoencoder is None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample: of a decoded image, or as in the training data."""
        return self.config.shape if self.autoencoder is None else self.autoencoder.image_shape(self.config.shape)

    def in_proportion(self) -> "RunSampler":
        """The same with classes in the proportions of the training data, unless the options name classes."""
        return self if self.options.names_classes else replace(self, classes=self.config.proportional_classes)

    def labels(self, seeds: Tensor) -> Tensor | None:
        """The class of each seed's image, shape (B,), or None for a run without classes."""
        return None if self.classes is None else in_turn(self.classes, seeds)

    def describe_classes(self) -> str | None:
        """The classes of the images, in words; None for a run without classes."""
        config, numbers = self.config, self.classes
        if numbers is None:
            return None
        if len(numbers) == 1:
            return "no class" if numbers[0] == -1 else f"class {class_text(numbers[0], config.class_names)}"
        if numbers == tuple(range(config.classes)):
            return f"classes 0 to {config.classes - 1} in turn: seed k has class k modulo {config.classes}"
        if not self.options.names_classes and numbers == config.learned_classes:
            return (
                f"the {len(numbers)} classes with images in turn: seed k has the one at place k modulo {len(numbers)}"
            )
        if not self.options.names_classes:
            return "classes in the proportions of the training data"
        listed = ", ".join(class_text(number, config.class_names) for number in numbers)
        return f"classes {listed} in turn: seed k has the one at place k modulo {len(numbers)}"

    def describe(self) -> str:
        """The sampler with every setting that affects the images, for the protocol."""
        options = self.options
        parts = options.settings(self.config.recipe.process)
        classes = self.describe_classes()
        if classes is not None:
            parts.append(classes)
        if options.guidance_scale != 1:
            kind = "classifier-free guidance"
            if self.guide is not None and options.guide is not None:
                kind = f"autoguidance by {options.guide.name} (EMA {self.guide.average}, step {self.guide.step})"
            low, high = options.guidance_interval or (0.0, math.inf)
            inside = "" if options.guidance_interval is None else f" in {low:g} to {high:g}"
            parts.append(f"{kind} {options.guidance_scale:g}{inside}")
        if self.autoencoder is not None:
            record = self.config.autoencoder
            checksum = self.autoencoder.sha256 if record is None else record.sha256
            parts.append(f"decoded by the autoencoder {checksum:.12}")
        return f"{options.sampler} ({'; '.join(parts)})"

    def finish(self, x: Tensor) -> Tensor:
        """Samples, on the CPU, of what the solver returned, (B, ...)."""
        config, decoder = self.config, self.autoencoder
        if decoder is None:
            return config.samples_of(x)
        return decoder.decode(decoder.unscaled(x) if config.scaling is None else config.samples_of(x))

    @property
    def config(self) -> RunConfig:
        """The run's configuration."""
        return self.model.config

    def sample(
        self,
        seeds: int | Sequence[int] | NDArray[Any] | Tensor,
        progress: Callable[[Progress], object] | None = None,
    ) -> Samples:
        """Draw the images of seeds, or of so many seeds from 0 on; processes share them, and each gets all.

        Raises:
            ValueError: if a seed is no whole number from 0 on, or is there twice.
        """
        wanted = _seeds(seeds)
        ranks = Ranks.launched()
        purpose = "to draw their images"
        parts = list(self.draw(wanted, ranks, progress))
        evaluations = ranks.total(sum(part.nfe * len(part) for part in parts), purpose=purpose)[0]
        none = np.zeros((0, *self.shape), self.config.dtype if self.floating else np.uint8)
        drawn = torch.from_numpy(np.concatenate([none, *(part.images for part in parts)]))
        images = ranks.all_gather_rows(drawn, purpose)
        own = torch.tensor([seed for part in parts for seed in part.seeds], dtype=torch.int64)
        row = {seed: place for place, seed in enumerate(ranks.all_gather_rows(own, purpose).tolist())}
        return self.samples(wanted, images[[row[seed] for seed in wanted]], evaluations / len(wanted))

    def draw(
        self,
        seeds: Sequence[int],
        ranks: Ranks,
        progress: Callable[[Progress], object] | None = None,
    ) -> Iterator[Samples]:
        """Draw this process's share of the images, batch by batch; each batch has its own `nfe`.

        Args:
            seeds: the seeds for all ranks.
            ranks: the processes that share the seeds.
            progress: called before every evaluation with the number of images that this process has drawn, and will draw.
        """
        options = self.options
        stage = "drawing" if ranks.world_size == 1 else f"drawing (process 1 of {ranks.world_size})"

        def report(done: float, total: int) -> None:
            if progress is not None:
                progress(Progress(stage=stage, done=int(done), total=total))

        for own, images, evaluations in draw(
            self.denoiser,
            options,
            options.sigmas(self.config.recipe.process),
            ranks.share(chunks_of(seeds, options.batch, coupled=options.solver.coupled)),
            shape=self.config.shape,
            device=self.device,
            progress=None if progress is None else report,
            finish=self.finish,
        ):
            yield self.samples(own, images, evaluations)

    def denoiser(self, seeds: Tensor) -> Denoise:
        """D(x, sigma) for rows with these seeds, shape (B,): the run's `Denoiser` with their classes and guidance."""
        own, labels = self.model.denoiser, self.labels(seeds)
        scale, interval = self.options.guidance_scale, self.options.guidance_interval
        if scale != 1 and self.guide is not None:
            return autoguidance(own, self.guide.denoiser, scale, interval, class_labels=labels)
        if labels is None:
            return own
        if scale != 1:
            return classifier_free(own, labels, scale, interval)
        return lambda x, sigma: own(x, sigma, labels)

    def samples(self, seeds: Sequence[int], images: Tensor, nfe: float) -> Samples:
        """`Samples` of the images, uint8 (B, C, H, W), or other data, that these seeds gave."""
        labels = self.labels(torch.tensor(seeds, dtype=torch.int64))
        return Samples(
            images=images.numpy(),
            seeds=tuple(seeds),
            labels=None if labels is None else labels.numpy(),
            class_names=self.config.class_names,
            nfe=nfe,
            sampler=self.describe(),
            ema=self.ema,
        )

    @property
    def ema(self) -> str:
        """The average of the weights and its step, for the protocol."""
        return f"{self.model.average}, step {self.model.step}"


def open_sampler(
    path: Path,
    sampler: SamplerName | SamplerOptions | RunSampler,
    options: SamplerOptions,
    device: torch.device | str | None,
) -> RunSampler:
    """Load a run's model with a solver, for `Run.sampler`.

    Args:
        path: the run's folder.
        sampler: the solver's name, all options of a solver, or a sampler of this run, which is returned as it is.
        options: the other options, for a solver's name; the defaults beside a sampler that holds its own.
        device: where to compute; a GPU if there is one.

    Raises:
        ValueError: if the options do not fit the run or one another, or options are given beside a sampler that holds its
            own, since they would be ignored.
    """
    both = [(field.name, getattr(options, field.name), field.default) for field in fields(options)]
    given = [f"{name}={value}" for name, value, usual in both if value != usual]
    remedy = "and sampler holds all options: set them in its SamplerOptions"
    if isinstance(sampler, RunSampler):
        where = None if device is None else as_device("device", device)
        # "cuda" is any of the GPUs.
        indices = {place.index for place in (where, sampler.device) if place is not None and place.index is not None}
        if where is not None and (where.type != sampler.device.type or len(indices) > 1):
            given.append(f"device={device}")
        remedy = "which Run.sampler loaded with its own: pass them to Run.sampler"
    if given and isinstance(sampler, SamplerOptions | RunSampler):
        raise ValueError(f"{', '.join(given)}: sampler is a {type(sampler).__name__}, {remedy}.")
    if isinstance(sampler, RunSampler):
        if sampler.path.resolve() != path.resolve():
            raise ValueError(
                f"sampler draws from the run {sampler.path}, and this run is {path}: pass one that this run's Run.sampler "
                "returned."
            )
        return sampler
    if not isinstance(sampler, SamplerOptions):
        sampler = replace(options, sampler=sampler)
    opened = sampler.open(path, found_device(device))
    opened.model.warn(depth=4)
    if opened.guide is not None:
        opened.guide.warn("guide_ema", depth=4)
    return opened


def labels_named(class_label: Any) -> str | int | tuple[str | int, ...]:
    """The argument `class_label`, one class or several, names or whole numbers of any kind, in plain Python.

    Raises:
        TypeError: if it is anything else.
        ValueError: if a number is not whole.
    """
    given = class_label.tolist() if isinstance(class_label, np.ndarray | np.generic | Tensor) else class_label
    if isinstance(given, str | Real):
        return _label("class_label", given)
    check_kind("class_label", given, Sequence, "the name or number of a class, or several")
    return tuple(_label(f"class_label[{k}]", one) for k, one in enumerate(given))


def _label(name: str, given: Any) -> str | int:
    given = given.item() if isinstance(given, Tensor) and given.ndim == 0 else given
    return str(given) if isinstance(given, str) else whole_number(name, given)


def _same(guide: Path | None, run: str | Path) -> bool:
    """Whether the guide is the run itself, by whatever path."""
    return guide is not None and guide.resolve() == Path(run).resolve()


def _seeds(seeds: Any) -> list[int]:
    seeds = seeds.tolist() if isinstance(seeds, np.ndarray | np.generic | Tensor) else seeds
    if isinstance(seeds, Real):
        return list(range(whole_number("seeds", seeds, 1)))
    check_kind("seeds", seeds, Iterable, "how many images, or their seeds, such as range(64)")
    return [whole_number(f"seeds[{k}]", seed, 0) for k, seed in enumerate(seeds)]


def _class_number(wanted: str | int, config: RunConfig) -> int:
    """The number of a class: an integer is the number, a text the name, or the number where no class has that name."""
    classes, names = config.classes, config.class_names or ()
    if isinstance(wanted, str) and wanted in names:
        return names.index(wanted)
    text = str(wanted)
    if text == "-1" or (re.fullmatch("[0-9]{1,9}", text) and int(text) < classes):
        return int(text)
    near = [] if text.isdecimal() else get_close_matches(text, names, 3)
    none = "" if config.label_dropout == 0 else ", or -1 for none"
    raise ValueError(
        f"class_label={wanted}: the run has classes {_listed(classes, names)}{none}."
        + (f" Did you mean {' or '.join(near)}?" if near else "")
    )


def _listed(classes: int, names: Sequence[str]) -> str:
    """A run's classes: all if they have names and are few, else the first and the last."""
    if classes <= _LISTED and any(name != str(number) for number, name in enumerate(names)):
        return ", ".join(class_text(number, names) for number in range(classes))
    return f"{class_text(0, names)} to {class_text(classes - 1, names)}"
