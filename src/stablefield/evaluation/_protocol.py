"""Scores with their protocol: a number never without what must be known before it is compared with another.

Two numbers are comparable if they were measured alike: same metric, extractor, resize rule, sample count, reference
set. How the samples were made (sampler, steps, NFE, EMA, commit, seeds) may well be what a comparison is about, but it
must be seen. `differences` therefore lists both kinds, and tells them apart.

The literature often measures three times with fresh seeds and reports the least value; that is lower than the expected
one, by an amount that grows with the spread. A `Score` holds every repeat, so that minimum, mean and spread can all be
printed.
"""

import dataclasses
import importlib.metadata
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import stablefield

__all__ = [
    "REFERENCE_FIELDS", "DamagedCacheWarning", "Difference", "Protocol", "ProtocolWarning", "Score", "ScoreComparison",
    "differences", "running_commit",
]  # fmt: skip

Setting = str | int | float

_MADE = ("seeds", "sampler", "steps", "nfe", "ema", "commit")
REFERENCE_FIELDS = (
    "extractor", "extractor_sha256", "resize", "reference", "reference_sha256", "reference_count", "split",
)  # fmt: skip


class ProtocolWarning(UserWarning):
    """Kept features of real images come from a slightly different protocol."""


class DamagedCacheWarning(UserWarning):
    """A file of kept features cannot be used and is made anew."""


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
            _check_type(field.name, getattr(self, field.name))
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

    def to_json(self) -> str:
        """The record as one line of JSON."""
        return json.dumps(self.to_dict(), allow_nan=False)

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

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: if the text is no JSON object, or the record is not valid.
        """
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError(f"protocol record is {text[:40]!r}, not a JSON object.")
        return cls.from_dict(record)

    def of_reference(self) -> Self:
        """The part that reference statistics depend on: no samples, no metric, no settings."""
        kept = {name: getattr(self, name) for name in REFERENCE_FIELDS}
        return type(self)(metric="reference statistics", sample_count=self.reference_count, commit=self.commit, **kept)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One field in which two protocols differ."""

    field: str
    """Name of the field; settings are "settings.NAME"."""
    first: Any
    """Its value in the first protocol, None where it has none."""
    second: Any
    """Its value in the second."""

    @property
    def comparable(self) -> bool:
        """Whether numbers that differ in this field were still measured alike."""
        return self.field in _MADE

    def __str__(self) -> str:
        return f"{self.field}: {self.first!r} against {self.second!r}"


def differences(a: Protocol, b: Protocol) -> tuple[Difference, ...]:
    """All fields in which two protocols differ, those that forbid a comparison first."""
    first, second = _flat(a), _flat(b)
    found = [
        Difference(field=name, first=first.get(name), second=second.get(name))
        for name in {**first, **second}
        if first.get(name) != second.get(name)
    ]
    return tuple(sorted(found, key=lambda difference: difference.comparable))


def _flat(protocol: Protocol) -> dict[str, Any]:
    flat = {field.name: getattr(protocol, field.name) for field in dataclasses.fields(protocol)}
    return flat | {f"settings.{name}": value for name, value in flat.pop("settings").items()}


def _check_type(name: str, value: object) -> None:
    if name == "settings":
        good = isinstance(value, Mapping) and all(
            isinstance(key, str) and isinstance(item, str | int | float) for key, item in value.items()
        )
    elif name == "seeds":
        good = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    elif name in ("sample_count", "reference_count", "steps"):
        good = (isinstance(value, int) and not isinstance(value, bool)) or (name == "steps" and value is None)
    elif name == "nfe":
        good = value is None or (
            isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        )
    else:
        good = isinstance(value, str) or (value is None and name in ("sampler", "ema", "commit"))
    if not good:
        raise ValueError(f"protocol field {name} is {value!r}: it has the wrong type (seeds: a tuple of strings).")


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
    def differences(self) -> tuple[Difference, ...]:
        """Fields in which their protocols differ."""
        return differences(self.first.protocol, self.second.protocol)

    @property
    def comparable(self) -> bool:
        """Whether both were measured alike."""
        return all(difference.comparable for difference in self.differences)

    @property
    def warning(self) -> str:
        """In what their protocols differ; empty where they do not."""
        found = self.differences
        if not found:
            return ""
        parts = ["two results with different protocols are compared."]
        if measured := "; ".join(str(one) for one in found if not one.comparable):
            parts.append(f"They were measured differently, so their difference means nothing: {measured}.")
        if made := "; ".join(str(one) for one in found if one.comparable):
            parts.append(f"Their samples were made differently: {made}.")
        return " ".join(parts)


def running_commit() -> str:
    """The commit, with "-dirty" if files under the package were changed since; else "version NUMBER"."""
    package = Path(stablefield.__file__).resolve().parent
    # Only a checkout whose tracked files these are: the package may lie inside somebody else's repository.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None:
        head = _git(package, "rev-parse", "HEAD")
        if head:
            return head + ("-dirty" if _git(package, "status", "--porcelain", "--", ".") else "")
    return _installed_commit() or f"version {stablefield.__version__}"


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says, or None if it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _installed_commit() -> str | None:
    """The commit that pip notes for a package installed from a repository."""
    try:
        text = importlib.metadata.distribution("stablefield").read_text("direct_url.json")
        return str(json.loads(text)["vcs_info"]["commit_id"]) if text else None
    except (importlib.metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        return None
