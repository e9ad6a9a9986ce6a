"""Results: a number never without its protocol.

The literature often measures three times with fresh seeds and reports the least value; that is lower than the expected
one, by an amount that grows with the spread. A `Result` holds every repeat, so that minimum, mean and spread can all be
printed.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Self

from stablefield.evaluation.protocol import Difference, Protocol, ProtocolWarning, differences

__all__ = ["Comparison", "Result", "compare", "compare_all"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One metric's values, one per repeat, and their protocol.

    Raises:
        ValueError: if there are no values, one is not finite, or there is not one range of seeds per value.
    """

    values: tuple[float, ...]
    """One value per repeat, each on `protocol.sample_count` samples."""
    protocol: Protocol
    """How they were measured."""
    standard_error: float | None = None
    """Standard error of one value, where the metric gives one."""

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("values is empty: a result has at least one.")
        for value in self.values:
            if not math.isfinite(value):
                raise ValueError(f"values holds {value}: a result is finite; look for what made it otherwise.")
        seeds = self.protocol.seeds
        if seeds and len(seeds) != len(self.values):
            raise ValueError(f"{len(self.values)} values, but {len(seeds)} ranges of seeds: pass one range per repeat.")

    @property
    def minimum(self) -> float:
        """The least value: what is often reported of three."""
        return min(self.values)

    @property
    def mean(self) -> float:
        """The mean of the values."""
        return fmean(self.values)

    @property
    def spread(self) -> float:
        """Greatest minus least value; 0 for one repeat."""
        return max(self.values) - min(self.values)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain objects, with its summary, for JSON."""
        return {
            "values": list(self.values),
            "minimum": self.minimum,
            "mean": self.mean,
            "spread": self.spread,
            "standard_error": self.standard_error,
            "protocol": self.protocol.to_dict(),
        }

    def to_json(self) -> str:
        """The result as one line of JSON."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; the summary is computed anew.

        Raises:
            ValueError: if values or protocol are missing or not valid.
        """
        values, protocol, error = record.get("values"), record.get("protocol"), record.get("standard_error")
        if not isinstance(values, list) or not isinstance(protocol, dict):
            raise ValueError(f"result record with fields {sorted(record)}: it must hold values and a protocol.")
        return cls(
            values=tuple(float(value) for value in values),
            protocol=Protocol.from_dict(protocol),
            standard_error=None if error is None else float(error),
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: if the text is no JSON object, or the record is not valid.
        """
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError(f"result record is {text[:40]!r}, not a JSON object.")
        return cls.from_dict(record)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two results side by side."""

    difference: float
    """Mean of the first minus mean of the second."""
    differences: tuple[Difference, ...]
    """Fields in which their protocols differ."""

    @property
    def comparable(self) -> bool:
        """Whether both were measured alike."""
        return all(difference.comparable for difference in self.differences)


def compare(a: Result, b: Result) -> Comparison:
    """Compare two results.

    Warns:
        ProtocolWarning: if their protocols differ in anything, with the list of differences.
    """
    found = differences(a.protocol, b.protocol)
    forbidding = [str(difference) for difference in found if not difference.comparable]
    telling = [str(difference) for difference in found if difference.comparable]
    if found:
        parts = ["two results with different protocols are compared."]
        if forbidding:
            parts.append(f"They were measured differently, so their difference means nothing: {'; '.join(forbidding)}.")
        if telling:
            parts.append(f"Their samples were made differently: {'; '.join(telling)}.")
        warnings.warn(" ".join(parts), ProtocolWarning, stacklevel=2)
    return Comparison(difference=a.mean - b.mean, differences=found)


def compare_all(
    results: Sequence[Result], earlier: Sequence[Result]
) -> tuple[list[tuple[Result, Result, Comparison]], list[str]]:
    """Compare results with those of the same metrics among `earlier`.

    Returns:
        Each result that has one with its counterpart and their comparison; and what `compare` warns of, each once.
    """
    others = {result.protocol.metric: result for result in earlier}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ProtocolWarning)
        found = [
            (result, others[result.protocol.metric], compare(result, others[result.protocol.metric]))
            for result in results
            if result.protocol.metric in others
        ]
    return found, list(dict.fromkeys(str(warning.message) for warning in caught))
