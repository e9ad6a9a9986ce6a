r"""The loss that says how far a network is from the optimum, for anybody's training loop.

A diffusion loss does not go to 0: at each noise level even a perfect network keeps the posterior variance of the data, the
floor. `ExcessLoss` draws noisy rows once, computes the exact posterior mean $\mu$ and variance V of each over the training
data, and compares any network with them:

$$ w \tfrac1d E|D - x_0|^2 = w \tfrac1d E|D - \mu|^2 + w \tfrac1d E[V] . $$

References:
    Xu, Luo, Wang, He, Liu, "Diagnosing and Improving Diffusion Models by Estimating the Optimal Loss Value", 2025, arXiv
    2506.13763, which calls the floor the optimal loss value.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield._progress import Progress
from stablefield._shapes import check_callable, check_kind, check_tensor, found_device, is_integer, whole_number
from stablefield.data._image_set import ImageSet
from stablefield.diffusion._from_diffusers import Regression
from stablefield.diffusion._noise_levels import NoiseLevels, times_at
from stablefield.diffusion._process import EDM, Process, scales
from stablefield.diffusion._weighting import Weighting
from stablefield.probing._exact import ExactPosterior
from stablefield.probing._excess import Excess
from stablefield.probing._fit import find_optimum
from stablefield.probing._floor import LossFloor
from stablefield.probing._population import Population, Samples, draw_population
from stablefield.probing._prediction import Kind, Prediction, evaluated, placement, usual_noise_levels
from stablefield.probing._series import Series

__all__ = ["ExcessLoss"]

# Noise levels at which the floor is known to `of`, and how much of training's noise lies between the outer ones.
_FLOOR_LEVELS, _FLOOR_SHARE = 48, 0.9998


@dataclass(frozen=True)
class _Rows:
    """Noisy rows of one bin: x_t and x0 (R, ...), t (R,) float64 on the CPU, and the classes that the network sees."""

    t: Tensor
    x_t: Tensor
    x0: Tensor
    labels: Tensor | None


@dataclass(frozen=True)
class _Bin:
    """A bin's rows with the posterior mean (R, ...), variance and loss weight (R,); and held-out rows at the same noise."""

    rows: _Rows
    mean: Tensor
    variance: Tensor
    weight: Tensor
    held_out: _Rows | None


