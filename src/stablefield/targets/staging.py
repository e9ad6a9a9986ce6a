"""Staging: pages of an array on their way to a GPU, while it computes with those before."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["PAGE", "sent_ahead", "stages"]

PAGE = 2**27
"""Bytes of a page: 128 MB, of which at most three are pinned."""
# Pages under way: one is copied while the host reads the next. More would only take memory.
_AHEAD = 2


def stages(device: torch.device) -> bool:
    """Whether pages are to be sent ahead to `device`: where Python runs ahead of it."""
    return device.type == "cuda"


def sent_ahead(data: NDArray[Any], places: Iterable[slice], device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Yield (slice, data[slice] on the CUDA `device`).

    The host does not wait for a copy, which runs from pinned memory in the order of the device's work; only once it is two
    pages ahead does it wait for the older one. torch's allocator of pinned memory reuses a page when its copy is over.
    """
    copied: deque[torch.cuda.Event] = deque()
    for where in places:
        if len(copied) == _AHEAD:
            copied.popleft().synchronize()
        part = data[where]
        page = torch.empty(part.shape, dtype=torch.from_numpy(part[:0].copy()).dtype, pin_memory=True)
        np.copyto(page.numpy(), part)
        sent = page.to(device, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        copied.append(event)
        yield where, sent
