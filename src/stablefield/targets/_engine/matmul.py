r"""Matrix products of rows with references, a chunk of references at a time, in full precision.

This module has all arithmetic of the engine whose speed depends on the machine, and hides how it is done. A chunk of
references is decoded to floats and multiplied by torch; or, if a CPU has fast products of bytes (VNNI or AMX), uint8 images
stay bytes. A number relative to the largest of its row is then three digits in base 256,

$$ x = s\,(p_0 + 256\, p_1 + 256^2\, p_2), \qquad p \in [-128, 127], $$

with an error of at most one unit of the last digit, 2^-23 of that largest number, as in float32. Each digit times bytes is
a product of integers, summed without rounding; only the sum of the three rounds. A target over uint8 images takes 0.4 to 0.7
of the time with decoded ones (Xeon with AMX, 4,096 to 20,000 references of 3,072 numbers). On a CUDA GPU, half-precision
references and uint8 images are multiplied as they are, see `half_product`.
"""

import platform
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import cache, cached_property
from typing import cast

import torch
from torch import Tensor

from stablefield._precision import CUDA_PRODUCTS, ONEDNN_PRODUCTS
from stablefield._reading import readable
from stablefield.targets._engine.columns import Columns
from stablefield.targets._engine.half_product import available as half_available
from stablefield.targets._engine.half_product import half_product
from stablefield.targets._engine.reference_matrix import ReferenceMatrix, decode, largest_magnitude

__all__ = ["ULPS", "Chunk", "Operand", "chunks", "full_precision", "grouped_chunks"]

ULPS = 10
"""Bound on the rounding error of an inner product, in ulps of the product of the two norms.

Errors are largest for products of rows with themselves: up to 5 measured on images. Rows of one value may exceed it: torch
rounds every partial sum of equal products the same way, up to 42 ulps on a CPU.
"""

# Products of a digit and a byte that 32 bits can sum, even if a library shifts one of them to 0 to 255.
_LONGEST = 2**16 - 1
# Multiplications of a full pass over the references from which digits pay off.
_LARGE = 2**24
# Numbers per row below which products of bytes gain nothing.
_SHORT = 256
_BASE, _DIGITS = 256, 3
# The largest number in units of the last digit: 127, 0, 0.
_TOP = 127 * _BASE**2


@contextmanager
def full_precision(device: torch.device) -> Generator[None]:
    """Turn off autocast on `device`, and TF32 and bfloat16 inside float32 matrix products, for one block.

    Logits are differences of large numbers divided by sigma^2: with such products their error is about
    |x|^2 2^-8 / (2 sigma^2), which is hundreds at small sigma. Users rightly want fast products in their networks, so this
    restores the switches afterwards. They are torch's, per backend and for the whole process: another thread's products
    during the block have full precision, too: slower, never wrong.
    """
    with CUDA_PRODUCTS, ONEDNN_PRODUCTS, torch.autocast(device.type, enabled=False):
        yield


