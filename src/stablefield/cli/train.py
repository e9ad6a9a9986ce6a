"""`stablefield train DATA`: train a model and leave a run folder."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

import stablefield
from stablefield.cli.console import console, relative
from stablefield.cli.interruption import Interruption
from stablefield.cli.progress import TrainingProgress
from stablefield.cli.sources import open_data
from stablefield.training.loop import check_fit, train
from stablefield.training.recipe import DIGITS, Recipe
from stablefield.training.run_folder import RunConfig, RunFolder

__all__ = ["RECIPES", "Train", "pick_device"]

RECIPES = {"digits": DIGITS}


@dataclass(frozen=True)
class Train:
    """Train a diffusion model with the stable target (or with the single-sample one)."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA", help_behavior_hint="")] = ""
    """What to train on: digits (built in), a folder or .zip of images, .npy, .npz, idx or CIFAR-10 files."""
    out: Path | None = None
    """Folder of the run, new or empty; runs/DATA-TARGET with a number if not given."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint, as it was configured."""
    recipe: Literal["digits"] = "digits"
    """Which settings to start from; the flags below change them."""
    device: str = ""
    """Where to compute, such as cpu or cuda; a GPU if there is one."""
    config: Annotated[Recipe, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Recipe)
    """What the run does."""

    def run(self) -> int:
        """Train, with a progress bar, and say what is where."""
        device = pick_device(self.device)
        if self.resume:
            folder, config = self._existing()
            data = open_data(config.data)
        else:
            if not self.data:
                raise ValueError("DATA is missing: name what to train on, such as: stablefield train digits.")
            data = open_data(self.data)
            check_fit(self.config, data)
            config = RunConfig(
                data=self.data,
                shape=data.shape,
                classes=data.classes if self.config.conditional else 0,
                manifest=data.manifest,
                recipe=self.config,
                version=stablefield.__version__,
            )
            folder = RunFolder.create(self.out or _free_name(f"{data.name}-{self.config.target}"), config)
        recipe = config.recipe
        references = f", {recipe.references} references" if recipe.target == "stf" else ""
        console.print(
            f"[bold]{recipe.target.upper()}[/] on {data.name}: {len(data):,} images of "
            f"{'x'.join(map(str, data.shape))}, {recipe.steps:,} steps of {recipe.batch}{references}, on {device}"
        )
        console.print(f"run folder: {relative(folder.path)}")
        with TrainingProgress(recipe.steps) as progress, Interruption() as interruption:
            done = train(
                folder, config, data, device=device, report=progress.update, stop=lambda: interruption.requested
            )
        if done < recipe.steps:
            console.print(
                f"stopped at step {done:,}; to go on: stablefield train --resume --out {relative(folder.path)}"
            )
        console.print(f"samples:    {relative(folder.picture(done))}")
        console.print(f"draw more:  stablefield sample {relative(folder.path)} --seeds 0-63")
        return 0

    def _existing(self) -> tuple[RunFolder, RunConfig]:
        if self.out is None:
            raise ValueError("--resume needs --out: name the folder of the run to continue.")
        folder = RunFolder.open(self.out)
        newest = folder.newest()
        if newest is None:
            console.print("this run has no checkpoint yet: it starts from its first step.")
        else:
            for complaint in newest[2]:
                console.print(f"[yellow]passed over:[/] {complaint}")
            console.print(f"continuing from step {newest[1].step:,}")
        return folder, folder.config()


def pick_device(name: str) -> torch.device:
    """The device called `name`, or a GPU if there is one, else the CPU.

    Raises:
        ValueError: if it cannot be used.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _free_name(name: str) -> Path:
    # A run never overwrites another: the second is called -2.
    number = 1
    while (path := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path
