"""A feature network from a TorchScript file.

The file holds a network f that maps normalised images (B, 3, S, S), float32, to features (B, d). Images
get three channels, a resize by a named rule, then a normalisation per channel: (x - offset) / scale with x in 0..255.

The resize rule is part of the metric: the same samples get another Frechet distance with another rule (Parmar, Zhang, Zhu,
"On Aliased Resizing and Surprising Subtleties in GAN Evaluation", CVPR 2022). Reference implementations differ:

- The original FID feeds 0..255 images of any size to the TensorFlow graph of 2015, which resizes inside by TensorFlow
  1's bilinear kernel: output pixel i reads input position i * in / out (no offset of half a pixel), no
  antialiasing. The published numbers of diffusion models follow it, through TensorFlow itself or through PyTorch ports
  that copy the kernel.
- pytorch-fid uses torch's bilinear kernel instead, which aligns pixel centres and scales by (x - 127.5) / 127.5.
- clean-fid's own mode uses Pillow's bicubic kernel, which antialiases.

So `TensorFlowBilinear` is the rule of FID here; `AntialiasedBicubic` is clean-fid's. A rule takes floating point
images (B, C, H, W) on any scale and returns them as (B, C, size, size), not rounded.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from stablefield._regular_file import sha256
from stablefield.evaluation._extractor import check_images, full_precision, three_channels

__all__ = [
    "IMAGENET", "AntialiasedBicubic", "Channels", "Resize", "TensorFlowBilinear", "TorchScriptExtractor", "dinov2",
]  # fmt: skip

Channels = tuple[float, float, float]

IMAGENET: tuple[Channels, Channels] = (255 * 0.485, 255 * 0.456, 255 * 0.406), (255 * 0.229, 255 * 0.224, 255 * 0.225)
"""Mean and standard deviation of ImageNet's channels, on 0..255: `offset` and `scale` of networks trained on it."""


class Resize(Protocol):
    """A named map from images of any size to images of one size."""

    @property
    def rule(self) -> str:
        """The name for the protocol record."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Resize floating point images of shape (B, C, H, W)."""
        ...


@dataclass(frozen=True)
class TensorFlowBilinear:
    """TensorFlow 1's bilinear kernel (align_corners and half_pixel_centers both false), as the FID graph applies it.

    Output pixel i lies at p = i * in / out and is x[floor(p)] + (p - floor(p)) * (x[floor(p) + 1] - x[floor(p)]), the
    last pixel repeated beyond the edge; columns first, then rows, with positions in float32 as in TensorFlow's
    kernel.

    References:
        Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter, "GANs Trained by a Two Time-Scale Update Rule Converge to a
        Local Nash Equilibrium", NeurIPS 2017 (the graph that defines FID).
    """

    size: int

    @property
    def rule(self) -> str:
        return f"tensorflow1-bilinear-{self.size}x{self.size}"

    def __call__(self, images: Tensor) -> Tensor:
        return _interpolate(_interpolate(images, self.size, dim=3), self.size, dim=2)


@dataclass(frozen=True)
class AntialiasedBicubic:
    """Pillow's bicubic kernel (a = -0.5, wider when it shrinks images), in torch's implementation.

    The rule of clean-fid, and the usual one for DINOv2.
    """

    size: int

    @property
    def rule(self) -> str:
        return f"antialiased-bicubic-{self.size}x{self.size}"

    def __call__(self, images: Tensor) -> Tensor:
        return functional.interpolate(
            images, (self.size, self.size), mode="bicubic", align_corners=False, antialias=True
        )


