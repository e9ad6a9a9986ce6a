"""Plans: a run before it begins, with its images, its recipe without anything left open, and what it would cost."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import stablefield
from stablefield._distributed import Ranks
from stablefield._shapes import check_kind, found_device, whole_number
from stablefield.data._copies import copies, warn_of_copies
from stablefield.data._image_set import ImageSet
from stablefield.data._source import Images, as_image_set, open_images, warned
from stablefield.diffusion._preconditioning import Denoiser
from stablefield.training._estimate import RunEstimate, decoding_seconds, estimate_run
from stablefield.training._fully_sharded import shards
from stablefield.training._held_out import HeldOut
from stablefield.training._noise_band import resolve_band
from stablefield.training._pace import Costs, clock
from stablefield.training._placement import resolve_references
from stablefield.training._recipe import Recipe
from stablefield.training._recipes import largest_resolution, recipe_for
from stablefield.training._report_writer import report_seconds
from stablefield.training._run_config import RunConfig
from stablefield.training._run_data import check_fit, check_vae, held_out_data
from stablefield.training._run_folder import HasFolder
from stablefield.training._time_budget import narrowed, seconds_of, within
from stablefield.training._weight_source import WeightSource, copied_weights, open_weights, side_of

__all__ = ["Plan", "images_and_recipe", "make_plan", "place"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run before it begins.

    Attributes:
        data: the images.
        config: the content of config.json.
        references: number of references per step, in words.
        noise_band: noise level from which targets are stable, in words.
        held_out: other data that are held out, in the first process; None for none, or for a share of the data.
        initial: the denoiser to begin with, in the first process; None for a new one. `config.initial` says what it is
            made of.
        seconds: time that the run may take from its start to its end; None for as long as it takes.
        costs: of the parts of a run within a time.
    """

    data: ImageSet
    config: RunConfig
    references: str
    noise_band: str
    held_out: ImageSet | None = field(default=None, repr=False)
    initial: Denoiser | None = field(default=None, repr=False)
    seconds: float | None = None
    costs: Costs | None = field(default=None, repr=False)

    def within(
        self,
        time: str | float,
        device: torch.device | str | None = None,
        vae: str | Path = "",
        *,
        fit_width: bool = False,
    ) -> Plan:
        """The plan of a run that ends in time, with a picture.

        Trial steps show how many steps the time allows. The ramp of the learning rate and the half-life of the averages
        become at most a twentieth of the images; pictures and checkpoints on the way take a few percent of the time. The
        run checks its pace on the way, and changes the number of its steps if it has to: `RunConfig.extensions` keeps that.

        Args:
            time: seconds, or a text such as "90s", "10m" or "2h", which begins now.
            device: where to compute; a GPU if there is one.
            vae: as for `train`.
            fit_width: halve the width of a U-Net, down to 16 base channels, until the time allows 1,000 steps: a narrow
                network that takes many steps beats a wide one that takes few.

        Raises:
            ValueError: if the time is too short.
        """
        began, given = clock(), seconds_of(time)
        where, ranks = place(device)
        config = self.config
        costs = estimate_run(config, self.data, where).costs
        while fit_width:
            left, costs = ranks.broadcast((given - (clock() - began), costs), "to fit the network to the time")
            narrower = narrowed(config.recipe, left, costs)
            if narrower is None:
                break
            config = dataclasses.replace(config, recipe=narrower)
            costs = estimate_run(config, self.data, where).costs
        check_vae(vae, config)
        costs = dataclasses.replace(costs, picture=costs.picture + decoding_seconds(config, vae, where))
        left = given - (clock() - began)
        costs = dataclasses.replace(costs, report=report_seconds(left))
        left, costs = ranks.broadcast((left, costs), "to share out the time")
        held_out = config.held_out
        recipe = within(config.recipe, left, costs, held_out)
        held_out = None if held_out is None else held_out.paced(recipe)
        config = dataclasses.replace(config, recipe=recipe, held_out=held_out)
        return dataclasses.replace(self, config=config, seconds=left, costs=costs)

    def estimate(
        self,
        device: torch.device | str | None = None,
        vae: str | Path = "",
        *,
        evaluate_every: int = 0,
        evaluate_samples: int = 500,
    ) -> RunEstimate:
        """Estimate what the run would cost, from a few trial steps that are discarded.

        Its pictures, checkpoints and looks at held-out samples count, and the samples of observers, but not what observers
        compute from them.

        Args:
            device: where to compute; a GPU if there is one.
            vae: as for `train`.
            evaluate_every: steps between evaluations of samples by an observer; 0 for none.
            evaluate_samples: samples of each of them.

        Raises:
            ValueError: if an argument is out of range, or the data are not latents and `vae` is given.
        """
        whole_number("evaluate_every", evaluate_every, 0)
        whole_number("evaluate_samples", evaluate_samples, 1)
        check_vae(vae, self.config)
        where = place(device)[0]
        return estimate_run(
            self.config,
            self.data,
            where,
            evaluate_every=evaluate_every,
            evaluate_samples=evaluate_samples,
            decoding=decoding_seconds(self.config, vae, where),
        )


