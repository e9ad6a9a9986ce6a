"""The probe of data: the variance of training targets on them, its phases, and how many references to take."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import stablefield
from stablefield._progress import Progress
from stablefield._shapes import check_kind, found_device, number, shape_of
from stablefield.data._image_set import ImageSet
from stablefield.probing._advice import Advice, advise
from stablefield.probing._batch import BatchVariance, measure_batch
from stablefield.probing._label_shares import LabelShare, label_findings, label_record, label_shares
from stablefield.probing._phases import Edge, Phases, find_phases, share_above
from stablefield.probing._population import MOST, Samples, described, draw_population
from stablefield.probing._record import advice_record, curve_record, curve_table, phases_record
from stablefield.probing._text import sampled, spaced, with_error
from stablefield.probing._training import TRAININGS, Training
from stablefield.probing._variance import SIZES, VarianceCurve, measure_variance
from stablefield.probing._variance_page import phases_chart, sizes_chart, variance_chart, variance_page
from stablefield.report._cells import text_table
from stablefield.report._chart import LineChart
from stablefield.report._page import Page
from stablefield.report._result import Result, Tables
from stablefield.targets._band import NoiseBand, pick_noise_band
from stablefield.targets._pool import Pool

__all__ = ["Probe", "probe_data"]

# Shares of the variance of a batch's gradient below which to expect nothing, or little.
_NOTHING, _LITTLE = 0.01, 0.1
# How near the mean and standard deviation of float data are to those that `train` gives them, if they need no scaling.
_NEAR = 0.01
# Lines of the table that fit a terminal.
_LINES = 8


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Probe(Result):
    """The variance of training targets on data, and advice for a training run.

    `print(probe)` shows the advice and a table, `probe.page()` makes the report with charts, `probe.to_dict()` has all
    numbers.

    Attributes:
        name: of the data.
        description: a line that describes them.
        manifest: their description, as JSON values.
        training: the training that the advice is for.
        references: references that the training takes per step; None for all samples.
        noise_band: where references begin to matter, and how that was found.
        curve: the variance at the noise levels to show; phases and advice rest on levels chosen from the data.
        batch: the variance of a batch's gradient at the start of training.
        phases: where one sample decides, and where the posterior is the prior.
        advice: how many references to take.
        labels: how much of the rows of each label can gain, and of rows without one; empty without labels.
        seed: of all random draws.
        device: where it was measured.
        as_given: whether the data are floats that `stablefield.train` would scale first, and that were measured as they are.
        command: the command line that made it, for the report; empty for a call from Python.
    """

    name: str
    description: str
    manifest: Mapping[str, Any]
    training: Training
    references: int | None
    noise_band: NoiseBand
    curve: VarianceCurve
    batch: BatchVariance
    phases: Phases
    advice: Advice
    seed: int
    device: str
    labels: tuple[LabelShare, ...] = ()
    as_given: bool = False
    command: str = ""

    def __str__(self) -> str:
        lines = [line for text in (self.summary, *self.findings) for line in text.splitlines()]
        return "\n".join([*(textwrap.fill(line, 80) for line in lines), _table(self.curve)])

    @property
    def summary(self) -> str:
        """Whether to expect a gain from stable targets in this training, with the figures; three lines."""
        curve, batch, training = self.curve, self.batch, self.training
        taken = curve.samples if self.references is None else max(self.references, batch.batch)
        # References beyond a sample of the set are measured as the whole set.
        references = f"all {curve.set_size:,}" if taken >= curve.samples else f"{taken:,}"
        # A set that is no larger than the batch is the batch.
        found = batch.in_batch if taken == batch.batch < curve.samples else batch.of(taken, curve.samples)
        assert found is not None
        left, error = float(found.mean), float(found.error)
        shares = [
            f"{'usual ' if other.name == training.name else ''}{other.name} "
            f"{_percent(share_above(self.advice.band, other.noise_levels, other.process))}"
            for other in TRAININGS
            if other.name != training.name or not other.same_noise(training)
        ]
        own = _percent(share_above(self.advice.band, training.noise_levels, training.process))
        return (
            f"{training.name}, {training.noise}, batches of {batch.batch:,}, {references} references: "
            f"{_expect(1 - left, error)}.\n"
            f"Gradient's variance when training starts: {_ratio(left, error)} of the single sample's"
            f"{'' if curve.drawn_from is None else f', by a sample of {curve.samples:,}'}.\n"
            f"Rows that can gain: {own}; {', '.join(shares)}."
        )

    @property
    def findings(self) -> tuple[str, ...]:
        """Further advice, a sentence or two each."""
        curve, batch, best, whole = self.curve, self.batch, self.advice.recommended, self.advice.sizes[-1]
        everything, is_sample = best.size >= curve.samples, curve.drawn_from is not None
        every = f"all {curve.set_size:,}"
        size = every if everything else f"{best.size:,}"
        left = "none" if everything else f"{best.left:.1%} (± {best.error:.1%})"
        taken = f"the {curve.samples:,} sampled" if is_sample else every
        beside = [f"{_ratio(batch.in_batch.mean, batch.in_batch.error)} with the batch alone"]
        if not everything:
            beside.append(f"{_ratio(best.batch, best.batch_error)} with {size}")
        beside.append(f"{_ratio(whole.batch, whole.batch_error)} with {taken}")
        single, prior, band = self.phases.single_below, self.phases.prior_above, self.noise_band
        lines = [
            f"Take {size} references, or as many as fit: "
            f"a sample of {curve.samples:,} cannot say how many are enough in {self.training.name} training."
            if everything and is_sample
            else f"Take {size} references: they leave {left} of a row's variance in {self.training.name} training.",
            f"Gradient's variance with batches of {batch.batch:,}, single sample 100 %:\n{', '.join(beside)}.",
            f"Phases: one sample below noise level {_level(single)}, the prior above {_level(prior)}.",
            (
                "Noise band for these values as they are; train scales float data first, as open_images does:\n"
                if self.as_given
                else "Noise band that train uses:\n"
            )
            + (
                "none: every sample is its own only reference."
                if band.level == float("inf")
                else f"from {band.level:.3g}: below it references take less than {band.tolerance:.0%} of the weight, by "
                f"{band.rows:,} probed."
            ),
            f"Cost per step here: {_seconds(best.seconds)} for {size}"
            + (
                "."
                if everything
                else f", {_seconds(whole.seconds)} for {every}{'' if is_sample else ', which leave none'}."
            ),
        ]
        lines += label_findings(self.labels)
        if curve.drawn_from is not None:
            lines.append(f"{sampled(curve.samples, curve.drawn_from)}; only the noise band uses all of them.")
        return tuple(lines)

    def to_dict(self) -> dict[str, Any]:
        """All numbers and their context, as JSON values."""
        return {
            "stablefield": stablefield.__version__,
            "command": self.command,
            "data": dict(self.manifest),
            "seed": self.seed,
            "plan": self.training.name.lower(),
            "batch": self.training.batch,
            "training": self.training.record(),
            "noise_band": self.noise_band.record(),
            "values_as_given": self.as_given,
            "device": self.device,
            "summary": self.summary,
            "phases": phases_record(self.phases),
            "advice": advice_record(self.advice, self.batch),
            **({"labels": label_record(self.labels)} if self.labels else {}),
            "variance": curve_record(self.curve),
        }

    def tables(self) -> Tables:
        """The curves, a row per noise level."""
        return {"variance": curve_table(self.curve)}

    def charts(self) -> Mapping[str, LineChart]:
        """The variance, the phases, and the gain from more references."""
        charts = {
            "variance": variance_chart(self.curve, self.phases, self.advice),
            "phases": phases_chart(self.curve, self.phases),
            "references": sizes_chart(self.curve),
        }
        titles = {"variance": "Variance of the target", "phases": "The three phases", "references": "More references"}
        return {name: replace(chart, title=f"{titles[name]}: {self.name}") for name, chart in charts.items() if chart}

    def page(self) -> Page:
        """The report."""
        return variance_page(
            self.name,
            self.description,
            self.curve,
            self.phases,
            self.advice,
            self.batch,
            (self.summary, *self.findings),
            self.command,
            self.labels,
            as_given=self.as_given,
        )


def probe_data(
    images: Samples,
    *,
    labels: Tensor | NDArray[np.int64] | None = None,
    by_class: bool = False,
    training: Training | None = None,
    references: Sequence[int] = SIZES,
    references_in_training: int | None = None,
    noise_levels: Sequence[float] | Tensor | None = None,
    aim: float = 0.1,
    max_images: int = MOST,
    sources: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> Probe:
    """Measure the variance of training targets on data, and give advice for a training run.

    `stablefield.probe` calls this with the training that `stablefield.train` would choose for the data.

    Args:
        images: an image set, or a tensor or array of shape (n, ...), floating point as your network sees it, or uint8 that
            means x / 127.5 - 1.
        labels: class of each sample, integers of shape (n,), to keep posteriors within classes.
        by_class: the same with the classes of an image set.
        training: the training that the advice is for; if None, EDM in batches of 512, or of all samples if they are fewer.
        references: sizes of reference sets to measure; the whole set leaves no variance and is not sampled.
        references_in_training: references that the training takes per step; None for all.
        noise_levels: where to show the variance, sigma / alpha, shape (L,); chosen from the data if None. The advice always
            rests on levels chosen from the data.
        aim: share of each row's variance that may remain, between 0 and 1.
        max_images: samples that represent the data set, drawn at random if there are more.
        sources: samples to make noisy rows from; if None, all of a small set, else as many as two minutes allow.
        seed: of all random draws.
        device: where to compute; if None, a GPU if there is one.
        progress: called during the measurement.

    Raises:
        ValueError: if the data have nothing to measure, or an argument does not fit.
    """
    check_kind("images", images, (ImageSet, Tensor, np.ndarray), "an ImageSet, as open_images returns, or a tensor")
    sizes = set(shape_of("references", references))
    if any(size < 1 for size in sizes):
        raise ValueError(f"references is {tuple(references)}: pass sizes of at least 1.")
    number("aim", aim)
    if not 0 < aim < 1:
        raise ValueError(f"aim is {aim}: pass the share of the variance that may remain, between 0 and 1.")
    device = found_device(device)
    by_class = by_class or labels is not None
    population = draw_population(images, labels, max_images=max_images, by_class=by_class, seed=seed).to(device)
    training = Training(batch=min(512, len(images))) if training is None else training
    # The caller's labels are no classes of the set.
    names = images.class_names if isinstance(images, ImageSet) and labels is None else None
    if isinstance(images, ImageSet):
        values, labels = images.scaled(slice(None)), images.labels if labels is None else labels
    else:
        values = images
    classes = torch.as_tensor(labels) if by_class and labels is not None else None
    band = pick_noise_band(Pool(values, references_in_training, classes), device=device)
    if references_in_training is not None:  # measure this size, too
        sizes.add(references_in_training)

    def measured(levels: Sequence[float] | Tensor | None) -> VarianceCurve:
        return measure_variance(
            population,
            levels,
            process=training.process,
            sizes=sorted(sizes),
            sources=sources,
            seed=seed,
            progress=progress,
        )

    # The advice is about all noise levels of the training; those to be shown may leave out some.
    shown = None if noise_levels is None else measured(noise_levels)
    curve = measured(None)
    batch = measure_batch(population, curve, training, band=band.level, seed=seed, progress=progress)
    name, description, manifest = described(images)
    return Probe(
        name=name,
        description=description,
        manifest=manifest,
        training=training,
        references=references_in_training,
        noise_band=band,
        curve=curve if shown is None else shown,
        batch=batch,
        phases=find_phases(curve),
        advice=advise(curve, training, band=band.level, batch=batch, aim=aim),
        seed=seed,
        device=str(device),
        labels=() if classes is None else label_shares(band, classes, names, training),
        as_given=not isinstance(images, ImageSet) and not _scaled(population.data),
    )


def _table(curve: VarianceCurve) -> str:
    sizes = list(curve.stf)[-4:]
    columns = ("noise", "V_DSM", *(f"n={size}" for size in sizes), "source weight", "ESS")
    # Start at the last level without variance to remove.
    some = (curve.dsm.mean > 1e-4 * curve.total).nonzero()[:, 0]
    first = max(0, int(some[0]) - 1) if len(some) else 0
    rows: list[list[str]] = []
    for i in spaced(first, len(curve.noise_level), _LINES):
        # The ratio of two values near 0 is meaningless.
        shown = float(curve.dsm.mean[i]) > 1e-4 * curve.total
        rows.append(
            [
                f"{float(curve.noise_level[i]):.3g}",
                with_error(float(curve.dsm.mean[i]), float(curve.dsm.error[i])),
                *(f"{float(curve.left(size).mean[i]):.1%}" if shown else "-" for size in sizes),
                f"{float(curve.source_weight.mean[i]):.4f}",
                f"{float(curve.ess.mean[i]):,.1f}",
            ]
        )
    return f"V_DSM, and what is left of it with n references:\n{text_table(columns, rows)}"


def _scaled(values: Tensor) -> bool:
    """Whether the channels of float data have mean 0 and standard deviation 0.5, as `train` scales them; images have."""
    if values.dtype == torch.uint8:
        return True
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    std, mean = torch.std_mean(values, (0, *range(2, values.ndim)), correction=0)
    # A constant channel is 0.
    near = ((std - 0.5).abs() < _NEAR) | (std == 0)
    return bool((near & (mean.abs() < _NEAR)).all())


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"


def _expect(gain: float, error: float) -> str:
    """The verdict on a gain, as a share of the single sample's variance."""
    if gain < max(_NOTHING, 2 * error):
        return "expect nothing"
    return "expect little" if gain < _LITTLE else "worth it"


def _ratio(mean: float | Tensor | None, error: float | Tensor | None) -> str:
    assert mean is not None
    assert error is not None
    return f"{100 * float(mean):.1f} ± {max(0.1, 100 * float(error)):.1f} %"


def _level(edge: Edge | None) -> str:
    return "(outside the measured levels)" if edge is None else f"{edge.noise_level:.2g}"


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:,.1f} s"
    return f"{1000 * value:.0f} ms" if value >= 0.01 else f"{1000 * value:.2g} ms"
