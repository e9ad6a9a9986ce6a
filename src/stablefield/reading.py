"""Reading values: when the numbers in a tensor may be looked at, and when they may decide what is computed.

While torch compiles or exports a function there are no numbers yet; while it captures a CUDA graph, asking for one is an
error. What runs then must be *static*: the same operations on the same shapes, whatever the numbers. At other times looking
is allowed, but on a GPU Python waits for the device to come up with the number.
"""

import torch

__all__ = ["readable", "watched"]


def readable(device: torch.device) -> bool:
    """Whether values on `device` can be looked at now: not while torch compiles, exports or captures a CUDA graph."""
    if torch.compiler.is_compiling():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def watched(device: torch.device) -> bool:
    """Whether values on `device` may decide what is computed: where they lie in another memory, looking means waiting."""
    return device.type in ("cpu", "mps")
