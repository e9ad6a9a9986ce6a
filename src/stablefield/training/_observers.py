r"""Observers: who looks at a model in training, and what they report.

`FrechetObserver` measures few samples by a `SelfCheck`: a Frechet distance, with how noisy it is and what it is at best.

A Frechet distance on n samples is biased upwards, by about c / n, and scatters. So a reading is three numbers:

- the value;
- its standard error, by the jackknife over g groups: with $\theta_{-j}$ the value without group j and $\bar\theta$
  their mean, $s^2 = \frac{g - 1}{g} \sum_j (\theta_{-j} - \bar\theta)^2$;
- the floor: the distance of n real images, drawn from the set, to all of it. A perfect model reads about that, so
  what is above the floor, in units of the standard error, is what the samples say.

The same seeds at every check make the readings of one run differ by the model, not by the draw.

References:
    Efron, Stein, "The Jackknife Estimate of Variance", Annals of Statistics 1981.
    Chong, Forsyth, "Effectively Unbiased FID and Inception Score and Where to Find Them", CVPR 2020 (the bias).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stablefield.data._image_set import ImageSet
from stablefield.diffusion._preconditioning import Denoiser
from stablefield.evaluation._extraction import ExtractorPass, extract, image_batches
from stablefield.evaluation._extractor import Extractor
from stablefield.evaluation._features import Gaussian, checked, fit_features, in_float64
from stablefield.evaluation._fid import distance_between
from stablefield.evaluation._inception import metric_name
from stablefield.evaluation._reference import ReferenceSet
from stablefield.sampling._seeded_images import chunks_of, draw
from stablefield.sampling._solvers import SolverOptions

__all__ = ["FrechetObserver", "Reading", "SelfCheck", "check_samples", "jackknife_error", "samples"]

STEPS = 18


def samples(
    denoiser: Denoiser,
    shape: Sequence[int],
    seeds: Sequence[int],
    device: torch.device,
    labels: Tensor | None = None,
    sigmas: Tensor | None = None,
) -> Tensor:
    """Images of `seeds` by Heun's method, uint8, shape (len(seeds), C, H, W).

    Args:
        denoiser: D(x, sigma, class_labels=None).
        shape: of one image, (C, H, W).
        seeds: image k is a function of seeds[k].
        device: where to compute.
        labels: classes of the images, shape (len(seeds),); None for a network without classes.
        sigmas: the grid; EDM's of 18 steps by default.
    """
    options = SolverOptions(steps=STEPS)
    classes = None if labels is None else labels.to(device)
    ((_, images, _),) = draw(
        lambda _: denoiser if classes is None else lambda x, sigma: denoiser(x, sigma, classes),
        options,
        options.sigmas() if sigmas is None else sigmas,
        chunks_of(seeds, len(seeds)),
        shape=shape,
        device=device,
    )
    return images


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one check came to."""

    name: str
    """What the distance is called."""
    value: float
    """The squared Frechet distance."""
    standard_error: float
    """Of the value, over fresh samples of the same number."""
    floor: float
    """The value that as many real images have."""
    count: int
    """Number of samples."""

    def __str__(self) -> str:
        return (
            f"{self.name} {self.value:.4g} ± {self.standard_error:.1g} "
            f"on {self.count:,} samples (as many real images: {self.floor:.4g})"
        )


