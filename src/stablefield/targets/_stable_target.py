r"""Stable targets: training targets with less variance and the same optimum.

Denoising score matching (DSM) regresses on the one sample $x_0$ that made $x_t$. The stable target is the posterior mean
$\hat x_0 = E[x_0 \mid x_t, \text{references}]$: the conditional expectation of the DSM target, hence unbiased, and never
of larger variance. Every common regression target is affine in it (see `_target`), so one mean serves all. Its weights are
the softmax over the references y of $-|x_t - \alpha y|^2 / 2 \sigma^2$: `_posterior` has the formula, `_engine/logits`
computes the exponents, and `_engine/online_softmax` sums.

DSM is the stable target with one reference, and uses the same code.

References:
    Xu, Tong, Jaakkola, "Stable Target Field for Reduced Variance Score Estimation in Diffusion Models", ICLR 2023,
    equations 6 to 8.
    Bertrand, Gagneux, Massias, Emonet, "On the Closed-Form of Flow Matching", 2025: the mean as a conditional expectation.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace

import torch
from torch import Tensor

from stablefield._shapes import (
    check_callable,
    check_generator,
    check_kind,
    flag,
    number,
    row_values,
    whole_number,
)
from stablefield.diffusion._process import Process, scales
from stablefield.targets._band import NoiseBand
from stablefield.targets._checks import (
    check_pair,
    finite_check,
    require,
    row_flags,
    row_numbers,
    to_host,
    value_check,
)
from stablefield.targets._consistency import Correlation, Measured, consistency_checks
from stablefield.targets._engine.assembly import posterior_of
from stablefield.targets._engine.query import Host, Plan, Query, host_access
from stablefield.targets._log_likelihood import LogLikelihood
from stablefield.targets._perturbation_kernel import GaussianKernel, PerturbationKernel
from stablefield.targets._pool import Pool
from stablefield.targets._references import Batch, InBatch, References, Selection
from stablefield.targets._rows import Rows, flipped_rows, mirrored, noisiest, put, sent
from stablefield.targets._sharded import ShardedPool
from stablefield.targets._target import Posterior, Target
from stablefield.targets._verification import verified_samples

__all__ = ["DenoisingTarget", "StableTarget"]


@dataclass(frozen=True)
class StableTarget:
    """The posterior mean over references as a training target.

    It has the optimum of the usual target in a squared error with a weight that depends on t alone. Other losses, such as
    the absolute error or Huber's, have another optimum with it: keep the single sample there.

    Args:
        process: the process that makes x_t.
        references: the reference policy: a `Pool`, a `ShardedPool` over many processes, or `InBatch()`. Every set lowers the
            variance of each row's target. Because rows share references, the variance of the batch's gradient falls only
            with references well beyond the batch: the whole data set is best, the batch itself worst.
        noise_band: rows with a noise level sigma / alpha below this use only their source. Exactly unbiased for every value,
            because the rule does not depend on the data. It saves work at levels where the source has all the weight anyway;
            `pick_noise_band` finds one. Its whole result, a `NoiseBand`, gives each label a level of its own.
        kernel: the perturbation kernel; `StudentTKernel(D)` for PFGM++.
        chunk_size: references per matrix product; chosen by memory if None.
        capacity: how many rows of a batch, the noisiest, may use references; None for all. It is as exactly unbiased as the
            band, and makes the work of a call the same for all batches. A compiled or captured function, whose work cannot
            depend on how many rows are in the band, needs it to profit from a band. Ties in noise are broken at random.
        validate_args: check x_t against x0, t and noise, as `_consistency` describes, and the frequency of samples against
            the `Pool`'s assumption. Pass False for rows that you choose yourself, such as a grid of noisy samples. All other
            checks remain. It does not make masked or padded data right, which have noise in some dimensions only: the mask
            is a condition, so pass `labels=` with one number per mask, here and to the `Pool`, or `source_only=`.

    Raises:
        ValueError: if `noise_band` is negative or NaN, or `capacity` is not a whole number from 1.
    """

    process: Process
    _: KW_ONLY
    references: References
    noise_band: float | NoiseBand = 0.0
    kernel: PerturbationKernel = field(default_factory=GaussianKernel)
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
        if not isinstance(self.noise_band, NoiseBand) and not number("noise_band", self.noise_band) >= 0:
            raise ValueError(f"noise_band is {self.noise_band}: pass a noise level sigma / alpha, 0 or more.")
        for name, value in (("capacity", self.capacity), ("chunk_size", self.chunk_size)):
            if value is not None:
                whole_number(name, value, 1)

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
        approximate_log_likelihood: Callable[[Tensor, Tensor], Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Target:
        """Compute the target of a batch.

        Args:
            x0: the clean samples that made x_t, shape (B, ...), floating point.
            x_t: noisy samples, process.perturb(x0, t), shape (B, ...).
            t: times, a float or shape (B,).
            labels: condition that the network sees for each row, integers (B,); -1 if it sees none (label dropped for
                guidance, independently of the sample), which lets the row use all references. Needed if the references have
                conditions; otherwise all rows use all references.
            index: each row's index in the data of the `Pool`, integers (B,).
            noise: the noise in x_t, shape (B, ...), if available: the noise, v and velocity of a row that uses only its
                source are then bit for bit those of the usual loop.
            reference_labels: true condition of each row, integers (B,), if `labels` has dropped labels: lets a row with a
                dropped label still serve as a reference for its class. For references from the batch.
            flip: which rows of x0 are mirror images, bool, (B,) for the last axis, or (B, m) with column j for axis -1-j.
                The references are flipped in the same way for these rows (if `Pool.mirrored`, the set holds both anyway).
                For a `Pool` with `flipped` samples: which rows are flipped samples, (B,).
            source_only: rows that use only their source, bool (B,): those with any other augmentation.
            approximate_log_likelihood: for conditions other than labels, such as captions: a function of row numbers (b,)
                and reference numbers (c,), indices into the data of the `Pool`, that returns log p(condition of the row |
                reference) up to a constant per row, shape (b, c); -inf excludes a reference. The target is the posterior
                mean, and so unbiased, if this likelihood is exact, and otherwise as good as it is. It is called for all
                references, chunk by chunk, also where labels exclude most.
            generator: draws the references, and breaks ties for the `capacity` (torch's global generator does so in a
                compiled or captured function).

        Returns:
            The target of each row.

        Raises:
            TypeError: if an argument is not a tensor.
            ValueError: if shapes, dtypes or devices do not fit, data are not finite, t is outside the process's range,
                x_t does not fit the process, x0 and t, or the references cannot be chosen; or if `x0` or the process would
                get a gradient, which a stable target cannot train (`DenoisingTarget` can).

        Warns:
            UserWarning: once, if the rows so far were not drawn from a `Pool` as it assumes, or not flipped with probability
                1/2 where it holds flipped samples, or if the batches are no random subsets where a `size` needs them.
        """
        check_pair(x0, x_t, noise)
        t = row_values("t", t, x0)
        if t.is_floating_point() and t.dtype.itemsize < 4:
            t = t.float()  # or alpha and sigma would be rounded as well
        # An infinite band is DSM, even if alpha is 0 and the noise level infinite.
        single = self._least_level == math.inf
        alpha, sigma = scales(self.process, t.detach() if t.requires_grad and not single else t)
        if torch.is_grad_enabled() and not single:
            self._check_constant(x0, alpha, sigma)
        with torch.no_grad():
            check_generator("generator", generator)
            host = host_access(x0.device)
            labels, reference_labels, index = (
                None if value is None else row_numbers(name, value, x0)
                for name, value in (("labels", labels), ("reference_labels", reference_labels), ("index", index))
            )
            if labels is None and not single and getattr(self.references, "labels", None) is not None:
                raise ValueError(
                    f"labels is missing: {self.references} has a label for each sample. Pass the label of each row, or "
                    "torch.full((len(x0),), -1) for a network that sees none, or references without labels."
                )
            source_only = None if source_only is None else row_flags("source_only", source_only, x0)
            mirror = None if flip is None else row_flags("flip", flip, x0, columns=True)
            flipped = None
            if getattr(self.references, "flipped", None) is not None:
                flipped, mirror = flipped_rows(mirror, x0), None
            likelihood = approximate_log_likelihood
            if single:  # no row uses references
                likelihood = None
            if likelihood is not None:
                check_callable("approximate_log_likelihood", likelihood, "log p(condition of row | reference)")
                if not isinstance(self.references, Pool):
                    raise ValueError(
                        f"approximate_log_likelihood numbers the samples of a Pool, references is {self.references}: pass "
                        "references=Pool(data)."
                    )
            batch = Batch(
                x0=x0,
                x_t=x_t,
                alpha=alpha,
                sigma=sigma,
                labels=labels,
                reference_labels=reference_labels,
                index=index,
                source_only=source_only,
                flipped=flipped,
                mirrored=None if mirror is None else mirror[:, 0],
            )
            # The values that decide which rows use references, if the host may read them.
            known = batch if host is Host.NEVER else self._checked(batch, t, noise)
            noise_level = known.sigma / known.alpha
            # Without noise a row can only be its source.
            use = (noise_level >= self._levels(known, host)) & (known.sigma > 0)
            use = use if known.source_only is None else use & ~known.source_only
            rows = (
                torch.zeros(0, dtype=torch.long, device="cpu")
                if single
                else noisiest(noise_level, use, self.capacity, generator, host)
            )
            # The values of a row that uses only its source.
            zero = torch.zeros(len(x0), dtype=torch.promote_types(x0.dtype, torch.float32), device=x0.device)
            values = [x0 if single or not x0.requires_grad else x0.detach(), zero, zero + 1, zero + 1]
            # A rank without own rows must still answer the others.
            if len(rows) or isinstance(self.references, ShardedPool):
                unflipped = replace(batch, x0=mirrored(x0, mirror), x_t=mirrored(x_t, mirror))
                found = self._posterior(unflipped, rows, known, host, generator, likelihood)
                rows = sent(rows, x0.device)
                assert found.source_weight is not None
                # If the source has all the weight, return it unchanged, without the rounding of a decoder or a flip.
                keep = found.source_weight == 1
                keep = keep | ~use[rows] if host is Host.NEVER else keep
                mean = mirrored(found.mean, None if mirror is None else mirror[rows])
                news = (mean, found.variance, found.ess, found.source_weight)
                values = [put(old, rows, keep, new, host) for old, new in zip(values, news, strict=True)]
            mean, variance, ess, source_weight = values
            return Target(mean, variance, ess, source_weight, x0, x_t, self.process, t, self.kernel, noise, single)

    def _check_constant(self, x0: Tensor, alpha: Tensor, sigma: Tensor) -> None:
        """Check that no gradient would flow to what made the samples.

        The target differs from the single sample by a term of mean 0 only for the given data and process: the two losses
        differ by E[V], whose gradient in the data or the process is not 0.
        """
        for name, value in (("x0", x0), ("alpha", alpha), ("sigma", sigma)):
            if value.requires_grad:
                detached = "x0.detach()" if value is x0 else f"a process with the parameters of {self.process} detached"
                raise ValueError(
                    f"{name} requires a gradient, and a stable target would send a wrong one to what makes {name}, such as "
                    f"a trained encoder or schedule. If that is not trained by this loss, pass {detached}; if it is, use "
                    "DenoisingTarget(process)."
                )

    @property
    def _label_levels(self) -> Sequence[float] | None:
        """The noise level from which the rows of each label use references, and last that of rows without a label."""
        band = self.noise_band
        if not isinstance(band, NoiseBand) or band.by_label is None or band.unlabelled is None:
            return None
        return None if getattr(self.references, "labels", None) is None else (*band.by_label, band.unlabelled)

    @property
    def _least_level(self) -> float:
        """The lowest noise level at which a row can use references."""
        levels = self._label_levels
        return float(self.noise_band) if levels is None else min(levels)

    def _levels(self, known: Batch, host: Host) -> Tensor | float:
        """The noise level from which each row uses references, (B,) on the host, or one for all.

        Raises:
            ValueError: if it depends on labels that a compiled or captured function cannot read.
        """
        levels = self._label_levels
        if levels is None or known.labels is None:
            return float(self.noise_band)
        if host is Host.NEVER:
            raise ValueError(
                "noise_band has a level for each label, which a compiled or captured function cannot read: pass one level "
                "for all, such as noise_band=band.level."
            )
        # The last serves -1, and labels beyond those of the probe.
        return torch.tensor(levels, dtype=torch.float64, device="cpu")[known.labels.long().clamp(max=len(levels) - 1)]

    def _checked(self, batch: Batch, t: Tensor, noise: Tensor | None) -> Batch:
        """Check all values, and return the batch with its scalars, labels, index and flags on the host.

        Brings everything to the host together, so that it waits once for a GPU with few small operations to do.
        """
        x0, x_t = batch.x0, batch.x_t
        if self.validate_args:
            measured = Measured.of(x0, x_t, batch.alpha, batch.sigma, noise, batch.source_only).rows
        else:
            dtype = torch.promote_types(x0.dtype, torch.float32)
            measured = tuple(torch.linalg.vector_norm(x.flatten(1).to(dtype), dim=1) for x in (x0, x_t))
        given, optional = to_host(
            (t, batch.alpha, batch.sigma, *measured),
            (batch.labels, batch.reference_labels, batch.index, batch.source_only, batch.flipped, batch.mirrored),
        )
        t, alpha, sigma, *measured = given
        labels, reference_labels, index, source_only, flipped, flips = optional
        checks = [
            value_check((sigma >= 0) & sigma.isfinite(), "sigma", sigma, "it must not be negative: check t"),
            value_check(alpha.isfinite(), "alpha", alpha, "it must be finite: check t"),
        ]
        if self.validate_args:
            found, memory = Measured(*measured), self._correlation
            checks += consistency_checks(
                self.process, self.kernel, x0, x_t, t, alpha, sigma, noise, source_only, memory, found
            )
        else:
            sizes = measured if source_only is None else [norm.masked_fill(source_only, 0) for norm in measured]
            checks += [finite_check(size, name) for size, name in zip(sizes, ("x0", "x_t"), strict=True)]
        known = replace(
            batch,
            alpha=alpha,
            sigma=sigma,
            labels=labels,
            reference_labels=reference_labels,
            index=index,
            source_only=source_only,
            flipped=flipped,
            mirrored=flips,
        )
        if self._least_level != math.inf:  # rows may use references
            checks += self.references.checks(known, self.validate_args)
        require(*checks)
        return known

    def _posterior(
        self,
        batch: Batch,
        rows: Tensor,
        known: Batch,
        host: Host,
        generator: torch.Generator | None,
        likelihood: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> Posterior:
        """The posterior of `rows` of the batch over the references that all of its rows form or select."""
        device, shared, places, among = batch.x0.device, batch, torch.arange(len(batch.x0), device="cpu"), rows
        if known.source_only is not None and host is not Host.NEVER:
            # `source_only` rows differ in kind from the rest, so they serve no other row; rows below the noise band do.
            serves = ~known.source_only
            places, among = serves.nonzero()[:, 0], (serves.cumsum(0) - 1)[rows]
            shared = batch.at(sent(places, device))
        rows_there, among = sent(rows, device), sent(among, device)
        selection = self.references.select(shared, generator, host)
        if host is Host.NEVER or len(rows) < len(batch.x0):
            batch = batch.at(rows_there)
        samples = None
        if selection.stored is not None and host is not Host.NEVER:
            if selection.verify_all:
                samples = verified_samples(shared.x0, selection.stored, places, shared.flipped)
                samples = None if samples is None else samples[among]
            else:
                samples = verified_samples(batch.x0, selection.stored.at(among), rows, batch.flipped)
        elif selection.resampled and selection.matrix.holds_halves:
            # As the other samples are: unrounded, a row's own would have an advantage.
            samples = batch.x0.to(selection.matrix.element).to(batch.x0.dtype)
        asked = Rows(batch, rows, among, samples)
        if known.labels is None or (selection.labelled is None and selection.unlabelled is None):
            return self._over(selection, asked, known, host, likelihood)
        labels = known.labels[rows].long()
        free = labels == -1
        parts: list[Tensor] = []
        found: list[Posterior] = []
        for part, labelled in (((~free).nonzero()[:, 0], True), (free.nonzero()[:, 0], False)):
            if len(part):
                some = selection
                if labelled and selection.labelled is not None:
                    some = selection.labelled(labels[part])
                elif not labelled and selection.unlabelled is not None:
                    some = selection.unlabelled()
                parts.append(part)
                found.append(self._over(some, asked.at(part), known, host, likelihood))
        if len(found) == 1:
            return found[0]
        order = sent(torch.cat(parts).argsort(), device)
        return Posterior(
            **{
                item.name: torch.cat([getattr(posterior, item.name) for posterior in found])[order]
                for item in fields(Posterior)
            }
        )

    def _over(
        self,
        selection: Selection,
        asked: Rows,
        known: Batch,
        host: Host,
        likelihood: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> Posterior:
        """The posterior of some rows over the references of a selection."""
        batch, rows, among = asked.batch, asked.rows, asked.among
        log_prior, source = selection.log_prior, selection.source[among]
        source_prior = None if selection.source_prior is None else selection.source_prior[among]
        conditioned = None
        if likelihood is not None:
            assert batch.index is not None
            numbers = sent(rows, source.device)
            conditioned = LogLikelihood.made(likelihood, numbers, selection.chosen, batch.index, host)
            if source_prior is None:
                source_prior = torch.zeros_like(conditioned.own) if log_prior is None else log_prior[source]
        query = Query(
            x_t=batch.x_t,
            alpha=batch.alpha,
            sigma=batch.sigma,
            source=source,
            anchor=batch.x0,
            stored=asked.samples,
            labels=batch.labels,
            reference_labels=None if batch.labels is None else selection.labels,
            log_prior=log_prior,
            source_prior=source_prior,
            levels=None if host is Host.NEVER else known.alpha[rows].double() / known.sigma[rows].double(),
            places=rows,
            known_labels=None if host is Host.NEVER or known.labels is None else known.labels[rows].long(),
            flipped=batch.flipped,
            partner=None if selection.partner is None else selection.partner[among],
            log_likelihood=conditioned,
        )
        plan = Plan(
            matrix=selection.matrix,
            host=host,
            kernel=self.kernel,
            mirrored=selection.mirrored,
            flipped=selection.flipped,
            resampled=selection.resampled,
            chunk_size=self.chunk_size,
            ranks=selection.ranks,
        )
        return posterior_of(query, plan, self._least_level)


@dataclass(frozen=True)
class DenoisingTarget(StableTarget):
    """Denoising score matching: every row uses only its source. A stable target with an infinite noise band.

    Args:
        process: the process that makes x_t.

    References:
        Vincent, "A Connection Between Score Matching and Denoising Autoencoders", Neural Computation 2011, equation 17.
    """

    references: References = field(default_factory=InBatch, init=False)  # never used
    noise_band: float = field(default=math.inf, init=False)
    kernel: PerturbationKernel = field(default_factory=GaussianKernel, init=False)
    chunk_size: int | None = field(default=None, init=False)
    capacity: int | None = field(default=None, init=False)
