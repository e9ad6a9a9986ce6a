"""A run folder: all files of a run, from its configuration to its pictures.

config.json  metrics.jsonl  checkpoints/step-00002000/  samples/step-00002000.png  ema/step-00002000.safetensors
environment.jsonl  report.html  samples/training.gif
and, during training, .stablefield.lock
"""

import dataclasses
import math
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from stablefield._regular_file import reason
from stablefield._shapes import whole_number
from stablefield.data._autoencoder import AutoencoderRecord
from stablefield.data._image_set import ImageSet, renumbered
from stablefield.data._png import is_picture
from stablefield.data._scaling import Scaling
from stablefield.training._checkpoint import CheckpointError, State, read_state, remove
from stablefield.training._config import decode, encode, fits
from stablefield.training._held_out import HeldOut
from stablefield.training._initial_weights import InitialWeights
from stablefield.training._lock import Holder, Lock
from stablefield.training._recipe import Recipe
from stablefield.training._records import append_line, is_count, read_lines, read_record, write_lines, write_record

__all__ = ["Extension", "HasFolder", "RunConfig", "RunFolder"]

_FORMAT = 1
_LOCK = ".stablefield.lock"
_ATTEMPTS = 10
# Files that a kill may leave in a new folder: a run can start there again.
_BEGINNINGS = re.compile(rf"{re.escape(_LOCK)}|\.config\.json\.(\d+\.)?tmp")
_FORMER = frozenset({"format", "stablefield", "data", "shape", "classes", "opening", "manifest", "recipe"})
_OPTIONAL = frozenset({"extensions", "initial", "held_out"})
_TYPES = {"stablefield": str, "data": str, "shape": tuple[int, ...], "classes": int, "recipe": Recipe}
_OPENING = {
    "resolution": int | tuple[int, int] | None,
    "resize": Literal["crop", "squash"],
    "skip_broken": bool,
    "colour": Literal["auto", "grey", "rgb"],
    "background": str,
}


class HasFolder(Protocol):
    """An open run: any object with the run's folder."""

    @property
    def path(self) -> Path:
        """The folder."""
        ...


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
        if whole_number("steps", steps, 1) == before:
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
        """Names of the network's classes, if known."""
        names: Any = self.manifest.get("class_names")
        if not self.classes or not isinstance(names, list | tuple):
            return None
        named = tuple(str(name) for name in cast("Sequence[Any]", names))
        return named if len(named) == self.classes else None

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


Value = TypeVar("Value")


