"""A call as words of the command line, for the records of what it made."""

from collections.abc import Collection
from dataclasses import fields, is_dataclass
from typing import Any

__all__ = ["flags_of"]


def flags_of(value: Any, base: Any, *, besides: Collection[str] = (), prefix: str = "") -> list[str]:
    """The flags that make `value` of `base`, two dataclasses of one kind: those of the fields in which they differ.

    Args:
        value: what was asked for.
        base: what it would be without flags.
        besides: names of fields that are no flags.
        prefix: what the names of the flags begin with.
    """
    words: list[str] = []
    for field in fields(value):
        new, old = getattr(value, field.name), getattr(base, field.name)
        if field.name in besides or new == old:
            continue
        name = f"{prefix}{field.name.replace('_', '-')}"
        if is_dataclass(new):
            words += flags_of(new, old, prefix=f"{name}.")
        elif isinstance(new, bool):
            words.append(f"--{name}" if new else f"--no-{name}")
        else:
            items: tuple[Any, ...] = new if isinstance(new, tuple) else (new,)
            words += [f"--{name}", *map(str, items)]
    return words
