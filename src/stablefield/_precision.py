"""Full precision of float32 products for a while.

torch has one switch for each backend and for the whole process, and the blocks of several threads overlap.
"""

import os
from threading import RLock
from typing import Any

import torch

__all__ = ["CUDA_PRODUCTS", "CUDNN_CONVOLUTIONS", "ONEDNN_PRODUCTS"]


class _Switch:
    """One of torch's switches, a context: at full precision from the first thread that enters to the last that leaves.

    If each thread restored what it found, the last one would restore what another had set, and the first one would end the
    others' full precision. What the user sets meanwhile stays.

    Args:
        place: what has the switch.
    """

    def __init__(self, place: Any) -> None:
        self._place, self._lock = place, RLock()
        self._inside, self._found = 0, "none"
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._alone)

    def __enter__(self) -> None:
        with self._lock:
            found = self._place.fp32_precision
            if self._inside == 0 or found != "ieee":
                self._found = found
                self._place.fp32_precision = "ieee"
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside = max(0, self._inside - 1)
            if self._inside == 0 and self._place.fp32_precision == "ieee":
                self._place.fp32_precision = self._found

    def _alone(self) -> None:
        """Forget the other threads in a forked process, which has none of them."""
        self._lock = RLock()
        if self._inside:
            self._inside, self._place.fp32_precision = 0, self._found


CUDA_PRODUCTS = _Switch(torch.backends.cuda.matmul)
ONEDNN_PRODUCTS = _Switch(torch.backends.mkldnn.matmul)  # pyrefly: ignore[missing-attribute]
CUDNN_CONVOLUTIONS = _Switch(torch.backends.cudnn.conv)  # pyrefly: ignore[missing-attribute]
