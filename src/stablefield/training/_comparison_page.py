"""The page of a comparison of targets, and its charts."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablefield.report import (
    Code,
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
    Text,
    image_figure,
    json_details,
)
from stablefield.training._scores import LEVELS, MIDDLE, Outcome, Score, improvement, spread

__all__ = ["comparison_page", "distance_chart", "gain_texts", "level_chart", "over_seeds"]

NAMES = {"dsm": "DSM", "stf": "STF"}


def _lines(outcomes: Sequence[Outcome], x: Callable[[Score], float], y: Callable[[Score], float]) -> tuple[Line, ...]:
    """A line per target through the means over seeds, with a band from the lowest to the highest."""
    lines: list[Line] = []
    for target, name in NAMES.items():
        runs = [outcome.scores for outcome in outcomes if outcome.target == target]
        if not runs:
            continue
        across = np.array([[x(score) for score in run] for run in runs]).mean(0)
        values = np.array([[y(score) for score in run] for run in runs])
        lines.append(Line(label=name, x=across, y=values.mean(0), low=values.min(0), high=values.max(0)))
    return tuple(lines)


def level_chart(outcomes: Sequence[Outcome]) -> LineChart:
    """Distance to the posterior mean at the end of training, against the noise level."""
    lines: list[Line] = []
    for target, name in NAMES.items():
        values = np.array([outcome.last.distance for outcome in outcomes if outcome.target == target])
        lines.append(Line(label=name, x=np.array(LEVELS), y=values.mean(0), low=values.min(0), high=values.max(0)))
    return LineChart(
        lines=tuple(lines),
        x_label="noise level sigma / alpha",
        y_label="squared distance to the posterior mean, per number",
        log_x=True,
        log_y=True,
    )


def distance_chart(outcomes: Sequence[Outcome]) -> LineChart:
    """Distance to the posterior mean at middle noise levels over training."""
    return LineChart(
        lines=_lines(outcomes, lambda score: score.step, lambda score: score.middle),
        x_label="step",
        y_label=f"squared distance, noise levels {MIDDLE[0]:g} to {MIDDLE[1]:g}",
        log_y=True,
    )


def comparison_page(
    title: str,
    summary: str,
    outcomes: Sequence[Outcome],
    grids: Sequence[tuple[str, NDArray[np.uint8]]],
    protocol: Any,
    frechet_name: str,
    command: str,
) -> Page:
    """The page.

    Args:
        title: title of the page.
        summary: the results in words.
        outcomes: the runs.
        grids: sample grids from the same latents, with their names; none for data that are no pictures.
        protocol: all settings, as JSON values.
        frechet_name: name of the Frechet distance of the samples.
        command: the command or call that made the comparison.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    seeds = sorted({outcome.seed for outcome in outcomes})
    gains = [improvement(outcomes, seed) for seed in seeds]
    gain, between = gain_texts(gains)
    by = {target: [o for o in outcomes if o.target == target] for target in NAMES}
    seconds = {target: float(np.mean([o.last.seconds for o in runs])) for target, runs in by.items()}
    ratio = float(np.mean([o.last.gradient_ratio for o in outcomes]))
    figures = tuple(
        image_figure(images, alt=f"Samples of {name}.", caption=f"{name}, the same latents.") for name, images in grids
    )
    return Page(
        title=title,
        summary=summary,
        blocks=(
            KeyFigures(
                (
                    KeyFigure(
                        value=gain,
                        label="less distance to the posterior mean with STF",
                        note=f"noise levels {MIDDLE[0]:g} to {MIDDLE[1]:g}; {between} over seeds",
                    ),
                    KeyFigure(
                        value=f"{ratio:.2f}",
                        label="gradient variance STF / DSM",
                        note="from batch to batch, at equal weights, end of training",
                    ),
                    KeyFigure(
                        value=f"{seconds['stf'] / seconds['dsm']:.2f}",
                        label="time STF / DSM",
                        note=f"{seconds['stf']:.0f} s and {seconds['dsm']:.0f} s of training a run",
                    ),
                )
            ),
            Section(
                "Distance to the optimum",
                (
                    Text(
                        "The network that minimises the training loss is the posterior mean over the training set. The "
                        "charts show a network's distance from it at every noise level; lower is better. Bands reach from "
                        "the lowest to the highest seed."
                    ),
                    Figure(
                        level_chart(outcomes),
                        alt="Squared distance to the exact posterior mean at the end of training, against noise level.",
                        title="At the end of training.",
                        caption="1,024 noisy rows per level (fewer for a small set or large images).",
                    ),
                    Figure(
                        distance_chart(outcomes),
                        alt="Squared distance at middle noise levels against training steps, for both targets.",
                        title="Over training, by steps.",
                        caption="Averaged weights, noise levels in the middle.",
                    ),
                    Figure(
                        dataclasses.replace(
                            distance_chart(outcomes),
                            lines=_lines(outcomes, lambda score: score.seconds, lambda score: score.middle),
                            x_label="seconds of training",
                        ),
                        alt="The same against seconds of training.",
                        title="Over training, by wall-clock.",
                        caption="Time of training alone, without the evaluations.",
                    ),
                    Table(
                        columns=("noise level", "DSM", "STF", "STF / DSM"),
                        rows=tuple(
                            (
                                level,
                                over_seeds([o.last.distance[k] for o in by["dsm"]]),
                                over_seeds([o.last.distance[k] for o in by["stf"]]),
                                float(
                                    np.mean([o.last.distance[k] for o in by["stf"]])
                                    / np.mean([o.last.distance[k] for o in by["dsm"]])
                                ),
                            )
                            for k, level in enumerate(LEVELS)
                        ),
                        caption="Squared distance per number: mean over seeds, with its standard error.",
                    ),
                ),
            ),
            Section(
                "Samples",
                (
                    Figure(
                        LineChart(
                            lines=_lines(outcomes, lambda score: score.step, lambda score: score.frechet),
                            x_label="step",
                            y_label=frechet_name,
                        ),
                        alt=f"{frechet_name} of samples against training steps.",
                        title=f"{frechet_name}.",
                        caption="Lower is better. Few samples bias it upwards, by the same amount for both.",
                    ),
                    Figure(
                        LineChart(
                            lines=_lines(outcomes, lambda score: score.seconds, lambda score: score.frechet),
                            x_label="seconds of training",
                            y_label=frechet_name,
                        ),
                        alt=f"{frechet_name} of samples against seconds of training.",
                        title=f"{frechet_name} by wall-clock.",
                        caption="Lower is better. Time of training alone, without the evaluations.",
                    ),
                    Table(
                        columns=("seed", f"{frechet_name}, DSM", f"{frechet_name}, STF", "distance, STF against DSM"),
                        rows=tuple(
                            (
                                seed,
                                _reading(outcomes, "dsm", seed),
                                _reading(outcomes, "stf", seed),
                                f"{-less:+.1%}",
                            )
                            for seed, less in zip(seeds, gains, strict=True)
                        ),
                        caption="At the end of training, with the jackknife's standard error.",
                    ),
                    *((SideBySide(figures),) if figures else ()),
                ),
            ),
            Section(
                "Gradient",
                (
                    Figure(
                        LineChart(
                            lines=_lines(outcomes, lambda score: score.step, lambda score: score.gradient_variance),
                            x_label="step",
                            y_label="variance of the gradient",
                            log_y=True,
                        ),
                        alt="Variance of the gradient from batch to batch over training, for both targets.",
                        title="Variance of the gradient.",
                        caption="Lower is better. Variance between batches, summed over the parameters, each run at its "
                        "own averaged weights.",
                    ),
                ),
            ),
            Section("Protocol", (Code(command), json_details("Every setting", protocol))),
        ),
        footer=f"`{command}`",
    )


def gain_texts(values: Sequence[float]) -> tuple[str, str]:
    """The mean of shares over seeds in per cent, with its error if there are several, and the least and the most."""
    found = spread([100 * value for value in values])
    error = found.error or 0.0
    places = 1 if found.error is None else 2
    # An error is shown to two digits, but no digits beyond a hundredth of a per cent, which mean nothing.
    if 0 < error < math.inf:
        places = min(2, max(0, 1 - math.floor(math.log10(error))))
    mean, least, most = (f"{round(value, places) + 0.0:.{places}f}%" for value in (found.mean, found.least, found.most))
    if found.error is not None:
        shown = f"{error:.{places}f}"
        mean += f" ± {shown if float(shown) else f'less than {10**-places:g}'}%"
    return mean, f"{least} to {most}"


def over_seeds(values: Sequence[float]) -> Estimate | float:
    """A mean, with its standard error if there are several values."""
    found = spread(values)
    return found.mean if found.error is None else Estimate(found.mean, found.error)


def _reading(outcomes: Sequence[Outcome], target: str, seed: int) -> Estimate:
    last = next(o.last for o in outcomes if o.target == target and o.seed == seed)
    return Estimate(last.frechet, last.frechet_error)