def place(device: torch.device | str | None) -> tuple[torch.device, Ranks]:
    """This process's device for the argument `device`, and the group of processes that train together, started."""
    found = found_device(device)
    ranks = Ranks.launched(found)
    return ranks.own_device(found), ranks


def make_plan(
    data: ImageSet,
    recipe: Recipe,
    *,
    init: str | Path | HasFolder | None = None,
    held_out: float | Images | None = None,
    device: torch.device | str | None = None,
) -> Plan:
    """Check a recipe against the data, and fill in what it leaves open: the references and the noise band.

    Of several processes the first decides for all, since their memory may differ. It does not send the images: each process
    has opened them itself.

    Args:
        data: the images.
        recipe: how to train.
        init: weights to begin with, as for `train`.
        held_out: samples not to train on, as for `train`.
        device: where to compute; a GPU if there is one.

    Raises:
        ValueError: if the recipe does not fit the data, naming its field, or `init` does not fit the network.

    Warns:
        UserWarning: if at least 1 % of the held-out samples are training samples, too.
    """
    where, ranks = place(device)
    source, measured = None if init is None else open_weights(init), data.scaling
    data = _scaled(data, recipe, source)
    decided, initial, others = None, None, None
    if ranks.first:
        record, others = _held_out(held_out, data, recipe)
        config, references, noise_band = _decide(data, recipe, where, ranks.world_size, record)
        if others is not None:
            others = held_out_data(config, others)
        if source is not None:
            initial, told = copied_weights(source, config, measured)
            config = dataclasses.replace(config, initial=told)
        decided = config, references, noise_band
    decided = ranks.broadcast(decided, "to plan the run")
    assert decided is not None
    config, references, noise_band = decided
    return Plan(
        data=data, config=config, references=references, noise_band=noise_band, held_out=others, initial=initial
    )


def _scaled(data: ImageSet, recipe: Recipe, source: WeightSource | None) -> ImageSet:
    """The data with the scaling that the recipe asks for, or else with that of the source of the first weights."""
    autoencoder = data.autoencoder
    if recipe.latent_scaling == "autoencoder" and autoencoder is not None:
        scaling = autoencoder.scaling(data.shape[0], str(data.images.dtype))
    else:
        scaling = None if source is None else source.scaling_for(data)
    if scaling is None:
        return data
    return dataclasses.replace(data, scaling=scaling, manifest=data.manifest | {"scaling": scaling.record})


