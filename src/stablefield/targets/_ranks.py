"""Ranks: the processes of a group, and what they tell each other."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from stablefield.targets._watch import Watch

__all__ = ["RankError", "Ranks"]


class RankError(ConnectionError):
    """Another rank has died or does not answer."""


class Ranks:
    """The ranks of a process group, and what they tell each other; a silent one becomes a RankError.

    Args:
        group: the process group; the default one if None.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def gather_equal(self, mine: Tensor, purpose: str) -> list[Tensor]:
        """Tensors of one shape from all ranks, in their order."""
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        with self.waiting(purpose):
            dist.all_gather(parts, mine, group=self._group)
        return parts

    def gather(self, mine: Tensor, counts: list[int]) -> Tensor:
        """The rows of all ranks, of which each has its own number."""
        padded = mine.new_zeros(max(counts), mine.shape[1])
        padded[: len(mine)] = mine
        parts = self.gather_equal(padded, "to exchange their rows")
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def send_home(self, rows: Tensor, counts: list[int]) -> list[Tensor]:
        """Send each rank the results of its rows; what all ranks have found for the rows of this one, in their order."""
        mine = counts[self.rank]
        received = rows.new_empty(self.size * mine, rows.shape[1])
        if sum(counts):
            with self.waiting("to return what they have found"):
                dist.all_to_all_single(received, rows.contiguous(), [mine] * self.size, counts, group=self._group)
        return list(received.split(mine)) if mine else [received] * self.size

    def add_up(self, values: Tensor, purpose: str) -> None:
        """Sum the tensors of all ranks, in place."""
        with self.waiting(purpose):
            dist.all_reduce(values, group=self._group)

    @contextmanager
    def waiting(self, purpose: str) -> Generator[None]:
        """Turn the failure of a communication, whose `purpose` completes "waited for the others", into a RankError.

        Within the block of a `Watch`, a long wait is told.
        """
        watch, met = Watch.current(), False
        if watch is not None:
            watch.begin(purpose)
        try:
            yield
            met = True
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} of {self.size} waited for the others {purpose}, and one has died or does not answer: "
                f"look for the first error among the ranks. ({str(error).splitlines()[0]})"
            ) from error
        finally:
            if watch is not None:
                watch.end(met=met)
