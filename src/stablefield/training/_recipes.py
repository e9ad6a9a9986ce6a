"""The named recipes, from a few minutes on two CPU cores to the published runs.

The `cifar10` ones hold the settings of the paper and of EDM's published networks: batch 512 in all, 200 million images,
Adam at 1e-3 with a ramp over 10 million images, an average of half-life 500,000 images, augmentation with probability 0.12.
They are for GPUs; flags scale them down.

References:
    Xu, Tong, Jaakkola, "Stable Target Field for Reduced Variance Score Estimation in Diffusion Models", ICLR 2023,
    section 5; Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models",
    NeurIPS 2022, appendix F.
"""

import dataclasses
from math import gcd
from typing import Literal, TypeAlias, get_args

from stablefield._shapes import check_choice
from stablefield.data._image_set import ImageSet
from stablefield.data._png import is_picture
from stablefield.diffusion._noise_levels import LogNormal, LogUniform, Uniform
from stablefield.diffusion._preconditioning import FlowPreconditioning, VEPreconditioning, VPPreconditioning
from stablefield.diffusion._process import EDM, VE, VP, RectifiedFlow
from stablefield.diffusion._weighting import FlowWeighting, SNRWeighting
from stablefield.training._recipe import DiffusersUNetConfig, MLPConfig, Recipe, Shape, SiTConfig, SongUNetConfig

__all__ = [
    "CELEBA64_VE",
    "CIFAR10_EDM",
    "CIFAR10_VE",
    "CIFAR10_VP",
    "DIGITS",
    "MNIST28",
    "RECIPES",
    "NoiseDistribution",
    "imagefolder",
    "largest_resolution",
    "named_recipe",
    "recipe_for",
    "sit",
    "unet2d",
    "with_noise_distribution",
]

NoiseDistribution: TypeAlias = Literal["recipe", "lognormal", "loguniform", "uniform"]

# On a CPU trainings end after minutes or hours, in which images get their coarse structure, which high noise decides. These
# levels won the races on images in so short a time (docs/race.md).
_BRIEF = LogNormal(0.0, 1.4, stratified=True)

DIGITS = Recipe(network=MLPConfig(), noise_levels=LogNormal(-0.4, 1.0, stratified=True))
"""The built-in digits: a few minutes on two CPU cores."""

MNIST28 = Recipe(
    steps=600,
    batch=64,
    learning_rate=2e-3,
    ramp_images=6_400,
    ema_half_life=20_000,
    ema_ramp=0.1,
    checkpoint_every=200,
    sample_every=300,
    noise_levels=_BRIEF,
    network=SongUNetConfig(base_channels=32, multipliers=(1, 2, 2), blocks=1, dropout=0.0),
)
"""The MNIST family, 28 x 28 grey: about ten minutes on two CPU cores."""

CIFAR10_EDM = Recipe(
    steps=200_000_000 // 512,
    batch=512,
    ramp_images=10_000_000,
    decay_share=0.0,
    max_grad_norm=float("inf"),
    nan_to_num=True,
    ema_half_life=500_000,
    augmentation=0.12,
    checkpoint_every=2000,
    sample_every=2000,
    keep_every=20_000,
    ema_snapshot_every=20_000,
    network=SongUNetConfig(architecture="ncsnpp"),
)
"""EDM on CIFAR-10 with NCSN++, the paper's best network; `--network.architecture ddpmpp` gives DDPM++."""

CIFAR10_VE = dataclasses.replace(
    CIFAR10_EDM,
    process=VE(0.02, 100.0),
    noise_levels=LogUniform(0.02, 100.0),
    weighting=SNRWeighting(),
    preconditioning=VEPreconditioning(),
)
"""Variance-exploding diffusion on CIFAR-10 with NCSN++."""

CIFAR10_VP = dataclasses.replace(
    CIFAR10_EDM,
    network=SongUNetConfig(architecture="ddpmpp"),
    process=VP(0.1, 20.0),
    noise_levels=Uniform(1e-5, 1.0),
    weighting=SNRWeighting(),
    preconditioning=VPPreconditioning(),
)
"""Variance-preserving diffusion on CIFAR-10 with DDPM++."""

