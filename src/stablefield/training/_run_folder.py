"""A run folder: all files of a run, from its configuration to its pictures.

config.json  metrics.jsonl  checkpoints/step-00002000/  samples/step-00002000.png  ema/step-00002000.safetensors
environment.jsonl  report.html  samples/training.gif
and, during training, .stablefield.lock
"""

import math
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from stablefield._shapes import check_kind, whole_number
from stablefield.training._checkpoint import CheckpointError, State, read_state, remove
from stablefield.training._lock import Holder, Lock
from stablefield.training._post_hoc import snapshot_files
from stablefield.training._records import append_line, has_type, is_count, read_lines, write_lines, write_record
from stablefield.training._run_config import RunConfig

__all__ = ["TRACKED", "HasFolder", "RunFolder", "checkpoint_name", "is_run"]

TRACKED = "stablefield"
"""The project's name for trackers, and the folder in the run's folder that TensorBoard's events go to."""
_LOCK = ".stablefield.lock"
_ATTEMPTS = 10
# Files that a kill may leave in a new folder: a run can start there again.
_BEGINNINGS = re.compile(rf"{re.escape(_LOCK)}|\.config\.json\.(\d+\.)?tmp")


class HasFolder(Protocol):
    """An open run: any object with the run's folder."""

    @property
    def path(self) -> Path:
        """The folder."""
        ...


Value = TypeVar("Value")


def is_run(path: str | Path) -> bool:
    """Whether this is the folder of a run."""
    return (Path(path) / "config.json").is_file()


def checkpoint_name(value: Any) -> str:
    """The argument `checkpoint`, "newest", "best" or a step, as a string.

    Raises:
        TypeError: if it is neither a string nor a whole number.
        ValueError: if it is another string, or a negative number.
    """
    remedy = "newest, best, or a step"
    if isinstance(value, Integral):
        return str(whole_number("checkpoint", value, 0))
    check_kind("checkpoint", value, str, remedy)
    if value not in ("newest", "best") and not value.isdecimal():
        raise ValueError(f"checkpoint={value!r:.40}: pass {remedy}.")
    return str(value)


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
        folder, new = cls(path), not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder._require_empty()
            with folder.locked():
                folder._require_empty()  # another process may have been faster
                for leftover in path.glob(".config.json.*tmp"):  # of a kill
                    leftover.unlink()
                folder._write_config(config)
        except Exception as error:
            if new:
                with suppress(OSError):  # of a folder that is not empty
                    path.rmdir()
            if not isinstance(error, OSError):
                raise
            raise ValueError(
                f"out={path} cannot be written ({error.strerror}): name a folder in a place that you may write to."
            ) from error
        return folder

    @property
    def environments(self) -> Path:
        """The file that says where the run was trained: there from the end of the first step on."""
        return self.path / "environment.jsonl"

    def withdraw(self) -> None:
        """Remove what a run that has taken no step wrote to the folder, so that another can begin there."""
        # If it cannot be removed, or another process trains in it by now, it stays.
        with suppress(OSError, ValueError), self.locked():
            first, tracked = self.checkpoint(0), self.path / TRACKED
            events = [*tracked.rglob("events.out.tfevents.*"), *tracked.rglob("hparams.yml")]
            files = [found for found in self.path.rglob("*") if not found.is_dir() and first not in found.parents]
            others = {*files} - {self.path / "config.json", *events}
            # With a file of somebody else, such as of on_start, all stays.
            if self.environments.exists() or not all(map(self._is_beginning, others)):
                return
            for file in events:
                file.unlink()
            for folder in sorted((found for found in [tracked, *tracked.rglob("*")] if found.is_dir()), reverse=True):
                folder.rmdir()
            remove(first)  # of weights to begin with
            if first.parent.exists():
                first.parent.rmdir()
            (self.path / "config.json").unlink(missing_ok=True)

    def require_unlocked(self) -> None:
        """Check that no other process trains in the folder, without taking the lock.

        Raises:
            ValueError: naming the process, its machine and its start.
        """
        if self._lock is None:
            Lock(self.path / _LOCK).require_free()

    def _is_beginning(self, path: Path) -> bool:
        """Whether it is a lock or a file that a killed process began to write."""
        return path.parent == self.path and _BEGINNINGS.fullmatch(path.name) is not None

    def _require_empty(self) -> None:
        if not all(map(self._is_beginning, self.path.iterdir())):
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
        write_record(self.path / "config.json", config.record())

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
        """Read config.json; errors as for `RunConfig.read`."""
        return RunConfig.read(self.path / "config.json")

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

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint, intact or not."""
        return bool(self._checkpoints())

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

    def to_continue(self, config: RunConfig) -> tuple[Path, State, list[str]] | None:
        """As `newest`, before a resume, which deletes what the folder has of later steps than the checkpoint.

        Args:
            config: of the run.

        Returns:
            None if the run has not come to its first checkpoint.

        Raises:
            ValueError: if no checkpoint is intact, or they are gone.
        """
        found = self.newest()
        if found is not None:
            return found
        if config.initial is not None:
            raise ValueError(
                f"{self.path} has no checkpoint, not even one of the weights of {config.initial.source}, with which it "
                "was to begin: start the run again in a new folder."
            )
        # A kill leaves no more than this without a checkpoint; a line of the log precedes the checkpoint of its step.
        total = max(config.recipe.steps, *(change.before for change in config.extensions), 0)
        first = min(config.recipe.checkpoint_every, total)
        if config.held_out is not None:
            first = min(first, config.held_out.every)  # the first look is the best one so far
        reached = max((*(entry["step"] for entry in self.metrics()), *snapshot_files(self.snapshots)), default=0)
        if reached > first:
            raise ValueError(
                f"{self.path} has no checkpoint, and its log or its snapshots reach step {reached:,}: its checkpoints are "
                "gone, and to begin anew would delete what remains. Bring them back, start a new run in another folder, or "
                "move metrics.jsonl and ema away."
            )
        return None

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

    def read_checkpoint(self, which: str | int, read: Callable[[Path], Value]) -> tuple[Value, State, list[str]] | None:
        """As `read_newest` for "newest"; else what `read` returns for the "best" checkpoint, or that of a step, its state.

        Raises:
            ValueError: if there is no such checkpoint; names those that there are.
            CheckpointError: if it is damaged.
        """
        which = checkpoint_name(which)
        if which == "newest":
            return self.read_newest(read)
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


def _is_metrics(entry: Mapping[str, Any]) -> bool:
    if not is_count(entry.get("step")):
        return False
    edges = entry.get("bin_edges", [])
    for name, value in entry.items():
        if not name.startswith("bin_"):
            if not has_type(value, float):
                return False
            continue
        row = tuple(cast("list[Any]", value)) if isinstance(value, list) else None
        if name == "bin_edges":
            if not has_type(row, tuple[float, ...]) or any(a >= b for a, b in pairwise(row or ())):
                return False
        elif not has_type(row, tuple[float | None, ...]) or len(row or ()) != len(edges) + 1:
            return False
    return True


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
