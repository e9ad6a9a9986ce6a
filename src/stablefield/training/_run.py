"""Runs: train one, open one, and whatever is done with it afterwards.

    run = train("photos", out="runs/photos")      # or Run("runs/photos"), which opens it
    run.sample(64).save("grid.png")
    run.evaluate()

The command's verbs `train`, `sample`, `evaluate`, `ema` and `export` are these functions with flags.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import stablefield
from stablefield._atomic_file import write_atomically
from stablefield._distributed import Ranks
from stablefield._progress import Progress
from stablefield._shapes import check_kind, found_device, whole_number
from stablefield.data._image_set import ImageSet
from stablefield.data._source import as_image_set, open_images
from stablefield.evaluation._evaluate import DEFAULT_METRICS, evaluate
from stablefield.evaluation._metric import Metric
from stablefield.evaluation._result import Evaluation
from stablefield.sampling._solvers import SamplerName
from stablefield.training._ema import power_exponent
from stablefield.training._estimate import Estimate, estimate_run
from stablefield.training._files import write_tensors
from stablefield.training._loop import Observer, Report, Tracker, check_fit, fit, make_accelerator
from stablefield.training._model import OpenModel, open_model
from stablefield.training._placement import resolve_band, resolve_references
from stablefield.training._post_hoc import combine, snapshot_steps
from stablefield.training._recipe import Recipe
from stablefield.training._recipes import largest_resolution, recipe_for
from stablefield.training._run_folder import RunConfig, RunFolder
from stablefield.training._run_source import RunSource, data_of
from stablefield.training._sampler import RunSampler, SamplerOptions
from stablefield.training._samples import Samples

if TYPE_CHECKING:
    from stablefield.evaluation._extractor import Extractor

__all__ = ["Plan", "Run", "images_and_recipe", "make_plan", "place", "train"]

Images = str | Path | ImageSet | NDArray[np.uint8] | Tensor
"""What `stablefield.data.open_images` opens, an image set, or uint8 of shape (n, C, H, W)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run before it begins.

    Attributes:
        data: the images.
        config: what config.json will say.
        references: how many references each step takes, in words.
        noise_band: from which noise level on targets are stable, in words.
    """

    data: ImageSet
    config: RunConfig
    references: str
    noise_band: str

    def estimate(self, device: torch.device | str | None = None) -> Estimate:
        """What the run would take, from a few steps taken now and thrown away.

        Args:
            device: where to compute; a GPU if there is one.
        """
        return estimate_run(self.config, self.data, place(device)[0])


def place(device: torch.device | str | None) -> tuple[torch.device, Ranks]:
    """The device of this process for the argument `device`, and the processes that train together, begun."""
    found = found_device(device)
    ranks = Ranks.launched(found)
    return ranks.own_device(found), ranks


def make_plan(data: ImageSet, recipe: Recipe, *, device: torch.device | str | None = None) -> Plan:
    """Check a recipe against the data, and find what it leaves to them: the references and the noise band.

    Of several processes the first decides for all, since others may have other memory. The images are not sent: each process
    has opened them itself.

    Args:
        data: the images.
        recipe: how to train.
        device: where to compute; a GPU if there is one.

    Raises:
        ValueError: if the recipe does not fit the data, naming its field.
    """
    where, ranks = place(device)
    decided = _decide(data, recipe, where, ranks.world_size) if ranks.first else None
    decided = ranks.broadcast(decided, "to plan the run")
    assert decided is not None
    config, references, noise_band = decided
    return Plan(data=data, config=config, references=references, noise_band=noise_band)


def _decide(data: ImageSet, recipe: Recipe, device: torch.device, processes: int) -> tuple[RunConfig, str, str]:
    check_fit(recipe, data)
    classes = data.classes if recipe.conditional else 0
    # Before anything is measured: a network that does not fit the images says so here.
    with torch.device("meta"):
        recipe.network.build(data.shape, classes, recipe.augment_dim, torch.Generator())
    references, rule = resolve_references(recipe, data, device, processes)
    recipe = dataclasses.replace(recipe, references=references)
    band, finding = resolve_band(recipe, data, device)
    recipe = dataclasses.replace(recipe, noise_band=band)
    check_fit(recipe, data)
    opening = dict(data.opening or {})
    config = RunConfig(
        data=str(opening.pop("source", data.name)),
        shape=data.shape,
        classes=classes,
        manifest=data.manifest,
        recipe=recipe,
        version=stablefield.__version__,
        opening=opening,
    )
    return config, rule, finding


def train(
    images: Images | Plan,
    *,
    labels: NDArray[np.int64] | Tensor | None = None,
    out: str | Path | None = None,
    recipe: Recipe | None = None,
    steps: int | None = None,
    device: torch.device | str | None = None,
    tracker: Tracker = "none",
    observers: Sequence[Observer] = (),
    on_start: Callable[[Run, ImageSet], object] | None = None,
    progress: Callable[[Report], object] | None = None,
    every: int = 10,
    stop: Callable[[], bool] = lambda: False,
) -> Run:
    """Train a diffusion model, and leave a run folder.

    On a tensor or an array of your own, uint8 of shape (n, C, H, W):

        images = ((x + 1) * 127.5).round().to(torch.uint8)  # from x in [-1, 1]
        run = sf.train(images, out="runs/mine")
        run.sample(64).save("grid.png")

    Started by torchrun or `accelerate launch`, the processes train together.

    Args:
        images: what to train on: a path or name that `open_images` opens, an image set, uint8 of shape (n, C, H, W), or the
            `Plan` of a run.
        labels: class numbers from 0 of an array of images, shape (n,); a recipe with `conditional=True` trains with them.
        out: folder of the run, new or empty; runs/DATA-TARGET, with a number where that is taken, by default.
        recipe: how to train; by default one that suits the data and the device.
        steps: training steps, in place of the recipe's.
        device: where to compute; a GPU if there is one.
        tracker: mirror metrics.jsonl to "tensorboard" or "wandb".
        observers: further metrics, measured while the run goes on.
        on_start: called with the run and its images once the folder is there.
        progress: called with a `Report` after every `every` steps, in the first process.
        every: steps between reports.
        stop: asked after every step; if true, the run is saved and left, and `Run.resume` goes on with it.

    Returns:
        The run; fewer steps than its recipe's are done if it was stopped.

    Raises:
        ValueError: if an argument does not fit the data, or the folder is taken.
        TrainingError: if the loss is not finite or the disk is full; earlier checkpoints are intact.
        ImportError: if a package is missing.
    """
    where, ranks = place(device)
    if not isinstance(images, Plan):
        with ranks.rank_0_first("to open the data"):
            data, recipe = images_and_recipe(images, labels, recipe, steps, where)
        plan = make_plan(data, recipe, device=where)
    else:
        if recipe is not None or steps is not None or labels is not None:
            raise ValueError("images is a Plan, which holds its recipe: leave recipe and steps out, and labels, too.")
        plan = images
    path = ""
    if ranks.first:
        config = plan.config
        folder = Path(out) if out is not None else _unused_folder(f"{plan.data.name}-{config.recipe.target}")
        path = str(RunFolder.create(folder, config).path)
    run = Run(ranks.broadcast(path, "to make the run's folder"))
    _fit(run, plan.data, where, tracker, observers, on_start, progress, every, stop)
    return run


class Run:
    """A run folder: a model in training, or a trained one.

    Args:
        path: the folder.

    Raises:
        ValueError: if there is no run.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = RunFolder.open(Path(path))
        self.device = torch.device("cpu")

    @property
    def path(self) -> Path:
        """The folder."""
        return self.folder.path

    @property
    def config(self) -> RunConfig:
        """What config.json says.

        Raises:
            ValueError: if it is damaged.
        """
        return self.folder.config()

    @property
    def step(self) -> int:
        """Steps done, as of the newest whole checkpoint."""
        newest = self.folder.newest()
        return 0 if newest is None else newest[1].step

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: step, loss, variance removed and more."""
        return list(self.folder.metrics())

    def model(self, ema: str = "half-life", device: torch.device | str = "cpu") -> OpenModel:
        """The newest model.

        Args:
            ema: "half-life" for the average by EDM's rule, "none" for the weights of the last step, or a length such as
                "0.1" for an average made of the run's snapshots.
            device: where it is wanted.

        Raises:
            ValueError: if there is no whole checkpoint, or no such average.
        """
        model = open_model(self.path, ema, device)
        _warn(model)
        return model

    def sample(
        self,
        seeds: int | Sequence[int] = 64,
        *,
        sampler: SamplerName | SamplerOptions | RunSampler = "heun",
        steps: int | None = None,
        guidance_scale: float = 1.0,
        class_label: str | int | None = None,
        ema: str = "half-life",
        batch: int = 256,
        device: torch.device | str | None = None,
        progress: Callable[[Progress], object] | None = None,
    ) -> Samples:
        """Draw images.

        Started by torchrun or `accelerate launch`, the processes share the seeds, and each gets all images.

        Args:
            seeds: which images, or how many: 64 means seeds 0 to 63. A seed is the same image in every call.
            sampler: the solver's name, all options of a solver, or what `sampler` made of either.
            steps: of the solver; 18 by default, 1,000 for euler_maruyama, pc-ve and pc-vp.
            guidance_scale: of classifier-free guidance; 1 for none.
            class_label: name or number of the class of all images, -1 for none; seed k is of class k modulo their number by
                default.
            ema: which average of the weights, as for `model`.
            batch: images at a time.
            device: where to compute; a GPU if there is one.
            progress: called with the images drawn so far.

        Raises:
            ValueError: if the options do not fit the run or one another.
        """
        opened = (
            sampler
            if isinstance(sampler, RunSampler)
            else self.sampler(sampler, steps, guidance_scale, class_label, ema, batch, device)
        )
        wanted = _seeds(seeds)
        with Ranks.launched() as ranks:
            purpose = "to draw their images"
            parts = list(opened.draw(wanted, ranks, progress))
            nfe, count = ranks.total(sum(part.nfe for part in parts), len(parts), purpose=purpose)
            none = np.zeros((0, *opened.config.shape), np.uint8)
            drawn = torch.from_numpy(np.concatenate([none, *(part.images for part in parts)]))
            images = ranks.all_gather_rows(drawn, purpose)
            own = torch.tensor([seed for part in parts for seed in part.seeds], dtype=torch.int64)
            row = {seed: place for place, seed in enumerate(ranks.all_gather_rows(own, purpose).tolist())}
        return opened.samples(wanted, images[[row[seed] for seed in wanted]], nfe / count)

    def sampler(
        self,
        sampler: SamplerName | SamplerOptions = "heun",
        steps: int | None = None,
        guidance_scale: float = 1.0,
        class_label: str | int | None = None,
        ema: str = "half-life",
        batch: int = 256,
        device: torch.device | str | None = None,
    ) -> RunSampler:
        """The model with a solver; arguments and errors as for `sample`."""
        if isinstance(sampler, SamplerOptions):
            if (steps, guidance_scale, class_label, ema, batch) != (None, 1.0, None, "half-life", 256):
                raise ValueError(
                    "sampler holds all options: set steps, guidance_scale, class_label, ema and batch in its SamplerOptions."
                )
            options = sampler
        else:
            options = SamplerOptions(
                sampler=sampler,
                steps=steps,
                guidance_scale=guidance_scale,
                class_label="" if class_label is None else str(class_label),
                ema=ema,
                batch=batch,
            )
        opened = options.open(self.path, found_device(device))
        _warn(opened.model)
        return opened

    def evaluate(
        self,
        *,
        samples: int = 5000,
        data: Images | Callable[[str], ImageSet] | None = None,
        metrics: Sequence[str | Metric] = DEFAULT_METRICS,
        extractor: Extractor | None = None,
        classifier: Extractor | None = None,
        sampler: SamplerName | SamplerOptions | RunSampler = "heun",
        references: int | None = None,
        split: str = "train",
        held_out: Images | None = None,
        repeats: int = 1,
        seed: int = 0,
        device: torch.device | str | None = None,
        feature_batch: int = 64,
        cache: bool | str | Path = True,
        progress: Callable[[Progress], object] | None = None,
        on_estimate: Callable[[Any], object] | None = None,
    ) -> Evaluation:
        """Measure the run's samples against real images: FID and more, each number with its protocol.

        Args:
            samples: of each repeat; published FIDs take 50,000.
            data: real images; those that the run was trained on by default, brought to their size as in training.
            metrics: names in `stablefield.evaluation.METRICS`, or metrics.
            extractor: from images to features; FID's own Inception by default.
            classifier: from images to logits, for "classifier-score".
            sampler: the solver's name, or all its options.
            references: how many real images, drawn at random; all by default.
            split: which part of them.
            held_out: real images that were not trained on, for "nearest".
            repeats: measure so often, each time on other samples.
            seed: of the first sample; the others follow it.
            device: where to compute; a GPU if there is one.
            feature_batch: images at a time in the extractor.
            cache: folder where features of real images are kept; the user's cache folder if True, none if False.
            progress: called with the stage and how much of it is done.
            on_estimate: called with how long it will take, before anything is drawn.

        Raises:
            ValueError: if there are too few images for a metric, or the options do not fit the run.
            ImportError: if the extractor's package is not installed.
        """
        opened = sampler if isinstance(sampler, RunSampler) else self.sampler(sampler, device=device)
        config = self.config
        if data is None:
            data = partial(_part, data_of(config), config)
        return evaluate(
            RunSource(opened, str(self.path), samples, seed),
            data=data,
            metrics=metrics,
            extractor=extractor,
            classifier=classifier,
            references=references,
            split=split,
            held_out=held_out,
            repeats=repeats,
            seed=seed,
            device=opened.device,
            batch=feature_batch,
            cache=cache,
            progress=progress,
            on_estimate=on_estimate,
        )

    def average(self, length: float, step: int | None = None) -> tuple[Path, float]:
        """Write an average of the weights of any length, made of the run's snapshots.

        Args:
            length: standard deviation of the average as a share of the run, such as 0.1.
            step: at which step; that of the last snapshot by default.

        Returns:
            The safetensors file in RUN/ema, and the relative error of the average's profile.

        Raises:
            ValueError: if the run has no snapshots, or the length is out of range.

        References:
            Karras, Aittala, Lehtinen, Hellsten, Aila, Laine, "Analyzing and Improving the Training Dynamics of Diffusion
            Models", CVPR 2024, section 3.
        """
        power_exponent(length)
        if step is not None:
            whole_number("step", step, 1)
        if not self.snapshot_steps():
            raise ValueError(f"{self.path} has no snapshots: train with a recipe of ema_snapshot_every=STEPS.")
        parameters, error = combine(self.folder.snapshots, length, step)
        name = f"length-{length:g}" + ("" if step is None else f"-step-{step:08d}")
        path = self.folder.snapshots / f"{name}.safetensors"
        metadata = {"length": f"{length:g}"}
        write_atomically(path, lambda temporary: write_tensors(temporary, parameters, metadata))
        return path, error

    def snapshot_steps(self) -> list[int]:
        """Steps at which snapshots of the averages were taken, in order.

        Raises:
            ValueError: naming a snapshot that is damaged.
        """
        return snapshot_steps(self.folder.snapshots)

    def export(
        self,
        folder: str | Path,
        *,
        format: Literal["diffusers", "plain"] = "diffusers",  # noqa: A002
        ema: str = "half-life",
        name: str = "",
        samples: int = 64,
        steps: int = 18,
    ) -> Path:
        """Write the model for other programs, with a model card and samples.

        Args:
            folder: to write, new or empty.
            format: "diffusers" for a pipeline folder with its code, "plain" for safetensors and JSON alone.
            ema: which average of the weights, as for `model`.
            name: of the model on its card; that of the run's folder by default.
            samples: images in the card's picture; 0 for none.
            steps: of Heun's method for them.

        Returns:
            The folder.

        Raises:
            ValueError: if the folder is not empty or cannot be written, or there is no such average.
            ImportError: if diffusers is not installed (format "diffusers").
        """
        from stablefield.interop._export import export_run

        model = self.model(ema)
        return export_run(self.path, model, Path(folder), format=format, name=name, samples=samples, steps=steps)

    def resume(
        self,
        *,
        data: Images | None = None,
        device: torch.device | str | None = None,
        tracker: Tracker = "none",
        observers: Sequence[Observer] = (),
        on_start: Callable[[Run, ImageSet], object] | None = None,
        progress: Callable[[Report], object] | None = None,
        every: int = 10,
        stop: Callable[[], bool] = lambda: False,
    ) -> Run:
        """Go on from the newest checkpoint to the last step, as the run was configured.

        Args:
            data: where the images are now, if they have moved, or the images.
            device: where to compute; a GPU if there is one.
            tracker: as for `train`.
            observers: as for `train`.
            on_start: as for `train`.
            progress: as for `train`.
            every: as for `train`.
            stop: as for `train`.

        Returns:
            This run.

        Raises:
            ValueError: if the images are not those of the run, or another process trains in its folder.
            TrainingError: as for `train`.
        """
        where, ranks = place(device)
        config = self.config
        with ranks.rank_0_first("to open the data"):
            if data is None or isinstance(data, str | Path):
                data = open_images(data_of(config) if data is None else data, **config.opening)
        _fit(self, as_image_set("data", data), where, tracker, observers, on_start, progress, every, stop)
        return self

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def _repr_html_(self) -> str:
        config, step = self.config, self.step
        recipe = config.recipe
        text = (
            f"<p><b>{html.escape(str(self.path))}</b>: {recipe.target.upper()} on {html.escape(config.data)}, step "
            f"{step:,} of {recipe.steps:,}</p>"
        )
        picture = self._repr_png_()
        if picture is not None:
            data = base64.b64encode(picture).decode()
            text += f'<img alt="samples of step {step}" src="data:image/png;base64,{data}">'
        return text

    def _repr_png_(self) -> bytes | None:
        picture = self.folder.picture(self.step)
        return picture.read_bytes() if picture.is_file() else None


def _fit(
    run: Run,
    data: ImageSet,
    device: torch.device,
    tracker: Tracker,
    observers: Sequence[Observer],
    on_start: Callable[[Run, ImageSet], object] | None,
    progress: Callable[[Report], object] | None,
    every: int,
    stop: Callable[[], bool],
) -> None:
    run.device = device
    if on_start is not None:
        on_start(run, data)
    fit(
        run.folder,
        run.config,
        data,
        device=device,
        report=progress,
        every=every,
        stop=stop,
        observers=observers,
        tracker=tracker,
        accelerator=make_accelerator(device, tracker, run.folder),
    )


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    if isinstance(seeds, int):
        return list(range(whole_number("seeds", seeds, 1)))
    wanted = [whole_number(f"seeds[{k}]", seed, 0) for k, seed in enumerate(seeds)]
    if not wanted or len(set(wanted)) < len(wanted):
        raise ValueError(f"seeds holds {len(wanted)} seeds, {len(set(wanted))} of them different: pass each once.")
    return wanted


def images_and_recipe(
    images: Images,
    labels: NDArray[np.int64] | Tensor | None,
    recipe: Recipe | None,
    steps: int | None,
    device: torch.device,
) -> tuple[ImageSet, Recipe]:
    """The arguments of `train` of these names: the images, opened, and the recipe, or one that suits them.

    Without a recipe, images of several sizes are brought to one that suits the device.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if the images cannot be opened, or `steps` is no number of steps.
    """
    accelerated = device.type == "cuda"
    if recipe is not None:
        wanted = "a Recipe, such as stablefield.training.DIGITS, or None for one that suits the data"
        check_kind("recipe", recipe, Recipe, wanted)
    if labels is not None or not isinstance(images, str | Path):
        data = as_image_set("images", images, labels)
    else:
        data = open_images(images, limit=largest_resolution(accelerated=accelerated) if recipe is None else None)
    if recipe is None:
        recipe = recipe_for(data, accelerated=accelerated)
    return data, recipe if steps is None else dataclasses.replace(recipe, steps=whole_number("steps", steps, 1))


def _part(source: str, config: RunConfig, split: str) -> ImageSet:
    return open_images(source, split=split, **config.opening)


def _warn(model: OpenModel) -> None:
    for complaint in model.complaints:
        warnings.warn(f"a newer checkpoint was passed over: {complaint}", stacklevel=3)


def _unused_folder(name: str) -> Path:
    # A run never overwrites another: the second is called -2. Made at once, for another may begin at the same time.
    number = 1
    while True:
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError:
            return path  # whoever writes there says why that cannot be
        else:
            return path
