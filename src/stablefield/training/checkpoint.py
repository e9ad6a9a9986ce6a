"""A checkpoint: a folder with the weights, their average and the optimiser in safetensors, and the rest in JSON.

    step-00002000/  model.safetensors  ema.safetensors  optimizer.safetensors  state.json

It is written under a temporary name, synced and renamed, so a folder of this name is whole; state.json carries the
sha256 of the other files, so later damage is seen.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CheckpointError", "State", "load_weights", "read_state", "restore", "save"]

_FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


class CheckpointError(Exception):
    """A checkpoint whose files are missing or are not those that were written."""


@dataclass(frozen=True)
class State:
    """Where a run stood.

    Attributes:
        step: optimiser steps done.
        images: images seen.
    """

    step: int
    images: int


def save(folder: Path, state: State, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint to `folder`, whole or not at all."""
    from safetensors.torch import save_file

    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = (model.state_dict(), ema.state_dict(), _flat(optimizer))
    for name, content in zip(_FILES, tensors, strict=True):
        save_file({key: value.detach().contiguous().cpu() for key, value in content.items()}, temporary / name)
        _sync(temporary / name)
    record = {
        "step": state.step,
        "images": state.images,
        "sha256": {name: _sha256(temporary / name) for name in _FILES},
    }
    (temporary / "state.json").write_text(json.dumps(record, indent=2) + "\n")
    _sync(temporary / "state.json")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    _sync(folder.parent)


def read_state(folder: Path) -> State:
    """Check a checkpoint's files against their checksums and say where the run stood.

    Raises:
        CheckpointError: naming the file.
    """
    try:
        record = json.loads((folder / "state.json").read_text())
        state, sums = State(int(record["step"]), int(record["images"])), record["sha256"]
        for name in _FILES:
            if _sha256(folder / name) != sums[name]:
                raise CheckpointError(f"{folder / name} is not what was written there (its sha256 differs).")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}.") from error
    return state


def load_weights(folder: Path, module: nn.Module, *, ema: bool) -> None:
    """Load the weights, or their average, into `module`."""
    from safetensors.torch import load_file

    module.load_state_dict(load_file(folder / ("ema.safetensors" if ema else "model.safetensors")))


def restore(folder: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Load everything from a checkpoint.

    Raises:
        CheckpointError: if a file is not what was written.
    """
    from safetensors.torch import load_file

    state = read_state(folder)
    load_weights(folder, model, ema=False)
    load_weights(folder, ema, ema=True)
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        number, name = key.split(".", 1)
        entries.setdefault(int(number), {})[name] = value
    record: dict[str, Any] = optimizer.state_dict()
    optimizer.load_state_dict({"state": entries, "param_groups": record["param_groups"]})
    return state


def _flat(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, entry in state.items() for name, value in entry.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
