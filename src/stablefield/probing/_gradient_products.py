r"""Inner products of the gradients of rows, for `_variance_ledger`.

A row is an image at a noise level with a noise and a target, and its gradient g that of its loss over all weights. The
variance of a batch's gradient is a sum of mean products of two such gradients that share some of level, image and noise.
Groups of images that all meet the same levels give many pairs of each kind.

A product is the mean of $(g \cdot v)(g' \cdot v)$ over random signs v (Hutchinson 1989). And $g \cdot v$ is the derivative
of the row's loss along v, which needs no backpropagation:

$$ g \cdot v = \tfrac{2 w}{d} (D_\theta - \hat x_0) \cdot \frac{D_{\theta + h v} - D_{\theta - h v}}{2 h} + O(h^2) . $$

So two passes of the network serve all rows and all targets, and memory holds no gradient of a single row.

References:
    Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines",
    Communications in Statistics, 1989.
"""

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stablefield._shapes import per_row
from stablefield.diffusion._importance_sampling import ImportanceSampling
from stablefield.diffusion._preconditioning import Denoiser
from stablefield.probing._exact import ExactPosterior
from stablefield.probing._population import Population
from stablefield.probing._prediction import checked_output
from stablefield.probing._training import Training
from stablefield.targets._references import InBatch
from stablefield.targets._stable_target import StableTarget

__all__ = ["GradientSampler", "Products", "evaluating"]

# A group: images that all meet all levels. The levels are two independent halves, each of pairs that share a stratum.
_IMAGES, _PAIRS = 4, 2
# Step along a direction, by the root mean square of the weights. Smaller, float32 rounds; larger, the network bends.
_STEP = 1e-3
# Rows of one pass with gradients.
_CHUNK = 128
# Rows of each bin of noise levels, to fit importance sampling.
_ROWS_OF_BIN = 40
# Numbers that represent the gradient of a whole batch; a prime, so that the layers' sizes are no multiple of it.
_WIDTH = 65_521


class Products(NamedTuple):
    """Mean products of the gradients of two rows, by what the rows share; their differences are variances.

    Attributes:
        row: everything: the mean square.
        pair: the mean square of the mean gradient of two rows with the same image and level, and noise of opposite signs.
        cell: image and level.
        level: the level.
        stratum: which of B equally probable parts their levels are in.
        image: the image.
        nothing: nothing.
        reweighted: what importance sampling adds to the mean square: E (omega - 1) |g|^2 with its weights omega.
        pair_at_level: `pair` minus `level`, as importance sampling weighs them.
    """

    row: Tensor
    pair: Tensor
    cell: Tensor
    level: Tensor
    stratum: Tensor
    image: Tensor
    nothing: Tensor
    reweighted: Tensor
    pair_at_level: Tensor


@dataclass(frozen=True)
class _Rows:
    """Noisy rows: the network's input, and the factor 2 w / d of their gradient; x0 and the exact posterior mean (B, d)."""

    x: Tensor
    level: Tensor
    labels: Tensor | None
    x0: Tensor
    mean: Tensor
    factor: Tensor


