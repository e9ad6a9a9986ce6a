"""What is in an image set: a table of figures, and a picture of some of its images.

Means and standard deviations are exact: they come from the counts of the 256 values per channel, taken in one pass.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stablefield._memory import size_text
from stablefield._shapes import check_kind, whole_number
from stablefield.data._autoencoder import AutoencoderRecord
from stablefield.data._image_set import ImageSet, class_text
from stablefield.data._png import as_pictures, class_grid
from stablefield.data._scaling import chunks

__all__ = ["classes_text", "sample_grid", "summary", "value_counts"]

CLASSES_SHOWN = 20
_IN_A_LINE = 8


def value_counts(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each value occurs in each channel of `images` (n, C, H, W): shape (C, 256)."""
    counts = np.zeros((images.shape[1], 256), np.int64)
    for chunk in chunks(images):
        for channel in range(images.shape[1]):
            counts[channel] += np.bincount(chunk[:, channel].reshape(-1), minlength=256)
    return counts


def summary(images: ImageSet) -> list[tuple[str, str]]:
    """Rows (name, value) for a table; reads all pixels once.

    Values are 0 to 255; means and standard deviations are given per channel, and for values v / 127.5 - 1 as well. Float
    data have the figures of their scaling.
    """
    check_kind("images", images, ImageSet, "an ImageSet, as open_images returns")
    if images.scaling is None:
        rows = _image_rows(images)
    else:
        rows = [
            ("shape", " x ".join(map(str, images.shape))),
            ("values", str(images.images.dtype)),
            ("mean", _listed(images.scaling.mean)),
            ("standard deviation", _listed(images.scaling.std)),
        ]
    autoencoder = images.autoencoder
    if autoencoder is not None:
        rows += [
            ("autoencoder", autoencoder.place),
            ("  of sha256", autoencoder.sha256),
            ("  its images", " x ".join(map(str, autoencoder.shape))),
            ("  its scaling", _scaling_text(autoencoder)),
            ("mirrored images", "none" if images.flipped is None else "encoded, too"),
        ]
    manifest = images.manifest
    rows = [
        ("name", images.name),
        ("source", str(manifest["source"])),
        ("images" if images.scaling is None else "samples", f"{len(images):,}"),
        *rows,
        ("resized", str(manifest["resized"])),
        *((f"  {what}", f"{count:,} images") for what, count in manifest["conversions"].items()),
        ("skipped files", f"{manifest['skipped']:,}"),
        *(("note", note) for note in images.notes),
        (
            "memory",
            f"{size_text(images.images.nbytes)}, {f'mapped from {images.file}' if images.file else 'in memory'}",
        ),
        ("sha256", str(manifest["sha256"])),
    ]
    if images.labels is None:
        return [*rows, ("classes", "none")]
    rows.append(("classes", str(images.classes)))
    per_class = np.bincount(images.labels, minlength=images.classes)
    for label, count in enumerate(per_class[:CLASSES_SHOWN]):
        rows.append((f"  class {class_text(label, images.class_names)}", f"{count:,}"))
    if images.classes > CLASSES_SHOWN:
        rest = per_class[CLASSES_SHOWN:]
        rows.append((f"  {len(rest):,} more classes", f"{rest.min():,} to {rest.max():,} each"))
    return rows


def classes_text(images: ImageSet) -> str:
    """The classes of a set on one line: how many, and name and number of images of each; empty without labels."""
    if images.labels is None:
        return ""
    per_class = np.bincount(images.labels, minlength=images.classes)
    names = images.class_names or [str(number) for number in range(images.classes)]
    low, high, more = per_class.min(), per_class.max(), images.classes > _IN_A_LINE
    if more and low == high:
        return f"{images.classes:,}: {', '.join(names[:_IN_A_LINE])}, ... ({low:,} images each)"
    shown = ", ".join(f"{name} ({count:,})" for name, count in zip(names[:_IN_A_LINE], per_class, strict=False))
    return f"{images.classes:,}: {shown}" + (f", ... ({low:,} to {high:,} images each)" if more else "")


def _image_rows(images: ImageSet) -> list[tuple[str, str]]:
    counts = value_counts(images.images)
    values = np.arange(256)
    total = counts.sum(1)
    mean = counts @ values / total
    std = np.sqrt(np.maximum(counts @ values**2 / total - mean**2, 0))
    present = np.flatnonzero(counts.sum(0))
    channels, height, width = images.shape
    return [
        ("shape", f"{channels} x {height} x {width} ({'greyscale' if channels == 1 else 'RGB'})"),
        ("values", f"{images.images.dtype}, {present[0]} to {present[-1]}"),
        ("mean", _figures(mean, mean / 127.5 - 1)),
        ("standard deviation", _figures(std, std / 127.5)),
    ]


def sample_grid(images: ImageSet, count: int = 64, seed: int = 0, vae: str | Path = "") -> NDArray[np.uint8]:
    """A picture of `count` images drawn without replacement (all, if there are fewer).

    Without labels they come in the order of the set. With labels each class has as many, as far as it has them, and its
    name; of more than `count` classes some are drawn. Latents of images are decoded.

    Args:
        images: the set.
        count: how many.
        seed: of the draw.
        vae: the autoencoder's place, if it has moved.

    Returns:
        The picture, shape (height, width, C), uint8.

    Raises:
        ValueError: if `count` is below 1, the samples are no pictures, (1, H, W) or (3, H, W), or the autoencoder of latents
            is not there.
        ImportError: if there are labels, and Pillow, which writes the names, is not installed.
    """
    check_kind("images", images, ImageSet, "an ImageSet, as open_images returns")
    whole_number("count", count)
    whole_number("seed", seed, 0)
    check_kind("vae", vae, (str, Path), "the place of the autoencoder")
    if count < 1:
        raise ValueError(f"count={count}: a picture takes at least 1 image.")
    values, labels = images.batch(_drawn(images.labels, len(images), count, seed))
    autoencoder = images.autoencoder
    pictures = as_pictures(values) if autoencoder is None else autoencoder.open(vae).decode(values).numpy()
    return class_grid(pictures, labels, images.class_names)


def _drawn(labels: NDArray[np.int64] | None, n: int, count: int, seed: int) -> NDArray[np.int64]:
    """Which of n images to show: at random, as many of each class as of any other, as far as it has them."""
    order = np.random.default_rng(seed).permutation(n)
    if labels is not None:
        by_class = np.argsort(labels[order], kind="stable")
        sizes = np.bincount(labels)
        place = np.empty(n, np.int64)  # of each image among the drawn ones of its class
        place[by_class] = np.arange(n) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        order = order[np.argsort(place, kind="stable")]
    return np.sort(order[:count])


def _listed(values: tuple[float, ...]) -> str:
    shown = ", ".join(f"{value:.4g}" for value in values[:CLASSES_SHOWN])
    return shown if len(values) <= CLASSES_SHOWN else f"{shown}, ... ({len(values):,} channels)"


def _figures(raw: NDArray[np.float64], scaled: NDArray[np.float64]) -> str:
    return f"{', '.join(f'{v:.2f}' for v in raw)} ({', '.join(f'{v:.4f}' for v in scaled)} in [-1, 1])"


def _scaling_text(record: AutoencoderRecord) -> str:
    """The scaling that an autoencoder states."""
    if not record.latents_std:
        return f"{record.scaling_factor:g}, shift {record.shift_factor:g}"
    mean, std = (", ".join(f"{value:g}" for value in part) for part in (record.latents_mean, record.latents_std))
    return f"{record.scaling_factor:g}, of channels of mean {mean}; std {std}"
