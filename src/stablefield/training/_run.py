"""Runs: open one, then sample from it, evaluate it, average its weights, export it or go on with it.

    run = Run("runs/photos")      # which `train` returns, too
    run.sample(64).save("grid.png")
    run.evaluate()

The command's verbs `sample`, `evaluate`, `ema`, `export` and `train --resume` are these functions with flags.
"""

from __future__ import annotations

import base64
import html
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield._atomic_file import write_atomically
from stablefield._progress import Progress
from stablefield._shapes import whole_number
from stablefield.data._image_set import ImageSet
from stablefield.data._source import Images, as_image_set, warned
from stablefield.evaluation._evaluate import DEFAULT_METRICS, evaluate
from stablefield.evaluation._metric import Metric
from stablefield.evaluation._result import Evaluation
from stablefield.sampling._solvers import SamplerName
from stablefield.training._accelerator import Tracker, check_tracker, make_accelerator
from stablefield.training._ema import power_exponent
from stablefield.training._files import read_tensors, write_tensors
from stablefield.training._grids import write_animation
from stablefield.training._loop import Observer, Report, check_watchers, fit
from stablefield.training._model import OpenModel, average_name, open_model, warn_of_average
from stablefield.training._pace import Pace
from stablefield.training._plan import place
from stablefield.training._post_hoc import combine, snapshot_steps
from stablefield.training._run_config import RunConfig
from stablefield.training._run_data import check_vae, existing, held_out_data, open_own, open_part, training_data
from stablefield.training._run_folder import RunFolder, checkpoint_name
from stablefield.training._run_report import RunReport, read_report
from stablefield.training._run_source import RunSource
from stablefield.training._sampler import RunSampler, SamplerOptions, labels_named, open_sampler
from stablefield.training._samples import Samples

if TYPE_CHECKING:
    from stablefield.evaluation._extractor import Extractor

__all__ = ["Run", "fit_run"]


