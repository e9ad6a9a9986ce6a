r"""The ledger of variance: which random draws the variance of a batch's gradient comes from, and which lever lowers it.

A row's gradient g depends on its noise level t, its image I, its noise and its target. With the exact posterior mean as the
stable target, the trace of the covariance of the single-sample gradient is the sum of four terms:

    noise level   Var E[g | t]             between noise levels; stratified levels remove it
    image         E Var(E[g | t, I] | t)   between images at one level; more images in a batch average it
    noise         E Var(g | t, I)          between noises of one image at one level; antithetic pairs remove its odd part
    target        E |g_single - g|^2       what the stable target removes

The level comes first because stratification removes all of E[g | t]. Rows are drawn independently, so the variance of a
batch of B rows is that of a row divided by B.

Every term, and the variance with every lever, is a sum of mean inner products of the gradients of two rows that share some
of level, image and noise: see "The ledger of variance" in the theory, and `_gradient_products` for their measurement.
References from the batch make its rows depend on each other, so their variance is that between whole batches, by
backpropagation. The same batches check the sum of the terms.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stablefield._progress import Progress
from stablefield._shapes import check_callable, check_kind, flag, whole_number
from stablefield.probing._gradient_products import GradientSampler, Products, evaluating
from stablefield.probing._population import Population
from stablefield.probing._training import Training
from stablefield.report._cells import Estimate, text_table

__all__ = ["Lever", "VarianceLedger", "measure_ledger"]

# Fewest and most whole batches, and rows of all of them if they are not the fewest.
_FEWEST_BATCHES, _MOST_BATCHES, _ROWS = 6, 128, 2048
# Most groups: more take hours.
_MOST = 10_000


@dataclass(frozen=True, kw_only=True)
class Lever:
    """The variance of a batch's gradient with a lever, at an equal number of network rows.

    Both figures are shares of the plain variance: single-sample target, independent rows.

    Attributes:
        name: of the lever.
        single: with the single-sample target; None if the lever is a target itself.
        stable: with the stable target.
    """

    name: str
    single: Estimate | None
    stable: Estimate

    @property
    def factor(self) -> float | None:
        """How many times as large a plain batch has this variance, with the stable target; None if none is seen."""
        return 1 / self.stable.value if self.stable.value > 0 else None


@dataclass(frozen=True, kw_only=True)
class VarianceLedger:
    """Where the variance of a batch's gradient comes from, at the weights that the network has.

    The gradient is that of the mean loss of a batch, and its variance the trace of the covariance over all weights. Errors
    are standard errors, by the jackknife over groups of images.

    Attributes:
        batch: rows, B.
        variance: of the gradient of a plain batch: single-sample target, independent rows.
        terms: shares of the variance, which add up to 1: "noise level", "image", "noise", "target".
        levers: the variance with each lever, without any first. For pairs, B strata stand for the B / 2 that a batch has,
            and still finer ones with importance sampling: differences of the order of 1 / B^2.
        measured: the variance between whole batches, as a share of the sum of the terms.
        images: drawn for the terms, with replacement.
        rows: gradients measured for the terms.
        batches: whole batches.
    """

    batch: int
    variance: Estimate
    terms: Mapping[str, Estimate]
    levers: tuple[Lever, ...]
    measured: Estimate
    images: int
    rows: int
    batches: int

    @property
    def summary(self) -> str:
        """Where most of the variance comes from, and which lever pays most; a line each."""
        largest = max(self.terms, key=lambda name: self.terms[name].value)
        source = f"Most of a gradient's variance comes from the {largest}: {_percent(self.terms[largest])}."
        plain, *levers = self.levers
        found = [("the stable target", plain.stable), *((f"{x.name}, stable target", x.stable) for x in levers)]
        found += [(f"{x.name}, single sample", x.single) for x in levers if x.single is not None]
        # Of many levers, a noisy one may have the least variance.
        sure = [entry for entry in found if entry[1].value < 1 - 2 * entry[1].error]
        if not sure:
            return f"{source}\nNo lever lowers it by more than twice its standard error."
        name, share = min(sure, key=lambda entry: entry[1].value)
        worth = f"It is worth a batch {1 / share.value:.2f} times as large." if share.value > 0 else ""
        return f"{source}\nWhat pays most here: {name}.\n{worth}".rstrip()

    def __str__(self) -> str:
        terms = [[name, _percent(share)] for name, share in self.terms.items()]
        terms.append([f"{self.batches} whole batches, measured", _percent(self.measured)])
        levers = [
            [
                lever.name,
                "-" if lever.single is None else _percent(lever.single),
                _percent(lever.stable),
                "-" if lever.factor is None else f"{lever.factor:.2f} x",
            ]
            for lever in self.levers
        ]
        return "\n".join(
            [
                self.summary,
                text_table((f"variance of the gradient, batch of {self.batch:,}", "share"), terms),
                text_table(("lever, with equal rows", "single sample", "stable target", "worth a batch"), levers),
            ]
        )

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "batch": self.batch,
            "images": self.images,
            "rows": self.rows,
            "whole_batches": self.batches,
            "variance": self.variance.value,
            "variance_se": self.variance.error,
            "terms": {name: _record(share) for name, share in self.terms.items()},
            "whole_batches_to_sum": _record(self.measured),
            "levers": [
                {"lever": lever.name, "single_sample": _record(lever.single), "stable_target": _record(lever.stable)}
                for lever in self.levers
            ],
        }


def measure_ledger(
    network: nn.Module,
    population: Population,
    training: Training,
    *,
    labelled: bool = False,
    groups: int = 48,
    seed: int = 0,
    progress: Callable[[Progress], object] | None = None,
) -> VarianceLedger | None:
    """Split the variance of a batch's gradient into its sources, and measure it with each lever.

    The network is in evaluation mode meanwhile, so dropout adds nothing. Images come with replacement, and neither
    augmentation nor dropped labels add to the variance.

    Args:
        network: D(x, sigma, class_labels=None) in noise-to-signal units, a module on the device of the population. The
            gradient is over its weights that require one, or over all if none does.
        population: the training data.
        training: gives the process, the noise levels, the weights of the loss and the batch.
        labelled: pass the labels to the network.
        groups: groups of 4 images in 128 rows each, 3 to 10,000; errors fall with their square root.
        seed: of all random draws.
        progress: called as groups and batches are done.

    Returns:
        The ledger; None if the gradient has no variance, or it is not finite.

    Raises:
        ValueError: if an argument does not fit, or the network has no weights or returns another shape.
    """
    check_kind("network", network, nn.Module, "a module D(x, sigma), such as a Denoiser")
    check_kind("population", population, Population, "a Population of the data, Population(data)")
    check_kind("training", training, Training, "a Training, such as Training()")
    whole_number("groups", groups, 3, _MOST)
    whole_number("seed", seed, 0)
    if flag("labelled", labelled) and population.labels is None:
        raise ValueError("labelled is set, but the population has no labels: pass them.")
    if progress is not None:
        check_callable("progress", progress, "progress(report), with a Progress")
    batches = max(_FEWEST_BATCHES, min(groups, _MOST_BATCHES, _ROWS // training.batch))
    with evaluating(network):
        sampler = GradientSampler(network, population, training, labelled, torch.Generator().manual_seed(seed))
        whole: list[Tensor] = []
        for done in range(batches):
            whole.append(sampler.batch())
            if progress is not None:
                progress(Progress(stage="measuring whole batches", done=done + 1, total=batches))
        found: list[Tensor] = []
        for done in range(groups):
            found.append(sampler.group())
            if progress is not None:
                progress(Progress(stage="splitting the variance", done=done + 1, total=groups))
    parts = torch.stack(found)
    row, *terms = _jackknife(parts, _terms)
    plain, in_batch = _between(torch.stack(whole))
    if not (0 < row.value < math.inf and 0 < plain.value < math.inf):
        return None
    measured = plain.value * training.batch / row.value
    levers = _jackknife(parts, _with_levers)
    pairs = [Lever(name=name, single=levers[2 * k], stable=levers[2 * k + 1]) for k, name in enumerate(_LEVERS)]
    return VarianceLedger(
        batch=training.batch,
        variance=Estimate(row.value / training.batch, row.error / training.batch),
        terms=dict(zip(("noise level", "image", "noise", "target"), terms, strict=True)),
        levers=(*pairs, Lever(name="references from the batch", single=None, stable=in_batch)),
        measured=Estimate(measured, measured * math.hypot(plain.error / plain.value, row.error / row.value)),
        images=groups * sampler.IMAGES,
        rows=groups * sampler.ROWS,
        batches=batches,
    )


# In the order of `_with_levers`.
_LEVERS = (
    "none",
    "stratified noise levels",
    "2 draws per image",
    "4 draws per image",
    "antithetic pairs",
    "importance sampling",
    "antithetic pairs, stratified",
    "pairs, stratified, importance",
)


def _terms(means: Tensor) -> Tensor:
    """Variance of a row, and the shares of its terms, shape (..., 5); from means over groups (..., 19)."""
    _, stable, target = _split(means)
    terms = [stable.level - stable.nothing, stable.cell - stable.level, stable.row - stable.cell, target]
    found = torch.stack(terms, -1)
    whole = found.sum(-1, keepdim=True)
    return torch.cat([whole, found / whole], -1)


def _with_levers(means: Tensor) -> Tensor:
    """Shares of the variance that remain with each of `_LEVERS`, single-sample target and stable target in turn."""
    variance, *_, removed = _terms(means).unbind(-1)
    single, stable, _ = _split(means)
    # E[g | t] is the same for both targets; the stable one varies less.
    between = stable.stratum - stable.nothing
    shares: list[Tensor] = []
    for products, plain in ((single, variance), (stable, variance * (1 - removed))):
        again, pair = products.image - products.nothing, 2 * (products.pair - products.nothing)
        with_lever = [plain, plain - between, plain + again, plain + 3 * again, pair, plain + products.reweighted]
        with_lever += [pair - 2 * between, 2 * products.pair_at_level]
        shares.append(torch.stack(with_lever, -1) / variance[..., None])
    return torch.stack(shares, -1).flatten(-2)


def _split(means: Tensor) -> tuple[Products, Products, Tensor]:
    """Products of the single-sample target and of the stable one, and the square of their difference."""
    single, stable, target = means.split([len(Products._fields), len(Products._fields), 1], -1)
    return Products(*single.unbind(-1)), Products(*stable.unbind(-1)), target[..., 0]


def _between(batches: Tensor) -> list[Estimate]:
    """Variance between gradients of batches, and that with the last target as a share of it; from (batches, 2, numbers)."""
    count = len(batches)
    squares = (batches - batches.mean(0)).square().sum(2)
    whole = squares.sum(0)
    # Without one batch, the mean moves, too: the sum of squares falls by n / (n - 1) of its square.
    without = (whole - squares * count / (count - 1)) / (count - 2)
    single, stable = torch.cat([whole[None] / (count - 1), without]).unbind(1)
    figures = torch.stack([single, stable / single], 1)
    return _estimates(figures[0], figures[1:])


def _jackknife(parts: Tensor, figures: Callable[[Tensor], Tensor]) -> list[Estimate]:
    """Figures of the mean of independent parts, the first axis, with their standard errors."""
    return _estimates(figures(parts.mean(0)), figures((parts.sum(0) - parts) / (len(parts) - 1)))


def _estimates(figures: Tensor, without: Tensor) -> list[Estimate]:
    """Figures with their standard errors, by the jackknife: from those without each of the parts, the first axis."""
    count = len(without)
    error = ((without - without.mean(0)).square().sum(0) * (count - 1) / count).sqrt()
    return [Estimate(value, spread) for value, spread in zip(figures.tolist(), error.tolist(), strict=True)]


def _record(estimate: Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else {"share": estimate.value, "se": estimate.error}


def _percent(share: Estimate) -> str:
    return f"{100 * share.value:.1f} ± {100 * share.error:.1f} %"
