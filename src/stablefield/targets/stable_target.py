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
    flag,
    number,
    row_values,
    whole_number,
)
from stablefield.targets.check import finite_check, require, row_numbers, to_host, value_check
from stablefield.targets.consistency import Correlation, Measured, consistency_checks
from stablefield.targets.excess import Anchor, Excess
from stablefield.targets.kernel import GaussianKernel, Kernel
from stablefield.targets.outcome import Posterior, finish
from stablefield.targets.pool import stored_samples
from stablefield.targets.precision import full_precision
from stablefield.targets.query import Query
from stablefield.targets.references import InBatch, References
from stablefield.targets.rows import (
    Batch,
    Known,
    as_stored,
    check_pair,
    flipped,
    noisiest,
    noisiest_of_a_fixed_number,
    put,
    row_flags,
    sent,
)
from stablefield.targets.sharded import ShardedPool
from stablefield.targets.static import static_posterior
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
        labels: Tensor | None = None,
        index: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        reference_labels: Tensor | None = None,
        flip: Tensor | None = None,
        source_only: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Target:
        """Compute the target of a batch.

        Args:
            x0: the clean samples that made x_t, shape (B, ...), floating point.
            x_t: noisy samples, process.perturb(x0, t), shape (B, ...).
            t: times, a float or shape (B,).
            labels: condition that the network sees for each row, integers (B,); -1 where it sees none (label dropped for
                guidance, independently of the sample), which lets the row use all references. Needed if the references have
                conditions; otherwise all rows use all references.
            index: place of each row in the data of the `Pool`, integers (B,).
            noise: the noise in x_t, shape (B, ...), if it is at hand: the noise, v and velocity of a row that has its own
                source alone are then bit for bit those of the usual loop.
            reference_labels: true condition of each row, integers (B,), where `labels` has labels dropped: lets a row whose
                label is dropped still serve as a reference for its class. For references from the batch.
            flip: which rows of x0 are mirror images, bool, (B,) for the last axis, or (B, m) with column j for axis -1-j.
                The references are flipped likewise for these rows (if `Pool.mirrored`: the set holds both anyway).
            source_only: rows that use their source alone, bool (B,): those with an augmentation of their own.
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
        check_pair(x0, x_t, noise)
        t = row_values("t", t, x0)
        if t.is_floating_point() and t.dtype.itemsize < 4:
            t = t.float()  # alpha and sigma would be rounded as well
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        check_generator("generator", generator)
        look = readable(x0.device)
        for name, value in (("labels", labels), ("reference_labels", reference_labels), ("index", index)):
            if value is not None:
                row_numbers(name, value, x0)
        # A band without an upper end is DSM, also where alpha is 0 and the noise level infinite.
        single = self.noise_band == math.inf
        if labels is None and not single and getattr(self.references, "labels", None) is not None:
            raise ValueError(
                f"labels is missing: {self.references} has a label for each sample. Pass the label of each row, or "
                "torch.full((len(x0),), -1) for a network that sees none, or references without labels."
            )
        source_only = None if source_only is None else row_flags("source_only", source_only, x0)
        mirror = None if flip is None else row_flags("flip", flip, x0, columns=True)
        known = Known(alpha, sigma, source_only)
        if look:
            known = self._checked(x0, x_t, t, alpha, sigma, labels, reference_labels, index, noise, source_only)
        use = self._uses(known)
        if single:
            rows = torch.zeros(0, dtype=torch.long)
        elif look:
            rows = noisiest(known.level, use, self.capacity, generator)
        else:
            rows = noisiest_of_a_fixed_number(known.level, use, self.capacity)
        # What a row has that uses its source alone.
        zero = torch.zeros(len(x0), dtype=torch.promote_types(x0.dtype, torch.float32), device=x0.device)
        values = [x0, zero, zero + 1, zero + 1]
        # A rank without rows of its own still answers the others.
        if len(rows) or isinstance(self.references, ShardedPool):
            batch = Batch(flipped(x0, mirror), flipped(x_t, mirror), alpha, sigma, labels, reference_labels, index)
            if look:
                found = self._posterior(batch, rows, known, generator)
                rows = sent(rows, x0.device)
            else:
                found = self._fixed_posterior(batch, rows, source_only, generator)
            assert found.source_weight is not None
            # Where the source has all the weight, it is returned as it is, without the rounding of a decoder or a flip.
            keep = found.source_weight == 1
            keep = keep if look else keep | ~use[rows]
            update = flipped(found.mean, None if mirror is None else mirror[rows])
            news = (update, found.variance, found.ess, found.source_weight)
            values = [put(old, rows, keep, new) for old, new in zip(values, news, strict=True)]
        mean, variance, ess, source_weight = values
        return Target(mean, variance, ess, source_weight, x0, x_t, self.process, t, self.kernel, noise)

    def _uses(self, known: Known) -> Tensor:
        """Which rows may use references, bool (B,)."""
        # Without noise a row can only be its source.
        use = (known.level >= self.noise_band) & (known.sigma > 0)
        return use if known.source_only is None else use & ~known.source_only

    def _checked(
        self,
        x0: Tensor,
        x_t: Tensor,
        t: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        labels: Tensor | None,
        reference_labels: Tensor | None,
        index: Tensor | None,
        noise: Tensor | None,
        source_only: Tensor | None,
    ) -> Known:
        """What the host has to know of each row, once it has found that all values are as they must be.

        Everything is brought to the host together, so that a GPU is waited for once, and has few small operations to do.
        """
        if self.validate_args:
            measured = Measured.of(x0, x_t, alpha, sigma, noise, source_only).rows
        else:
            dtype = torch.promote_types(x0.dtype, torch.float32)
            measured = tuple(torch.linalg.vector_norm(x.flatten(1).to(dtype), dim=1) for x in (x0, x_t))
        host = to_host(t, alpha, sigma, labels, reference_labels, index, source_only, *measured)
        times, alphas, sigmas, labels, reference_labels, index, source_only, *measured = host
        assert times is not None
        assert alphas is not None
        assert sigmas is not None
        t, alpha, sigma = times, alphas, sigmas
        checks = [
            value_check((sigma >= 0) & sigma.isfinite(), "sigma", sigma, "it must not be negative: check t"),
            value_check(alpha.isfinite(), "alpha", alpha, "it must be finite: check t"),
        ]
        norms = [norm for norm in measured if norm is not None]
        if self.validate_args:
            checks += consistency_checks(
                self.process,
                self.kernel,
                x0,
                x_t,
                t,
                alpha,
                sigma,
                noise,
                source_only,
                self._correlation,
                Measured(*norms),
            )
        else:
            sizes = norms if source_only is None else [norm.masked_fill(source_only, 0) for norm in norms]
            checks += [finite_check(size, name) for size, name in zip(sizes, ("x0", "x_t"), strict=True)]
        if self.noise_band != math.inf:  # references are asked for
            checks += self.references.checks(x0, labels, reference_labels, index, source_only, self.validate_args)
        require(*checks)
        return Known(alpha, sigma, source_only)

    def _posterior(self, batch: Batch, rows: Tensor, known: Known, generator: torch.Generator | None) -> Posterior:
        """The posterior of `rows` (on the host) of the batch over the references of all of its rows that may serve."""
        device = batch.x0.device
        levels = known.levels_at(rows)
        # Rows that use their source only are of another kind than the rest, so they serve no other row; rows below the
        # noise band do.
        shared, places, among = batch, torch.arange(len(batch.x0)), rows
        if known.source_only is not None:
            places = (~known.source_only).nonzero()[:, 0]
            shared = batch.at(sent(places, device))
            among = ((~known.source_only).cumsum(0) - 1)[rows]
        rows, among, places = (sent(some, device) for some in (rows, among, places))
        selection = self.references.select(shared.x0, shared.truth, shared.index, generator)
        matrix, kernel, exchange, stored = selection.matrix, self.kernel, selection.exchange, selection.stored
        samples = None
        if stored is not None and selection.unsure == "all":
            samples = stored_samples(shared.x0, stored[1], stored[0], places)
        source, source_prior = selection.source[among], selection.source_prior
        source_prior = None if source_prior is None else source_prior[among]
        if len(rows) < len(batch.x0):
            batch = batch.at(rows)
        if stored is not None and selection.unsure == "using":
            samples = stored_samples(batch.x0, stored[1][among], stored[0], rows)
        elif samples is not None:
            samples = samples[among]
        if samples is not None:
            batch = as_stored(batch, samples)
        reference_labels = None if batch.labels is None else selection.labels
        query = Query.checked(
            batch.x_t,
            batch.alpha,
            batch.sigma,
            matrix,
            # Sources of other ranks, and those that are in the set of their own row alone, are no references of this matrix.
            source if exchange is None and source_prior is None else None,
            batch.labels,
            reference_labels,
            selection.log_prior,
            source_prior,
            levels=levels,
        )
        query = replace(query, source=source)
        with full_precision(batch.x_t.device):
            anchor = Anchor(batch.x0.reshape(query.x_t.shape).to(query.x_t.dtype), source)
            excess = Excess(query, anchor, matrix, kernel)
            partial = excess.own
            if exchange is not None:
                others = exchange.sums(query, anchor, matrix, kernel, selection.mirrored, self.chunk_size, rows)
                partial = partial.merge(others)
            else:
                mirrored, size = selection.mirrored, self.chunk_size
                partial = accumulate_all(query, anchor, matrix, excess, kernel, partial, mirrored, size)
            return finish(partial, query, excess, kernel)

    def _fixed_posterior(
        self, batch: Batch, rows: Tensor, source_only: Tensor | None, generator: torch.Generator | None
    ) -> Posterior:
        """The same by operations that do not depend on values."""
        x0, log_prior = batch.x0, None
        if source_only is not None and isinstance(self.references, InBatch):
            log_prior = torch.zeros(len(source_only), device=source_only.device).masked_fill(source_only, -torch.inf)
            # A weight of 0 does not take away what is not finite.
            x0 = torch.where(source_only.reshape(-1, *(1,) * (x0.ndim - 1)), 0, x0)
        selection = self.references.select(x0, batch.truth, batch.index, generator)
        some = batch.at(rows)
        log_prior = selection.log_prior if log_prior is None else log_prior
        return static_posterior(
            some.x_t,
            some.alpha,
            some.sigma,
            selection.matrix,
            selection.source[rows],
            some.labels,
            None if some.labels is None else selection.labels,
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
