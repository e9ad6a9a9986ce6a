"""Samples: images, or other data, drawn from a run, with their seeds and classes.

`draw_samples` draws them for pictures and checks during training; `Run.sample` has all options.
"""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield._atomic_file import write_atomically
from stablefield.data._autoencoder import Autoencoder
from stablefield.data._png import PICTURES, class_grid, is_picture, write_picture, write_png
from stablefield.diffusion._preconditioning import Denoiser
from stablefield.sampling._seeded_images import chunks_of, draw, in_turn
from stablefield.sampling._solvers import SolverOptions
from stablefield.training._run_config import RunConfig

__all__ = ["Samples", "draw_samples"]

_STEPS = 18

# `save("grid.gif")` asks for a file, not for a folder of that name.
_OTHERS = (".gif", ".webp", ".bmp", ".tif", ".tiff", ".svg", ".pdf", ".pt", ".zip", ".html", ".json")


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """Images drawn from a run; a notebook shows them as a grid.

    Attributes:
        images: uint8, shape (n, C, H, W); or float data (n, ...), in the units and the dtype of the training data.
            Latents of an imported network are float32, as it sees them, unless its file states a scaling.
        seeds: one per image; a seed always gives the same image under the same options.
        labels: their classes, shape (n,), -1 for none; None for a run without classes.
        class_names: names of the classes, if known.
        nfe: network evaluations per image.
        sampler: the solver with its options, in words.
        ema: the average of the weights and its step.
    """

    images: NDArray[Any]
    seeds: tuple[int, ...]
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None
    nfe: float = 0.0
    sampler: str = ""
    ema: str = ""

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.images.shape[1:]))
        what = "images" if self.images.dtype == np.uint8 else "samples"
        return f"<Samples: {len(self)} {what} of {shape}, {self.sampler}, NFE {self.nfe:g}, EMA {self.ema}>"

    def grid(self) -> NDArray[np.uint8]:
        """All images as one picture, shape (height, width, C); with classes, one named row per class.

        Raises:
            ValueError: if they are no pictures, (1, H, W) or (3, H, W).
        """
        return class_grid(self.images, self.labels, self.class_names)

    def save(self, path: str | Path) -> Path:
        """Write the images: a grid to FILE.png or FILE.jpg, arrays to FILE.npz, or one PNG file per image to a folder.

        An .npz file holds `arr_0`, shape (n, H, W, C), as the usual evaluators read it, `seeds`, and `labels` and
        `class_names` if there are any. In a folder the image of seed 7 is 000007.png. Float data are `data` in the .npz
        file, shape (n, ...), alone in FILE.npy, and one .npy file per sample in a folder.

        Args:
            path: the file or folder; creates missing folders and replaces files of the same names.

        Returns:
            The path.

        Raises:
            ValueError: if the suffix belongs to another kind of file.
            OSError: if the path is not writable.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix in _OTHERS and not path.is_dir():
            raise ValueError(f"path={str(path)!r}: name a .png or .jpg file for a grid, .npz for arrays, or a folder.")
        floating = self.images.dtype != np.uint8
        if suffix == ".npy" and not path.is_dir():
            if not floating:
                raise ValueError(
                    f"path={str(path)!r}: name a .png or .jpg file for a grid, .npz for arrays, or a folder."
                )
            return _write_npy(path, self.images)
        if suffix in PICTURES:
            return write_picture(path, self.grid())
        if suffix == ".npz":
            values = {"data": self.images} if floating else {"arr_0": self.images.transpose(0, 2, 3, 1)}
            arrays: dict[str, NDArray[Any]] = {**values, "seeds": np.array(self.seeds, np.int64)}
            if self.labels is not None:
                arrays["labels"] = self.labels
            if self.class_names is not None:
                arrays["class_names"] = np.array(self.class_names)
            content = io.BytesIO()
            np.savez_compressed(content, allow_pickle=False, **arrays)
            write_atomically(path, lambda temporary: temporary.write_bytes(content.getbuffer()))
            return path
        for seed, image in zip(self.seeds, self.images, strict=True):
            if floating:
                _write_npy(path / f"{seed:06d}.npy", image)
                continue
            write_png(path / f"{seed:06d}.png", image.transpose(1, 2, 0))
        return path

    def _repr_png_(self) -> bytes | None:
        if not is_picture(self.images.shape[1:]):
            return None
        from PIL import Image

        picture = self.grid()
        content = io.BytesIO()
        Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture).save(content, format="PNG")
        return content.getvalue()

    def _repr_html_(self) -> str:
        picture = self._repr_png_()
        if picture is None:
            return f"<pre>{html.escape(repr(self))}</pre>"
        data = base64.b64encode(picture).decode()
        return f'<img alt="{len(self)} samples" src="data:image/png;base64,{data}">'


def _write_npy(path: Path, values: NDArray[Any]) -> Path:
    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    write_atomically(path, lambda temporary: temporary.write_bytes(content.getbuffer()))
    return path


def draw_samples(
    denoiser: Denoiser,
    config: RunConfig,
    seeds: Sequence[int],
    device: torch.device,
    classes: Sequence[int] | None = None,
    *,
    sigmas: Tensor | None = None,
    autoencoder: Autoencoder | None = None,
) -> Tensor:
    """Images of `seeds` by Heun's method, uint8, shape (len(seeds), C, H, W), or other data.

    Args:
        denoiser: D(x, sigma, class_labels=None).
        config: of the run.
        seeds: image k is a function of seeds[k].
        device: where to compute.
        classes: that the seeds take in turn; all classes that the run has learned by default.
        sigmas: the grid; EDM's of 18 steps by default.
        autoencoder: decodes latents of images; None for the latents.
    """

    def finish(x: Tensor) -> Tensor:
        found = config.samples_of(x)
        return found if autoencoder is None else autoencoder.decode(found)

    options = SolverOptions(steps=_STEPS)
    labels = None
    if config.classes:
        labels = in_turn(config.learned_classes if classes is None else classes, seeds).to(device)
    ((_, images, _),) = draw(
        lambda _: denoiser if labels is None else lambda x, sigma: denoiser(x, sigma, labels),
        options,
        options.sigmas() if sigmas is None else sigmas,
        chunks_of(seeds, len(seeds)),
        shape=config.shape,
        device=device,
        finish=finish,
    )
    return images
