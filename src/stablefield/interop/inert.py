r"""Inert values: what a foreign pickle may be turned into, and the few names it may refer to.

A pickle is a program that calls functions by name. Here a name is never looked up: it is a key of the table below, and
stands for a function of ours that makes plain data of plain arguments. A name that is not in the table is refused, with
the name in the message.

| name in the pickle | what it becomes |
|---|---|
| `collections.OrderedDict`, a dict class called `EasyDict` | a dict |
| `builtins.set`, `builtins.frozenset` | a set |
| `*.persistence._reconstruct_persistent_obj` | a `Node`: class name and attributes; the source text with it is not kept |
| `torch.nn.modules.container.*` | a `Node` |
| `torch._utils._rebuild_tensor_v2`, `_rebuild_parameter` | a `TensorView` |
| `torch.FloatStorage` and its kin, `torch.storage._load_from_bytes` | a `Storage` |
| `torch.Size`, `torch.device`, torch's dtypes | a tuple, a text, a `Name` |
| numpy's `dtype`, `scalar`, `_reconstruct` | an `Array`, a number, an `Array` |
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

__all__ = [
    "DTYPES",
    "Array",
    "Name",
    "Node",
    "RefusedError",
    "Storage",
    "TensorView",
    "attributes_of",
    "find_name",
    "plain_text",
]


class RefusedError(ValueError):
    """A file holds something that is not read; the message says what."""


@dataclass(frozen=True)
class Name:
    """A name of the table, such as a dtype or a function.

    Attributes:
        text: module and name, with a dot between.
        call: what REDUCE makes of it, or None if it cannot be called.
        make: what NEWOBJ makes of it, or None if it has no instances here.
        dtype: of the storages and tensors that it stands for.
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
        attributes: what the object's `__dict__` held.
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
        """The bytes where torch can use them, copied once for all tensors.

        Raises:
            RefusedError: if they have not been read.
        """
        if self.data is None:
            raise RefusedError("a tensor's storage is not in the file: the file is cut off.")
        if not isinstance(self.data, bytearray):
            self.data = bytearray(self.data)
        return self.data

    def fill(self, data: bytes) -> None:
        """Give it its bytes.

        Raises:
            RefusedError: if they are not as many as was announced.
        """
        if len(data) != self.count * self.dtype.itemsize:
            raise RefusedError(
                f"a storage of {self.count:,} {self.dtype} has {len(data):,} bytes in the file: the file is damaged."
            )
        self.data = data


@dataclass
class TensorView:
    """A tensor that has not been made yet.

    Attributes:
        storage: where its elements are.
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

    def tensor(self) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            RefusedError: if it reaches out of its storage, or repeats elements of it.
        """
        memory = self.storage.memory()
        count = math.prod(self.shape)
        if count == 0:
            return torch.zeros(self.shape, dtype=self.dtype)
        held = len(memory) // self.dtype.itemsize
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        # More elements than the storage holds would be one number repeated to any size.
        if last >= held or count > held:
            raise RefusedError(
                f"a tensor of shape {self.shape} and strides {self.stride} from element {self.offset} does not lie in its "
                f"storage of {held:,} elements: the file is damaged or made to mislead."
            )
        flat = torch.frombuffer(memory, dtype=self.dtype)
        return flat.as_strided(self.shape, self.stride, self.offset).clone(memory_format=torch.contiguous_format)


DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}
_STORAGES: Mapping[str, torch.dtype] = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}
# numpy's dtype texts.
_CODES: Mapping[str, torch.dtype] = {
    "f4": torch.float32,
    "f8": torch.float64,
    "f2": torch.float16,
    "u1": torch.uint8,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "b1": torch.bool,
}

# Above any size or offset of a tensor.
_LARGE = 2**48


def find_name(module: str, name: str) -> Name:
    """What `module`.`name` stands for.

    Raises:
        RefusedError: with the name, if it is not in the table.
    """
    text = f"{module}.{name}"
    if text in _TABLE:
        return _TABLE[text]
    if name == "EasyDict":
        return Name(text, call=_empty_dict, make=dict)
    if name == "_reconstruct_persistent_obj" and module.split(".")[-1] == "persistence":
        return Name(text, call=_node)
    raise RefusedError(
        f"it refers to {plain_text(text)}, which is neither a tensor nor a plain value; "
        "nothing of the file was executed. Import only weights: save the network's state dict as safetensors."
    )


def plain_text(value: object, limit: int = 80) -> str:
    """Text from a file as it may be shown: on one line, without control characters, not longer than `limit`."""
    if not isinstance(value, str | int | float | bool | None):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and value.bit_length() > 128:
        return "a huge number"
    text = "".join(c if c.isprintable() else "?" for c in str(value)[: limit + 1])
    return text if len(text) <= limit else text[: limit - 3] + "..."


# What the names become. Every function checks its arguments: they come from the file.


def _empty_dict(args: tuple[object, ...]) -> object:
    if args:
        raise RefusedError("a dict is made with arguments, which no library does: the file is made to mislead.")
    return {}


