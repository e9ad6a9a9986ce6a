"""Scores of each class: the samples of a class against the real images of that class.

They come from the features of the whole evaluation, so they cost no further image. Classes are matched by their names, or by
their numbers if either side has no names. A class has few images, and a Frechet distance on few images is biased upwards:
`class_notes` says how few.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield.data._image_set import ImageSet, class_text
from stablefield.evaluation._extractor import Extractor
from stablefield.evaluation._features import Gaussian, fit_features, moments_of
from stablefield.evaluation._metric import HIGHER, LOWER, Features, Metric, MetricInput, Value
from stablefield.evaluation._protocol import Score, score_of
from stablefield.report._cells import Cell

__all__ = ["ClassScores", "class_columns", "class_notes", "matched_classes", "of_class", "values_of_class"]

_ARROWS = {LOWER: " ↓", HIGHER: " ↑"}
_FEW = 10_000


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """The scores of one class."""

    number: int
    """Number of the class in the real images."""
    name: str
    """Name of the class; its number if it has none."""
    samples: int
    """Samples of the class in each repeat."""
    references: int
    """Real images of the class."""
    scores: tuple[Score, ...]
    """The scores, as those of an evaluation; without those that take more images."""

    def __getitem__(self, metric: str) -> Score:
        """The score of that name, such as "FID".

        Raises:
            KeyError: if there is none; lists the others.
        """
        return score_of(self.scores, metric, f"class {self.name}")

    def to_dict(self) -> dict[str, Any]:
        """The scores as plain objects, for JSON."""
        counts = {"class": self.number, "name": self.name, "samples": self.samples, "references": self.references}
        return counts | {"results": [score.to_dict() for score in self.scores]}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: if an entry is missing or not valid.
        """
        try:
            number, samples, references = (int(record[name]) for name in ("class", "samples", "references"))
            scores = tuple(map(Score.from_dict, record["results"]))
            return cls(number=number, name=str(record["name"]), samples=samples, references=references, scores=scores)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the record of a class is incomplete ({error}): measure again.") from error


def matched_classes(real: ImageSet, class_names: Sequence[str] | None) -> Callable[[Tensor], NDArray[np.int64]]:
    """A function from class numbers of samples (B,) to those of the real images; -1 stays no class.

    Args:
        real: the real images.
        class_names: names of the samples' classes, if known.

    Raises:
        ValueError: if the real images have no classes, or lack one of the samples.
    """
    if real.labels is None:
        raise ValueError(f"per_class=True: data={real.name} has no classes; name data with classes, or leave it out.")
    numbers = np.arange(real.classes if class_names is None else len(class_names))
    if class_names is not None and real.class_names is not None:
        unknown = [name for name in class_names if name not in real.class_names]
        if unknown:
            listed = ", ".join(real.class_names[:20])
            raise ValueError(
                f"per_class=True: the samples have the class {unknown[0]!r}, which data={real.name} lacks; it has {listed}."
            )
        numbers = np.array([real.class_names.index(name) for name in class_names])

    def numbered(labels: Tensor) -> NDArray[np.int64]:
        found = labels.cpu().numpy()
        if found.max(initial=-1) >= min(len(numbers), real.classes):
            raise ValueError(
                f"per_class=True: the samples have the class {found.max()}, and data={real.name} has {real.classes} classes."
            )
        return np.where(found < 0, -1, numbers[np.maximum(found, 0)])

    return numbered


def values_of_class(
    metrics: Sequence[Metric], extractor: Extractor, samples: Sequence[Tensor], references: Tensor
) -> list[list[Value]]:
    """The numbers of one class on every repeat, of the metrics for which there are enough images.

    Args:
        metrics: the metrics.
        extractor: of the features.
        samples: features of the class's samples, shape (n, d) for each repeat, one n for all.
        references: features of its real images, shape (m, d).
    """
    fitting = [metric for metric in metrics if min(len(samples[0]), len(references)) >= metric.least]
    if not fitting:
        return [[] for _ in samples]
    real, found = _features(references), list[list[Value]]()
    for rows in samples:
        given = MetricInput(samples=_features(rows), references=real, extractor=extractor)
        found.append([value for metric in fitting for value in metric(given)])
    return found


class _FewFeatures(Features):
    """Features of few images, whose Gaussian is cheaper from the rows than from their covariance."""

    @cached_property
    def gaussian(self) -> Gaussian:
        """The Gaussian of mean and covariance."""
        return fit_features(self.matrix())


def _features(rows: Tensor) -> Features:
    return _FewFeatures(rows=rows, moments=moments_of(rows))


def class_columns(classes: Sequence[ClassScores]) -> tuple[list[str], list[list[Cell]]]:
    """A table of classes: its columns, of which the first three are class, samples and real images, and its rows."""
    named = {score.protocol.metric: score.better for one in classes for score in one.scores}
    short = [re.sub(r" \(.*", "", name) + _ARROWS.get(better, "") for name, better in named.items()]
    rows: list[list[Cell]] = []
    for one in classes:
        own = {score.protocol.metric: score.mean for score in one.scores}
        names = {one.number: one.name}
        text = class_text(one.number, [names.get(number, "") for number in range(one.number + 1)])
        rows.append([text, one.samples, one.references, *(own.get(name) for name in named)])
    return ["class", "samples", "real", *short], rows


def class_notes(classes: Sequence[ClassScores]) -> list[str]:
    """Cautions for readers of the scores of classes."""
    measured = [one for one in classes if one.scores]
    notes: list[str] = []
    fewest = min((min(one.samples, one.references) for one in measured), default=_FEW)
    if fewest < _FEW:
        notes.append(
            f"Scores of a class are on as few as {fewest:,} images. Frechet distance, precision and the like depend on that "
            "number: compare a class with itself in other results on as many images, not with other classes or the whole."
        )
    missing = [one.name for one in classes if not one.scores]
    if missing:
        listed = ", ".join(missing[:10]) + (f" and {len(missing) - 10:,} more" if len(missing) > 10 else "")
        notes.append(f"No scores for classes with too few samples or real images: {listed}.")
    return notes


def of_class(rows: Tensor, labels: NDArray[np.int64], number: int) -> Tensor:
    """The rows with one label."""
    return rows[torch.from_numpy(np.flatnonzero(labels == number))]
