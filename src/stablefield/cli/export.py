"""`stablefield export RUN --out DIR`: a trained model for other programs, and for other people."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.markup import escape

from stablefield import sampling
from stablefield.cli.console import console, relative
from stablefield.cli.places import check_new_folder
from stablefield.data.png import class_grid, write_png
from stablefield.interop.hub import push_folder
from stablefield.interop.model_card import ModelCard, public_name, results_of_run
from stablefield.interop.pipeline_folder import write_pipeline
from stablefield.interop.plain_export import write_plain
from stablefield.training.model import draw, open_model

__all__ = ["Export"]

_GRID = "samples.png"


@dataclass(frozen=True)
class Export:
    """Write a run's model as a diffusers pipeline or as plain files, with a model card and samples."""

    run_folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    out: Path
    """Folder to write, new or empty."""
    format: Literal["diffusers", "plain"] = "diffusers"
    """A pipeline folder with its code, or safetensors and JSON alone."""
    ema: str = "half-life"
    """Which average of the weights: half-life, none, or a length such as 0.1 of the run's snapshots."""
    name: str = ""
    """Name of the model on its card; that of the run's folder if not given."""
    samples: int = 64
    """Images in the card's picture; 0 for none."""
    steps: int = 18
    """Steps of Heun's method for them."""
    push: str = ""
    """Upload to this repository of a model hub, OWNER/NAME."""
    private: bool = False
    """Make that repository a private one."""

    def run(self) -> int:
        """Write the folder, and say how it is loaded."""
        if self.samples < 0:
            raise ValueError(f"--samples is {self.samples}: it must not be negative.")
        if self.push and self.push.count("/") != 1:
            raise ValueError(f"--push {self.push} is no name of a repository: write OWNER/NAME.")
        if self.push and find_spec("huggingface_hub") is None:
            raise ImportError('--push needs huggingface_hub: pip install "stablefield[diffusers]".')
        if self.format == "diffusers" and find_spec("diffusers") is None:
            raise ImportError('--format diffusers needs diffusers: pip install "stablefield[diffusers]".')
        check_new_folder("--out", self.out)
        sigmas = sampling.edm_sigmas(self.steps)
        model = open_model(self.run_folder, self.ema)
        config, denoiser = model.config, model.denoiser
        for complaint in model.complaints:
            console.print(f"[yellow]passed over:[/] {escape(complaint)}")
        results = results_of_run(self.run_folder)
        # A network that is told classes shows them in turn.
        labels = torch.arange(self.samples) % config.classes if config.classes else None
        write = write_pipeline if self.format == "diffusers" else write_plain
        write(self.out, denoiser, config.shape, class_names=config.class_names)
        if self.samples:
            images = draw(
                lambda x, _: sampling.heun(lambda x, sigma: denoiser(x, sigma, labels), x, sigmas),
                config.shape,
                range(self.samples),
                float(sigmas[0]),
                torch.device("cpu"),
            )
            numbers = None if labels is None else labels.numpy()
            write_png(self.out / _GRID, class_grid(images, numbers, config.class_names))
        card = ModelCard(
            name=self.name or public_name(str(self.run_folder.resolve())) or "model",
            data=config.data,
            shape=config.shape,
            classes=config.classes,
            class_names=config.class_names,
            parameters=sum(parameter.numel() for parameter in denoiser.parameters()),
            recipe=config.recipe,
            step=model.step,
            ema=model.ema,
            version=config.version,
            results=results,
            grid=_GRID if self.samples else None,
            pipeline=self.format == "diffusers",
        )
        (self.out / "README.md").write_text(card.text(), "utf-8")
        console.print(f"written: {escape(relative(self.out))}")
        if self.format == "diffusers":
            console.print("load it:", style="bold")
            console.print("  from diffusers import DiffusionPipeline")
            path = escape(repr(relative(self.out)) if '"' in relative(self.out) else f'"{relative(self.out)}"')
            console.print(f"  pipe = DiffusionPipeline.from_pretrained({path}, trust_remote_code=True)")
        if self.push:
            console.print(f"pushed: {escape(push_folder(self.out, self.push, private=self.private))}")
        return 0
