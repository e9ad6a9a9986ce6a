"""A run folder made of a published network, so that all verbs that open a run open it."""

from pathlib import Path
from typing import Literal

import stablefield
from stablefield._regular_file import sha256
from stablefield.diffusion._noise_levels import LogNormal, LogUniform, Uniform
from stablefield.diffusion._preconditioning import EDMPreconditioning, VPPreconditioning
from stablefield.diffusion._process import EDM, VE, VP
from stablefield.diffusion._weighting import EDMWeighting, SNRWeighting
from stablefield.interop._architecture import Architecture
from stablefield.interop._inert import plain_text
from stablefield.interop._published import Preconditionings, PublishedNetwork, read_published
from stablefield.training._checkpoint import State, Trained, save
from stablefield.training._recipe import Recipe, SongUNetConfig
from stablefield.training._run import Run
from stablefield.training._run_folder import RunConfig, RunFolder

__all__ = ["import_run", "write_imported_run"]

_PUBLISHED_AUGMENTATION = 0.12


def import_run(file: str | Path, out: str | Path, *, preconditioning: Literal["edm", "vp", "ve"] | None = None) -> Run:
    """Make a run of a published network. Nothing in the file is executed, whatever it holds.

    Args:
        file: a pickle of the EDM family (.pkl), a torch file (.pt, .pth) or safetensors.
        out: folder of the run, new or empty.
        preconditioning: scalings that the network was trained in; needed where the file does not say.

    Raises:
        ValueError: if the file holds no such network, or the folder is not empty or cannot be written.
    """
    file = Path(file)
    return Run(write_imported_run(Path(out), read_published(file, preconditioning), file).path)


def write_imported_run(path: Path, network: PublishedNetwork, source: Path) -> RunFolder:
    """Write a run folder with the network's weights, at step 0, as both weights and their average.

    The recipe says what the network is and, of its training, what goes with its preconditioning by the table of Karras
    et al. 2022; what else its authors did is not in the file and not known.

    Args:
        path: a new or empty folder.
        network: what was read.
        source: the file that it was read from.

    Raises:
        ValueError: if the folder is not empty or cannot be written, or the network is none that a recipe describes.
    """
    architecture = network.architecture
    recipe = _recipe(architecture, network.preconditioning)
    denoiser = network.denoiser()
    config = RunConfig(
        data=f"imported from {plain_text(source.name)}",
        shape=(architecture.channels, *architecture.size),
        classes=architecture.classes,
        manifest={"imported": plain_text(source.name), "sha256": sha256(source), "origin": network.origin},
        recipe=recipe,
        version=stablefield.__version__,
    )
    folder = RunFolder.create(path, config)
    save(folder.checkpoint(0), State(0, 0), Trained(denoiser, {"ema": denoiser}))
    return folder


def _recipe(architecture: Architecture, preconditioning: Preconditionings) -> Recipe:
    kinds = {"DDPM++": "ddpmpp", "NCSN++": "ncsnpp"}
    kind = kinds.get(architecture.name)
    usual = [height for height, width in architecture.sides if height * width <= 256][:1]
    if kind is None or architecture.augment_dim not in (0, 9) or list(architecture.attention) != usual:
        raise ValueError(
            f"the network is {architecture.name} with attention at {architecture.attention} and augmentation labels "
            f"{architecture.augment_dim} wide; a run holds DDPM++ or NCSN++ with attention at {tuple(usual)} and "
            "labels 9 wide or none. Use read_published(...).denoiser() in Python."
        )
    unet = SongUNetConfig(
        architecture="ncsnpp" if kind == "ncsnpp" else "ddpmpp",
        base_channels=architecture.base_channels,
        multipliers=architecture.multipliers,
        blocks=architecture.blocks,
    )
    match preconditioning:
        case EDMPreconditioning(sigma_data):
            process, levels, weighting = EDM(), LogNormal(), EDMWeighting(sigma_data)
        case VPPreconditioning(beta_min, slope):
            process, levels, weighting = VP(beta_min, beta_min + slope), Uniform(1e-5, 1.0), SNRWeighting()
        case _:
            process, levels, weighting = VE(0.02, 100.0), LogUniform(0.02, 100.0), SNRWeighting()
    return Recipe(
        network=unet,
        process=process,
        noise_levels=levels,
        weighting=weighting,
        preconditioning=preconditioning,
        augmentation=_PUBLISHED_AUGMENTATION if architecture.augment_dim else 0.0,
        conditional=architecture.classes > 0,
    )
