"""What an evaluation is of: samples, drawn by a source or found as images, and real images to measure them against."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stablefield._distributed import Ranks
from stablefield._progress import Progress
from stablefield.data._image_set import ImageSet
from stablefield.data._source import as_image_set, open_images
from stablefield.evaluation._extraction import Batch, image_batches
from stablefield.evaluation._extractor import check_images

__all__ = ["ImageSource", "Images", "Report", "SampleSource", "SamplingRecord", "check_size", "opened"]

Images = str | Path | ImageSet | NDArray[np.uint8] | Tensor
"""Images: whatever `open_images` opens, an image set, or uint8 of shape (n, C, H, W)."""
Report = Callable[[Progress], object]
"""Called with the stage and how much of it is done."""


@dataclass(frozen=True, kw_only=True)
class SamplingRecord:
    """How samples were made, for the protocol; all None for images that were found."""

    sampler: str | None = None
    """The sampler with its options."""
    steps: int | None = None
    """Its steps; None also for an adaptive one."""
    nfe: float | None = None
    """Network evaluations per sample."""
    ema: str | None = None
    """Which average of the weights, of which step."""
    commit: str | None = None
    """Of the code that drew them."""


class SampleSource(ABC):
    """Whatever draws samples, such as a run: the same samples for a repeat whenever it is asked.

    Attributes:
        name: what to call it in a report.
        shape: (C, H, W) of the samples.
        count: samples of each repeat.
        class_names: what the classes are called, if that is known.
    """

    name: str
    shape: tuple[int, int, int]
    count: int
    class_names: tuple[str, ...] | None = None

    @abstractmethod
    def batches(self, repeat: int, ranks: Ranks, progress: Report | None) -> Iterator[Batch]:
        """This process's samples of a repeat: images, uint8 (B, C, H, W), and their numbers (B,) from 0 to count - 1."""

    def seeds(self, repeat: int) -> str | None:  # noqa: ARG002
        """The seeds of a repeat, such as "0-4999"; None if there are none."""
        return None

    def labels(self, repeat: int, numbers: Tensor) -> Tensor | None:  # noqa: ARG002
        """Classes (B,) of samples of a repeat, by their numbers; None where there are no classes."""
        return None

    def seconds(self) -> float:
        """About how long one process would draw the samples of a repeat; 0 where they are there."""
        return 0.0

    def record(self, ranks: Ranks) -> SamplingRecord:  # noqa: ARG002
        """How the samples were made, once they are; every process asks."""
        return SamplingRecord()


def opened(name: str, images: Images, split: str, progress: Report | None) -> ImageSet:
    """The argument `name` as an image set."""
    if isinstance(images, ImageSet):
        return images
    if isinstance(images, str | Path):
        if (Path(images) / "config.json").is_file():
            raise ValueError(f"{name}={str(images)!r} is a run: evaluate it by Run({str(images)!r}).evaluate(...).")
        return open_images(images, split=split, progress=progress)
    try:
        if isinstance(images, Tensor):
            check_images(images)
        return as_image_set(name, images)
    except ValueError as error:
        if str(error).startswith(name):
            raise
        raise ValueError(f"{name}: {error}") from error


def check_size(name: str, images: ImageSet, shape: Sequence[int]) -> ImageSet:
    """The same images, after making sure that they are of the samples' shape (C, H, W).

    Raises:
        ValueError: if they are not.
    """
    if tuple(images.shape) == tuple(shape):
        return images
    _, height, width = shape
    remedy = f"; opened with resolution={height} they are, if the channels agree" if height == width else ""
    raise ValueError(
        f"{name}={images.name} has images of {' x '.join(map(str, images.shape))} (C x H x W), and the samples are "
        f"{' x '.join(map(str, shape))}: measure images of one size{remedy}."
    )


class ImageSource(SampleSource):
    """Images that were found; each repeat takes its own.

    Raises:
        ValueError: if there are not as many.
    """

    def __init__(
        self, samples: Images, count: int | None, repeats: int, seed: int, batch: int, progress: Report | None
    ) -> None:
        self._images = opened("samples", samples, "train", progress)
        self._batch = batch
        self.name = str(samples) if isinstance(samples, str | Path) else self._images.name
        self.shape = self._images.shape
        n = len(self._images)
        self.count = n // repeats if count is None else count
        if self.count * repeats > n or self.count < 1:
            raise ValueError(
                f"count={self.count} in {repeats} repeats take {self.count * repeats} images, and {self.name} has {n}: "
                "every repeat takes images of its own."
            )
        # Sets are often sorted by class: repeats, and parts, are drawn at random.
        order = np.random.default_rng(seed).permutation(n)
        self._rows = [np.sort(order[r * self.count : (r + 1) * self.count]) for r in range(repeats)]

    def batches(self, repeat: int, ranks: Ranks, progress: Report | None) -> Iterator[Batch]:
        """This process's images of a repeat."""
        stage = self._images.name if len(self._rows) == 1 else f"{self._images.name}, repeat {repeat + 1}"
        return image_batches(self._images.images, self._rows[repeat], self._batch, ranks, progress, stage)
