"""Whether code may read the numbers in a tensor.

While torch compiles or exports a function there are no numbers yet; while it captures a CUDA graph, reading one is an error.
Code that runs then must be *static*: the same operations on the same shapes, whatever the numbers.
"""

import torch

__all__ = ["readable"]


def readable(device: torch.device) -> bool:
    """Whether values on `device` can be read now: not while torch compiles, exports or captures a CUDA graph."""
    if torch.compiler.is_compiling():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()
