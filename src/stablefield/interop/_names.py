r"""The few names that a foreign pickle may refer to, and what each becomes.

A pickle is a program that calls functions by name. Here a name is never looked up: it is a key of the table below, which
maps it to our own function that makes plain data from plain arguments. Any other name is refused, with the name in the
message.

| name in the pickle | what it becomes |
|---|---|
| `collections.OrderedDict`, a dict class called `EasyDict` | a dict |
| `builtins.set`, `builtins.frozenset` | a set |
| `*.persistence._reconstruct_persistent_obj` | a `Node`: class name and attributes; its source text is dropped |
| `torch.nn.modules.container.*`, `argparse.Namespace` | a `Node` |
| `torch._utils._rebuild_tensor_v2`, `_rebuild_parameter` | a `TensorView` |
| `torch.FloatStorage` and the like, `torch.storage._load_from_bytes` | a `Storage` |
| `torch.Size`, `torch.device`, torch's dtypes | a tuple, a text, a `Name` |
| numpy's `dtype`, `scalar`, `_reconstruct` | an `Array`, a number, an `Array` |
"""

from collections.abc import Callable, Mapping
from typing import cast

import torch

from stablefield.interop._inert import (
    LARGE,
    Array,
    Name,
    Node,
    RefusedError,
    Storage,
    TensorView,
    attributes_of,
    plain_text,
    whole_sizes,
)

__all__ = ["find_name"]

_MAX_NAME = 200
_DTYPES: Mapping[str, torch.dtype] = {
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


def find_name(module: str, name: str) -> Name:
    """The meaning of `module`.`name`.

    Raises:
        RefusedError: with the name, if it is not in the table.
    """
    if len(module) + len(name) > _MAX_NAME:
        # A million names could share one long text as their module, each with a copy of it.
        raise RefusedError(f"it refers to {plain_text(module)}, a name of {len(module) + len(name):,} characters.")
    text = f"{module}.{name}"
    if text in _TABLE:
        return _TABLE[text]
    if name == "EasyDict":
        return Name(text, call=_empty_dict, make=dict)
    if name == "_reconstruct_persistent_obj" and module.split(".")[-1] == "persistence":
        return Name(text, call=_node)
    raise RefusedError(
        f"it refers to {plain_text(text)}, which is neither a tensor nor a plain value; "
        "nothing in the file was executed. Import only weights: save the network's state dict as safetensors."
    )


# The functions behind the names. Each checks its arguments, because they come from the file.


def _empty_dict(args: tuple[object, ...]) -> object:
    if args:
        raise RefusedError("a dict is made with arguments, which no library does: the file is malicious.")
    return {}


def _set(args: tuple[object, ...]) -> object:
    match args:
        case ():
            return set[object]()
        case (list() | set() as items,) if all(_is_text(item) for item in cast("list[object]", items)):
            return set(cast("list[object]", items))
        case _:
            raise RefusedError("a set is made of something other than texts.")


def _is_text(value: object) -> bool:
    # Modules keep names of buffers in sets. Numbers with equal hashes would take quadratic time, see `_pickles`.
    return isinstance(value, str)


def _node(args: tuple[object, ...]) -> object:
    match args:
        case ({"class_name": str() as name, "state": dict() as state},):  # pyrefly: ignore[not-callable]
            return Node(name, attributes_of(cast("dict[object, object]", state)))
        case ({"class_name": str() as name, "state": None},):  # pyrefly: ignore[not-callable]
            return Node(name)
        case _:
            raise RefusedError("an object of a class saved with its source has no class name or no state.")


def _container(name: str) -> Callable[[], object]:
    return lambda: Node(name)


def _tensor(args: tuple[object, ...]) -> object:
    match args:
        case (Storage() as storage, int(offset), tuple(shape), tuple(stride), *_) if 0 <= offset < LARGE and len(
            shape
        ) == len(stride):
            return TensorView(storage, storage.dtype, offset, whole_sizes(shape), whole_sizes(stride))
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
            return whole_sizes(tuple(cast("list[object]", sizes)))
        case _:
            raise RefusedError("a shape is described in a way that torch does not write.")


def _device(args: tuple[object, ...]) -> object:
    match args:
        case (str() | int(), *rest) if len(rest) <= 1:
            return " ".join(plain_text(part) for part in args)
        case _:
            raise RefusedError("a device is described in a way that torch does not write.")


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
    names += [Name(f"torch.{name}", dtype=dtype) for name, dtype in (*_DTYPES.items(), *_STORAGES.items())]
    names.append(Name("argparse.Namespace", make=_container("Namespace")))
    for kind in ("ModuleDict", "ModuleList", "Sequential"):
        names.append(Name(f"torch.nn.modules.container.{kind}", make=_container(kind)))
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        names += [Name(f"{module}.scalar", call=_numpy_scalar), Name(f"{module}._reconstruct", call=_numpy_array)]
    return {name.text: name for name in names}


_SETS = ("set", "frozenset")
_TABLE = _table()
