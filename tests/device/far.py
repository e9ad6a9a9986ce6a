"""A device that waits: its tensors are numbers on the CPU, and it keeps books on what a GPU would have to wait for.

The device "far" follows the rules of a GPU: tensors of two devices do not meet in one operation, and its random numbers
come from a generator of its own. What makes Python wait for a GPU is counted: *looks*, where it asks for a value or for a
number of rows, and *copies* between the devices. So a machine without a GPU can tell what runs on one, and what waits;
not how fast, and not what the GPU's own arithmetic gives.

What it does not show: branches of ours for "cuda" (events of a stopwatch, pinned memory, what the driver says of memory);
what in torch waits inside a kernel and is not named in `LOOKS`. `tolist`, `new_tensor`, lists as an index and formatting
fail on it. torch allows one device written in Python per process, and its name stays: use it in a process of its own.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import backend_registration

CPU = torch.device("cpu")


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of a device beside its operations."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


backend_registration._setup_privateuseone_for_python_backend("far", backend_module=_Module())
FAR = torch.device("far:0")

# Operations whose result's shape, or whose Python value, depends on numbers, and those that ask whether they succeeded.
LOOKS = (
    *("_local_scalar_dense", "nonzero", "equal", "allclose", "masked_select", "_unique2", "unique_dim"),
    *("unique_consecutive", "repeat_interleave", "bincount", "histc", "multinomial"),
    *("linalg_inv_ex", "linalg_cholesky_ex", "_linalg_eigh", "_linalg_solve_ex", "_linalg_svd", "linalg_lu_factor_ex"),
)
# What torch makes in ways that a device written in Python does not see: of Python's numbers, which are copied to a device,
# and of a rule, with a size that is known only after the tensor has been made.
_OF_NUMBERS = ("tensor", "as_tensor")
_OF_A_RULE = ("arange", "linspace", "logspace", "eye")

counts: Counter[str] = Counter()
launches: Counter[str] = Counter()
_NearGenerator = torch.Generator
_generators: list[_NearGenerator] = []


class FarGenerator(torch.Generator):
    """Random numbers of the far device."""

    device = FAR


class _Generators(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _NearGenerator)

    def __call__(cls, device: Any = "cpu") -> Any:
        if torch.device(device).type != "far":
            return _NearGenerator(device)
        _generators.append(FarGenerator())
        return _generators[-1]


class _AnyGenerator(metaclass=_Generators):
    """Stands for torch.Generator, which knows no devices written in Python."""


class FarTensor(Tensor):
    """A tensor of the far device."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Self:
        made = Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype, device=FAR
        )
        made.near = near
        return made

    def __repr__(self) -> str:  # pyrefly: ignore[bad-override]
        return f"FarTensor({self.near})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # pyrefly: ignore[bad-override]
        return _run(func, args, kwargs or {})


def near(value: Any) -> Any:
    """The numbers of far tensors, without counting them as copies."""
    return value.detach().near if isinstance(value, FarTensor) else value


@contextmanager
def far_device() -> Generator[torch.device]:
    """The device, within a block."""
    kept = {name: getattr(torch, name) for name in ("Generator", *_OF_NUMBERS, *_OF_A_RULE)}
    torch.Generator = _AnyGenerator
    for name in (*_OF_NUMBERS, *_OF_A_RULE):
        setattr(torch, name, _made_near(kept[name], copied=name in _OF_NUMBERS))
    try:
        yield FAR
    finally:
        for name, value in kept.items():
            setattr(torch, name, value)


def _made_near(function: Callable[..., Tensor], copied: bool) -> Callable[..., Tensor]:
    def made(*args: Any, device: Any = None, **options: Any) -> Tensor:
        found = function(*args, **options)
        if device is None or torch.device(device).type != "far":
            return found if device is None else found.to(device)
        return found.to(FAR) if copied else FarTensor(found)

    return made


