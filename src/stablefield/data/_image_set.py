"""A set of images: uint8 pixels, labels if there are any, and a manifest that describes them.

Pixels have shape (n, C, H, W) with C = 1 (greyscale) or 3 (RGB) and values 0 to 255; elsewhere in the library the value
v means v / 127.5 - 1. Labels are class numbers counted from 0. The pixels may be a memory map, larger than memory and
read-only, so use `ImageSet.batch` to copy rows.

Other data are float16, float32 or float64: latents (n, C, H, W), signals (n, C, L) or vectors (n, d). Such a set has a
`Scaling`, and `ImageSet.scaled` gives what the network sees of it. Encoded images (see `_latent_folder`) also have the
`moments` of each latent; their `images` are one draw of each.

The manifest is a dictionary of JSON values: `count`, `shape` (C, H, W), `classes`, `source`, `resized`, `conversions`
and two checksums. `sha256` is that of the pixels as n * C * H * W bytes in that order, `labels_sha256` that of the labels as
little-endian int64. Equal sets have equal checksums, whatever file they came from. Float data also have a `scaling`.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablefield._memory import size_text
from stablefield._shapes import check_kind, whole_number
from stablefield.data._autoencoder import AutoencoderRecord
from stablefield.data._scaling import Scaling, check_floats, chunks
from stablefield.targets._moments import Moments

__all__ = [
    "CLASS_LIMIT",
    "PIXEL_LIMIT",
    "ImageSet",
    "MissingSplitError",
    "Origin",
    "check_class_names",
    "check_label_count",
    "chunks",
    "class_text",
    "distinct_names",
    "labels_sha256",
    "make_image_set",
    "pixels_sha256",
    "renumbered",
]

PIXEL_LIMIT = 89_478_485
"""Pixels above which an image counts as a decompression bomb; Pillow's own limit."""
LABEL_LIMIT = 2**26
"""How many images may have labels, which are kept in memory."""
_SHOWN = 5
"""Classes without images that a note names."""
_DRAWN = 4096
"""Latents of mirrored images that are drawn at a time."""
_DARK = 32
"""Images without a brighter value are likely to have another scale: masks of 0 and 1, or digits of 0 to 16."""
_CHANNELS = 16
"""Length of a last axis up to which it may be one of channels."""
_SERIES = 256
"""Length L from which (n, L, C) seems to be a series of up to 4 channels; of up to 2, from a quarter of it on."""
CLASS_LIMIT = 2**16
"""How many classes there may be, if there are not more images: later stages take memory for each class."""


