"""Compare the single-sample target with the stable one on your data: `compare` trains, scores and reports.

Both targets train from the same seeds on the same batches and noise; `_scorer` defines the score.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield._progress import Progress
from stablefield._shapes import found_device, whole_number
from stablefield.data._image_set import ImageSet
from stablefield.data._source import Images
from stablefield.evaluation._extractor import Extractor, raw
from stablefield.evaluation._inception import metric_name
from stablefield.training._comparison import Comparison
from stablefield.training._config import encode
from stablefield.training._estimate import estimate_run
from stablefield.training._loop import Report
from stablefield.training._plan import images_and_recipe, make_plan
from stablefield.training._recipe import Recipe
from stablefield.training._records import read_lines
from stablefield.training._run_config import RunConfig
from stablefield.training._run_data import training_data
from stablefield.training._run_folder import RunFolder, is_run
from stablefield.training._scorer import is_done, optimum_of, run_one
from stablefield.training._scores import LEVELS, MIDDLE, Outcome, TargetName
from stablefield.training._scoring_plan import (
    NFE,
    SAMPLER,
    Scoring,
    check_settings,
    keep_settings,
    plan_scoring,
    rows_of,
    settings_of,
)
from stablefield.training._self_check import SelfCheck, check_samples

__all__ = ["ComparisonPlan", "PlannedRun", "compare"]

# Samples per picture, and seconds per report, for importing matplotlib and drawing a dozen charts.
_PICTURE, _REPORT = 64, 2.0
# Numbers of rows to time the posterior mean on.
_FEW, _SOME = 16, 128


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a comparison: a target and a seed, with the settings for config.json."""

    target: TargetName
    seed: int
    config: RunConfig


@dataclass(frozen=True, kw_only=True)
class ComparisonPlan:
    """A comparison before it begins.

    Attributes:
        data: the images.
        runs: the runs, in the order of training.
        scoring: the number of scores per run, and of samples per score.
        references: number of references per step, in words.
        noise_band: noise level from which targets are stable, in words.
        device: where the runs train.
        training_seconds: estimated time of the remaining training.
        scoring_seconds: estimated time of the remaining scores.
        other_seconds: estimated time of setup and report.
    """

    data: ImageSet
    runs: tuple[PlannedRun, ...]
    scoring: Scoring
    references: str
    noise_band: str
    device: torch.device
    training_seconds: float
    scoring_seconds: float
    other_seconds: float


