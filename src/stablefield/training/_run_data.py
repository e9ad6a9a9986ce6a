"""The data of a run: whether they fit its recipe, how to open them, and whether they are those that it was started with."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from stablefield._progress import Progress
from stablefield.data._image_set import ImageSet
from stablefield.data._png import is_picture
from stablefield.data._source import open_images
from stablefield.training._recipe import Recipe
from stablefield.training._run_config import RunConfig

__all__ = [
    "MEASURE_OTHERS",
    "check_fit",
    "check_vae",
    "data_of",
    "existing",
    "held_out_data",
    "open_own",
    "open_part",
    "optimum_data",
    "require_same",
    "training_data",
]

MEASURE_OTHERS = ": to measure against other images, pass data=IMAGES"
"""What to do in an evaluation if a run's data have changed."""


def check_fit(recipe: Recipe, data: ImageSet, held_out: int = 0) -> None:
    """Check a recipe against the data before anything is made.

    Args:
        recipe: the recipe.
        data: the run's data.
        held_out: how many of them are held out.

    Raises:
        ValueError: if the batch or the references are larger than the data, references fewer than the batch, or the recipe
            needs classes that the data lack.
    """
    n = len(data) - held_out
    if recipe.images_per_step > n:
        most = n * recipe.draws_per_image
        draws = f" of {recipe.images_per_step} images" if recipe.draws_per_image > 1 else ""
        raise ValueError(f"batch={recipe.batch}{draws} is above the {n} images of the data: pass batch={most} or less.")
    if isinstance(recipe.references, int) and recipe.target == "stf":
        if recipe.references > n:
            raise ValueError(
                f"references={recipe.references} is above the {n} images of the data: pass at most {n}, or all."
            )
        if recipe.references < recipe.images_per_step:
            raise ValueError(
                f"references={recipe.references} is below batch={recipe.batch}: every image of a batch is among its "
                f"references, so pass at least {recipe.images_per_step}, or target=dsm for none."
            )
    if recipe.latent_scaling == "autoencoder" and data.autoencoder is None:
        raise ValueError(
            "latent_scaling=autoencoder is for latents of images, which stablefield.data.encode makes, and the data are no "
            "such latents: leave it out."
        )
    if data.moments is not None and recipe.augmentation:
        raise ValueError(
            f"augmentation={recipe.augmentation:g} flips and turns pictures, and the data are latents of images: pass "
            "augmentation=0."
        )
    if data.moments is not None and recipe.mirror and data.flipped is None:
        raise ValueError("mirror=True needs the latents of the mirrored images: encode the images with mirror=True.")
    if data.moments is None and not is_picture(data.shape) and (recipe.mirror or recipe.augmentation):
        what = "mirror=True" if recipe.mirror else f"augmentation={recipe.augmentation:g}"
        remedy = "leave it out" if recipe.mirror else "pass augmentation=0"
        sizes = " x ".join(map(str, data.shape))
        raise ValueError(f"{what} flips and turns pictures, and the data are samples of {sizes}: {remedy}.")
    if recipe.conditional and data.labels is None:
        raise ValueError(
            " ".join(["conditional=True needs classes, but the data have no labels: leave it out.", *data.notes])
        )


def check_vae(vae: str | Path, config: RunConfig) -> None:
    """Check that the data are latents if the place of their autoencoder is given.

    Raises:
        ValueError: if they are not.
    """
    if vae and config.autoencoder is None:
        raise ValueError(
            f"vae={vae} does nothing: the run's data are no latents that stablefield.data.encode made. Leave it out; to "
            "train on latents of images, encode them first."
        )


def training_data(config: RunConfig, data: ImageSet) -> ImageSet:
    """Check that the data are those of a run, and number their classes, and scale float data, as at its start.

    Raises:
        ValueError: if they are not.
    """
    require_same(config, data)
    # The run may have started with the classes numbered in another order.
    data = config.numbered(data)
    if config.classes and data.labels is None:
        raise ValueError(
            f"data have no labels, and this run is conditioned on {config.classes} classes: pass labels= beside an array, "
            "as at its start, or data with labels."
        )
    if config.classes and data.manifest["labels_sha256"] != config.manifest.get("labels_sha256"):
        raise ValueError(f"{config.data} is not what this run was started with (its labels' sha256 differs).")
    return data