class MissingSplitError(ValueError):
    """A source has no such split; a damaged one is another ValueError."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where images came from and how they were converted: the part of a manifest that does not follow from the pixels."""

    name: str
    """A short name, for headings and file names."""
    source: str
    """One line that describes where the images came from."""
    class_names: tuple[str, ...] | None = None
    """Class names, if known, each another one."""
    resized: str = "no"
    """How the images were resized, or "no"."""
    conversions: dict[str, int] = field(default_factory=dict[str, int])
    """How many images each conversion changed: {"greyscale repeated to RGB": 3}."""
    skipped: int = 0
    """How many files were skipped because they could not be read."""
    skipped_files: tuple[str, ...] = ()
    """The first few of them, with the reason."""
    notes: tuple[str, ...] = ()
    """Notes for the user on how the source was read, one sentence each."""

    def __post_init__(self) -> None:
        check_kind("name", self.name, str, "a short name, a string")
        check_kind("source", self.source, str, "a line that says where the images came from, a string")
        check_kind("resized", self.resized, str, "a string, 'no' if they were not")
        check_kind("conversions", self.conversions, dict, "a dictionary of counts")
        check_kind("skipped_files", self.skipped_files, tuple, "a tuple of strings")
        whole_number("skipped", self.skipped, 0)
        check_class_names("class_names", self.class_names)

    def manifest(self, classes: int) -> dict[str, Any]:
        """The manifest of a set with this many classes, still without count, shape and checksums."""
        return {
            "name": self.name,
            "source": self.source,
            "classes": classes,
            "class_names": None if self.class_names is None else list(self.class_names),
            "resized": self.resized,
            "conversions": dict(self.conversions),
            "skipped": self.skipped,
            "skipped_files": list(self.skipped_files),
            "notes": list(self.notes),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """Images, or other samples, with their labels and manifest; made by `make_image_set` or `open_images`.

    Raises:
        ValueError: if a shape or dtype is not as stated, the set is empty, a label has no class, or two classes have one
            name.
    """

    images: NDArray[Any]
    """Images, uint8 of shape (n, C, H, W), or float data (n, ...); an array or a memory map, perhaps read-only."""
    labels: NDArray[np.int64] | None
    """Class numbers from 0, shape (n,), or None."""
    class_names: tuple[str, ...] | None
    """Class names, if known, each another one."""
    name: str
    """A short name, for headings and file names."""
    manifest: dict[str, Any]
    """The content of the set and where it came from (see the module)."""
    opening: dict[str, Any] | None = None
    """The arguments with which `open_images` opens this set again; None for a set made from arrays."""
    scaling: Scaling | None = None
    """The scaling of float data; None for images."""
    moments: Moments | None = None
    """Of encoded images, the moments of each latent, arrays of the shape of `images`; None for other data."""
    flipped: Moments | None = None
    """Of encoded images, the moments of the mirrored images' latents, if they are encoded, too."""

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        check_kind(
            "images", images, np.ndarray, "a numpy array of uint8, shape (n, C, H, W), or of floats, shape (n, ...)"
        )
        check_kind("name", self.name, str, "a short name, a string")
        check_kind("manifest", self.manifest, dict, "a dictionary; make_image_set makes it")
        check_class_names("class_names", self.class_names)
        if labels is not None:
            check_kind("labels", labels, np.ndarray, "a numpy array of class numbers, shape (n,), or None")
        if self.scaling is None:
            _check_images(images)
        else:
            check_kind("scaling", self.scaling, Scaling, "a Scaling, or None for images")
            check_floats("images", images.dtype, images.shape)
        for name, moments in (("moments", self.moments), ("flipped", self.flipped)):
            if moments is None:
                continue
            check_kind(name, moments, Moments, "Moments of two arrays, or None")
            if self.scaling is None or moments.mean.shape != images.shape or self.moments is None:
                raise ValueError(
                    f"{name} has means of shape {tuple(moments.mean.shape)}, the {images.dtype} data {images.shape}: pass "
                    "those of float data of the same shape, and flipped only with moments."
                )
        if labels is None:
            return
        if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels has dtype {labels.dtype} and shape {labels.shape}: "
                f"pass one int64 class number per image, shape ({len(images)},)."
            )
        if labels.min() < 0:
            raise ValueError(f"labels holds {labels.min()}: classes are counted from 0.")
        if self.class_names is not None and labels.max() >= len(self.class_names):
            raise ValueError(f"labels holds {labels.max()}, but class_names has {len(self.class_names)} entries.")
        if self.classes > max(CLASS_LIMIT, len(images)):
            raise ValueError(
                f"labels holds {labels.max()} and implies {self.classes:,} classes: {len(images):,} images may have up "
                f"to {max(CLASS_LIMIT, len(images)):,}; number the classes that occur 0, 1, 2, ..."
            )

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return f"<ImageSet {self.describe()}>"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image, (C, H, W), or of another sample."""
        return self.images.shape[1:]

    @property
    def classes(self) -> int:
        """Number of classes; 0 without labels."""
        if self.labels is None:
            return 0
        return len(self.class_names) if self.class_names is not None else int(self.labels.max()) + 1

    @property
    def place(self) -> str:
        """The path or name from which `open_images` opened this set; its short name if it was made from arrays."""
        return str((self.opening or {}).get("source", self.name))

    @property
    def reading(self) -> dict[str, Any]:
        """The other arguments of `opening`, with which `open_images` reads further data alike; none for arrays."""
        return {name: value for name, value in (self.opening or {}).items() if name != "source"}

    @property
    def file(self) -> Path | None:
        """The file from which the pixels are mapped, or None if they are in memory."""
        base: Any = self.images
        while base is not None:
            if isinstance(base, np.memmap):
                return Path(base.filename) if base.filename is not None else None
            base = getattr(base, "base", None)
        return None

    def scaled(self, index: slice | NDArray[np.int64]) -> NDArray[Any]:
        """What the network sees of some rows: float data scaled; images as they are, where v means v / 127.5 - 1.

        Args:
            index: a slice, or row numbers, shape (B,).

        Returns:
            Shape (B, ...): new memory, float16 for float16 data and else float32; of images, for a slice, a view.

        Raises:
            ValueError: if an index is out of range.
        """
        rows = self.images[index if isinstance(index, slice) else self._places(index)]
        return rows if self.scaling is None else self.scaling.apply(rows)

    def scaled_moments(
        self, index: slice | NDArray[np.int64], *, flipped: bool = False
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Means and standard deviations of the latents of some rows, as the network sees them.

        Args:
            index: a slice, or row numbers, shape (B,).
            flipped: of the mirrored images.

        Returns:
            Two arrays (B, ...) in new memory, of the dtype of `scaled`.

        Raises:
            ValueError: if the set has no such moments, or an index is out of range.
        """
        moments = self.flipped if flipped else self.moments
        if moments is None or self.scaling is None:
            raise ValueError(
                f"{self.name} has no moments{' of mirrored images' if flipped else ''}: encode images by "
                f"stablefield.data.encode(images, out, vae=...{', mirror=True' if flipped else ''})."
            )
        rows = index if isinstance(index, slice) else self._places(index)
        mean, std = (np.asarray(values[rows]) for values in (moments.mean, moments.std))
        return self.scaling.apply(mean), self.scaling.apply(std, deviations=True)

    @property
    def autoencoder(self) -> AutoencoderRecord | None:
        """The autoencoder of encoded images; None for other data."""
        return AutoencoderRecord.of_manifest(self.manifest)

    def batch(self, index: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64] | None]:
        """Copy rows into fresh, writable, contiguous memory.

        Args:
            index: which rows, shape (B,), each from 0 to n - 1.

        Returns:
            The images, shape (B, C, H, W), and their labels, shape (B,), or None.

        Raises:
            ValueError: if an index is out of range.
        """
        index = self._places(index)
        labels = None if self.labels is None else self.labels[index]
        return np.ascontiguousarray(self.images[index]), labels

    def mirror_images(self, index: NDArray[np.int64], seed: int = 0) -> NDArray[Any]:
        """The mirror images of some rows, left and right swapped, in new memory.

        Args:
            index: row numbers, shape (B,).
            seed: of encoded images, whose mirror images' latents are drawn.

        Returns:
            Shape (B, ...), of the dtype of `images`.

        Raises:
            ValueError: if an index is out of range.
        """
        index = self._places(index)
        if self.flipped is None:
            return np.ascontiguousarray(self.images[index][..., ::-1])
        found = np.empty((len(index), *self.shape), self.images.dtype)
        rng = np.random.default_rng(seed)
        for start in range(0, len(index), _DRAWN):
            part = index[start : start + _DRAWN]
            noise = rng.standard_normal((len(part), *self.shape), np.float32)
            found[start : start + len(part)] = self.flipped.mean[part] + self.flipped.std[part] * noise
        return found

    def _places(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row numbers (B,), checked."""
        if not hasattr(index, "__array__"):
            check_kind("index", index, (list, tuple, range), "row numbers, an array of integers (B,)")
        try:
            index = np.asarray(index)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"index is a {type(index).__name__}: pass row numbers, an array of integers (B,)."
            ) from None
        if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
            raise ValueError(f"index has dtype {index.dtype} and shape {index.shape}: pass row numbers, integers (B,).")
        index = index.astype(np.int64)
        if index.size and not 0 <= index.min() <= index.max() < len(self):
            raise ValueError(f"index runs from {index.min()} to {index.max()}, but the set has {len(self)} images.")
        return index

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user on how the source was read, and on what looks wrong in it, one sentence each."""
        return (*self.recorded_notes, *filter(None, (self._channels_last, self._empty_classes)))

    @property
    def recorded_notes(self) -> tuple[str, ...]:
        """Those of the manifest, on how the source was read."""
        return tuple(map(str, self.manifest.get("notes", ())))

    @property
    def _channels_last(self) -> str | None:
        """A note on float data whose channels seem to come last."""
        if self.scaling is None or self.shape[-1] > _CHANNELS:
            return None
        if len(self.shape) == 2:
            length, channels = self.shape
            # Shorter ones may be encoded series, of many channels and few values.
            if channels > 4 or length < (_SERIES if channels > 2 else _SERIES // 4):
                return None
            plural = "s" * (channels > 1)
            return (
                f"Samples of shape {self.shape} are read as {length} channels of {channels} value{plural}, each scaled on "
                "its own: if their channels come last, pass x.transpose(0, 2, 1)."
            )
        if len(self.shape) != 3:
            return None
        if min(self.shape[:2]) < 2 * self.shape[2]:
            return None
        first, height, width = self.shape
        return (
            f"Samples of {first} x {height} x {width} have {first} channels here: if their channels come last, move them to "
            "axis 1, x.transpose(0, 3, 1, 2)."
        )

    @property
    def _empty_classes(self) -> str | None:
        """A note on classes without images, if there are any."""
        if self.labels is None:
            return None
        empty = np.flatnonzero(np.bincount(self.labels, minlength=self.classes) == 0).tolist()
        if not empty:
            return None
        if empty == [0] and self.class_names is None:
            return "Class 0 has no images: if the labels are numbered from 1, subtract 1."
        names = self.class_names or tuple(map(str, range(self.classes)))
        more = f" and {len(empty) - _SHOWN:,} more" if len(empty) > _SHOWN else ""
        shown = ", ".join(f"{names[k]:.40}" for k in empty[:_SHOWN])
        verb = "has" if len(empty) == 1 else "have"
        return f"{len(empty):,} of {self.classes:,} classes {verb} no images: {shown}{more}."

    def describe(self) -> str:
        """One line for the user: how many images of which kind, and where they are."""
        if self.scaling is None:
            channels, height, width = self.shape
            what = f"{'greyscale' if channels == 1 else 'RGB'} images of {width} x {height}"
        else:
            kind = "samples" if self.moments is None else "latents"
            what = f"{kind} of {' x '.join(map(str, self.shape))} {self.images.dtype} values"
        classes = f", {self.classes} classes" if self.labels is not None else ""
        where = f"mapped from {self.file}" if self.file is not None else "in memory"
        size = size_text(self.images.nbytes)
        return f"{self.name}: {len(self):,} {what}{classes}, {size} {where}"

    def verify(self) -> None:
        """Read everything again and compare with the manifest.

        Raises:
            ValueError: if the checksum of pixels or labels differs.
        """
        found = {"sha256": pixels_sha256(self.images), "labels_sha256": labels_sha256(self.labels)}
        for key, value in found.items():
            if value != self.manifest.get(key):
                raise ValueError(
                    f"{self.name}: {key} is {value}, but the manifest says {self.manifest.get(key)}: "
                    "the data have changed or are damaged; make the file again from its source."
                )
        for prefix, moments in (("", self.moments), ("flipped_", self.flipped)):
            for name in () if moments is None else ("mean", "std"):
                value = pixels_sha256(np.asarray(getattr(moments, name)))
                if value != self.manifest.get("moments_sha256", {}).get(f"{prefix}{name}"):
                    raise ValueError(f"{self.name}: {prefix}{name} has changed or is damaged: encode the images again.")


def _check_images(images: NDArray[Any]) -> None:
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(
            f"images has dtype {images.dtype} and shape {images.shape}: an image set takes uint8 of shape (n, C, H, W)."
        )
    if images.size == 0:
        raise ValueError(f"images has shape {images.shape}: pass at least one image.")
    if images.shape[1] not in (1, 3):
        raise ValueError(
            f"images has {images.shape[1]} channels (shape {images.shape}): pass 1 (greyscale) or 3 (RGB); drop an "
            "alpha channel, and move channels that come last to axis 1."
        )


def make_image_set(images: NDArray[Any], labels: NDArray[Any] | None, origin: Origin) -> ImageSet:
    """Make an `ImageSet` and write its manifest, with a checksum, for which it reads all values once.

    Args:
        images: shape (n, C, H, W), uint8; or float data, shape (n, ...), whose scaling is then measured.
        labels: whole numbers, shape (n,), or None.
        origin: where the images came from.

    Returns:
        The set.

    Raises:
        ValueError: if a shape or dtype does not fit (see `ImageSet`), or float data hold NaN or infinite values, or are all
            equal.
    """
    check_kind("origin", origin, Origin, "an Origin, which says where the images came from")
    if labels is not None:
        check_kind("labels", labels, (np.ndarray, list, tuple, range), "an array of class numbers, shape (n,), or None")
        try:
            labels = np.asarray(labels)
        except ValueError:
            raise ValueError("labels are nested: pass one class number per image, shape (n,).") from None
        if labels.dtype.kind not in "iu":
            raise ValueError(f"labels has dtype {labels.dtype}: pass whole numbers, one class number per image.")
        labels = labels.astype(np.int64)
    scaling, sha256, brightest = None, "", 255
    if isinstance(images, np.ndarray) and images.dtype.kind == "f":
        check_floats(origin.name, images.dtype, images.shape)
        scaling, sha256 = Scaling.measure(images, origin.name)
    made = ImageSet(
        images=images,
        labels=labels,
        class_names=origin.class_names,
        name=origin.name,
        manifest={},
        scaling=scaling,
    )
    if scaling is None:
        sha256, brightest = _read(images)
    made.manifest.update(origin.manifest(made.classes))
    if 0 < brightest < _DARK:
        made.manifest["notes"].append(
            f"The brightest value of all images is {brightest} of 255, so they are nearly black: if {brightest} means "
            f"white, scale them, (x * (255 / {brightest})).round().astype('uint8')."
        )
    made.manifest.update(
        count=len(images),
        shape=list(made.shape),
        sha256=sha256,
        labels_sha256=labels_sha256(made.labels),
    )
    if scaling is not None:
        made.manifest["scaling"] = scaling.record
    return made


def class_text(number: int, names: Sequence[str] | None) -> str:
    """A class as text: "7 (horse)", or the number alone if there is no name or the name is the number."""
    if number < 0:
        return "no class"
    name = names[number] if names is not None and number < len(names) else str(number)
    return str(number) if name == str(number) else f"{number} ({name})"


def check_class_names(name: str, value: Any) -> None:
    """Check that the argument `name` holds a name of its own for each class, or is None.

    Raises:
        TypeError: if it is neither a tuple of strings nor None.
        ValueError: if two classes have one name, by which they could not be told apart.
    """
    if value is None:
        return
    check_kind(name, value, tuple, "a tuple of strings, or None")
    names: tuple[Any, ...] = value
    for k, one in enumerate(names):
        check_kind(f"{name}[{k}]", one, str, "a name, a string")
    if len(set(names)) < len(names):
        twice, _ = Counter(names).most_common(1)[0]
        first, second, *_ = [k for k, one in enumerate(names) if one == twice]
        raise ValueError(
            f"{name} has {twice!r:.60} for the classes {first} and {second}: give each class a name of its own, such as "
            f"'{twice:.40} ({first})' and '{twice:.40} ({second})'."
        )


def distinct_names(names: Sequence[str]) -> tuple[str, ...]:
    """Class names in which the number tells classes of one name apart: ImageNet's "crane" is a bird and a machine."""
    found = tuple(names)
    while len(set(found)) < len(found):
        count = Counter(found)
        found = tuple(f"{name} ({k})" if count[name] > 1 else name for k, name in enumerate(found))
    return found


def renumbered(images: ImageSet, class_names: Sequence[str]) -> ImageSet:
    """The set with its classes numbered in the order of `class_names`; the set itself if they already are.

    Raises:
        ValueError: if the set's class names are not the same names.
    """
    names, labels = tuple(class_names), images.labels
    if labels is None or images.class_names == names:
        return images
    if images.class_names is None or sorted(images.class_names) != sorted(names) or len(set(names)) < len(names):
        found = "no names" if images.class_names is None else ", ".join(images.class_names)
        raise ValueError(f"{images.name} has the classes {found}, and not {', '.join(names)}: pass the same data.")
    order = np.array([names.index(name) for name in images.class_names], np.int64)
    changed = order[labels]
    manifest = images.manifest | {"class_names": list(names), "labels_sha256": labels_sha256(changed)}
    return dataclasses.replace(images, labels=changed, class_names=names, manifest=manifest)


def check_label_count(count: int, where: Path | str) -> None:
    """Refuse more labels than may be kept in memory, before they are read."""
    if count > LABEL_LIMIT:
        raise ValueError(f"{where} has {count:,} labels, above the limit of {LABEL_LIMIT:,}: leave the labels out.")


def pixels_sha256(images: NDArray[Any]) -> str:
    """Checksum of the pixels in (n, C, H, W) order, read piece by piece."""
    return _read(images)[0]


def _read(images: NDArray[Any]) -> tuple[str, Any]:
    """The checksum of the values and the largest of them, in one pass."""
    digest, largest = hashlib.sha256(), None
    for chunk in chunks(images):
        digest.update(chunk.data)
        highest = chunk.max()
        largest = highest if largest is None else max(largest, highest)
    return digest.hexdigest(), largest


def labels_sha256(labels: NDArray[np.int64] | None) -> str | None:
    """Checksum of the labels as little-endian int64; None without labels."""
    return None if labels is None else hashlib.sha256(np.ascontiguousarray(labels, "<i8").data).hexdigest()
