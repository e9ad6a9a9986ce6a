"""The table of verbs and flags, for help texts, checks of a command line and the site's page.

The table is in flags.json, so that reading it needs neither torch nor the parser. `python -m stablefield.cli.inventory`
writes it from the verbs' dataclasses, and a test checks that it is current.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["FILE", "Flag", "Group", "VerbFlags", "all_verbs", "record_of"]

FILE = Path(__file__).with_name("flags.json")


@dataclass(frozen=True)
class Flag:
    """A flag, or an argument without one.

    Attributes:
        name: with its dashes, such as --steps; in capitals, such as DATA, if it is an argument without a flag.
        takes: types of a value (int, float, text, path) or literal words.
        count: number of values: 0 for a switch, -1 for any number.
        help: help text.
        default: the default to show; may be empty.
        required: whether the verb needs it.
    """

    name: str
    takes: tuple[str, ...]
    count: int
    help: str
    default: str = ""
    required: bool = False


@dataclass(frozen=True)
class Group:
    """Flags that belong together, under a title."""

    title: str
    flags: tuple[Flag, ...]


@dataclass(frozen=True)
class VerbFlags:
    """A verb.

    Attributes:
        name: the verb on the command line, such as "data pack".
        summary: its purpose in a sentence.
        more: further paragraphs of help.
        arguments: its arguments without a flag, in order.
        groups: its flags; the first group has the most used ones.
    """

    name: str
    summary: str
    more: tuple[str, ...]
    arguments: tuple[Flag, ...]
    groups: tuple[Group, ...]

    def flags(self) -> dict[str, list[Flag]]:
        """The flags by name; a name may have several flags, since its meaning may depend on the recipe."""
        found: dict[str, list[Flag]] = {}
        for group in self.groups:
            for flag in group.flags:
                found.setdefault(flag.name, []).append(flag)
        return found


@cache
def all_verbs() -> dict[str, VerbFlags]:
    """All verbs by their name."""
    return {record["name"]: _verb(record) for record in json.loads(FILE.read_text("utf-8"))}


def record_of(verbs: Mapping[str, VerbFlags]) -> str:
    """The table as the text of flags.json."""
    return json.dumps([dataclasses.asdict(verb) for verb in verbs.values()], indent=1) + "\n"


def _verb(record: Mapping[str, Any]) -> VerbFlags:
    return VerbFlags(
        record["name"],
        record["summary"],
        tuple(record["more"]),
        tuple(_flag(argument) for argument in record["arguments"]),
        tuple(Group(group["title"], tuple(map(_flag, group["flags"]))) for group in record["groups"]),
    )


def _flag(record: Mapping[str, Any]) -> Flag:
    fields: dict[str, Any] = {**record, "takes": tuple(record["takes"])}
    return Flag(**fields)