def compare(
    images: Images,
    *,
    labels: NDArray[np.int64] | Tensor | None = None,
    seeds: int | Sequence[int] = (0, 1, 2),
    out: str | Path | None = None,
    recipe: Recipe | None = None,
    steps: int | None = None,
    evaluations: int | None = None,
    samples: int | None = None,
    extractor: Extractor | None = None,
    device: torch.device | str | None = None,
    on_start: Callable[[ComparisonPlan], object] | None = None,
    progress: Callable[[Progress], object] | None = None,
    on_run: Callable[[Outcome], object] | None = None,
    stop: Callable[[], bool] = lambda: False,
    command: str = "stablefield.compare(...)",
) -> Comparison:
    """Train with the single-sample target and the stable one from the same seeds, and report the results.

    Args:
        images: the training data, as for `train`.
        labels: as for `train`.
        seeds: seeds of weights, batches and noise, or their number: 3 means seeds 0 to 2; two runs each.
        out: folder of the comparison, compare/DATA by default. An interrupted comparison continues, with the same settings.
        recipe: how to train; by default one that suits the data and the device. Its target and seed are not used.
        steps: training steps of each run, in place of the recipe's.
        evaluations: most scores per run, evenly spaced; by default up to 8, so that scoring takes no longer than training.
        samples: samples per Frechet distance; by default 200 to 1,000, so that scoring takes no longer than training.
        extractor: maps images to features; raw pixels by default.
        device: where to compute; a GPU if there is one.
        on_start: called with the plan before training begins.
        progress: called with a run's finished steps, every few steps.
        on_run: called with every finished run.
        stop: called after every step but a run's last; if it returns True, the run is saved and training stops.
        command: the command or call to show in the report.

    Returns:
        The comparison. If `stop` ended it, it covers the finished seeds; `missing` lists the others, and the same call
        continues with them.

    Raises:
        ValueError: if an argument does not fit the data, or the folder holds runs or scores with other settings.
        TrainingError: if a loss is not finite or the disk is full.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "compare runs in one process, and several were started: start it without torchrun or accelerate launch."
        )
    given: Any = seeds
    if isinstance(given, Real):
        given = range(whole_number("seeds", given, 1))
    wanted = [whole_number(f"seeds[{k}]", seed, 0) for k, seed in enumerate(given)]
    if not wanted or len(set(wanted)) < len(wanted):
        raise ValueError(f"seeds={wanted}: pass at least one seed, and every seed once.")
    if evaluations is not None:
        whole_number("evaluations", evaluations, 1)
    where = found_device(device)
    data, chosen = images_and_recipe(images, labels, recipe, steps, where)
    count = len(data) if samples is None else whole_number("samples", samples, 1)
    check_samples(f"samples={count}", count, len(data))
    folder = Path("compare") / data.name if out is None else Path(out)
    base = make_plan(data, dataclasses.replace(chosen, target="stf"), device=where)
    scoring = plan_scoring(base.config.recipe, len(data), evaluations=evaluations, samples=samples)
    runs = _runs(base.config, wanted, scoring.every)
    extractor = raw(data) if extractor is None else extractor
    settings = settings_of(runs[0].config, data, extractor, scoring.samples)
    _check_begun(folder, runs, data, settings)
    check = SelfCheck.of_run(runs[0].config, data, extractor, scoring.samples)
    if on_start is not None:
        training, scored, other = _seconds(runs, scoring, data, check, where, folder)
        on_start(
            ComparisonPlan(
                data=data,
                runs=tuple(runs),
                scoring=scoring,
                references=base.references,
                noise_band=base.noise_band,
                device=where,
                training_seconds=training,
                scoring_seconds=scored,
                other_seconds=other,
            )
        )
    outcomes: list[Outcome] = []
    optimum = None
    for run in runs:
        place = _folder(folder, run, settings)
        if optimum is None and not is_done(place):
            optimum = optimum_of(run.config, data, where)
        outcome = run_one(
            place,
            data,
            check,
            run.config.recipe.checkpoint_every,
            where,
            report=None if progress is None else partial(_report, progress, run),
            stop=stop,
            optimum=optimum,
        )
        if outcome is None:
            break
        outcomes.append(outcome)
        if on_run is not None:
            on_run(outcome)
    done = [seed for seed in wanted if sum(outcome.seed == seed for outcome in outcomes) == 2]
    name = metric_name("FID", "Frechet distance", extractor)
    protocol = {
        "environments": _environments([outcome.folder for outcome in outcomes]),
        "data": {key: data.manifest[key] for key in ("name", "count", "shape", "sha256")},
        "recipe": encode(runs[0].config.recipe),
        "seeds": wanted,
        "frechet": {
            "name": name,
            "samples": len(check.seeds),
            "floor": check.floor,
            "sampler": SAMPLER,
        },
        "noise_levels": list(LEVELS),
        "middle": list(MIDDLE),
    }
    return Comparison(
        data_name=data.name,
        outcomes=tuple(outcome for outcome in outcomes if outcome.seed in done),
        missing=tuple(seed for seed in wanted if seed not in done),
        frechet_name=name,
        protocol=protocol,
        command=command,
        device=where,
    )


def _environments(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Where the runs were trained: the different entries of their environment.jsonl."""
    found: list[dict[str, Any]] = []
    for folder in folders:
        for line in read_lines(folder / "environment.jsonl"):
            entry = {name: value for name, value in line.items() if name not in ("step", "started")}
            if entry not in found:
                found.append(entry)
    return found


def _report(progress: Callable[[Progress], object], run: PlannedRun, report: Report) -> None:
    stage = f"seed {run.seed} {run.target.upper()}"
    progress(Progress(stage=stage, done=report.step, total=run.config.recipe.steps))


