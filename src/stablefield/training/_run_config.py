"""The configuration of a run, the content of its config.json: data, recipe, and what happened to the run since its start."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stablefield._regular_file import reason
from stablefield._shapes import whole_number
from stablefield.data._autoencoder import AutoencoderRecord
from stablefield.data._image_set import ImageSet, distinct_names, renumbered
from stablefield.data._png import is_picture
from stablefield.data._scaling import Scaling
from stablefield.sampling._seeded_images import to_uint8
from stablefield.training._config import decode, encode
from stablefield.training._held_out import HeldOut
from stablefield.training._initial_weights import InitialWeights
from stablefield.training._recipe import Recipe
from stablefield.training._records import from_record, has_type, is_count, read_record

__all__ = ["Extension", "RunConfig"]

_FORMAT = 1
# Most classes that seeds take in turn.
_MIXED = 2**16
_REQUIRED = frozenset({"format", "stablefield", "data", "shape", "classes", "opening", "manifest", "recipe"})
_OPTIONAL = frozenset({"extensions", "initial", "held_out"})
_TYPES = {"stablefield": str, "data": str, "shape": tuple[int, ...], "classes": int, "recipe": Recipe}
_OPENING = {
    "resolution": int | tuple[int, int] | None,
    "resize": Literal["crop", "squash"],
    "skip_broken": bool,
    "colour": Literal["auto", "grey", "rgb"],
    "background": str,
}


@dataclass(frozen=True, kw_only=True)
class Extension:
    """A change of a run's number of steps, after its start.

    Attributes:
        step: steps that were done then.
        before: number of steps that the run had until then.
        after: number of steps that it has from then on.
    """

    step: int
    before: int
    after: int


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The content of config.json.

    Attributes:
        data: path or name of the data, as the caller gave it.
        shape: shape of one image, (C, H, W), or of another sample.
        classes: number of classes that the network is conditioned on; 0 for none.
        manifest: description of the data.
        recipe: all settings of the training.
        version: version of the library that wrote the file.
        opening: further arguments that opened the data: resolution, resize, skip_broken, colour, background.
        extensions: changes of recipe.steps since the start, in order.
        initial: the origin of the first weights, if they were those of another network.
        held_out: the samples that are not trained on, if any are held out.
    """

    data: str
    shape: tuple[int, ...]
    classes: int
    manifest: Mapping[str, Any]
    recipe: Recipe
    version: str
    opening: Mapping[str, Any] = field(default_factory=dict[str, Any])
    extensions: tuple[Extension, ...] = ()
    initial: InitialWeights | None = None
    held_out: HeldOut | None = None

    def extended(self, done: int, steps: int) -> "RunConfig":
        """The configuration of this run with another number of steps; the same if it has that number already.

        Args:
            done: steps done.
            steps: number of steps of the whole run from now on.

        Raises:
            ValueError: if `steps` is not above the steps that are done.
        """
        before = self.recipe.steps
        steps = whole_number("steps", steps, 1)
        if steps == before:
            return self
        if steps <= done:
            raise ValueError(
                f"steps={steps}: {done:,} of this run's {before:,} steps are done, and steps counts those, too: pass more "
                f"than {done}, such as {2 * done}."
            )
        extension = Extension(step=done, before=before, after=steps)
        recipe = dataclasses.replace(self.recipe, steps=steps)
        return dataclasses.replace(self, recipe=recipe, extensions=(*self.extensions, extension))

    def training_rows(self, size: int) -> NDArray[np.int64] | None:
        """The rows of data of this size to train on, in order, if a share is held out; None for all."""
        held_out = self.held_out
        return None if held_out is None or held_out.share is None else held_out.split(size, self.recipe.seed)[0]

    @property
    def scaling(self) -> Scaling | None:
        """How the network's values become data; None for images."""
        return Scaling.of_manifest(self.manifest)

    @property
    def dtype(self) -> str:
        """Dtype of samples that are not decoded: uint8 of images, or that of float data.

        An imported network of no pictures draws latents: float32, as the network sees them where no file states a scaling.
        """
        if self.scaling is not None:
            return self.scaling.dtype
        return "uint8" if is_picture(self.shape) else "float32"

    def samples_of(self, x: Tensor) -> Tensor:
        """Samples of this dtype, on the CPU, of what a solver returned, (B, ...)."""
        scaling = self.scaling
        if scaling is not None:
            return scaling.undo(x)
        return to_uint8(x) if self.dtype == "uint8" else x.cpu().float()

    @property
    def autoencoder(self) -> AutoencoderRecord | None:
        """The autoencoder of a run on latents of images; None for other data."""
        return AutoencoderRecord.of_manifest(self.manifest)

    @property
    def picture_shape(self) -> tuple[int, ...] | None:
        """Shape (C, H, W) of the pictures that show samples, decoded if they are latents of images; None without."""
        shape = self.shape if self.autoencoder is None else self.autoencoder.shape
        return shape if is_picture(shape) else None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the network's classes, if known, each another one."""
        names: Any = self.manifest.get("class_names")
        if not self.classes or not isinstance(names, list | tuple):
            return None
        named = distinct_names([str(name) for name in cast("Sequence[Any]", names)])
        return named if len(named) == self.classes else None

    @property
    def learned_classes(self) -> tuple[int, ...]:
        """The classes that the training data have images of; all classes if the run keeps no numbers of images."""
        counts = self._class_counts
        return tuple(range(self.classes) if counts is None else (k for k, count in enumerate(counts) if count))

    @property
    def _class_counts(self) -> list[int] | None:
        """The number of images of each class; None if the run does not keep them, or has no classes."""
        counts: Any = self.manifest.get("class_counts")
        if not isinstance(counts, list | tuple) or len(counts) != self.classes or not all(map(is_count, counts)):
            return None
        return list(counts) if sum(counts) else None

    @property
    def label_dropout(self) -> float | None:
        """Share of the training's rows whose class the network did not see; at 0 it never learned to draw without a class.

        None if unknown: of an imported network of which no file states it, and of weights that began as those of another
        network, which may have learned it, and have seen all classes since. None also without classes.
        """
        share = self.recipe.label_dropout
        imported = "imported" in self.manifest and "label_dropout" not in self.manifest
        if not self.classes or imported or (share == 0 and self.initial is not None):
            return None
        return share

    @property
    def proportional_classes(self) -> tuple[int, ...] | None:
        """Classes in the proportions of the training data, evenly mixed, for seeds to take in turn; None without classes.

        With equally many samples of each class they are 0, 1, 2, ..., over and over. Runs that keep no numbers of samples,
        such as imported networks, count as such.
        """
        if not self.classes:
            return None
        counts = self._class_counts
        if counts is None or len(set(counts)) == 1:
            return tuple(range(self.classes))
        found = np.array(counts, np.float64)
        if found.sum() > _MIXED:
            found = np.ceil(found * (_MIXED / found.sum()))
        numbers = np.repeat(np.arange(self.classes), found.astype(np.int64))
        # Entry j of a class with n of them is at (j + 1/2) / n of the whole.
        place = np.concatenate([(np.arange(count) + 0.5) / count for count in found])
        order = np.argsort(place, kind="stable")
        return tuple(numbers[order].tolist())

    def numbered(self, data: ImageSet) -> ImageSet:
        """The run's data, opened again, with the scaling and the numbers of the classes that the run began with.

        Raises:
            ValueError: if the data have other classes.
        """
        if data.scaling is not None:
            # Another machine may sum in another order.
            data = dataclasses.replace(data, scaling=self.scaling)
        if self.class_names is None:
            return data
        return renumbered(data, self.class_names)

    def record(self) -> dict[str, Any]:
        """The content of config.json, without its checksum."""
        record = {
            "format": _FORMAT,
            "stablefield": self.version,
            "data": self.data,
            "shape": list(self.shape),
            "classes": self.classes,
            "opening": dict(self.opening),
            "manifest": dict(self.manifest),
            "recipe": encode(self.recipe),
        }
        if self.extensions:
            record["extensions"] = [dataclasses.asdict(extension) for extension in self.extensions]
        if self.initial is not None:
            record["initial"] = self.initial.record()
        if self.held_out is not None:
            record["held_out"] = self.held_out.record()
        return record

    @classmethod
    def read(cls, path: Path) -> "RunConfig":
        """Read config.json.

        Raises:
            ValueError: if the file cannot be read, is damaged, has another format, or holds invalid values.
        """
        try:
            return _config(read_record(path, _REQUIRED, _OPTIONAL))
        except (OSError, ValueError) as error:
            advice = ""
            if "checksum" in str(error):
                advice = ' If you changed it on purpose, remove its entry "checksum".'
            raise ValueError(f"{path} cannot be used: {reason(error)}.{advice}") from error


