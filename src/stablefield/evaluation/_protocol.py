"""Scores with their protocol: every number carries the settings that a comparison needs.

Two numbers are comparable under the same measurement: metric, extractor, resize rule, sample count, reference set. The
sampling (sampler, steps, NFE, EMA, commit, seeds) may be the point of a comparison, but readers must see it. So
`differences` lists both kinds, separately.

Papers often measure three times with fresh seeds and report the lowest value; that is below the expected value, by an
amount that grows with the spread. A `Score` holds every repeat, so that it can print minimum, mean and spread.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Self

__all__ = ["MADE", "Protocol", "Score", "ScoreComparison", "differences", "score_of"]

Setting = str | int | float

MADE = ("seeds", "sampler", "steps", "nfe", "ema", "commit")
"""Fields of the sampling: numbers that differ only in these have the same measurement."""
_KINDS = {
    "settings": Mapping,
    "seeds": tuple,
    "sample_count": int,
    "reference_count": int,
    "steps": int | None,
    "nfe": int | float | None,
    "sampler": str | None,
    "ema": str | None,
    "commit": str | None,
}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The settings of one measurement.

    Raises:
        ValueError: if a field has the wrong type, a count is below 1, or `extractor_sha256` is not a sha256.
    """

    metric: str
    """Name of the number, such as FID."""
    settings: Mapping[str, Setting] = dataclasses.field(default_factory=dict[str, Setting])
    """Arguments of the metric: k, subsets, splits."""
    extractor: str
    """Name of the extractor."""
    extractor_sha256: str
    """Hash of its weights."""
    resize: str
    """Its resize rule."""
    sample_count: int
    """Number of samples."""
    reference: str
    """Name of the reference set, such as CIFAR-10."""
    reference_sha256: str
    """Hash of the reference set's manifest."""
    reference_count: int
    """Number of reference images."""
    split: str
    """Split of the reference set: train or test."""
    seeds: tuple[str, ...] = ()
    """Seeds of the samples, one range per repeat, such as ("0-49999", "50000-99999"); empty for a folder of images."""
    sampler: str | None = None
    """Name of the sampler; None for images from elsewhere, as for the fields below."""
    steps: int | None = None
    """Steps of the sampler."""
    nfe: float | None = None
    """Network evaluations per sample; the mean for adaptive samplers."""
    ema: str | None = None
    """Which average of the weights."""
    commit: str | None = None
    """Commit of the code that made the samples."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _fits(field.name, value):
                raise ValueError(
                    f"protocol field {field.name} is {value!r}: it has the wrong type (seeds: a tuple of strings)."
                )
        for name in ("sample_count", "reference_count"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: pass at least 1, since a number needs images.")
        if not re.fullmatch("[0-9a-f]{64}", self.extractor_sha256):
            raise ValueError(f"extractor_sha256 is {self.extractor_sha256!r}: pass 64 hexadecimal digits.")
        # A sorted copy: no caller can change it later, and equal records give equal JSON.
        object.__setattr__(self, "settings", dict(sorted(self.settings.items())))

    def to_dict(self) -> dict[str, Any]:
        """The record as plain objects, for JSON."""
        return dataclasses.asdict(self) | {"seeds": list(self.seeds)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: if a field is missing, unknown or has the wrong type.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(record) - known):
            raise ValueError(
                f"protocol record with unknown fields {unknown}: it comes from another version of stablefield."
            )
        values = dict(record)
        if isinstance(values.get("seeds"), list):
            values["seeds"] = tuple(values["seeds"])
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"protocol record is incomplete: {error}; measure again.") from error


def differences(a: Protocol, b: Protocol) -> dict[str, tuple[Any, Any]]:
    """All fields in which two protocols differ, with both values, None for a missing one.

    Settings have names "settings.NAME". Fields that forbid a comparison come first, those of the sampling last.
    """
    first, second = _flat(a), _flat(b)
    pairs = {name: (first.get(name), second.get(name)) for name in {**first, **second}}
    return {name: pairs[name] for name in sorted(pairs, key=MADE.__contains__) if pairs[name][0] != pairs[name][1]}


def _flat(protocol: Protocol) -> dict[str, Any]:
    flat = {field.name: getattr(protocol, field.name) for field in dataclasses.fields(protocol)}
    return flat | {f"settings.{name}": value for name, value in flat.pop("settings").items()}


def _fits(name: str, value: object) -> bool:
    """Whether a field may have this value."""
    if isinstance(value, bool) or not isinstance(value, _KINDS.get(name, str)):
        return False
    if isinstance(value, tuple):
        return all(isinstance(item, str) for item in value)
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and isinstance(item, Setting) for key, item in value.items())
    return not isinstance(value, int | float) or abs(value) <= sys.float_info.max


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric's values, one per repeat, and their protocol.

    Raises:
        ValueError: if there are no values, one is not finite, or the number of seed ranges differs from that of values.
    """

    values: tuple[float, ...]
    """One value per repeat, each on `protocol.sample_count` samples."""
    protocol: Protocol
    """Protocol of the values."""
    standard_error: float | None = None
    """Standard error of one value, if the metric gives one."""
    better: str = ""
    """Which direction is better, in words; empty if neither or unknown."""

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("values is empty: pass at least one.")
        for value in self.values:
            if not math.isfinite(value):
                raise ValueError(
                    f"values holds {value}: pass finite values, and check the measurement that gave this one."
                )
        seeds = self.protocol.seeds
        if seeds and len(seeds) != len(self.values):
            raise ValueError(f"{len(self.values)} values, but {len(seeds)} ranges of seeds: pass one range per repeat.")

    @property
    def minimum(self) -> float:
        """The lowest value, which papers often report out of three."""
        return min(self.values)

    @property
    def mean(self) -> float:
        """The mean of the values."""
        return fmean(self.values)

    @property
    def spread(self) -> float:
        """Highest minus lowest value; 0 for one repeat."""
        return max(self.values) - min(self.values)

    def to_dict(self) -> dict[str, Any]:
        """The score as plain objects, with its summary, for JSON."""
        return {
            "values": list(self.values),
            "minimum": self.minimum,
            "mean": self.mean,
            "spread": self.spread,
            "standard_error": self.standard_error,
            "better": self.better,
            "protocol": self.protocol.to_dict(),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; computes the summary again.

        Raises:
            ValueError: if values or protocol are missing or not valid.
        """
        values, protocol, error = record.get("values"), record.get("protocol"), record.get("standard_error")
        if not isinstance(values, list) or not isinstance(protocol, dict):
            raise ValueError(f"score record with fields {sorted(record)}: it must hold values and a protocol.")
        return cls(
            values=tuple(float(value) for value in values),
            protocol=Protocol.from_dict(protocol),
            standard_error=None if error is None else float(error),
            better=str(record.get("better", "")),  # older files lack it
        )


@dataclass(frozen=True, kw_only=True)
class ScoreComparison:
    """Two scores side by side."""

    first: Score
    """The first score."""
    second: Score
    """The second score."""

    @property
    def difference(self) -> float:
        """Mean of the first minus mean of the second."""
        return self.first.mean - self.second.mean

    @property
    def differences(self) -> dict[str, tuple[Any, Any]]:
        """Fields in which their protocols differ, see `differences`."""
        return differences(self.first.protocol, self.second.protocol)

    @property
    def comparable(self) -> bool:
        """Whether both have the same measurement."""
        return all(name in MADE for name in self.differences)

    @property
    def warning(self) -> str:
        """The differences of their protocols, in words; empty if none."""
        found = {name: f"{name}: {a!r} against {b!r}" for name, (a, b) in self.differences.items()}
        if not found:
            return ""
        parts = ["two results with different protocols are compared."]
        if measured := "; ".join(text for name, text in found.items() if name not in MADE):
            parts.append(f"They were measured differently, so their difference means nothing: {measured}.")
        if made := "; ".join(text for name, text in found.items() if name in MADE):
            parts.append(f"Their samples were made differently: {made}.")
        return " ".join(parts)


def score_of(scores: Sequence[Score], metric: str, of: str) -> Score:
    """The score of a metric, such as "FID".

    Raises:
        KeyError: if there is none; says what has none, `of`, and lists the others.
    """
    found = {score.protocol.metric: score for score in scores}
    if metric not in found:
        raise KeyError(f"{of} has no score {metric!r}; it has {', '.join(found) or 'none'}.")
    return found[metric]
