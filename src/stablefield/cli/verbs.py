"""The table of verbs, and the parser of a command line into a verb with its flags."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from stablefield.cli.bench import Bench
from stablefield.cli.compare import Compare
from stablefield.cli.data import Encode, Inspect, Pack
from stablefield.cli.doctor import Doctor
from stablefield.cli.ema import Ema
from stablefield.cli.evaluate import Evaluate
from stablefield.cli.export import Export
from stablefield.cli.importing import Import
from stablefield.cli.parser import read
from stablefield.cli.probe import Probe
from stablefield.cli.recipe_flags import RecipeFlags, TrainingFlags
from stablefield.cli.report import Report
from stablefield.cli.sample import Sample
from stablefield.cli.train import Train
from stablefield.training._recipe import Recipe

__all__ = ["VERBS", "Verb", "parse"]

VERBS: dict[str, type] = {
    "train": Train,
    "compare": Compare,
    "sample": Sample,
    "ema": Ema,
    "report": Report,
    "evaluate": Evaluate,
    "probe": Probe,
    "bench": Bench,
    "data pack": Pack,
    "data encode": Encode,
    "data inspect": Inspect,
    "export": Export,
    "import": Import,
    "doctor": Doctor,
}
"""The verbs by name. Add a new one here."""


class Verb(Protocol):
    """A verb with its flags filled in."""

    def run(self) -> int:
        """Run the verb, and return the exit status."""
        ...


def parse(arguments: Sequence[str]) -> Verb:
    """Parse a command line that `mistakes.checked` has accepted.

    Raises:
        ValueError: if a value does not fit.
    """
    name = next(name for name in VERBS if list(arguments[: len(name.split())]) == name.split())
    kind, words = VERBS[name], arguments[len(name.split()) :]
    changes: list[str] = []
    if issubclass(kind, TrainingFlags):
        words, changes = _apart(words)
    verb: Any
    verb, unknown = read(kind, words)
    if unknown:
        raise ValueError(f"{' '.join(unknown)} cannot be used here: stablefield {name} --help lists the flags.")
    return dataclasses.replace(verb, config=RecipeFlags(tuple(changes))) if changes else verb


def _apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the words into those of the verb's own flags and those of the recipe's flags."""
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(Recipe)}
    own: list[str] = []
    changes: list[str] = []
    words_of = own
    for word in words:
        if word.startswith("--"):
            name = word.removeprefix("--").removeprefix("no-").partition("=")[0].partition(".")[0]
            words_of = changes if name.replace("_", "-") in fields else own
        words_of.append(word)
    return own, changes
