"""Scores with their protocol: a number never without what must be known before it is compared with another.

Two numbers are comparable if they were measured alike: same metric, extractor, resize rule, sample count, reference
set. How the samples were made (sampler, steps, NFE, EMA, commit, seeds) may well be what a comparison is about, but it
must be seen. `differences` therefore lists both kinds, and tells them apart.

The literature often measures three times with fresh seeds and reports the least value; that is lower than the expected
one, by an amount that grows with the spread. A `Score` holds every repeat, so that minimum, mean and spread can all be
printed.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Self

__all__ = ["MADE", "Protocol", "Score", "ScoreComparison", "differences"]

Setting = str | int | float

MADE = ("seeds", "sampler", "steps", "nfe", "ema", "commit")
"""Fields of how samples were made: numbers that differ in these alone were measured alike."""
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
    """How one number was measured, and on what.

    Raises:
        ValueError: if a field has the wrong type, a count is below 1, or `extractor_sha256` is no sha256.
    """

    metric: str
    """What the number is called, such as FID."""
    settings: Mapping[str, Setting] = dataclasses.field(default_factory=dict[str, Setting])
    """Arguments of the metric: k, subsets, splits."""
    extractor: str
    """Name of the extractor."""
    extractor_sha256: str
    """Hash of its weights."""
    resize: str
    """Its resize rule."""
    sample_count: int
    """Number of samples measured."""
    reference: str
    """Name of the reference set, such as CIFAR-10."""
    reference_sha256: str
    """Hash of the reference set's manifest."""
    reference_count: int
    """Number of reference images."""
    split: str
    """Which part of the reference set: train or test."""
    seeds: tuple[str, ...] = ()
    """Seeds of the samples, one range per repeat, such as ("0-49999", "50000-99999"); empty for a folder of images."""
    sampler: str | None = None
    """Name of the sampler; None for images that were not sampled here, as for the fields below."""
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
                raise ValueError(f"{name} is {getattr(self, name)}: a number is measured on at least 1 image.")
        if not re.fullmatch("[0-9a-f]{64}", self.extractor_sha256):
            raise ValueError(f"extractor_sha256 is {self.extractor_sha256!r}: pass 64 hexadecimal digits.")
        # A copy in one order, so that nobody changes it afterwards and equal records give equal JSON.
        object.__setattr__(self, "settings", dict(sorted(self.settings.items())))

    def to_dict(self) -> dict[str, Any]:
        """The record as plain objects, for JSON."""
        return dataclasses.asdict(self) | {"seeds": list(self.seeds)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: if a field is missing, unknown or of the wrong type.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(record) - known):
            raise ValueError(
                f"protocol record with unknown fields {unknown}: it is from another version of stablefield."
            )
        values = dict(record)
        if isinstance(values.get("seeds"), list):
            values["seeds"] = tuple(values["seeds"])
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"protocol record is incomplete: {error}; measure again.") from error


def differences(a: Protocol, b: Protocol) -> dict[str, tuple[Any, Any]]:
    """All fields in which two protocols differ, with both values, None for one that is not there.

    Settings are named "settings.NAME". Fields that forbid a comparison come first, those of how samples were made last.
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
        ValueError: if there are no values, one is not finite, or there is not one range of seeds per value.
    """

    values: tuple[float, ...]
    """One value per repeat, each on `protocol.sample_count` samples."""
    protocol: Protocol
    """How they were measured."""
    standard_error: float | None = None
    """Standard error of one value, where the metric gives one."""
    better: str = ""
    """Which direction is better, in words; empty where neither is, or where it is not known."""

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("values is empty: a score has at least one.")
        for value in self.values:
            if not math.isfinite(value):
                raise ValueError(f"values holds {value}: a score is finite; look for what made it otherwise.")
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
        """The inverse of `to_dict`; the summary is computed anew.

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
            better=str(record.get("better", "")),  # older files do not say it
        )


@dataclass(frozen=True, kw_only=True)
class ScoreComparison:
    """Two scores side by side."""

    first: Score
    """The one."""
    second: Score
    """The other."""

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
        """Whether both were measured alike."""
        return all(name in MADE for name in self.differences)

    @property
    def warning(self) -> str:
        """In what their protocols differ; empty where they do not."""
        found = {name: f"{name}: {a!r} against {b!r}" for name, (a, b) in self.differences.items()}
        if not found:
            return ""
        parts = ["two results with different protocols are compared."]
        if measured := "; ".join(text for name, text in found.items() if name not in MADE):
            parts.append(f"They were measured differently, so their difference means nothing: {measured}.")
        if made := "; ".join(text for name, text in found.items() if name in MADE):
            parts.append(f"Their samples were made differently: {made}.")
        return " ".join(parts)
