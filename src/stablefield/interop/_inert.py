"""Inert values: the data that a foreign pickle may become, without any code of the file.

| value | meaning |
|---|---|
| `Node` | an object of a foreign class: its name and attributes |
| `TensorView`, `Storage` | a tensor before it is made, and its memory |
| `Array` | a numpy array or dtype |
| `Name` | a class or function that the pickle names; see `stablefield.interop._names` |
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

__all__ = [
    "LARGE",
    "MAX_AXES",
    "Array",
    "Name",
    "Node",
    "RefusedError",
    "Storage",
    "TensorView",
    "attributes_of",
    "plain_text",
    "whole_sizes",
]

LARGE = 2**48
"""Above any size or offset of a tensor."""

MAX_AXES = 8
"""Axes of a tensor; weights have five at most."""


class RefusedError(ValueError):
    """A file holds unsupported content; the message names it."""


@dataclass(frozen=True)
class Name:
    """A name from the table, such as a dtype or a function.

    Attributes:
        text: module and name, separated by a dot.
        call: the function that REDUCE calls, or None if it cannot be called.
        make: the function that NEWOBJ calls, or None if it has no instances here.
        dtype: of its storages and tensors.
    """

    text: str
    call: Callable[[tuple[object, ...]], object] | None = None
    make: Callable[[], object] | None = None
    dtype: torch.dtype | None = None


@dataclass
class Node:
    """An object of a foreign class: its name and attributes, nothing else.

    Attributes:
        class_name: without the module.
        attributes: the content of the object's `__dict__`.
    """

    class_name: str
    attributes: dict[str, object] = field(default_factory=dict[str, object])


@dataclass
class Storage:
    """The memory of tensors.

    Attributes:
        dtype: of its elements; uint8 for one without a type.
        count: how many there are.
        data: their bytes; None until they have been read.
    """

    dtype: torch.dtype
    count: int
    data: bytes | bytearray | None = None

    def memory(self) -> bytearray:
        """The bytes in a form that torch can use, copied once for all tensors.

        Raises:
            RefusedError: if they have not been read.
        """
        if self.data is None:
            raise RefusedError("a tensor's storage is not in the file: the file is cut off.")
        if not isinstance(self.data, bytearray):
            self.data = bytearray(self.data)
        return self.data

    def fill(self, data: bytes) -> None:
        """Set its bytes.

        Raises:
            RefusedError: if their number is not the expected one.
        """
        if len(data) != self.count * self.dtype.itemsize:
            raise RefusedError(
                f"a storage of {self.count:,} {self.dtype} has {len(data):,} bytes in the file: the file is damaged."
            )
        self.data = data


@dataclass
class TensorView:
    """A tensor before it is made.

    Attributes:
        storage: holds its elements.
        dtype: of its elements.
        offset: of the first element.
        shape: of the tensor.
        stride: elements between neighbours, per axis.
    """

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def check(self) -> None:
        """Check that the tensor is within its storage.

        Raises:
            RefusedError: if it exceeds its storage, repeats elements of it, or has none and axes of any length.
        """
        count = math.prod(self.shape)
        if count == 0:
            # No storage bounds its other axes.
            if math.prod(filter(None, self.shape)) > LARGE:
                raise RefusedError(f"a tensor of shape {self.shape} has no elements: the file is malicious.")
            return
        held = self.storage.count * self.storage.dtype.itemsize // self.dtype.itemsize
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        # More elements than the storage holds could repeat one number to any size.
        if last >= held or count > held:
            raise RefusedError(
                f"a tensor of shape {self.shape} and strides {self.stride} from element {self.offset} exceeds its storage "
                f"of {held:,} elements: the file is damaged or malicious."
            )

    def tensor(self) -> Tensor:
        """The tensor, in its own memory.

        Raises:
            RefusedError: as `check` does, or if the storage is not in the file.
        """
        self.check()
        memory = self.storage.memory()
        if math.prod(self.shape) == 0:
            return torch.zeros(self.shape, dtype=self.dtype)
        flat = torch.frombuffer(memory, dtype=self.dtype)
        return flat.as_strided(self.shape, self.stride, self.offset).clone(memory_format=torch.contiguous_format)


@dataclass
class Array:
    """A numpy array, or a numpy dtype.

    Attributes:
        dtype: of a dtype.
        view: the numbers of an array, once its state is known.
    """

    dtype: torch.dtype | None = None
    view: TensorView | None = None

    def build(self, state: object) -> None:
        """Take the state that follows in the pickle."""
        if self.dtype is not None:
            # Of a dtype's state only the byte order matters, and it must be this machine's.
            order = cast("tuple[object, ...]", state)[1:2] if isinstance(state, tuple) else ()
            if order not in (("<",), ("|",), ("=",)):
                raise RefusedError("a numpy array has a different byte order from this machine's.")
            return
        match state:
            case (int(), tuple(shape), Array(dtype=torch.dtype() as dtype), bool(fortran), bytes(data)):
                sizes = whole_sizes(shape)
                storage = Storage(dtype, math.prod(sizes))
                storage.fill(data)
                axes = list(range(len(sizes))) if fortran else list(range(len(sizes)))[::-1]
                strides, step = [0] * len(sizes), 1
                for axis in axes:
                    strides[axis], step = step, step * sizes[axis]
                self.view = TensorView(storage, dtype, 0, sizes, tuple(strides))
            case _:
                raise RefusedError("a numpy array holds something other than numbers.")


def attributes_of(state: dict[object, object]) -> dict[str, object]:
    """The state of an object, if it is a dict of attributes.

    Raises:
        RefusedError: if a key is not text.
    """
    if not all(isinstance(key, str) for key in state):
        raise RefusedError("an object's state has keys that are not names.")
    return {str(key): value for key, value in state.items()}


def whole_sizes(values: object) -> tuple[int, ...]:
    """A shape or stride as a tuple of whole numbers.

    Raises:
        RefusedError: if it is not one.
    """
    found: list[int] = []
    for value in cast("tuple[object, ...]", values):
        if type(value) is not int or not 0 <= value < LARGE or len(found) >= MAX_AXES:
            raise RefusedError(f"a shape or stride is not a tuple of up to {MAX_AXES} whole numbers.")
        found.append(value)
    return tuple(found)


def plain_text(value: object, limit: int = 80) -> str:
    """Text from a file in a form safe to show: on one line, without control characters, not longer than `limit`."""
    if not isinstance(value, str | int | float | bool | None):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and value.bit_length() > 128:
        return "a huge number"
    text = "".join(c if c.isprintable() else "?" for c in str(value)[: limit + 1])
    return text if len(text) <= limit else text[: limit - 3] + "..."
