"""The population: the samples that a probe treats as the whole data set, all of it or a random part.

The posterior over a set costs a pass over it for every row, so a probe draws a random part of a large set. Its results then
hold for a data set of that size, and the population records the size of the set it was drawn from.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield._shapes import check_kind, check_tensor, flag, whole_number
from stablefield.data._image_set import ImageSet
from stablefield.targets._engine.reference_matrix import ReferenceMatrix, wide_dtype

__all__ = ["MOST", "Population", "Samples", "described", "draw_population"]

MOST = 65_536
"""Samples that a population holds by default."""

Samples = ImageSet | Tensor | NDArray[Any]
"""Images or other samples: a set, or a tensor or array of shape (n, ...), uint8 or floats as the network sees them."""


@dataclass(frozen=True)
class Population:
    """Samples with their labels and origin.

    Args:
        data: shape (N, ...), floating point, or uint8 images that mean data / 127.5 - 1.
        labels: class of each sample, integers of shape (N,), to keep posteriors within classes; kept as int64; else None.
        drawn_from: size of the set that the samples were drawn from; None if they are all of it.

    Raises:
        ValueError: if all samples are equal (within every class, if there are labels), a value is not finite, or `labels`
            does not fit.
    """

    data: Tensor
    labels: Tensor | None = None
    drawn_from: int | None = None

    def __post_init__(self) -> None:
        data, labels = self.data, self.labels
        check_tensor("data", data, numbers=True)
        if labels is not None:
            check_tensor("labels", labels, numbers=True)
        if data.ndim < 2 or data[:1].numel() == 0:
            raise ValueError(
                f"data have shape {tuple(data.shape)}: pass samples of at least one number, shape (N, ...)."
            )
        if not (data.is_floating_point() or data.dtype == torch.uint8):
            raise ValueError(f"data have dtype {data.dtype}: pass floating point data, or uint8 images.")
        if len(data) < 2:
            raise ValueError(
                f"data hold {len(data)} sample: with one sample every target is that sample, and there is no variance to "
                "measure. Pass at least 2."
            )
        if labels is not None and (
            labels.shape != data.shape[:1]
            or labels.is_floating_point()
            or labels.is_complex()
            or labels.dtype == torch.bool
        ):
            raise ValueError(
                f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}: pass one integer per sample, "
                f"shape ({len(data)},)."
            )
        if labels is not None and labels.dtype != torch.int64:
            # Embeddings take no other integers than int32 and these.
            object.__setattr__(self, "labels", labels.long())
        if data.is_floating_point():
            for start in range(0, len(data), 4096):
                finite = data[start : start + 4096].flatten(1).isfinite().all(1)
                if not bool(finite.all()):
                    row = start + int((~finite).nonzero()[0, 0])
                    raise ValueError(f"data[{row}] holds NaN or inf: clean the data first.")
        if _all_equal(data, labels):
            within = "" if labels is None else " of each class"
            raise ValueError(
                f"all {len(data):,} samples{within} are equal: every target is that sample at every noise level, so there "
                "is no variance to measure or remove. Pass different samples."
            )

    def __len__(self) -> int:
        return len(self.data)

    def to(self, device: torch.device | str) -> "Population":
        """The same on a device."""
        labels = None if self.labels is None else self.labels.to(device)
        return Population(self.data.to(device), labels, self.drawn_from)

    @property
    def dim(self) -> int:
        """Numbers per sample, d."""
        return self.data[0].numel()

    def variance(self) -> float:
        """Trace of the covariance of the samples, within classes if there are labels: V_DSM at infinite noise."""
        total, count, _ = self._sums()
        square = sum(float(rows.square().sum()) for _, rows in self._shifted())
        return max(0.0, (square - float((total.square().sum(1) / count).sum())) / len(self))

    def radius(self) -> float:
        """Largest distance of a sample from the mean, of its class if there are labels."""
        total, count, place = self._sums()
        mean = total / count[:, None]
        return max(float((rows - mean[place[where]]).square().sum(1).max()) for where, rows in self._shifted()) ** 0.5

    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each class the sum of its samples, relative to the first of all, and their number; each sample's class."""
        labels = torch.zeros(len(self), dtype=torch.long) if self.labels is None else self.labels.cpu()
        _, place = torch.unique(labels, return_inverse=True)
        place = place.to(self.data.device)
        kinds = int(place.max()) + 1
        total = torch.zeros(kinds, self.dim, dtype=wide_dtype(self.data.device), device=self.data.device)
        for where, rows in self._shifted():
            total.index_add_(0, place[where], rows)
        return total, torch.bincount(place, minlength=kinds).to(total), place

    def _shifted(self) -> Iterator[tuple[slice, Tensor]]:
        """The samples in the widest dtype, relative to the first, so that data far from zero lose no digits."""
        matrix = ReferenceMatrix(self.data)
        centre = matrix.rows(torch.zeros(1, dtype=torch.long, device=self.data.device), matrix.dtype)
        for where, rows in matrix.chunks(matrix.chunk_size(1), matrix.dtype):
            yield where, (rows - centre).to(wide_dtype(self.data.device))


