r"""Stable targets: what a network is trained to predict, with less variance and the same optimum.

Denoising score matching (DSM) regresses on the one sample $x_0$ that made $x_t$. The stable target is the posterior mean
$\hat x_0 = E[x_0 \mid x_t, \text{references}]$: the conditional expectation of the DSM target, hence unbiased, and never
of larger variance. Everything that people regress on is affine in it:

| view     |                                                                       |
|----------|-----------------------------------------------------------------------|
| noise    | $\hat\varepsilon = (x_t - \alpha \hat x_0) / \sigma$                  |
| score    | $-\hat\varepsilon / \sigma$                                           |
| v        | $\alpha \hat\varepsilon - \sigma \hat x_0$                            |
| velocity | $\dot\alpha \hat x_0 + \dot\sigma \hat\varepsilon$                    |

DSM is the stable target with one reference, and the same code.

References:
    Xu, Tong, Jaakkola, "Stable Target Field for Reduced Variance Score Estimation in Diffusion Models", ICLR 2023.
    Bertrand, Gagneux, Massias, Emonet, "On the Closed-Form of Flow Matching", 2025: the mean as a conditional expectation.
"""

import math
from dataclasses import KW_ONLY, dataclass, field, replace

import torch
from torch import Tensor

from stablefield.diffusion.process import Process
from stablefield.shapes import per_row, row_values
from stablefield.targets.excess import Anchor, Excess
from stablefield.targets.kernel import GaussianKernel, Kernel
from stablefield.targets.posterior import Posterior, accumulate, finish, mirrored_sums
from stablefield.targets.precision import full_precision
from stablefield.targets.query import Query, require_rows
from stablefield.targets.references import InBatch, References, Selection, check_is_own
from stablefield.targets.sharded import ShardedPool

__all__ = ["DenoisingTarget", "StableTarget", "Target"]


@dataclass(frozen=True)
class Target:
    """A regression target in every parameterisation.

    Attributes:
        x0: the target for x0, shape (B, ...).
        variance: variance removed, sum_k w_k |y_k|^2 - |x0|^2, shape (B,); 0 for rows that use their source alone.
        ess: effective sample size of the references, shape (B,).
        source_weight: posterior weight of the row's own source, shape (B,).
        source: the clean samples that made x_t, shape (B, ...).
        x_t: what was made of them, shape (B, ...).
        process: the process that made x_t.
        t: times, shape (B,).
        kernel: the noise kernel.
        given_noise: the noise in x_t, shape (B, ...), if the call was given it.
    """

    x0: Tensor
    variance: Tensor
    ess: Tensor
    source_weight: Tensor
    source: Tensor
    x_t: Tensor
    process: Process
    t: Tensor
    kernel: Kernel = field(default_factory=GaussianKernel)
    given_noise: Tensor | None = None

    @property
    @torch.no_grad()
    def source_noise(self) -> Tensor:
        """The noise that made x_t from the source, shape (B, ...)."""
        if self.given_noise is not None:
            return self.given_noise
        alpha, sigma = (per_row(scale(self.t), self.source) for scale in (self.process.alpha, self.process.sigma))
        return torch.addcmul(self.x_t, alpha, self.source, value=-1).div_(sigma)

    @property
    def noise(self) -> Tensor:
        """The target for the noise, (x_t - alpha x0) / sigma.

        Written as a correction of the source's noise: exactly that noise where the source has all the weight, and without
        the cancellation that a small sigma would magnify.
        """
        ratio = self.process.alpha(self.t) / self.process.sigma(self.t)
        gap = self.source - self.x0
        # Where sigma is 0 the ratio is infinite and the gap 0, which is no correction and not nan.
        return torch.where(gap == 0, self.source_noise, self.source_noise + per_row(ratio, self.x0) * gap)

    @property
    def score(self) -> Tensor:
        """The target for the score, grad log p(x_t) = -noise / sigma.

        Raises:
            ValueError: for another kernel than the Gaussian, whose score is not affine in x0.
        """
        if not isinstance(self.kernel, GaussianKernel):
            raise ValueError(f"the score of {self.kernel} is not affine in x0: regress on x0 (or noise, v) instead.")
        return -self.noise / per_row(self.process.sigma(self.t), self.x0)

    @property
    def v(self) -> Tensor:
        """The target for v-prediction, alpha noise - sigma x0 (Salimans, Ho, ICLR 2022)."""
        alpha, sigma = self.process.alpha(self.t), self.process.sigma(self.t)
        return per_row(alpha, self.x0) * self.noise - per_row(sigma, self.x0) * self.x0

    @property
    def velocity(self) -> Tensor:
        """The target for the velocity dx_t / dt = alpha' x0 + sigma' noise, towards noise.

        For time that runs from noise to data, as in torchcfm, negate it.
        """
        alpha_dot, sigma_dot = self.process.alpha_dot(self.t), self.process.sigma_dot(self.t)
        return per_row(alpha_dot, self.x0) * self.x0 + per_row(sigma_dot, self.x0) * self.noise


