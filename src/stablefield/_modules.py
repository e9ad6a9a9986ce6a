"""The modules that a denoiser calls, also where it is a function around them.

A module in training mode drops values at random and changes its statistics, so whoever measures or samples wants to know all
that a call reaches: `lambda x, t: -net(1 - t, x)` as much as `net`.
"""

import dis
import inspect
from collections import deque
from collections.abc import Iterator
from functools import cached_property, partial
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

__all__ = ["modules_of", "varies"]

_DROPS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_NORMALISES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

# Objects to look at, nearest first: a closure may reach a whole program.
_MOST = 500


def modules_of(call: object) -> list[nn.Module]:
    """The modules that a call of `call` may reach, each without its parts.

    It follows partial calls and their arguments, bound methods and callable objects; of functions the defaults, the
    variables of enclosing functions, and the globals that their code loads; tuples, lists and dictionaries; and of other
    objects the attributes that the code names. It calls nothing. A module that the code reaches in another way, such as by
    an import in the function, is not found.
    """
    found: dict[int, nn.Module] = {}
    seen: dict[tuple[int, frozenset[str]], object] = {}  # with the objects, so that no identity is used again
    waiting: deque[tuple[object, frozenset[str]]] = deque([(call, frozenset())])
    while waiting and len(seen) < _MOST:
        thing, names = waiting.popleft()
        if isinstance(thing, nn.Module):
            found[id(thing)] = thing
        elif (id(thing), names) not in seen:
            seen[id(thing), names] = thing
            waiting.extend(_within(thing, names))
    return list(found.values())


def varies(call: object) -> bool:
    """Whether a call seems to draw dropout or to normalise by its batch: a module that it may reach is in training mode."""
    parts = (part for module in modules_of(call) for part in module.modules())
    return any(_normalises(part) or (part.training and _share(part) > 0) for part in parts)


def _normalises(part: nn.Module) -> bool:
    """Whether a module normalises by its batch."""
    return isinstance(part, _NORMALISES) and (part.training or part.running_mean is None)


def _share(part: nn.Module) -> float:
    """The share of values that a module drops."""
    # Not by getattr, of which diffusers' models warn.
    share = part.p if isinstance(part, _DROPS) else part.__dict__.get("dropout", 0.0)
    return share if isinstance(share, float) else 0.0


def _within(thing: object, names: frozenset[str]) -> Iterator[tuple[object, frozenset[str]]]:
    """What a call of `thing` may reach next, with the attributes of it that the code names."""
    match thing:
        case partial():
            for part in (thing.func, *thing.args, *thing.keywords.values()):
                yield part, names
        case MethodType():
            yield thing.__self__, names
            yield from _of_function(thing.__func__, thing.__self__)
        case FunctionType():
            yield from _of_function(thing)
        case tuple() | list():
            for part in thing[:_MOST]:
                yield part, names
        case dict():
            for part in list(thing.values())[:_MOST]:
                yield part, names
        case ModuleType() | type():
            # Not the functions of a library.
            for name in sorted(names):
                if isinstance(part := vars(thing).get(name), nn.Module):
                    yield part, names
        case Tensor() | str() | bytes() | int() | float() | None:
            pass
        case _:
            for name in (*sorted(names), *(("__call__", "__wrapped__") if callable(thing) else ())):
                yield from _of_attribute(thing, name, names)


def _of_function(function: Any, owner: object = None) -> Iterator[tuple[object, frozenset[str]]]:
    """What a function holds and loads; `owner` is the object whose method it is."""
    if not isinstance(function, FunctionType):
        return
    inner = inspect.unwrap(function)
    if inner is not function:  # such as under torch.no_grad
        yield from _of_function(inner, owner)
    names, loaded = _names_of(function.__code__)
    if owner is not None:
        yield owner, names
    for part in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield part, names
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents, names
        except ValueError:  # a variable that has no value yet
            continue
    for name in sorted(loaded):
        if name in function.__globals__:
            yield function.__globals__[name], names


def _of_attribute(thing: object, name: str, names: frozenset[str]) -> Iterator[tuple[object, frozenset[str]]]:
    """The attribute `name` of an object, without a call of its own code; of its methods and properties what they reach."""
    value = inspect.getattr_static(thing, name, None)
    if isinstance(value, MemberDescriptorType):  # of __slots__
        value = getattr(thing, name, None)
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, cached_property):
        value = value.func
    elif isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, FunctionType) and name not in getattr(thing, "__dict__", {}):
        yield from _of_function(value, thing)
    elif not (inspect.isbuiltin(value) or inspect.ismethoddescriptor(value) or inspect.isdatadescriptor(value)):
        yield value, names


def _names_of(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The names that a code and those within it use, and the globals among them that they load."""
    names, loaded = set(code.co_names), set[str]()
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            loaded.add(str(instruction.argval))
    for part in code.co_consts:
        if isinstance(part, CodeType):
            more, also = _names_of(part)
            names |= more
            loaded |= also
    return frozenset(names), frozenset(loaded)
