"""The input of an evaluation: samples from a source or as images, and real images to measure them against."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield._distributed import Ranks
from stablefield._progress import Progress
from stablefield.data._autoencoder import Autoencoder
from stablefield.data._image_set import ImageSet
from stablefield.data._source import Images, as_image_set, open_images, warned
from stablefield.evaluation._extraction import Batch, image_batches
from stablefield.evaluation._extractor import check_images

__all__ = ["ImageSource", "Report", "SampleSource", "SamplingRecord", "check_size", "opened"]

Report = Callable[[Progress], object]
"""Called with the stage and its progress."""


@dataclass(frozen=True, kw_only=True)
class SamplingRecord:
    """The sampling, for the protocol; all None for given images."""

    sampler: str | None = None
    """The sampler with its options."""
    steps: int | None = None
    """Its steps; also None for an adaptive one."""
    nfe: float | None = None
    """Network evaluations per sample."""
    ema: str | None = None
    """The average of the weights and its step."""
    commit: str | None = None
    """Commit of the code that drew the samples."""


class SampleSource(ABC):
    """A source of samples, such as a run; every call draws the same samples for a repeat.

    Attributes:
        name: its name in a report.
        shape: (C, H, W) of the samples, or another shape of float data.
        count: samples per repeat.
        floating: whether they are float data rather than 8-bit images.
        autoencoder: that decodes them; None if they are not decoded.
        encoder: sha256 of the autoencoder whose latents they are, or were before they were decoded; None if unknown.
        class_names: names of the classes, if known.
        mirrored: whether it trained on the mirror images of its training images, too.
    """

    name: str
    shape: tuple[int, ...]
    count: int
    floating: bool = False
    autoencoder: Autoencoder | None = None
    encoder: str | None = None
    class_names: tuple[str, ...] | None = None
    mirrored: bool = False

    def check(self, name: str, images: ImageSet) -> None:
        """Check that real data, the argument `name`, are no latents of another autoencoder than the samples.

        Raises:
            ValueError: if they are.
        """
        record = images.autoencoder
        if record is not None and self.encoder not in (None, record.sha256):
            raise ValueError(
                f"{name}={images.name} are latents of the autoencoder {record.sha256:.12}, and the samples of "
                f"{self.encoder:.12}: pass latents of the same one, or, for decoded samples, images."
            )

    @abstractmethod
    def batches(self, repeat: int, ranks: Ranks, progress: Report | None) -> Iterator[Batch]:
        """This process's samples of a repeat: images, uint8 (B, C, H, W), and their numbers (B,) from 0 to count - 1."""

    def seeds(self, repeat: int) -> str | None:  # noqa: ARG002
        """The seeds of a repeat, such as "0-4999"; None if there are none."""
        return None

    def labels(self, repeat: int, numbers: Tensor) -> Tensor | None:  # noqa: ARG002
        """Classes (B,) of samples of a repeat, by their numbers; None without classes."""
        return None

    def held_out(self, images: ImageSet) -> NDArray[np.int64] | None:  # noqa: ARG002
        """Indices, in increasing order, of those of its training images that it did not train on.

        None if there are none, or `images` are not its training images as they were opened for the training.
        """
        return None

    def seconds(self) -> float:
        """Estimate how long one process draws the samples of a repeat; 0 for given images."""
        return 0.0

    def record(self, ranks: Ranks) -> SamplingRecord:  # noqa: ARG002
        """The protocol of the sampling, after it; every process calls this."""
        return SamplingRecord()


def opened(name: str, images: Images, split: str, progress: Report | None) -> ImageSet:
    """The argument `name` as an image set."""
    if isinstance(images, ImageSet):
        return images
    if isinstance(images, str | Path):
        if (Path(images) / "config.json").is_file():
            raise ValueError(f"{name}={str(images)!r} is a run: evaluate it by Run({str(images)!r}).evaluate(...).")
        return warned(name, open_images(images, split=split, progress=progress))
    try:
        if isinstance(images, Tensor) and not images.is_floating_point():
            check_images(images)
        return as_image_set(name, images)
    except ValueError as error:
        if str(error).startswith(name):
            raise
        raise ValueError(f"{name}: {error}") from error


def check_size(name: str, images: ImageSet, shape: Sequence[int], *, floating: bool = False) -> ImageSet:
    """Check that the images have the samples' shape and kind, and return them.

    Raises:
        ValueError: if they have another shape, or one of the two is 8-bit images and the other floats.
    """
    if (images.scaling is not None) != floating:
        kind = "floats" if floating else "8-bit images"
        remedy = "pass floats, in the units of the samples" if floating else "pass uint8, 0 to 255"
        raise ValueError(f"{name} has dtype {images.images.dtype}: {remedy}, because the samples are {kind}.")
    if tuple(images.shape) == tuple(shape):
        return images
    found, wanted = (" x ".join(map(str, sizes)) for sizes in (images.shape, shape))
    if floating:
        raise ValueError(f"{name}={images.name} has samples of {found}, and the others are {wanted}: pass one shape.")
    channels, height, width = shape
    remedies: list[str] = []
    if images.shape[1:] != (height, width):
        remedies.append(f"resolution={height if height == width else (height, width)}")
    if images.shape[0] != channels:
        remedies.append(f"colour={'grey' if channels == 1 else 'rgb'}")
    raise ValueError(
        f"{name}={images.name} has images of {found} (C x H x W), and the samples are {wanted}: measure images of one "
        f"shape; open them with {' and '.join(remedies)}."
    )


class ImageSource(SampleSource):
    """Given images; each repeat takes its own.

    Raises:
        ValueError: if there are too few.
    """

    def __init__(
        self, samples: Images, count: int | None, repeats: int, seed: int, batch: int, progress: Report | None
    ) -> None:
        self._images = opened("samples", samples, "train", progress)
        self._batch = batch
        self.name = str(samples) if isinstance(samples, str | Path) else self._images.name
        self.shape, self.floating = self._images.shape, self._images.scaling is not None
        self.class_names = self._images.class_names
        self.encoder = None if self._images.autoencoder is None else self._images.autoencoder.sha256
        n = len(self._images)
        self.count = n // repeats if count is None else count
        if self.count * repeats > n or self.count < 1:
            raise ValueError(
                f"count={self.count} in {repeats} repeats take {self.count * repeats} images, and {self.name} has {n}: "
                "pass fewer, since every repeat takes its own images."
            )
        # Sets are often sorted by class, so draw repeats and subsets at random.
        order = np.random.default_rng(seed).permutation(n)
        self._rows = [np.sort(order[r * self.count : (r + 1) * self.count]) for r in range(repeats)]

    def batches(self, repeat: int, ranks: Ranks, progress: Report | None) -> Iterator[Batch]:
        """This process's images of a repeat."""
        stage = self._images.name if len(self._rows) == 1 else f"{self._images.name}, repeat {repeat + 1}"
        return image_batches(self._images.images, self._rows[repeat], self._batch, ranks, progress, stage)

    def labels(self, repeat: int, numbers: Tensor) -> Tensor | None:
        """Classes of images of a repeat, by their numbers (B,); None if the images have none."""
        labels = self._images.labels
        return None if labels is None else torch.from_numpy(labels[self._rows[repeat][numbers.numpy()]])
