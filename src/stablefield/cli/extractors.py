"""Which network looks at the images: from the words on the command line to an extractor."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from stablefield.evaluation._extractor import Extractor, RandomConvolutions, RawPixels
from stablefield.evaluation._inception import Inception
from stablefield.evaluation._torchscript import (
    IMAGENET,
    AntialiasedBicubic,
    Channels,
    Resize,
    TensorFlowBilinear,
    TorchScriptExtractor,
    dinov2,
)

__all__ = ["ExtractorFlags"]

_SCALES: dict[str, tuple[Channels, Channels]] = {
    "unit": ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
    "symmetric": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "imagenet": IMAGENET,
}


@dataclass(frozen=True)
class ExtractorFlags:
    """What looks at the images."""

    extractor: Literal["inception", "dinov2", "torchscript", "pixels", "random"] = "inception"
    """inception is FID's own (extra stablefield[fid]); dinov2 and torchscript take --extractor-file; random a small net."""
    extractor_file: Path | None = None
    """TorchScript file of the network; it is a program, so take only one that you trust."""
    extractor_size: int | None = None
    """Pixels a side that the network of --extractor torchscript wants; as they come by default."""
    extractor_resize: Literal["bicubic", "tensorflow"] = "bicubic"
    """How images get to that size: by an antialiased bicubic kernel, or TensorFlow 1's bilinear one."""
    extractor_scale: Literal["unit", "symmetric", "imagenet"] = "imagenet"
    """How its images are scaled: to 0..1, to -1..1, or by ImageNet's mean and deviation."""
    classifier: Path | None = None
    """TorchScript file of a classifier that returns logits, for classifier-score; images as for --extractor torchscript."""

    def check(self) -> None:
        """Find out whether the flags fit together.

        Raises:
            ValueError: naming the flag.
        """
        if self.extractor in ("dinov2", "torchscript") and self.extractor_file is None:
            raise ValueError(
                f"--extractor {self.extractor} needs --extractor-file: the TorchScript file of the network, which this "
                "package does not carry."
            )
        if self.extractor in ("pixels", "random") and self.extractor_file is not None:
            raise ValueError(
                f"--extractor-file {self.extractor_file}: --extractor {self.extractor} reads none; name inception, dinov2 "
                "or torchscript."
            )
        if self.extractor_size is not None and self.extractor_size < 1:
            raise ValueError(f"--extractor-size is {self.extractor_size}: it is a number of pixels.")

    def open(self, shape: tuple[int, int, int], device: torch.device) -> Extractor:
        """The extractor, for images of `shape` (C, H, W).

        Raises:
            ValueError: if its file is missing or is no such network.
            ImportError: if its package is missing, with the command that installs it.
        """
        file = self.extractor_file
        if self.extractor == "inception":
            try:
                return Inception(file, device=device)
            except ImportError as error:
                raise ImportError(
                    f"{error} Other extractors need no download: --extractor pixels, --extractor random.",
                    name=error.name,
                ) from error
        if self.extractor == "pixels":
            return RawPixels(shape)
        if self.extractor == "random" or file is None:
            return RandomConvolutions(device=device)
        return dinov2(file, device=device) if self.extractor == "dinov2" else self._network(file, device)

    def open_classifier(self, device: torch.device) -> Extractor | None:
        """The classifier, if there is one.

        Raises:
            ValueError: if its file is missing or is no such network.
        """
        return None if self.classifier is None else self._network(self.classifier, device)

    def _network(self, file: Path, device: torch.device) -> TorchScriptExtractor:
        resize: Resize | None = None
        if self.extractor_size is not None:
            kernels = {"bicubic": AntialiasedBicubic, "tensorflow": TensorFlowBilinear}
            resize = kernels[self.extractor_resize](self.extractor_size)
        offset, scale = _SCALES[self.extractor_scale]
        return TorchScriptExtractor(file, name=file.stem, resize=resize, offset=offset, scale=scale, device=device)
