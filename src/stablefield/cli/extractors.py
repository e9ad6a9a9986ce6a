"""The network that measures the images: from flags to an extractor."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from stablefield.evaluation._extractor import Extractor, RandomConvolutions, RawPixels, RawValues
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

Name = Literal["auto", "inception", "dinov2", "torchscript", "pixels", "random"]

_SCALES: dict[str, tuple[Channels, Channels]] = {
    "unit": ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
    "symmetric": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "imagenet": IMAGENET,
}


@dataclass(frozen=True)
class ExtractorFlags:
    """The network that measures the images."""

    extractor: Name = "auto"
    """inception is FID's own (extra stablefield[fid]); dinov2 and torchscript need --extractor-file; random: a small net;
    pixels: the values themselves. auto: inception (for train random), and of float data the values."""
    extractor_file: Path | None = None
    """TorchScript file of the network. It is a program: use only files that you trust."""
    extractor_size: int | None = None
    """Image size for --extractor torchscript, in pixels a side; by default no resizing."""
    extractor_resize: Literal["bicubic", "tensorflow"] = "bicubic"
    """Kernel that resizes to --extractor-size: antialiased bicubic, or TensorFlow 1's bilinear."""
    extractor_scale: Literal["unit", "symmetric", "imagenet"] = "imagenet"
    """Scaling for --extractor torchscript: to 0..1, to -1..1, or by ImageNet's mean and deviation."""

    def check(self, classifier: Path | None = None) -> None:
        """Check that the flags fit together.

        Args:
            classifier: the file of a classifier, whose images these flags prepare, too.

        Raises:
            ValueError: naming the flag.
        """
        if self.extractor in ("dinov2", "torchscript") and self.extractor_file is None:
            raise ValueError(
                f"--extractor {self.extractor} needs --extractor-file: the TorchScript file of the network, which "
                "this package does not include."
            )
        if self.extractor in ("pixels", "random") and self.extractor_file is not None:
            raise ValueError(
                f"--extractor-file {self.extractor_file}: --extractor {self.extractor} reads no file; pass "
                "inception, dinov2 or torchscript."
            )
        if self.extractor_size is not None and self.extractor_size < 1:
            raise ValueError(f"--extractor-size is {self.extractor_size}: pass a positive number of pixels.")
        for name in ("extractor_size", "extractor_scale"):
            value = getattr(self, name)
            if value != getattr(ExtractorFlags, name) and self.extractor != "torchscript" and classifier is None:
                raise ValueError(
                    f"--{name.replace('_', '-')} {value} does nothing with --extractor {self.extractor}, which "
                    f"prepares images in its own way: leave it out, or pass --extractor torchscript."
                )
        if self.extractor_resize != ExtractorFlags.extractor_resize and self.extractor_size is None:
            raise ValueError(
                f"--extractor-resize {self.extractor_resize} does nothing without --extractor-size: pass a size, "
                "or leave it out."
            )

    def named(self, *, floating: bool, usual: Name = "inception") -> Name:
        """The name of the extractor for float data or images; `usual` is that of "auto" for images without a file."""
        if self.extractor != "auto":
            return self.extractor
        if self.extractor_file is not None:
            return "inception"
        return "pixels" if floating else usual

    def open(
        self, shape: tuple[int, ...], device: torch.device, *, floating: bool = False, usual: Name = "inception"
    ) -> Extractor:
        """The extractor, for images of `shape` (C, H, W), or for float data of any shape.

        Raises:
            ValueError: if its file is missing or not that network, or it measures images, and these are float data.
            ImportError: if its package is missing, with the install command.
        """
        file, name = self.extractor_file, self.named(floating=floating, usual=usual)
        if floating and name != "pixels":
            raise ValueError(
                f"--extractor {name} measures 8-bit images, and these are float data: leave it out, to measure "
                "the values themselves, or decode the data to images first."
            )
        if name == "inception":
            try:
                return Inception(file, device=device)
            except ImportError as error:
                raise ImportError(
                    f"{error} Other extractors need no download: --extractor pixels, --extractor random.",
                    name=error.name,
                ) from error
        if name == "pixels":
            return RawValues(shape) if floating else RawPixels(shape)
        if name == "random" or file is None:
            return RandomConvolutions(device=device)
        return dinov2(file, device=device) if name == "dinov2" else self.network(file, device)

    def network(self, file: Path, device: torch.device) -> TorchScriptExtractor:
        """The network in a TorchScript file, which gets images as --extractor torchscript does.

        Raises:
            ValueError: if the file is missing or not a network.
        """
        resize: Resize | None = None
        if self.extractor_size is not None:
            kernels = {"bicubic": AntialiasedBicubic, "tensorflow": TensorFlowBilinear}
            resize = kernels[self.extractor_resize](self.extractor_size)
        offset, scale = _SCALES[self.extractor_scale]
        return TorchScriptExtractor(file, name=file.stem, resize=resize, offset=offset, scale=scale, device=device)
