"""Records: the JSON data of a run, each with its own checksum, read as untrusted input; and what may become such data.

A record is a JSON object. Its entry "checksum" covers the other entries, not their layout: reindenting a record keeps it
valid, a flipped bit does not.
"""

import hashlib
import json
import math
import operator
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeGuard, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np

from stablefield._atomic_file import write_atomically
from stablefield._regular_file import JSON_LIMIT, open_regular, read_limited
from stablefield._shapes import check_choice, check_kind, either, flag, number, whole_number

__all__ = [
    "append_line",
    "check_fields",
    "from_record",
    "has_type",
    "is_count",
    "parse",
    "read_lines",
    "read_record",
    "seal",
    "unseal",
    "write_lines",
    "write_record",
]

Made = TypeVar("Made")

_LONGEST_LINE = 2**20
_DEEPEST = 32
_CHECKSUM = "checksum"
# Each returns the argument as a plain Python value.
_CHECKS: dict[object, Callable[[str, Any], object]] = {bool: flag, int: whole_number, float: number}


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its checksum as the last entry."""
    return {**record, _CHECKSUM: _sum(record)}


def unseal(
    record: Mapping[str, Any], former: frozenset[str] | None = None, optional: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """The record without its checksum.

    Args:
        record: as read.
        former: the entries of records from before checksums: with these it may lack one.
        optional: entries that such a record may also have.

    Raises:
        ValueError: if its checksum does not match.
    """
    content = {key: value for key, value in record.items() if key != _CHECKSUM}
    if _CHECKSUM not in record and (former is None or former <= set(content) <= former | optional):
        return content
    if record.get(_CHECKSUM) != _sum(content):
        raise ValueError("it is damaged: its checksum does not match its content")
    return content


def parse(text: str | bytes) -> dict[str, Any]:
    """A JSON object of finite numbers.

    Raises:
        ValueError: if it is not one, or is nested too deep.
    """
    try:
        record: Any = json.loads(text, parse_float=_finite, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    level: list[Any] = [record]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in _inside(outer)]
    if level:
        raise ValueError("it is nested too deep")
    return cast("dict[str, Any]", record)


def read_record(path: Path, former: frozenset[str], optional: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Read a file with one record, written by `write_record`.

    Args:
        path: the file.
        former: see `unseal`.
        optional: see `unseal`.

    Raises:
        ValueError: if it is not a regular file, or not as written.
        OSError: if it cannot be read.
    """
    return unseal(parse(read_limited(path)), former, optional)


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a file with one record, atomically.

    Raises:
        ValueError: if it is too long to be read again.
        OSError: if it cannot be written.
    """
    text = json.dumps(seal(record), indent=2, allow_nan=False) + "\n"
    if len(text) > JSON_LIMIT:
        raise ValueError(
            f"{path} would take {len(text):,} bytes, above the limit of {JSON_LIMIT:,}: shorten the names of the classes."
        )
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records in a file with one per line, without damaged or truncated ones; none if there is no file.

    Raises:
        ValueError: if it is not a regular file.
        OSError: if it cannot be read.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    with file:
        fresh = True
        while piece := file.readline(_LONGEST_LINE):
            if fresh and len(piece) < _LONGEST_LINE:
                try:
                    record = unseal(parse(piece))
                except ValueError:
                    pass
                else:
                    yield record
            fresh = piece.endswith(b"\n")


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record to a file with one per line.

    Raises:
        ValueError: if it is not a regular file.
        OSError: if it cannot be written.
    """
    # Without O_NONBLOCK, opening a FIFO would wait for a reader.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a regular file: remove it.")
        line = _line(record)
        if status.st_size and os.pread(descriptor, 1, status.st_size - 1) != b"\n":
            line = b"\n" + line  # a kill truncated the last line
        while line:
            line = line[os.write(descriptor, line) :]
    finally:
        os.close(descriptor)


