r"""Stable targets: what a network is trained to predict, with less variance and the same optimum.

Denoising score matching (DSM) regresses on the one sample $x_0$ that made $x_t$. The stable target is the posterior mean
$\hat x_0 = E[x_0 \mid x_t, \text{references}]$: the conditional expectation of the DSM target, hence unbiased, and never
of larger variance. Everything that people regress on is affine in it (see `target`), so one mean serves all.

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
from stablefield.reading import readable
from stablefield.shapes import (
    check_callable,
    check_generator,
    check_kind,
    check_tensor,
    flag,
    number,
    per_row,
    row_values,
    whole_number,
)
from stablefield.targets.check import Check, finite_check, require, row_numbers, value_check
from stablefield.targets.consistency import Correlation, consistency_checks
from stablefield.targets.excess import Anchor, Excess
from stablefield.targets.fixed import fixed_posterior
from stablefield.targets.kernel import GaussianKernel, Kernel
from stablefield.targets.outcome import Posterior, finish
from stablefield.targets.pool import stored_samples
from stablefield.targets.precision import full_precision
from stablefield.targets.query import Query
from stablefield.targets.references import InBatch, References
from stablefield.targets.sharded import ShardedPool
from stablefield.targets.sums import accumulate_all
from stablefield.targets.target import Target

__all__ = ["DenoisingTarget", "StableTarget"]


@dataclass(frozen=True)
class StableTarget:
    """The posterior mean over references as a training target.

    Args:
        process: the process that makes x_t.
        references: the reference policy: a `Pool`, a `ShardedPool` over many processes, or `InBatch()`. Every set lowers the
            variance of each row's target; that of the batch's gradient falls only with references well beyond the batch,
            since rows share theirs: best the whole data set, last the batch itself.
        noise_band: rows whose noise level sigma / alpha is below this use their source alone. Exactly unbiased for every
            value, since the rule does not look at the data; worth it where the source has all the weight anyway, because
            those rows then cost nothing. `pick_noise_band` finds such a level.
        kernel: the noise kernel; `StudentTKernel(D)` for PFGM++.
        chunk_size: references per matrix product; chosen by memory if None.
        capacity: how many rows of a batch, the noisiest, may use references; None for all. As exactly unbiased as the band,
            and it makes the work of a call the same for all batches. In a compiled or captured function, where work cannot
            depend on how many rows are in the band, it is what makes a band save work. Rows of equal noise are chosen at
            random.
        validate_args: compare x_t with x0, t and noise, as `consistency` describes, and how often samples are drawn with
            what the `Pool` assumes. False for rows that you choose yourself, such as a grid of noisy samples, or that the
            process did not make in every dimension, such as masked data. All other checks stay.

    Raises:
        ValueError: if `noise_band` is negative or NaN, or `capacity` is not a whole number from 1.
    """

    process: Process
    _: KW_ONLY
    references: References
    noise_band: float = 0.0
    kernel: Kernel = field(default_factory=GaussianKernel)
    chunk_size: int | None = None
    capacity: int | None = None
    validate_args: bool = True
    _correlation: Correlation = field(default_factory=Correlation, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_kind("process", self.process, Process, "a Process, such as EDM()")
        for call in ("select", "checks"):
            check_callable("references", getattr(self.references, call, None), "Pool(images), with select and checks")
        for call in ("log_ratio", "log_density"):
            check_callable(
                "kernel", getattr(self.kernel, call, None), "GaussianKernel(), with log_ratio and log_density"
            )
        flag("validate_args", self.validate_args)
        if not number("noise_band", self.noise_band) >= 0:
            raise ValueError(f"noise_band is {self.noise_band}: it is a noise level sigma / alpha, 0 or more.")
        for name, value in (("capacity", self.capacity), ("chunk_size", self.chunk_size)):
            if value is not None:
                whole_number(name, value, 1)

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
                guidance, independently of the sample), which lets the row use all references. Needed if the references have
                conditions; otherwise all rows use all references.
            index: place of each row in the data of the `Pool`, integers (B,).
            noise: the noise in x_t, shape (B, ...), if it is at hand: the noise, v and velocity of a row that has its own
                source alone are then bit for bit those of the usual loop.
            reference_group: true condition of each row, integers (B,), where `group` has labels dropped: lets a row whose
                label is dropped still serve as a reference for its class. For references from the batch.
            flip: which rows of x0 are mirror images, bool, (B,) for the last axis, or (B, m) with column j for axis -1-j.
                The references are flipped likewise for these rows (if `Pool.mirrored`: the set holds both anyway).
            alone: rows that use their source alone, bool (B,): those with an augmentation of their own.
            generator: where the references are drawn from, and which rows of equal noise the `capacity` takes (by torch's
                global generator in a compiled or captured function).

        Returns:
            The target of each row.

        Raises:
            TypeError: if an argument is no tensor.
            ValueError: if shapes, dtypes or devices do not fit, data are not finite, t is outside of the process's range,
                x_t is not what the process makes of x0 at t, or the references cannot be chosen.

        Warns:
            UserWarning: once, if the rows seen so far were not drawn from a `Pool` as it assumes.
        """
        _check_pair(x0, x_t, noise)
        t = row_values("t", t, x0)
        if t.is_floating_point() and t.dtype.itemsize < 4:
            t = t.float()  # alpha and sigma would be rounded as well
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        check_generator("generator", generator)
        look = readable(x0.device)
        for name, value in (("group", group), ("reference_group", reference_group), ("index", index)):
            if value is not None:
                row_numbers(name, value, x0)
        # A band without an upper end is DSM, also where alpha is 0 and the noise level infinite.
        single = self.noise_band == math.inf
        if group is None and not single and getattr(self.references, "group", None) is not None:
            raise ValueError(
                f"group is missing: {self.references} has a label for each sample. Pass the label of each row, or "
                "torch.full((len(x0),), -1) for a network that sees none, or references without labels."
            )
        alone = None if alone is None else _flags("alone", alone, x0)
        mirror = None if flip is None else _flags("flip", flip, x0, columns=True)
        if look:
            require(*self._checks(x0, x_t, t, alpha, sigma, group, reference_group, index, noise, alone))
        level = sigma / alpha
        # Without noise a row can only be its source.
        use = torch.zeros_like(level, dtype=torch.bool) if single else (level >= self.noise_band) & (sigma > 0)
        if alone is not None:
            use = use & ~alone
        if single:
            rows = torch.zeros(0, dtype=torch.long, device=x0.device)
        elif look:
            rows = _noisiest(level, use, self.capacity, generator)
        else:
            rows = _noisiest_of_a_fixed_number(level, use, self.capacity)
        # What a row has that uses its source alone.
        zero = torch.zeros(len(x0), dtype=torch.promote_types(x0.dtype, torch.float32), device=x0.device)
        values = [x0, zero, zero + 1, zero + 1]
        # A rank without rows of its own still answers the others.
        if len(rows) or isinstance(self.references, ShardedPool):
            batch = _Batch(_mirrored(x0, mirror), _mirrored(x_t, mirror), alpha, sigma, group, reference_group, index)
            found = (self._posterior if look else self._fixed_posterior)(batch, rows, alone, generator)
            assert found.source_weight is not None
            # Where the source has all the weight, it is returned as it is, without the rounding of a decoder or a flip.
            keep = found.source_weight == 1 if look else (found.source_weight == 1) | ~use[rows]
            update = _mirrored(found.mean, None if mirror is None else mirror[rows])
            news = (update, found.variance, found.ess, found.source_weight)
            values = [_put(old, rows, keep, new) for old, new in zip(values, news, strict=True)]
        mean, variance, ess, source_weight = values
        return Target(mean, variance, ess, source_weight, x0, x_t, self.process, t, self.kernel, noise)

    def _checks(
        self,
        x0: Tensor,
        x_t: Tensor,
        t: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        group: Tensor | None,
        reference_group: Tensor | None,
        index: Tensor | None,
        noise: Tensor | None,
        alone: Tensor | None,
    ) -> list[Check]:
        """What the values of the arguments must meet, looked at together."""
        checks = [
            value_check((sigma >= 0) & sigma.isfinite(), "sigma", sigma, "it must not be negative: check t"),
            value_check(alpha.isfinite(), "alpha", alpha, "it must be finite: check t"),
        ]
        if self.validate_args:
            checks += consistency_checks(
                self.process, self.kernel, x0, x_t, t, alpha, sigma, noise, alone, self._correlation
            )
        else:
            rest = torch.ones_like(sigma, dtype=torch.bool) if alone is None else ~alone
            sizes = [torch.where(rest, x.flatten(1).to(sigma.dtype).norm(dim=1), 0) for x in (x0, x_t)]
            checks += [finite_check(size, name) for size, name in zip(sizes, ("x0", "x_t"), strict=True)]
        if self.noise_band == math.inf:  # no reference is asked for
            return checks
        return checks + self.references.checks(x0, group, reference_group, index, alone, self.validate_args)

    def _posterior(
        self, batch: "_Batch", rows: Tensor, alone: Tensor | None, generator: torch.Generator | None
    ) -> Posterior:
        """The posterior of `rows` of the batch over the references of all of its rows that are not alone."""
        # Rows that are alone are of another kind than the rest, so they are no references for it either; rows below the
        # noise band are.
        shared, places = batch, torch.arange(len(batch.x0), device=rows.device)
        if alone is not None:
            places = (~alone).nonzero()[:, 0]
            shared = batch.at(places)
        selection = self.references.select(shared.x0, shared.truth, shared.index, generator)
        bank, kernel, exchange, stored = selection.bank, self.kernel, selection.exchange, selection.stored
        samples = None
        if stored is not None and selection.unsure == "all":
            samples = stored_samples(shared.x0, stored[1], stored[0], places)
        among = rows if alone is None else ((~alone).cumsum(0) - 1)[rows]
        source, source_prior = selection.source[among], selection.source_prior
        source_prior = None if source_prior is None else source_prior[among]
        if len(rows) < len(batch.x0):
            batch = batch.at(rows)
        if stored is not None and selection.unsure == "using":
            samples = stored_samples(batch.x0, stored[1][among], stored[0], rows)
        elif samples is not None:
            samples = samples[among]
        if samples is not None:
            batch = _as_stored(batch, samples)
        reference_group = None if batch.group is None else selection.group
        query = Query.checked(
            batch.x_t,
            batch.alpha,
            batch.sigma,
            bank,
            # Sources of other ranks, and those that are in the set of their own row alone, are no references of this bank.
            source if exchange is None and source_prior is None else None,
            batch.group,
            reference_group,
            selection.log_prior,
            source_prior,
        )
        query = replace(query, source=source)
        with full_precision(batch.x_t.device):
            anchor = Anchor(batch.x0.reshape(query.x_t.shape).to(query.x_t.dtype), source)
            excess = Excess(query, anchor, bank, kernel)
            partial = excess.own
            if exchange is not None:
                others = exchange.sums(query, anchor, bank, kernel, selection.mirrored, self.chunk_size, rows)
                partial = partial.merge(others)
            else:
                mirrored, size = selection.mirrored, self.chunk_size
                partial = accumulate_all(query, anchor, bank, excess, kernel, partial, mirrored, size)
            return finish(partial, query, excess, kernel)

    def _fixed_posterior(
        self, batch: "_Batch", rows: Tensor, alone: Tensor | None, generator: torch.Generator | None
    ) -> Posterior:
        """The same by operations that do not depend on values."""
        x0, log_prior = batch.x0, None
        if alone is not None and isinstance(self.references, InBatch):
            log_prior = torch.zeros(len(alone), device=alone.device).masked_fill(alone, -torch.inf)
            # A weight of 0 does not take away what is not finite.
            x0 = torch.where(alone.reshape(-1, *(1,) * (x0.ndim - 1)), 0, x0)
        selection = self.references.select(x0, batch.truth, batch.index, generator)
        some = batch.at(rows)
        log_prior = selection.log_prior if log_prior is None else log_prior
        return fixed_posterior(
            some.x_t,
            some.alpha,
            some.sigma,
            selection.bank,
            selection.source[rows],
            some.group,
            None if some.group is None else selection.group,
            log_prior,
            kernel=self.kernel,
            anchor=some.x0,
            mirrored=selection.mirrored,
            chunk_size=self.chunk_size,
            least_level=self.noise_band,
        )


