"""The processes of one measurement, as torchrun or `accelerate launch` starts them: each does its share of the batches.

They exchange images and features on the host, through gloo, whatever device computes; so the same command works on CPUs,
and on GPUs of any maker. A program that nobody launched so is one process, and nothing is set up.
"""

import datetime as dt
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stablefield.targets._ranks import Ranks

__all__ = ["Processes"]

Item = TypeVar("Item")

# Processes wait for the slowest of them; the first one may also compute alone for long.
_PATIENCE = dt.timedelta(hours=12)
_PURPOSE = "to exchange what they have drawn or measured"


class Processes:
    """Within its block the processes know each other; outside of one it stands for this process alone.

    Attributes:
        rank: which one this is, from 0.
        count: how many there are.
    """

    def __init__(self) -> None:
        self.rank, self.count = 0, 1
        self._ours = False

    def __enter__(self) -> Self:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0")) if self.count > 1 else 0
        if self.count > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_PATIENCE)
            self._ours = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ours:
            dist.destroy_process_group()
            self._ours = False

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's part of `items`: every `count`-th."""
        return list(items[self.rank :: self.count])

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows of all processes, (n, ...), in the order of their ranks; `rows` are on the CPU and may be none."""
        if self.count == 1:
            return rows
        lengths = [int(length) for length in Ranks().gather_equal(torch.tensor([len(rows)]), _PURPOSE)]
        padded = torch.zeros(max(lengths), *rows.shape[1:], dtype=rows.dtype)
        padded[: len(rows)] = rows
        parts = Ranks().gather_equal(padded, _PURPOSE)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def total(self, *numbers: float) -> list[float]:
        """The sums of `numbers` over all processes."""
        sums = torch.tensor(numbers, dtype=torch.float64)
        if self.count > 1:
            Ranks().add_up(sums, _PURPOSE)
        return sums.tolist()

    def all(self, each: bool) -> bool:
        """Whether it is true in every process."""
        return self.total(float(each))[0] == self.count

    def from_first(self, text: str) -> str:
        """What the first process has for `text`."""
        own = torch.tensor(list(text.encode() if self.first else b""), dtype=torch.uint8)
        return bytes(self.gathered(own).tolist()).decode()
