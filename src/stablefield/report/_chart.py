"""Charts as data, independent of how they are drawn.

A `LineChart` has lines with error bands over marked regions. Constructors raise ValueError for values that do not fit, so
`_drawing` can draw any chart.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Chart", "Line", "LineChart", "Region"]

MOST_SERIES = 6
"""The largest number that readers can distinguish by colour, dash and marker."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line through points, and a band around it. The fields become tuples of floats."""

    label: str
    x: ArrayLike
    y: ArrayLike
    """Same length as x; nan leaves a gap."""
    low: ArrayLike | None = None
    """Lower edge of the band, as long as y."""
    high: ArrayLike | None = None
    """Upper edge of the band."""
    reference: bool = False
    """Whether this is a reference (a law, a bound): drawn thin and grey, and not counted as a series."""

    def __post_init__(self) -> None:
        _labelled("Line", self.label)
        if (self.low is None) != (self.high is None):
            raise ValueError(f"Line {self.label!r} has one edge of a band: pass low and high, or neither.")
        given = {name: getattr(self, name) for name in ("x", "y", "low", "high")}
        found = {name: _numbers(name, self.label, values) for name, values in given.items() if values is not None}
        if len({len(values) for values in found.values()}) > 1:
            lengths = ", ".join(f"{name} {len(values)}" for name, values in found.items())
            raise ValueError(f"{self.label!r} has fields of different lengths ({lengths}): pass one value per point.")
        if any(math.isnan(value) for value in found["x"]) or any(b <= a for a, b in pairwise(found["x"])):
            raise ValueError(f"x of Line {self.label!r} does not increase: sort the points, and put nan only in y.")
        if all(math.isnan(value) for value in found["y"]):
            raise ValueError(f"y of Line {self.label!r} has no numbers: leave the line out.")
        if "low" in found and any(a > b for a, b in zip(found["low"], found["high"], strict=True)):
            raise ValueError(f"low of Line {self.label!r} is above high: swap them.")
        for name, values in found.items():
            object.__setattr__(self, name, values)


@dataclass(frozen=True, kw_only=True)
class Region:
    """A stretch of the x axis with a name: a phase, a noise band."""

    label: str
    start: float | None = None
    """None: from the left end."""
    stop: float | None = None
    """None: to the right end."""

    def __post_init__(self) -> None:
        _labelled("Region", self.label)
        if self.start is not None and self.stop is not None and not self.start < self.stop:
            raise ValueError(f"Region {self.label!r} is from {self.start} to {self.stop}: start must be below stop.")


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """Lines over one x axis, and regions of it."""

    lines: tuple[Line, ...]
    """At most six besides reference lines. Their order determines colour, dash and marker."""
    x_label: str
    y_label: str
    log_x: bool = False
    log_y: bool = False
    """On a logarithmic axis a band may reach zero or below; it is drawn to the axis."""
    regions: tuple[Region, ...] = ()
    y_min: float | None = None
    """Lower end of the y axis; by default just below the lines."""
    y_max: float | None = None
    title: str = ""
    """Above the chart in its own file; on a page the figure has a title."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "lines", tuple(self.lines))
        object.__setattr__(self, "regions", tuple(self.regions))
        series = [line for line in self.lines if not line.reference]
        if not self.lines or len(series) > MOST_SERIES:
            raise ValueError(
                f"lines of a LineChart are {len(series)} (and {len(self.lines) - len(series)} for reference): "
                f"draw 1 to {MOST_SERIES}; readers cannot distinguish more."
            )
        if not (self.x_label.strip() and self.y_label.strip()):
            raise ValueError(
                f"labels of axes are {(self.x_label, self.y_label)}: name the quantity of each, and its unit."
            )
        for line in self.lines:
            for name, wanted, values in (("x", self.log_x, line.x), ("y", self.log_y, line.y)):
                least = np.nanmin(np.asarray(values, dtype=float))
                if wanted and least <= 0:
                    raise ValueError(
                        f"{name} of Line {line.label!r} holds {least}, and log_{name} is set: replace it by nan, or use "
                        f"log_{name}=False."
                    )
        for region in self.regions:
            for edge in (region.start, region.stop):
                if edge is not None and (not math.isfinite(edge) or (self.log_x and edge <= 0)):
                    raise ValueError(
                        f"Region {region.label!r} has an edge at {edge}, which is not on this x axis: "
                        "pass None for an open end."
                    )
        for name, limit in (("y_min", self.y_min), ("y_max", self.y_max)):
            if limit is not None and (not math.isfinite(limit) or (self.log_y and limit <= 0)):
                raise ValueError(
                    f"{name}={limit}, which is not on this y axis: pass a finite number, positive if log_y."
                )
        if self.y_min is not None and self.y_max is not None and not self.y_min < self.y_max:
            raise ValueError(f"y_min={self.y_min} and y_max={self.y_max}: y_min must be below y_max.")


Chart = LineChart
"""Any chart."""


def _labelled(owner: str, label: str) -> None:
    if not label.strip():
        raise ValueError(f"label={label!r} of a {owner} is empty: name it.")


def _numbers(name: str, label: str, values: ArrayLike) -> tuple[float, ...]:
    try:
        array = np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} of {label!r} is not a sequence of numbers: {error}.") from error
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} of {label!r} has shape {array.shape}: pass a sequence of numbers, at least one.")
    if np.isinf(array).any():
        raise ValueError(f"{name} of {label!r} holds an infinite value: use nan for gaps.")
    return tuple(array.tolist())
