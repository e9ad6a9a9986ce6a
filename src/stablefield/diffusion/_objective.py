r"""The training objective: a weighted squared error to a target.

$$ L = E\left[ w(s)\, \tfrac{1}{d} |D(x_t / \alpha; s) - \hat x_0|^2 \right], \qquad s = \sigma / \alpha . $$

With a stable target the loss of any network is lower than with the single sample by exactly the expectation of
$w(s) V / d$, where V is the posterior variance over the references: the two losses differ by a constant, so their gradients
agree in expectation. The objective reports this term for every row.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from stablefield._reading import readable
from stablefield._shapes import (
    as_device,
    check_callable,
    check_floating_dtype,
    check_generator,
    check_kind,
    check_labels,
    check_tensor,
    drawn_by,
    flag,
    number,
    per_row,
    shape_of,
    whole_number,
)
from stablefield.diffusion._importance_sampling import ImportanceSampling
from stablefield.diffusion._noise_levels import LogNormal, NoiseLevels, times_at, uniform_numbers
from stablefield.diffusion._process import Process
from stablefield.diffusion._weighting import EDMWeighting, Weighting
from stablefield.targets._references import InBatch
from stablefield.targets._stable_target import StableTarget
from stablefield.targets._target import Target

__all__ = ["DenoiserLike", "Draws", "Example", "Objective", "ObjectiveValue", "check_draws"]


class DenoiserLike(Protocol):
    """Any D(x, sigma) in noise-to-signal units, such as `Denoiser`."""

    def __call__(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """Estimate x0 of the shape of x (B, ...) at noise levels sigma (B,)."""
        ...


@dataclass(frozen=True)
class ObjectiveValue:
    """The loss of a batch and its parts.

    Attributes:
        loss: mean of row_loss, a scalar with gradients.
        row_loss: weighted squared error per dimension of each row, shape (B,), with gradients; with importance sampling,
            times the row's importance weight.
        noise_level: sigma / alpha of each row, shape (B,).
        variance_removed: the variance that the references removed from the row's target, w V / d in the units of the loss,
            shape (B,); 0 for the single-sample target. In expectation loss + variance_removed is the loss with the
            single-sample target.
        weight: importance weight of each row, shape (B,), which row_loss and variance_removed contain; None for 1.
    """

    loss: Tensor
    row_loss: Tensor
    noise_level: Tensor
    variance_removed: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True)
class Draws:
    """The random parts of a batch, except its references.

    Attributes:
        t: times, shape (B,).
        noise: standard normal, shape (B, ...).
        hidden: rows whose label the network does not see, bool (B,); None if no label is ever hidden.
        weight: importance weights, shape (B,); None if the times were drawn from the noise levels themselves.
    """

    t: Tensor
    noise: Tensor
    hidden: Tensor | None = None
    weight: Tensor | None = None

    def __getitem__(self, rows: slice) -> "Draws":
        """The draws of a part of the batch."""
        hidden, weight = (None if value is None else value[rows] for value in (self.hidden, self.weight))
        return Draws(self.t[rows], self.noise[rows], hidden, weight)


@dataclass(frozen=True)
class Example:
    """A prepared batch: the network's input and its target.

    Attributes:
        x: x_t / alpha, shape (B, ...).
        noise_level: sigma / alpha, shape (B,).
        seen: class that the network sees, integers (B,), -1 for none; or None.
        target: the regression target.
        weight: importance weights of the rows, shape (B,), or None.
    """

    x: Tensor
    noise_level: Tensor
    seen: Tensor | None
    target: Target
    weight: Tensor | None = None

    def __getitem__(self, rows: slice) -> "Example":
        """The example of a part of the batch, such as one of several batches whose target one call computed."""
        seen, weight = (None if value is None else value[rows] for value in (self.seen, self.weight))
        return Example(self.x[rows], self.noise_level[rows], seen, self.target[rows], weight)


@dataclass(frozen=True)
class Objective:
    """The training objective of a denoiser.

    Calling it takes three steps, which are also separate methods: `draw` the random parts, make an `example` of them,
    `evaluate` the denoiser. You may split the draws of a whole batch over processes, or to fit into memory.

    Args:
        process: how data become noise.
        noise_levels: distribution of the noise levels.
        weighting: loss weight as a function of the noise level.
        target: the regression target, such as `StableTarget(process, references=Pool(images))`; `DenoisingTarget(process)`
            is the usual single-sample loss.
        label_dropout: share of rows whose class label is hidden from the network (-1), for classifier-free guidance.
        draws_per_image: noisy samples k made from each image: a batch of B images has k B rows. `InBatch` references then
            hold each image k times, so it keeps its share of the weight; the target's ESS counts every copy, and its source
            weight is that of one.
        antithetic: make the draws of an image in pairs, with one noise level and with noise of opposite signs. Where the
            network's error is nearly linear in the noise, its odd part cancels in the mean over a pair. `draws_per_image` is
            then even.
        importance: draws the noise levels at which the gradient is large more often, with importance weights.

    Stratified noise levels (`NoiseLevels.stratified`), several draws per image and antithetic noise leave the distribution
    of every single row as it is, so the expectation of the loss and of its gradient stays the same; only the rows of a
    batch depend on each other. Importance sampling keeps both expectations by its weights. See "Levers" in the theory.

    Raises:
        ValueError: if `label_dropout` is not a probability, the target is for another process, `draws_per_image` is
            below 1 or odd with `antithetic`, or `importance` is for other noise levels.
    """

    process: Process
    _: KW_ONLY
    target: StableTarget
    noise_levels: NoiseLevels = field(default_factory=LogNormal)
    weighting: Weighting = field(default_factory=EDMWeighting)
    label_dropout: float = 0.0
    draws_per_image: int = 1
    antithetic: bool = False
    importance: ImportanceSampling | None = None

    def __post_init__(self) -> None:
        check_kind("process", self.process, Process, "a Process, such as EDM()")
        check_kind(
            "noise_levels", self.noise_levels, NoiseLevels, "a distribution of noise levels, such as LogNormal()"
        )
        check_callable("weighting", self.weighting, "weighting(noise_level), such as EDMWeighting()")
        check_kind("target", self.target, StableTarget, "StableTarget(process, references=Pool(images))")
        number("label_dropout", self.label_dropout)
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout is {self.label_dropout}: pass a probability, 0 to 1.")
        if self.target.process != self.process:
            raise ValueError(f"target is for {self.target.process}, the objective for {self.process}: use one process.")
        check_draws(self.draws_per_image, self.antithetic)
        if self.importance is not None:
            check_kind("importance", self.importance, ImportanceSampling, "ImportanceSampling(noise_levels, process)")
            made_for = (self.importance.noise_levels, self.importance.process)
            if made_for != (self.noise_levels, self.process):
                raise ValueError(
                    f"importance is for {made_for[0]} of {made_for[1]}, the objective has {self.noise_levels} of "
                    f"{self.process}: use one of each."
                )

    def __call__(
        self,
        denoiser: DenoiserLike,
        x0: Tensor,
        class_labels: Tensor | None = None,
        index: Tensor | None = None,
        *,
        augment_labels: Tensor | None = None,
        flip: Tensor | None = None,
        source_only: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> ObjectiveValue:
        """Draw noise for a batch and evaluate the loss.

        Draws everything from `generator`, in a fixed order: noise levels, noise, dropped labels, references.

        With `draws_per_image` k, the denoiser sees k B rows, those of an image one after the other, and the values of the
        result have k B rows.

        Args:
            denoiser: D(x, sigma, class_labels) in noise-to-signal units; called with class_labels and augment_labels only
                if they are given.
            x0: clean data, shape (B, ...), float32 or float64.
            class_labels: integers (B,), which also limit each row's references to its class; -1 in every row for no classes
                at all. Give samples without a label a separate one.
            index: each row's index in the data of a `Pool`, integers (B,).
            augment_labels: the network's input about each row's augmentation, shape (B, augment_dim).
            flip: mirrored rows, as in `StableTarget`.
            source_only: rows with other augmentations, as in `StableTarget`.
            generator: torch's global one if None.

        Returns:
            The loss with its parts.

        Raises:
            ValueError: as `StableTarget`; or if a drawn noise level is 0 or infinite.
        """
        check_callable("denoiser", denoiser, "denoiser(x, sigma)")
        check_generator("generator", generator)
        _check_data(x0)
        if class_labels is not None:
            class_labels = _checked_labels(class_labels, x0)
        if self.draws_per_image > 1:
            x0 = x0.repeat_interleave(self.draws_per_image, 0)
            class_labels, index, augment_labels, flip, source_only = (
                value.repeat_interleave(self.draws_per_image, 0) if isinstance(value, Tensor) else value
                for value in (class_labels, index, augment_labels, flip, source_only)
            )
        draws = self.draw(x0.shape, generator, device=x0.device, dtype=x0.dtype, labelled=class_labels is not None)
        example = self.example(x0, draws, class_labels, index, flip=flip, source_only=source_only, generator=generator)
        return self.evaluate(denoiser, example, augment_labels)

    def draw(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        labelled: bool = False,
    ) -> Draws:
        """Draw noise levels, noise and, if the rows are `labelled`, which labels to hide.

        Args:
            shape: of the noisy batch, (k B, ...) for B images with `draws_per_image` k.
            generator: torch's global one if None.
            device: where to put the draws; by default the generator's device.
            dtype: of the noise.
            labelled: whether the rows have class labels.

        Raises:
            ValueError: if a drawn noise level is 0 or infinite, or the rows are no multiple of `draws_per_image`.
        """
        shape = shape_of("shape", shape)
        if not shape:
            raise ValueError("shape is (): pass the shape of a batch, (B, ...).")
        check_generator("generator", generator)
        check_floating_dtype("dtype", dtype)
        flag("labelled", labelled)
        device = None if device is None else as_device("device", device)
        if device is not None and device.type == "meta":
            raise ValueError("device is 'meta', which holds no numbers: pass 'cpu' or 'cuda'.")
        if device is None:
            device = "cpu" if generator is None else generator.device
        source = device if generator is None else generator.device
        if shape[0] % self.draws_per_image:
            raise ValueError(
                f"shape={shape} has {shape[0]} rows, and draws_per_image={self.draws_per_image}: pass a multiple of it."
            )
        # What an antithetic pair shares is drawn once and repeated.
        pairs = 2 if self.antithetic else 1
        count = shape[0] // pairs
        u, weight = uniform_numbers(self.noise_levels, count, generator), None
        if self.importance is not None:
            u, weight = self.importance(u.to(device))
        t = times_at(self.noise_levels, u, self.process).to(device)
        level = self.process.noise_level(t)
        # On a GPU the host would wait for these values; target and weighting find the same faults there.
        if level.device.type == "cpu" and readable(level.device) and not bool(((level > 0) & level.isfinite()).all()):
            raise ValueError(
                f"the noise levels drawn run from {level.min():g} to {level.max():g}: they must be positive and finite; "
                f"change the range of {self.noise_levels}."
            )
        noise = torch.randn(count, *shape[1:], dtype=dtype, **drawn_by(generator), device=source).to(device)
        hidden = None
        if labelled and self.label_dropout > 0:
            hidden = torch.rand(count, **drawn_by(generator), device=source).to(device) < self.label_dropout
        if self.antithetic:
            t, noise = t.repeat_interleave(2), torch.stack([noise, -noise], 1).flatten(0, 1)
            hidden, weight = (None if value is None else value.repeat_interleave(2) for value in (hidden, weight))
        return Draws(t, noise, hidden, None if weight is None else weight.to(torch.float32))

    def example(
        self,
        x0: Tensor,
        draws: Draws,
        class_labels: Tensor | None = None,
        index: Tensor | None = None,
        *,
        flip: Tensor | None = None,
        source_only: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Example:
        """Add the drawn noise and compute the target.

        The arguments are those of `__call__`, for every row of `draws` its own.

        Raises:
            ValueError: as `StableTarget`; or if `InBatch` references would hold images unequally often, because the rows are
                no multiple of `draws_per_image`.
        """
        _check_data(x0)
        if (
            len(x0) % self.draws_per_image
            and isinstance(self.target.references, InBatch)
            and float(self.target.noise_band) < math.inf
        ):
            raise ValueError(
                f"x0 has {len(x0)} rows, and draws_per_image={self.draws_per_image}: InBatch() must hold each image equally "
                "often, or the target is biased, so pass all rows of each image, or use Pool(images)."
            )
        for name, value in (("index", index), ("flip", flip), ("source_only", source_only)):
            if value is not None:
                check_tensor(name, value, numbers=True)
        check_generator("generator", generator)
        check_kind("draws", draws, Draws, "what Objective.draw returns")
        seen = class_labels
        if class_labels is not None:
            class_labels = seen = _checked_labels(class_labels, x0)
            if draws.hidden is not None:
                seen = class_labels.masked_fill(draws.hidden, -1)
        t = draws.t
        x_t = self.process.perturb(x0, t, draws.noise)
        try:
            target = self.target(
                x0,
                x_t,
                t,
                seen,
                index,
                noise=draws.noise,
                reference_labels=class_labels,
                flip=flip,
                source_only=source_only,
                generator=generator,
            )
        except ValueError as error:
            renamed = _LABELS.sub("class_labels", str(error))
            if renamed == str(error):
                raise
            raise ValueError(renamed) from error
        x = x_t / per_row(self.process.alpha(t), x0)
        return Example(x, self.process.noise_level(t), seen, target, draws.weight)

    def evaluate(
        self, denoiser: DenoiserLike, example: Example, augment_labels: Tensor | None = None
    ) -> ObjectiveValue:
        """The loss of a denoiser on an example; arguments as in `__call__`.

        Raises:
            ValueError: if the denoiser returns another shape, or the weight is not finite.
        """
        check_callable("denoiser", denoiser, "denoiser(x, sigma)")
        if augment_labels is not None:
            check_tensor("augment_labels", augment_labels)
        check_kind("example", example, Example, "what Objective.example returns")
        x, level, seen = example.x, example.noise_level, example.seen
        # Check this before the network runs: afterwards the host would wait until a GPU has finished it.
        weight = self.weighting(level)
        if readable(weight.device) and not bool(weight.isfinite().all()):
            raise ValueError(
                f"{self.weighting} is not finite at noise levels from {level.min():g}: raise the lower end of "
                f"{self.noise_levels}."
            )
        if seen is None and augment_labels is None:
            estimate = denoiser(x, level)
        elif augment_labels is None:
            estimate = denoiser(x, level, seen)
        else:
            estimate = denoiser(x, level, seen, augment_labels)
        check_tensor("the denoiser's output", estimate)
        if estimate.shape != x.shape:
            raise ValueError(
                f"the denoiser returned shape {tuple(estimate.shape)} for x0 of shape {tuple(x.shape)}: return the same."
            )
        error = (estimate.to(torch.promote_types(estimate.dtype, torch.float32)) - example.target.x0).flatten(1)
        weight = weight if example.weight is None else weight * example.weight
        row_loss = weight.to(error.dtype) * error.square().mean(1)
        removed = weight * example.target.variance / math.prod(x.shape[1:])
        return ObjectiveValue(row_loss.mean(), row_loss, level, removed, example.weight)


def check_draws(draws_per_image: int, antithetic: bool) -> None:
    """Check that an image has at least one draw, and an even number of them if they come in antithetic pairs.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: naming the argument.
    """
    whole_number("draws_per_image", draws_per_image, 1)
    if flag("antithetic", antithetic) and draws_per_image % 2:
        raise ValueError(
            f"antithetic=True makes pairs of each image's draws, and draws_per_image is {draws_per_image}: pass an even "
            "number, such as draws_per_image=2."
        )


# The target's names for the labels of an objective, at the start of its messages.
_LABELS = re.compile(r"^(reference_)?labels\b")


def _check_data(x0: Tensor) -> None:
    check_tensor("x0", x0, batch=True)
    if not x0.is_floating_point():
        raise ValueError(f"x0 has dtype {x0.dtype}: it must be floating point (uint8 images: x0 / 127.5 - 1).")


def _checked_labels(labels: Tensor, x0: Tensor) -> Tensor:
    check_labels("class_labels", labels, len(x0))
    return labels.long()
