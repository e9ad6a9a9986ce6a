"""`stablefield probe DATA|RUN`: see the variance of targets on data, or a run's network against the optimum."""

import contextlib
import csv
import io
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import stablefield
from stablefield.cli.console import console, relative
from stablefield.cli.settling import pick_device
from stablefield.cli.sources import open_data
from stablefield.data.image_set import ImageSet
from stablefield.diffusion.noise_levels import LogUniform, Uniform
from stablefield.diffusion.process import VE, VP, RectifiedFlow
from stablefield.diffusion.weighting import FlowWeighting, SNRWeighting
from stablefield.probe.advice import Advice, Training, advise
from stablefield.probe.bias import BiasCheck, TargetLike, check_bias
from stablefield.probe.faults import ClassesMixed, SourceLeftOut, SourceTwice
from stablefield.probe.fit import Fit, measure_fit
from stablefield.probe.floor import LossFloor, logged_excess
from stablefield.probe.phases import Edge, Phases, find_phases, share_above
from stablefield.probe.population import MOST, Population, draw_population
from stablefield.probe.record import (
    advice_record,
    bias_record,
    curve_record,
    curve_table,
    fit_record,
    fit_table,
    phases_record,
)
from stablefield.probe.variance import VarianceCurve, find_noise_levels, measure_variance
from stablefield.report import write_chart, write_page
from stablefield.report.extra import require
from stablefield.report.fit_page import distance_chart, excess_chart, fit_page, logged_chart
from stablefield.report.variance_page import phases_chart, sizes_chart, variance_chart, variance_page
from stablefield.targets.references import InBatch, Pool
from stablefield.targets.target import StableTarget
from stablefield.training.model import open_model

__all__ = ["Probe"]

PLANS = {
    "edm": ("EDM", Training()),
    "ve": ("VE", Training(process=VE(), noise_levels=LogUniform(), weighting=SNRWeighting())),
    "vp": ("VP", Training(process=VP(), noise_levels=Uniform(), weighting=SNRWeighting())),
    "flow": ("flow", Training(process=RectifiedFlow(), noise_levels=Uniform(0.0, 1.0), weighting=FlowWeighting())),
}
# Samples that a bias check looks at: the faults that it finds are those of the policy, not of the size.
_CHECKED = 4096
# Lines of the table that fit a terminal.
_LINES = 8


