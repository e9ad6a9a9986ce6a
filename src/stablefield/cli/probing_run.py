"""The probe of a run: how far its network is from the optimum, and its loss above the floor."""

import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import stablefield
from stablefield.cli.console import console
from stablefield.cli.probe_files import make_folder, print_written, write_csv, write_json
from stablefield.cli.probe_tables import spaced, with_error
from stablefield.cli.probing import Probing, read_levels
from stablefield.cli.sources import open_data
from stablefield.probing.advice import Training
from stablefield.probing.fit import Fit, measure_fit
from stablefield.probing.fit_page import distance_chart, excess_chart, fit_page, logged_chart
from stablefield.probing.floor import LossFloor, logged_excess
from stablefield.probing.record import fit_record, fit_table
from stablefield.probing.variance import find_noise_levels
from stablefield.report import write_chart, write_page
from stablefield.report.extra import require
from stablefield.training.model import open_model
from stablefield.training.run_folder import RunFolder

__all__ = ["probe_run"]

# Noisy rows per noise level.
_ROWS = 512
# Lines of the table.
_LINES = 12


def probe_run(folder: Path, probing: Probing, *, noise_levels: str) -> None:
    """Measure the network's distance to the optimum, print it, and write numbers, pictures and the report.

    Args:
        folder: of the run.
        probing: what every probe is told.
        noise_levels: as on the command line; chosen from the data if empty.

    Raises:
        ValueError: if the run or its data cannot be opened, a number does not fit, or the folder cannot be made.
        ImportError: if a package of the report is missing.
    """
    require("matplotlib", "drawing the network's error")
    require("jinja2", "writing the report")
    model = open_model(folder, device=probing.device)
    config, step = model.config, model.step
    for complaint in model.complaints:
        console.print(f"[yellow]passed over:[/] {complaint}")
    images = open_data(config.data, **config.opening)
    images = config.numbered(images)
    by_class = config.classes > 0
    population = probing.population(
        images,
        by_class=by_class,
        said="the posterior mean is that over {part}, which is not quite what the network was trained for",
    )
    levels = read_levels(noise_levels)
    found = find_noise_levels(population, seed=probing.seed) if levels is None else torch.tensor(levels)
    out = make_folder(probing.out or folder / "probe")
    rows = probing.sources or _ROWS
    began = time.monotonic()
    fit = measure_fit(model.denoiser, population, found, labelled=by_class, rows=rows, seed=probing.seed)
    recipe, weighting = config.recipe, config.recipe.weighting
    training = Training(
        process=recipe.process, noise_levels=recipe.noise_levels, weighting=weighting, batch=recipe.batch
    )
    floor = LossFloor(noise_level=fit.noise_level, variance=fit.floor.mean, dim=fit.dim, weighting=weighting)
    logged = logged_excess(list(RunFolder(folder).metrics()), floor, training)
    summary = _fit_line(fit, weighting, step)
    console.print(summary)
    console.print(_fit_lines(fit, weighting))
    record = {
        "stablefield": stablefield.__version__,
        "command": probing.command,
        "run": folder.name,
        "step": step,
        "seed": probing.seed,
        "seconds": time.monotonic() - began,
        "fit": fit_record(fit),
        "logged": [entry.record() for entry in logged],
    }
    written = [write_json(out / "probe.json", record), write_csv(out / "fit.csv", fit_table(fit))]
    written.append(write_chart(distance_chart(fit), out / "distance.png", title="Squared distance to the optimum"))
    written.append(write_chart(excess_chart(fit, weighting), out / "excess.png", title="Loss minus floor"))
    over_training = logged_chart(logged)
    if over_training is not None:
        written.append(write_chart(over_training, out / "training.png", title="Loss minus floor over training"))
    page = fit_page(
        f"{folder.name}, step {step:,}", images.describe(), fit, weighting, summary, probing.command, over_training
    )
    written.append(write_page(page, out / "report.html"))
    print_written(out, written)


def _fit_line(fit: Fit, weighting: Any, step: int) -> str:
    weight = weighting(fit.noise_level) / fit.dim
    excess = weight * fit.distance.mean
    worst = int(excess.argmax())
    return (
        f"Step {step:,}: the network is farthest from the optimum at noise level {float(fit.noise_level[worst]):.2g}, where "
        f"{float(excess[worst]):.3g} of the loss of {float((weight * fit.loss.mean)[worst]):.3g} can still be gained."
    )


def _fit_lines(fit: Fit, weighting: Any) -> Table:
    weight = weighting(fit.noise_level) / fit.dim
    table = Table(box=None, pad_edge=False)
    for name in ("noise level", "distance to mean / d", "loss", "floor", "loss - floor"):
        table.add_column(name, justify="right")
    for i in spaced(0, len(fit.noise_level), _LINES):
        distance, error = float(fit.distance.mean[i]) / fit.dim, float(fit.distance.error[i]) / fit.dim
        figures = (weight[i] * fit.loss.mean[i], weight[i] * fit.floor.mean[i], weight[i] * fit.distance.mean[i])
        table.add_row(
            f"{float(fit.noise_level[i]):.3g}", with_error(distance, error), *(f"{float(f):.3g}" for f in figures)
        )
    return table
