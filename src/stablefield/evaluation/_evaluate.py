"""`evaluate` measures samples from a run, or any images, against real images.

An evaluation takes the name of a metric in `METRICS`, or any `Metric`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import fsum, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stablefield._commit import running_commit
from stablefield._distributed import Ranks
from stablefield._progress import Progress
from stablefield._shapes import check_callable, check_kind, flag, found_device, whole_number
from stablefield.data._collector import cache_folder
from stablefield.data._copies import copies, warn_of_copies
from stablefield.data._image_set import ImageSet, MissingSplitError, class_text
from stablefield.data._latents import decode
from stablefield.data._png import is_picture
from stablefield.data._source import Images
from stablefield.evaluation._extraction import Batch, ExtractorPass, extract, pass_for
from stablefield.evaluation._extractor import Extractor, RandomConvolutions, RawPixels, raw
from stablefield.evaluation._fid import Frechet
from stablefield.evaluation._inception import Inception
from stablefield.evaluation._inception_score import ClassifierScore
from stablefield.evaluation._kid import Kernel
from stablefield.evaluation._memorisation import Nearest
from stablefield.evaluation._metric import Features, Metric, MetricInput, Value
from stablefield.evaluation._per_class import ClassScores, matched_classes, of_class, values_of_class
from stablefield.evaluation._precision_recall import Coverage, Density, Precision, Recall
from stablefield.evaluation._protocol import Protocol, Score
from stablefield.evaluation._reference import ReferenceSet, is_kept, measure_reference
from stablefield.evaluation._result import Evaluation, Pictures
from stablefield.evaluation._sample_source import (
    ImageSource,
    Report,
    SampleSource,
    SamplingRecord,
    check_size,
    opened,
)
from stablefield.evaluation._time_estimate import TimeEstimate, feature_seconds, metric_seconds
from stablefield.evaluation._torchscript import TorchScriptExtractor

__all__ = ["DEFAULT_METRICS", "METRICS", "check_counts", "evaluate"]

METRICS: Mapping[str, Metric] = {
    "frechet": Frechet(),
    "kernel": Kernel(),
    "precision": Precision(),
    "recall": Recall(),
    "density": Density(),
    "coverage": Coverage(),
    "nearest": Nearest(),
    "classifier-score": ClassifierScore(),
}
"""The metrics by name. A new one has its own module, and one line here; CONTRIBUTING shows it."""

DEFAULT_METRICS = tuple(name for name, metric in METRICS.items() if metric.reads != "classifier")
"""The metrics that need no classifier."""

_SHOWN = 64


def evaluate(
    samples: Images | SampleSource,
    *,
    data: Images | Callable[[str], ImageSet],
    metrics: Sequence[str | Metric] = DEFAULT_METRICS,
    extractor: Extractor | None = None,
    classifier: Extractor | None = None,
    count: int | None = None,
    references: int | None = None,
    split: str = "train",
    held_out: Images | None = None,
    repeats: int = 1,
    seed: int = 0,
    per_class: bool = False,
    device: str | torch.device | None = None,
    batch: int = 64,
    cache: bool | str | Path = True,
    progress: Report | None = None,
    on_estimate: Callable[[TimeEstimate], object] | None = None,
) -> Evaluation:
    """Measure samples against real images.

    Started by torchrun or `accelerate launch`, the processes share the images; the numbers are the same, and each process
    gets them.

    Args:
        samples: images, float data, or a source that draws them, such as a run's `RunSource`.
        data: real images to measure against; or a function from the name of a split to an image set, also called for
            "train" (the whole training set, for memorisation) and "test" (held-out images; it raises MissingSplitError if
            there are none). Latents of images are decoded, if the samples are images.
        metrics: names in `METRICS`, or metrics. "frechet" is FID and "kernel" KID on FID's own Inception; "nearest" is
            memorisation, in pixels.
        extractor: maps images to features; by default FID's own Inception, and of float data the values themselves.
        classifier: maps images to logits, for "classifier-score".
        count: samples per repeat; by default all images, split among the repeats. A source has its own.
        references: number of real images, drawn at random; all by default.
        split: which split of `data`; of images that are given, the name under which the protocol records them. With
            "nearest", another split than "train" takes the name of the data or a function of the split.
        held_out: real images outside the training data, for "nearest"; by default the "test" split of `data`, if it is a
            name and has one, or else the part of its data that a run held out, which is never counted as training data.
        repeats: how many times to measure, each time on fresh samples; 3 gives minimum, mean and spread, as papers report.
        seed: seed of the choice of images for each repeat, if `samples` are images.
        per_class: also measure the samples of each class against the real images of that class, by the metrics that read the
            extractor; samples and real images need classes, matched by name, or by number if either has no names.
        device: where FID's Inception runs; a GPU if there is one.
        batch: images at a time in the extractor.
        cache: folder for the features of real images; the user's cache folder if True, none if False.
        progress: called with the stage and its progress.
        on_estimate: called with the estimated time, before drawing begins; the estimate takes a few batches.

    Raises:
        ValueError: if there are too few images for a metric, images differ in size or cannot be read, features are not
            finite, `per_class` is set and samples or real images have no classes, no metric takes `per_class` or
            `held_out`, or `metrics` holds several of one kind.
        TypeError: if an argument has the wrong type.
        ImportError: if the extractor's package, or safetensors with a cache, is not installed.

    Warns:
        ProtocolWarning: if the cached features of the real images come from another commit of the code.
        DamagedCacheWarning: if cached features are damaged; they are recomputed.
        UserWarning: if at least 1 % of the held-out images are training images, too.
    """
    chosen = _chosen(metrics, classifier)
    # Numbers of NumPy become plain ones, as torch and records take them.
    count = None if count is None else whole_number("count", count, 1)
    references = None if references is None else whole_number("references", references, 2)
    repeats, batch = whole_number("repeats", repeats, 1), whole_number("batch", batch, 1)
    seed = whole_number("seed", seed, 0)
    for name, network in (("extractor", extractor), ("classifier", classifier)):
        if network is not None and not (callable(network) and hasattr(network, "sha256")):
            raise TypeError(f"{name} is a {type(network).__name__}: pass an Extractor, such as RandomConvolutions().")
    check_kind("split", split, str, "the name of a split, such as 'train'")
    check_kind("cache", cache, (bool, str, Path), "a folder, True or False")
    for name, hook in (("progress", progress), ("on_estimate", on_estimate)):
        if hook is not None:
            check_callable(name, hook, f"{name}(report)")
    flag("per_class", per_class)
    if per_class and not any(metric.reads == "extractor" for metric in chosen):
        raise ValueError(
            "per_class=True: only metrics that read the extractor have scores by class, and metrics holds none: add one, "
            "such as frechet, or leave it out."
        )
    if held_out is not None and not any(metric.reads == "pixels" for metric in chosen):
        raise ValueError(
            "held_out is the control for nearest, and metrics holds none that reads pixels: add nearest, or leave it out."
        )
    opens = isinstance(data, str | Path) or callable(data)
    if split != "train" and not opens and any(metric.reads == "pixels" for metric in chosen):
        raise ValueError(
            f"split={split!r}: nearest compares samples with the training images, and data are other images: pass the name "
            "of the data or a function of the split, or leave one of the two out."
        )
    device = found_device(device)
    if isinstance(samples, str | Path | ImageSet | np.ndarray | Tensor):
        # Check the known counts before opening any file.
        check_counts(chosen, count, references)
        source: SampleSource = ImageSource(samples, count, repeats, seed, batch, progress)
    else:
        check_kind(
            "samples",
            samples,
            SampleSource,
            "images, their path, or a SampleSource; for a run call its evaluate(), for its samples pass their images",
        )
        source = samples
        if count is not None:
            raise ValueError(f"count={count}: the source draws {samples.count} samples per repeat; leave count out.")
    check_counts(chosen, source.count, references)
    for repeat in range(repeats):
        source.seeds(repeat)  # fails here, before any measurement, if seeds run out
    if per_class and source.labels(0, torch.arange(1)) is None:
        raise ValueError(
            f"per_class=True: {source.name} has no classes; evaluate a conditional run or images with classes, or leave it "
            "out."
        )
    kept = cache_folder() / "references" if cache is True else Path(cache) if cache else None

    def stored(name: str) -> ImageSet:
        images = opened("data", data(name) if callable(data) else data, name, progress)
        source.check("data", images)
        return images

    def part(name: str) -> ImageSet:
        return decoded(stored(name))

    def decoded(found: ImageSet) -> ImageSet:
        """Images: those of latents, if the samples are images."""
        if found.moments is None or source.floating:
            return found
        return decode(found, vae=source.autoencoder, device=device, progress=progress)

    ranks = Ranks.launched()
    # An array or an image set has no other splits.
    parts = part if isinstance(data, str | Path) or callable(data) else None
    found = stored(split)
    # Both fail here, before latents are decoded and anything is measured.
    ReferenceSet(images=found, split=split, count=references)
    if per_class:
        matched_classes(found, source.class_names)
    images = check_size("data", decoded(found), source.shape, floating=source.floating)
    some = ReferenceSet(images=images, split=split, count=references)
    groups: list[_Group] = []
    for reads, network in (("extractor", extractor), ("pixels", None), ("classifier", classifier)):
        its = tuple(metric for metric in chosen if metric.reads == reads)
        if not its:
            continue
        if reads == "pixels":
            # Memorisation needs the whole training set. Pixels need no cache.
            own = stored("train") if parts and split != "train" else found
            train = images if own is found else decoded(own)
            given = None if held_out is None else opened("held_out", held_out, "train", progress)
            if given is not None:
                source.check("held_out", given)
                given = decoded(given)
            others, outside = _held_out(given, parts, source), source.held_out(own)
            whole = ReferenceSet(images=train, split="train", mirrored=source.mirrored)
            control = None
            if others is not None:
                control = ReferenceSet(images=others, split="given" if held_out is not None else "test")
            if outside is not None:
                # No model can remember what it never saw, so these are no training images but their control.
                trained = np.delete(np.arange(len(train)), outside)
                whole = replace(whole, chosen=trained, choice="without the held-out images")
                if control is None:
                    control = ReferenceSet(images=train, split="train", chosen=outside, choice="held out")
            if control is not None and ranks.first:
                copied = copies(
                    control.images.images, whole.images.images, control.rows, whole.rows, mirrored=whole.mirrored
                )
                which = "held_out" if held_out is not None else f"the control ({control.split} split)"
                warn_of_copies(copied, len(control), which, "leave them out, or pass others as held_out")
            group = _Group(extractor=raw(images), metrics=its, references=whole, held_out=control)
        else:
            if network is None:
                network = raw(images) if source.floating else Inception(device=device)
            elif source.floating and isinstance(
                network, Inception | TorchScriptExtractor | RandomConvolutions | RawPixels
            ):
                raise ValueError(
                    f"{reads}={network.name} measures 8-bit images, and these are {images.images.dtype} data: leave it "
                    "out to measure the values themselves, or decode the data to images first."
                )
            group = _Group(
                extractor=network,
                metrics=its,
                references=some,
                cache=kept,
                per_class=per_class and reads == "extractor",
            )
        check_counts(its, source.count, len(group.references))
        groups.append(group)
    run = _Measurement(source, repeats, batch, ranks, progress)
    if on_estimate is not None and ranks.first:
        on_estimate(run.estimate(groups, device))
    return run.evaluation(groups)


def _held_out(
    images: ImageSet | None, parts: Callable[[str], ImageSet] | None, source: SampleSource
) -> ImageSet | None:
    """Images outside the training data; None if there are none."""
    if images is not None:
        return check_size("held_out", images, source.shape, floating=source.floating)
    try:
        found = None if parts is None else parts("test")
    except MissingSplitError:
        # Any other error, such as that of a damaged split, would otherwise take the control away in silence.
        return None
    return None if found is None else check_size("held_out", found, source.shape, floating=source.floating)


def check_counts(metrics: Sequence[Metric], samples: int | None, references: int | None) -> None:
    """Check, before reading or drawing any image, that there are enough for the metrics.

    Args:
        metrics: the metrics.
        samples: samples per repeat; None if not known yet.
        references: real images to measure against; None if not known yet.

    Raises:
        ValueError: naming the metric that needs more.
    """
    for metric in metrics:
        for what, count in (("samples", samples), ("reference images", references)):
            if count is not None and count < metric.least:
                raise ValueError(
                    f"there are {count} {what}, but {type(metric).__name__} takes at least {metric.least}: use more "
                    "(thousands, for a meaningful number), or leave this metric out."
                )


def _chosen(metrics: Sequence[str | Metric], classifier: Extractor | None) -> tuple[Metric, ...]:
    check_kind("metrics", metrics, (list, tuple), "a list of names and metrics")
    for one in metrics:
        check_kind("metrics", one, (str, Metric), "names of metrics, such as 'frechet', and metrics")
        if isinstance(one, str) and one not in METRICS:
            known = {"fid": "frechet", "kid": "kernel", "is": "classifier-score"}.get(one.lower(), "")
            meant = f" Did you mean {known!r}?" if known else ""
            raise ValueError(f"metrics holds {one!r}: there are {', '.join(METRICS)}.{meant}")
    if not metrics or len(set(metrics)) < len(metrics):
        raise ValueError(f"metrics={' '.join(map(str, metrics))}: name at least one, and each once.")
    chosen = tuple(METRICS[one] if isinstance(one, str) else one for one in metrics)
    kinds = [type(metric) for metric in chosen if any(type(metric) is type(known) for known in METRICS.values())]
    if twice := sorted({kind.__name__ for kind in kinds if kinds.count(kind) > 1}):
        raise ValueError(
            f"metrics holds several of {', '.join(twice)}, which would have one name in the results: measure them in "
            "several calls."
        )
    if any(metric.reads == "classifier" for metric in chosen) != (classifier is not None):
        raise ValueError(
            "metrics=classifier-score goes with classifier=NETWORK: the score needs the probabilities of a classifier, "
            "which neither the packaged Inception nor the other extractors have."
        )
    return chosen


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Metrics on the features of one extractor against one reference set."""

    extractor: Extractor
    metrics: tuple[Metric, ...]
    references: ReferenceSet
    cache: Path | None = None
    held_out: ReferenceSet | None = None
    per_class: bool = False

    @property
    def wanted(self) -> ExtractorPass:
        found = pass_for(self.extractor, self.metrics)
        return replace(found, rows=True) if self.per_class else found