CELEBA64_VE = dataclasses.replace(
    CIFAR10_VE,
    batch=256,
    steps=200_000_000 // 256,
    learning_rate=2e-4,
    augmentation=0.15,
    network=SongUNetConfig(architecture="ncsnpp", multipliers=(1, 2, 2, 2), dropout=0.05),
)
"""Variance-exploding diffusion on faces of 64 x 64 pixels, with NCSN++ of four levels."""


RECIPES = {
    "digits": DIGITS,
    "mnist28": MNIST28,
    "cifar10-edm": CIFAR10_EDM,
    "cifar10-ve": CIFAR10_VE,
    "cifar10-vp": CIFAR10_VP,
    "celeba64-ve": CELEBA64_VE,
}
"""The recipes by name. Add a new one here."""


def recipe_for(images: ImageSet, *, accelerated: bool) -> Recipe:
    """The recipe that suits images best: digits, mnist28 or `imagefolder`.

    Args:
        images: the training data.
        accelerated: whether there is a GPU.
    """
    return named_recipe("auto", images, accelerated=accelerated)[1]


def named_recipe(name: str, images: ImageSet, *, accelerated: bool) -> tuple[str, Recipe]:
    """The name and the recipe for a name; "auto" becomes the name of the recipe that suits the images best.

    Args:
        name: in `RECIPES`, or "imagefolder", "unet2d" or "sit", which depend on the images, or "auto".
        images: the training data.
        accelerated: whether there is a GPU.

    Raises:
        ValueError: if there is no such recipe.
    """
    check_choice("recipe", name, ("auto", *RECIPES, "imagefolder", "unet2d", "sit"))
    if name == "auto":
        built_in = (images.opening or {}).get("source") == "digits"
        name = "digits" if built_in else "mnist28" if images.shape == (1, 28, 28) else "imagefolder"
    if name in RECIPES:
        return name, RECIPES[name]
    make = {"unet2d": unet2d, "sit": sit}.get(name, imagefolder)
    recipe = make(images.shape, len(images), accelerated=accelerated)
    return name, recipe if images.scaling is None else _for_floats(recipe, images)


def _for_floats(recipe: Recipe, images: ImageSet) -> Recipe:
    """The recipe with as many levels as latents allow, which are never resized, and flips and turns for pictures alone."""
    shape = images.shape
    network = recipe.network
    if isinstance(network, SongUNetConfig | DiffusersUNetConfig):
        halvings = gcd(*shape[1:])
        levels = (halvings & -halvings).bit_length()
        if isinstance(network, SongUNetConfig):
            network = dataclasses.replace(network, multipliers=network.multipliers[:levels])
        else:
            network = dataclasses.replace(network, widths=network.widths[:levels])
    augmentation = recipe.augmentation if is_picture(shape) and images.moments is None else 0.0
    mirror = images.flipped is not None
    return dataclasses.replace(recipe, network=network, augmentation=augmentation, mirror=mirror)


def with_noise_distribution(recipe: Recipe, name: NoiseDistribution) -> Recipe:
    """The recipe with another distribution of the training noise levels, of the numbers that are usual for its process.

    Args:
        recipe: the recipe to change.
        name: of the distribution; "recipe" for the recipe's own.

    Raises:
        ValueError: if times of the recipe's process have no uniform distribution, or there is no such distribution.
    """
    check_choice("noise_distribution", name, get_args(NoiseDistribution))
    if name == "recipe":
        return recipe
    old, process = recipe.noise_levels, recipe.process
    if name == "uniform" and isinstance(process, EDM):
        raise ValueError(
            "noise_distribution=uniform: the time of an EDM process is its noise level, which has no end. Pass lognormal "
            "or loguniform, or a recipe of a flow, such as sit."
        )
    flow = isinstance(process, RectifiedFlow)
    if name == "lognormal":
        new = LogNormal(0.0, 1.0) if flow else LogNormal()
    elif name == "loguniform":
        new = LogUniform(process.sigma_min, process.sigma_max) if isinstance(process, VE) else LogUniform()
    else:
        new = Uniform(0.0, 1.0) if flow else Uniform()
    return dataclasses.replace(recipe, noise_levels=dataclasses.replace(new, stratified=old.stratified))