@dataclass(frozen=True)
class DenoisingTarget(StableTarget):
    """Denoising score matching: every row uses its source alone. A stable target whose noise band has no upper end.

    Args:
        process: the process that makes x_t.

    References:
        Vincent, "A Connection Between Score Matching and Denoising Autoencoders", Neural Computation 2011, equation 17.
    """

    references: References = field(default_factory=InBatch, init=False)  # none is asked for
    noise_band: float = field(default=math.inf, init=False)
    kernel: Kernel = field(default_factory=GaussianKernel, init=False)
    chunk_size: int | None = field(default=None, init=False)
    capacity: int | None = field(default=None, init=False)


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

    @property
    def truth(self) -> Tensor | None:
        """The condition of each source, where that of the row may have been dropped."""
        return self.group if self.reference_group is None else self.reference_group

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


def _as_stored(batch: "_Batch", samples: Tensor) -> "_Batch":
    """The batch with its `samples` (B, d) as the pool holds them in place of the clean samples, and the same noise.

    A pool in half precision, or of bytes, holds samples that were rounded. Beside them a source that was not would be
    favoured: its distance to x_t alone would be free of rounding.
    """
    stored = samples.view(batch.x0.shape)
    moved = torch.addcmul(batch.x_t.to(stored.dtype), per_row(batch.alpha, stored), stored - batch.x0)
    return replace(batch, x0=stored, x_t=moved)