class RunFolder:
    """The folder `path` of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Lock | None = None

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> "RunFolder":
        """Create the folder and write config.json.

        Raises:
            ValueError: if the folder is not empty or not writable.
        """
        folder = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder._require_empty()
            with folder.locked():
                folder._require_empty()  # another process may have been faster
                for leftover in path.glob(".config.json.*tmp"):  # of a kill
                    leftover.unlink()
                folder._write_config(config)
        except OSError as error:
            raise ValueError(
                f"out={path} cannot be written ({error.strerror}): name a folder in a place that you may write to."
            ) from error
        return folder

    def require_unlocked(self) -> None:
        """Check that no other process trains in the folder, without taking the lock.

        Raises:
            ValueError: naming the process, its machine and its start.
        """
        if self._lock is None:
            Lock(self.path / _LOCK).require_free()

    def _require_empty(self) -> None:
        if any(_BEGINNINGS.fullmatch(found.name) is None for found in self.path.iterdir()):
            self.require_unlocked()
            raise ValueError(f"out={self.path} is not empty: name a new folder, or resume the run in it.")

    def extend(self, config: RunConfig) -> None:
        """Write the configuration that `RunConfig.extended` made.

        Raises:
            ValueError: if another process trains in the folder, or it cannot be written.
        """
        try:
            with self.locked():
                self._write_config(config)
        except OSError as error:
            raise ValueError(
                f"steps={config.recipe.steps} cannot be written to {self.path} ({error.strerror}): change its permissions, "
                "or extend a copy of the run."
            ) from error

    def _write_config(self, config: RunConfig) -> None:
        record = {
            "format": _FORMAT,
            "stablefield": config.version,
            "data": config.data,
            "shape": list(config.shape),
            "classes": config.classes,
            "opening": dict(config.opening),
            "manifest": dict(config.manifest),
            "recipe": encode(config.recipe),
        }
        if config.extensions:
            record["extensions"] = [dataclasses.asdict(extension) for extension in config.extensions]
        if config.initial is not None:
            record["initial"] = config.initial.record()
        if config.held_out is not None:
            record["held_out"] = config.held_out.record()
        write_record(self.path / "config.json", record)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open an existing run.

        Raises:
            ValueError: if the folder holds no run.
        """
        if path.is_dir() and all(_BEGINNINGS.fullmatch(found.name) for found in path.iterdir()):
            raise ValueError(
                f"{path} holds no run yet, so there is nothing to continue. Start the run with out={path}."
            )
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is not a run: it has no config.json. Name the folder of a training run.")
        return cls(path)

    @contextmanager
    def locked(self, tell: Callable[[str], None] | None = None) -> Generator[None]:
        """Keep other processes from training in the folder within this block; blocks of one object may be nested.

        Args:
            tell: called with the reason for a wait, as there may be if the last holder was on another machine.

        Raises:
            ValueError: naming the process that trains in it, its machine and its start.
            OSError: if the folder is not writable.
        """
        if self._lock is not None:
            yield
            return
        lock = Lock(self.path / _LOCK)
        lock.acquire(tell)
        self._lock = lock
        try:
            yield
        finally:
            self._lock = None
            lock.release()

    @property
    def successor(self) -> Holder | None:
        """The process that took the folder over from this one within a `locked` block; None if none did."""
        return None if self._lock is None else self._lock.successor

    def config(self) -> RunConfig:
        """Read config.json.

        Raises:
            ValueError: if the file cannot be read, is damaged, has another format, or holds invalid values.
        """
        path = self.path / "config.json"
        try:
            return _config(read_record(path, _FORMER, _OPTIONAL))
        except (OSError, ValueError) as error:
            advice = ""
            if "checksum" in str(error):
                advice = ' If you changed it on purpose, remove its entry "checksum".'
            raise ValueError(f"{path} cannot be used: {reason(error)}.{advice}") from error

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl, without the numbers that are not finite."""
        append_line(self.path / "metrics.jsonl", {key: value for key, value in entry.items() if not _is_nan(value)})

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl, without damaged or incomplete ones.

        Each has a "step". Its other entries are finite numbers, or, if their names begin with "bin_", lists of such numbers
        and None: rising edges between n bins, and n values for the bins.
        """
        return (entry for entry in read_lines(self.path / "metrics.jsonl") if _is_metrics(entry))

    def rewind_log(self, step: int) -> None:
        """Drop the lines of metrics.jsonl after `step`, which a resumed run writes again."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            write_lines(path, (entry for entry in self.metrics() if entry["step"] <= step))

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint of `step`."""
        return self.path / "checkpoints" / f"step-{step:08d}"

    @property
    def snapshots(self) -> Path:
        """The folder of snapshots of power-function averages."""
        return self.path / "ema"

    def prune(self, keep_last: int, keep_every: int, best: int | None = None) -> None:
        """Delete all checkpoints but the newest `keep_last`, those at multiples of `keep_every` steps, and `best`."""
        for folder in self._checkpoints()[:-keep_last]:
            step = _step_of(folder)
            if step != best and (not keep_every or step % keep_every):
                remove(folder)

    def remove_after(self, step: int) -> None:
        """Delete the checkpoints of later steps."""
        for folder in self._checkpoints():
            if _step_of(folder) > step:
                remove(folder)

    def picture(self, step: int, suffix: str = ".png") -> Path:
        """The file of the sample grid of `step`; of data that are no pictures, with the suffix .npz, the samples."""
        return self.path / "samples" / f"step-{step:08d}{suffix}"

    def best(self) -> tuple[int, float] | None:
        """Step and held-out loss of the checkpoint with the lowest one; None if none was measured."""
        measured = {entry["step"]: entry["held_out_loss"] for entry in self.metrics() if "held_out_loss" in entry}
        kept = [(measured[step], step) for step in map(_step_of, self._checkpoints()) if step in measured]
        return (min(kept)[1], min(kept)[0]) if kept else None

    def newest(self) -> tuple[Path, State, list[str]] | None:
        """The newest intact checkpoint, its state, and the faults of newer ones; None if there is no checkpoint."""
        return self.read_newest(lambda folder: folder)

    def read_newest(self, read: Callable[[Path], Value]) -> tuple[Value, State, list[str]] | None:
        """What `read` returns for the newest intact checkpoint, its state, and the faults of newer ones.

        If a run in progress deletes a checkpoint during the read, start again with the newest.

        Returns:
            None if there is no checkpoint.

        Raises:
            ValueError: if no checkpoint is intact, or the run deletes them faster than this can read.
        """
        for _ in range(_ATTEMPTS):
            complaints: list[str] = []
            replaced = False
            for folder in reversed(self._checkpoints()):
                there = _identity(folder)
                try:
                    state = read_state(folder)
                except CheckpointError as error:
                    replaced = _identity(folder) != there
                    if replaced:
                        break
                    complaints.append(str(error))
                    continue
                try:
                    return read(folder), state, complaints
                except (CheckpointError, FileNotFoundError):
                    replaced = _identity(folder) != there
                    if not replaced:
                        raise
                    break
            if replaced:
                continue
            if complaints:
                raise ValueError("no checkpoint of this run is intact. " + " ".join(complaints))
            return None
        raise ValueError(
            f"{self.path}: the run deletes its checkpoints faster than they can be read: train with a larger keep_last or "
            "checkpoint_every, or wait for the run to end."
        )

    def read_checkpoint(self, which: str, read: Callable[[Path], Value]) -> tuple[Value, State, list[str]] | None:
        """As `read_newest` for "newest"; else what `read` returns for the "best" checkpoint, or that of a step, its state.

        Raises:
            ValueError: if there is no such checkpoint; names those that there are.
            CheckpointError: if it is damaged.
        """
        if which == "newest":
            return self.read_newest(read)
        if which != "best" and not which.isdecimal():
            raise ValueError(f"checkpoint={which!r:.40}: pass newest, best, or a step.")
        for attempt in range(_ATTEMPTS):
            best = self.best() if which == "best" else None
            step = best[0] if best is not None else int(which) if which.isdecimal() else None
            kept = {_step_of(folder): folder for folder in self._checkpoints()}
            if step not in kept:
                there = f"it has those of the steps {', '.join(map(str, kept))}" if kept else "it has none yet"
                why = "best needs a run with held_out; " if which == "best" else ""
                raise ValueError(f"checkpoint={which}: this run has no such checkpoint; {why}{there}.")
            try:
                return read(kept[step]), read_state(kept[step]), []
            except (CheckpointError, FileNotFoundError):
                # A run in progress may have found a better one, and deleted this.
                if kept[step].exists() or attempt == _ATTEMPTS - 1:
                    raise
        return None

    def _checkpoints(self) -> list[Path]:
        folders = (self.path / "checkpoints").glob("step-*")
        return sorted(folder for folder in folders if re.fullmatch(r"step-\d{8,}", folder.name))


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _config(record: Mapping[str, Any]) -> RunConfig:
    """The configuration in a record.

    Raises:
        ValueError: if an entry is missing or has the wrong type.
    """
    missing = ", ".join(sorted(_FORMER - set(record)))
    if missing:
        raise ValueError(f"it has no {missing}")
    if record["format"] != _FORMAT:
        raise ValueError(f"its format is {record['format']}, this version reads {_FORMAT}")
    found = {name: decode(record[name]) if name in ("shape", "recipe") else record[name] for name in _TYPES}
    for name, kind in _TYPES.items():
        if not fits(found[name], kind):
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
        if name not in _OPENING or not fits(plain, _OPENING[name]):
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
    names = {field.name for field in dataclasses.fields(Extension)}
    found: list[Extension] = []
    for entry in cast("list[Any]", entries) if isinstance(entries, list) else [None]:
        if not isinstance(entry, dict) or set(entry) != names or not all(map(is_count, entry.values())):
            raise ValueError("its extensions are not a list of step, before and after")
        found.append(Extension(**cast("dict[str, int]", entry)))
    return tuple(found)


def _is_metrics(entry: Mapping[str, Any]) -> bool:
    if not is_count(entry.get("step")):
        return False
    edges = entry.get("bin_edges", [])
    for name, value in entry.items():
        if not name.startswith("bin_"):
            if not fits(value, float):
                return False
            continue
        row = tuple(cast("list[Any]", value)) if isinstance(value, list) else None
        if name == "bin_edges":
            if not fits(row, tuple[float, ...]) or any(a >= b for a, b in pairwise(row or ())):
                return False
        elif not fits(row, tuple[float | None, ...]) or len(row or ()) != len(edges) + 1:
            return False
    return True


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