def _runs(config: RunConfig, seeds: Sequence[int], every: int) -> list[PlannedRun]:
    found: list[PlannedRun] = []
    targets: tuple[TargetName, ...] = ("dsm", "stf")
    for seed in seeds:
        for target in targets:
            recipe = dataclasses.replace(
                config.recipe, target=target, seed=seed, sample_every=0, checkpoint_every=every
            )
            found.append(PlannedRun(target=target, seed=seed, config=dataclasses.replace(config, recipe=recipe)))
    return found


def _path(out: Path, run: PlannedRun) -> Path:
    return out / f"{run.target}-seed{run.seed}"


def _begun(out: Path, run: PlannedRun) -> RunConfig | None:
    """The configuration in the run's folder; None if it has not begun."""
    path = _path(out, run)
    return RunFolder(path).config() if is_run(path) else None


def _check_begun(out: Path, runs: Sequence[PlannedRun], data: ImageSet, settings: Mapping[str, Any]) -> None:
    """Check, before any work, that the runs in the comparison's folder are these, and their scores of these settings.

    Raises:
        ValueError: if a run or its scores have other settings.
    """
    for run in runs:
        path, found = _path(out, run), _begun(out, run)
        if found is None:
            continue
        same = found.recipe == run.config.recipe and found.manifest["sha256"] == data.manifest["sha256"]
        if not same or found.proportional_classes != run.config.proportional_classes:
            raise ValueError(f"{path} holds a run with other settings: pass another out=FOLDER for this comparison.")
        training_data(found, data)  # of the labels; a run that has ended opens no data
        check_settings(path, settings)


def _folder(out: Path, run: PlannedRun, settings: Mapping[str, Any]) -> RunFolder:
    """The run's folder, created if it does not exist, with the settings of its scores."""
    path = _path(out, run)
    folder = RunFolder.create(path, run.config) if _begun(out, run) is None else RunFolder(path)
    keep_settings(path, settings)
    return folder


def _seconds(
    runs: Sequence[PlannedRun],
    scoring: Scoring,
    data: ImageSet,
    check: SelfCheck,
    device: torch.device,
    out: Path,
) -> tuple[float, float, float]:
    """Estimate the seconds left for training, scoring and the rest, from a few trial steps, samples and rows."""
    config = next(run.config for run in runs if run.target == "stf")
    left, begun = 0.0, 0
    for run in runs:
        folder = RunFolder(_path(out, run))
        newest = folder.newest() if is_run(folder.path) else None
        rest = 1 - (0 if newest is None else min(1, newest[1].step / run.config.recipe.steps))
        left, begun = left + rest, begun + (rest > 0)
    found = estimate_run(config, data, device)
    training = left * config.recipe.steps * found.seconds_per_step
    # A training step costs three evaluations of its rows, and its target.
    per_row = max(0.0, found.seconds_per_step - found.target_seconds) / (3 * config.recipe.batch)
    scores = left * scoring.count * (scoring.rows * per_row + _reading_seconds(check, data, device))
    # A run builds three networks, its own and one per target for gradients, and draws a picture; the report draws two more.
    rest = begun * (3 * found.setup_seconds + NFE * _PICTURE * per_row) + 2 * NFE * _PICTURE * per_row + _REPORT
    if begun:
        rest += _optimum_seconds(config, data, device)
    return training, scores, rest


def _reading_seconds(check: SelfCheck, data: ImageSet, device: torch.device) -> float:
    """Time for a score's Frechet distance and its error, without sampling."""
    images = torch.from_numpy(np.array(data.images[: check.batch])).to(device)
    began = time.perf_counter()
    check.read(lambda seeds: images[torch.arange(len(seeds), device=device) % len(images)])
    return time.perf_counter() - began


def _optimum_seconds(config: RunConfig, data: ImageSet, device: torch.device) -> float:
    """Time for the exact posterior mean of all rows: a constant part, and a part per row."""
    times: list[float] = []
    for rows in (_FEW, _FEW, _SOME):  # the first call is slower
        began = time.perf_counter()
        optimum_of(config, data, device, rows=rows)
        times.append(time.perf_counter() - began)
    each = max(0.0, (times[2] - times[1]) / (_SOME - _FEW))
    return times[2] + each * (rows_of(data) - min(_SOME, len(data)))
