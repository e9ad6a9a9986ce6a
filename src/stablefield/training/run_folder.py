"""A run folder: where a run lives, from its configuration to its pictures.

config.json  metrics.jsonl  checkpoints/step-00002000/  samples/step-00002000.png  ema/step-00002000.safetensors
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from stablefield.data.image_set import ImageSet, renumbered
from stablefield.training.checkpoint import CheckpointError, State, read_state, remove
from stablefield.training.config import decode, encode
from stablefield.training.files import write_whole
from stablefield.training.recipe import Recipe

__all__ = ["RunConfig", "RunFolder"]

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What config.json says.

    Attributes:
        data: the data as it was named to the command.
        shape: of one image, (C, H, W).
        classes: number of classes the network is told; 0 for none.
        manifest: what the data are.
        recipe: what the run does.
        version: of the library that wrote it.
        opening: how the data were opened, beside their name: resolution, resize, skip_broken.
    """

    data: str
    shape: tuple[int, int, int]
    classes: int
    manifest: Mapping[str, Any]
    recipe: Recipe
    version: str
    opening: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """What the classes are called that the network is told, if that is known."""
        names: Any = self.manifest.get("class_names")
        if not self.classes or not isinstance(names, list | tuple):
            return None
        named = tuple(str(name) for name in cast("Sequence[Any]", names))
        return named if len(named) == self.classes else None

    def numbered(self, data: ImageSet) -> ImageSet:
        """The run's data, opened again, with the classes numbered as the network was told them.

        Raises:
            ValueError: if the data have other classes.
        """
        if self.class_names is None:
            return data
        return renumbered(data, self.class_names)


class RunFolder:
    """The folder `path` of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> "RunFolder":
        """Make the folder and write config.json.

        Raises:
            ValueError: if the folder is not empty or cannot be written.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise ValueError(
                    f"--out {path} is not empty: name a new folder, or continue the run in it with --resume --out {path}."
                )
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
            text = json.dumps(record, indent=2) + "\n"
            write_whole(path / "config.json", lambda temporary: temporary.write_text(text))
        except OSError as error:
            raise ValueError(
                f"--out {path} cannot be written ({error.strerror}): name a folder in a place that you may write to."
            ) from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open an existing run.

        Raises:
            ValueError: if there is none.
        """
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is not a run: it has no config.json. Train one: stablefield train digits.")
        return cls(path)

    def config(self) -> RunConfig:
        """Read config.json.

        Raises:
            ValueError: if it cannot be read or is of another format.
        """
        try:
            record = json.loads((self.path / "config.json").read_text())
            if record["format"] != _FORMAT:
                raise ValueError(f"its format is {record['format']}, this version reads {_FORMAT}")
            return RunConfig(
                data=record["data"],
                shape=tuple(record["shape"]),
                classes=record["classes"],
                manifest=record["manifest"],
                recipe=decode(record["recipe"]),
                version=record["stablefield"],
                opening=record["opening"],
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path / 'config.json'} cannot be used: {error}.") from error

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(dict(entry)) + "\n")

    def rewind_log(self, step: int) -> None:
        """Drop the lines of metrics.jsonl after `step`, which a resumed run writes again."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept: list[str] = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # a line cut off by a kill
        write_whole(path, lambda temporary: temporary.write_text("".join(kept)))

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint of `step`."""
        return self.path / "checkpoints" / f"step-{step:08d}"

    @property
    def snapshots(self) -> Path:
        """The folder of snapshots of power-function averages."""
        return self.path / "ema"

    def prune(self, keep_last: int, keep_every: int) -> None:
        """Delete the checkpoints that are neither among the newest `keep_last` nor at multiples of `keep_every` steps."""
        for folder in self._checkpoints()[:-keep_last]:
            step = int(folder.name.removeprefix("step-"))
            if not keep_every or step % keep_every:
                remove(folder)

    def remove_after(self, step: int) -> None:
        """Delete the checkpoints of later steps."""
        for folder in self._checkpoints():
            if int(folder.name.removeprefix("step-")) > step:
                remove(folder)

    def picture(self, step: int) -> Path:
        """The file of the sample grid of `step`."""
        return self.path / "samples" / f"step-{step:08d}.png"

    def newest(self) -> tuple[Path, State, list[str]] | None:
        """The newest whole checkpoint, where it stood, and what was wrong with newer ones; None if there is none."""
        complaints: list[str] = []
        for folder in reversed(self._checkpoints()):
            try:
                return folder, read_state(folder), complaints
            except CheckpointError as error:
                complaints.append(str(error))
        if complaints:
            raise ValueError("no checkpoint of this run is whole. " + " ".join(complaints))
        return None

    def _checkpoints(self) -> list[Path]:
        folders = (self.path / "checkpoints").glob("step-*")
        return sorted(folder for folder in folders if re.fullmatch(r"step-\d{8,}", folder.name))
