"""`stablefield export RUN --out DIR`: write a trained model for other programs and people."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import tyro
from rich.markup import escape

from stablefield.cli.console import console, relative, shown_warnings
from stablefield.cli.places import check_new_folder
from stablefield.interop._export import Format
from stablefield.interop._hub import push_folder
from stablefield.interop._model_card import class_argument
from stablefield.training._run import Run

__all__ = ["Export"]


@dataclass(frozen=True)
class Export:
    """Write a run's model as a diffusers pipeline or as plain files, with a model card and samples."""

    run_folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    out: Path
    """Folder to write, new or empty."""
    format: Format = "diffusers"
    """A pipeline folder with its code, or safetensors and JSON alone."""
    ema: str = "half-life"
    """Which average of the weights: half-life, none, or a length such as 0.1, from the run's snapshots."""
    checkpoint: str = "newest"
    """Which checkpoint: newest, best for the one with the lowest held-out loss, or a step that is kept."""
    name: str = ""
    """Model name on the card; the run folder's by default."""
    samples: int = 64
    """Number of images in the card's picture; 0 for none."""
    steps: int = 18
    """Steps of Heun's method for these images."""
    vae: str = ""
    """The autoencoder's folder or name on a hub, if it has moved, or of one that decodes what an imported network draws; a
    pipeline of latents of images includes it."""
    push: str = ""
    """Also upload to this repository of a model hub, OWNER/NAME."""
    private: bool = False
    """Make that repository private; one that exists and is public is refused."""

    def run(self) -> int:
        """Write the folder, and print how to load it."""
        if self.push and self.push.count("/") != 1:
            raise ValueError(f"--push {self.push} is not the name of a repository: write OWNER/NAME.")
        if self.private and not self.push:
            raise ValueError(
                "--private is about the repository of --push: name one, --push OWNER/NAME, or leave it out."
            )
        if self.samples == 0 and self.steps != Export.steps:
            raise ValueError(
                f"--steps {self.steps} does nothing with --samples 0, which draws none: leave one of them out."
            )
        if self.push and find_spec("huggingface_hub") is None:
            raise ImportError('--push needs huggingface_hub: pip install "stablefield[diffusers]".')
        check_new_folder("--out", self.out)
        run = Run(self.run_folder)
        with shown_warnings():
            run.export(
                self.out,
                format=self.format,
                ema=self.ema,
                checkpoint=self.checkpoint,
                name=self.name,
                samples=self.samples,
                steps=self.steps,
                vae=self.vae,
            )
        console.print(f"written: {escape(relative(self.out))}")
        if self.format == "diffusers":
            console.print("load it:", style="bold")
            console.print("  from diffusers import DiffusionPipeline")
            path = escape(repr(relative(self.out)) if '"' in relative(self.out) else f'"{relative(self.out)}"')
            console.print(f"  pipe = DiffusionPipeline.from_pretrained({path}, trust_remote_code=True)")
            if run.config.classes:
                name = class_argument(run.config.class_names, run.config.learned_classes)
                guidance = ", guidance_scale=2.0" if run.config.recipe.label_dropout else ""
                console.print(f"  images = pipe(batch_size=4, class_labels={escape(name)}{guidance}).images")
        if self.push:
            console.print(f"pushed: {escape(push_folder(self.out, self.push, private=self.private))}")
        return 0
