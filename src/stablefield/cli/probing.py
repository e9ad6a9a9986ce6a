"""What every probe is told, and the data set that it draws."""

from dataclasses import dataclass
from pathlib import Path

import torch

from stablefield.cli.console import console
from stablefield.data.image_set import ImageSet
from stablefield.probing.population import Population, draw_population

__all__ = ["Probing", "read_levels"]


@dataclass(frozen=True, kw_only=True)
class Probing:
    """What a probe is told, be it of data or of a run."""

    most: int
    """Images that the data set may have; of more, so many are drawn."""
    sources: int | None
    """Images that noisy rows are made from; None where the probe is to choose."""
    seed: int
    """Decides all that is drawn."""
    out: Path | None
    """Folder for what is written; None where the probe is to choose."""
    device: torch.device
    """Where to compute."""
    command: str
    """The command line, for records and reports."""

    def population(
        self,
        images: ImageSet,
        *,
        by_class: bool,
        most: int | None = None,
        said: str = "{part} stand for the data set (--images)",
    ) -> Population:
        """The data set on the device, and a line if it is a part of the images.

        Args:
            images: to draw from.
            by_class: whether posteriors stay within classes.
            most: images that it may have; `self.most` by default.
            said: the line; {part} is how many of how many images.
        """
        most = self.most if most is None else most
        population = draw_population(images, most=most, by_class=by_class, seed=self.seed)
        if population.drawn_from is not None:
            part = f"{len(population):,} of {len(images):,} images"
            console.print(f"[yellow]sampled:[/] {said.format(part=part)}")
        labels = None if population.labels is None else population.labels.to(self.device)
        return Population(population.data.to(self.device), labels, population.drawn_from)


def read_levels(text: str) -> list[float] | None:
    """The noise levels that --noise-levels means; None where it means none.

    Raises:
        ValueError: if there is something other than numbers.
    """
    if not text.strip():
        return None
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--noise-levels is {text}: pass numbers such as 0.5,1,2.") from None
