"""The report of a run: losses with their floor, evaluations, samples over training, speed, settings and environment."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import stablefield
from stablefield.data._png import class_grid
from stablefield.report import (
    Block,
    Estimate,
    Figure,
    KeyFigure,
    KeyFigures,
    Line,
    LineChart,
    Page,
    Section,
    SideBySide,
    Table,
    json_details,
)
from stablefield.report._cells import duration, text_table
from stablefield.report._images import grid_figure
from stablefield.report._result import Result, Tables
from stablefield.training._config import encode
from stablefield.training._grids import grid_steps, picked, read_grid
from stablefield.training._recipe import Recipe
from stablefield.training._records import read_lines
from stablefield.training._run_config import RunConfig
from stablefield.training._run_folder import RunFolder

__all__ = ["RunReport", "read_report"]

REFRESH = 20
"""Seconds after which a browser loads the report of a run in progress again."""
SEEDS = 64
"""Images of a sample grid."""
# Points of a line, and grids of a report.
_POINTS, _GRIDS, _SMALL = 200, 5, 440
# Lines of the log that the last pace is the mean of.
_RECENT = 4
_ENVIRONMENT = {"step": int, "started": str, "device": str, "processes": int, "stablefield": str}
_ENVIRONMENT |= {"torch": str, "python": str}


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class RunReport(Result):
    """A run so far.

    Attributes:
        path: the run's folder.
        config: its configuration.
        lines: the lines of metrics.jsonl.
        environment: where it was trained, an entry for each time that the training began or was resumed.
        best: step and held-out loss of the best checkpoint; None for a run that holds nothing out.
        training: whether it is being trained now.
    """

    path: Path
    config: RunConfig
    lines: tuple[Mapping[str, Any], ...]
    environment: tuple[Mapping[str, Any], ...]
    best: tuple[int, float] | None
    training: bool

    @property
    def step(self) -> int:
        """Steps done at the last line of the log."""
        return int(self.lines[-1]["step"]) if self.lines else 0

    @property
    def seconds_left(self) -> float | None:
        """Time for the steps that are left, at the last pace, without pictures and checkpoints; None if unknown."""
        speed, _ = self._pace
        return (self.config.recipe.steps - self.step) * self.config.recipe.batch / speed if speed else None

    @property
    def summary(self) -> str:
        """Where the run stands, in a sentence or two."""
        steps, left = self.config.recipe.steps, self.seconds_left
        if self.step >= steps:
            text = f"Finished: {steps:,} steps."
        elif self.training:
            text = f"Training: step {self.step:,} of {steps:,}"
            text += f", about {duration(left)} left." if left else "."
        else:
            text = f"Stopped at step {self.step:,} of {steps:,}."
        if self.best is not None:
            text += f" The held-out loss is lowest at step {self.best[0]:,}: {self.best[1]:.4g}."
        return text

    def __str__(self) -> str:
        return "\n".join([self.summary, "", text_table(("", "last"), [(name, text) for name, text in self._figures()])])

    def to_dict(self) -> dict[str, Any]:
        """All numbers, the settings and the environment, as JSON values."""
        return {
            "stablefield": stablefield.__version__,
            "data": self.config.data,
            "manifest": dict(self.config.manifest),
            "recipe": encode(self.config.recipe),
            "held_out": None if self.config.held_out is None else self.config.held_out.record(),
            "step": self.step,
            "training": self.training,
            "best": None if self.best is None else {"step": self.best[0], "held_out_loss": self.best[1]},
            "environment": [dict(entry) for entry in self.environment],
            "metrics": [dict(line) for line in self.lines],
        }

    def tables(self) -> Tables:
        """The log without its bins, a row for each line."""
        names = dict.fromkeys(name for line in self.lines for name in line if not name.startswith("bin_"))
        return {"metrics": (tuple(names), [[line.get(name) for name in names] for line in self.lines])}

    def charts(self) -> Mapping[str, LineChart]:
        """The losses, the losses minus their floor, and the Frechet distance, as far as they were measured."""
        recipe, found = self.config.recipe, dict[str, LineChart]()
        removed = any(line.get("variance_removed") for line in self.lines)
        logged = self._curve(
            "training, batches" if self._last("floor") else "loss to single samples" if removed else "loss",
            _single_sample if removed else _of("loss"),
        )
        others = [
            self._curve("training, fixed noise", _of("fixed_loss")),
            self._curve("held out, fixed noise", _of("held_out_loss"), _of("held_out_loss_error")),
        ]
        if removed and not any(others):
            others = [self._curve("loss to stable targets", _of("loss"))]
        floor = self._curve("floor", _of("floor"))
        lines = [line for line in (logged, *others) if line is not None]
        if floor is not None:
            lines.append(dataclasses.replace(floor, low=None, high=None, reference=True))
        if lines:
            found["loss"] = _chart(lines, "loss", "Loss", zero=False)
        above = [
            self._curve("training, batches", _of("loss_minus_floor")),
            self._curve("training, fixed noise", _of("fixed_loss_minus_floor")),
            self._curve("held out, fixed noise", _of("held_out_loss_minus_floor")),
        ]
        if floor is not None and any(above):
            found["excess"] = _chart([line for line in above if line], "loss minus floor", "Loss minus floor")
        distance = self._curve("samples", _of("frechet"), _of("frechet_error"))
        if distance is not None:
            real = self._curve("as many real images", _of("frechet_floor"))
            lines = [distance] + ([] if real is None else [dataclasses.replace(real, reference=True)])
            found["frechet"] = _chart(lines, "Frechet distance", "Frechet distance")
        unit = f"{self._counted} per second"
        speed = self._curve(unit, _of("images_per_second"))
        if speed is not None and recipe.steps > 1:
            found["speed"] = _chart([speed], unit, "Speed", zero=True)
        return found

    def page(self) -> Page:
        """The report."""
        charts = self.charts()
        learning = tuple(
            Figure(
                dataclasses.replace(charts[name], title=""), alt=alt, title=f"{charts[name].title}.", caption=caption
            )
            for name, alt, caption in (
                ("loss", "Losses against the step.", self._about_losses()),
                ("excess", "Losses minus their floor against the step.", _ABOUT_EXCESS),
                ("frechet", "Frechet distance of samples against the step.", _ABOUT_FRECHET),
            )
            if name in charts
        )
        speed = [
            Figure(
                dataclasses.replace(charts["speed"], title=""),
                alt=f"{self._counted.capitalize()} per second against the step.",
            )
            for _ in range("speed" in charts)
        ]
        environment: list[Block] = [self._where()] if self.environment else []
        sections = [
            ("Learning", learning),
            ("Samples", self._samples()),
            ("Settings", (self._settings(), json_details("Every setting", encode(self.config.recipe)))),
            ("Speed and environment", (*speed, *environment)),
        ]
        return Page(
            title=self.path.resolve().name,
            summary=self.summary,
            blocks=(
                KeyFigures(self._key_figures()),
                *(Section(title, tuple(blocks)) for title, blocks in sections if blocks),
            ),
            footer=f"Written {datetime.now():%Y-%m-%d %H:%M:%S}"
            + (", again at the next look; the page loads it" if self.training else ""),
            refresh=REFRESH if self.training else None,
        )

    @property
    def _counted(self) -> str:
        """What the recipe and the log count as images."""
        return "noisy images" if self.config.recipe.draws_per_image > 1 else "images"

    def _last(self, name: str) -> float | None:
        return next((float(line[name]) for line in reversed(self.lines) if name in line), None)

    @property
    def _pace(self) -> tuple[float | None, float | None]:
        """Images per second and the share of noise and target, over the last lines since the training went on."""
        began = self.environment[-1]["step"] if self.environment else 0
        timed = [line for line in self.lines if line.get("images_per_second")]
        last = [line for line in timed if line["step"] > began][-_RECENT:] or timed[-1:]
        if not last:
            return None, None
        times = [1 / line["images_per_second"] for line in last]  # of an image
        shares = math.fsum(t * line.get("target_share", 0.0) for t, line in zip(times, last, strict=True))
        return len(last) / math.fsum(times), shares / math.fsum(times)

    def _earlier(self, name: str) -> str:
        """Where the last value is from, such as "at step 200", if there are later lines; else empty."""
        step = next((line["step"] for line in reversed(self.lines) if name in line), self.step)
        return f"at step {step:,}" if step < self.step else ""

    def _key_figures(self) -> tuple[KeyFigure, ...]:
        recipe = self.config.recipe
        found = [
            KeyFigure(value=f"{self.step:,}", label="steps", note=f"of {recipe.steps:,}, {recipe.batch_in_words} each")
        ]
        for name, label, note in (
            ("held_out_loss", "held-out loss", "averaged weights, fixed noise"),
            ("fixed_loss", "loss on training samples", "averaged weights, fixed noise"),
            ("loss", "training loss", f"to {_TARGETS[recipe.target]}, means over batches"),
            ("frechet", "Frechet distance", "of a few samples"),
        ):
            value, error = self._last(name), self._last(f"{name}_error")
            if value is not None and not (name == "loss" and self._last("fixed_loss") is not None):
                about = ", ".join(filter(None, (note, self._earlier(name))))
                found.append(
                    KeyFigure(value=value if error is None else Estimate(value, error), label=label, note=about)
                )
        speed, share = self._pace
        if speed:
            left = self.seconds_left if self.training else None
            note = f"about {duration(left)} left" if left else f"noise and target take {share:.0%}" if share else ""
            found.append(
                KeyFigure(
                    value=round(speed) if speed >= 10 else float(f"{speed:.2g}"),
                    label=f"{self._counted} per second",
                    note=note,
                )
            )
        return tuple(found)

    def _figures(self) -> list[tuple[str, str]]:
        rows: list[tuple[str, str]] = []
        names = ("loss", "loss_minus_floor", "fixed_loss", "held_out_loss", "held_out_gap", "floor", "frechet")
        for name in (*names, "images_per_second"):
            value, error = self._last(name), self._last(f"{name}_error")
            if name == "images_per_second":
                value, _ = self._pace
            if value is not None:
                text = f"{value:.4g}" + (f" ± {error:.1g}" if error else "")
                label = name.replace("images", self._counted).replace("_", " ")
                rows.append((label, f"{text} {self._earlier(name)}".rstrip()))
        return rows

    def _curve(self, label: str, value: "_Getter", error: "_Getter | None" = None) -> Line | None:
        """A line over the steps, thinned by means, with a band of two standard errors; None without values."""
        points = [
            (line["step"], y, None if error is None else error(line))
            for line in self.lines
            if (y := value(line)) is not None
        ]
        if not points:
            return None
        parts = np.array_split(np.arange(len(points)), min(_POINTS, len(points)))
        x = [float(points[part[-1]][0]) for part in parts]
        y = [math.fsum(points[k][1] for k in part) / len(part) for part in parts]
        errors = [points[part[-1]][2] or 0.0 for part in parts]
        if not any(errors):
            return Line(label=label, x=x, y=y)
        low, high = ([a + sign * 2 * b for a, b in zip(y, errors, strict=True)] for sign in (-1, 1))
        return Line(label=label, x=x, y=y, low=low, high=high)

    def _about_losses(self) -> str:
        text = "Batches: means since the last line of the log"
        stable, looked = self.config.recipe.target == "stf", self._last("fixed_loss") is not None
        if stable and looked:
            text += ", with the variance that the stable target removes, so that all lines are losses to single samples"
        elif stable:
            text += ". The loss to single samples is that to the stable target plus the variance that this one removes"
        if self.config.held_out is None:
            return f"{text}."
        text += (
            ". Fixed noise: the averaged weights on the same noisy rows at every look, bands of two standard errors."
        )
        sampled = self._last("floor_samples")
        if sampled is None:
            return f"{text} Floor: what a perfect network would keep of the training loss."
        return (
            f"{text} Floor: what a perfect network would keep of the loss if {sampled:,.0f} of the training samples, drawn "
            "at random, were all: lower on average than with all of them, so training can lower less than is shown."
        )

    def _samples(self) -> tuple[Block, ...]:
        """The newest grid, and a few earlier ones of the same seeds."""
        found = grid_steps(self.path / "samples", self.step if self.lines else None)
        steps = picked(list(found), _GRIDS)
        figures: dict[int, Figure] = {}
        for step in steps:
            try:
                grid = read_grid(found[step])
            except (OSError, ValueError):
                continue  # such as one that was being replaced
            newest = step == steps[-1]
            figures[step] = grid_figure(
                grid,
                self._ground(grid),
                alt=f"Samples after {step:,} steps.",
                title=f"Step {step:,}.",
                caption="The averaged weights; the same seeds at every step." if newest else "",
                width=None if newest else _SMALL,
            )
        if not figures:
            return ()
        *earlier, last = figures.values()
        return (last, SideBySide(tuple(earlier))) if len(earlier) > 1 else (last, *earlier)

    def _ground(self, grid: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        """The same grid of black images, if it is laid out as the run lays them out."""
        shape, classes = self.config.picture_shape or self.config.shape, self.config.classes
        labels = np.arange(SEEDS) % classes if classes else None
        if len(shape) != 3 or math.prod(shape) * SEEDS > 2**26 or shape[0] != grid.shape[2]:
            return None
        ground = class_grid(np.zeros((SEEDS, *shape), np.uint8), labels, self.config.class_names)
        return ground if ground.shape == grid.shape else None

    def _settings(self) -> Table:
        config, recipe = self.config, self.config.recipe
        count = config.manifest.get("count", 0)
        sizes = "x".join(map(str, config.shape))
        rows = [
            ("data", f"{config.data}: {count:,} of {sizes}" if isinstance(count, int) else config.data),
            ("network", str(recipe.network)),
            ("target", _target(recipe)),
            ("steps", f"{recipe.steps:,} of {recipe.batch_in_words}, seed {recipe.seed}"),
            ("learning rate", f"{recipe.learning_rate:g}, ramp {recipe.ramp_images:,} {self._counted}"),
            ("averages", f"half-life {recipe.ema_half_life:,.0f} {self._counted}"),
            ("process", str(recipe.process)),
            ("noise levels", f"{recipe.noise_levels}{', importance sampling' if recipe.importance_sampling else ''}"),
        ]
        if recipe.draws_per_image > 1:
            pairs = ", in pairs of opposite noise" if recipe.antithetic else ""
            rows.append(("draws", f"{recipe.draws_per_image} of each image{pairs}"))
        if config.classes:
            rows.append(("classes", f"{config.classes}, label dropout {recipe.label_dropout:g}"))
        if config.held_out is not None:
            rows.append(("held out", config.held_out.describe(recipe)))
        if config.initial is not None:
            rows.append(("weights of", f"{config.initial.source} ({config.initial.weights})"))
        rows += [(f"at step {e.step:,}", f"{e.after:,} steps instead of {e.before:,}") for e in config.extensions]
        return Table(columns=("setting", "value"), rows=tuple(rows))

    def _where(self) -> Table:
        names = ("started", "device", "processes", "torch", "python", "stablefield")
        return Table(
            columns=("from step", *names),
            rows=tuple((f"{entry['step']:,}", *(str(entry[name]) for name in names)) for entry in self.environment),
            caption="Each time that the training began or was resumed; times in UTC.",
        )


_Getter = Callable[[Mapping[str, Any]], float | None]
# What a logged loss is to, by the target.
_TARGETS = {"stf": "stable targets", "dsm": "single samples"}
_ABOUT_EXCESS = (
    "What training can still lower. On a logarithmic axis, where the lines allow it. A held-out loss that rises while the "
    "others fall shows memorisation."
)
_ABOUT_FRECHET = "Of a few samples to the data, with bands of two standard errors. Lower is better."


def read_report(folder: RunFolder, config: RunConfig | None = None, *, training: bool) -> RunReport:
    """Read what a run has written so far.

    Args:
        folder: the run's folder.
        config: its configuration, if known.
        training: whether it is being trained.
    """
    entries = (
        {name: entry[name] for name in _ENVIRONMENT}
        for entry in read_lines(folder.environments)
        if all(isinstance(entry.get(name), kind) for name, kind in _ENVIRONMENT.items())
    )
    lines: dict[int, dict[str, Any]] = {}
    for line in folder.metrics():
        lines[line["step"]] = lines.get(line["step"], {}) | line
    return RunReport(
        path=folder.path,
        config=folder.config() if config is None else config,
        lines=tuple(lines[step] for step in sorted(lines)),
        environment=tuple(entries),
        best=folder.best(),
        training=training,
    )


def _target(recipe: Recipe) -> str:
    if recipe.target == "dsm":
        return "the single sample (dsm)"
    band = recipe.noise_band if isinstance(recipe.noise_band, str) else f"{recipe.noise_band:.3g}"
    return f"the stable target (stf), references: {recipe.references}, noise band from {band}"


def _of(name: str) -> _Getter:
    return lambda line: line.get(name)


def _single_sample(line: Mapping[str, Any]) -> float | None:
    return line["loss"] + line.get("variance_removed", 0.0) if "loss" in line else None


def _chart(lines: Sequence[Line], label: str, title: str, *, zero: bool = False) -> LineChart:
    values = [float(value) for line in lines for value in np.asarray(line.y)]
    return LineChart(
        lines=tuple(lines),
        x_label="step",
        y_label=label,
        log_y=not zero and min(values) > 0,
        y_min=0.0 if zero else None,
        title=title,
    )