class Operand:
    """Finite rows (B, d) to multiply with many chunks; makes their digits once, if needed."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    @cached_property
    def digits(self) -> "Digits":
        """The rows as digits."""
        return Digits.of(self.rows, largest_magnitude(self.rows))

    @cached_property
    def sums(self) -> Tensor:
        """The sum of each row, shape (B,)."""
        return self.rows.sum(1)


@dataclass(frozen=True)
class Chunk:
    """Some references as rows of floats, minus their origin if they have one.

    Attributes:
        rows: shape (c, d).
        stored: the references before subtraction of the origin, which may have rounded them, in any floating point dtype,
            shape (c, d); None if there is no origin.
        origin: the origin, shape (d,).
    """

    rows: Tensor
    stored: Tensor | None = None
    origin: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def wide(self) -> Tensor:
        """All of them in float64, shape (c, d), without rounding other than their decoder's."""
        if self.stored is None or self.origin is None:
            return self.rows.double()
        return self.stored.to(torch.float64, copy=True).sub_(self.origin)

    def at(self, column: Tensor, row: Tensor) -> Tensor:  # noqa: ARG002
        """Those in the columns (m,) of the given rows (m,), including the origin, shape (m, d)."""
        return self.rows[column] if self.stored is None else self.stored[column].to(self.rows.dtype)

    def inner(self, x: Operand) -> Tensor:
        """Inner products with the rows of `x`, shape (B, c), in a new tensor."""
        return self._product(x.rows, self.rows.mT)

    def wide_inner(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Products in float64 with `x` (b, d), the given `rows` (b,), shape (b, c); and squared norms, (c,) or (b, c)."""
        wide = self.wide
        return torch.mm(x, wide.T), wide.square().sum(1)

    def weighted(self, weights: Tensor, rows: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Their sums with `weights` (b, c), none negative, of all rows or of the given (b,), shape (b, d), a new tensor."""
        return self._product(weights, self.rows)

    def add_weighted(self, total: Tensor, weights: Tensor) -> None:
        """Add their sums with `weights` (B, c), none negative, to `total` (B, d), in place."""
        total.addmm_(weights, self.rows)  # in one pass

    def _product(self, x: Tensor, matrix: Tensor) -> Tensor:
        return x @ matrix


@dataclass(frozen=True)
class ByteChunk(Chunk):
    """References as bytes b, int8, that mean (b + 1/2) / 127.5: uint8 images u, by b = u - 128."""

    @property
    def wide(self) -> Tensor:
        return _meaning(self.rows).double()

    def at(self, column: Tensor, row: Tensor) -> Tensor:  # noqa: ARG002
        return _meaning(self.rows[column])

    def inner(self, x: Operand) -> Tensor:
        return _decoded(x.digits, x.sums, self.rows.T)

    def weighted(self, weights: Tensor, rows: Tensor | None = None) -> Tensor:  # noqa: ARG002
        return _decoded(Digits.of(weights, weights.amax(1)), weights.sum(1), self.rows)

    def add_weighted(self, total: Tensor, weights: Tensor) -> None:
        total.add_(self.weighted(weights))


@dataclass(frozen=True)
class GroupedChunk(Chunk):
    """References of G groups: `rows` and `stored` have shape (G, C, d), and the rows are G groups of `repeats` each."""

    _: KW_ONLY
    repeats: int

    def __len__(self) -> int:
        return self.rows.shape[1]

    def at(self, column: Tensor, row: Tensor) -> Tensor:
        group = row // self.repeats
        return self.rows[group, column] if self.stored is None else self.stored[group, column].to(self.rows.dtype)

    def inner(self, x: Operand) -> Tensor:
        return self._products(x.rows, self.rows.mT)

    def wide_inner(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        wide = self.wide
        squares = wide.square().sum(2)[rows // self.repeats]
        return self._products(self._among_all(x, rows), wide.mT)[rows], squares

    def weighted(self, weights: Tensor, rows: Tensor | None = None) -> Tensor:
        if rows is None:
            return self._products(weights, self.rows)
        return self._products(self._among_all(weights, rows), self.rows)[rows]

    def add_weighted(self, total: Tensor, weights: Tensor) -> None:
        total.add_(self.weighted(weights))

    def _products(self, x: Tensor, matrices: Tensor) -> Tensor:
        return self._product(x.view(len(self.rows), self.repeats, -1), matrices).flatten(0, 1)

    def _among_all(self, x: Tensor, rows: Tensor) -> Tensor:
        """`x` (b, k) at the given rows, zeros at the others."""
        return x.new_zeros(len(self.rows) * self.repeats, x.shape[1]).index_copy_(0, rows, x)


@dataclass(frozen=True)
class HalfChunk(Chunk):
    """References in half precision, which are exact in it."""

    def at(self, column: Tensor, row: Tensor) -> Tensor:
        return super().at(column, row).float()

    def add_weighted(self, total: Tensor, weights: Tensor) -> None:
        total.add_(self.weighted(weights))

    def _product(self, x: Tensor, matrix: Tensor) -> Tensor:
        return half_product(x, matrix)


@dataclass(frozen=True)
class GroupedHalfChunk(GroupedChunk):
    """References of groups in half precision."""

    def at(self, column: Tensor, row: Tensor) -> Tensor:
        return super().at(column, row).float()

    def _product(self, x: Tensor, matrix: Tensor) -> Tensor:
        return half_product(x, matrix) if x.dtype == torch.float32 else x @ matrix


@dataclass(frozen=True)
class ByteHalfChunk(ByteChunk):
    """The same bytes in bfloat16."""

    def inner(self, x: Operand) -> Tensor:
        return half_product(x.rows, self.rows.mT).div_(127.5).add_(x.sums[:, None], alpha=0.5 / 127.5)

    def weighted(self, weights: Tensor, rows: Tensor | None = None) -> Tensor:  # noqa: ARG002
        return half_product(weights, self.rows).div_(127.5).add_(weights.sum(1)[:, None], alpha=0.5 / 127.5)


def grouped_chunks(
    matrix: ReferenceMatrix, columns: Iterable[Columns], batch: int, dtype: torch.dtype
) -> Iterator[tuple[Columns, Chunk]]:
    """The references of each of `columns`, for products with `batch` rows of `dtype`.

    Yields:
        The columns, and the chunk, valid until the next iteration.
    """
    origin, decoded, gathered = matrix.norms(dtype).origin, None, None
    halves = _stay_halves(matrix, dtype) and not matrix.holds_bytes
    for some in columns:
        count = some.groups * len(some)
        # Later columns of a part may be fewer, not more. New memory would cost more than the copy.
        if gathered is None and isinstance(some.where, Tensor) and matrix.resident is not None:
            gathered = torch.empty(count, matrix.dim, dtype=matrix.element, device=matrix.device)
        stored = rows = matrix.stored(some.where, gathered)
        if origin is not None or (stored.dtype != dtype and not halves):
            if decoded is None:
                decoded = torch.empty(count, matrix.dim, dtype=dtype, device=matrix.device)
            rows = decode(stored, decoded[:count], origin)
        if some.groups == 1:
            yield some, HalfChunk(rows) if halves else Chunk(rows, None if origin is None else stored, origin)
            continue
        shape = (some.groups, len(some), matrix.dim)
        kept, repeats = None if origin is None else stored.view(shape), batch // some.groups
        if halves:
            yield some, GroupedHalfChunk(rows.view(shape), repeats=repeats)
        else:
            yield some, GroupedChunk(rows.view(shape), kept, origin, repeats=repeats)


def chunks(matrix: ReferenceMatrix, size: int | None, batch: int, dtype: torch.dtype) -> Iterator[tuple[slice, Chunk]]:
    """The references of `matrix`, chunk by chunk, for products with `batch` rows of `dtype`.

    They are relative to the origin of their norms, if there is one. A chunk has at most `size` references; None chooses a
    size by the available memory.

    Yields:
        Their slice of the matrix, and the chunk, valid until the next iteration.
    """
    stay_bytes = _stay_bytes(matrix, batch, dtype)
    size = min(size or matrix.chunk_size(batch, decoded=not stay_bytes), len(matrix))
    origin = matrix.norms(dtype).origin
    if origin is not None:
        buffer = torch.empty(size, matrix.dim, dtype=dtype, device=matrix.device)
        for where, part in matrix.pages(size):
            stored = part.to(matrix.device).reshape(len(part), matrix.dim)
            yield where, Chunk(torch.sub(stored, origin, out=buffer[: len(part)]), stored, origin)
    elif stay_bytes:
        # Weighted sums run over the references of a chunk.
        size = min(size, _LONGEST)
        buffer = torch.empty(size, *matrix.data.shape[1:], dtype=torch.uint8, device="cpu")
        for where, part in matrix.pages(size):
            values = torch.bitwise_xor(part, 128, out=buffer[: len(part)])
            yield where, ByteChunk(values.view(torch.int8).view(len(part), matrix.dim))
    elif _stay_halves(matrix, dtype):
        for where, part in matrix.pages(size):
            rows = part.to(matrix.device).reshape(len(part), matrix.dim)
            # bfloat16 has the integers up to 256.
            yield where, ByteHalfChunk(rows.to(torch.bfloat16).sub_(128)) if matrix.holds_bytes else HalfChunk(rows)
    else:
        for where, rows in matrix.chunks(size, dtype):
            yield where, Chunk(rows)


def _stay_halves(matrix: ReferenceMatrix, dtype: torch.dtype) -> bool:
    """Whether to multiply half-precision references, or bytes, as they are."""
    if dtype != torch.float32 or matrix.device.type != "cuda" or matrix.norms(dtype).origin is not None:
        return False
    # The test of the device cannot be captured: outside, it is made once.
    if not readable(matrix.device):
        return False
    return half_available(matrix.device, torch.bfloat16 if matrix.holds_bytes else matrix.element, ULPS)


def _stay_bytes(matrix: ReferenceMatrix, batch: int, dtype: torch.dtype) -> bool:
    return (
        dtype == torch.float32
        and matrix.device.type == "cpu"
        and matrix.holds_bytes
        and _SHORT <= matrix.dim <= _LONGEST
        and batch * len(matrix) * matrix.dim >= _LARGE
        and available()
    )


@dataclass(frozen=True)
class Digits:
    """Rows of floats as digits.

    Attributes:
        digits: the least significant digits of all rows, then the next, shape (at least 3 B, k), int8; rows of zeros last.
        scale: the value of a unit of the last digit, shape (B,), float32.
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
        # oneDNN compiles code for every new shape, about a millisecond each: rows of zeros limit the number of shapes.
        padding = -count % max(4, 2 ** count.bit_length() // 16)
        digits = torch.zeros(count + padding, length, dtype=torch.int8, device="cpu")
        for place, digit in enumerate(digits[:count].view(_DIGITS, batch, length)):
            # The lowest byte of a number, as a signed byte, is its lowest digit.
            digit.copy_(rest)
            if place + 1 < _DIGITS:
                rest.sub_(digit).bitwise_right_shift_(8)
        return cls(digits, scale)

    def times(self, matrix: Tensor) -> Tensor:
        """The rows' products with bytes (k, m), int8, in units of `scale`, shape (B, m), float32."""
        sums = _byte_product()(self.digits, matrix)[: _DIGITS * len(self.scale)]
        low, middle, high = sums.view(_DIGITS, len(self.scale), -1).to(torch.float32)
        return low.add_(middle.add_(high, alpha=_BASE), alpha=_BASE)


@cache
def available() -> bool:
    """Whether this machine has fast and exact products of bytes.

    Without VNNI, libraries sum pairs of products in 16 bits, which may overflow: fast, but not exact.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    try:
        # torch has no public name for either.
        if not (torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()):
            return False
        extreme = torch.tensor([[-128], [127]], dtype=torch.int8, device="cpu").repeat(32, 256)
        found = _byte_product()(extreme, extreme.T)
    except (AttributeError, RuntimeError, TypeError):
        return False
    wide = extreme.double()
    return torch.equal(found.double(), wide @ wide.T)


def _byte_product() -> Callable[[Tensor, Tensor], Tensor]:
    return cast("Callable[[Tensor, Tensor], Tensor]", torch._int_mm)


def _decoded(digits: Digits, sums: Tensor, matrix: Tensor) -> Tensor:
    """Products of the rows with these `digits` and `sums` (B,) with the values of the bytes of `matrix`."""
    halves, scale = sums * (0.5 / 127.5), digits.scale / 127.5
    return digits.times(matrix).mul_(scale[:, None]).add_(halves[:, None])


def _meaning(values: Tensor) -> Tensor:
    return values.to(torch.float32).add_(0.5).div_(127.5)