def _config(record: Mapping[str, Any]) -> RunConfig:
    """The configuration in a record.

    Raises:
        ValueError: if an entry is missing or has the wrong type.
    """
    missing = ", ".join(sorted(_REQUIRED - set(record)))
    if missing:
        raise ValueError(f"it has no {missing}")
    if record["format"] != _FORMAT:
        raise ValueError(f"its format is {record['format']}, this version reads {_FORMAT}")
    found = {name: decode(record[name]) if name in ("shape", "recipe") else record[name] for name in _TYPES}
    for name, kind in _TYPES.items():
        if not has_type(found[name], kind):
            raise ValueError(f"its {name} has the wrong type")
    if min(found["shape"], default=0) < 1 or found["classes"] < 0:
        raise ValueError(f"its shape is {found['shape']} and its classes are {found['classes']}")
    opening, manifest = record["opening"], record["manifest"]
    if not isinstance(opening, dict) or not isinstance(manifest, dict):
        raise ValueError("its opening or its manifest is not a JSON object")
    scaling = Scaling.of_manifest(cast("dict[str, Any]", manifest))
    if len(found["shape"]) != 3 if scaling is None else len(scaling.mean) != found["shape"][0]:
        raise ValueError(f"its shape is {found['shape']}, which does not fit its data")
    if AutoencoderRecord.of_manifest(cast("dict[str, Any]", manifest)) is not None and scaling is None:
        raise ValueError("it has an autoencoder, and no scaling of latents")
    for name, value in cast("dict[str, Any]", opening).items():
        plain = tuple(cast("list[Any]", value)) if isinstance(value, list) else value
        if name not in _OPENING or not has_type(plain, _OPENING[name]):
            raise ValueError(f"its opening has {name} = {str(value)[:80]}, which this version does not know")
    return RunConfig(
        data=found["data"],
        shape=found["shape"],
        classes=found["classes"],
        manifest=cast("dict[str, Any]", manifest),
        recipe=found["recipe"],
        version=found["stablefield"],
        opening=cast("dict[str, Any]", opening),
        extensions=_extensions(record.get("extensions", [])),
        initial=InitialWeights.of(record["initial"]) if "initial" in record else None,
        held_out=HeldOut.of(record["held_out"]) if "held_out" in record else None,
    )


def _extensions(entries: Any) -> tuple[Extension, ...]:
    try:
        listed = cast("list[Any]", entries) if isinstance(entries, list) else [None]
        found = [from_record(Extension, entry) for entry in listed]
    except ValueError as error:
        raise ValueError(f"its extensions are not a list of step, before and after: {error}") from error
    if any(min(dataclasses.astuple(extension)) < 0 for extension in found):
        raise ValueError("its extensions are not a list of step, before and after: one holds a negative number")
    return tuple(found)