def require_same(config: RunConfig, data: ImageSet, remedy: str = "") -> None:
    """Check that data are those of a run, by their checksum; an error ends with the remedy.

    Raises:
        ValueError: if they are not.
    """
    if data.manifest["sha256"] != config.manifest.get("sha256"):
        raise ValueError(f"{config.data} is not what this run was started with (its pixels' sha256 differs){remedy}.")


def open_own(
    config: RunConfig,
    place: str | Path = "",
    split: str = "train",
    progress: Callable[[Progress], object] | None = None,
) -> ImageSet:
    """Open data of a run as at its start.

    Args:
        config: of the run.
        place: of the data, such as of those that it holds out, or the new place of its training data; empty for the place
            that the run knows of its training data.
        split: which split of them.
        progress: as for `open_images`.

    Raises:
        ValueError: if the data are missing.
    """
    return open_images(place or data_of(config), split=split, progress=progress, **config.opening)


def open_part(config: RunConfig, split: str) -> ImageSet:
    """Open a split of a run's own data, as in its training.

    Raises:
        ValueError: if the data are missing, or those of the training have changed.
    """
    found = open_own(config, split=split)
    if split == "train":
        require_same(config, found, MEASURE_OTHERS)
    return found


def data_of(config: RunConfig) -> str:
    """A run's training data, as a name for `open_images`.

    Raises:
        ValueError: if the data are missing.
    """
    return existing("data", config.data)


def existing(name: str, place: str) -> str:
    """The place of a run's data, for the argument `name`.

    Raises:
        ValueError: if there are no data.
    """
    if place != "digits" and not place.startswith("hf:") and not Path(place).expanduser().exists():
        raise ValueError(f"{name} is missing: the run's own data, {place}, do not exist; name their new place.")
    return place


def held_out_data(config: RunConfig, others: ImageSet | None) -> ImageSet:
    """Check that these are the other data that a run holds out, with classes and scaling as those of its data.

    Raises:
        ValueError: if they are not.
    """
    assert config.held_out is not None
    if others is None:
        raise ValueError(f"held_out is missing: this run holds out {config.held_out.data}; pass these data.")
    if others.manifest["sha256"] != config.held_out.sha256:
        raise ValueError(f"held_out={others.name} is not what this run holds out (its pixels' sha256 differs).")
    others = config.numbered(others)
    if config.classes and (others.labels is None or int(others.labels.max()) >= config.classes):
        raise ValueError(
            f"held_out={others.name} needs labels of the run's {config.classes} classes, from 0: of an array, make an image "
            "set with stablefield.data.make_image_set(images, labels, origin)."
        )
    return others


def optimum_data(config: RunConfig, data: ImageSet, most: int | None = None, seed: int = 0) -> ImageSet:
    """The samples whose posterior mean is the optimum of a run: those that it trains on, with their mirror images if it has.

    Latents of images, which training draws anew, are one draw here.

    Args:
        config: of the run.
        data: the run's data, all of them.
        most: of mirrored data, draw so many at random if there are more; None for all.
        seed: of that draw.
    """
    data = config.numbered(data)
    rows = config.training_rows(len(data))
    if not config.recipe.mirror:
        if rows is None:
            return dataclasses.replace(data, moments=None, flipped=None)
        images, labels = data.batch(rows)
        return dataclasses.replace(data, images=images, labels=labels, moments=None, flipped=None)
    rows = np.arange(len(data)) if rows is None else rows
    plain = flipped = rows
    if most is not None and most < 2 * len(rows):
        chosen = np.sort(np.random.default_rng(seed).choice(2 * len(rows), most, replace=False))
        plain, flipped = rows[chosen[chosen < len(rows)]], rows[chosen[chosen >= len(rows)] - len(rows)]
    images, labels = data.batch(np.concatenate([plain, flipped]))
    images[len(plain) :] = data.mirror_images(flipped, config.recipe.seed)
    return dataclasses.replace(data, images=images, labels=labels, moments=None, flipped=None)
