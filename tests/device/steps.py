"""Training steps, on any device."""

import dataclasses
from types import SimpleNamespace

import torch

from stablefield.data._digits import open_digits
from stablefield.training._feed import Feed
from stablefield.training._recipe import MLPConfig, Recipe, SongUNetConfig
from stablefield.training._recipes import DIGITS
from stablefield.training._run_config import RunConfig
from stablefield.training._stepper import Stepper


def stepper(recipe: Recipe, device: torch.device) -> Stepper:
    data = open_digits()
    classes = data.classes if recipe.conditional else 0
    config = RunConfig(
        data="digits", shape=data.shape, classes=classes, manifest=data.manifest, recipe=recipe, version="test"
    )
    feed = Feed(data, recipe, device, labelled=classes > 0, placement="resident")
    return Stepper(config, feed, SimpleNamespace(device=device, backward=lambda loss: loss.backward()))


UNET = SongUNetConfig(base_channels=8, multipliers=(1, 2), blocks=1, dropout=0.0)
SMALL = dataclasses.replace(DIGITS, network=MLPConfig(width=64, depth=2))
RECIPES = {
    "perceptron": dataclasses.replace(SMALL, references="all", noise_band=0.3, batch=64),
    "unet": dataclasses.replace(DIGITS, references="all", noise_band=0.3, batch=32, network=UNET, mirror=True),
    "augmented": dataclasses.replace(
        DIGITS, references="all", noise_band=0.3, batch=32, network=UNET, augmentation=0.3
    ),
    "conditional": dataclasses.replace(
        SMALL, references="all", noise_band=0.3, batch=64, conditional=True, label_dropout=0.2
    ),
    "accumulated": dataclasses.replace(
        SMALL, references="all", noise_band=0.3, batch=64, gradient_accumulation_steps=2
    ),
    "DSM": dataclasses.replace(SMALL, target="dsm", batch=64),
}
