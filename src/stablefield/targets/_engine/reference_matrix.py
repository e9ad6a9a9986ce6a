"""A reference matrix: a set of references as rows of numbers, decoded chunk by chunk.

The references may be floating point or uint8 images, in any memory layout, a tensor or a numpy array (such as a memory map
of a file larger than memory). A matrix returns them as contiguous rows in the dtype of the computation, a chunk at a time in
one reused buffer, so a second copy of the set never exists.

Shifting all data does not change a posterior, but rounding errors are relative to the size of the numbers. So if the set is
far from zero (farther than its own spread), an origin in its middle is subtracted from each chunk as it is decoded.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield._memory import free_bytes
from stablefield.targets._engine.label_index import LabelIndex

__all__ = [
    "Norms",
    "ReferenceMatrix",
    "decode",
    "element_type",
    "in_blocks",
    "inner_products",
    "largest_magnitude",
    "row_blocks",
    "squared_norms",
    "tensor_version",
    "wide_dtype",
]

# Numbers per block of a pass for the norms on a CPU, 1 MB in float32, to stay in the cache.
_BLOCK = 2**18
# Numbers of a batch per block of a pass with several intermediate results: 512 kB in float32, for a core's cache.
_ROW_BLOCK = 2**17
# Numbers to sum without float64.
_PART = 128
# References from which to estimate the middle of a set: a median of three medians of three costs ten passes over them, and
# sorting them a hundred times as much.
_SAMPLE = 9
# A set is far from zero if its middle's squared norm exceeds this many squared distances from it. Below, centring would gain
# at most two binary digits, which is not worth a pass over the set.
_FAR = 16.0
# Numbers in a chunk on a CPU: 8 MB in float32, a share of one socket's cache, for decoding, the two products and the softmax
# between them. Smaller chunks slow the products down.
_CACHED = 2**21
# Numbers in a chunk that stays bytes: 12 MB. Smaller ones cost more calls, and larger ones do not fit the cache.
_CACHED_BYTES = 3 * 2**22
# Numbers in a chunk on a GPU: 1 GB in float32, beyond which kernel launches are negligible.
_RESIDENT = 2**28
# References per chunk below which the pass over the sums, B d numbers per chunk, costs as much as the products.
_FEWEST = 128
# Relative excess of a chunk over its intended size that is acceptable.
_SLACK = 0.1
# Fraction of the free memory, 1 / 16, for each of the about four temporaries.
_SHARE = 16
# Bytes of a page of an array on its way to a GPU: 128 MB, of which at most three are pinned.
PAGE = 2**27
# Pages in flight: one is copied while the host reads the next. More would only take memory.
_AHEAD = 2


@dataclass(frozen=True)
class Norms:
    """Squared norms of the references of a matrix, from an origin.

    Attributes:
        squares: |y|^2, shape (n,), float64; with an origin o, |y - o|^2.
        centre: their median, shape (), float64; not the mean, which a single large one may shift far from all others.
        centred: |y|^2 - centre in the dtype of the computation, in which the difference keeps digits that |y|^2 would lose,
            shape (n,).
        largest: an upper bound, shape (), float64.
        bound: the upper bound as a number, if known; not finite if a reference is not.
        origin: subtracted from each reference before any computation, shape (d,), in the dtype of the computation; None for
            none.
    """

    squares: Tensor
    centre: Tensor
    centred: Tensor
    largest: Tensor
    bound: float | None
    origin: Tensor | None = None

    @classmethod
    def of(
        cls, squares: Tensor, dtype: torch.dtype, origin: Tensor | None = None, bound: float | None = None
    ) -> "Norms":
        """The norms with these squares."""
        centre = squares.median()
        return cls(squares, centre, (squares - centre).to(dtype), squares.max(), bound, origin)

    @property
    def finite(self) -> bool:
        """Whether all references are finite; assumed without a bound."""
        return self.bound is None or math.isfinite(self.bound)

    def at(self, index: Tensor | slice) -> "Norms":
        """Those of the references at `index`."""
        return replace(self, squares=self.squares[index], centred=self.centred[index])


class ReferenceMatrix:
    """The references `data`, shape (n, ...), as n rows of d numbers.

    Args:
        data: floating point, or uint8 images that mean data / 127.5 - 1; a tensor or a numpy array, also one of bfloat16: of
            the package ml_dtypes, or its bits as uint16.
        device: where to decode an array, or a tensor in the host's memory, to; by default a tensor's own device.

    Attributes:
        element: the dtype of the data as torch has it.
    """

    def __init__(self, data: Tensor | NDArray[Any], device: torch.device | None = None) -> None:
        self.data = data
        self.device = device or (data.device if isinstance(data, Tensor) else torch.device("cpu"))
        self.element = element_type(data)
        self._norms: dict[torch.dtype, Norms] = {}
        self._spread: Tensor | None = None
        self._by_label: tuple[Tensor, int, LabelIndex] | None = None
        self._version = tensor_version(data)

    def __getstate__(self) -> dict[str, Any]:
        # A copied tensor counts its changes anew, so nothing that was computed may be copied with it.
        return {"data": self.data, "device": self.device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __len__(self) -> int:
        return self.data.shape[0]

    @property
    def dim(self) -> int:
        """Numbers per reference, d."""
        return math.prod(self.data.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """The floating point dtype in which the references are exact: float32 or, for float64 references, float64."""
        return torch.float64 if self.element == torch.float64 else torch.float32

    def dtype_with(self, x_t: Tensor) -> torch.dtype:
        """The dtype of computations with noisy rows `x_t`: float32, or float64 if either is."""
        return torch.promote_types(self.dtype, torch.promote_types(x_t.dtype, torch.float32))

    @property
    def eps(self) -> float:
        """The relative rounding error of the references as they are stored."""
        return torch.finfo(self.element if self.element.is_floating_point else torch.float32).eps

    @property
    def holds_bytes(self) -> bool:
        """Whether the references are uint8 images."""
        return self.element == torch.uint8

    @property
    def holds_halves(self) -> bool:
        """Whether the references are floating point numbers of half precision."""
        return self.element.is_floating_point and self.element.itemsize < 4

    @property
    def resident(self) -> Tensor | None:
        """The data, if they are a tensor on the device."""
        return self.data if isinstance(self.data, Tensor) and self.data.device == self.device else None

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The references at `index` (m,), decoded, shape (m, d)."""
        data = self._gather(index)
        if data.dtype == dtype:
            return data.reshape(len(data), self.dim)
        return decode(data, torch.empty(data.shape, dtype=dtype, device=self.device)).view(len(data), self.dim)

    def stored(self, where: slice | Tensor, buffer: Tensor | None = None) -> Tensor:
        """The m references of a slice, or at indices of any shape, as stored, on the device, shape (m, d).

        Those at indices are written to the start of `buffer` (at least m, d), if the data are a tensor and it is given.
        """
        if not isinstance(where, Tensor):
            part = self._read(where) if self.resident is None else self.resident[where]
            return part.reshape(len(part), self.dim)
        index = where.flatten()
        if buffer is None or self.resident is None:
            return self._gather(index).view(len(index), self.dim)
        return torch.index_select(self.resident.reshape(len(self), self.dim), 0, index, out=buffer[: len(index)])

    def by_label(self, labels: Tensor) -> LabelIndex:
        """The references in the order of their `labels` (n,), int64; computed once while the tensor stays the same."""
        found = self.known_by_label(labels)
        if found is None:
            found = LabelIndex(labels)
            self._by_label = (labels, tensor_version(labels), found)
        return found

    def share_by_label(self, labels: Tensor, index: LabelIndex) -> None:
        """Use the order of another matrix whose references have the same `labels`."""
        if self.known_by_label(labels) is not index:
            self._by_label = (labels, tensor_version(labels), index)

    def known_by_label(self, labels: Tensor) -> LabelIndex | None:
        """The references in the order of their labels, if already computed."""
        if self._by_label is None or self._by_label[0] is not labels or self._by_label[1] != tensor_version(labels):
            return None
        return self._by_label[2]

    def take(self, index: Tensor) -> "ReferenceMatrix":
        """A matrix of the references at `index` (m,), with their norms."""
        part = ReferenceMatrix(self._gather(index))
        part._norms = {dtype: self.norms(dtype).at(index) for dtype in (self._norms or {self.dtype: None})}
        return part

    def chunk_size(self, batch: int, decoded: bool = True) -> int:
        """References per chunk for `batch` rows, by the available memory; more if they stay bytes.

        Neither (batch, chunk) nor (chunk, d) float32 numbers exceed a sixteenth of the free memory, if more than one
        reference fits at all. The size changes a result only by rounding.
        """
        n, widest = len(self), max(batch, self.dim, 1)
        cached = _CACHED if decoded else _CACHED_BYTES
        wanted = max(_FEWEST, (cached if self.device.type == "cpu" else _RESIDENT) // widest)
        if wanted >= n and n * widest <= cached:
            return max(1, n)
        # Equal parts, up to a tenth larger rather than one more part: a small last chunk costs as many passes.
        parts = max(1, math.ceil(n / wanted - _SLACK))
        return max(1, min(-(-n // parts), free_bytes(self.device) // (4 * _SHARE) // widest))

    def chunks(self, size: int, dtype: torch.dtype, origin: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yield (slice, rows), with rows of shape (at most `size`, d) in `dtype`, valid until the next iteration.

        Subtracts `origin` (d,), if given, from each.
        """
        plain = self.resident is not None and self.element == dtype and self.resident.is_contiguous()
        shape = (min(size, len(self)), *self.data.shape[1:])
        buffer = None if plain and origin is None else torch.empty(shape, dtype=dtype, device=self.device)
        moved = None if origin is None else origin.view(shape[1:])
        for where, part in self.pages(size):
            rows = part if buffer is None else decode(part, buffer[: len(part)], moved)
            yield where, rows.view(len(part), self.dim)

    def pages(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield (slice, data), with data of shape (at most `size`, ...) as stored, valid until the next iteration.

        Pages of an array are on the host, or on the device if that is a GPU.
        """
        staged = self.resident is None and stages(self.device)
        if staged:
            size = min(size, max(1, PAGE // (self.element.itemsize * max(1, self.dim))))
        size = min(size, len(self))
        places = (slice(start, min(start + size, len(self))) for start in range(0, len(self), size))
        if self.resident is not None:
            yield from ((where, self.resident[where]) for where in places)
        elif staged:
            yield from sent_ahead(self.data, places, self.device)
        else:
            page = torch.empty(size, *self.data.shape[1:], dtype=self.element, device="cpu")
            for where in places:
                yield where, read_into(page[: where.stop - where.start], self.data, where)

    @property
    def spread(self) -> Tensor:
        """The typical deviation of a reference's numbers from the middle of all, (); robust to a few outliers, and to NaN.

        The median over up to 256 references, evenly spaced, of the root mean square over their d numbers.
        """
        self._forget_if_changed()
        if self._spread is None:
            n = len(self)
            some = torch.arange(0, n, max(1, n // 256), device=self.device)[:256]
            rows = self.rows(some, self.dtype)
            # NaN has no part in it: the posterior names the reference, here it would make every row another sample.
            self._spread = (rows - rows.nanmedian(0).values).square_().mean(1).sqrt_().nanmedian()
        return self._spread

    def norms(self, dtype: torch.dtype) -> Norms:
        """Squared norms of all references decoded to `dtype`, from an origin if they are far from zero; computed once."""
        self._forget_if_changed()
        if dtype not in self._norms:
            self._norms[dtype] = self._measured(dtype)
        return self._norms[dtype]

    def known_norms(self, dtype: torch.dtype) -> Norms | None:
        """The squared norms, if already computed."""
        self._forget_if_changed()
        return self._norms.get(dtype)

    def set_norms(self, dtype: torch.dtype, squares: Tensor | None, origin: Tensor | None = None) -> None:
        """Use `squares` (n,) as the squared norms from `origin`, without reading their values.

        If they are None, compute them from the middle of the references, because its distance from zero may not be read.
        """
        if squares is None:
            middle = self._middle(dtype)
            origin = None if middle is None else middle[0]
            squares = self._squares(dtype, origin)
        self._norms[dtype] = Norms.of(squares, dtype, origin)

    def _measured(self, dtype: torch.dtype) -> Norms:
        squares = self._squares(dtype)
        largest = squares.max()
        middle = self._middle(dtype)
        if middle is None:
            return Norms.of(squares, dtype, bound=float(largest))
        # One value to read for both: whether they are finite, and, by its sign, whether they are far.
        origin, far = middle
        seen = float(torch.where(far, -largest, largest))
        if not (seen < 0 and math.isfinite(seen)):
            return Norms.of(squares, dtype, bound=abs(seen))
        squares = self._squares(dtype, origin)
        return Norms.of(squares, dtype, origin, float(squares.max()))

    def _middle(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """The median (d,) of some of the references in `dtype`, and whether they are far from zero, bool ().

        None for uint8 images: they are within -1 to 1, in steps that float32 resolves.
        """
        if self.holds_bytes:
            return None
        count = min(_SAMPLE, len(self))
        step = len(self) // count
        where = slice(0, (count - 1) * step + 1, step)
        some = self._read(where) if self.resident is None else self.resident[where]
        rows = some.to(self.device, dtype).reshape(len(some), self.dim)
        # Medians, because single samples may be anywhere; they are numbers of samples, so most differences are exact.
        medians = rows
        while len(medians) >= 3:
            a, b, c = medians[: len(medians) // 3 * 3].unflatten(0, (3, -1))
            medians = torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))
        origin = medians[0]
        spread = squared_norms(rows - origin).sort().values[(count - 1) // 2]
        return origin, squared_norms(origin[None])[0] > _FAR * spread

    def _squares(self, dtype: torch.dtype, origin: Tensor | None = None) -> Tensor:
        size = max(1, _BLOCK // max(1, self.dim)) if self.device.type == "cpu" else self.chunk_size(1)
        return torch.cat([squared_norms(rows) for _, rows in self.chunks(size, dtype, origin)])

    def _gather(self, index: Tensor) -> Tensor:
        if self.resident is not None:
            return self.resident.index_select(0, index)  # takes half the time of data[index]
        if isinstance(self.data, Tensor):
            return self.data.index_select(0, index.to(self.data.device)).to(self.device)
        return self._read(index.cpu().numpy())

    def _read(self, where: slice | NDArray[Any]) -> Tensor:
        """A copy, on the device, of those at `where` of data that are not there."""
        if isinstance(self.data, Tensor):
            return self.data[where].to(self.device)
        part = np.array(bits_of(self.data)[where])  # a copy, because the file may be read-only
        return torch.from_numpy(part).view(self.element).to(self.device)

    def forget(self) -> None:
        """Discard results, because the data have been changed in place."""
        self._version, self._spread = tensor_version(self.data), None
        self._norms.clear()

    def _forget_if_changed(self) -> None:
        """Discard results for a tensor that has since been changed in place."""
        if not torch.compiler.is_compiling() and tensor_version(self.data) != self._version:
            self.forget()


def stages(device: torch.device) -> bool:
    """Whether to send pages ahead to `device`, because Python runs ahead of it."""
    return device.type == "cuda"


def sent_ahead(
    data: Tensor | NDArray[Any], places: Iterable[slice], device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (slice, data[slice] on the CUDA `device`).

    The host does not wait for a copy, which runs from pinned memory in the order of the device's work; only when it is two
    pages ahead does it wait for the older one. torch's allocator of pinned memory reuses a page when its copy is done.
    """
    copied: deque[torch.cuda.Event] = deque()
    for where in places:
        if len(copied) == _AHEAD:
            copied.popleft().synchronize()
        shape = (where.stop - where.start, *data.shape[1:])
        page = read_into(torch.empty(shape, dtype=element_type(data), device="cpu", pin_memory=True), data, where)
        sent = page.to(device, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        copied.append(event)
        yield where, sent


def read_into(page: Tensor, data: Tensor | NDArray[Any], where: slice) -> Tensor:
    """Copy data[where], an array or a tensor in the host's memory, into `page`."""
    if isinstance(data, Tensor):
        return page.copy_(data[where])
    np.copyto((page.view(torch.uint16) if page.dtype == torch.bfloat16 else page).numpy(), bits_of(data)[where])
    return page


def element_type(data: Tensor | NDArray[Any]) -> torch.dtype:
    """The dtype of data as torch has it; uint16 are the bits of bfloat16."""
    if isinstance(data, Tensor):
        return data.dtype
    bits = bits_of(data).dtype
    return torch.bfloat16 if bits == np.uint16 else torch.from_numpy(np.empty(0, bits)).dtype


def bits_of(data: NDArray[Any]) -> NDArray[Any]:
    """An array of ml_dtypes' bfloat16, which torch does not know, as uint16; any other as it is."""
    return data.view(np.uint16) if data.dtype.name == "bfloat16" else data


def tensor_version(data: Tensor | NDArray[Any]) -> int:
    """How often a tensor has been changed in place; 0 for data without a counter."""
    if torch.compiler.is_compiling() or not isinstance(data, Tensor) or data.is_inference():
        return 0
    return data._version


def decode(data: Tensor, buffer: Tensor, origin: Tensor | None = None) -> Tensor:
    """Write the values of `data`, minus `origin`, into `buffer`, of the same shape; exact to 2^-23 for uint8."""
    # To the device first: uint8 takes a quarter of the decoded size.
    data = data.to(buffer.device)
    if data.dtype == torch.uint8:
        buffer.copy_(data)
        # One multiply-add instead of a division and a difference, which would double the cost of the conversion.
        torch.add(buffer.new_full((), -1.0), buffer, alpha=1 / 127.5, out=buffer)
        return buffer if origin is None else buffer.sub_(origin)
    return buffer.copy_(data) if origin is None else torch.sub(data, origin, out=buffer)


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype of scalars and sums: float64, or float32 on a device without it."""
    return torch.float32 if device.type == "mps" else torch.float64


def row_blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of `rows` (B, d) that fit a CPU's cache; elsewhere one slice of all rows, since each operation is a launch."""
    count, dim = rows.shape
    step = max(1, _ROW_BLOCK // max(1, dim)) if rows.device.type == "cpu" else max(1, count)
    return (slice(start, min(start + step, count)) for start in range(0, max(1, count), step))


def in_blocks(of: Callable[[slice], Tensor], rows: Tensor) -> Tensor:
    """Apply `of` to the slices of `rows` (B, d) from `row_blocks`, and concatenate the results along the last axis."""
    parts = [of(some) for some in row_blocks(rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def squared_norms(rows: Tensor) -> Tensor:
    """Squared norms of `rows` (n, d) in the wide dtype, shape (n,).

    Parts of 128 numbers are summed in the dtype of the rows, the parts in float64: an ulp or two in all.
    """
    wide = wide_dtype(rows.device)
    if rows.shape[1] % _PART == 0 and rows.numel() and rows.is_contiguous():
        parts = torch.linalg.vector_norm(rows.view(len(rows), -1, _PART), dim=2)
        return parts.to(wide).square_().sum(1)
    return in_blocks(lambda some: rows[some].square().sum(1, dtype=wide), rows)


def inner_products(p: Tensor, q: Tensor) -> Tensor:
    """Inner products of the rows of `p` with those of `q`, (n, d) each, shape (n,): as accurate as `squared_norms`."""
    wide = wide_dtype(p.device)

    def of(some: slice) -> Tensor:
        products = p[some] * q[some]
        if p.shape[1] % _PART or not p.numel():
            return products.sum(1, dtype=wide)
        return products.view(len(products), -1, _PART).sum(2).to(wide).sum(1)

    return in_blocks(of, p)


def largest_magnitude(rows: Tensor) -> Tensor:
    """The largest magnitude of a number in each of `rows` (n, d), shape (n,); NaN for a row with NaN, 0 for d = 0.

    It runs at memory speed; torch's own infinity norm takes 25 times as long on a CPU.
    """
    if rows.shape[1] == 0:
        return rows.new_zeros(len(rows))
    return torch.maximum(rows.amax(1), -rows.amin(1))