def _noisiest(level: Tensor, use: Tensor, capacity: int | None, generator: torch.Generator | None) -> Tensor:
    """The rows for which `use` is set, or the `capacity` noisiest of them, in their order."""
    rows = use.nonzero()[:, 0]
    if capacity is None or len(rows) <= capacity:
        return rows
    return rows[_descending(level[rows], generator)[:capacity].sort().values]


def _noisiest_of_a_fixed_number(level: Tensor, use: Tensor, capacity: int | None) -> Tensor:
    """`capacity` rows, if there are as many, and among them the noisiest for which `use` is set."""
    if capacity is None or len(level) <= capacity:
        return torch.arange(len(level), device=level.device)
    # No compiler takes a generator, and none is needed: ties must be broken independently of the data, in any way.
    return _descending(torch.where(use, level, -1), None)[:capacity]


def _descending(level: Tensor, generator: torch.Generator | None) -> Tensor:
    """The order of descending levels, equal ones in random order: their places may depend on the data."""
    device = level.device if generator is None else generator.device
    order = torch.randperm(len(level), generator=generator, device=device).to(level.device)
    return order[level[order].sort(descending=True, stable=True).indices]


def _put(old: Tensor, rows: Tensor, keep: Tensor, new: Tensor) -> Tensor:
    """Put `new` into `old` at `rows`, but for those to `keep`."""
    whole = len(rows) == len(old)
    keep = keep.reshape(-1, *(1,) * (old.ndim - 1))
    value = torch.where(keep, old if whole else old[rows], new).to(old.dtype)
    return value if whole else old.index_copy(0, rows, value)


def _mirrored(x: Tensor, flip: Tensor | None) -> Tensor:
    """Mirror the rows of `x` (B, ...) for which column j of `flip` (B, m) is set along axis -1-j: its own inverse."""
    if flip is None:
        return x
    for column in range(flip.shape[1]):
        x = torch.where(flip[:, column].reshape(-1, *(1,) * (x.ndim - 1)), x.flip(-1 - column), x)
    return x


def _flags(name: str, value: Tensor, x0: Tensor, columns: bool = False) -> Tensor:
    check_tensor(name, value)
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
    for name, value in (("x0", x0), ("x_t", x_t), ("noise", noise)):
        if value is not None:
            check_tensor(name, value)
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
        if not value.is_floating_point():
            raise ValueError(f"{name} has dtype {value.dtype}: noise is floating point.")
