"""Full float32 arithmetic for one block of code, whatever the user has set for the network.

The logits of the posterior are differences of large numbers divided by sigma^2: with bfloat16 or TF32 products their
error is about |x|^2 2^-8 / (2 sigma^2), which is hundreds at small sigma. Users rightly want those products in their
networks, so the switches are turned only for the duration of a block, and put back as they were found.
"""

from collections.abc import Generator
from contextlib import contextmanager

import torch

__all__ = ["full_precision"]


@contextmanager
def full_precision(device: torch.device) -> Generator[None]:
    """Turn off autocast on `device`, and TF32 and bfloat16 inside float32 matrix products, for one block.

    torch offers the product switch per backend and for the whole process: CUDA (TF32) and oneDNN (TF32 or bfloat16 on
    CPUs that have them). Another thread's products in this moment are computed in full precision, too: slower, never
    wrong.

    Args:
        device: the device whose autocast is turned off.
    """
    onednn = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    switches = (torch.backends.cuda.matmul, onednn)
    found = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, value in zip(switches, found, strict=True):
            switch.fp32_precision = value