def _held_out(
    held_out: float | Images | None, data: ImageSet, recipe: Recipe
) -> tuple[HeldOut | None, ImageSet | None]:
    if held_out is None:
        return None, None
    mirrored = recipe.mirror and data.scaling is None  # mirror images of latents are drawn anew
    if isinstance(held_out, int | float | np.number):
        found = HeldOut.part(float(held_out), data, recipe)
        training, outside = found.split(len(data), recipe.seed)
        warn_of_copies(
            copies(data.images, data.images, outside, training, mirrored=mirrored),
            found.count,
            f"held_out={float(held_out):g}",
            "keep one of each in the data, such as the rows numpy.unique(images, axis=0, return_index=True)[1]",
        )
        return found, None
    if isinstance(held_out, str | Path):
        others = warned("held_out", open_images(held_out, **data.reading))
    else:
        others = as_image_set("held_out", held_out)
    found = HeldOut.other(others, data, recipe)
    copied = copies(others.images, data.images, mirrored=mirrored)
    warn_of_copies(copied, len(others), "held_out", "leave them out of the held-out data")
    return found, others


def _decide(
    data: ImageSet, recipe: Recipe, device: torch.device, processes: int, held_out: HeldOut | None
) -> tuple[RunConfig, str, str]:
    left_out = held_out.count if held_out is not None and held_out.share is not None else 0
    check_fit(recipe, data, left_out)
    shards(recipe, processes)  # raises an error for too few rows, before any work
    classes = data.classes if recipe.conditional else 0
    # Before any measurement: a network that does not fit the images fails here.
    with torch.device("meta"):
        recipe.network.build(data.shape, classes, recipe.augment_dim, torch.Generator())
    references, rule = resolve_references(recipe, data, device, processes, left_out)
    recipe = dataclasses.replace(recipe, references=references)
    training = None if held_out is None or not left_out else held_out.split(len(data), recipe.seed)[0]
    band, finding = resolve_band(recipe, data, device, training)
    recipe = dataclasses.replace(recipe, noise_band=band)
    check_fit(recipe, data, left_out)
    counts = None
    if classes and data.labels is not None:
        own = data.labels if training is None else data.labels[training]
        counts = np.bincount(own, minlength=classes).tolist()
    config = RunConfig(
        data=data.place,
        shape=data.shape,
        classes=classes,
        manifest=data.manifest if counts is None else data.manifest | {"class_counts": counts},
        recipe=recipe,
        version=stablefield.__version__,
        opening=data.reading,
        held_out=held_out,
    )
    return config, rule, finding


def images_and_recipe(
    images: Images,
    labels: NDArray[np.int64] | Tensor | None,
    recipe: Recipe | None,
    steps: int | None,
    device: torch.device,
    source: WeightSource | None = None,
) -> tuple[ImageSet, Recipe]:
    """Open the images, and choose a recipe that suits them if None; arguments as for `train`.

    Without a recipe, images of several sizes are resized to one that suits the device, or to that of the run whose weights
    are the first ones.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the images cannot be opened, the recipe does not use the labels, or `steps` is not a positive whole
            number.
    """
    accelerated = device.type == "cuda"
    if recipe is not None:
        wanted = "a Recipe, such as stablefield.training.DIGITS, or None for one that suits the data"
        check_kind("recipe", recipe, Recipe, wanted)
    if labels is not None or not isinstance(images, str | Path):
        data = as_image_set("images", images, labels)
    else:
        limit = None
        if recipe is None:
            limit = side_of(source) or largest_resolution(accelerated=accelerated)
        data = warned("images", open_images(images, limit=limit))
    if recipe is not None and labels is not None and not recipe.conditional:
        raise ValueError(
            "labels are given, and the recipe has conditional=False, which ignores them: set it to True, or leave labels "
            "out."
        )
    if recipe is None:
        recipe = source.recipe_for(data) if source is not None else None
        recipe = recipe or recipe_for(data, accelerated=accelerated)
        recipe = recipe if labels is None else dataclasses.replace(recipe, conditional=True)
    return data, recipe if steps is None else dataclasses.replace(recipe, steps=whole_number("steps", steps, 1))
