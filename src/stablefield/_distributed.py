"""Ranks: the processes of a torch.distributed group, their exchanges, and the error if one of them dies.

torchrun or `accelerate launch` starts the processes, and `Ranks.launched` joins them into one group. `Ranks()` is this
process alone, for which every exchange returns its argument, so that the same code serves one process and many. All
ranks of a group must make the same exchanges in the same order.
"""

import atexit
import os
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stablefield._shapes import found_device
from stablefield._wait_report import WaitReporter

__all__ = ["RankError", "Ranks", "single_process"]

# Rank 0 may decode a large folder or draw samples for hours while the others wait.
_PATIENCE = timedelta(hours=12)
_CPU = torch.device("cpu")

# Whether this process makes calls that the others do not make.
_SINGLE: ContextVar[bool] = ContextVar("single_process", default=False)

Value = TypeVar("Value")


class RankError(ConnectionError):
    """Another rank has died or does not answer."""


def _leave() -> None:
    """End a group of Gloo with the process: its threads may abort an interpreter that shuts down around them.

    NCCL would wait for ranks that may have died.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


@contextmanager
def single_process() -> Generator[None]:
    """A block that only this process runs, such as a callback on the first one: `Ranks.launched` returns `Ranks()` in it."""
    token = _SINGLE.set(True)
    try:
        yield
    finally:
        _SINGLE.reset(token)


@dataclass(frozen=True)
class Ranks:
    """The ranks of a process group; by default this process alone.

    A `purpose` completes "rank 0 waited for the others ...", in an error and in the report of a long wait.

    Attributes:
        rank: the number of this process, from 0.
        world_size: number of processes.
        group: their group; the default one if None.
        started: whether `launched` started the group for this object, which then ends it as a context manager.
    """

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None
    started: bool = False

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Self:
        """The ranks of a group, or of the default one."""
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    @classmethod
    def launched(cls, device: torch.device = _CPU) -> Self:
        """The processes that torchrun or `accelerate launch` started, or this process alone.

        The first call starts their group, with NCCL for GPUs of CUDA and Gloo for the CPU; later calls find it. Accelerate
        joins a group that it finds. A call within `single_process` is for this process alone. As a context manager, the
        result ends the group if this call started it: once in a process, since torch cannot start it again reliably.

        Args:
            device: device of the tensors to exchange; on CUDA each process takes the GPU of its local rank.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _SINGLE.get():
            return cls()
        if device.type == "cuda":
            torch.cuda.set_device(found_device(None))
        started = not dist.is_initialized()
        if started:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
            atexit.register(_leave)
        elif device.type == "cuda" and dist.get_backend() == "gloo":
            warnings.warn(
                "an earlier call on the CPU started the processes' group, so the exchanges of GPUs go through the host: "
                "train first, or start the group with torch.distributed.init_process_group('nccl').",
                stacklevel=2,
            )
        ranks = cls(dist.get_rank(), dist.get_world_size(), started=started)
        reporter = WaitReporter.current()
        if reporter is not None:
            reporter.start(ranks.rank, ranks.world_size)
        return ranks

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.started:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    def own_device(self, device: torch.device) -> torch.device:
        """This process's device: `device` if it is alone, else the GPU of its local rank or the CPU."""
        if self.world_size == 1:
            return device
        return found_device(None) if device.type == "cuda" else _CPU

    def share(self, items: Sequence[Value]) -> list[Value]:
        """This rank's share of `items`: every `world_size`-th."""
        return list(items[self.rank :: self.world_size])

    def all_gather(self, mine: Tensor, purpose: str) -> list[Tensor]:
        """The tensors of all ranks, all of one shape, in the order of the ranks; for one rank no copy."""
        if self.world_size == 1:
            return [mine]
        sent = self._sendable(mine)
        parts = [torch.empty_like(sent) for _ in range(self.world_size)]
        with self.waiting(purpose):
            dist.all_gather(parts, sent, group=self.group)
        return [part.to(mine.device) for part in parts]

    def all_gather_rows(self, rows: Tensor, purpose: str, counts: Sequence[int] | None = None) -> Tensor:
        """The rows (n_r, ...) of all ranks, (n, ...), in the order of the ranks; for one rank no copy.

        Args:
            rows: this rank's rows, perhaps none.
            purpose: see `Ranks`.
            counts: number of rows of each rank, if all ranks know it.
        """
        if self.world_size == 1:
            return rows
        if counts is None:
            own = torch.tensor([len(rows)], device=rows.device)
            counts = [int(count) for count in self.all_gather(own, purpose)]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = self.all_gather(padded, purpose)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def return_rows(self, rows: Tensor, counts: list[int]) -> list[Tensor]:
        """Return to each rank this one's results for its rows.

        Args:
            rows: results (n, k) for the rows of all ranks, in the order of the ranks.
            counts: number of rows of each rank.

        Returns:
            Each rank's results for the rows of this one, (n_r, k) each.
        """
        mine = counts[self.rank]
        received = rows.new_empty(self.world_size * mine, rows.shape[1])
        if sum(counts):
            with self.waiting("to return what they have found"):
                dist.all_to_all_single(received, rows.contiguous(), [mine] * self.world_size, counts, group=self.group)
        return list(received.split(mine)) if mine else [received] * self.world_size

    def all_reduce(self, values: Tensor, purpose: str) -> None:
        """Sum the tensors of all ranks, in place."""
        if self.world_size > 1:
            with self.waiting(purpose):
                dist.all_reduce(values, group=self.group)

    def total(self, *numbers: float, purpose: str) -> list[float]:
        """The sums of `numbers` over all ranks."""
        if self.world_size == 1:
            return list(numbers)
        sums = self._sendable(torch.tensor(numbers, dtype=torch.float64))
        self.all_reduce(sums, purpose)
        with self.waiting(purpose):  # with NCCL, the host waits here
            return sums.tolist()

    def all(self, each: bool, purpose: str) -> bool:
        """Whether `each` is true on every rank."""
        return self.total(float(each), purpose=purpose)[0] == self.world_size

    def broadcast(self, value: Value, purpose: str) -> Value:
        """The `value` of rank 0, on all ranks."""
        values = [value]
        if self.world_size > 1:
            with self.waiting(purpose):
                dist.broadcast_object_list(values, group=self.group, group_src=0)
        return values[0]

    def barrier(self, purpose: str) -> None:
        """Wait until all ranks get here."""
        if self.world_size > 1:
            with self.waiting(purpose):
                nccl = dist.get_backend(self.group) == "nccl"
                dist.barrier(self.group, device_ids=[torch.cuda.current_device()] if nccl else None)

    @contextmanager
    def rank_0_first(self, purpose: str) -> Generator[None]:
        """For a block that rank 0 completes before the others enter it."""
        if not self.first:
            self.barrier(purpose)
        yield
        if self.first:
            self.barrier(purpose)

    @contextmanager
    def waiting(self, purpose: str) -> Generator[None]:
        """Turn a failed exchange into a RankError; an enclosing `WaitReporter` reports a long one."""
        reporter, met = WaitReporter.current(), False
        if reporter is not None:
            reporter.begin(purpose)
        try:
            yield
            met = True
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} of {self.world_size} waited for the others {purpose}, and one has died or does not "
                f"answer: look for the first error among the ranks. ({str(error).splitlines()[0]})"
            ) from error
        finally:
            if reporter is not None:
                reporter.end(met=met)

    def _sendable(self, values: Tensor) -> Tensor:
        """`values` on a device that the group can send from: NCCL sends only from GPUs."""
        return values.cuda() if values.device == _CPU and dist.get_backend(self.group) == "nccl" else values
