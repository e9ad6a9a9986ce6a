"""Compare the single-sample target with the stable one on one's own data: `compare` trains, scores and reports.

Both targets train from the same seeds on the same batches and noise; `comparison` says what a score is.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import stablefield
from stablefield._atomic_file import write_atomically
from stablefield._shapes import check_kind, found_device, whole_number
from stablefield.data._image_set import ImageSet, class_text
from stablefield.data._source import as_image_set, open_images
from stablefield.evaluation._extractor import Extractor, RawPixels
from stablefield.evaluation._inception import metric_name
from stablefield.report import Page
from stablefield.report._cells import text_table
from stablefield.report._chart import Chart
from stablefield.report._result import Result
from stablefield.training._comparison import (
    LEVELS,
    MIDDLE,
    NFE,
    Outcome,
    Scoring,
    TargetName,
    improvement,
    is_done,
    optimum_of,
    plan_scoring,
    rows_of,
    run_one,
    samples_of,
    spread,
)
from stablefield.training._comparison_page import comparison_page, distance_chart, level_chart
from stablefield.training._config import encode
from stablefield.training._estimate import estimate
from stablefield.training._feed import Feed
from stablefield.training._loop import Report, make_accelerator
from stablefield.training._observers import SelfCheck, check_samples
from stablefield.training._placement import placed
from stablefield.training._recipe import Recipe
from stablefield.training._recipes import largest_resolution, recipe_for
from stablefield.training._run import RECIPE, Images, make_plan
from stablefield.training._run_folder import RunConfig, RunFolder
from stablefield.training._stepper import Stepper

__all__ = ["Comparison", "ComparisonPlan", "PlannedRun", "compare"]

# Samples of a picture, and the seconds of a report: matplotlib is read, and a dozen charts are drawn.
_PICTURE, _REPORT = 64, 2.0
# Rows that the posterior mean is timed on.
_FEW, _SOME = 16, 128
# Samples of each target that a report shows.
_SHOWN = 36


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a comparison: a target and a seed, with the settings that config.json will hold."""

    target: TargetName
    seed: int
    config: RunConfig


