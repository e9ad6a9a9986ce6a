"""The probe of data or of a run, as `stablefield.probe`: what `probing` measures, with the data's or the run's training."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stablefield._progress import Progress
from stablefield._shapes import check_kind, found_device, whole_number
from stablefield.data._image_set import ImageSet
from stablefield.data._source import open_images, warned
from stablefield.diffusion._objective import DenoiserLike
from stablefield.probing._network_probe import NetworkProbe, probe_network
from stablefield.probing._population import MOST, Samples
from stablefield.probing._probe import Probe, probe_data
from stablefield.probing._training import Training
from stablefield.probing._variance import SIZES
from stablefield.training._model import open_model
from stablefield.training._placement import resolve_references
from stablefield.training._recipe import Recipe
from stablefield.training._recipes import imagefolder, largest_resolution, recipe_for
from stablefield.training._run_data import open_own, optimum_data, training_data
from stablefield.training._run_folder import HasFolder, RunFolder, is_run

__all__ = ["probe", "usual_training"]


@overload
def probe(
    data: Samples,
    *,
    network: None = ...,
    labels: Tensor | NDArray[np.int64] | None = ...,
    by_class: bool = ...,
    training: Training | None = ...,
    batch: int | None = ...,
    references: Sequence[int] = ...,
    noise_levels: Sequence[float] | Tensor | None = ...,
    aim: float = ...,
    max_images: int = ...,
    sources: int | None = ...,
    seed: int = ...,
    device: torch.device | str | None = ...,
    progress: Callable[[Progress], object] | None = ...,
) -> Probe: ...
@overload
def probe(
    data: str | Path | HasFolder,
    *,
    network: None = ...,
    labels: Tensor | NDArray[np.int64] | None = ...,
    by_class: bool = ...,
    training: Training | None = ...,
    batch: int | None = ...,
    references: Sequence[int] = ...,
    noise_levels: Sequence[float] | Tensor | None = ...,
    aim: float = ...,
    max_images: int = ...,
    sources: int | None = ...,
    seed: int = ...,
    device: torch.device | str | None = ...,
    progress: Callable[[Progress], object] | None = ...,
) -> Probe | NetworkProbe: ...
@overload
def probe(
    data: Samples | str | Path | HasFolder,
    *,
    network: DenoiserLike,
    labels: Tensor | NDArray[np.int64] | None = ...,
    by_class: bool = ...,
    training: Training | None = ...,
    batch: int | None = ...,
    references: Sequence[int] = ...,
    noise_levels: Sequence[float] | Tensor | None = ...,
    aim: float = ...,
    max_images: int = ...,
    sources: int | None = ...,
    seed: int = ...,
    device: torch.device | str | None = ...,
    progress: Callable[[Progress], object] | None = ...,
) -> NetworkProbe: ...
def probe(
    data: Samples | str | Path | HasFolder,
    *,
    network: DenoiserLike | None = None,
    labels: Tensor | NDArray[np.int64] | None = None,
    by_class: bool = False,
    training: Training | None = None,
    batch: int | None = None,
    references: Sequence[int] = SIZES,
    noise_levels: Sequence[float] | Tensor | None = None,
    aim: float = 0.1,
    max_images: int = MOST,
    sources: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> Probe | NetworkProbe:
    """Measure the variance of training targets on data, or a network: its distance from the optimum and its gradient.

    If `training` is None, the advice is for the batch, references and noise band that `train` would choose for the data.
    With a `network`, or for a run, the result has the ledger of variance: where the variance of a batch's gradient comes
    from, and what lowers it. You may call this at any moment of your own training.

    Args:
        data: images that `stablefield.data.open_images` returned, or a path or name that it opens; a tensor or array of
            shape (n, ...), floating point as your network sees it, or uint8 that means x / 127.5 - 1; or a run, or its
            folder. `train` scales float data first, and so does `open_images` of their file.
        network: D(x, sigma, class_labels=None) in noise-to-signal units, such as a `Denoiser`, to measure on the data; for a
            run, in place of its newest checkpoint.
        labels: class of each sample, integers of shape (n,), to keep posteriors within classes. Data only.
        by_class: keep posteriors within the classes of an image set. Data only.
        training: the training that the advice or the ledger is for; if None, what `train` would do with these data. Data
            only.
        batch: rows per training step; the training's if None. Data only.
        references: sizes of reference sets to measure; the whole set leaves no variance and is not sampled. Data without a
            network only.
        noise_levels: where to show the variance of data, or to measure a network, sigma / alpha, shape (L,); chosen from the
            data if None, as always for the advice, and for a network from its training, too.
        aim: share of each row's variance that may remain, between 0 and 1. Data without a network only.
        max_images: samples that represent the data set, drawn at random if there are more.
        sources: samples to make noisy rows from; if None, all of a small set, else as many as two minutes allow, and 512
            for a network.
        seed: of all random draws.
        device: where to compute; if None, where the weights of `network` are, or a GPU if there is one.
        progress: called during the measurement.

    Returns:
        A `Probe` of data, a `NetworkProbe` of a network or a run: each prints its table, and has `page`, `charts`,
        `to_dict` and `save`.

    Raises:
        ValueError: if the data or the run cannot be opened, have nothing to measure, or are not those that the run was
            started with, or if an argument does not fit or has no effect.
        TypeError: if an argument has the wrong type.
    """
    if device is None and isinstance(network, nn.Module):
        device = next((weight.device for weight in network.parameters()), None)
    device = found_device(device)
    folder = data if isinstance(data, str | Path) else getattr(data, "path", None)
    of_run = isinstance(folder, str | Path) and is_run(folder)
    given = {"references": tuple(references) != SIZES, "aim": aim != 0.1} if of_run or network is not None else {}
    if of_run:
        given |= {
            "labels": labels is not None,
            "by_class": by_class,
            "training": training is not None,
            "batch": batch is not None,
        }
    if names := [name for name, is_given in given.items() if is_given]:
        what = "a run, which has its own data and training" if of_run else "data with a network"
        raise ValueError(f"{', '.join(names)}: no effect on {what}; leave this out, or probe the data alone.")
    if of_run:
        assert isinstance(folder, str | Path)
        return _probe_run(Path(folder), network, noise_levels, max_images, sources, seed, device, progress)
    if isinstance(data, str | Path):
        limit = largest_resolution(accelerated=device.type == "cuda")
        data = warned("data", open_images(data, limit=limit, progress=progress))
    if not isinstance(data, ImageSet | Tensor | np.ndarray):
        raise TypeError(f"data is a {type(data).__name__}: pass images, a tensor, the name of data, or a run.")
    if training is None:
        training = usual_training(data, device)
    check_kind("training", training, Training, "a Training, such as stablefield.probing.Training(), or None")
    if batch is not None:
        training = dataclasses.replace(training, batch=batch)
    if network is not None:
        return probe_network(
            network,
            data,
            labels=labels,
            by_class=by_class,
            training=training,
            noise_levels=noise_levels,
            max_images=max_images,
            sources=sources,
            seed=seed,
            device=device,
            progress=progress,
        )
    pool: int | str = "all"
    if isinstance(data, ImageSet):
        pool, _ = resolve_references(_recipe(data, device), data, device)
    return probe_data(
        data,
        labels=labels,
        by_class=by_class,
        training=training,
        references=references,
        references_in_training=pool if isinstance(pool, int) else None,
        noise_levels=noise_levels,
        aim=aim,
        max_images=max_images,
        sources=sources,
        seed=seed,
        device=device,
        progress=progress,
    )


def usual_training(data: Samples, device: torch.device) -> Training:
    """The training that `train` would choose for the data."""
    training = _training_of(_recipe(data, device))
    return dataclasses.replace(training, batch=min(training.batch, len(data)))


def _training_of(recipe: Recipe) -> Training:
    return Training(
        process=recipe.process, noise_levels=recipe.noise_levels, weighting=recipe.weighting, batch=recipe.batch
    )


def _recipe(data: Samples, device: torch.device) -> Recipe:
    """The recipe that `train` would choose for the data."""
    accelerated = device.type == "cuda"
    if isinstance(data, ImageSet):
        return recipe_for(data, accelerated=accelerated)
    shape = tuple(data.shape[1:])
    height, width = shape[-2:] if len(shape) > 1 else (1, 1)
    return imagefolder((shape[0] if len(shape) > 2 else 1, height, width), len(data), accelerated=accelerated)


def _probe_run(
    folder: Path,
    network: DenoiserLike | None,
    noise_levels: Sequence[float] | Tensor | None,
    max_images: int,
    sources: int | None,
    seed: int,
    device: torch.device,
    progress: Callable[[Progress], object] | None,
) -> NetworkProbe:
    model = open_model(folder, device=device)
    config = model.config
    images = training_data(config, open_own(config, progress=progress))
    notes = [f"skipped: {complaint}" for complaint in model.complaints] if network is None else []
    found = optimum_data(config, images, whole_number("max_images", max_images, 2), seed)
    rows = config.training_rows(len(images))
    every = (len(images) if rows is None else len(rows)) * (2 if config.recipe.mirror else 1)
    log = list(RunFolder(folder).metrics())
    if config.recipe.augmentation:
        notes.append(
            "no loss minus floor over training: augmentation changes the data, and so the floor of the logged loss"
        )
        log = []
    if config.autoencoder is not None:
        notes.append("the optimum is that of one draw of the latents, and training draws them anew")
    result = probe_network(
        model.denoiser if network is None else network,
        found,
        by_class=config.classes > 0,
        training=_training_of(config.recipe),
        noise_levels=noise_levels,
        max_images=max_images,
        sources=sources,
        log=log,
        label_dropout=config.recipe.label_dropout,
        name=folder.name,
        step=model.step if network is None else None,
        notes=notes,
        seed=seed,
        device=device,
        progress=progress,
    )
    # Of mirrored data a part was drawn before.
    return (
        result
        if result.drawn_from is not None or len(found) == every
        else dataclasses.replace(result, drawn_from=every)
    )
