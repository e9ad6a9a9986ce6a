"""Converts words of the command line to a dataclass, by tyro, and a dataclass back to words."""

import contextlib
import io
import re
from collections.abc import Collection, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

import tyro

__all__ = ["given", "parse_resolution", "parse_seeds", "read", "words_of"]

Kind = TypeVar("Kind")


def read(kind: type[Kind], words: Sequence[str], default: Kind | None = None) -> tuple[Kind, list[str]]:
    """The dataclass `kind` from the flags in `words`, and the words that it does not know.

    Args:
        kind: the dataclass, whose fields are the flags.
        words: arguments without a flag, then flags with their values.
        default: values of all other flags; the fields' defaults if None.

    Raises:
        ValueError: if a value does not fit.
    """
    output = io.StringIO()
    try:
        # The parser prints a box; a message of this command is a paragraph.
        with contextlib.redirect_stderr(output):
            return tyro.cli(
                kind,
                args=list(words),
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.AvoidSubcommands,),
                return_unknown_args=True,
                add_help=False,
            )
    except SystemExit:
        raise ValueError(_paragraph(output.getvalue()).removeprefix(f"--{kind.__name__}: ")) from None


def _paragraph(box: str) -> str:
    """The words of a box, without its frame and title, up to its first rule."""
    lines = [line.strip(" │|") for line in box.splitlines()]
    found: list[str] = []
    for line in lines[1:]:
        if re.fullmatch(r"[-─╭╮╰╯ ]*", line):
            if found:
                break
            continue
        found.append(line)
    text = " ".join(found) or " ".join(lines)
    return re.sub(r"^Error parsing (?:__tyro-dummy-inner__\.)?(?:--)?([\w.-]+): ", r"--\1: ", text)


def given(words: Sequence[str]) -> dict[str, list[str]]:
    """The flags among words, each with the words up to the next flag."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            values = found[name.replace("_", "-")] = [value] if equals else []
        else:
            values.append(word)
    return found


def words_of(value: Any, base: Any, *, besides: Collection[str] = (), prefix: str = "") -> list[str]:
    """The flags that turn `base` into `value`, for the fields in which they differ.

    Args:
        value: a dataclass.
        base: the same dataclass without flags.
        besides: names of fields that are not flags.
        prefix: prefix of the flags' names.
    """
    words: list[str] = []
    hints = get_type_hints(type(value), include_extras=True)
    for field in fields(value):
        new, old = getattr(value, field.name), getattr(base, field.name)
        if field.name in besides or new == old:
            continue
        name = f"{prefix}{field.name.replace('_', '-')}"
        if is_dataclass(new):
            # As tyro names them: the flags of some parts have no prefix.
            notes = getattr(hints[field.name], "__metadata__", ())
            unprefixed = any(getattr(note, "name", None) == "" for note in notes)
            words += words_of(new, old, prefix=prefix if unprefixed else f"{name}.")
        elif isinstance(new, bool):
            words.append(f"--{name}" if new else f"--no-{name}")
        else:
            items: tuple[Any, ...] = new if isinstance(new, tuple) else (new,)
            words += [f"--{name}", *map(str, items)]
    return words


def parse_seeds(text: str) -> list[int]:
    """Parse seeds such as 0-63 or 1,5,8-12.

    Raises:
        ValueError: if the text is invalid, or names a seed twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            start, stop = int(first), int(last if dash else first)
        except ValueError:
            raise ValueError(f"--seeds {text}: write numbers and ranges, such as 0-63 or 0,1,2.") from None
        if stop < start:
            raise ValueError(
                f"--seeds {text}: the range {part.strip()} ends before it begins; write the lower seed first."
            )
        if stop >= 2**32:
            raise ValueError(f"--seeds {text}: pass whole numbers from 0 to 2^32 - 1.")
        if stop - start + len(seeds) >= 1_000_000:
            raise ValueError(f"--seeds {text}: that is over a million images; draw them in several calls.")
        seeds.extend(range(start, stop + 1))
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {text}: name every seed once.")
    return seeds


def parse_resolution(text: str) -> int | tuple[int, int] | None:
    """The side of squares, or (height, width), in a text such as "32" or "32x48"; None if it is empty.

    Raises:
        ValueError: naming the flag.
    """
    if not text:
        return None
    found = re.fullmatch("([0-9]{1,9})(?:[xX\u00d7]([0-9]{1,9}))?", text)
    sides = [int(side) for side in found.groups() if side] if found else [0]
    if min(sides) < 1:
        raise ValueError(
            f"--resolution is {text}: give the side of squares in pixels, such as 32, or height x width, such as 32x48."
        )
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])