@dataclass(frozen=True, kw_only=True)
class SelfCheck:
    """Measures few samples of a model in training; made once per run by `prepare`.

    Any function of seeds that returns uint8 images (len(seeds), C, H, W) may draw them, such as `samples` of this module
    with a denoiser.
    """

    extractor: Extractor
    """From images to features."""
    reference: Gaussian
    """Of the features of the whole set."""
    floor: float
    """The distance of as many real images."""
    seeds: tuple[int, ...]
    """Which samples are drawn at every check."""
    batch: int = 250
    """Samples at a time."""
    groups: int = 20
    """Parts of the jackknife."""

    @classmethod
    def prepare(
        cls,
        images: ImageSet,
        extractor: Extractor,
        *,
        samples: int = 500,
        batch: int = 250,
        groups: int = 20,
    ) -> "SelfCheck":
        """Look at the real images once.

        Args:
            images: the training set.
            extractor: from images to features.
            samples: drawn at every check; seeds 0 to samples - 1.
            batch: images at a time.
            groups: parts of the jackknife, at least 2.

        Raises:
            ValueError: if there are fewer samples than two a group, or fewer real images than samples.
        """
        check_samples(f"samples={samples}", samples, len(images), groups)
        batches = image_batches(images.images, np.arange(len(images)), batch)
        (real,) = extract(batches, [ExtractorPass(extractor=extractor)], "real image")
        gaussian = real.gaussian
        part = ReferenceSet(images=images, split="train", count=samples).rows
        floor = distance_between(fit_features(real.matrix()[torch.from_numpy(part)]), gaussian).value
        return cls(
            extractor=extractor,
            reference=gaussian,
            floor=floor,
            seeds=tuple(range(samples)),
            batch=batch,
            groups=groups,
        )

    def read(self, draw: Callable[[Sequence[int]], Tensor]) -> Reading:
        """Draw the samples and measure them.

        Args:
            draw: images of seeds, uint8, shape (len(seeds), C, H, W).

        Raises:
            ValueError: if the images are not such, or their features are not finite.
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
            standard_error=jackknife_error(features, self.reference, self.groups),
            floor=self.floor,
            count=len(features),
        )


def check_samples(said: str, samples: int, images: int | None = None, groups: int = 20) -> None:
    """Find out before any work whether a self-check can be made of so many samples.

    Args:
        said: how the number was given, for the error, such as "samples=10".
        samples: how many.
        images: in the data; None while that is not known.
        groups: parts of the jackknife.

    Raises:
        ValueError: if there are fewer samples than two a group, or fewer real images than samples.
    """
    least = 2 * groups
    if images is not None and images < least:
        raise ValueError(
            f"the data have {images} images: a self-check takes at least {least} samples, and as many real images beside "
            "them. Take more images."
        )
    if groups < 2 or samples < least:
        raise ValueError(
            f"{said}: a self-check takes at least 2 groups of 2 samples, and in {groups} groups {least} samples; 500 or "
            "more are of use."
        )
    if images is not None and samples > images:
        raise ValueError(
            f"{said} is above the {images} images of the data: as many real images are measured beside them; pass at most "
            f"{images}."
        )


def jackknife_error(features: Tensor, reference: Gaussian, groups: int = 20) -> float:
    """Standard error of the squared Frechet distance of `features` to `reference`, over fresh samples.

    Args:
        features: shape (n, d), n >= 2 groups; n may be below d. Row k is in group k mod `groups`.
        reference: the other side, taken as exact.
        groups: how many parts, at least 2.

    Raises:
        ValueError: if the features are no valid array, or there are too few rows for the groups.
    """
    if groups < 2:
        raise ValueError(f"groups={groups}: a jackknife takes at least 2.")
    x = in_float64(checked("features", features, 2 * groups, f"each of {groups} groups takes 2 rows"))
    group = torch.arange(len(x), device=x.device) % groups
    # Rows times the other side's factor: all that the cross term depends on. Fewer rows than columns span as many
    # dimensions as they are, and in coordinates of these the singular values are the same and quickly found.
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
    """Measures few samples every so often, and says how noisy that is.

    Args:
        check: measures them.
        every: steps between looks.
        shape: of one image.
        device: where to compute.
        tell: called with the step and the reading.
    """

    def __init__(
        self,
        check: SelfCheck,
        every: int,
        shape: Sequence[int],
        device: torch.device,
        tell: Callable[[int, Reading], None] | None = None,
    ) -> None:
        self._check, self._every, self._shape, self._device, self._tell = check, every, shape, device, tell

    @property
    def every(self) -> int:
        """Steps between looks."""
        return self._every

    def __call__(self, step: int, denoiser: Denoiser) -> dict[str, float]:
        """Measure the model."""
        reading = self._check.read(lambda seeds: samples(denoiser, self._shape, seeds, self._device))
        if self._tell is not None:
            self._tell(step, reading)
        return {"frechet": reading.value, "frechet_error": reading.standard_error, "frechet_floor": reading.floor}
