"""Initial weights: where those of a run were copied from, what was copied, and what was not."""

import textwrap
from dataclasses import asdict, dataclass
from typing import Any

from stablefield.training._records import from_record

__all__ = ["InitialWeights"]

_WIDTH = 80
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """How the weights of a run that began with those of another network are made up; `print` shows the table.

    Attributes:
        source: where the weights are from, as the caller gave it.
        weights: which weights of the source these are, in words, such as "step 4,000, average half-life".
        sha256: checksum of the file with the weights.
        copied: number of tensors that were copied, entirely or in part.
        tensors: number of tensors of the network.
        classes: classes whose part of the class embedding was copied, by name, or by number if the source or the data
            have no names.
        new_classes: classes that the source does not have, which begin as in a new network.
        dropped_classes: classes of the source that the data do not have.
        fresh: tensors that the source does not have, which begin as in a new network.
        unused: tensors of the source that the network does not have.
        notes: what else to know, a sentence each.
    """

    source: str
    weights: str
    sha256: str
    copied: int
    tensors: int
    classes: tuple[str, ...] = ()
    new_classes: tuple[str, ...] = ()
    dropped_classes: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def rows(self) -> list[tuple[str, str]]:
        """The table."""
        lists = (
            ("classes", self.classes, "copied"),
            ("", self.new_classes, "new"),
            ("", self.dropped_classes, "dropped"),
            ("not copied", self.fresh, "as in a new network"),
            ("not used", self.unused, "only in the source"),
        )
        rows = [
            ("weights of", f"{self.source} ({self.weights})"),
            ("copied", f"{self.copied:,} of {self.tensors:,} tensors"),
        ]
        rows += [(name, f"{len(items):,} {what}: {_listed(items)}") for name, items, what in lists if items]
        return [*rows, *(("note", note) for note in self.notes)]

    def __str__(self) -> str:
        lines: list[str] = []
        for name, text in self.rows():
            lines += textwrap.wrap(text, _WIDTH, initial_indent=f"{name:12}", subsequent_indent=" " * 12)
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """The attributes as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def of(cls, record: Any) -> "InitialWeights":
        """The object that `record` came from.

        Raises:
            ValueError: if an entry is missing or has the wrong type.
        """
        try:
            return from_record(cls, record)
        except ValueError as error:
            raise ValueError(f"its initial weights are not described as this version does it: {error}") from error


def _listed(items: tuple[str, ...]) -> str:
    more = f" and {len(items) - _SHOWN:,} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