@dataclass(frozen=True)
class _Measurement:
    """Measures the samples of several repeats."""

    source: SampleSource
    repeats: int
    batch: int
    ranks: Ranks
    progress: Report | None
    shown: list[tuple[Tensor, Tensor | None]] = field(default_factory=list[tuple[Tensor, Tensor | None]])

    def estimate(self, groups: Sequence[_Group], device: torch.device) -> TimeEstimate:
        """Estimate the time left, from a trial batch or two."""
        features = metrics = 0.0
        n, repeats, count = self.source.count, self.repeats, self.ranks.world_size
        for group in groups:
            wanted, real = group.wanted, group.references
            control = 0 if group.held_out is None else len(group.held_out)
            once = (0 if is_kept(real, wanted, group.cache) else len(real)) + control
            images = torch.from_numpy(np.array(real.images.images[: self.batch]))
            features += (repeats * n + once) * feature_seconds(wanted, images, device)
            metrics += metric_seconds(
                group.extractor, group.metrics, n, len(real), control, repeats, mirrored=group.references.mirrored
            ) * (2 if group.per_class else 1)
        sampling = repeats * self.source.seconds()
        return TimeEstimate(sampling=sampling / count, features=features / count, metrics=metrics)

    def evaluation(self, groups: Sequence[_Group]) -> Evaluation:
        """Every metric on every repeat, in the first process; each process gets the scores."""
        real = [self._real(group) for group in groups]
        values: list[list[list[Value]]] = [[] for _ in groups]
        kept: list[list[Features]] = [[] for _ in groups]
        for repeat in range(self.repeats):
            passes = [group.wanted for group in groups]
            features = extract(self._batches(repeat), passes, "sample", at_once=self.batch, ranks=self.ranks)
            if not self.ranks.first:
                continue
            if self.progress is not None:
                self.progress(Progress(stage="metrics", done=repeat, total=self.repeats))
            for group, (references, control), samples, found in zip(groups, real, features, values, strict=True):
                given = MetricInput(
                    samples=samples,
                    references=references,
                    extractor=group.extractor,
                    held_out=control,
                    mirrored=group.references.mirrored,
                )
                found.append([value for metric in group.metrics for value in metric(given)])
            for group, samples, own in zip(groups, features, kept, strict=True):
                if group.per_class:
                    own.append(samples)
        record = self.source.record(self.ranks)
        scores = [
            score for group, found in zip(groups, values, strict=True) for score in self._scores(group, found, record)
        ]
        classes = [
            one
            for group, own, (references, _) in zip(groups, kept, real, strict=True)
            if own
            for one in self._classes(group, own, references, record)
        ]
        if self.ranks.world_size > 1:
            records = [[one.to_dict() for one in found] for found in (scores, classes)]
            text = self.ranks.broadcast(json.dumps(records), "to compute the metrics")
            scores = [Score.from_dict(one) for one in json.loads(text)[0]]
            classes = [ClassScores.from_dict(one) for one in json.loads(text)[1]]
        samples, references = self._pictures(groups[0].references)
        return Evaluation(
            name=self.source.name,
            scores=tuple(scores),
            classes=tuple(classes),
            samples=samples,
            references=references,
        )

    def _classes(
        self, group: _Group, repeats: Sequence[Features], real: Features, record: SamplingRecord
    ) -> Iterator[ClassScores]:
        """The scores of each class, in the order of the real images' classes."""
        images = group.references.images
        numbered = matched_classes(images, self.source.class_names)
        assert images.labels is not None
        wanted, every = images.labels[group.references.rows], torch.arange(self.source.count)
        own = [numbered(labels) for r in range(self.repeats) if (labels := self.source.labels(r, every)) is not None]
        for number in range(images.classes):
            if self.progress is not None:
                self.progress(Progress(stage="classes", done=number, total=images.classes))
            references = of_class(real.matrix(), wanted, number)
            samples = [of_class(one.matrix(), labels, number) for one, labels in zip(repeats, own, strict=True)]
            # Every value is on the same number of samples.
            count = min(map(len, samples))
            values = values_of_class(group.metrics, group.extractor, [rows[:count] for rows in samples], references)
            counts = {"sample_count": count, "reference_count": len(references)}
            name = images.class_names[number] if images.class_names is not None else str(number)
            scores = self._scores(group, values, record, counts, {"class": class_text(number, images.class_names)})
            yield ClassScores(number=number, name=name, samples=count, references=len(references), scores=tuple(scores))

    def _real(self, group: _Group) -> tuple[Features, Tensor | None]:
        """Features of the real images, and of the held-out ones."""
        found = measure_reference(
            group.references,
            group.wanted,
            batch=self.batch,
            cache=group.cache,
            commit=running_commit(),
            ranks=self.ranks,
            progress=self.progress,
        )
        if group.held_out is None:
            return found, None
        control = group.held_out
        batches = control.batches(self.batch, self.ranks)
        only_rows = ExtractorPass(extractor=group.extractor, moments=False)
        return found, extract(batches, [only_rows], "held-out image", ranks=self.ranks)[0].matrix()

    def _batches(self, repeat: int) -> Iterator[Batch]:
        """The batches of a repeat; keep some images of the first one, with their classes, to show."""
        for images, numbers in self.source.batches(repeat, self.ranks, self.progress):
            if repeat == 0:
                self._show(images, numbers)
            yield images, numbers

    def _show(self, images: Tensor, numbers: Tensor) -> None:
        """Keep those images of a batch that are among the samples to show: a random choice, since images may be sorted.

        Each process keeps about as many as the first one shows.
        """
        chosen = np.random.default_rng(0).permutation(self.source.count)[: _SHOWN * self.ranks.world_size]
        here = torch.from_numpy(np.isin(numbers.numpy(), chosen))
        if bool(here.any()):
            labels = self.source.labels(0, numbers[here])
            self.shown.append((images[here], labels))

    def _scores(
        self,
        group: _Group,
        repeats: Sequence[Sequence[Value]],
        record: SamplingRecord,
        counts: Mapping[str, int] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> Iterator[Score]:
        """One score per number, from the values of every repeat; `counts` and `settings` add to the protocol."""
        seeds = tuple(found for repeat in range(self.repeats) if (found := self.source.seeds(repeat)) is not None)
        measured: dict[str, Any] = group.references.record(group.extractor) | asdict(record)
        measured |= {"sample_count": self.source.count, **(counts or {})}
        for same in zip(*repeats, strict=True):
            first, about = same[0], dict(settings or {})
            if group.held_out is not None and "held_out" in first.settings:
                # Numbers with another control are not comparable.
                of = group.held_out.record(group.extractor)
                about["held_out_images"] = f"{of['reference']}, {of['split']}, sha256 {of['reference_sha256']:.12}"
            errors = [value.standard_error for value in same if value.standard_error is not None]
            # Root mean square of the repeats' standard errors, if all have one.
            error = sqrt(fsum(one**2 for one in errors) / len(errors)) if len(errors) == len(same) else None
            protocol = Protocol(metric=first.name, settings={**first.settings, **about}, seeds=seeds, **measured)
            values = tuple(value.value for value in same)
            yield Score(values=values, standard_error=error, better=first.better, protocol=protocol)

    def _pictures(self, references: ReferenceSet) -> tuple[Pictures | None, Pictures | None]:
        """Some of the samples that this process saw, and some of the real images, drawn at random; None if no pictures."""
        if not is_picture(references.images.shape):
            return None, None
        rows = np.random.default_rng(0).permutation(references.rows)[:_SHOWN]
        of, labels = references.images, [classes for _, classes in self.shown if classes is not None]
        real = Pictures(
            images=np.array(of.images[rows]),
            labels=of.labels[rows] if labels and of.labels is not None else None,
            class_names=of.class_names,
        )
        if not self.shown:
            return None, real
        samples = Pictures(
            images=torch.cat([images for images, _ in self.shown])[:_SHOWN].numpy(),
            labels=torch.cat(labels)[:_SHOWN].numpy() if labels else None,
            class_names=self.source.class_names,
        )
        return samples, real