class GradientSampler:
    """Draws rows of a network's training, and measures their gradients.

    Args:
        network: D(x, sigma, class_labels=None), on the device of the population. The gradient is over its weights that
            require one, or over all if none does.
        population: the training data; images are drawn with replacement.
        training: gives the process, the noise levels, the weights of the loss and the batch.
        labelled: pass the labels to the network.
        generator: of all random draws, on the CPU.

    Raises:
        ValueError: if the network has no weights.
    """

    IMAGES = _IMAGES
    ROWS = _IMAGES * 4 * _PAIRS * 4

    def __init__(
        self, network: nn.Module, population: Population, training: Training, labelled: bool, generator: torch.Generator
    ) -> None:
        self._network, self._population, self._training = network, population, training
        self._labelled, self._generator = labelled, generator
        self._posterior = ExactPosterior(population.data, population.labels)
        self._weights, self._rest = _weights(network)
        count = sum(value.numel() for value in self._weights.values())
        square = sum(float(value.double().square().sum()) for value in self._weights.values())
        self._step = _STEP * (math.sqrt(square / count) or 1.0)
        self._signs = self._random_signs(count)
        self._batches, self._centre = 0, torch.zeros(count, device=self._signs.device)
        self._importance_weights = self._fitted()

    def group(self) -> Tensor:
        """Mean products of one group, float64, shape (19,), relative to the mean gradient of the batches before.

        Those of the single-sample target and of the stable one, in the order of `Products`; then the mean square of the
        difference of both gradients of a row.
        """
        images, levels = _IMAGES, 4 * _PAIRS
        generator, batch = self._generator, self._training.batch
        index = torch.randint(len(self._population), (images,), generator=generator)
        halves: list[Tensor] = []
        for _ in range(2):
            place = torch.rand(2, _PAIRS, generator=generator, dtype=torch.float64)
            first = (torch.arange(_PAIRS) + place[0]) / _PAIRS
            # Another level of the same of B strata.
            halves += [first, ((first * batch).floor() + place[1]) / batch]
        u = torch.cat(halves)
        noise = torch.randn(images * levels * 2, self._population.dim, generator=generator)
        noise = torch.stack([noise, -noise], 1).flatten(0, 1)
        rows = self._rows(index.repeat_interleave(levels * 4), u.repeat_interleave(4).repeat(images), noise)
        signs = self._random_signs(len(self._signs))
        estimate, slope = self._along(signs, rows)
        # Around a mean of other rows, the products are small, and their differences accurate.
        centre = float(self._centre @ signs.to(self._centre))
        single, stable = (
            (rows.factor * ((estimate - target) * slope).sum(1, dtype=torch.float64))
            .cpu()
            .reshape(images, levels, 2, 2)
            for target in (rows.x0, rows.mean)
        )
        weights = self._importance_weights[:, (u * self._importance_weights.shape[1]).long()]
        products = [_products(slopes, centre, omega) for slopes, omega in zip((single, stable), weights, strict=True)]
        return torch.cat([*products, (single - stable).square().mean()[None]])

    def batch(self) -> Tensor:
        """Gradient of a whole batch: single-sample target, and references from the batch; (2, numbers), float64."""
        count, generator = self._training.batch, self._generator
        index = torch.randint(len(self._population), (count,), generator=generator)
        u = torch.rand(count, generator=generator, dtype=torch.float64)
        noise = torch.randn(count, self._population.dim, generator=generator)
        rows = self._rows(index, u, noise, InBatch())
        total = torch.zeros(2, len(self._signs), dtype=rows.x.dtype, device=rows.x.device)
        weights = {name: value.detach().requires_grad_() for name, value in self._weights.items()}
        for start in range(0, count, _CHUNK):
            own = slice(start, start + _CHUNK)
            with torch.enable_grad():
                estimate = self._denoised(weights, rows, own)
            if not estimate.requires_grad:
                continue
            for place, target in enumerate((rows.x0, rows.mean)):
                pull = rows.factor[own, None] * (estimate.detach().flatten(1) - target[own]) / count
                parts = torch.autograd.grad(
                    estimate,
                    list(weights.values()),
                    pull.to(estimate).reshape(estimate.shape),
                    retain_graph=place == 0,
                    allow_unused=True,
                    materialize_grads=True,
                )
                total[place] += torch.cat([part.flatten() for part in parts])
        self._batches += 1
        self._centre += (total[0] - self._centre) / self._batches
        return _folded(total, self._signs).double().cpu()

    @torch.no_grad()
    def _fitted(self) -> Tensor:
        """Weights of importance sampling by bin of noise levels, for the single-sample target and the stable one, (2, bins).

        Fitted as in training, to the gradient in the output of the raw network.
        """
        training, network = self._training, getattr(self._network, "_orig_mod", self._network)
        fits = [ImportanceSampling(training.noise_levels, training.process).to(self._signs.device) for _ in range(2)]
        place = torch.arange(fits[0].bins).repeat(_ROWS_OF_BIN)
        u = (place + torch.rand(len(place), generator=self._generator, dtype=torch.float64)) / fits[0].bins
        index = torch.randint(len(self._population), (len(u),), generator=self._generator)
        rows = self._rows(index, u, torch.randn(len(u), self._population.dim, generator=self._generator))
        parts = [slice(start, start + _CHUNK) for start in range(0, len(u), _CHUNK)]
        estimate = torch.cat([self._denoised(self._weights, rows, own).flatten(1) for own in parts])
        scale = rows.factor.square()
        if isinstance(network, Denoiser):
            scale = scale * network.preconditioning(rows.level).c_out.double().square()
        for fit, target in zip(fits, (rows.x0, rows.mean), strict=True):
            fit.observe(fit.sums(rows.level, scale * (estimate - target).square().mean(1)))
        return torch.stack([1 / fit.density().double().cpu() for fit in fits])

    def _rows(self, index: Tensor, u: Tensor, noise: Tensor, references: InBatch | None = None) -> _Rows:
        """Rows of the images at `index`, at the probabilities `u` of their noise levels; with the mean over `references`."""
        training, population, matrix = self._training, self._population, self._posterior.matrix
        device = population.data.device
        tiny = torch.finfo(torch.float64).eps
        t = training.noise_levels.quantile(u.clamp(tiny, 1 - tiny), training.process).to(device)
        index = index.to(device)
        flat = matrix.rows(index, matrix.dtype)
        x0 = flat.reshape(-1, *population.data.shape[1:])
        noise = noise.to(x0).reshape(x0.shape)
        x_t = training.process.perturb(x0, t, noise)
        alpha, sigma = training.process.alpha(t), training.process.sigma(t)
        labels = None if population.labels is None else population.labels[index]
        if references is None:
            mean = self._posterior(x_t, alpha, sigma, index).posterior.mean
        else:
            target = StableTarget(training.process, references=references, validate_args=False)
            mean = target(x0, x_t, t, labels, noise=noise, generator=self._generator).x0
        level = sigma / alpha
        return _Rows(
            x_t / per_row(alpha, x0).to(x0),
            level.to(x0),
            labels if self._labelled else None,
            flat,
            mean.flatten(1),
            2 * training.weighting(level).double() / population.dim,
        )

    @torch.no_grad()
    def _along(self, signs: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
        """The network's estimate and its derivative along `signs`, (B, d) each."""
        ends: list[Tensor] = []
        for step in (self._step, -self._step):
            parts = signs.split([value.numel() for value in self._weights.values()])
            weights = {
                name: value + step * part.reshape(value.shape).to(value)
                for (name, value), part in zip(self._weights.items(), parts, strict=True)
            }
            ends.append(self._denoised(weights, rows, slice(None)).flatten(1))
        return (ends[0] + ends[1]) / 2, (ends[0] - ends[1]) / (2 * self._step)

    def _denoised(self, weights: dict[str, Tensor], rows: _Rows, own: slice) -> Tensor:
        x = rows.x[own]
        arguments = (x, rows.level[own]) if rows.labels is None else (x, rows.level[own], rows.labels[own])
        estimate = functional_call(self._network, {**self._rest, **weights}, arguments)
        return checked_output("denoiser", estimate, x)

    def _random_signs(self, count: int) -> Tensor:
        """+1 and -1, shape (count,), int8, where the data are."""
        signs = torch.randint(2, (count,), generator=self._generator, dtype=torch.int8) * 2 - 1
        return signs.to(self._population.data.device)


def _products(slopes: Tensor, centre: float, weights: Tensor) -> Tensor:
    """`Products` from derivatives, shape (9,).

    Args:
        slopes: of (images, levels, 2 noises, 2 signs of it) rows.
        centre: their mean, estimated from other rows.
        weights: of importance sampling, shape (levels,).
    """
    uncentred, slopes = slopes, slopes - centre
    pair = slopes.mean(3)
    cell = pair.mean(2)
    left, right = (half.mean(1) for half in cell.chunk(2, 1))
    # A half has the first level of each pair of levels, then the second.
    firsts, seconds = cell.unflatten(1, (2, 2, -1)).unbind(2)
    found = Products(
        row=slopes.square().mean(),
        pair=pair.square().mean(),
        cell=pair.prod(2).mean(),
        level=_apart(cell, cell).mean(),
        stratum=_apart(firsts, seconds).mean(),
        image=(left * right).mean(),
        nothing=_apart(left, right).mean(),
        reweighted=((weights - 1) * uncentred.square().mean((0, 2, 3))).mean(),
        pair_at_level=(weights * (pair.square().mean((0, 2)) - _apart(cell, cell))).mean(),
    )
    return torch.stack(found)


def _apart(one: Tensor, two: Tensor) -> Tensor:
    """Mean product over pairs of different images; the images are the first axis of both."""
    images = len(one)
    return (one.sum(0) * two.sum(0) - (one * two).sum(0)) / (images * (images - 1))


def _folded(gradients: Tensor, signs: Tensor) -> Tensor:
    """At most `_WIDTH` numbers that have the inner products of the gradients, in expectation over random signs.

    Sums of numbers with random signs: the mixed terms of a product have mean 0.
    """
    count = gradients.shape[1]
    if count <= _WIDTH:
        return gradients
    padded = nn.functional.pad(gradients * signs, (0, -count % _WIDTH))
    return padded.unflatten(1, (-1, _WIDTH)).sum(1)


def _weights(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights that the gradient is over, and all other floating point values, in float32 or better."""
    named = {name: value for name, value in network.named_parameters() if value.is_floating_point()}
    trained = {name for name, value in named.items() if value.requires_grad} or set(named)
    if not any(named[name].numel() for name in trained):
        raise ValueError("network has no weights: the gradient is over them.")
    named |= {name: value for name, value in network.named_buffers() if value.is_floating_point()}
    wide = {name: value.detach().to(torch.promote_types(value.dtype, torch.float32)) for name, value in named.items()}
    return {name: wide.pop(name) for name in list(wide) if name in trained}, wide


@contextmanager
def evaluating(network: nn.Module) -> Generator[None]:
    """Evaluation mode for a while; afterwards every module is in its mode of before."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
