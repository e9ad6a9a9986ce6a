"""Words of the command line to a dataclass, by tyro, and a dataclass to the words that make it."""

import contextlib
import io
import re
from collections.abc import Collection, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import tyro

__all__ = ["given", "parse_seeds", "read", "words_of"]

Kind = TypeVar("Kind")


def read(kind: type[Kind], words: Sequence[str], default: Kind | None = None) -> tuple[Kind, list[str]]:
    """The dataclass `kind` with the flags of `words`, and the words that it has no flags for.

    Args:
        kind: the dataclass, whose fields are the flags.
        words: flags and their values, behind the arguments without a flag.
        default: what flags that are not given stay at; the defaults of the fields if None.

    Raises:
        ValueError: if a value does not fit.
    """
    told = io.StringIO()
    try:
        # What the parser says is a box; a message of this command is a paragraph.
        with contextlib.redirect_stderr(told):
            return tyro.cli(
                kind,
                args=list(words),
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.AvoidSubcommands,),
                return_unknown_args=True,
                add_help=False,
            )
    except SystemExit:
        raise ValueError(_paragraph(told.getvalue()).removeprefix(f"--{kind.__name__}: ")) from None


def _paragraph(box: str) -> str:
    """The words of a box, without its frame and title, up to its first rule."""
    lines = [line.strip(" │|") for line in box.splitlines()]
    said: list[str] = []
    for line in lines[1:]:
        if re.fullmatch(r"[-─╭╮╰╯ ]*", line):
            if said:
                break
            continue
        said.append(line)
    text = " ".join(said) or " ".join(lines)
    return re.sub(r"^Error parsing (?:__tyro-dummy-inner__\.)?(?:--)?([\w.-]+): ", r"--\1: ", text)


def given(words: Sequence[str]) -> dict[str, list[str]]:
    """The flags among words, each with what stands behind it up to the next."""
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
            words += words_of(new, old, prefix=f"{name}.")
        elif isinstance(new, bool):
            words.append(f"--{name}" if new else f"--no-{name}")
        else:
            items: tuple[Any, ...] = new if isinstance(new, tuple) else (new,)
            words += [f"--{name}", *map(str, items)]
    return words


def parse_seeds(text: str) -> list[int]:
    """Seeds of a text such as 0-63 or 1,5,8-12.

    Raises:
        ValueError: if it is none, or names a seed twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            start, stop = int(first), int(last if dash else first)
        except ValueError:
            raise ValueError(f"--seeds {text}: write numbers and ranges, such as 0-63 or 0,1,2.") from None
        if stop < start:
            raise ValueError(f"--seeds {text}: the range {part.strip()} ends before it begins.")
        if stop >= 2**32:
            raise ValueError(f"--seeds {text}: a seed is a whole number from 0 to 2^32 - 1.")
        if stop - start + len(seeds) >= 1_000_000:
            raise ValueError(f"--seeds {text}: that is over a million images; draw them in several calls.")
        seeds.extend(range(start, stop + 1))
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {text}: name every seed once.")
    return seeds
