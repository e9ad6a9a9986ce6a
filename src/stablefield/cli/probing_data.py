"""The probe of data: the variance of training targets on them, its phases, and how many references to take."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.table import Table
from torch import Tensor

import stablefield
from stablefield.cli.bar import Bar
from stablefield.cli.console import console
from stablefield.cli.probe_files import make_folder, print_written, write_csv, write_json
from stablefield.cli.probe_tables import spaced, with_error
from stablefield.cli.probing import Probing
from stablefield.cli.recipes import chosen
from stablefield.data.image_set import ImageSet
from stablefield.diffusion.noise_levels import LogUniform, Uniform
from stablefield.diffusion.process import VE, VP, RectifiedFlow
from stablefield.diffusion.weighting import FlowWeighting, SNRWeighting
from stablefield.probing.advice import Advice, Training, advise
from stablefield.probing.batch import BatchVariance, measure_batch
from stablefield.probing.phases import Edge, Phases, find_phases, share_above
from stablefield.probing.record import advice_record, curve_record, curve_table, phases_record
from stablefield.probing.variance import VarianceCurve, measure_variance
from stablefield.probing.variance_page import phases_chart, sizes_chart, variance_chart, variance_page
from stablefield.report import write_chart, write_page
from stablefield.training.placement import resolve_band, resolve_references
from stablefield.training.recipe import Recipe

__all__ = ["Plan", "probe_data", "recipe_for", "training_for"]

Plan = Literal["auto", "edm", "ve", "vp", "flow"]
"""Trainings to advise on: what `train` would do with the data, or one by name."""

# Those with a name: what a sentence calls them, and what they are.
_PLANS = {
    "edm": ("EDM", Training()),
    "ve": ("VE", Training(process=VE(), noise_levels=LogUniform(), weighting=SNRWeighting())),
    "vp": ("VP", Training(process=VP(), noise_levels=Uniform(), weighting=SNRWeighting())),
    "flow": ("flow", Training(process=RectifiedFlow(), noise_levels=Uniform(0.0, 1.0), weighting=FlowWeighting())),
}
# Shares of the variance of a batch below which nothing, or little, is to be expected.
_NOTHING, _LITTLE = 0.01, 0.1
# Lines of the table that fit a terminal.
_LINES = 8


def recipe_for(images: ImageSet, probing: Probing, *, by_class: bool) -> Recipe:
    """What `train` would do with these data if it were told no more than their name, with its references resolved."""
    recipe = chosen("auto", images, accelerated=probing.device.type == "cuda")[1]
    recipe = dataclasses.replace(recipe, target="stf", noise_band="auto", conditional=by_class)
    references, _ = resolve_references(recipe, images, probing.device)
    return dataclasses.replace(recipe, references=references)


def training_for(plan: Plan, batch: int | None, recipe: Recipe) -> Training:
    """The training that --plan and --batch mean; what they leave open is as in `recipe`.

    Raises:
        ValueError: if the batch is below 1.
    """
    planned = (
        Training(process=recipe.process, noise_levels=recipe.noise_levels, weighting=recipe.weighting)
        if plan == "auto"
        else _PLANS[plan][1]
    )
    return dataclasses.replace(planned, batch=recipe.batch if batch is None else batch)


def probe_data(
    images: ImageSet,
    probing: Probing,
    *,
    sizes: Sequence[int],
    levels: Sequence[float] | None,
    plan: Plan,
    batch: int | None,
    aim: float,
    by_class: bool,
) -> None:
    """Measure the variance, print advice and a table, and write numbers, pictures and the report.

    The references, the batch and the noise band are those that `train` would take for these data, by the same calls. What
    is said first is said of them.

    Args:
        images: the data.
        probing: what every probe is told.
        sizes: of reference sets.
        levels: noise levels; chosen from the data if None.
        plan: the training to advise on.
        batch: its rows per step; as `train` has them if None.
        aim: share of each row's variance that may stay.
        by_class: whether posteriors stay within classes.

    Raises:
        ValueError: if the data have nothing to measure, a number does not fit, or the folder cannot be made.
    """
    out = make_folder(probing.out or Path("probes") / images.name)
    population = probing.population(images, by_class=by_class)
    recipe = recipe_for(images, probing, by_class=by_class)
    training = training_for(plan, batch, recipe)
    band, finding = resolve_band(recipe, images, probing.device)
    if isinstance(recipe.references, int):  # so that there is a figure for them
        sizes = sorted({*sizes, recipe.references})
    with Bar("measuring") as bar:
        curve = measure_variance(
            population,
            levels,
            process=training.process,
            sizes=sizes,
            sources=probing.sources,
            seed=probing.seed,
            progress=bar,
        )
    with Bar("measuring batches") as bar:
        together = measure_batch(population, curve, training, band=band, seed=probing.seed, progress=bar)
    phases = find_phases(curve)
    advice = advise(curve, training, band=band, batch=together, aim=aim)
    name = _PLANS[plan][0] if plan in _PLANS else type(training.process).__name__
    said = [
        _verdict(curve, advice, together, training, recipe, name),
        *_advice_lines(curve, phases, advice, together, name, finding),
    ]
    for line in said:
        console.print(line)
    console.print(_curve_lines(curve))
    record = {
        "stablefield": stablefield.__version__,
        "command": probing.command,
        "data": images.manifest,
        "seed": probing.seed,
        "plan": name.lower(),
        "batch": training.batch,
        "device": str(probing.device),
        "phases": phases_record(phases),
        "advice": advice_record(advice, together),
        "variance": curve_record(curve),
    }
    written = [write_json(out / "probe.json", record), write_csv(out / "variance.csv", curve_table(curve))]
    charts = {
        "variance.png": (variance_chart(curve, phases, advice), f"Variance of the target: {images.name}"),
        "phases.png": (phases_chart(curve, phases), f"The three phases: {images.name}"),
        "references.png": (sizes_chart(curve), f"More references: {images.name}"),
    }
    written += [write_chart(chart, out / file, title=title) for file, (chart, title) in charts.items() if chart]
    page = variance_page(images.name, images.describe(), curve, phases, advice, together, said, probing.command)
    written.append(write_page(page, out / "report.html"))
    print_written(out, written)


def _verdict(
    curve: VarianceCurve, advice: Advice, together: BatchVariance, training: Training, recipe: Recipe, name: str
) -> str:
    """Whether to expect anything of the training at hand, and by which figures."""
    taken = max(recipe.references, together.batch) if isinstance(recipe.references, int) else curve.samples
    references = f"all {curve.samples:,}" if taken >= curve.samples else f"{taken:,}"
    # A set that is no larger than the batch is the batch.
    found = together.in_batch if taken == together.batch < curve.samples else together.of(taken, curve.samples)
    assert found is not None
    left, error = float(found.mean), float(found.error)
    others = [
        f"{other} {_percent(share_above(advice.band, plan.noise_levels, plan.process))}"
        for other, plan in _PLANS.values()
        if other != name
    ]
    return (
        f"{name} training, batches of {together.batch:,}, {references} as references: {_expect(1 - left, error)}.\n"
        f"Variance of the sum over a batch: {_ratio(left, error)} of the single sample's.\n"
        f"Rows that can gain: {_percent(share_above(advice.band, training.noise_levels, training.process))}; "
        f"{', '.join(others)}."
    )


def _advice_lines(
    curve: VarianceCurve, phases: Phases, advice: Advice, together: BatchVariance, name: str, finding: str
) -> list[str]:
    best = advice.recommended
    everything = best.size >= curve.samples
    size = f"all {curve.samples:,}" if everything else f"{best.size:,}"
    whole = advice.sizes[-1]
    single, prior = phases.single_below, phases.prior_above
    left = "none" if everything else f"{best.left:.1%} (± {best.error:.1%})"
    beside = [f"{_ratio(together.in_batch.mean, together.in_batch.error)} with the batch alone"]
    beside += [
        f"{_ratio(entry.batch, entry.batch_error)} with {size}"
        for entry, size in ((best, size), *(() if everything else ((whole, f"all {curve.samples:,}"),)))
    ]
    lines = [
        f"Take {size} references: they leave {left} of a row's variance in {name} training.",
        f"Variance of the sum over a batch of {together.batch:,}, single sample 100 %:\n{', '.join(beside)}.",
        f"Phases: one sample below noise level {_level(single)}, the prior above {_level(prior)}.",
        f"Noise band, as train has it:\n{finding}.",
        f"Cost per step here: {_seconds(best.seconds)} for {size}"
        + ("." if everything else f", {_seconds(whole.seconds)} for all {curve.samples:,}, which leave none."),
    ]
    if curve.drawn_from is not None:
        lines.append(f"All but the band is said of {curve.samples:,} images drawn from {curve.drawn_from:,}.")
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"


def _expect(gain: float, error: float) -> str:
    """What a lower variance is worth, as a share of that of the single sample."""
    if gain < max(_NOTHING, 2 * error):
        return "expect nothing"
    return "expect little" if gain < _LITTLE else "worth it"


def _ratio(mean: float | Tensor | None, error: float | Tensor | None) -> str:
    assert mean is not None
    assert error is not None
    return f"{100 * float(mean):.0f} ± {max(1, round(100 * float(error)))} %"


def _curve_lines(curve: VarianceCurve) -> Table:
    sizes = list(curve.stf)[-4:]
    table = Table(
        box=None, pad_edge=False, title_justify="left", title="V_DSM, and what is left of it with n references"
    )
    for name in ("noise", "V_DSM", *(f"n={size}" for size in sizes), "source weight", "ESS"):
        table.add_column(name, justify="right", no_wrap=True)
    # From the last level at which there is nothing to remove.
    some = (curve.dsm.mean > 1e-4 * curve.total).nonzero()[:, 0]
    first = max(0, int(some[0]) - 1) if len(some) else 0
    for i in spaced(first, len(curve.noise_level), _LINES):
        cells = [f"{float(curve.noise_level[i]):.3g}", with_error(float(curve.dsm.mean[i]), float(curve.dsm.error[i]))]
        for size in sizes:
            # A ratio of two nothings tells nothing.
            shown = float(curve.dsm.mean[i]) > 1e-4 * curve.total
            cells.append(f"{float(curve.left(size).mean[i]):.1%}" if shown else "-")
        cells += [f"{float(curve.own_weight.mean[i]):.4f}", f"{float(curve.ess.mean[i]):,.1f}"]
        table.add_row(*cells)
    return table


def _level(edge: Edge | None) -> str:
    return "(not among those measured)" if edge is None else f"{edge.noise_level:.2g}"


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:,.1f} s"
    return f"{1000 * value:.0f} ms" if value >= 0.01 else f"{1000 * value:.2g} ms"
