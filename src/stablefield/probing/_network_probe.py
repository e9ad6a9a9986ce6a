"""The probe of a network: how far it is from the exact posterior mean, and where its gradient's variance comes from."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import stablefield
from stablefield._progress import Progress
from stablefield._shapes import array_of_numbers, check_callable, found_device, whole_number
from stablefield.diffusion._objective import DenoiserLike
from stablefield.diffusion._weighting import Weighting
from stablefield.probing._fit import Fit, measure_fit
from stablefield.probing._fit_page import distance_chart, excess_chart, farthest, fit_page, logged_chart
from stablefield.probing._floor import LoggedExcess, LossFloor, logged_excess
from stablefield.probing._population import MOST, Samples, described, draw_population
from stablefield.probing._record import fit_record, fit_table
from stablefield.probing._text import sampled, spaced, with_error
from stablefield.probing._training import Training
from stablefield.probing._variance import find_noise_levels, measure_variance, widened
from stablefield.probing._variance_ledger import VarianceLedger, measure_ledger
from stablefield.report._cells import text_table
from stablefield.report._chart import LineChart
from stablefield.report._page import Page
from stablefield.report._result import Result, Tables

__all__ = ["NetworkProbe", "probe_network"]

# Lines of the table.
_LINES = 12
# Beyond these, more sources make the ledger no more accurate.
_MOST_SOURCES = 2048
# Noise levels that represent the training distribution.
_POINTS = 16_384


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class NetworkProbe(Result):
    """A network compared with the exact posterior mean over its data.

    Attributes:
        name: of the network, such as that of its run.
        description: a line that describes its data.
        step: its training step; None if unknown.
        fit: distance, loss and floor against the noise level.
        weighting: of the training loss.
        trained: noise levels of the training, its 1 % and its 99.9 % quantile.
        logged: loss minus floor over training, from a run's log.
        ledger: where the variance of a batch's gradient comes from; None for a network that is no module with weights.
        drawn_from: size of the data set, if the posterior is over a part of it.
        notes: notes on the network's run.
        seed: of all random draws.
        seconds: duration of the measurement.
        command: the command line that made it, for the report; empty for a call from Python.
    """

    name: str
    description: str
    step: int | None
    fit: Fit
    weighting: Weighting
    trained: tuple[float, float]
    logged: tuple[LoggedExcess, ...]
    ledger: VarianceLedger | None
    drawn_from: int | None
    notes: tuple[str, ...] = ()
    seed: int
    seconds: float
    command: str = ""

    def __str__(self) -> str:
        notes = [f"note: {note}" for note in self.notes]
        ledger = [] if self.ledger is None else [str(self.ledger)]
        return "\n".join([*notes, *self._notes(), self.summary, self._table(), *ledger])

    def _notes(self) -> list[str]:
        """Cautions for readers of these numbers beside `notes`, in lines that fit a terminal."""
        if self.drawn_from is None:
            return []
        whose = sampled(self.fit.samples, self.drawn_from)
        return [f"{whose}:\nthe posterior mean over them is not exactly the network's optimum"]

    @property
    def summary(self) -> str:
        """Where training can still gain most, among the noise levels that it draws, in a sentence."""
        fit, weight = self.fit, self._weight()
        excess = weight * fit.distance.mean
        worst = farthest(fit, self.weighting, self.trained)
        step = "The" if self.step is None else f"Step {self.step:,}: the"
        return (
            f"{step} network is farthest from the optimum at noise level {float(fit.noise_level[worst]):.2g},\nwhere "
            f"training can still lower the loss of {float((weight * fit.loss.mean)[worst]):.3g} by "
            f"{float(excess[worst]):.3g}."
        )

    def to_dict(self) -> dict[str, Any]:
        """All numbers and their context, as JSON values."""
        return {
            "stablefield": stablefield.__version__,
            "command": self.command,
            "run": self.name,
            "data": self.description,
            "weighting": str(self.weighting),
            "noise_levels_of_training": list(self.trained),
            "step": self.step,
            "seed": self.seed,
            "seconds": self.seconds,
            "drawn_from": self.drawn_from,
            "notes": list(self.notes),
            "fit": fit_record(self.fit),
            "logged": [entry.record() for entry in self.logged],
            "ledger": None if self.ledger is None else self.ledger.record(),
        }

    def tables(self) -> Tables:
        """Distance, loss and floor, a row per noise level."""
        return {"fit": fit_table(self.fit)}

    def charts(self) -> Mapping[str, LineChart]:
        """The distance, the loss above its floor, and the latter over training if there is a log."""
        charts = {
            "distance": replace(distance_chart(self.fit), title="Squared distance to the optimum"),
            "excess": replace(excess_chart(self.fit, self.weighting), title="Loss minus floor"),
        }
        over_training = logged_chart(self.logged)
        if over_training is not None:
            charts["training"] = replace(over_training, title="Loss minus floor over training")
        return charts

    def page(self) -> Page:
        """The report."""
        name = self.name if self.step is None else f"{self.name}, step {self.step:,}"
        over_training = logged_chart(self.logged)
        return fit_page(
            name,
            self.description,
            self.fit,
            self.weighting,
            self.summary,
            self.command,
            trained=self.trained,
            over_training=over_training,
            ledger=self.ledger,
            notes=[*self.notes, *(f"{note}.".replace("\n", " ") for note in self._notes())],
        )

    def _weight(self) -> Tensor:
        return self.weighting(self.fit.noise_level) / self.fit.dim

    def _table(self) -> str:
        fit, weight = self.fit, self._weight()
        rows: list[list[str]] = []
        for i in spaced(0, len(fit.noise_level), _LINES):
            distance, error = float(fit.distance.mean[i]) / fit.dim, float(fit.distance.error[i]) / fit.dim
            figures = (weight[i] * fit.loss.mean[i], weight[i] * fit.floor.mean[i], weight[i] * fit.distance.mean[i])
            rows.append(
                [
                    f"{float(fit.noise_level[i]):.3g}",
                    with_error(distance, error),
                    *(f"{float(figure):.3g}" for figure in figures),
                ]
            )
        return text_table(("noise level", "distance to mean / d", "loss", "floor", "loss - floor"), rows)


def probe_network(
    network: DenoiserLike,
    images: Samples,
    *,
    labels: Tensor | NDArray[np.int64] | None = None,
    by_class: bool = False,
    training: Training | None = None,
    noise_levels: Sequence[float] | Tensor | None = None,
    max_images: int = MOST,
    sources: int | None = None,
    log: Sequence[Mapping[str, Any]] = (),
    label_dropout: float = 0.0,
    name: str = "network",
    step: int | None = None,
    notes: Sequence[str] = (),
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> NetworkProbe:
    """Measure how far a network is from the exact posterior mean over its data, and what its gradient's variance comes from.

    `stablefield.probe` calls this for a run, and for data with a `network`.

    Args:
        network: D(x, sigma, class_labels=None) in noise-to-signal units, such as a `Denoiser`, on `device`.
        images: its training data: a set, or a tensor or array of shape (n, ...), as for `probe_data`.
        labels: class of each sample, integers of shape (n,), if the network sees the classes.
        by_class: the same with the classes of an image set.
        training: gives the loss weights, the noise levels and the batch; EDM's, and 512 rows or all samples, if None.
        noise_levels: where to measure, sigma / alpha, shape (L,); chosen from the data and the training if None.
        max_images: samples that represent the data set, drawn at random if there are more.
        sources: samples to make noisy rows from at each noise level, 512 if None; the ledger has 12 rows for each.
        log: lines of a run's metrics.jsonl, for the loss above the floor over training.
        label_dropout: share of the rows of that log whose label the network did not see.
        name: of the network, for the report.
        step: of training, for the report.
        notes: notes on the network, for the report.
        seed: of all random draws.
        device: where to compute; if None, a GPU if there is one.
        progress: called during the measurement.

    Raises:
        ValueError: if the data have nothing to measure, an argument does not fit, or the network returns another shape.
    """
    check_callable("network", network, "network(x, sigma), such as a Denoiser")
    began = time.monotonic()
    by_class = by_class or labels is not None
    population = draw_population(images, labels, max_images=max_images, by_class=by_class, seed=seed)
    population = population.to(found_device(device))
    training = Training(batch=min(512, len(population))) if training is None else training
    sources = 512 if sources is None else whole_number("sources", sources)
    trained = _trained(training)
    levels = (
        widened(find_noise_levels(population, seed=seed), *trained)
        if noise_levels is None
        else array_of_numbers("noise_levels", noise_levels)
    )
    fit = measure_fit(
        network,
        population,
        levels,
        labelled=by_class,
        rows=sources,
        seed=seed,
        progress=progress,
    )
    ledger = None
    if isinstance(network, nn.Module) and any(value.is_floating_point() for value in network.parameters()):
        ledger = measure_ledger(
            network,
            population,
            training,
            labelled=by_class,
            groups=max(24, 3 * min(sources, _MOST_SOURCES) // 32),
            seed=seed,
            progress=progress,
        )
    floor = LossFloor(noise_level=fit.noise_level, variance=fit.floor.mean, dim=fit.dim, weighting=training.weighting)
    low, high = trained
    if not bool(((fit.noise_level >= low) & (fit.noise_level <= high)).any()):
        notes = [*notes, f"training hardly draws these noise levels: it draws {low:.2g} to {high:.2g}"]
    if noise_levels is not None:
        notes = [*notes, "measured at the given noise levels only; it may be worse at others"]
    hidden = label_dropout if population.labels is not None else 0.0
    if any("bin_edges" in entry for entry in log) and (noise_levels is not None or hidden):
        # A bin of the log holds all noise levels of the training, of which the given ones may leave out some. Rows whose
        # label the network does not see have all classes for their posterior.
        whole = replace(population, labels=None)
        wide = find_noise_levels(whole, seed=seed)
        parts = [(whole, hidden), (population, 1 - hidden)] if hidden else [(population, 1.0)]
        floors = [
            share
            * measure_variance(
                part,
                wide,
                process=training.process,
                sizes=(),
                sources=max(3, min(sources, len(population))),
                seed=seed,
                progress=progress,
            ).dsm.mean
            for part, share in parts
        ]
        floor = replace(floor, noise_level=wide.double(), variance=torch.stack(floors).sum(0))
    return NetworkProbe(
        name=name,
        description=described(images)[1],
        step=step,
        fit=fit,
        weighting=training.weighting,
        trained=trained,
        logged=tuple(logged_excess(log, floor, training)),
        ledger=ledger,
        drawn_from=population.drawn_from,
        notes=tuple(notes),
        seed=seed,
        seconds=time.monotonic() - began,
    )


def _trained(training: Training) -> tuple[float, float]:
    """The 1 % and the 99.9 % quantile of the noise levels that a training draws, positive and finite."""
    u = torch.tensor([0.01, 0.999], dtype=torch.float64)
    level = training.process.noise_level(training.noise_levels.quantile(u, training.process)).double()
    # The time range may end where there is no noise, or no signal.
    drawn = training.levels(_POINTS)
    low, high = level.clamp(drawn.min(), drawn.max()).tolist()
    return low, high