def _set(args: tuple[object, ...]) -> object:
    match args:
        case ():
            return set[object]()
        case (list() | set() as items,) if all(_is_key(item) for item in cast("list[object]", items)):
            return set(cast("list[object]", items))
        case _:
            raise RefusedError("a set holds something other than numbers and texts.")


def _is_key(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | bytes)


def _node(args: tuple[object, ...]) -> object:
    match args:
        case ({"class_name": str() as name, "state": dict() as state},):
            return Node(name, attributes_of(cast("dict[object, object]", state)))
        case ({"class_name": str() as name, "state": None},):
            return Node(name)
        case _:
            raise RefusedError("an object of a class that travels with its source has no class name or no state.")


def attributes_of(state: dict[object, object]) -> dict[str, object]:
    """The state of an object, if it is a dict of attributes.

    Raises:
        RefusedError: if a key is no text.
    """
    if not all(isinstance(key, str) for key in state):
        raise RefusedError("an object's state has keys that are no names.")
    return {str(key): value for key, value in state.items()}


def _container(name: str) -> Callable[[], object]:
    return lambda: Node(name)


def _tensor(args: tuple[object, ...]) -> object:
    match args:
        case (Storage() as storage, int(offset), tuple(shape), tuple(stride), *_) if 0 <= offset < _LARGE and len(
            shape
        ) == len(stride):
            return TensorView(storage, storage.dtype, offset, _sizes(shape), _sizes(stride))
        case _:
            raise RefusedError("a tensor is described in a way that torch does not write.")


def _parameter(args: tuple[object, ...]) -> object:
    match args:
        case (TensorView() as view, *_):
            return view
        case _:
            raise RefusedError("a parameter is made of something other than a tensor.")


def _size(args: tuple[object, ...]) -> object:
    match args:
        case (tuple() | list() as sizes,):
            return _sizes(tuple(cast("list[object]", sizes)))
        case _:
            raise RefusedError("a shape is described in a way that torch does not write.")


def _device(args: tuple[object, ...]) -> object:
    return " ".join(plain_text(part) for part in args)


def _sizes(values: object) -> tuple[int, ...]:
    found: list[int] = []
    for value in cast("tuple[object, ...]", values):
        if type(value) is not int or not 0 <= value < _LARGE or len(found) >= 32:
            raise RefusedError("a shape or stride is not a short row of whole numbers.")
        found.append(value)
    return tuple(found)


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
            # A dtype's: only the byte order matters, and only that of this machine is read.
            order = cast("tuple[object, ...]", state)[1:2] if isinstance(state, tuple) else ()
            if order not in (("<",), ("|",), ("=",)):
                raise RefusedError("a numpy array has another byte order than this machine.")
            return
        match state:
            case (int(), tuple(shape), Array(dtype=torch.dtype() as dtype), bool(fortran), bytes(data)):
                sizes = _sizes(shape)
                storage = Storage(dtype, math.prod(sizes))
                storage.fill(data)
                axes = list(range(len(sizes))) if fortran else list(range(len(sizes)))[::-1]
                strides, step = [0] * len(sizes), 1
                for axis in axes:
                    strides[axis], step = step, step * sizes[axis]
                self.view = TensorView(storage, dtype, 0, sizes, tuple(strides))
            case _:
                raise RefusedError("a numpy array holds something other than numbers.")


def _numpy_dtype(args: tuple[object, ...]) -> object:
    match args:
        case (str(code), *_) if code in _CODES:
            return Array(dtype=_CODES[code])
        case _:
            raise RefusedError("a numpy array holds something other than numbers.")


def _numpy_array(args: tuple[object, ...]) -> object:  # noqa: ARG001
    return Array()


def _numpy_scalar(args: tuple[object, ...]) -> object:
    match args:
        case (Array(dtype=torch.dtype() as dtype), bytes(data)):
            storage = Storage(dtype, 1)
            storage.fill(data)
            return TensorView(storage, dtype, 0, (), ()).tensor().item()
        case _:
            raise RefusedError("a numpy number is described in a way that numpy does not write.")


def _table() -> dict[str, Name]:
    names = [
        Name("collections.OrderedDict", call=_empty_dict, make=dict),
        Name("torch._utils._rebuild_tensor_v2", call=_tensor),
        Name("torch._utils._rebuild_parameter", call=_parameter),
        Name("torch.Size", call=_size),
        Name("torch.device", call=_device),
        Name("torch.storage.UntypedStorage", dtype=torch.uint8),
        Name("numpy.dtype", call=_numpy_dtype),
        Name("numpy.ndarray"),
    ]
    names += [Name(f"{builtins}.{kind}", call=_set) for builtins in ("builtins", "__builtin__") for kind in _SETS]
    names += [Name(f"torch.{name}", dtype=dtype) for name, dtype in (*DTYPES.items(), *_STORAGES.items())]
    for kind in ("ModuleDict", "ModuleList", "Sequential"):
        names.append(Name(f"torch.nn.modules.container.{kind}", make=_container(kind)))
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        names += [Name(f"{module}.scalar", call=_numpy_scalar), Name(f"{module}._reconstruct", call=_numpy_array)]
    return {name.text: name for name in names}


_SETS = ("set", "frozenset")
_TABLE = _table()
