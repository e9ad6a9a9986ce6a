"""A recipe as JSON: dataclasses become objects with their class's name under "kind", and back.

A file can only make the classes that a recipe's fields name, with values of their fields' types.
"""

from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from stablefield.training._recipe import Recipe
from stablefield.training._records import has_type

__all__ = ["decode", "encode"]

_KINDS: dict[str, type] = {
    kind.__name__: kind
    for hint in (*get_type_hints(Recipe).values(), Recipe)
    for kind in get_args(hint) or (hint,)
    if is_dataclass(kind)
}

# Names in the config.json of older versions.
_RENAMED = {
    "clip": "max_grad_norm",
    "accumulate": "gradient_accumulation_steps",
    "mend_gradients": "nan_to_num",
}
_RENAMED_KINDS = {
    "Perceptron": "MLPConfig",
    "UNet": "SongUNetConfig",
    "UNet2D": "DiffusersUNetConfig",
}


def encode(value: Any) -> Any:
    """A dataclass of a recipe, or a JSON value, as JSON values; infinity becomes "inf", a tuple a list."""
    if is_dataclass(value):
        return {"kind": type(value).__name__, **{f.name: encode(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, tuple):
        return [encode(item) for item in cast("tuple[Any, ...]", value)]
    return "inf" if value == float("inf") else value


def decode(data: Any) -> Any:
    """The value that `encode` made `data` from.

    Raises:
        ValueError: if a kind is unknown, or its fields do not fit.
    """
    if isinstance(data, list):
        return tuple(decode(item) for item in cast("list[Any]", data))
    if not isinstance(data, dict):
        return float("inf") if data == "inf" else data
    entries = {_RENAMED.get(str(key), str(key)): decode(value) for key, value in cast("dict[str, Any]", data).items()}
    kind = str(entries.pop("kind", None))
    kind = _RENAMED_KINDS.get(kind, kind)
    if kind not in _KINDS:
        raise ValueError(f'config.json has the kind "{kind}", which this version does not know: {", ".join(_KINDS)}.')
    if kind == Recipe.__name__:
        entries.setdefault("exact", True)  # what runs did before they could choose
    hints = get_type_hints(_KINDS[kind])
    for name, value in entries.items():
        if name not in hints:
            raise ValueError(f"config.json does not fit this version: {kind} has no {name}.")
        if not has_type(value, hints[name]):
            raise ValueError(
                f"config.json has {_short(value)} for the {name} of {kind}, which must be {_named(hints[name])}."
            )
    try:
        return _KINDS[kind](**entries)
    except TypeError as error:
        raise ValueError(f"config.json does not fit this version: {kind}: {error}.") from error


def _named(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(f'"{one}"' for one in inner)
    if origin in (Union, UnionType):
        return " or ".join(_named(one) for one in inner)
    if origin is tuple:
        return f"a list of {_named(inner[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return names.get(kind, f"a {getattr(kind, '__name__', kind)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