def waits(function: Callable[[], Any]) -> dict[str, int]:
    """What Python waits for while `function` runs."""
    counts.clear()
    function()
    return dict(counts)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, makes_nothing = _facts(func)
    if name == "stablefield::posterior":
        # Looked into, since on a device it runs as it stands.
        from stablefield.targets._engine.assembly import compute

        return compute(*args, **kwargs)
    # What follows runs hundreds of thousands of times: one pass, and no generators.
    leaves = _leaves(args, [])
    if kwargs:
        _leaves(kwargs.values(), leaves)
    far_ones: list[FarTensor] = []
    near_ones: list[Tensor] = []
    generators: list[torch.Generator] = []
    for leaf in leaves:
        kind = type(leaf)
        if kind is FarTensor:
            far_ones.append(leaf)
        elif kind is _NearGenerator or kind is FarGenerator:
            generators.append(leaf)
        elif isinstance(leaf, Tensor):
            near_ones.append(leaf)
    device = kwargs.get("device")
    result_is_far = bool(far_ones) if device is None else torch.device(device).type == "far"
    if name == "copy":
        result_is_far = isinstance(args[0], FarTensor)
    if name in ("_to_copy", "copy"):
        # What need not be waited for is taken to come from pinned memory.
        ahead = result_is_far and (kwargs.get("non_blocking", False) or (name == "copy" and args[2:] == (True,)))
        if not ahead and any(isinstance(leaf, FarTensor) != result_is_far for leaf in (*far_ones, *near_ones)):
            counts["copy to far" if result_is_far else "copy to near"] += 1
    elif far_ones and any(leaf.ndim for leaf in near_ones):
        raise RuntimeError(f"{name}: operands on two devices")
    if far_ones and (name in LOOKS or _has_mask(name, args)):
        counts[f"look: {name}"] += 1
    if any(_is_far(one) != result_is_far for one in generators):
        raise RuntimeError(f"{name}: a generator of another device")
    if result_is_far and not makes_nothing:
        launches[name] += 1
    result = func(*map(_inner, args), **{key: _inner(value) for key, value in kwargs.items()})
    for leaf in far_ones:
        if leaf.shape != leaf.near.shape:
            raise NotImplementedError(f"{name} has given a tensor of the device another shape, which is not followed")
    return _outer(result, far_ones) if result_is_far else result


def _is_far(generator: torch.Generator) -> bool:
    return any(generator._cdata == one._cdata for one in _generators)


def _leaves(values: Iterable[Any], found: list[Any]) -> list[Any]:
    """Add what is in tuples and lists to `found`, without torch's `tree_leaves`, which takes half of the time."""
    for value in values:
        if type(value) in (tuple, list):
            _leaves(value, found)
        else:
            found.append(value)
    return found


def _inner(value: Any) -> Any:
    """What the operation gets: the numbers of far tensors, on the CPU."""
    kind = type(value)
    if kind is FarTensor:
        return value.near
    if kind is tuple or kind is list:
        return kind([_inner(one) for one in value])
    return CPU if kind is torch.device and value.type == "far" else value


def _outer(value: Any, far_ones: list[FarTensor]) -> Any:
    """What the caller gets: tensors of the device; what is changed in place stays the tensor that it was."""
    if isinstance(value, Tensor):
        for one in far_ones:
            if one.near is value:
                return one
        return FarTensor(value)
    if type(value) in (tuple, list):
        return type(value)([_outer(one, far_ones) for one in value])
    return value


@cache
def _facts(func: Any) -> tuple[str, bool]:
    """An operation's name, and whether it makes no numbers."""
    name = func._schema.name.removeprefix("aten::").rstrip("_")
    aliases = [value.alias_info for value in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return name, is_view or name.startswith("empty") or name == "detach"


def _has_mask(name: str, args: Any) -> bool:
    # A mask as an index is a hidden nonzero.
    masks = args[1] if name in ("index", "index_put") else ()
    return any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in masks)


# What no tensor tells of: operations that make one on the device.
_made = torch.library.Library("_", "IMPL")
_made.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
# Autocast may be on; it changes no numbers here.
_made.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