@dataclass(frozen=True)
class StableTarget:
    """The posterior mean over references as a training target.

    Args:
        process: the process that makes x_t.
        references: the reference policy: `InBatch()`, a `Pool`, or a `ShardedPool` over many processes.
        noise_band: rows whose noise level sigma / alpha is below this use their source alone. Exactly unbiased for every
            value, since the rule does not look at the data; worth it where the source has all the weight anyway, because
            those rows then cost nothing. `pick_noise_band` finds such a level.
        kernel: the noise kernel; `StudentTKernel(D)` for PFGM++.
        chunk_size: references per matrix product; chosen by memory if None.

    Raises:
        ValueError: if `noise_band` is negative or NaN.
    """

    process: Process
    _: KW_ONLY
    references: References = field(default_factory=InBatch)
    noise_band: float = 0.0
    kernel: Kernel = field(default_factory=GaussianKernel)
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if not self.noise_band >= 0:
            raise ValueError(f"noise_band is {self.noise_band}: it is a noise level sigma / alpha, 0 or more.")

    @torch.no_grad()
    def __call__(
        self,
        x0: Tensor,
        x_t: Tensor,
        t: float | Tensor,
        group: Tensor | None = None,
        index: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        reference_group: Tensor | None = None,
        flip: Tensor | None = None,
        alone: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Target:
        """Compute the target of a batch.

        Args:
            x0: the clean samples that made x_t, shape (B, ...), floating point.
            x_t: noisy samples, process.perturb(x0, t), shape (B, ...).
            t: times, a float or shape (B,).
            group: condition that the network sees for each row, integers (B,); -1 where it sees none (label dropped for
                guidance), which lets the row use all references. Without it all rows use all references.
            index: place of each row in the data of the `Pool`, integers (B,).
            noise: the noise in x_t, shape (B, ...), if it is at hand: the noise, v and velocity of a row that has its own
                source alone are then bit for bit those of the usual loop.
            reference_group: true condition of each row, integers (B,), where `group` has labels dropped: lets a row whose
                label is dropped still serve as a reference for its class. For references from the batch.
            flip: which rows of x0 are mirror images, bool, (B,) for the last axis, or (B, m) with column j for axis -1-j.
                The references are flipped likewise for these rows (if `Pool.mirrored`: the set holds both anyway).
            alone: rows that use their source alone, bool (B,): those with an augmentation of their own.
            generator: where the references are drawn from.

        Returns:
            The target of each row.

        Raises:
            ValueError: if shapes, dtypes or devices do not fit, data are not finite, or the references cannot be chosen.
        """
        _check_pair(x0, x_t, noise)
        t = row_values("t", t, x0)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        require_rows((sigma >= 0) & sigma.isfinite(), "sigma", sigma, "it must not be negative: check t")
        require_rows(alpha.isfinite(), "alpha", alpha, "it must be finite: check t")
        for name, value in (("group", group), ("reference_group", reference_group), ("index", index)):
            if value is not None and value.shape != x0.shape[:1]:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}: one integer per row is needed, "
                    f"shape ({len(x0)},)."
                )
        variance = torch.zeros(len(x0), dtype=torch.promote_types(x0.dtype, torch.float32), device=x0.device)
        ess, own = torch.ones_like(variance), torch.ones_like(variance)
        mean = x0
        # Rows that are alone are of another kind than the rest, so they are no references for it either; rows below the
        # noise band are.
        shared = None if alone is None else _flags("alone", alone, x0).logical_not().nonzero()[:, 0]
        # A band without an upper end is DSM, also where alpha is 0 and the noise level infinite.
        in_band = (sigma / alpha >= self.noise_band) & math.isfinite(self.noise_band)
        if shared is not None:
            in_band = in_band[shared]
        active = in_band.nonzero()[:, 0]
        # A rank without rows of its own still answers the others.
        if len(active) or isinstance(self.references, ShardedPool):
            mirror = None if flip is None else _flags("flip", flip, x0, columns=True)
            batch = _Batch(_mirrored(x0, mirror), _mirrored(x_t, mirror), alpha, sigma, group, reference_group, index)
            if shared is not None:
                batch = batch.at(shared)
            truth = batch.group if batch.reference_group is None else batch.reference_group
            selection = self.references.select(batch.x0, truth, batch.index, generator)
            source = selection.source
            rows = active if shared is None else shared[active]
            if len(active) < len(batch.x0):
                batch, source = batch.at(active), source[active]
            # Those of a batch are its own by construction, and those of other ranks are looked at where they are.
            if not isinstance(self.references, InBatch) and selection.exchange is None:
                check_is_own(batch.x0, source, selection.bank, rows, batch.index)
            found = self._posterior(batch, selection, source)
            assert found.source_weight is not None
            # Where the source has all the weight, return it as it is, without the rounding of a decoder or a flip.
            certain = per_row(found.source_weight, x0) == 1
            update = _mirrored(found.mean, None if mirror is None else mirror[rows])
            if len(rows) == len(x0):
                mean = torch.where(certain, x0, update).to(x0.dtype)
                variance, ess, own = (
                    value.to(variance.dtype) for value in (found.variance, found.ess, found.source_weight)
                )
            else:
                mean = x0.index_copy(0, rows, torch.where(certain, x0[rows], update).to(x0.dtype))
                variance = variance.index_copy(0, rows, found.variance.to(variance.dtype))
                ess = ess.index_copy(0, rows, found.ess.to(ess.dtype))
                own = own.index_copy(0, rows, found.source_weight.to(own.dtype))
        return Target(mean, variance, ess, own, x0, x_t, self.process, t, self.kernel, noise)

    def _posterior(self, batch: "_Batch", selection: Selection, source: Tensor) -> Posterior:
        bank, kernel, exchange = selection.bank, self.kernel, selection.exchange
        reference_group = None if batch.group is None else selection.group
        # Sources of other ranks are no references of this bank.
        own = source if exchange is None else None
        query = Query.checked(batch.x_t, batch.alpha, batch.sigma, bank, own, batch.group, reference_group)
        query = replace(query, source=source)
        with full_precision(batch.x_t.device):
            anchor = Anchor(batch.x0.reshape(query.x_t.shape).to(query.x_t.dtype), source)
            excess = Excess(query, anchor, bank, kernel)
            partial = excess.own
            if exchange is not None:
                others = exchange.sums(query, anchor, bank, kernel, selection.mirrored, self.chunk_size)
                partial = partial.merge(others)
            else:
                partial = accumulate(query, bank, excess, partial, self.chunk_size)
                if selection.mirrored:
                    other = mirrored_sums(query, anchor, bank, kernel, partial.peak, self.chunk_size)
                    partial = partial.merge(other)
            return finish(partial, query, excess, kernel)


