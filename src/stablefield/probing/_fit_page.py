"""The page of a network compared with the exact posterior mean, and its charts."""

import math
from collections.abc import Sequence

from stablefield.diffusion._weighting import Weighting
from stablefield.probing._fit import Fit
from stablefield.probing._floor import LoggedExcess
from stablefield.probing._record import fit_record
from stablefield.probing._variance_ledger import VarianceLedger
from stablefield.report import (
    Bullets,
    Code,
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

__all__ = ["distance_chart", "excess_chart", "farthest", "fit_page", "logged_chart"]

# A distance of 0 is drawn here on a logarithmic axis: below what float32 resolves.
_LEAST = 1e-14


def farthest(fit: Fit, weighting: Weighting, trained: tuple[float, float]) -> int:
    """Index of the level with the largest excess loss, among those from `trained[0]` to `trained[1]` if there are any.

    Training can lower no loss at noise levels that it does not draw.
    """
    excess = weighting(fit.noise_level) * fit.distance.mean
    # float32 may have rounded a level.
    low, high = trained[0] / (1 + 1e-5), trained[1] * (1 + 1e-5)
    inside = (fit.noise_level >= low) & (fit.noise_level <= high)
    return int((excess.where(inside, -math.inf) if bool(inside.any()) else excess).argmax())


def distance_chart(fit: Fit) -> LineChart:
    """Squared distance of the network to the posterior mean per number, with the floor for comparison."""
    x, d = fit.noise_level.numpy(), fit.dim
    mean, error = fit.distance.mean / d, fit.distance.error / d
    floor = (fit.floor.mean / d).where(fit.floor.mean > 1e-4 * fit.floor.mean.max(), math.nan)
    lines = [
        Line(
            label="network to posterior mean",
            x=x,
            y=mean.clamp(min=_LEAST).numpy(),
            low=(mean - 2 * error).numpy(),
            high=(mean + 2 * error).numpy(),
        )
    ]
    if not bool(floor.isnan().all()):
        lines.append(Line(label="V_DSM: noise of the single-sample target", x=x, y=floor.numpy(), reference=True))
    return LineChart(
        lines=tuple(lines),
        x_label="noise level sigma / alpha",
        y_label="squared error per number",
        log_x=True,
        log_y=True,
    )


def excess_chart(fit: Fit, weighting: Weighting) -> LineChart:
    """The loss against the noise level, its floor, and the difference, in the units of training."""
    x = fit.noise_level.numpy()
    weight = weighting(fit.noise_level) / fit.dim
    excess, error = weight * fit.distance.mean, weight * fit.distance.error
    return LineChart(
        lines=(
            Line(label="loss", x=x, y=(weight * fit.loss.mean).numpy()),
            Line(
                label="loss minus floor",
                x=x,
                y=excess.numpy(),
                low=(excess - 2 * error).numpy(),
                high=(excess + 2 * error).numpy(),
            ),
            Line(label="floor", x=x, y=(weight * fit.floor.mean).numpy(), reference=True),
        ),
        x_label="noise level sigma / alpha",
        y_label="weighted loss",
        log_x=True,
        y_min=0.0,
    )


def logged_chart(logged: Sequence[LoggedExcess]) -> LineChart | None:
    """Logged loss minus floor over training, for each bin of noise levels; None with fewer than two lines of the log."""
    if len(logged) < 2:
        return None
    x = [entry.step for entry in logged]
    bins = len(logged[0].excess)
    lines: list[Line] = []
    # The lowest bins have almost no floor; readers can distinguish at most six lines.
    for place in range(max(0, bins - 6), bins):
        y = [math.nan if (value := entry.excess[place]) is None else value for entry in logged]
        if not all(math.isnan(value) for value in y):
            lines.append(Line(label=_bin_name(logged[0].edges, place), x=x, y=y))
    return LineChart(lines=tuple(lines), x_label="step", y_label="loss minus floor, by noise level") if lines else None


def _bin_name(edges: tuple[float, ...], place: int) -> str:
    if place == 0:
        return f"to {edges[0]:.2g}"
    if place == len(edges):
        return f"from {edges[-1]:.2g}"
    return f"{edges[place - 1]:.2g} to {edges[place]:.2g}"


def fit_page(
    name: str,
    description: str,
    fit: Fit,
    weighting: Weighting,
    summary: str,
    command: str,
    *,
    trained: tuple[float, float] = (0.0, math.inf),
    over_training: LineChart | None = None,
    ledger: VarianceLedger | None = None,
    notes: Sequence[str] = (),
) -> Page:
    """The page.

    Args:
        name: of the run.
        description: a line that describes its data.
        fit: the measurement.
        weighting: of the run's loss.
        summary: the main result.
        command: the command that made it; empty if there is none.
        trained: lowest and highest noise level of the training; the largest excess is looked for between them.
        over_training: `logged_chart` of the run's log, if there is one.
        ledger: where the variance of a batch's gradient comes from, if measured.
        notes: cautions for readers of the numbers.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    weight = weighting(fit.noise_level) / fit.dim
    excess, loss = weight * fit.distance.mean, weight * fit.loss.mean
    worst = farthest(fit, weighting, trained)
    return Page(
        title=f"{name} against the optimum",
        summary=summary,
        blocks=(
            KeyFigures(
                (
                    KeyFigure(
                        value=Estimate(float(excess[worst]), float(weight[worst] * fit.distance.error[worst])),
                        label="largest excess loss",
                        note=f"at noise level {float(fit.noise_level[worst]):.2g}",
                    ),
                    KeyFigure(
                        value=f"{_share(float(fit.floor.mean[-1]), float(fit.distance.mean[-1])):.1%}",
                        label="of the loss is floor at the highest noise",
                    ),
                )
            ),
            *((Bullets(tuple(notes)),) if notes else ()),
            Section(
                "Distance to the posterior mean",
                (
                    Figure(
                        distance_chart(fit),
                        alt="Squared distance of the network to the exact posterior mean, per number, against noise level.",
                        title="Squared distance to the optimum.",
                        caption=f"{fit.rows:,} noisy rows per level, the posterior over {fit.samples:,} samples. Band: two "
                        "standard errors.",
                    ),
                ),
            ),
            Section(
                "Loss minus floor",
                (
                    Figure(
                        excess_chart(fit, weighting),
                        alt="The training loss against noise level, its irreducible floor, and the difference of both.",
                        title="Possible further gain.",
                        caption="In the units of the single-sample loss. The floor is w V_DSM / d; no network goes below.",
                    ),
                    Table(
                        columns=("noise level", "distance per number", "loss", "floor", "loss minus floor"),
                        rows=tuple(
                            (
                                float(fit.noise_level[i]),
                                Estimate(float(fit.distance.mean[i]) / fit.dim, float(fit.distance.error[i]) / fit.dim),
                                float(loss[i]),
                                float(weight[i] * fit.floor.mean[i]),
                                float(excess[i]),
                            )
                            for i in range(len(fit.noise_level))
                        ),
                        caption="Loss minus floor is the weighted distance, measured directly, without the floor's noise.",
                    ),
                ),
            ),
            *_training_section(over_training),
            *_ledger_section(ledger),
            Section(
                "Numbers",
                (
                    *((Code(command),) if command else ()),
                    json_details("All figures", fit_record(fit)),
                    *(() if ledger is None else (json_details("The ledger of variance", ledger.record()),)),
                ),
            ),
        ),
        footer=f"{description}. `{command}`" if command else description,
    )


def _share(floor: float, distance: float) -> float:
    """Share of the floor in the loss, 0 if there is no loss; the measured loss has the noise of the samples besides."""
    return floor / (floor + distance) if floor + distance > 0 else 0.0


def _training_section(chart: LineChart | None) -> tuple[Section, ...]:
    if chart is None:
        return ()
    figure = Figure(
        chart,
        alt="Loss minus floor against training steps, a line for each bin of noise levels.",
        title="Over training.",
        caption="Logged loss plus variance removed, minus the floor of the single-sample loss. Training can still gain what "
        "is above 0; the lines are as noisy as the log.",
    )
    return (Section("Loss minus floor over training", (figure,)),)


def _ledger_section(ledger: VarianceLedger | None) -> tuple[Section, ...]:
    if ledger is None:
        return ()
    terms = Table(
        columns=("drawn at random", "share of the variance, %"),
        rows=tuple((name, _percent(share)) for name, share in ledger.terms.items()),
        caption=f"A batch of {ledger.batch:,} independent rows with the single-sample target, from "
        f"{ledger.rows:,} rows of {ledger.images:,} images. {ledger.batches} whole batches measured "
        f"{100 * ledger.measured.value:.0f} ± {100 * ledger.measured.error:.0f} % of the sum.",
    )
    levers = Table(
        columns=("lever", "single-sample target, %", "stable target, %", "worth a batch, times"),
        rows=tuple(
            (lever.name, None if lever.single is None else _percent(lever.single), _percent(lever.stable), lever.factor)
            for lever in ledger.levers
        ),
        caption="Variance that remains with an equal number of rows, ± a standard error. The last column is for the stable "
        "target.",
    )
    return (Section("Variance of the gradient", (Text(ledger.summary.replace("\n", " ")), terms, levers)),)


def _percent(share: Estimate) -> Estimate:
    return Estimate(100 * share.value, 100 * share.error)
