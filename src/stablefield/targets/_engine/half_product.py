r"""Products of float32 rows with half-precision references, as accurate as float32's, on the tensor cores of a GPU.

A float32 number relative to the largest of its row is the sum of three numbers with the digits of a half-precision dtype,

$$ x = s\,(p_0 + 2^{-b} p_1 + 2^{-2b} p_2), \qquad b = 8 \text{ (bfloat16) or } 11 \text{ (float16)}, \quad |p| \le 2, $$

with a power of two for s, and an error below 2^-24 of that largest number. References in that dtype are exact in it, and so
are the products of two such numbers in float32. So three products that are accumulated in float32 have the accuracy of one
in float32, without a decoded copy of the references. uint8 images are exact in bfloat16.

How a GPU accumulates is not documented to the last bit, so `available` compares it with float64 before the first use.
"""

from functools import cache

import torch
from torch import Tensor

__all__ = ["available", "half_product"]

_BITS = {torch.bfloat16: 8, torch.float16: 11}
_PARTS = 3


def half_product(x: Tensor, matrix: Tensor) -> Tensor:
    """Products, in float32, of rows x (..., B, k), float32 and finite, with a half-precision matrix (..., k, m)."""
    bits = _BITS[matrix.dtype]
    # Powers of two between the largest magnitude of each row and half of it.
    _, exponent = torch.frexp(x.abs().amax(-1, keepdim=True))
    rest = torch.ldexp(x, 1 - exponent)
    parts: list[Tensor] = []
    for _ in range(_PARTS):
        parts.append(rest.to(matrix.dtype))
        rest = (rest - parts[-1].float()).mul_(2.0**bits)
    low, middle, high = _accumulated(torch.cat(parts, -2), matrix).chunk(_PARTS, -2)[::-1]
    total = high.add(middle.add(low, alpha=2.0**-bits), alpha=2.0**-bits)
    return torch.ldexp(total, exponent - 1)


def _accumulated(x: Tensor, matrix: Tensor) -> Tensor:
    """The product of two half-precision matrices, accumulated in float32."""
    if x.device.type != "cuda":
        return x.float() @ matrix.float()
    if x.ndim == 2:
        return torch.mm(x, matrix, out_dtype=torch.float32)
    return torch.bmm(x, matrix, out_dtype=torch.float32)


@cache
def available(device: torch.device, dtype: torch.dtype, ulps: float) -> bool:
    """Whether `device` has such products, with errors of at most `ulps`, or of its float32 products; waits for it.

    On a CPU they are slower than decoding.
    """
    if device.type != "cuda" or dtype not in _BITS:
        return False
    try:
        ours, plain = errors(device, dtype)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):  # this torch or GPU has none
        return False
    return bool((ours <= plain.clamp(min=ulps)).all())


def errors(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Errors of products of 32 rows and 64 references of 8,192 numbers, (32, 64), in float32 ulps of the norms' product.

    Rows are normal, of one sign, constant, of one large number among small ones, or multiples of references, whose products
    are the largest.

    Returns:
        Those of the half-precision products, and of float32's.
    """
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(64, 8192, generator=generator, device="cpu")
    matrix[16:32] = matrix[16:32].abs()
    matrix[32:48] = 255.0
    matrix[48:64, 1:] *= 2.0**-10
    matrix = matrix.to(dtype)
    x = torch.randn(32, 8192, generator=generator, device="cpu")
    x[8:16], x[16:24] = x[8:16].abs() * 2.0**-20, 1 / 3
    x[24:] = matrix[::8].float() * 1.0001
    wide, references = x.double(), matrix.double()
    truth, scale = wide @ references.T, wide.norm(dim=1)[:, None] * references.norm(dim=1)
    here, there = x.to(device), matrix.to(device).T
    found = (half_product(here, there), here @ there.float())
    ours, plain = ((one.cpu().double() - truth).abs() / scale / torch.finfo(torch.float32).eps for one in found)
    return ours, plain
