"""A call as words of the command line, for the records of what it made; and a time in words."""

from collections.abc import Collection
from dataclasses import fields, is_dataclass
from typing import Any

__all__ = ["duration", "flags_of"]


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


def duration(seconds: float) -> str:
    """A time in its two largest units: 12 s, 3 min 20 s, 2 h 5 min, 4 d 3 h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
