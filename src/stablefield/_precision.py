"""Full precision of float32 products for a while.

torch has one switch for each backend and for the whole process, and the blocks of several threads overlap.
"""

from threading import Lock
from typing import Any

import torch

__all__ = ["CUDA_PRODUCTS", "CUDNN_CONVOLUTIONS", "ONEDNN_PRODUCTS"]


class _Switch:
    """One of torch's switches, a context: at full precision from the first thread that enters to the last that leaves.

    If each thread restored what it found, the last one would restore what another had set, and the first one would end the
    others' full precision.

    Args:
        place: what has the switch.
    """

    def __init__(self, place: Any) -> None:
        self._place, self._lock = place, Lock()
        self._inside, self._found = 0, "none"

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._found = self._place.fp32_precision
                self._place.fp32_precision = "ieee"
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._place.fp32_precision = self._found


CUDA_PRODUCTS = _Switch(torch.backends.cuda.matmul)
ONEDNN_PRODUCTS = _Switch(torch.backends.mkldnn.matmul)  # pyrefly: ignore[missing-attribute]
CUDNN_CONVOLUTIONS = _Switch(torch.backends.cudnn.conv)  # pyrefly: ignore[missing-attribute]
