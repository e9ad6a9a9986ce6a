"""Make a run folder from a published network, so that every verb that opens a run can open it."""

from dataclasses import replace
from pathlib import Path

import stablefield
from stablefield._regular_file import sha256
from stablefield.diffusion._noise_levels import LogNormal, LogUniform, Uniform
from stablefield.diffusion._preconditioning import (
    DDPMPreconditioning,
    EDMPreconditioning,
    FlowPreconditioning,
    NamedPreconditioning,
    VPPreconditioning,
)
from stablefield.diffusion._process import EDM, VE, VP, RectifiedFlow
from stablefield.diffusion._weighting import EDMWeighting, FlowWeighting, SNRWeighting
from stablefield.interop._architecture import Architecture
from stablefield.interop._inert import plain_text
from stablefield.interop._published import PreconditioningName, PublishedNetwork, read_published
from stablefield.interop._sit_architecture import SiTArchitecture
from stablefield.training._checkpoint import State, Trained, save
from stablefield.training._recipe import Recipe, SiTConfig, SongUNetConfig
from stablefield.training._run import Run
from stablefield.training._run_config import RunConfig
from stablefield.training._run_folder import RunFolder

__all__ = ["import_run", "write_imported_run"]

_PUBLISHED_AUGMENTATION = 0.12


def import_run(
    file: str | Path, out: str | Path, *, preconditioning: PreconditioningName | None = None, heads: int | None = None
) -> Run:
    """Make a run from a published network: DDPM++, NCSN++, SiT or DiT. Executes nothing in the file.

        run = sf.interop.import_run("SiT-XL-2-256.pt", "runs/sit", preconditioning="flow")

    Args:
        file: a pickle of the EDM family (.pkl), a torch file (.pt, .pth) or safetensors.
        out: folder of the run, new or empty.
        preconditioning: the preconditioning that the network was trained with; needed if neither the file states it nor the
            config.json beside it, as `Run.export` writes it: "flow" for SiT's weights, "ddpm" for DiT's.
        heads: of the attention of a SiT or DiT; needed likewise for other widths than those of the published networks.

    Raises:
        ValueError: if the file holds no such network, or the folder is not empty or cannot be written.
    """
    file = Path(file)
    return Run(write_imported_run(Path(out), read_published(file, preconditioning, heads), file).path)


def write_imported_run(path: str | Path, network: PublishedNetwork, source: str | Path) -> RunFolder:
    """Write a run folder with the network's weights, at step 0, as both weights and their average.

    The recipe describes the network and the training that belongs to its preconditioning in the table of Karras et al. 2022.
    The file does not hold the other details of its training, so they stay unknown; a pickle of the EDM
    family and an export state the label dropout.

    Args:
        path: a new or empty folder.
        network: the network.
        source: its file.

    Raises:
        ValueError: if the folder is not empty or cannot be written, or no recipe can describe the network.
    """
    path, source = Path(path), Path(source)
    architecture = network.architecture
    recipe = _recipe(architecture, network.preconditioning)
    if "label_dropout" in network.manifest:
        recipe = replace(recipe, label_dropout=network.manifest["label_dropout"])
    denoiser = network.denoiser()
    config = RunConfig(
        data=f"imported from {plain_text(source.name)}",
        shape=(architecture.channels, *architecture.size),
        classes=architecture.classes,
        manifest={
            **network.manifest,
            "imported": plain_text(source.name),
            "sha256": sha256(source),
            "origin": network.origin,
        },
        recipe=recipe,
        version=stablefield.__version__,
    )
    folder = RunFolder.create(path, config)
    save(folder.checkpoint(0), State(0, 0), Trained(denoiser, {"ema": denoiser}))
    return folder


def _recipe(architecture: Architecture | SiTArchitecture, preconditioning: NamedPreconditioning) -> Recipe:
    if isinstance(architecture, SiTArchitecture):
        network, augmentation = _sit_config(architecture), 0.0
    else:
        network = _unet_config(architecture)
        augmentation = _PUBLISHED_AUGMENTATION if architecture.augment_dim else 0.0
    match preconditioning:
        case EDMPreconditioning(sigma_data):
            process, levels, weighting = EDM(), LogNormal(), EDMWeighting(sigma_data)
        case VPPreconditioning(beta_min, slope):
            process, levels, weighting = VP(beta_min, beta_min + slope), Uniform(1e-5, 1.0), SNRWeighting()
        case FlowPreconditioning():
            process, levels, weighting = RectifiedFlow(), Uniform(1e-5, 1.0), FlowWeighting()
        case DDPMPreconditioning(first, last, steps):
            # The limit of small steps of its table.
            process, levels, weighting = VP(first * steps, last * steps), Uniform(1e-5, 1.0), SNRWeighting()
        case _:
            process, levels, weighting = VE(0.02, 100.0), LogUniform(0.02, 100.0), SNRWeighting()
    return Recipe(
        network=network,
        process=process,
        noise_levels=levels,
        weighting=weighting,
        preconditioning=preconditioning,
        augmentation=augmentation,
        conditional=architecture.classes > 0,
    )


def _sit_config(architecture: SiTArchitecture) -> SiTConfig:
    return SiTConfig(
        patch_size=architecture.patch_size,
        width=architecture.width,
        depth=architecture.depth,
        heads=architecture.heads,
        mlp_ratio=architecture.mlp_ratio,
        learn_sigma=architecture.learn_sigma,
    )


def _unet_config(architecture: Architecture) -> SongUNetConfig:
    kinds = {"DDPM++": "ddpmpp", "NCSN++": "ncsnpp"}
    kind = kinds.get(architecture.name)
    supported = [height for height, width in architecture.sides if height * width <= 256][:1]
    if kind is None or architecture.augment_dim not in (0, 9) or list(architecture.attention) != supported:
        raise ValueError(
            f"the network is {architecture.name} with attention at {architecture.attention} and augmentation labels "
            f"{architecture.augment_dim} wide; a run holds DDPM++ or NCSN++ with attention at {tuple(supported)} and "
            "labels 9 wide or none. Use read_published(...).denoiser() in Python."
        )
    return SongUNetConfig(
        architecture="ncsnpp" if kind == "ncsnpp" else "ddpmpp",
        base_channels=architecture.base_channels,
        multipliers=architecture.multipliers,
        blocks=architecture.blocks,
    )
