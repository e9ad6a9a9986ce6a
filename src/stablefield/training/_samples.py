"""Samples: images that a run has drawn, with their seeds and classes."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stablefield._atomic_file import write_atomically
from stablefield.data._png import PICTURES, class_grid, write_picture, write_png

__all__ = ["Samples"]

# Whoever writes `save("grid.gif")` does not want a folder of that name.
_OTHERS = (".gif", ".webp", ".bmp", ".tif", ".tiff", ".svg", ".pdf", ".npy", ".pt", ".zip", ".html", ".json")


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """Images drawn from a run; a notebook shows them as a grid.

    Attributes:
        images: uint8, shape (n, C, H, W).
        seeds: of the images; a seed is the same image in every call with the same options.
        labels: their classes, shape (n,), -1 for none; None for a run without classes.
        class_names: what the classes are called, if that is known.
        nfe: network evaluations per image.
        sampler: the solver with its options, in words.
        ema: which average of the weights, of which step.
    """

    images: NDArray[np.uint8]
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
        return f"<Samples: {len(self)} images of {shape}, {self.sampler}, NFE {self.nfe:g}, EMA {self.ema}>"

    def grid(self) -> NDArray[np.uint8]:
        """All images as one picture, shape (height, width, C); those of a run with classes in rows with their names."""
        return class_grid(self.images, self.labels, self.class_names)

    def save(self, path: str | Path) -> Path:
        """Write the images: a grid to FILE.png or FILE.jpg, arrays to FILE.npz, or one PNG file per image to a folder.

        An .npz file holds `arr_0`, shape (n, H, W, C), as the usual evaluators read it, `seeds`, and `labels` and
        `class_names` if there are any. In a folder the image of seed 7 is 000007.png.

        Args:
            path: the file or folder; folders on the way are made, files of those names are replaced.

        Returns:
            The path.

        Raises:
            ValueError: if the suffix is that of another kind of file.
            OSError: if it cannot be written.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix in _OTHERS and not path.is_dir():
            raise ValueError(f"path={str(path)!r}: name a .png or .jpg file for a grid, .npz for arrays, or a folder.")
        if suffix in PICTURES:
            return write_picture(path, self.grid())
        if suffix == ".npz":
            arrays = {"arr_0": self.images.transpose(0, 2, 3, 1), "seeds": np.array(self.seeds, np.int64)}
            if self.labels is not None:
                arrays["labels"] = self.labels
            if self.class_names is not None:
                arrays["class_names"] = np.array(self.class_names)
            content = io.BytesIO()
            np.savez_compressed(content, allow_pickle=False, **arrays)
            write_atomically(path, lambda temporary: temporary.write_bytes(content.getbuffer()))
            return path
        for seed, image in zip(self.seeds, self.images, strict=True):
            write_png(path / f"{seed:06d}.png", image.transpose(1, 2, 0))
        return path

    def _repr_png_(self) -> bytes:
        from PIL import Image

        picture = self.grid()
        content = io.BytesIO()
        Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture).save(content, format="PNG")
        return content.getvalue()

    def _repr_html_(self) -> str:
        data = base64.b64encode(self._repr_png_()).decode()
        return f'<img alt="{len(self)} samples" src="data:image/png;base64,{data}">'
