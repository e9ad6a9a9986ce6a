"""A checkpoint: a folder with the weights, their averages and the optimiser in safetensors, and the rest in JSON.

    step-00002000/  model.safetensors  ema.safetensors  optimizer.safetensors  [power-0.05.safetensors ...]  state.json

It is written under a temporary name, synced and renamed, so a folder with this name is complete; state.json holds the sha256
of the other files and its own checksum, which reveal later damage.
"""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stablefield._atomic_file import sync
from stablefield._distributed import Ranks
from stablefield._regular_file import reason, sha256
from stablefield.diffusion._importance_sampling import ImportanceSampling
from stablefield.training._files import read_tensors, write_tensors
from stablefield.training._fully_sharded import is_sharded, own_rows, write_parts
from stablefield.training._records import is_count, read_record, write_record

__all__ = ["CheckpointError", "State", "Trained", "load_weights", "read_state", "remove", "restore", "save", "sweep"]


_FORMER = frozenset({"step", "images", "sha256"})


class CheckpointError(ValueError):
    """A checkpoint whose files are missing, damaged, or do not fit the run."""


@dataclass(frozen=True)
class State:
    """The progress of a run.

    Attributes:
        step: optimiser steps done.
        images: images seen.
    """

    step: int
    images: int


@dataclass(frozen=True)
class Trained:
    """The state that training changes.

    Attributes:
        model: the weights.
        averages: modules with averages of them, by name: "ema", and "power-0.05" if snapshots are taken.
        optimizer: with its moments.
        importance: the fitted density of the noise levels, if there is one.
    """

    model: nn.Module
    averages: Mapping[str, nn.Module] = field(default_factory=dict[str, nn.Module])
    optimizer: torch.optim.Optimizer | None = None
    importance: ImportanceSampling | None = None

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the weights."""
        return any(map(is_sharded, self.model.parameters()))

    def modules(self) -> dict[str, nn.Module]:
        """The model, its averages and the density, by the names of their files."""
        density = {} if self.importance is None else {"importance": self.importance}
        return {"model": self.model, **self.averages, **density}


def save(folder: Path, state: State, trained: Trained, ranks: Ranks | None = None) -> None:
    """Write a checkpoint to `folder`, atomically.

    Args:
        folder: of the checkpoint.
        state: of the run.
        trained: the state that training changes.
        ranks: the processes that hold parts of it, all of which call this; by default this process alone.

    Raises:
        OSError: if it cannot be written, as on a full disk; leaves nothing behind.
    """
    ranks = ranks or Ranks()
    contents = {name: module.state_dict() for name, module in trained.modules().items()}
    if trained.optimizer is not None:
        contents["optimizer"] = _flat(trained.optimizer)
    temporary = folder.with_name(f".{folder.name}.tmp")
    if ranks.first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.barrier("to make the folder of a checkpoint")
    try:
        sums: dict[str, str] = {}
        for name, content in contents.items():
            path = temporary / f"{name}.safetensors"
            if any(map(is_sharded, content.values())):
                write_parts(path, content, ranks)
            elif ranks.first:
                write_tensors(path, content)
            if ranks.first:
                sync(path)
                sums[path.name] = sha256(path)
        if ranks.first:
            write_record(temporary / "state.json", {"step": state.step, "images": state.images, "sha256": sums})
            remove(folder)
            os.replace(temporary, folder)
            sync(folder.parent)
    finally:
        if ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a checkpoint; its name never refers to a partial one."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.old.tmp")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Delete half-written or half-deleted files that a kill left in a folder, or in its folder of checkpoints."""
    for leftover in (*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def read_state(folder: Path) -> State:
    """Check a checkpoint's files against their checksums, and return the run's progress.

    Raises:
        CheckpointError: naming the file.
    """
    path = folder / "state.json"
    try:
        record = read_record(path, _FORMER)
        step, images, sums = record.get("step"), record.get("images"), record.get("sha256")
        if not (is_count(step) and is_count(images) and isinstance(sums, dict) and "model.safetensors" in sums):
            raise ValueError("its entries are not those of a checkpoint")
        named = re.fullmatch(r"step-(\d{8,})", folder.name)
        if named is not None and int(named[1]) != step:
            raise ValueError(f"it is damaged: its step is {step}")
        for name, expected in sums.items():
            path = folder / name
            if Path(name).name != name or sha256(path) != expected:
                raise ValueError("it is damaged (its sha256 differs)")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be used: {reason(error)}.") from error
    return State(step, images)


def load_weights(folder: Path, module: nn.Module, name: str = "model") -> None:
    """Load the weights, or the average called `name`, into `module`.

    Raises:
        CheckpointError: if they do not fit it.
        FileNotFoundError: if they do not exist.
    """
    path, state = folder / f"{name}.safetensors", module.state_dict()
    sharded = any(map(is_sharded, state.values()))
    tensors = dict(own_rows(path, state.get)) if sharded else read_tensors(path)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the network of the run's config.json: {error}") from error


def restore(folder: Path, trained: Trained) -> State:
    """Load everything from a checkpoint.

    Raises:
        CheckpointError: if a file is damaged, or does not fit.
    """
    state = read_state(folder)
    for name, module in trained.modules().items():
        load_weights(folder, module, name)
    if trained.optimizer is not None:
        _restore_moments(folder / "optimizer.safetensors", trained.optimizer)
    return state


def _restore_moments(path: Path, optimizer: torch.optim.Optimizer) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    sharded = any(map(is_sharded, parameters))
    tensors = own_rows(path, partial(_weight_of, parameters)) if sharded else read_tensors(path).items()
    for key, value in tensors:
        number, _, name = key.partition(".")
        fits = number.isdecimal() and int(number) < len(parameters)
        if not fits or value.numel() != (1 if name == "step" else parameters[int(number)].numel()):
            raise CheckpointError(f"{path} does not fit the network of the run's config.json: {key}.")
        # The parts of several processes are merged in a file that has no tensors without dimensions.
        entries.setdefault(int(number), {})[name] = value.reshape(()) if name == "step" else value
    record: dict[str, Any] = optimizer.state_dict()
    optimizer.load_state_dict({"state": entries, "param_groups": record["param_groups"]})
    _lay_out(optimizer)


def _weight_of(parameters: list[Tensor], key: str) -> Tensor | None:
    """The weight whose moment a tensor is; None for another tensor."""
    number, _, name = key.partition(".")
    known = number.isdecimal() and int(number) < len(parameters)
    return parameters[int(number)] if known and name != "step" else None


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Give the moments the memory layout of their weights, which a file does not keep.

    Fused optimisers go through weights and moments in memory order: they would pair wrong elements of a channels-last weight
    and a contiguous moment.
    """
    for parameter, entry in optimizer.state.items():
        for name, value in entry.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                entry[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _flat(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, entry in state.items() for name, value in entry.items()}