class Run:
    """A run folder: a model in training, or a trained one.

    Args:
        path: the folder.

    Raises:
        ValueError: if the folder holds no run.
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
        """The content of config.json.

        Raises:
            ValueError: if it is damaged.
        """
        return self.folder.config()

    @property
    def step(self) -> int:
        """Steps done at the newest intact checkpoint."""
        newest = self.folder.newest()
        return 0 if newest is None else newest[1].step

    @property
    def drawn(self) -> Path:
        """The file of the samples of the last step: a picture, or .npz of data that are no pictures."""
        return self.folder.picture(self.step, ".npz" if self.config.picture_shape is None else ".png")

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the lowest held-out loss; None for a run that holds nothing out."""
        best = self.folder.best()
        return None if best is None else best[0]

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: step, loss, variance removed and more."""
        return list(self.folder.metrics())

    def model(
        self, ema: str | float = "half-life", device: torch.device | str = "cpu", checkpoint: str | int = "newest"
    ) -> OpenModel:
        """Load a model, by default the newest.

        Args:
            ema: "half-life" for the average by EDM's rule, "none" for the weights of the last step, or a length such as
                0.1 for an average made from the run's snapshots; warns if it differs by more than 5 % from that length.
            device: where to load it.
            checkpoint: "newest"; "best" for the one with the lowest held-out loss, in a run with `held_out`; or a step that
                is kept, such as 4000.

        Raises:
            ValueError: if the run has no intact checkpoint, or no such checkpoint or average.
        """
        model = open_model(self.path, ema, device, checkpoint)
        model.warn()
        return model

    def sample(
        self,
        seeds: int | Sequence[int] | NDArray[Any] | Tensor = 64,
        *,
        sampler: SamplerName | SamplerOptions | RunSampler = "heun",
        steps: int | None = None,
        guidance_scale: float = 1.0,
        class_label: str | int | Sequence[str | int] | NDArray[Any] | Tensor | None = None,
        ema: str | float = "half-life",
        checkpoint: str | int = "newest",
        batch: int = 256,
        decode: bool = True,
        vae: str | Path = "",
        device: torch.device | str | None = None,
        progress: Callable[[Progress], object] | None = None,
    ) -> Samples:
        """Draw images.

        Started by torchrun or `accelerate launch`, the processes share the seeds, and each gets all images.

        Args:
            seeds: which images, or how many: 64 means seeds 0 to 63. A seed always gives the same image.
            sampler: the solver's name, all options of a solver, or a `RunSampler` that this run's `sampler` returned. An
                option that the latter two hold is an error here.
            steps: number of solver steps; 18 by default, 1,000 for euler-maruyama, pc-ve and pc-vp.
            guidance_scale: scale of classifier-free guidance; 1 for none.
            class_label: the class of all images, or several: of m classes, seed k takes the one at place k modulo m, by its
                own number and not by its place in `seeds`, so that a seed always has the same class. An integer is a
                class's number, -1 none; a text is its name, or its number where no class has that name. By default all
                classes that the training data have images of.
            ema: which average of the weights, as for `model`.
            checkpoint: which checkpoint, as for `model`.
            batch: images at a time.
            decode: whether to decode the samples of a run on latents of images; else they are the latents.
            vae: the autoencoder's place, if it has moved; or of one that decodes what an imported network draws.
            device: where to compute; a GPU if there is one.
            progress: called with the number of images drawn so far.

        Raises:
            ValueError: if the options do not fit the run or one another.
        """
        opened = self.sampler(
            sampler, steps, guidance_scale, class_label, ema, batch, device, checkpoint, decode=decode, vae=vae
        )
        return opened.sample(seeds, progress)

    def sampler(
        self,
        sampler: SamplerName | SamplerOptions | RunSampler = "heun",
        steps: int | None = None,
        guidance_scale: float = 1.0,
        class_label: str | int | Sequence[str | int] | NDArray[Any] | Tensor | None = None,
        ema: str | float = "half-life",
        batch: int = 256,
        device: torch.device | str | None = None,
        checkpoint: str | int = "newest",
        *,
        decode: bool = True,
        vae: str | Path = "",
    ) -> RunSampler:
        """Load the model with a solver; arguments and errors as for `sample`. One that is loaded is returned as it is."""
        options = SamplerOptions(
            steps=steps,
            guidance_scale=guidance_scale,
            class_label=() if class_label is None else labels_named(class_label),
            ema=average_name("ema", ema),
            batch=batch,
            checkpoint=checkpoint_name(checkpoint),
            decode=decode,
            vae=str(vae),
        )
        return open_sampler(self.path, sampler, options, device)

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
        per_class: bool = False,
        vae: str | Path = "",
        device: torch.device | str | None = None,
        feature_batch: int = 64,
        cache: bool | str | Path = True,
        progress: Callable[[Progress], object] | None = None,
        on_estimate: Callable[[Any], object] | None = None,
    ) -> Evaluation:
        """Measure the run's samples against real images: FID and more, each number with its protocol.

        Samples of a run on latents of images are decoded, and so are the latents that they are measured against: the numbers
        are those of the run alone. With the images themselves as `data`, the error of the autoencoder counts, too, as in
        published numbers. `sampler=SamplerOptions(decode=False)` measures the latents.

        Args:
            samples: number of samples per repeat; published FIDs take 50,000.
            data: real images; by default the run's training data, resized as in training, or decoded; an error if they have
                changed since.
            metrics: names in `stablefield.evaluation.METRICS`, or metrics.
            extractor: maps images to features; FID's own Inception by default.
            classifier: maps images to logits, for "classifier-score".
            sampler: the solver's name, all its options, or a `RunSampler` that this run's `sampler` returned. Unless it
                names classes, they have the proportions of the training data, and seed k another class than in `sample`.
            references: how many real images, drawn at random; all by default.
            split: which split of the real images, "train" or "test".
            held_out: real images that the run did not train on, for "nearest"; by default the "test" split of the data, or
                else what the run held out of them.
            repeats: how many times to measure, each time on fresh samples.
            seed: seed of the first sample; the others count up from it.
            per_class: also measure the samples of each class against the real images of that class.
            vae: as for `sample`.
            device: where to compute; a GPU if there is one.
            feature_batch: images at a time in the extractor.
            cache: folder for the features of real images; the user's cache folder if True, none if False.
            progress: called with the stage and its progress.
            on_estimate: called with the estimated time, before drawing begins.

        Raises:
            ValueError: if there are too few images for a metric, the options do not fit the run or one another, or the run's
                own data are missing or have changed.
            ImportError: if the extractor's package is not installed.
        """
        opened = self.sampler(sampler, device=device, vae=vae)
        config = self.config
        if data is None:
            data = partial(open_part, config)
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
            per_class=per_class,
            device=opened.device,
            batch=feature_batch,
            cache=cache,
            progress=progress,
            on_estimate=on_estimate,
        )

    def average(self, length: float, step: int | None = None) -> tuple[Path, float]:
        """Write an average of the weights of any length, made from the run's snapshots.

        Args:
            length: standard deviation of the average as a share of the run, such as 0.1.
            step: step of the average, one of `snapshot_steps`; the last one by default.

        Returns:
            The safetensors file in RUN/ema, and the relative error of the average's profile, of which a warning tells if it
            is above 5 %.

        Raises:
            ValueError: if the run has no snapshots, or none of `step`, or the length is not above 0 and below 0.2887.

        References:
            Karras, Aittala, Lehtinen, Hellsten, Aila, Laine, "Analyzing and Improving the Training Dynamics of Diffusion
            Models", CVPR 2024, section 3.
        """
        power_exponent(length)
        if step is not None:
            whole_number("step", step, 1)
        if not self.snapshot_steps():
            raise ValueError(f"{self.path} has no snapshots: train with ema_snapshot_every=STEPS in the recipe.")
        parameters, error = combine(self.folder.snapshots, length, step)
        newest = self.folder.read_newest(lambda checkpoint: read_tensors(checkpoint / "model.safetensors"))
        if newest is None:
            raise ValueError(
                f"{self.path} has no checkpoint yet, which holds the network's constants: train for longer."
            )
        tensors = newest[0] | parameters
        name = f"length-{length:g}" + ("" if step is None else f"-step-{step:08d}")
        path = self.folder.snapshots / f"{name}.safetensors"
        metadata = {"length": f"{length:g}"}
        write_atomically(path, lambda temporary: write_tensors(temporary, tensors, metadata))
        warn_of_average(f"length={length:g}", error)
        return path, error

    def snapshot_steps(self) -> list[int]:
        """Steps with snapshots of the averages, in order.

        Raises:
            ValueError: naming a snapshot that is damaged.
        """
        return snapshot_steps(self.folder.snapshots)

    def export(
        self,
        folder: str | Path,
        *,
        format: Literal["diffusers", "plain"] = "diffusers",  # noqa: A002
        ema: str | float = "half-life",
        checkpoint: str | int = "newest",
        name: str = "",
        samples: int = 64,
        steps: int = 18,
        vae: str | Path = "",
    ) -> Path:
        """Write the model for other programs, with a model card and samples.

        Args:
            folder: folder to write, new or empty.
            format: "diffusers" for a pipeline folder with its code, "plain" for safetensors and JSON alone.
            ema: which average of the weights, as for `model`.
            checkpoint: which checkpoint, as for `model`.
            name: model name on the card; the run folder's by default.
            samples: number of images in the card's picture; 0 for none.
            steps: steps of Heun's method for these images.
            vae: the autoencoder's place, if it has moved, or of one that decodes what an imported network draws; a pipeline
                of latents of images includes it.

        Returns:
            The folder.

        Raises:
            ValueError: if the folder is not empty or not writable, there is no such format, or the run has no such average.
            ImportError: if diffusers is not installed (format "diffusers").
        """
        from stablefield.interop._export import export_run

        model = self.model(ema, checkpoint=checkpoint)
        return export_run(
            self.path, model, Path(folder), format=format, name=name, samples=samples, steps=steps, vae=vae
        )

    def report(self) -> RunReport:
        """The run so far: losses with their floor, evaluations, samples over training, speed, settings and environment.

        `print` shows its last numbers, and `save("report.html")` writes the page that the training itself writes to
        RUN/report.html.

        Returns:
            The report; `training` says whether a process trains the run now.

        Raises:
            ValueError: if the run's config.json is damaged.
        """
        try:
            self.folder.require_unlocked()
        except ValueError:
            return read_report(self.folder, training=True)
        return read_report(self.folder, training=False)

    def animation(self, path: str | Path | None = None) -> Path:
        """Write the sample grids of the run, the same seeds over training, as a GIF.

        Training writes it to RUN/samples/training.gif after its last step.

        Args:
            path: the file, which is replaced if it exists; RUN/samples/training.gif by default.

        Returns:
            The path. The picture is at most 480 pixels wide, of at most 48 grids and 4 MiB.

        Raises:
            ValueError: if the run has fewer than two grids.
            ImportError: if Pillow is not installed.
        """
        path = self.path / "samples" / "training.gif" if path is None else Path(path)
        last = max((line["step"] for line in self.metrics()), default=self.step)
        if not write_animation(self.path / "samples", path, max(last, self.step)):
            raise ValueError(f"{self.path} has fewer than two sample grids: train with a smaller sample_every.")
        return path

    def resume(
        self,
        *,
        steps: int | None = None,
        data: Images | None = None,
        labels: NDArray[np.int64] | Tensor | None = None,
        held_out: Images | None = None,
        vae: str | Path = "",
        device: torch.device | str | None = None,
        tracker: Tracker = "none",
        observers: Sequence[Observer] = (),
        on_start: Callable[[Run, ImageSet], object] | None = None,
        progress: Callable[[Report], object] | None = None,
        every: int = 10,
        stop: Callable[[], bool] = lambda: False,
    ) -> Run:
        """Continue from the newest intact checkpoint to the last step, with the run's own recipe.

        Damaged checkpoints are named in a warning, and deleted.

        With `steps` the run is extended (or shortened), and `config.extensions` records that. Weights, averages, batches and
        noise of a step depend on the total only through `decay_share` in the recipe. So the extended run has the weights
        of one that had this number of steps from its start, bit for bit, if `decay_share` is 0 or the decay had not begun.
        If it had, the learning rate goes back up to the schedule of the new total.

        Args:
            steps: number of steps of the whole run from now on, those that are done among them.
            data: the new place of the images, if they have moved, or the images.
            labels: class numbers of an array of images, as at the start.
            held_out: other images that the run holds out, as for `data`; an image set if they have labels.
            vae: the autoencoder's place, if it has moved.
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
            ValueError: if the images are not the run's, another process trains in its folder, its checkpoints are gone, or
                `steps` is not above the steps that are done.
            TrainingError: as for `train`.
        """
        check_watchers(observers, progress, every, stop, on_start)
        check_tracker(tracker)
        where, ranks = place(device)
        config = self.config
        check_vae(vae, config)
        newest = self.folder.to_continue(config)
        for complaint in newest[2] if newest is not None and ranks.first else ():
            warnings.warn(f"skipped a newer checkpoint, whose steps are taken again: {complaint}", stacklevel=2)
        with ranks.rank_0_first("to open the data"):
            if data is None:
                data = open_own(config)
            elif isinstance(data, str | Path):
                data = warned("data", open_own(config, data))
        images = as_image_set("data", data, labels)
        # Whatever may refuse an argument comes before the run changes.
        if steps is not None and config.autoencoder is not None and ranks.first:
            config.autoencoder.open(vae, torch.device("cpu"))
        others = self._others(held_out) if ranks.first else None
        if steps is not None:
            images = training_data(config, images)
            extended = config.extended(self.step, steps)
            if extended != config:
                with ranks.rank_0_first("to extend the run"):
                    if ranks.first:
                        self.folder.extend(extended)
        fit_run(self, images, where, tracker, observers, on_start, progress, every, stop, held_out=others, vae=vae)
        return self

    def _others(self, held_out: Images | None) -> ImageSet | None:
        """Other data that the run holds out."""
        config = self.config
        if config.held_out is None or config.held_out.share is not None:
            if held_out is not None:
                raise ValueError("held_out is given, but the run holds out no other data: leave it out.")
            return None
        if held_out is None or isinstance(held_out, str | Path):
            place = existing("held_out", config.held_out.data) if held_out is None else held_out
            held_out = open_own(config, place)
        return held_out_data(config, as_image_set("held_out", held_out))

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


def fit_run(
    run: Run,
    data: ImageSet,
    device: torch.device,
    tracker: Tracker,
    observers: Sequence[Observer],
    on_start: Callable[[Run, ImageSet], object] | None,
    progress: Callable[[Report], object] | None,
    every: int,
    stop: Callable[[], bool],
    pace: Pace | None = None,
    held_out: ImageSet | None = None,
    vae: str | Path = "",
) -> None:
    """Train a run on its data to its last step; arguments and errors as for `train`."""
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
        pace=pace,
        held_out=held_out,
        vae=vae,
    )
