"""The excess of a network's loss over its floor: the result of `ExcessLoss`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

import stablefield
from stablefield.probing._series import Series
from stablefield.probing._text import finite, sampled, with_error
from stablefield.report import (
    Estimate,
    Figure,
    KeyFigure,
    KeyFigures,
    Line,
    LineChart,
    Page,
    Section,
    Table,
    Text,
    json_details,
)
from stablefield.report._cells import text_table
from stablefield.report._result import Result, Tables

__all__ = ["Excess"]

# The same words for a reader of the report and of the reference.
_TWO_WAYS = (
    "Loss minus floor and the distance to the exact posterior mean estimate one number, how much training can still lower "
    "the loss. The distance is measured directly, so it has the smaller error and is never negative: compare models by it. "
    "Loss minus floor is what a loop can compute from its own loss; where it differs from the distance by many errors, the "
    "loss and the floor do not belong to the same training."
)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Excess(Result):
    """The training loss of a network at fixed noise, its floor, and the difference of both, in the units of the loss.

    Every quantity is a mean over the rows of each bin of noise levels, with its standard error. Bins are equally probable in
    training, so the mean over them is that of training. Two networks see the same rows, so the difference between them is
    more accurate than each of them.

    Attributes:
        noise_level: median of each bin, shape (L,), float64, increasing.
        loss: weighted squared error to the sample that made the row, w |D - x0|^2 / d.
        floor: what an exact network would have on the same rows in expectation, w V / d with the posterior variance V.
        loss_minus_floor: the difference, row by row. Noise may take it below 0.
        distance: w |D - mu|^2 / d, with the exact posterior mean mu: the same expectation as `loss_minus_floor`, without the
            noise of the sample.
        held_out: loss on held-out samples at the same noise; None without them.
        gap: held-out loss minus training loss, row by row.
        rows: rows in each bin.
        samples: size of the population.
        drawn_from: size of the data set, if the population is a part of it.
        description: the process, noise levels, weighting and prediction, by name.
        seed: of rows and noise.
        seconds: duration of this measurement.
    """

    noise_level: Tensor
    loss: Series
    floor: Series
    loss_minus_floor: Series
    distance: Series
    held_out: Series | None
    gap: Series | None
    rows: int
    samples: int
    drawn_from: int | None
    description: Mapping[str, str]
    seed: int
    seconds: float

    def total(self, name: str) -> Estimate:
        """The mean over training of "loss", "floor", "loss_minus_floor", "distance", "held_out" or "gap".

        Raises:
            ValueError: for another name, or for a quantity that needs held-out samples, without them.
        """
        series = self._series()
        if name not in series:
            raise ValueError(f"name={name!r}: pass one of {', '.join(series)}.")
        # Bins have rows and noise of their own.
        found = series[name]
        return Estimate(float(found.mean.mean()), float(found.error.square().sum().sqrt()) / len(found.mean))

    def metrics(self, prefix: str = "excess_loss/") -> dict[str, float]:
        """All figures under flat names, for any logger: means over training with errors (`_se`), the distance per bin."""
        found: dict[str, float] = {}
        for name in self._series():
            total = self.total(name)
            found |= {f"{prefix}{name}": total.value, f"{prefix}{name}_se": total.error}
        for level, value in zip(self.noise_level.tolist(), self.distance.mean.tolist(), strict=True):
            found[f"{prefix}distance_at_{level:.3g}"] = value
        return found

    def __str__(self) -> str:
        return "\n".join([*self._notes(), self.summary, self._table()])

    def _notes(self) -> list[str]:
        """Cautions for readers of these numbers, in lines that fit a terminal."""
        if self.drawn_from is None:
            return []
        return [f"{sampled(self.samples, self.drawn_from)}:\nthe floor is theirs, and not exactly the training's"]

    @property
    def summary(self) -> str:
        """What training can still gain, in a sentence."""
        loss, floor, distance = (self.total(name) for name in ("loss", "floor", "distance"))
        return (
            f"Of the loss of {loss.value:.3g}, {floor.value:.3g} is floor: training can still lower it by\n"
            f"{with_error(distance.value, distance.error)}."
        )

    def to_dict(self) -> dict[str, Any]:
        """All numbers and their context, as JSON values."""
        totals = {name: self.total(name) for name in self._series()}
        columns, rows = self._figures()
        return {
            "stablefield": stablefield.__version__,
            **self.description,
            "samples": self.samples,
            "drawn_from": self.drawn_from,
            "rows_per_level": self.rows,
            "seed": self.seed,
            "seconds": self.seconds,
            "total": {name: finite(total.value) for name, total in totals.items()}
            | {f"{name}_se": finite(total.error) for name, total in totals.items()},
            "levels": [dict(zip(columns, row, strict=True)) for row in rows],
        }

    def tables(self) -> Tables:
        """All figures with their errors, a row per bin of noise levels."""
        return {"excess": self._figures()}

    def charts(self) -> Mapping[str, LineChart]:
        """The distance and loss minus floor, and the losses with their floor; none if the network returned no numbers."""
        if (
            not all(bool(series.mean.isfinite().all()) for series in self._series().values())
            or len(self.noise_level) < 2
        ):
            return {}
        excess = self._chart(
            self._line("distance to the posterior mean", self.distance),
            self._line("loss minus floor", self.loss_minus_floor),
            title="Loss minus floor",
        )
        lines = [self._line("loss", self.loss)]
        if self.held_out is not None:
            lines.append(self._line("held-out loss", self.held_out))
        floor = replace(self._line("floor", self.floor), low=None, high=None, reference=True)
        return {"excess": excess, "loss": self._chart(*lines, floor, title="Loss and floor")}

    def page(self) -> Page:
        """The report."""
        names = {
            "distance": "can still go",
            "loss": "loss",
            "floor": "floor",
            "gap": "held-out loss minus training loss",
        }
        notes = {"distance": "weighted distance to the posterior mean", "loss": "training samples, fixed noise"}
        key = [
            KeyFigure(value=_cell(self.total(name)), label=label, note=notes.get(name, ""))
            for name, label in names.items()
            if name in self._series() and _cell(self.total(name)) is not None
        ]
        alts = {
            "excess": "Weighted distance to the posterior mean and loss minus floor against the noise level.",
            "loss": "The loss and its floor against the noise level.",
        }
        figures = tuple(
            Figure(
                replace(chart, title=""),
                alt=alts[name],
                title=f"{chart.title}.",
                caption=f"{self.rows:,} rows per bin of noise levels, the posterior over {self.samples:,} samples. Bands: "
                "two standard errors.",
            )
            for name, chart in self.charts().items()
        )
        table = Table(
            columns=("noise level", *(name.replace("_", " ") for name in self._series())),
            rows=tuple(
                (float(level), *(_cell(Estimate(*pair)) for pair in zip(means, errors, strict=True)))
                for level, means, errors in zip(
                    self.noise_level,
                    zip(*(series.mean.tolist() for series in self._series().values()), strict=True),
                    zip(*(series.error.tolist() for series in self._series().values()), strict=True),
                    strict=True,
                )
            ),
            caption="Means with one standard error.",
        )
        settings = ", ".join(f"{name} {value}" for name, value in self.description.items())
        return Page(
            title="The loss above its floor",
            summary=self.summary.replace("\n", " "),
            blocks=(
                KeyFigures(tuple(key)),
                *(Text(f"{note}.".replace("\n", " ")) for note in self._notes()),
                Section("By noise level", (*figures, table, Text(_TWO_WAYS))),
                Section("Numbers", (json_details("All figures", self.to_dict()),)),
            ),
            footer=settings,
        )

    def _series(self) -> dict[str, Series]:
        found = {
            "loss": self.loss,
            "floor": self.floor,
            "loss_minus_floor": self.loss_minus_floor,
            "distance": self.distance,
        }
        if self.held_out is not None and self.gap is not None:
            found |= {"held_out": self.held_out, "gap": self.gap}
        return found

    def _figures(self) -> tuple[tuple[str, ...], tuple[tuple[float | None, ...], ...]]:
        columns: dict[str, list[float | None]] = {"noise_level": self.noise_level.tolist()}
        for name, series in self._series().items():
            columns[name] = [finite(value) for value in series.mean.tolist()]
            columns[f"{name}_se"] = [finite(value) for value in series.error.tolist()]
        return tuple(columns), tuple(zip(*columns.values(), strict=True))

    def _line(self, label: str, series: Series) -> Line:
        x, mean, error = self.noise_level.numpy(), series.mean, series.error
        return Line(label=label, x=x, y=mean.numpy(), low=(mean - 2 * error).numpy(), high=(mean + 2 * error).numpy())

    def _chart(self, *lines: Line, title: str) -> LineChart:
        return LineChart(
            lines=lines, x_label="noise level sigma / alpha", y_label="weighted loss", log_x=True, title=title
        )

    def _table(self) -> str:
        columns = ["noise", "loss", "floor", "loss - floor", "distance", *(("gap",) if self.gap is not None else ())]
        rows: list[list[str]] = []
        for k, level in enumerate((*self.noise_level.tolist(), None)):
            cells = ["mean" if level is None else f"{level:.3g}"]
            for name in ("loss", "floor", "loss_minus_floor", "distance", "gap"):
                if name not in self._series():
                    continue
                series = self._series()[name]
                pair = self.total(name) if level is None else Estimate(float(series.mean[k]), float(series.error[k]))
                shown = f"{pair.value:.3g}" if name in ("loss", "floor") else with_error(pair.value, pair.error)
                cells.append(shown)
            rows.append(cells)
        return text_table(columns, rows)


def _cell(estimate: Estimate) -> Estimate | None:
    """None for what is no number."""
    return estimate if math.isfinite(estimate.value) and math.isfinite(estimate.error) else None
