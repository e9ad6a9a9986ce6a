r"""Dropout with a quarter of the random numbers on a CPU.

On a CPU, torch draws one number of 53 bits for each value, one after the other, which takes a tenth of a step of a U-Net.
Here four values share one of 64 bits: each is dropped if its 16 bits, as a number, are below $p \cdot 2^{16}$. The
probability is then a multiple of $2^{-16}$, and the scale of the kept values matches it, so that their mean stays exact. On
other devices, and in compiled, traced or transformed functions (`torch.func`), it is torch's own dropout.

References:
    Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, "Dropout: A Simple Way to Prevent Neural Networks from
    Overfitting", JMLR 2014.
"""

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["dropout"]

_STEPS = 2**16


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Zero values of `x` with a probability in [0, 1), and scale the others to keep the mean.

    Args:
        x: floating point, any shape.
        probability: of dropping a value.
        training: if false, return `x` unchanged.
    """
    if not training or probability == 0:
        return x
    if x.device.type != "cpu" or _transformed():
        return functional.dropout(x, probability)
    dropped = min(round(probability * _STEPS), _STEPS - 1)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.int16)[: x.numel()].ge_(dropped - _STEPS // 2)
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        mask = kept.as_strided(x.shape, x.stride())  # in the memory order of x
    else:
        mask = kept.view(x.shape)
    return (x * mask).mul_(_STEPS / (_STEPS - dropped))


def _transformed() -> bool:
    """Whether this runs under a transformation, for which torch's own operator has rules."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or is_in_torch_dispatch_mode()
    )
