r"""Products of floats with bytes in integer arithmetic, where a CPU has instructions for them.

A number relative to the largest of its row is three digits in base 256,

$$ x = s\,(p_0 + 256\, p_1 + 256^2\, p_2), \qquad p \in [-128, 127], $$

with an error of at most one unit of the last digit, 2^-23 of that largest number, as in float32. Each digit times bytes is
a product of integers, summed without rounding; what rounds is the sum of the three. On CPUs with VNNI or AMX that takes 0.6
to 0.75 of the time of a product of floats, a quarter of the memory traffic, and the bytes need no decoding.
"""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch import Tensor

from stablefield.targets.product import padding

__all__ = ["LONGEST", "Digits", "available"]

LONGEST = 2**16 - 1
"""Most products of a digit with a byte that 32 bits can sum, also where a library shifts one of them to 0 to 255."""

_BASE = 256
_DIGITS = 3
# The largest number in units of the last digit: 127, 0, 0.
_TOP = 127 * _BASE**2


@dataclass(frozen=True)
class Digits:
    """Rows of floats as digits.

    Attributes:
        digits: the least significant digits of all rows, then the next, shape (at least 3 B, k), int8; rows of zeros last.
        scale: what a unit of the last digit means, shape (B,), float32.
    """

    digits: Tensor
    scale: Tensor

    @classmethod
    def of(cls, rows: Tensor, largest: Tensor) -> "Digits":
        """The digits of `rows` (B, k), float32 and finite on the CPU, whose largest magnitudes are `largest` (B,)."""
        batch, length = rows.shape
        scale = largest.clamp(min=torch.finfo(torch.float32).tiny * _TOP) / _TOP
        rest = (rows / scale[:, None]).round_().to(torch.int32)
        count = _DIGITS * batch
        digits = torch.zeros(count + padding(count), length, dtype=torch.int8)
        for place, digit in enumerate(digits[:count].view(_DIGITS, batch, length)):
            # The lowest byte of a number, as a signed one, is its lowest digit.
            digit.copy_(rest)
            if place + 1 < _DIGITS:
                rest.sub_(digit).bitwise_right_shift_(8)
        return cls(digits, scale)

    def times(self, matrix: Tensor) -> Tensor:
        """The rows' products with bytes, in units of `scale`, shape (B, m), float32.

        Args:
            matrix: the bytes, shape (k, m), int8, with k at most LONGEST.
        """
        sums = _product()(self.digits, matrix)[: _DIGITS * len(self.scale)]
        low, middle, high = sums.view(_DIGITS, len(self.scale), -1).to(torch.float32)
        return low.add_(middle.add_(high, alpha=_BASE), alpha=_BASE)


@cache
def available() -> bool:
    """Whether this machine has fast and exact products of bytes.

    Without VNNI, libraries sum pairs of products in 16 bits, which may overflow: fast, and not exact.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    try:
        # torch has no public name for either.
        if not (torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()):  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
            return False
        extreme = torch.tensor([[-128], [127]], dtype=torch.int8).repeat(32, 256)
        found = _product()(extreme, extreme.T)
    except (AttributeError, RuntimeError, TypeError):
        return False
    wide = extreme.double()
    return torch.equal(found.double(), wide @ wide.T)


def _product() -> Callable[[Tensor, Tensor], Tensor]:
    return cast("Callable[[Tensor, Tensor], Tensor]", torch._int_mm)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