class TorchScriptExtractor:
    """Features of a network in a TorchScript file.

    The file is a program that torch runs: load only files that you trust. Features are computed in float32 without
    TensorFloat-32 or autocast, on `device`, and returned there.

    Args:
        path: the TorchScript file.
        name: name of the network in tables and records.
        resize: the rule that resizes images for the network; None keeps their size.
        offset: subtracted from each channel's 0..255 values.
        scale: divides each channel after that.
        device: where the network runs.

    Raises:
        ValueError: if the file does not exist or is not a TorchScript file; if the network does not map (1, 3, H, W) to
            one row of features; on a call, if images are not uint8 (B, C, H, W) with 1 or 3 channels.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        name: str,
        resize: Resize | None,
        offset: Channels,
        scale: Channels,
        device: str | torch.device = "cpu",
    ) -> None:
        path = Path(path)
        if not path.exists():
            raise ValueError(f"{name}: there is no file {path}: pass the path of a TorchScript file.")
        # Another normalisation makes other features: cached ones must not be taken for them.
        self.resize = (resize.rule if resize else "none") + _normalisation(offset, scale)
        self.name, self.sha256 = name, sha256(path)
        self._resize, self._device = resize, torch.device(device)
        self._network = _load(path, self._device)
        self._offset = torch.tensor(offset, device=self._device).reshape(1, 3, 1, 1)
        self._scale = torch.tensor(scale, device=self._device).reshape(1, 3, 1, 1)
        self.dim = self._measured_dim(path)

    def __call__(self, images: Tensor) -> Tensor:
        check_images(images)
        # Without the executor's specialised plans, with which a first call may differ from later ones.
        with full_precision(self._device), torch.jit.optimized_execution(False):
            x = three_channels(images.to(self._device)).float()
            x = self._resize(x) if self._resize else x
            features: Tensor = self._network((x - self._offset) / self._scale)
        # Pooled maps (B, d, 1, 1) are rows of features too.
        return features.flatten(1) if features.ndim == 4 and features.shape[2:] == (1, 1) else features

    def _measured_dim(self, path: Path) -> int:
        try:
            features = self(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
            if features.ndim != 2 or len(features) != 1:
                raise ValueError(f"it returns shape {tuple(features.shape)} for one image")
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: this network does not map images (B, 3, H, W) after {self.resize} to features (B, d): {error}"
            ) from error
        return features.shape[1]


def dinov2(
    path: str | Path, *, resize: Resize | None = None, device: str | torch.device = "cpu"
) -> TorchScriptExtractor:
    """DINOv2 from your own TorchScript file, with the image preparation of its training.

    Trace any DINOv2 backbone that returns its class token, (B, 3, 224, 224) to (B, d). It resizes images to 224 x 224
    by `AntialiasedBicubic` unless `resize` is another rule, and normalises by ImageNet's mean and standard deviation.

    References:
        Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", TMLR 2024.
        Stein et al., "Exposing Flaws of Generative Model Evaluation Metrics and Their Unfair Treatment of Diffusion
        Models", NeurIPS 2023 (its use in Frechet distances).
    """
    return TorchScriptExtractor(
        path,
        name="DINOv2",
        resize=AntialiasedBicubic(224) if resize is None else resize,
        offset=IMAGENET[0],
        scale=IMAGENET[1],
        device=device,
    )


def _normalisation(offset: Channels, scale: Channels) -> str:
    """What the record says of it besides the resize rule: nothing of the usual ones, ImageNet's and FID's."""
    if (offset, scale) in (IMAGENET, ((128.0,) * 3,) * 2):
        return ""
    parts = (
        ", ".join(f"{value:g}" for value in (part[:1] if len(set(part)) == 1 else part)) for part in (offset, scale)
    )
    return ", (x - {}) / {}".format(*(part if "," not in part else f"({part})" for part in parts))


def _load(path: Path, device: torch.device) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        # torch >= 2.10 deprecates torch.jit.load in favour of torch.export, but these networks do not come as its
        # files; on Python 3.14 and later the sentence is "is not supported". This silences nothing else.
        warnings.filterwarnings("ignore", r"`torch\.jit\.load` is ", DeprecationWarning)
        try:
            network = torch.jit.load(str(path), map_location=device)
        except RuntimeError as error:
            raise ValueError(
                f"{path} is not a TorchScript file that this torch ({torch.__version__}) reads: {error}"
            ) from error
    return network.eval()


def _interpolate(images: Tensor, size: int, dim: int) -> Tensor:
    length = images.shape[dim]
    if length == size:
        return images
    # float32 whatever the images' dtype: at 32 to 299 pixels the weights differ in the sixth digit otherwise.
    scale = torch.tensor(length, dtype=torch.float32) / torch.tensor(size, dtype=torch.float32)
    position = torch.arange(size, dtype=torch.float32) * scale
    low = position.long().clamp(max=length - 1)
    high = (low + 1).clamp(max=length - 1)
    shape = (-1, *(1,) * (images.ndim - 1 - dim))
    weight = (position - low).to(images.device, images.dtype).reshape(shape)
    low, high = low.to(images.device), high.to(images.device)
    start, end = images.index_select(dim, low), images.index_select(dim, high)
    return start + (end - start) * weight