class ExcessLoss:
    """Compares networks with the exact optimum of their training, on rows and noise drawn once.

    `excess(model)` returns an `Excess`: the loss, its floor, the difference of both and the distance to the exact posterior
    mean, by noise level and over all of training, each with its standard error, and the held-out loss if there are held-out
    samples. `excess.of(row_loss, noise_level)` subtracts the floor from the loss of your own rows.

    With `labels` the network sees the class of every row that `excess(model)` measures. It never measures a row whose label
    is dropped for guidance; `excess.of(row_loss, noise_level, labels)` takes such rows, with a floor of their own.

    The optimum is that of training which draws every sample of `data` equally often and as it is. If training flips samples
    at random and the network does not see the flip, pass both, `torch.cat([images, images.flip(-1)])`, and labels twice. If
    it draws samples unequally often, pass each as often as it comes, `images.repeat_interleave(times, 0)` with whole numbers
    `times` (n,), and its labels likewise; otherwise all numbers are those of equal draws. Other random augmentation has no
    exact optimum here. The same holds for `held_out`.

    The posterior costs a pass over the population for every row, once, here; a call costs the network on `levels` x `rows`
    rows, twice that with `held_out`. It keeps levels x rows noisy samples, with their sources and means, on the device.

    Args:
        data: the training samples: a set, as `open_images` returns, or a tensor or array of shape (n, ...), floating point
            as the network sees them, or uint8 images that mean data / 127.5 - 1.
        process: how training makes x_t; or the result of `from_diffusers(scheduler)`, which also gives what the network
            predicts, and its timesteps.
        noise_levels: distribution of the noise levels in training; None for the usual ones of the process: `LogNormal()` for
            EDM, uniform times for VP, flows and tables of steps, `LogUniform()` for VE, times uniform over a finite
            `time_range` for a process of your own, and every step equally often for a scheduler, as where timesteps are
            drawn uniformly by index. An EDM scheduler needs it, and so does a process with an infinite `time_range`. For
            any other training, write a `NoiseLevels`.
        weighting: of the loss of x0; None for `EDMWeighting()` with a denoiser, and for the plain mean squared error of the
            output with any other prediction.
        prediction: "denoiser", called as D(x_t / alpha, sigma / alpha); or what a raw model(x_t, t) returns: "x0",
            "epsilon" (the noise), "v" (alpha noise - sigma x0) or "velocity" (dx_t / dt, towards noise). None for a
            denoiser, or for what the scheduler says.
        held_out: samples of the same shape that are not trained on, for their loss at the same noise. A set of float data
            gets the scaling of `data`, if that is such a set, too.
        labels: class of each sample, integers (n,): passed to the network as a third argument, int64, and the posterior
            stays within classes.
        held_out_labels: class of each held-out sample.
        levels: equally probable bins of the training noise.
        rows: in each bin, 2 or more. Errors fall with the root of it.
        sample: so many samples, drawn at random, stand for the data set as the population, to save time; None for all. The
            floor is then theirs, and smaller than the data set's where near neighbours matter.
        batch: rows at a time.
        seed: of rows and noise.
        device: where to compute the posterior; None for a GPU if there is one.
        progress: called while the posteriors are computed.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if an argument is out of range, shapes do not fit, labels are missing, a noise level is 0 or infinite, or
            the noise levels of training are unknown.
    """

    def __init__(
        self,
        data: Samples,
        *,
        process: Process | Regression | None = None,
        noise_levels: NoiseLevels | None = None,
        weighting: Weighting | None = None,
        prediction: Kind | None = None,
        held_out: Samples | None = None,
        labels: Tensor | NDArray[np.int64] | None = None,
        held_out_labels: Tensor | NDArray[np.int64] | None = None,
        levels: int = 8,
        rows: int = 512,
        sample: int | None = None,
        batch: int = 256,
        seed: int = 0,
        device: torch.device | str | None = None,
        progress: Callable[[Progress], object] | None = None,
    ) -> None:
        process = given = EDM() if process is None else process
        check_kind("process", process, (Process, Regression), "a Process, such as EDM(), or from_diffusers(scheduler)")
        if isinstance(process, Regression):
            self._prediction = Prediction.of_scheduler(process, prediction)
        else:
            self._prediction = Prediction(process, "denoiser" if prediction is None else prediction)
        self._process = self._prediction.process
        self._noise_levels = usual_noise_levels(given) if noise_levels is None else noise_levels
        check_kind(
            "noise_levels", self._noise_levels, NoiseLevels, "a distribution of noise levels, such as LogNormal()"
        )
        self._weighting = self._prediction.weighting() if weighting is None else weighting
        check_callable("weighting", self._weighting, "weighting(noise_level), such as EDMWeighting()")
        levels, self._rows = whole_number("levels", levels, 1, 1000), whole_number("rows", rows, 2)
        self._batch, self._seed = whole_number("batch", batch, 1), whole_number("seed", seed, 0)
        if sample is not None:
            whole_number("sample", sample, 2)
        if progress is not None:
            check_callable("progress", progress, "progress(report), with a Progress")
        if held_out is not None and (labels is None) != (held_out_labels is None):
            raise ValueError("labels and held_out_labels: pass the classes of both sets, or of neither.")
        self._population = _population(data, labels, sample, seed).to(found_device(device))
        others = (
            None
            if held_out is None
            else _held_out(held_out, held_out_labels, data, self._population.data.shape[1:], seed)
        )
        self._median = self._medians(levels)
        self._bins = tuple(self._drawn(levels, others, progress))

    @torch.no_grad()
    def __call__(self, model: Callable[..., Any], *, progress: Callable[[Progress], object] | None = None) -> Excess:
        """Compare a network with the optimum.

        A module runs in evaluation mode, without gradients, on its own device and in its own dtype; its mode and torch's
        random state are afterwards as before. The modules that a function calls, such as `net` in `lambda x, t: -net(1 - t,
        x)`, are in evaluation mode, too. They are found among the variables, defaults, globals and attributes that its code
        names. A function gets rows on the device of the population and in its dtype. With `labels` the network gets every
        row's class; rows with a dropped label are never measured.

        Args:
            model: what `prediction` says; with labels called with them as a third argument. It returns a tensor, or an
                object that holds it as `sample`, such as the output of a diffusers network.
            progress: called as bins are done.

        Raises:
            TypeError: if the model is not callable or returns no tensor.
            ValueError: if it returns another shape than that of its rows.
        """
        check_callable("model", model, "model(x, sigma), or model(x_t, t) for a raw prediction")
        if progress is not None:
            check_callable("progress", progress, "progress(report), with a Progress")
        began = time.monotonic()
        found: list[Tensor] = []
        with evaluated(model):
            for done, part in enumerate(self._bins):
                squares = self._squares(model, part.rows, part.mean)
                if part.held_out is not None:
                    squares = torch.cat([squares, self._squares(model, part.held_out, None)])
                found.append(torch.cat([squares, part.variance[None]]) * part.weight)
                if progress is not None:
                    progress(Progress(stage="measuring the network", done=done + 1, total=len(self._bins)))
        loss, distance, *held_out, floor = torch.stack(found, 1)
        return Excess(
            noise_level=self._median,
            loss=_series(loss),
            floor=_series(floor),
            loss_minus_floor=_series(loss - floor),
            distance=_series(distance),
            held_out=_series(held_out[0]) if held_out else None,
            gap=_series(held_out[0] - loss) if held_out else None,
            rows=self._rows,
            samples=len(self._population),
            drawn_from=self._population.drawn_from,
            description={
                "process": _name(self._process),
                "noise_levels": _name(self._noise_levels),
                "weighting": _name(self._weighting),
                "prediction": self._prediction.kind,
            },
            seed=self._seed,
            seconds=time.monotonic() - began,
        )

    def of(self, row_loss: Tensor, noise_level: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of a training loop's own rows minus the floor at their noise levels, in the shape of `row_loss`.

        Its mean over many steps estimates the same as `Excess.distance`, with the noise of the loop, and with the error of
        the floor, which more steps do not lower: the first call computes it from at most 256 rows, which all noise levels
        share. On a GPU each call waits for the noise levels.

        With label dropout pass `labels`: a row whose label the network does not see has all samples for its posterior, and
        so a higher floor than within its class. The mean is then the distance over all rows, also those without a label.

        Args:
            row_loss: weighted squared error per dimension of each row against the single sample, in the units of the
                `weighting`, any shape. Of an `ObjectiveValue` it is `row_loss + variance_removed`, divided by its `weight`
                if it has one.
            noise_level: sigma / alpha of each row, of one shape with it; at 0 there is no floor.
            labels: what the network sees of each row's class, integers of one shape with it, -1 for a dropped label; None
                if it sees all of them. Only for an `ExcessLoss` with labels.

        Raises:
            TypeError: if an argument is not a tensor.
            ValueError: if shapes differ, a noise level is negative or NaN, or labels are below -1, or given to an
                `ExcessLoss` without labels.
        """
        check_tensor("row_loss", row_loss, real=True, numbers=True)
        check_tensor("noise_level", noise_level, real=True, numbers=True)
        if row_loss.shape != noise_level.shape:
            raise ValueError(
                f"row_loss has shape {tuple(row_loss.shape)}, noise_level {tuple(noise_level.shape)}: pass one level for "
                "each loss."
            )
        level = noise_level.detach().cpu()
        if not bool((level >= 0).all()):
            raise ValueError(
                f"noise_level holds {float(level[~(level >= 0)][0]):g}: pass sigma / alpha of each row, 0 or more."
            )
        floor = self.floor(level)
        if labels is not None:
            hidden = self._hidden(labels, row_loss)
            if bool(hidden.any()):
                floor = torch.where(hidden, self._floor_without_labels(level), floor)
        return row_loss - floor.to(row_loss)

    def _hidden(self, labels: Tensor, row_loss: Tensor) -> Tensor:
        """Which rows have a dropped label, bool, on the CPU."""
        check_tensor("labels", labels, numbers=True)
        if not is_integer(labels.dtype) or labels.shape != row_loss.shape:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}, row_loss has shape "
                f"{tuple(row_loss.shape)}: pass one integer for each loss, -1 for a dropped label."
            )
        if self._population.labels is None:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}, but this ExcessLoss was made without labels, so its floor is that "
                "of all samples for every row: leave labels out, or pass the classes, ExcessLoss(data, labels=...)."
            )
        labels = labels.detach().cpu().long()
        if bool((labels < -1).any()):
            raise ValueError(f"labels holds {int(labels.min())}: pass classes from 0, and -1 for a dropped label.")
        return labels == -1

    @cached_property
    def floor(self) -> LossFloor:
        """The floor as a function of the noise level; with labels that of rows whose label the network sees."""
        return self._floor_over(self._population)

    @cached_property
    def _floor_without_labels(self) -> LossFloor:
        """The floor of rows whose label the network does not see."""
        return self._floor_over(dataclasses.replace(self._population, labels=None))

    def _floor_over(self, population: Population) -> LossFloor:
        u = (1 + _FLOOR_SHARE * torch.linspace(-1, 1, _FLOOR_LEVELS, dtype=torch.float64)) / 2
        level = self._levels(u)
        # Evenly spaced on the axis on which the floor is interpolated.
        low, high = (math.log10(float(end)) for end in (level.min(), level.max()))
        level = torch.logspace(low, high, _FLOOR_LEVELS, dtype=torch.float64)
        rows = min(self._rows, 256)
        optimum = find_optimum(population, level.unique(), rows=rows, batch=self._batch, seed=self._seed)
        variance = torch.cat([part.variance for part in optimum.parts], 1).double().mean(1).cpu()
        return LossFloor(
            noise_level=optimum.noise_level, variance=variance, dim=population.dim, weighting=self._weighting
        )

    def _medians(self, levels: int) -> Tensor:
        """The noise level in the middle of each bin, (L,), increasing."""
        u = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
        found = self._levels(u)
        if bool((found.diff() > 0).all()):
            return found
        if bool((found.diff() < 0).all()):
            t = times_at(self._noise_levels, u, self._process)
            if bool((t.diff() > 0).all()):
                raise ValueError(
                    f"process={_name(self._process)}: its time runs from noise to data, as the noise level falls from "
                    f"{found[0]:.4g} to {found[-1]:.4g} between t = {t[0]:.4g} and {t[-1]:.4g}. Pass a process whose noise "
                    "grows with its time, with 1 - t for this t, and a model that takes it."
                )
            raise ValueError(
                f"noise_levels={_name(self._noise_levels)}: its noise level falls from {found[0]:.4g} to {found[-1]:.4g} "
                "between the probabilities 0 and 1: let quantile(u, process) return times of more noise at larger u."
            )
        raise ValueError(f"levels={levels} is more than the noise levels of training can fill: pass fewer.")

    def _levels(self, u: Tensor) -> Tensor:
        return self._process.noise_level(times_at(self._noise_levels, u, self._process).double())

    def _drawn(
        self, levels: int, others: Population | None, progress: Callable[[Progress], object] | None
    ) -> Iterator[_Bin]:
        """The bins, with rows, noise and posteriors."""
        generator = torch.Generator().manual_seed(self._seed)
        exact = ExactPosterior(self._population.data, self._population.labels)
        held_out = None if others is None else ExactPosterior(others.data, others.labels)
        for k in range(levels):
            # Stratified within the bin, too, in ascending order: one row from each of equally probable parts.
            u = (
                torch.arange(self._rows) + torch.rand(self._rows, generator=generator, dtype=torch.float64)
            ) / self._rows
            t = times_at(self._noise_levels, (k + u) / levels, self._process).double()
            level = self._process.noise_level(t)
            if not bool(((level > 0) & level.isfinite()).all()):
                raise ValueError(
                    f"noise_levels={_name(self._noise_levels)} draws noise levels from {level.min():g} to "
                    f"{level.max():g}: they must be positive and finite; change its range."
                )
            weight = self._weighting(level).double() / self._population.dim
            if not bool(weight.isfinite().all()):
                raise ValueError(
                    f"weighting={_name(self._weighting)} is not finite at noise levels from {level.min():g}."
                )
            noise = torch.randn(self._rows, self._population.dim, generator=generator)
            index, rows = self._made(exact, self._population, t, noise, generator)
            others_rows = None
            if held_out is not None and others is not None:
                _, others_rows = self._made(held_out, others, t, noise, generator)
            means: list[Tensor] = []
            variances: list[Tensor] = []
            for part in torch.arange(self._rows).split(self._batch):
                alpha, sigma = (scale.to(rows.x_t) for scale in scales(self._process, t[part]))
                found = exact(rows.x_t[part], alpha, sigma, index[part]).posterior
                means.append(found.mean)
                variances.append(found.variance.double().cpu())
            yield _Bin(rows, torch.cat(means), torch.cat(variances), weight, others_rows)
            if progress is not None:
                progress(Progress(stage="measuring the optimum", done=k + 1, total=levels))

    def _made(
        self, exact: ExactPosterior, population: Population, t: Tensor, noise: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, _Rows]:
        """Rows from samples of a population, each of them equally often, and the samples' indices."""
        passes = -(-len(t) // len(population))
        order = [torch.randperm(len(population), generator=generator) for _ in range(passes)]
        index = torch.cat(order)[: len(t)].to(population.data.device)
        dtype = exact.matrix.dtype
        x0 = exact.matrix.rows(index, dtype)
        alpha, sigma = (scale.to(x0)[:, None] for scale in scales(self._process, t))
        shape = (len(t), *population.data.shape[1:])
        labels = None if population.labels is None else population.labels[index]
        x_t = alpha * x0 + sigma * noise.to(x0)
        return index, _Rows(t, x_t.reshape(shape), x0.reshape(shape), labels)

    def _squares(self, model: Callable[..., Any], rows: _Rows, mean: Tensor | None) -> Tensor:
        """Squared errors to the samples, and to `mean` if it is given, shape (1 or 2, R), float64 on the CPU."""
        found: list[Tensor] = []
        device, dtype = placement(model, rows.x_t)
        for part in torch.arange(self._rows).split(self._batch):
            labels = None if rows.labels is None else rows.labels[part].to(device)
            x_t = rows.x_t[part].to(device)
            estimate = self._prediction.denoised(model, x_t, rows.t[part], labels, dtype)
            aims = [rows.x0[part]] if mean is None else [rows.x0[part], mean[part]]
            errors = [(estimate - aim.to(estimate)).flatten(1).square().sum(1) for aim in aims]
            found.append(torch.stack(errors).double().cpu())
        return torch.cat(found, 1)


def _population(data: Samples, labels: Tensor | NDArray[np.int64] | None, sample: int | None, seed: int) -> Population:
    most = 2**62 if sample is None else sample
    return draw_population(data, labels, max_images=most, by_class=labels is not None, seed=seed)


def _held_out(
    held_out: Samples, labels: Tensor | NDArray[np.int64] | None, data: Samples, shape: torch.Size, seed: int
) -> Population:
    scaling = data.scaling if isinstance(data, ImageSet) else None
    if isinstance(held_out, ImageSet) and isinstance(data, ImageSet):
        theirs, own = held_out.autoencoder, data.autoencoder
        if theirs is not None and own is not None and theirs.differs(own):
            raise ValueError(
                f"held_out={held_out.name} are latents of the autoencoder {theirs.sha256:.12}, data of {own.sha256:.12}: "
                "encode both with one."
            )
    if isinstance(held_out, ImageSet) and held_out.scaling is not None and held_out.shape == shape:
        # The network was trained in the scaling of the training data; that of the held-out data is another one.
        held_out = dataclasses.replace(held_out, scaling=scaling or held_out.scaling)
    try:
        found = _population(held_out, labels, None, seed)
    except (TypeError, ValueError) as error:
        raise type(error)(f"held_out: {error}") from error
    if found.data.shape[1:] != shape:
        raise ValueError(
            f"held_out has samples of shape {tuple(found.data.shape[1:])}, data of {tuple(shape)}: prepare them alike."
        )
    return found


def _series(values: Tensor) -> Series:
    """Mean and standard error over the rows of `values` (L, R), one from each stratum of the noise levels in their order.

    The error comes from the differences of neighbours, since what varies between strata is no error. It is slightly too
    large, by what varies from one stratum to the next.
    """
    variance = values.diff(dim=1).square().mean(1) / 2
    return Series(values.mean(1), (variance / values.shape[1]).sqrt())


def _name(thing: object) -> str:
    """Its settings for one of ours, else its class or name, without an address."""
    text = repr(thing)
    return text if " at 0x" not in text else getattr(thing, "__name__", type(thing).__name__)