@dataclass(frozen=True)
class DenoisingTarget(StableTarget):
    """Denoising score matching: every row uses its source alone. A stable target whose noise band has no upper end.

    Args:
        process: the process that makes x_t.

    References:
        Vincent, "A Connection Between Score Matching and Denoising Autoencoders", Neural Computation 2011, equation 17.
    """

    references: References = field(default_factory=InBatch, init=False)
    noise_band: float = field(default=math.inf, init=False)
    kernel: Kernel = field(default_factory=GaussianKernel, init=False)
    chunk_size: int | None = field(default=None, init=False)


@dataclass(frozen=True)
class _Batch:
    """The rows of a call with flips undone."""

    x0: Tensor
    x_t: Tensor
    alpha: Tensor
    sigma: Tensor
    group: Tensor | None
    reference_group: Tensor | None
    index: Tensor | None

    def at(self, rows: Tensor) -> "_Batch":
        return _Batch(
            self.x0[rows],
            self.x_t[rows],
            self.alpha[rows],
            self.sigma[rows],
            None if self.group is None else self.group[rows],
            None if self.reference_group is None else self.reference_group[rows],
            None if self.index is None else self.index[rows],
        )


def _mirrored(x: Tensor, flip: Tensor | None) -> Tensor:
    """Mirror the rows of `x` (B, ...) for which column j of `flip` (B, m) is set along axis -1-j: its own inverse."""
    if flip is None:
        return x
    for column in range(flip.shape[1]):
        x = torch.where(flip[:, column].reshape(-1, *(1,) * (x.ndim - 1)), x.flip(-1 - column), x)
    return x


def _flags(name: str, value: Tensor, x0: Tensor, columns: bool = False) -> Tensor:
    if value.dtype != torch.bool or value.shape[:1] != x0.shape[:1] or value.ndim > 1 + columns:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}: it needs one bool per row, shape ({len(x0)},)"
            + (f" or ({len(x0)}, m)." if columns else ".")
        )
    if not columns:
        return value
    flags = value.reshape(len(x0), -1)
    if flags.shape[1] >= x0.ndim:
        raise ValueError(
            f"{name} has {flags.shape[1]} columns, but rows of shape {tuple(x0.shape[1:])} have fewer axes."
        )
    return flags


def _check_pair(x0: Tensor, x_t: Tensor, noise: Tensor | None) -> None:
    if not x0.is_floating_point():
        raise ValueError(f"x0 has dtype {x0.dtype}: it must be floating point (uint8 images: x0 / 127.5 - 1).")
    if x0.ndim < 2 or len(x0) == 0:
        raise ValueError(f"x0 has shape {tuple(x0.shape)}: it needs at least one row and one data dimension, (B, ...).")
    if not x_t.is_floating_point():
        raise ValueError(f"x_t has dtype {x_t.dtype}: noisy samples are floating point.")
    for name, value in (("x_t", x_t), ("noise", noise)):
        if value is None:
            continue
        if value.shape != x0.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, x0 has {tuple(x0.shape)}: they must be equal.")
        if value.device != x0.device:
            raise ValueError(f"{name} is on {value.device}, x0 is on {x0.device}: move one of them.")
