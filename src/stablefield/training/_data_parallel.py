"""Gradients that several processes sum by torch's DistributedDataParallel, while their backward pass goes on.

DistributedDataParallel lays the gradients out in buckets, and sums a bucket over the processes as soon as its last gradient
is there. After its first backward pass it lays the buckets out anew, in the order in which the gradients came. From three
processes on, the layout decides the order of a sum, and so its rounding. We therefore let it do this before the first step,
on passes whose gradients we discard: every step then has the same layout, and a resumed run repeats the bits of a run that
was never stopped.

References:
    Li, Zhao, Varma, Salpekar, Noordhuis, Li, Paszke, Smith, Vaughan, Damania, Chintala, "PyTorch Distributed: Experiences
    on Accelerating Data Parallel Training", VLDB 2020.
"""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stablefield._distributed import Ranks
from stablefield.training._recipe import Recipe

__all__ = ["DataParallel", "overlaps"]

_PURPOSE = "to sum their gradients"


def overlaps(recipe: Recipe, processes: int, device: torch.device) -> bool:
    """Whether `DataParallel` sums the gradients of a run, instead of one sum in a fixed order after the backward pass.

    It cannot where a CUDA graph replays the backward pass without Python, nor where a process has no rows. FSDP2 sums the
    gradients of a sharded run.

    Args:
        recipe: of the run.
        processes: their number.
        device: where each of them computes.
    """
    recorded = recipe.compile and device.type == "cuda"
    return processes > 1 and not (recipe.exact or recipe.fsdp or recorded) and recipe.batch >= processes


class DataParallel:
    """A network whose gradients are summed over the processes during the backward pass.

    All processes make it at the same time, with the same weights.

    Args:
        network: the network; its own forward and backward passes leave gradients that the next `backward` also sums.
        loss: the loss of a network on some rows, as in a step; called a few times, with gradients that are discarded.
        ranks: the processes.

    Attributes:
        network: the network to call in a pass whose loss goes to `backward`.
    """

    def __init__(self, network: nn.Module, loss: Callable[[nn.Module], Tensor], ranks: Ranks) -> None:
        self._sum = _Sum(ranks)
        self._parameters = [value for value in network.parameters() if value.requires_grad]
        buffers = {name: value.clone() for name, value in network.named_buffers()}
        loss(network).backward()
        # To look for weights without a gradient takes time in each step, so do it only if there are any.
        all_used = ranks.all(self._all_have_gradients(), "to compare the weights that they use")
        self._forget_gradients()
        # Each process keeps its own buffers, as one process does. torch 2.13 has another name for this.
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        wrap: Callable[..., DistributedDataParallel] = partial(
            DistributedDataParallel, **{"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        )
        with ranks.waiting(_PURPOSE):
            self.network = wrap(
                network,
                process_group=ranks.group,
                find_unused_parameters=not all_used,
                gradient_as_bucket_view=True,
            )
            self.network.register_comm_hook(self._sum, _begin)
        # The second forward pass lays the buckets out anew, from the order of the first backward pass.
        for _ in range(2 if all_used else 0):
            with ranks.waiting(_PURPOSE):
                value = loss(self.network)
            self.backward(value)
            self._forget_gradients()
        with torch.no_grad():
            for name, value in network.named_buffers():
                value.copy_(buffers[name])

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, and sum all gradients so far over the processes.

        Raises:
            RankError: if another process has died or does not answer.
            ValueError: if the pass leaves out weights, though the first one left out none.
        """
        self._sum.begun = False
        with ExitStack() as self._sum.waits:
            loss.backward()
        if not self._sum.begun:
            raise ValueError(
                "DistributedDataParallel needs a network that uses the same weights in every pass, and this one left out "
                "some that it used in the first: start a run with exact=True."
            )

    def _all_have_gradients(self) -> bool:
        return all(value.grad is not None for value in self._parameters)

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


@dataclass
class _Sum:
    """What a sum under way needs; apart from the network, which torch's reference to it would keep for ever.

    Attributes:
        ranks: the processes.
        begun: whether the sums of all buckets of the pass have begun.
        waits: of the pass; left once it has ended.
    """

    ranks: Ranks
    begun: bool = False
    waits: ExitStack = field(default_factory=ExitStack)


def _begin(of: _Sum, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Begin to sum a bucket. Once all have begun, this process waits for the others."""
    work = dist.all_reduce(bucket.buffer(), group=of.ranks.group, async_op=True)
    assert work is not None
    if bucket.is_last():
        of.begun = True
        of.waits.enter_context(of.ranks.waiting(_PURPOSE))
    return work.get_future().then(_first)


def _first(done: torch.futures.Future[list[Tensor]]) -> Tensor:
    return done.value()[0]