@dataclass(frozen=True)
class Probe:
    """See the variance of training targets on your data; or how far a run's network is from the optimum."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA|RUN")]
    """The data (digits, a folder or .zip of images, .npy, .npz, idx or CIFAR-10 files), or the folder of a run."""
    references: str = "16,64,256,1024,4096,all"
    """Sizes of reference sets to measure; the whole set leaves no variance and is not sampled."""
    noise_levels: str = ""
    """Where to measure, such as 0.5,1,2,5; chosen from the data if not given."""
    plan: Literal["edm", "ve", "vp", "flow"] = "edm"
    """The training to advise on: its noise levels and loss weights."""
    batch: int = 512
    """Rows per training step, for the cost."""
    aim: float = 0.1
    """Share of the targets' variance that may stay."""
    tolerance: float = 0.001
    """Where the noise band begins: the variance there, as a share of the data's."""
    by_class: bool = False
    """Keep posteriors within classes, as for a network that is told the class."""
    images: int = MOST
    """Take at most so many images for the data set, drawn at random."""
    sources: int | None = None
    """Images that noisy rows are made from; all of a small set, else as many as two minutes allow."""
    seed: int = 0
    """Decides all that is drawn."""
    check_bias: bool = False
    """Test instead that reference policies are unbiased on the data, and that planted faults are seen."""
    false_alarm: float = 0.001
    """Rate at which the bias check may fail an unbiased policy."""
    out: Path | None = None
    """Folder for numbers, pictures and the report; probes/NAME if not given."""
    device: str = ""
    """Where to compute; a GPU if there is one."""

    def run(self) -> int:
        """Measure, write and say what follows."""
        device = pick_device(self.device)
        if (Path(self.data) / "config.json").is_file():
            return self._probe_run(device)
        require("matplotlib", "drawing the variance")
        require("jinja2", "writing the report")
        sizes = _sizes(self.references)
        levels = _levels(self.noise_levels)
        images = open_data(self.data)
        if self.check_bias:
            return self._check(images, device)
        out = _folder(self.out or Path("probes") / images.name)
        population = self._population(images, self.images, device)
        with _Bar("measuring") as bar:
            curve = measure_variance(
                population,
                levels,
                process=self._training.process,
                sizes=sizes,
                sources=self.sources,
                seed=self.seed,
                progress=bar,
            )
        phases = find_phases(curve)
        advice = advise(curve, self._training, aim=self.aim, tolerance=self.tolerance)
        said = _advice_lines(curve, phases, advice, self.plan, self.tolerance)
        for line in said:
            console.print(line)
        console.print(_curve_lines(curve))
        record = {
            "stablefield": stablefield.__version__,
            "command": self._command,
            "data": images.manifest,
            "seed": self.seed,
            "plan": self.plan,
            "batch": self.batch,
            "device": str(device),
            "phases": phases_record(phases),
            "advice": advice_record(advice),
            "variance": curve_record(curve),
        }
        written = [_write_json(out / "probe.json", record), _write_csv(out / "variance.csv", curve_table(curve))]
        charts = {
            "variance.png": (variance_chart(curve, phases, advice), f"Variance of the target: {images.name}"),
            "phases.png": (phases_chart(curve, phases), f"The three phases: {images.name}"),
            "references.png": (sizes_chart(curve), f"More references: {images.name}"),
        }
        written += [write_chart(chart, out / file, title=title) for file, (chart, title) in charts.items() if chart]
        page = variance_page(images.name, images.describe(), curve, phases, advice, said, self._command)
        written.append(write_page(page, out / "report.html"))
        console.print(f"written to {relative(out)}: {', '.join(path.name for path in written)}")
        return 0

    @property
    def _training(self) -> Training:
        plan = PLANS[self.plan][1]
        return Training(
            process=plan.process, noise_levels=plan.noise_levels, weighting=plan.weighting, batch=self.batch
        )

    @property
    def _command(self) -> str:
        words = ["stablefield", "probe", self.data]
        for name in ("references", "noise_levels", "plan", "batch", "aim", "tolerance", "images", "sources", "seed"):
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default:
                words += [f"--{name.replace('_', '-')}", str(value)]
        return shlex.join([*words, *(["--by-class"] if self.by_class else [])])

    def _population(self, images: ImageSet, most: int, device: torch.device) -> Population:
        population = draw_population(images, most=most, by_class=self.by_class, seed=self.seed)
        if population.drawn_from is not None:
            console.print(
                f"[yellow]sampled:[/] {len(population):,} of {len(images):,} images stand for the data set (--images)"
            )
        group = None if population.group is None else population.group.to(device)
        return Population(population.data.to(device), group, population.drawn_from)

    def _check(self, images: ImageSet, device: torch.device) -> int:
        population = self._population(images, min(self.images, _CHECKED), device)
        out = _folder(self.out or Path("probes") / images.name)
        process, data, group = self._training.process, population.data, population.group
        size = min(256, len(population))
        # No more than the pool, which must hold the batch, and few enough that others are left without it.
        rows = min(128, max(2, len(population) // 3))
        sound: dict[str, TargetLike] = {
            "the batch": StableTarget(process, references=InBatch()),
            f"a pool of {size:,}": StableTarget(process, references=Pool(data, size, group)),
            f"all {len(population):,}": StableTarget(process, references=Pool(data, None, group)),
        }
        faulty: dict[str, TargetLike] = {
            "source left out": SourceLeftOut(population, size, process=process),
            "source held twice": SourceTwice(population, size, process=process),
        }
        if group is not None:
            faulty["classes mixed"] = ClassesMixed(population, size, process=process)
        results: dict[str, BiasCheck] = {}
        table = Table("references", "verdict", "p", "max |t|", "direction, noise level", box=None, pad_edge=False)
        with _Bar("testing") as bar:
            for number, (name, target) in enumerate((sound | faulty).items()):
                result = check_bias(
                    target, population, process=process, batch=rows, false_alarm=self.false_alarm, seed=self.seed
                )
                results[name] = result
                bar((number + 1) / len(sound | faulty))
                verdict = "no bias seen" if result.passed else "BIASED"
                where = f"{result.direction}, at {result.noise_level:.2g}"
                table.add_row(
                    name if name in sound else f"fault: {name}",
                    f"[{'green' if result.passed == (name in sound) else 'red'}]{verdict}[/]",
                    f"{result.p_value:.2g}",
                    f"{result.statistic:.1f}",
                    where,
                )
        console.print(table)
        looked = next(iter(results.values())).rows
        console.print(
            f"{looked:,} training rows each; an unbiased policy fails at a rate of {self.false_alarm:g}.\n"
            "The faults are planted, to show what the test sees on these data."
        )
        record = {"command": f"{self._command} --check-bias", "data": images.manifest, "seed": self.seed}
        record["checks"] = {name: {"planted": name in faulty, **bias_record(r)} for name, r in results.items()}
        console.print(f"written: {relative(_write_json(out / 'bias.json', record))}")
        return 0 if all(results[name].passed for name in sound) else 1

    def _probe_run(self, device: torch.device) -> int:
        require("matplotlib", "drawing the network's error")
        require("jinja2", "writing the report")
        folder = Path(self.data)
        model = open_model(folder, device=device)
        config, step = model.config, model.step
        for complaint in model.complaints:
            console.print(f"[yellow]passed over:[/] {complaint}")
        images = open_data(config.data, **config.opening)
        by_class = config.classes > 0
        population = draw_population(images, most=self.images, by_class=by_class, seed=self.seed)
        group = None if population.group is None else population.group.to(device)
        population = Population(population.data.to(device), group, population.drawn_from)
        if population.drawn_from is not None:
            console.print(
                f"[yellow]sampled:[/] the posterior mean is that over {len(population):,} of {len(images):,} images, which "
                "is not quite what the network was trained for"
            )
        levels = _levels(self.noise_levels)
        found = find_noise_levels(population, seed=self.seed) if levels is None else torch.tensor(levels)
        out = _folder(self.out or folder / "probe")
        rows = self.sources or 512
        began = time.monotonic()
        fit = measure_fit(model.denoiser, population, found, labelled=by_class, rows=rows, seed=self.seed)
        recipe, weighting = config.recipe, config.recipe.weighting
        training = Training(
            process=recipe.process, noise_levels=recipe.noise_levels, weighting=weighting, batch=recipe.batch
        )
        floor = LossFloor(noise_level=fit.noise_level, variance=fit.floor.mean, dim=fit.dim, weighting=weighting)
        logged = logged_excess(_log(folder), floor, training)
        summary = _fit_line(fit, weighting, step)
        console.print(summary)
        console.print(_fit_lines(fit, weighting))
        record = {
            "stablefield": stablefield.__version__,
            "command": self._command,
            "run": folder.name,
            "step": step,
            "seed": self.seed,
            "seconds": time.monotonic() - began,
            "fit": fit_record(fit),
            "logged": [entry.record() for entry in logged],
        }
        written = [_write_json(out / "probe.json", record), _write_csv(out / "fit.csv", fit_table(fit))]
        written.append(write_chart(distance_chart(fit), out / "distance.png", title="Squared distance to the optimum"))
        written.append(write_chart(excess_chart(fit, weighting), out / "excess.png", title="Loss minus floor"))
        over_training = logged_chart(logged)
        if over_training is not None:
            written.append(write_chart(over_training, out / "training.png", title="Loss minus floor over training"))
        page = fit_page(
            f"{folder.name}, step {step:,}", images.describe(), fit, weighting, summary, self._command, over_training
        )
        written.append(write_page(page, out / "report.html"))
        console.print(f"written to {relative(out)}: {', '.join(path.name for path in written)}")
        return 0


class _Bar:
    """A bar of progress, and a function of the share done."""

    def __init__(self, what: str) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(what, total=1.0)

    def __enter__(self) -> "_Bar":
        self._bar.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._bar.stop()

    def __call__(self, share: float) -> None:
        self._bar.update(self._task, completed=share)


def _advice_lines(curve: VarianceCurve, phases: Phases, advice: Advice, plan: str, tolerance: float) -> list[str]:
    best = advice.recommended
    everything = best.size >= curve.samples
    size = f"all {curve.samples:,}" if everything else f"{best.size:,}"
    whole = advice.sizes[-1]
    if advice.band is None:
        band = "Noise band: not found, the levels measured lie all above or all below its edge."
        shares = ""
    else:
        band = (
            f"Noise band: from {_level(advice.band)}. Below, STF is the single sample to {100 * tolerance:.2g} % of the "
            "variance."
        )
        parts = [
            f"{title} {share_above(advice.band.noise_level, p.noise_levels, p.process):.0%}"
            for title, p in PLANS.values()
        ]
        shares = f"Share of a training batch in the band: {', '.join(parts)}."
    single, prior = phases.single_below, phases.prior_above
    left = "none" if everything else f"{best.left:.1%} (± {best.error:.1%})"
    lines = [
        f"Take {size} references: they leave {left} of the variance in {PLANS[plan][0]} training.",
        f"Phases: one sample below noise level {_level(single)}, the prior above {_level(prior)}.",
        band,
        shares,
        f"Cost per step here: {_seconds(best.seconds)} for {size}"
        + ("." if everything else f", {_seconds(whole.seconds)} for all {curve.samples:,}, which leave none."),
    ]
    if curve.drawn_from is not None:
        lines.append(f"All of this is said of {curve.samples:,} images drawn from {curve.drawn_from:,}.")
    return [line for line in lines if line]


def _curve_lines(curve: VarianceCurve) -> Table:
    sizes = list(curve.stf)[-4:]
    table = Table(
        box=None, pad_edge=False, title_justify="left", title="V_DSM, and what is left of it with n references"
    )
    for name in ("noise", "V_DSM", *(f"n={size}" for size in sizes), "own weight", "ESS"):
        table.add_column(name, justify="right", no_wrap=True)
    # From the last level at which there is nothing to remove.
    some = (curve.dsm.mean > 1e-4 * curve.total).nonzero()[:, 0]
    first = max(0, int(some[0]) - 1) if len(some) else 0
    for i in _spaced(first, len(curve.noise_level), _LINES):
        cells = [f"{float(curve.noise_level[i]):.3g}", _with_error(float(curve.dsm.mean[i]), float(curve.dsm.error[i]))]
        for size in sizes:
            # A ratio of two nothings tells nothing.
            shown = float(curve.dsm.mean[i]) > 1e-4 * curve.total
            cells.append(f"{float(curve.left(size).mean[i]):.1%}" if shown else "-")
        cells += [f"{float(curve.own_weight.mean[i]):.4f}", f"{float(curve.ess.mean[i]):,.1f}"]
        table.add_row(*cells)
    return table


def _spaced(first: int, end: int, most: int) -> list[int]:
    return sorted(set(torch.linspace(first, end - 1, min(end - first, most)).round().long().tolist()))


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
    for i in _spaced(0, len(fit.noise_level), 12):
        distance, error = float(fit.distance.mean[i]) / fit.dim, float(fit.distance.error[i]) / fit.dim
        figures = (weight[i] * fit.loss.mean[i], weight[i] * fit.floor.mean[i], weight[i] * fit.distance.mean[i])
        table.add_row(
            f"{float(fit.noise_level[i]):.3g}", _with_error(distance, error), *(f"{float(f):.3g}" for f in figures)
        )
    return table


def _with_error(mean: float, error: float) -> str:
    return f"{mean:.3g} ± {error:.1g}" if error > 0 else f"{mean:.3g}"


def _level(edge: Edge | None) -> str:
    return "(not among those measured)" if edge is None else f"{edge.noise_level:.2g}"


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:,.1f} s"
    return f"{1000 * value:.0f} ms" if value >= 0.01 else f"{1000 * value:.2g} ms"


def _log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; one that a kill has cut off is passed over."""
    path = folder / "metrics.jsonl"
    entries: list[dict[str, Any]] = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def _sizes(text: str) -> tuple[int, ...]:
    sizes: list[int] = []
    for word in text.split(","):
        if word.strip().lower() in ("", "all"):
            continue
        try:
            sizes.append(int(word))
        except ValueError:
            raise ValueError(f"--references is {text}: {word} is no number; pass sizes such as 16,256,all.") from None
    if any(size < 1 for size in sizes):
        raise ValueError(f"--references is {text}: a set has at least 1 reference.")
    return tuple(sizes)


def _levels(text: str) -> list[float] | None:
    if not text.strip():
        return None
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--noise-levels is {text}: pass numbers such as 0.5,1,2.") from None


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {path} cannot be written ({error.strerror}): name another folder.") from error
    return path


def _write_json(path: Path, record: dict[str, Any]) -> Path:
    path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _write_csv(path: Path, table: tuple[tuple[str, ...], Sequence[Sequence[float | None]]]) -> Path:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table[0])
    writer.writerows([["" if cell is None else cell for cell in row] for row in table[1]])
    path.write_text(text.getvalue(), encoding="utf-8")
    return path