def write_lines(path: Path, records: Iterator[Mapping[str, Any]]) -> None:
    """Write a file with one record per line, atomically.

    Raises:
        OSError: if it cannot be written.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.writelines(_line(record) for record in records)

    write_atomically(path, write)


def from_record(kind: type[Made], record: object) -> Made:
    """A dataclass from the JSON object of its attributes, with tuples for lists.

    Raises:
        ValueError: naming the entry, if one is missing, unknown or has the wrong type.
    """
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    hints = get_type_hints(kind)
    entries: dict[str, Any] = {
        name: tuple(cast("list[Any]", value)) if isinstance(value, list) else value
        for name, value in cast("dict[str, Any]", record).items()
    }
    if odd := sorted({*entries} ^ {*hints}):
        raise ValueError(f"it has no {odd[0]}" if odd[0] in hints else f"it has {odd[0]:.80}, which is unknown")
    for name, hint in hints.items():
        if not has_type(entries[name], hint):
            raise ValueError(f"its {name} has the wrong type")
    return kind(**entries)


def has_type(value: Any, kind: Any) -> bool:
    """Whether a value, with tuples for lists, has a type: a class, a literal, a tuple, or a union of these.

    Integers count as numbers if they fit 64 bits; booleans do not.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if origin in (Union, UnionType):
        return any(has_type(value, one) for one in inner)
    if origin is tuple:
        items = cast("tuple[Any, ...]", value)
        if not isinstance(value, tuple):
            return False
        if inner[-1] is ...:
            return all(has_type(item, inner[0]) for item in items)
        return len(items) == len(inner) and all(has_type(item, one) for item, one in zip(items, inner, strict=True))
    if isinstance(value, int) and kind in (int, float):
        return not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, kind)


def check_fields(config: Any, prefix: str = "") -> None:
    """Check each field of a frozen dataclass against its type, and make plain Python of NumPy's numbers and of lists.

    So what the dataclass holds can be written as JSON, and read again.

    Args:
        config: a dataclass whose fields are such as `has_type` knows, or such dataclasses.
        prefix: of the fields' names in errors.

    Raises:
        TypeError: naming the field, its value and what it takes, if its value has another type.
        ValueError: if it is none of the field's choices, or not whole.
    """
    for name, value in _changed_fields(config, prefix).items():
        object.__setattr__(config, name, value)


def _changed_fields(config: Any, prefix: str) -> dict[str, Any]:
    """The fields whose plain values are other objects."""
    hints = get_type_hints(type(config))
    given = {entry.name: getattr(config, entry.name) for entry in fields(config)}
    found = {name: _plain(prefix + name, value, hints[name]) for name, value in given.items()}
    return {name: value for name, value in found.items() if value is not given[name]}


def _plain(name: str, value: Any, kind: Any) -> Any:
    """A plain Python value of a type, equal to the given one, or the given one itself."""
    alternatives = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    choices = [choice for each in alternatives if get_origin(each) is Literal for choice in get_args(each)]
    kinds = [each for each in alternatives if get_origin(each) is not Literal and each is not NoneType]
    if (value is None and NoneType in alternatives) or any(
        type(value) is type(one) and value == one for one in choices
    ):
        return value
    if choices and (isinstance(value, str) or not kinds):
        others = ["a whole number" if each is int else "a number" for each in kinds]
        check_choice(name, value, choices, *others)
        return str(value)  # NumPy has strings of its own
    if kinds[0] in _CHECKS:
        if kinds[0] is float and type(value) is int and has_type(value, float):
            return value  # a whole number stays one in the file
        try:
            return _CHECKS[kinds[0]](name, value)
        except (TypeError, ValueError) as error:
            if not choices:
                raise
            raise type(error)(f"{str(error).rstrip('.')}, or {either(choices)}.") from None
    if get_origin(kinds[0]) is tuple:
        listed = value.tolist() if isinstance(value, np.ndarray) else value
        check_kind(name, listed, (tuple, list), "a tuple, or None" if NoneType in alternatives else "a tuple")
        found = tuple(_plain(f"{name}[{k}]", one, get_args(kinds[0])[0]) for k, one in enumerate(listed))
        return value if isinstance(value, tuple) and all(map(operator.is_, found, value)) else found
    # A file of a dataclass's own subclass could not be read again.
    exact = tuple(each for each in kinds if each is type(value) or not is_dataclass(each))
    check_kind(name, value, exact, either([f"{each.__name__}(...)" for each in kinds]))
    changed = _changed_fields(value, f"{name}.") if is_dataclass(value) else {}
    return replace(value, **changed) if changed else value


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value from a file is a whole number from 0 to below 2**63."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(seal(record), allow_nan=False).encode() + b"\n"


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return cast("dict[str, Any]", value).values()
    return cast("list[Any]", value) if isinstance(value, list) else ()


def _sum(record: Mapping[str, Any]) -> str:
    text = json.dumps(dict(record), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _no_number(text)
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"it holds {text[:40]}, which is not a finite number")