@dataclass(frozen=True, kw_only=True)
class ComparisonPlan:
    """A comparison before it begins.

    Attributes:
        data: the images.
        runs: in the order in which they train.
        scoring: how often each is scored, and on how many samples.
        references: how many references each step takes, in words.
        noise_band: from which noise level on targets are stable, in words.
        device: where the runs train.
        training_seconds: about how long training takes from here.
        scoring_seconds: the same of scoring.
        other_seconds: the same of setting up, and of the report.
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


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Comparison(Result):
    """Both targets side by side; a notebook shows the report, and `save` also writes every score to a .csv file.

    Attributes:
        data_name: what the runs trained on.
        outcomes: the runs with their scores.
        frechet_name: what the distance of the samples is called.
        protocol: what was done, as JSON values.
        command: that made it.
        device: where the report's samples are drawn.
    """

    data_name: str
    outcomes: tuple[Outcome, ...]
    frechet_name: str
    protocol: Mapping[str, Any]
    command: str
    device: torch.device

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs."""
        return sorted({outcome.seed for outcome in self.outcomes})

    @property
    def summary(self) -> str:
        """What came out, each figure with its spread over seeds."""
        return summary(self.outcomes, self.seeds, self.frechet_name)

    def rows(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The table: its head, and a row for each seed, at the end of training."""
        head = (
            "seed", "distance DSM", "STF", "gain", f"{self.frechet_name} DSM", "STF", "s DSM", "STF",
        )  # fmt: skip
        last = {(o.target, o.seed): o.scores[-1] for o in self.outcomes}
        rows: list[tuple[str, ...]] = []
        for seed in self.seeds:
            a, b = last["dsm", seed], last["stf", seed]
            rows.append(
                (
                    str(seed),
                    f"{a.middle:.4f}",
                    f"{b.middle:.4f}",
                    f"{round(100 * improvement(self.outcomes, seed), 1) + 0.0:.1f}%",
                    f"{a.frechet:.3f} ± {a.frechet_error:.3f}",
                    f"{b.frechet:.3f} ± {b.frechet_error:.3f}",
                    f"{a.seconds:.0f}",
                    f"{b.seconds:.0f}",
                )
            )
        return head, rows

    def __str__(self) -> str:
        head, rows = self.rows()
        return "\n".join([text_table(head, rows), DISTANCE, self.summary])

    def to_dict(self) -> dict[str, Any]:
        """The protocol, the gains and every score, as JSON values."""
        return {
            "command": self.command,
            "protocol": dict(self.protocol),
            "less_distance_to_the_optimum": {str(seed): improvement(self.outcomes, seed) for seed in self.seeds},
            "runs": [
                {"target": o.target, "seed": o.seed, "scores": [dataclasses.asdict(score) for score in o.scores]}
                for o in self.outcomes
            ],
        }

    def charts(self) -> dict[str, Chart]:
        """Distance to the optimum over training, and by noise level at its end."""
        return {"distance": distance_chart(self.outcomes), "levels": level_chart(self.outcomes)}

    def page(self) -> Page:
        """The report, with samples of both targets of the first seed, drawn now."""
        first = [outcome for outcome in self.outcomes if outcome.seed == self.seeds[0]]
        config = RunFolder(first[0].folder).config()
        names = [class_text(number, config.class_names) for number in range(min(config.classes, _SHOWN))]
        in_order = f", in the order of the classes {', '.join(names)}" if names else ""
        grids = [
            (f"{o.target.upper()}, seed {o.seed}{in_order}", samples_of(o, range(_SHOWN), self.device)) for o in first
        ]
        return comparison_page(
            f"DSM and STF on {self.data_name}",
            self.summary,
            self.outcomes,
            grids,
            dict(self.protocol),
            self.frechet_name,
            self.command,
        )

    def save(self, path: str | Path) -> Path:
        """Write the numbers to a .json or .csv file, the report to .html, or the chart to .png; see `Result.save`."""
        path = Path(path)
        if path.suffix.lower() != ".csv":
            return super().save(path)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        head = ("target", "seed", "step", "seconds", "frechet", "frechet_error", "gradient_variance", "gradient_ratio")
        writer.writerow([*head, *(f"distance_{level:g}" for level in LEVELS)])
        for o in self.outcomes:
            for s in o.scores:
                numbers = (s.step, s.seconds, s.frechet, s.frechet_error, s.gradient_variance, s.gradient_ratio)
                writer.writerow([o.target, o.seed, *numbers, *s.distance])
        write_atomically(path, lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8"))
        return path


DISTANCE = f"distance: mean squared distance to the exact posterior mean, noise levels {MIDDLE[0]:g} to {MIDDLE[1]:g}"
"""What the column of distances is."""


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
    progress: Callable[[PlannedRun, Report], object] | None = None,
    on_run: Callable[[Outcome], object] | None = None,
    stop: Callable[[], bool] = lambda: False,
    command: str = "stablefield.compare(...)",
) -> Comparison | None:
    """Train with the single-sample target and the stable one from the same seeds, and report what came out.

    Args:
        images: what to train on, as for `train`.
        labels: as for `train`.
        seeds: of weights, batches and noise, or how many: 3 means seeds 0 to 2; two runs each.
        out: folder of the comparison, compare/DATA by default. One that was interrupted goes on where it stopped.
        recipe: how to train; by default one that suits the data and the device. Its target and seed are not used.
        steps: training steps of each run, in place of the recipe's.
        evaluations: how often each run is scored; up to 8 by default, no more than take as long as the training.
        samples: of each Frechet distance; 200 to 1,000 by default, no more than take as long as the training.
        extractor: from images to features; raw pixels by default.
        device: where to compute; a GPU if there is one.
        on_start: called with the plan before anything is trained.
        progress: called with the run and its report every few steps.
        on_run: called with every run that has ended.
        stop: asked after every step; if true, the run is saved and left.
        command: that makes this comparison, for the report.

    Returns:
        The comparison; None if it was stopped, and the same call goes on.

    Raises:
        ValueError: if an argument does not fit the data, or the folder holds runs with other settings.
        TrainingError: if a loss is not finite or the disk is full.
    """
    if recipe is not None:
        check_kind("recipe", recipe, Recipe, RECIPE)
    if isinstance(seeds, int):
        seeds = range(whole_number("seeds", seeds, 1))
    wanted = [whole_number(f"seeds[{k}]", seed, 0) for k, seed in enumerate(seeds)]
    if not wanted or len(set(wanted)) < len(wanted):
        raise ValueError(f"seeds={wanted}: pass at least one seed, and every seed once.")
    if evaluations is not None:
        whole_number("evaluations", evaluations, 1)
    where = found_device(device)
    data = _data(images, labels, recipe, where)
    count = len(data) if samples is None else whole_number("samples", samples, 1)
    check_samples(f"samples={count}", count, len(data))
    folder = Path("compare") / data.name if out is None else Path(out)
    chosen = recipe_for(data, accelerated=where.type == "cuda") if recipe is None else recipe
    if steps is not None:
        chosen = dataclasses.replace(chosen, steps=whole_number("steps", steps, 1))
    base = make_plan(data, dataclasses.replace(chosen, target="stf"), device=where)
    scoring = plan_scoring(base.config.recipe, len(data), evaluations=evaluations, samples=samples)
    runs = _runs(base.config, wanted, max(1, chosen.steps // scoring.count))
    extractor = RawPixels(data.shape) if extractor is None else extractor
    check = SelfCheck.prepare(data, extractor, samples=min(scoring.samples, len(data)))
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
        place = _folder(folder, run, data)
        if optimum is None and not is_done(place):
            optimum = optimum_of(data, where, labelled=run.config.classes > 0)
        outcome = run_one(
            place,
            data,
            check,
            run.config.recipe.checkpoint_every,
            where,
            report=None if progress is None else partial(progress, run),
            stop=stop,
            optimum=optimum,
        )
        if outcome is None:
            return None
        outcomes.append(outcome)
        if on_run is not None:
            on_run(outcome)
    name = metric_name("FID", "Frechet distance", extractor)
    protocol = {
        "stablefield": stablefield.__version__,
        "torch": torch.__version__,
        "device": str(where),
        "threads": torch.get_num_threads(),
        "data": {key: data.manifest[key] for key in ("name", "count", "shape", "sha256")},
        "recipe": encode(RunFolder(outcomes[0].folder).config().recipe),
        "seeds": wanted,
        "frechet": {
            "name": name,
            "samples": len(check.seeds),
            "floor": check.floor,
            "sampler": "heun, 18 steps, NFE 35",
        },
        "noise_levels": list(LEVELS),
        "middle": list(MIDDLE),
    }
    return Comparison(
        data_name=data.name,
        outcomes=tuple(outcomes),
        frechet_name=name,
        protocol=protocol,
        command=command,
        device=where,
    )


def _data(
    images: Images, labels: NDArray[np.int64] | Tensor | None, recipe: Recipe | None, device: torch.device
) -> ImageSet:
    if labels is not None or not isinstance(images, str | Path):
        return as_image_set("images", images, labels)
    limit = largest_resolution(accelerated=device.type == "cuda") if recipe is None else None
    return open_images(images, limit=limit)


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


def _folder(out: Path, run: PlannedRun, data: ImageSet) -> RunFolder:
    """The run's folder, made if it is not there.

    Raises:
        ValueError: if it holds a run with other settings.
    """
    path = _path(out, run)
    folder = RunFolder(path) if (path / "config.json").is_file() else RunFolder.create(path, run.config)
    found = folder.config()
    if found.recipe != run.config.recipe or found.manifest["sha256"] != data.manifest["sha256"]:
        raise ValueError(f"{path} holds a run with other settings: pass another out=FOLDER for this comparison.")
    return folder


def _seconds(
    runs: Sequence[PlannedRun],
    scoring: Scoring,
    data: ImageSet,
    check: SelfCheck,
    device: torch.device,
    out: Path,
) -> tuple[float, float, float]:
    """Seconds of training, of scoring and of the rest from here, from a few steps, samples and rows that are thrown away."""
    config = next(run.config for run in runs if run.target == "stf")
    left, begun = 0.0, 0
    for run in runs:
        folder = RunFolder(_path(out, run))
        newest = folder.newest() if (folder.path / "config.json").is_file() else None
        rest = 1 - (0 if newest is None else min(1, newest[1].step / run.config.recipe.steps))
        left, begun = left + rest, begun + (rest > 0)
    accelerator = make_accelerator(device)
    feed = Feed(data, config.recipe, device, labelled=config.classes > 0, placement=placed(config.recipe, data, device))
    found = estimate(config, feed, accelerator)
    # The second time: what making the first one loads is loaded once.
    began = time.perf_counter()
    Stepper(config, feed, accelerator)
    setup = time.perf_counter() - began
    feed.close()
    training = left * config.recipe.steps * found.seconds_per_step
    # A training step is three evaluations of its rows, and its target.
    per_row = max(0.0, found.seconds_per_step - found.target_seconds) / (3 * config.recipe.batch)
    scores = left * scoring.count * (scoring.rows * per_row + _reading_seconds(check, data, device))
    # A run makes three networks, its own and one for the gradients of each target, and a picture; the report draws two more.
    rest = begun * (3 * setup + NFE * _PICTURE * per_row) + 2 * NFE * _PICTURE * per_row + _REPORT
    if begun:
        rest += _optimum_seconds(data, device, labelled=config.classes > 0)
    return training, scores, rest


def _reading_seconds(check: SelfCheck, data: ImageSet, device: torch.device) -> float:
    """Time of a score's Frechet distance with its error, without drawing the samples."""
    images = torch.from_numpy(np.array(data.images[: check.batch])).to(device)
    began = time.perf_counter()
    check.read(lambda seeds: images[torch.arange(len(seeds), device=device) % len(images)])
    return time.perf_counter() - began


def _optimum_seconds(data: ImageSet, device: torch.device, *, labelled: bool) -> float:
    """Time of the exact posterior mean of all rows: what does not depend on their number, and what does."""
    times: list[float] = []
    for rows in (_FEW, _FEW, _SOME):  # what is slow at first is so once
        began = time.perf_counter()
        optimum_of(data, device, labelled=labelled, rows=rows)
        times.append(time.perf_counter() - began)
    each = max(0.0, (times[2] - times[1]) / (_SOME - _FEW))
    return times[2] + each * (rows_of(data) - min(_SOME, len(data)))


def _places(error: float) -> int:
    """As many decimals as tell an error to two digits; those of a usual figure where it is 0."""
    return min(6, max(0, 1 - math.floor(math.log10(error)))) if error > 0 else 3


def _rounded(value: float, places: int) -> str:
    """A number without the sign of a zero."""
    return f"{round(value, places) + 0.0:.{places}f}"


def _over_seeds(values: Sequence[float]) -> str:
    """A mean with its standard error over seeds, or alone where there is one seed."""
    found = spread(values)
    if found.error is None:
        return f"{found.mean:.3g}"
    places = _places(found.error)
    return f"{_rounded(found.mean, places)} ± {_rounded(found.error, places)}"


def _gain(values: Sequence[float]) -> str:
    """Shares over seeds in per cent, with what they vary by, or alone where there is one seed."""
    found = spread([100 * value for value in values])
    if found.error is None:
        return f"by {_rounded(found.mean, 1)}%"
    # Beyond a hundredth of a per cent, digits tell nothing.
    places = min(2, _places(found.error))
    mean, error, least, most = (_rounded(v, places) for v in (found.mean, found.error, found.least, found.most))
    error = error if float(error) else f"less than {10**-places:g}"
    return f"by {mean}% ± {error}% on average ({least}% to {most}%)"


def summary(outcomes: Sequence[Outcome], seeds: Sequence[int], name: str) -> str:
    """What came out, each figure with what it varies by over seeds.

    Args:
        outcomes: the runs, done.
        seeds: of them.
        name: of the distance of their samples.
    """
    gains = [improvement(outcomes, seed) for seed in seeds]
    better = sum(gain > 0 for gain in gains)
    frechet = {t: [o.scores[-1].frechet for o in outcomes if o.target == t] for t in ("dsm", "stf")}
    seconds = {t: float(np.mean([o.scores[-1].seconds for o in outcomes if o.target == t])) for t in ("dsm", "stf")}
    lower = sum(b < a for a, b in zip(frechet["dsm"], frechet["stf"], strict=True))
    source_only = len(seeds) == 1
    spreads = (
        "One seed shows no spread: pass more, such as 0, 1, 2. "
        if source_only
        else f"± is the standard error over {len(seeds)} seeds. "
    )
    many = "1 seed" if source_only else f"{len(seeds)} seeds"
    return (
        f"STF is nearer to the optimum at middle noise levels in {better} of {many}, {_gain(gains)}; its {name} is lower in "
        f"{lower} of {len(seeds)}: {_over_seeds(frechet['stf'])} against {_over_seeds(frechet['dsm'])}. {spreads}"
        f"Training took {seconds['stf']:.0f} s with STF, {seconds['dsm']:.0f} s with DSM."
    )
