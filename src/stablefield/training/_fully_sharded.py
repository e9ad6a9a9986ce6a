"""Fully sharded training by torch's FSDP2: each process holds a part of every weight, gradient, moment and average.

A block's weights are gathered from all processes just before it computes, and dropped after it; its gradients are summed
over the processes and split again during the backward pass. Where a model must be whole, as for a picture, the first process
gathers it, tensor by tensor. Files are always whole: the processes write their parts in parallel, by
torch.distributed.checkpoint, and the first one merges them into one safetensors file, so that a checkpoint opens in one
process and continues on any number of them.

References:
    Zhao, Gu, Varma, Luo, Huang, Xu, Wright, Shojanazeri, Ott, Shleifer, Desmaison, Balioglu, Damania, Nguyen, Chauhan, Hao,
    Mathews, Li, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", VLDB 2023.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from stablefield._distributed import Ranks
from stablefield.training._recipe import Recipe

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["is_sharded", "own_part", "own_rows", "shard", "shards", "to_first", "whole", "write_parts"]

# Importing FSDP2 takes a run that shards nothing a second, so only the functions that a sharded run calls import it.


def shards(recipe: Recipe, processes: int) -> bool:
    """Whether the processes of a run hold parts of the weights, instead of all of them.

    Raises:
        ValueError: if a process would have no rows in a part of a batch: all must gather weights equally often.
    """
    if not recipe.fsdp or processes == 1:
        return False
    parts = processes * recipe.gradient_accumulation_steps
    if recipe.batch < parts:
        raise ValueError(
            f"batch={recipe.batch} is below the {parts} parts into which the processes split it: with fsdp=True, pass "
            f"batch={parts} or more, or a smaller gradient_accumulation_steps."
        )
    return True


def shard(module: nn.Module, device: torch.device) -> None:
    """Keep this process's part of a module, in place, on `device`; all processes call it with the same module.

    Its blocks, the children of its lists of modules, are gathered one by one in a forward pass, all other weights together.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(device.type, (Ranks.launched(device).world_size,))
    # FSDP2 takes no other layout.
    module.to(memory_format=torch.contiguous_format)  # pyrefly: ignore[no-matching-overload]
    for part in (*_blocks(module), module):
        fully_shard(part, mesh=mesh)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            # Losses are divided by the size of the whole batch: their sum is wanted, which gloo can compute, unlike a mean.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether each process holds a part of a tensor."""
    return hasattr(tensor, "to_local")


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in the same memory; any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, gathered from the processes, which all call this; any other tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def to_first(module: nn.Module, target: nn.Module | None, ranks: Ranks) -> None:
    """Copy a sharded module to a whole one of the first process, tensor by tensor; the others pass None."""
    state: dict[str, Tensor] = {} if target is None else target.state_dict()
    with ranks.waiting("to gather weights"), torch.no_grad():
        for name, value in module.state_dict().items():
            found = whole(value)
            if target is not None:
                state[name].copy_(found)


def write_parts(path: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Write tensors to one safetensors file, each process its parts; then the first process merges them.

    A tensor without dimensions is written with one, since torch 2.13 writes 0 for it when it merges parts.

    Raises:
        OSError: if a process cannot write.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    folder = path.with_name(f".{path.name}.tmp")
    has_part = any(own_part(value).numel() for value in tensors.values())
    parts, found = ranks.total(float(has_part), float(path.parent.is_dir()), purpose="to write their parts")
    if found < ranks.world_size:
        raise OSError(
            errno.ENOENT, f"{ranks.world_size - found:.0f} processes do not find it: all machines must share it"
        )
    # This writer alone uses no pickle.
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True, enable_consolidation=True)
    content = {name: value if value.ndim else value.reshape(1) for name, value in tensors.items()}
    try:
        with ranks.waiting("to write their parts"):
            dcp.save(content, storage_writer=writer, process_group=ranks.group)
    except CheckpointException as error:
        rank, (first, _) = next(iter(error.failures.items()))
        if isinstance(first, OSError):
            raise OSError(first.errno, f"process {rank}: {first.strerror or first}") from error
        raise RuntimeError(f"process {rank} cannot write its part of {path}: {first}") from error
    if not ranks.first:
        return
    if len(list(folder.glob("*/*.safetensors"))) < parts:
        # torch merges what is there, with zeros for the rest.
        raise OSError(errno.ENOENT, "the first process does not find the parts of the others")
    (merged,) = folder.glob("*.safetensors")
    os.replace(merged, path)
    shutil.rmtree(folder)


def own_rows(path: Path, like: Callable[[str], Tensor | None]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file by name; only this process's part of those that are for a sharded tensor.

    Args:
        path: the file.
        like: the tensor that one of the file is for, by its name; if it is none, not sharded, or of another shape, the
            file's is read whole.
    """
    from safetensors import safe_open
    from torch.distributed.tensor import DTensor

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            wanted, rows = like(name), file.get_slice(name)
            shape = torch.Size(rows.get_shape())
            if wanted is None or not is_sharded(wanted) or wanted.shape != shape:
                yield name, file.get_tensor(name)
                continue
            mesh = wanted.device_mesh
            each = -(-shape[0] // mesh.size())
            first = min(each * mesh.get_local_rank(), shape[0])
            part = rows[first : first + each].to(wanted.device)
            yield name, DTensor.from_local(part, mesh, wanted.placements, shape=shape, stride=wanted.stride())


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The children of the outermost lists and dictionaries of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from child.children()
        else:
            yield from _blocks(child)
