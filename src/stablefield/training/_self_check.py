r"""A run's check of itself: the Frechet distance of a few samples during training, with its error and its floor.

A Frechet distance on n samples is biased upwards, by about c / n, and noisy. So a reading has three numbers:

- the value;
- its standard error, by the jackknife over g groups: with $\theta_{-j}$ the value without group j and $\bar\theta$
  their mean, $s^2 = \frac{g - 1}{g} \sum_j (\theta_{-j} - \bar\theta)^2$;
- the floor: the distance of n real images, drawn from the set (from the class of each seed, if a run has classes) with
  replacement, to the whole set, on average over up to 16 draws. A perfect model reads about the floor, so judge a model by
  its excess over the floor, in units of the standard error. (n different images of a set of N read less than a perfect
  model, and nothing at n = N.)

The seeds take classes in turn, in the proportions of the training data, so each group of the jackknife gets about the same
share of every class: otherwise its error would be that of the differences between classes.

Every check uses the same seeds, so the readings of a run differ by the model, not by the draw.

References:
    Efron, Stein, "The Jackknife Estimate of Variance", Annals of Statistics 1981.
    Chong, Forsyth, "Effectively Unbiased FID and Inception Score and Where to Find Them", CVPR 2020 (the bias).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield.data._image_set import ImageSet
from stablefield.diffusion._preconditioning import Denoiser
from stablefield.evaluation._extraction import Batch, ExtractorPass, extract, image_batches
from stablefield.evaluation._extractor import Extractor
from stablefield.evaluation._features import Gaussian, checked, fit_features, in_float64
from stablefield.evaluation._fid import distance_between
from stablefield.evaluation._inception import metric_name
from stablefield.evaluation._metric import Features
from stablefield.sampling._seeded_images import in_turn
from stablefield.training._run_config import RunConfig
from stablefield.training._samples import draw_samples

# Numbers that the draws of the floor hold together, unless two draws hold more.
_ENOUGH = 2**25

__all__ = ["FrechetObserver", "Reading", "SelfCheck", "check_samples", "jackknife_error"]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The result of one check."""

    name: str
    """Name of the distance."""
    value: float
    """The squared Frechet distance."""
    standard_error: float
    """Standard error of the value, over fresh samples of the same number."""
    floor: float
    """The value of as many real images, drawn with replacement."""
    count: int
    """Number of samples."""

    def __str__(self) -> str:
        return (
            f"{self.name} {self.value:.4g} ± {self.standard_error:.1g} "
            f"on {self.count:,} samples (as many real images: {self.floor:.4g})"
        )


