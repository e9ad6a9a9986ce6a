"""Charts as data: what is drawn, not how.

A `LineChart` has lines with bands of error over marked regions, a `BarChart` has groups of horizontal bars with error
bars. Everything is checked here, so that `drawing` can draw whatever it is given.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["BarChart", "Bars", "Chart", "Line", "LineChart", "Region"]

MOST_SERIES = 6
"""As many as stay apart in colour, dash and marker."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line through points, and a band around it. The fields become tuples of floats.

    Raises:
        ValueError: if the label is empty, lengths differ, x is not finite and increasing, y has no finite value, a value
            is infinite, or only one edge of the band is given or the edges are crossed.
    """

    label: str
    x: ArrayLike
    y: ArrayLike
    """Same length as x; nan leaves a gap."""
    low: ArrayLike | None = None
    """Lower edge of the band, as long as y."""
    high: ArrayLike | None = None
    """Upper edge of the band."""
    reference: bool = False
    """Whether this is something to compare with (a law, a bound): drawn thin and grey, and not counted as a series."""

    def __post_init__(self) -> None:
        _labelled("Line", self.label)
        x = _numbers("x", self.label, self.x)
        y = _numbers("y", self.label, self.y)
        _same_length(self.label, x=x, y=y)
        if any(math.isnan(value) for value in x) or any(b <= a for a, b in pairwise(x)):
            raise ValueError(f"x of Line {self.label!r} does not increase: sort the points, and leave nan to y.")
        if all(math.isnan(value) for value in y):
            raise ValueError(f"y of Line {self.label!r} has no number at all: leave the line out.")
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "y", y)
        if (self.low is None) != (self.high is None):
            raise ValueError(f"Line {self.label!r} has one edge of a band: pass low and high, or neither.")
        if self.low is not None and self.high is not None:
            low, high = _numbers("low", self.label, self.low), _numbers("high", self.label, self.high)
            _same_length(self.label, x=x, low=low, high=high)
            if any(a > b for a, b in zip(low, high, strict=True)):
                raise ValueError(f"low of Line {self.label!r} lies above high: exchange them.")
            object.__setattr__(self, "low", low)
            object.__setattr__(self, "high", high)


@dataclass(frozen=True, kw_only=True)
class Region:
    """A stretch of the x axis with a name: a phase, a noise band.

    Raises:
        ValueError: if the label is empty, or `start` is not below `stop`.
    """

    label: str
    start: float | None = None
    """None: from the left end."""
    stop: float | None = None
    """None: to the right end."""

    def __post_init__(self) -> None:
        _labelled("Region", self.label)
        if self.start is not None and self.stop is not None and not self.start < self.stop:
            raise ValueError(f"Region {self.label!r} is from {self.start} to {self.stop}: start must lie below stop.")


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """Lines over one x axis, and regions of it.

    Raises:
        ValueError: if there are no lines or too many, a label of an axis is empty, a logarithmic axis meets a value that
            is not positive, or a limit is out of order.
    """

    lines: tuple[Line, ...]
    """At most six besides reference lines. Their order gives colour, dash and marker."""
    x_label: str
    y_label: str
    log_x: bool = False
    log_y: bool = False
    """On a logarithmic axis a band may reach zero or below; it is drawn to the axis."""
    regions: tuple[Region, ...] = ()
    y_min: float | None = None
    """Lower end of the y axis; by default just below what is drawn."""
    y_max: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "lines", tuple(self.lines))
        object.__setattr__(self, "regions", tuple(self.regions))
        series = [line for line in self.lines if not line.reference]
        if not self.lines or len(series) > MOST_SERIES:
            raise ValueError(
                f"lines of a LineChart are {len(series)} (and {len(self.lines) - len(series)} for reference): "
                f"draw 1 to {MOST_SERIES}, more cannot be told apart."
            )
        _axes_labelled(self.x_label, self.y_label)
        for line in self.lines:
            for name, wanted, values in (("x", self.log_x, line.x), ("y", self.log_y, line.y)):
                least = np.nanmin(np.asarray(values, dtype=float))
                if wanted and least <= 0:
                    raise ValueError(
                        f"{name} of Line {line.label!r} holds {least}, and log_{name} is set: put nan where a "
                        f"logarithmic axis shows nothing, or use log_{name}=False."
                    )
        for region in self.regions:
            for edge in (region.start, region.stop):
                if edge is not None and (not math.isfinite(edge) or (self.log_x and edge <= 0)):
                    raise ValueError(
                        f"Region {region.label!r} has an edge at {edge}, which this x axis does not have: "
                        "pass None for an open end."
                    )
        for name, limit in (("y_min", self.y_min), ("y_max", self.y_max)):
            if limit is not None and (not math.isfinite(limit) or (self.log_y and limit <= 0)):
                raise ValueError(
                    f"{name}={limit}, which this y axis does not have: pass a finite number, positive if log_y."
                )
        if self.y_min is not None and self.y_max is not None and not self.y_min < self.y_max:
            raise ValueError(f"y_min={self.y_min} and y_max={self.y_max}: y_min must lie below y_max.")


@dataclass(frozen=True, kw_only=True)
class Bars:
    """One series of bars, a bar for each of the chart's categories. The fields become tuples of floats.

    Raises:
        ValueError: if the label is empty, lengths differ, a value is infinite, or a value does not lie within its error bar.
    """

    label: str
    values: ArrayLike
    """nan where there is none."""
    low: ArrayLike | None = None
    """Lower end of each error bar."""
    high: ArrayLike | None = None
    points: tuple[ArrayLike, ...] | None = None
    """For each bar the single measurements behind it (one per seed), drawn as dots."""

    def __post_init__(self) -> None:
        _labelled("Bars", self.label)
        values = _numbers("values", self.label, self.values)
        object.__setattr__(self, "values", values)
        if (self.low is None) != (self.high is None):
            raise ValueError(f"Bars {self.label!r} have one end of error bars: pass low and high, or neither.")
        if self.low is not None and self.high is not None:
            low, high = _numbers("low", self.label, self.low), _numbers("high", self.label, self.high)
            _same_length(self.label, values=values, low=low, high=high)
            for a, value, b in zip(low, values, high, strict=True):
                if a > value or value > b:
                    raise ValueError(
                        f"a value of Bars {self.label!r}, {value}, lies outside its error bar, {a} to {b}."
                    )
            object.__setattr__(self, "low", low)
            object.__setattr__(self, "high", high)
        if self.points is not None:
            points = tuple(_numbers("points", self.label, each, least=0) for each in self.points)
            if len(points) != len(values):
                raise ValueError(f"points of Bars {self.label!r} are for {len(points)} bars, values for {len(values)}.")
            object.__setattr__(self, "points", points)


@dataclass(frozen=True, kw_only=True)
class BarChart:
    """Groups of horizontal bars from zero, one group per category, one bar per series.

    Raises:
        ValueError: if there are no categories or series or too many series, or a series has another number of bars.
    """

    categories: tuple[str, ...]
    series: tuple[Bars, ...]
    value_label: str
    """What the bars measure, and whether less or more is better."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "categories", tuple(self.categories))
        object.__setattr__(self, "series", tuple(self.series))
        if not self.categories or not all(name.strip() for name in self.categories):
            raise ValueError(f"categories={self.categories} of a BarChart: pass at least one, none empty.")
        if not 1 <= len(self.series) <= MOST_SERIES:
            raise ValueError(f"a BarChart of {len(self.series)} series: draw 1 to {MOST_SERIES}.")
        for bars in self.series:
            count = np.size(np.asarray(bars.values))
            if count != len(self.categories):
                raise ValueError(
                    f"Bars {bars.label!r} has {count} values, but there are {len(self.categories)} categories."
                )
        _axes_labelled(self.value_label)


Chart = LineChart | BarChart


def _labelled(owner: str, label: str) -> None:
    if not label.strip():
        raise ValueError(f"label={label!r} of a {owner} is empty: name it.")


def _axes_labelled(*labels: str) -> None:
    if not all(label.strip() for label in labels):
        raise ValueError(f"labels of axes are {labels}: say for each what it measures, and its unit.")


def _numbers(name: str, label: str, values: ArrayLike, least: int = 1) -> tuple[float, ...]:
    try:
        array = np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} of {label!r} is not a sequence of numbers: {error}.") from error
    if array.ndim != 1 or array.size < least:
        raise ValueError(f"{name} of {label!r} has shape {array.shape}: pass a sequence of numbers, {least} or more.")
    if np.isinf(array).any():
        raise ValueError(f"{name} of {label!r} holds an infinite value: put nan where there is nothing to draw.")
    return tuple(array.tolist())


def _same_length(label: str, **values: tuple[float, ...]) -> None:
    lengths = {name: len(each) for name, each in values.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"{label!r} has fields of different lengths ({told}): pass one value per point.")
