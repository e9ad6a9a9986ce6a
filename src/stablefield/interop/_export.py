"""Export a run's model as a diffusers pipeline or plain files, with a model card and a picture of samples."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import torch

from stablefield import sampling
from stablefield._shapes import check_choice, whole_number
from stablefield.data._png import class_grid, write_png
from stablefield.interop._model_card import ModelCard, public_name, results_of_run
from stablefield.interop._pipeline_folder import write_pipeline
from stablefield.interop._plain_export import write_plain
from stablefield.sampling._seeded_images import in_turn
from stablefield.training._model import OpenModel
from stablefield.training._sampler import SamplerOptions
from stablefield.training._samples import draw_samples

__all__ = ["Format", "export_run"]

Format = Literal["diffusers", "plain"]
_GRID = "samples.png"


def export_run(
    run: Path,
    model: OpenModel,
    folder: Path,
    *,
    format: Format = "diffusers",  # noqa: A002
    name: str = "",
    samples: int = 64,
    steps: int = 18,
    vae: str | Path = "",
) -> Path:
    """Write a run's model for other programs; arguments and errors as for `Run.export`.

    Args:
        run: the run's folder; the card lists its evaluations.
        model: its model.
        folder: the folder to write, new or empty.
        format: "diffusers" or "plain".
        name: of the model on its card; the name of the run's folder if empty.
        samples: images in the card's picture; 0 for none, as of data that are no pictures.
        steps: of Heun's method for them.
        vae: the autoencoder's place, if it has moved, or of one that decodes what an imported network draws.

    Returns:
        The folder.
    """
    check_choice("format", format, get_args(Format))
    whole_number("samples", samples, 0)
    if format == "diffusers" and find_spec("diffusers") is None:
        raise ImportError('format=diffusers needs diffusers: pip install "stablefield[diffusers]".')
    sigmas = sampling.edm_sigmas(steps)
    config, denoiser = model.config, model.denoiser
    results = results_of_run(run)
    cpu, autoencoder = torch.device("cpu"), None
    if vae and config.autoencoder is None:
        # An imported network, which knows no autoencoder, sees latents as the autoencoder itself scales them.
        autoencoder = SamplerOptions(vae=str(vae)).autoencoder(config, cpu)
        assert autoencoder is not None
        record = autoencoder.record(autoencoder.image_shape(config.shape))
        scaling = record.scaling(config.shape[0], "float32")
        known = {"autoencoder": record.record, "scaling": scaling.record}
        config = replace(config, manifest={**config.manifest, **known})
    pictures = samples > 0 and config.picture_shape is not None
    if autoencoder is None and config.autoencoder is not None and (pictures or format == "diffusers"):
        # A pipeline includes the autoencoder, and the card's picture is decoded.
        autoencoder = config.autoencoder.open(vae, cpu)
    if format == "diffusers":
        learned = config.learned_classes
        write_pipeline(
            folder,
            denoiser,
            config.shape,
            class_names=config.class_names,
            scaling=config.scaling,
            autoencoder=autoencoder,
            label_dropout=config.label_dropout,
            learned_classes=None if len(learned) == config.classes else learned,
        )
    else:
        write_plain(
            folder,
            denoiser,
            config.shape,
            class_names=config.class_names,
            scaling=config.scaling,
            autoencoder=config.autoencoder,
            label_dropout=config.label_dropout,
        )
    if pictures:
        # The picture of a network with classes cycles through them.
        numbers = in_turn(config.learned_classes, range(samples)).numpy() if config.classes else None
        images = draw_samples(denoiser, config, range(samples), cpu, sigmas=sigmas, autoencoder=autoencoder).numpy()
        write_png(folder / _GRID, class_grid(images, numbers, config.class_names))
    card = ModelCard(
        name=name or public_name(str(run.resolve())) or "model",
        data=config.data,
        shape=config.shape,
        classes=config.classes,
        class_names=config.class_names,
        parameters=sum(parameter.numel() for parameter in denoiser.parameters()),
        recipe=config.recipe,
        label_dropout=config.label_dropout,
        learned_classes=config.learned_classes,
        step=model.step,
        ema=model.average,
        version=config.version,
        results=results,
        grid=_GRID if pictures else None,
        floating=config.dtype != "uint8",
        autoencoder=config.autoencoder,
        scaling=config.scaling,
        pipeline=format == "diffusers",
    )
    (folder / "README.md").write_text(card.text(), "utf-8")
    return folder