def draw_population(
    images: Samples,
    labels: Tensor | NDArray[np.int64] | None = None,
    *,
    max_images: int = MOST,
    by_class: bool = False,
    seed: int = 0,
) -> Population:
    """All of `images`, or `max_images` of them drawn at random without replacement.

    Args:
        images: the set, of which this reads only the drawn rows; or a tensor or array, as for a `Population`.
        labels: class of each sample, integers of shape (n,), if `images` has no labels itself.
        max_images: samples to hold at most, 2 or more.
        by_class: keep the labels, so that posteriors stay within classes.
        seed: of the draw.

    Raises:
        ValueError: if `max_images` is below 2, or `by_class` is set and there are no labels; and as for `Population`.
    """
    whole_number("max_images", max_images)
    whole_number("seed", seed, 0)
    flag("by_class", by_class)
    if max_images < 2:
        raise ValueError(f"max_images is {max_images}: pass at least 2.")
    check_kind("images", images, (ImageSet, Tensor, np.ndarray), "an ImageSet, as open_images returns, or a tensor")
    if labels is not None:
        check_kind("labels", labels, (Tensor, np.ndarray), "a tensor or an array of classes, one per sample")
        if isinstance(labels, np.ndarray) and labels.dtype.kind not in "iufb":
            raise ValueError(f"labels has dtype {labels.dtype}: pass one integer per sample.")
    found = images.labels if isinstance(images, ImageSet) and labels is None else labels
    if by_class and found is None:
        raise ValueError(f"by_class is set, but {described(images)[0]} has no classes: leave it out, or pass labels.")
    if by_class and isinstance(found, Tensor):
        check_tensor("labels", found, numbers=True)
    classes = torch.as_tensor(found) if by_class and found is not None else None
    count = len(images)
    if classes is not None and classes.shape != (count,):
        raise ValueError(f"labels has shape {tuple(classes.shape)}: pass one integer per sample, shape ({count},).")
    if count <= max_images:
        values = images.scaled(slice(None)) if isinstance(images, ImageSet) else images
        # A copy, because the set may be mapped read-only, and every row is read many times.
        return Population(
            values if isinstance(values, Tensor) else torch.from_numpy(np.array(values, order="C")), classes
        )
    drawn = np.sort(np.random.default_rng(seed).choice(count, max_images, replace=False, shuffle=False))
    rows = torch.from_numpy(drawn)
    values = (
        images.scaled(drawn) if isinstance(images, ImageSet) else images[rows if isinstance(images, Tensor) else drawn]
    )
    return Population(
        values if isinstance(values, Tensor) else torch.from_numpy(values),
        None if classes is None else classes[rows],
        count,
    )


def described(images: Samples) -> tuple[str, str, dict[str, Any]]:
    """A name, a one-line description, and a manifest."""
    if isinstance(images, ImageSet):
        return images.name, images.describe(), images.manifest
    shape = tuple(images.shape)
    manifest = {"count": shape[0], "shape": list(shape[1:]), "dtype": str(images.dtype).removeprefix("torch.")}
    return "samples", f"{shape[0]:,} samples of shape {shape[1:]}", manifest


def _all_equal(data: Tensor, labels: Tensor | None) -> bool:
    if labels is None:
        first = data[:1]
        return all(bool((part == first).all()) for part in data.split(4096))
    _, place = torch.unique(labels, return_inverse=True)
    # The index of each class's first member.
    first = torch.empty(int(place.max()) + 1, dtype=torch.long, device=place.device)
    first.scatter_reduce_(0, place, torch.arange(len(place), device=place.device), "amin", include_self=False)
    return all(
        bool((data[start : start + 4096] == data[first[place[start : start + 4096]]]).all())
        for start in range(0, len(data), 4096)
    )