@dataclass(frozen=True, kw_only=True)
class SelfCheck:
    """Measures a few samples of a model in training; `prepare` makes one per run.

    Any function of seeds that returns uint8 images (len(seeds), C, H, W) may draw them, such as `draw_samples`
    with a denoiser.
    """

    extractor: Extractor
    """Maps images to features."""
    reference: Gaussian
    """Gaussian fit to the features of the whole set."""
    floor: float
    """The distance of as many real images, drawn with replacement."""
    seeds: tuple[int, ...]
    """Seeds of the samples of every check."""
    batch: int = 250
    """Samples at a time."""
    groups: int = 20
    """Groups of the jackknife."""

    @classmethod
    def of_run(cls, config: RunConfig, data: ImageSet, extractor: Extractor, samples: int) -> "SelfCheck":
        """Prepare the check of a run, whose perfect model draws as the run's images are drawn; errors as of `prepare`.

        Args:
            config: the run's configuration.
            data: its images.
            extractor: maps images to features.
            samples: samples per check.
        """
        return cls.prepare(
            config.numbered(data),
            extractor,
            samples=samples,
            classes=config.proportional_classes,
            mirrored=config.recipe.mirror,
        )

    @classmethod
    def prepare(
        cls,
        images: ImageSet,
        extractor: Extractor,
        *,
        samples: int = 500,
        classes: Sequence[int] | None = None,
        mirrored: bool = False,
        batch: int = 250,
        groups: int = 20,
    ) -> "SelfCheck":
        """Extract the features of the real images once.

        Args:
            images: the training set.
            extractor: maps images to features.
            samples: samples per check; seeds 0 to samples - 1.
            classes: that the seeds take in turn, in a run that is conditioned on the images' classes; None without.
            mirrored: whether the run trains on the mirror images, too: a perfect model then draws them half of the time.
            batch: images at a time.
            groups: groups of the jackknife, at least 2.

        Raises:
            ValueError: if there are fewer than two samples, or real images, per group.
        """
        check_samples(f"samples={samples}", samples, len(images), groups)
        batches = image_batches(images.images, np.arange(len(images)), batch)
        (real,) = extract(batches, [ExtractorPass(extractor=extractor)], "real image")
        gaussian = real.gaussian
        rng = np.random.default_rng(0)
        draws = min(16, max(2, _ENOUGH // (samples * extractor.dim)))
        part = rng.integers(len(images), size=(draws, samples))
        if classes is not None and images.labels is not None:
            # As a perfect conditional model: a random image of the class of each seed.
            wanted = in_turn(classes, range(samples)).numpy()
            order, counts = (
                np.argsort(images.labels, kind="stable"),
                np.bincount(images.labels, minlength=max(classes) + 1),
            )
            first = np.cumsum(counts) - counts
            here = counts[wanted] > 0
            place = first[wanted] + rng.integers(np.maximum(counts[wanted], 1), size=part.shape)
            part[:, here] = order[place[:, here]]
        flips = rng.random(part.shape) < 0.5 if mirrored else np.zeros(part.shape, bool)
        turned, places = np.unique(part[flips], return_inverse=True)
        passes = [ExtractorPass(extractor=extractor, moments=False)]
        (mirror,) = extract(_mirror_batches(images, turned, batch), passes, "mirror image")
        # Row numbers of the images, and after them of the mirror images that are drawn.
        part[flips] = len(images) + places
        floor = fmean(
            distance_between(fit_features(_rows(real, mirror, torch.from_numpy(rows))), gaussian).value for rows in part
        )
        return cls(
            extractor=extractor,
            reference=gaussian,
            floor=floor,
            seeds=tuple(range(samples)),
            batch=batch,
            groups=groups,
        )

    def read_model(self, denoiser: Denoiser, config: RunConfig, device: torch.device) -> Reading:
        """Measure a run's model, of a conditional run on classes in the proportions of the training data."""
        classes = config.proportional_classes
        labels = None if classes is None else in_turn(classes, self.seeds)
        return self.read(lambda seeds: draw_samples(denoiser, config, seeds, device, classes), labels)

    def read(self, draw: Callable[[Sequence[int]], Tensor], labels: Tensor | None = None) -> Reading:
        """Draw the samples and measure them.

        Args:
            draw: maps seeds to images, uint8, shape (len(seeds), C, H, W).
            labels: classes that the seeds are given, shape (len(self.seeds),); None without.

        Raises:
            ValueError: if the extractor rejects the images, or their features are not finite.
        """
        parts = [
            self.extractor(draw(self.seeds[start : start + self.batch]))
            for start in range(0, len(self.seeds), self.batch)
        ]
        features = checked(
            "features of the samples", torch.cat(parts), 2 * self.groups, "a standard error takes groups"
        )
        return Reading(
            name=metric_name("FID", "Frechet distance", self.extractor),
            value=distance_between(fit_features(features), self.reference).value,
            standard_error=jackknife_error(features, self.reference, self.groups, labels),
            floor=self.floor,
            count=len(features),
        )


def _mirror_batches(images: ImageSet, rows: NDArray[np.int64], batch: int) -> Iterator[Batch]:
    """Batches of the mirror images of some rows; latents of mirrored images are drawn, each batch from another seed."""
    for part, numbers in image_batches(rows, np.arange(len(rows)), batch):
        yield torch.from_numpy(images.mirror_images(part.numpy(), int(numbers[0]))), numbers


def _rows(first: Features, second: Features, numbers: Tensor) -> Tensor:
    """The rows of these numbers, as if the second features followed the first."""
    count = len(first.matrix())
    found = first.matrix()[numbers.clamp(max=count - 1)]
    later = numbers >= count
    found[later] = second.matrix()[numbers[later] - count]
    return found


def check_samples(given: str, samples: int, images: int | None = None, groups: int = 20) -> None:
    """Check, before any work, that a self-check can use this number of samples.

    Args:
        given: the argument as the caller gave it, for the error, such as "samples=10".
        samples: number of samples.
        images: number of images in the data; None if not known yet.
        groups: groups of the jackknife.

    Raises:
        ValueError: if there are fewer than two samples, or real images, per group.
    """
    least = 2 * groups
    if images is not None and images < least:
        raise ValueError(
            f"the data have {images} images: a self-check takes at least {least} samples, and at least as many real images. "
            "Use more images."
        )
    if groups < 2 or samples < least:
        raise ValueError(
            f"{given}: a self-check takes at least 2 groups of 2 samples, and {least} samples in {groups} groups; pass "
            "500 or more."
        )


def jackknife_error(features: Tensor, reference: Gaussian, groups: int = 20, labels: Tensor | None = None) -> float:
    """Standard error of the squared Frechet distance of `features` to `reference`, over fresh samples.

    Args:
        features: shape (n, d), n >= 2 groups; n may be below d. Row k is in group k mod `groups`, counted in the order of
            the labels if there are any.
        reference: the other Gaussian, taken as exact.
        groups: number of groups, at least 2.
        labels: classes of the rows, shape (n,), if fresh samples have as many of each; None without.

    Raises:
        ValueError: if the features are not a valid array, or there are too few rows for the groups.
    """
    if groups < 2:
        raise ValueError(f"groups={groups}: a jackknife takes at least 2.")
    x = in_float64(checked("features", features, 2 * groups, f"each of {groups} groups takes 2 rows"))
    group = torch.arange(len(x), device=x.device) % groups
    if labels is not None:
        group[labels.to(x.device).argsort(stable=True)] = group.clone()
    # The cross term depends only on the rows times the reference's factor. n rows span at most n dimensions: in
    # coordinates of these the singular values are the same, and cheaper if there are fewer rows than columns.
    z = x @ reference.factor.T
    z = torch.linalg.qr(z.T, mode="r").R.T if len(z) < z.shape[1] else z
    values = [_distance(x[group != j], z[group != j], reference) for j in range(groups)]
    mean = math.fsum(values) / groups
    return math.sqrt((groups - 1) / groups * math.fsum((value - mean) ** 2 for value in values))


def _distance(x: Tensor, z: Tensor, reference: Gaussian) -> float:
    """The squared distance of rows `x` to the reference, from `z`, the rows times the reference's factor."""
    mean = x.mean(dim=0)
    trace = (x - mean).square().sum() / (len(x) - 1)
    cross = torch.linalg.svdvals((z - z.mean(dim=0)) / (len(x) - 1) ** 0.5).sum()
    return float((mean - reference.mean).square().sum() + trace + reference.trace - 2 * cross)


class FrechetObserver:
    """Measures a few samples at regular steps, with the standard error.

    Args:
        check: measures them.
        every: steps between checks.
        config: of the run.
        device: where to compute.
        tell: called with the step and the reading.
    """

    def __init__(
        self,
        check: SelfCheck,
        every: int,
        config: RunConfig,
        device: torch.device,
        tell: Callable[[int, Reading], None] | None = None,
    ) -> None:
        self._check, self._every, self._config, self._device, self._tell = check, every, config, device, tell

    @property
    def every(self) -> int:
        """Steps between checks."""
        return self._every

    def __call__(self, step: int, denoiser: Denoiser) -> dict[str, float]:
        """Measure the model."""
        reading = self._check.read_model(denoiser, self._config, self._device)
        if self._tell is not None:
            self._tell(step, reading)
        return {"frechet": reading.value, "frechet_error": reading.standard_error, "frechet_floor": reading.floor}