def largest_resolution(name: str = "auto", *, accelerated: bool) -> int | None:
    """The largest default resolution for images of several sizes, in pixels per side.

    Args:
        name: name of the recipe, as for `named_recipe`.
        accelerated: whether there is a GPU.

    Returns:
        None for a recipe for images of one size.
    """
    if name in ("auto", "imagefolder", "unet2d", "sit"):
        return 64 if accelerated else 32
    return 64 if name == "celeba64-ve" else 32 if name.startswith("cifar10") else None


def unet2d(shape: Shape, count: int, *, accelerated: bool) -> Recipe:
    """A recipe for any images with diffusers' UNet2DModel, which has no augmentation condition.

    Args:
        shape: shape of one image, (C, H, W).
        count: number of images.
        accelerated: whether there is a GPU.
    """
    _require_sides("unet2d", shape)
    recipe = imagefolder((shape[0], max(16, shape[1]), max(16, shape[2])), count, accelerated=accelerated)
    assert isinstance(recipe.network, SongUNetConfig)
    widths = tuple(recipe.network.base_channels * multiplier for multiplier in recipe.network.multipliers)
    network = DiffusersUNetConfig(widths=widths, blocks=recipe.network.blocks, dropout=recipe.network.dropout)
    return dataclasses.replace(recipe, network=network, augmentation=0.0)


def sit(shape: Shape, count: int, *, accelerated: bool) -> Recipe:
    """A recipe for any images with the transformer SiT, as a rectified flow with logit-normal times.

    The patches are the smallest of which an image has at most 256, or 64 without a GPU.

    Args:
        shape: shape of one image, (C, H, W).
        count: number of images.
        accelerated: whether there is a GPU; without one, the network is small enough for a CPU.
    """
    _require_sides("sit", shape)
    height, width = shape[1:]
    most = 256 if accelerated else 64
    fitting = [side for side in range(2, min(height, width) // 4 + 1) if height % side == width % side == 0] or [1]
    patch = next((side for side in fitting if height * width // side**2 <= most), fitting[-1])
    recipe = imagefolder(shape, count, accelerated=accelerated)
    size = "S" if accelerated else "XXS" if min(height, width) < 16 else "XS"
    return dataclasses.replace(
        recipe,
        augmentation=0.0,
        network=SiTConfig.sized(size, patch),
        process=RectifiedFlow(),
        noise_levels=LogNormal(0.0, 1.0, stratified=True),
        weighting=FlowWeighting(),
        preconditioning=FlowPreconditioning(),
    )


def imagefolder(shape: Shape, count: int, *, accelerated: bool) -> Recipe:
    """A recipe for any images, latents, signals or vectors.

    Args:
        shape: shape of one image, (C, H, W), or of another sample.
        count: number of images.
        accelerated: whether there is a GPU; without one, the network is small enough for a CPU.
    """
    side = min(shape[1:]) if len(shape) == 3 else 0
    batch = min(256 if accelerated else 64, count)
    if side < 16:
        return dataclasses.replace(DIGITS, batch=min(DIGITS.batch, count))
    levels = 2 if side <= 16 else 3 if side <= 32 else 4
    width = 128 if accelerated else 32
    return Recipe(
        steps=200_000 if accelerated else 20_000,
        batch=batch,
        learning_rate=4e-4 if accelerated else 1e-3,
        ramp_images=100 * batch,
        decay_share=0.2,
        ema_half_life=min(500_000, 1000 * batch),
        augmentation=0.12,
        checkpoint_every=1000 if accelerated else 250,
        sample_every=1000 if accelerated else 250,
        precision="bf16" if accelerated else "float32",
        noise_levels=LogNormal(stratified=True) if accelerated else _BRIEF,
        network=SongUNetConfig(
            base_channels=width, multipliers=(1, 2, 2, 2)[:levels], blocks=3 if accelerated else 1, dropout=0.1
        ),
    )


def _require_sides(name: str, shape: Shape) -> None:
    if len(shape) != 3:
        raise ValueError(f"recipe={name} takes images or latents (C, H, W), and the samples have shape {shape}.")
