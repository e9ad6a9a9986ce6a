"""A query and its plan: the noisy rows of a posterior, and the decisions for the whole call.

This module checks all arguments before anything is computed. It also decides once, in the `Plan`, how an eager call, a call
on a GPU, a compiled one and a shard's call differ; the plan is then passed on unchanged.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from stablefield._reading import readable
from stablefield.targets._checks import finite_check, require, value_check
from stablefield.targets._engine.columns import Columns
from stablefield.targets._engine.online_softmax import OnlineSoftmax
from stablefield.targets._engine.reference_matrix import ReferenceMatrix, largest_magnitude, wide_dtype
from stablefield.targets._perturbation_kernel import PerturbationKernel

__all__ = ["Host", "OtherRanks", "Plan", "Query", "checked_matrix", "host_access"]


class Host(Enum):
    """Whether the host may read values of a call's tensors, and so make the computation depend on them."""

    READS = "they are in its own memory"
    WAITS = "it may check them, but waits for the device each time, so they decide nothing else"
    NEVER = "torch compiles or captures: the same operations run whatever the values"


def host_access(device: torch.device) -> Host:
    """Whether the host may read values on `device` now. The whole package decides this here, once for each call."""
    if not readable(device):
        return Host.NEVER
    return Host.READS if _shares_memory(device) else Host.WAITS


def _shares_memory(device: torch.device) -> bool:
    return device.type in ("cpu", "mps")


class OtherRanks(Protocol):
    """References on other ranks."""

    def sums(self, query: "Query", plan: "Plan") -> OnlineSoftmax:
        """Softmax sums over the references of all ranks, without the rows' own sources, whose logit is 0."""
        ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to sum the posterior of one call.

    Attributes:
        matrix: the references held here.
        host: whether the host may read values.
        kernel: the noise kernel.
        mirrored: whether the mirror image (last axis) of each reference is a reference, too.
        chunk_size: references per matrix product; chosen by memory if None.
        flipped: the flipped sample of each reference, which is a reference, too; None for none.
        resampled: whether the rows are other draws than their stored samples.
        ranks: the ranks with the other references; None if `matrix` holds all.
        least_prior: lower bound on the log prior weight of a row's own source, if another rank adds that source. References
            of negligible weight beside it are skipped. None if each row's own source is in its sums.
        float64: whether to compute the logits of all rows in float64, if the host may not read which rows need it.
    """

    matrix: ReferenceMatrix
    host: Host
    kernel: PerturbationKernel
    mirrored: bool = False
    flipped: ReferenceMatrix | None = None
    resampled: bool = False
    chunk_size: int | None = None
    ranks: OtherRanks | None = None
    least_prior: float | None = None
    float64: bool = False


@dataclass(frozen=True, kw_only=True)
class Query:
    """B noisy rows with their scalars, labels and sources: as given or, once `checked`, in the form for the computation.

    Attributes:
        x_t: the noisy samples, shape (B, ...); checked: as rows in the dtype of the computation, shape (B, d).
        alpha: scale of the data, shape (B,); checked: float64, like all scalars.
        sigma: scale of the noise, shape (B,).
        source: index of each row's own reference, shape (B,), or None; -1 for one that is not in the matrix.
        anchor: the sources themselves, shape (B, ...), if the caller has them; checked: (B, d).
        stored: the sources as a pool stores them, shape (B, d), if that may have rounded them.
        labels: condition of each row, shape (B,), or None.
        reference_labels: condition of each reference, shape (n,), or None.
        log_prior: log prior weight of each reference, shape (n,), or None.
        source_prior: log prior weight of each row's own source on the scale of `log_prior`, shape (B,); None to take that of
            its index. A source outside the matrix (-1) is then a reference only for its own row.
        levels: alpha / sigma of each row on the host, shape (B,), float64, so that the host knows which rows have low noise;
            None if the device has to be read.
        places: indices of the rows in the caller's batch, shape (B,), on the host, for errors from other ranks.
        known_labels: `labels` on the host; None if the device has to be read.
        flipped: rows whose source is in `Plan.flipped`, bool (B,), if there is one.
        partner: of each row's own sample and its flipped one the other, shape (B, ...), if sources may be outside
            `Plan.flipped`; checked: (B, d).
        log_likelihood: log p(condition of the row | reference) of all rows, relative to that of the row's own source, for
            the references at indices (c,) into the matrix, shape (B, c); None without conditions.
        like: checked: x_t as given, whose shape and dtype the mean takes.
    """

    x_t: Tensor
    alpha: Tensor
    sigma: Tensor
    source: Tensor | None = None
    anchor: Tensor | None = None
    stored: Tensor | None = None
    labels: Tensor | None = None
    reference_labels: Tensor | None = None
    log_prior: Tensor | None = None
    source_prior: Tensor | None = None
    levels: Tensor | None = None
    places: Tensor | None = None
    known_labels: Tensor | None = None
    flipped: Tensor | None = None
    partner: Tensor | None = None
    log_likelihood: Callable[[Tensor], Tensor] | None = None
    like: Tensor | None = None

    def checked(self, plan: Plan) -> "Query":
        """Check the query itself and against the references of `plan`, and return it in the dtype of the computation.

        Checks no values if the host may not read them, or if `levels` are given, because then the caller has checked them.

        Raises:
            ValueError: naming the argument, its first bad value and the remedy.
        """
        x_t, source, labels, reference_labels = self.x_t, self.source, self.labels, self.reference_labels
        log_prior, source_prior = self.log_prior, self.source_prior
        matrix, batch, n = plan.matrix, x_t.shape[0], len(plan.matrix)
        dtype, wide = matrix.dtype_with(x_t), wide_dtype(x_t.device)
        check_values = plan.host is not Host.NEVER and self.levels is None
        alpha, sigma = self.alpha.to(wide), self.sigma.to(wide)
        rows = x_t.reshape(batch, matrix.dim).to(dtype)
        if source is not None:
            _check_integers("source", source, batch, x_t, "the index of each row's own reference")
            source = source.long()
        if check_values:
            checks = [
                value_check((sigma > 0) & sigma.isfinite(), "sigma", sigma, "it must be positive and finite"),
                value_check(alpha.isfinite(), "alpha", alpha, "it must be finite"),
                # Not finite if any number is not, in one pass without a copy.
                finite_check(largest_magnitude(rows).square() * rows.shape[1], "x_t"),
            ]
            if source is not None:
                there, rule = (source >= 0) & (source < n), f"it must index the {n} references, 0 to {n - 1}"
                checks.append(value_check(there, "source", source, rule))
            require(*checks)
        if plan.host is not Host.NEVER and not matrix.norms(dtype).finite:
            require(finite_check(matrix.norms(dtype).squares, "references"))
        if (labels is None) != (reference_labels is None):
            missing, given = ("labels", "reference_labels") if labels is None else ("reference_labels", "labels")
            raise ValueError(f"{missing} is missing: pass it with {given}, one integer per row and per reference.")
        if labels is not None and reference_labels is not None:
            _check_integers("labels", labels, batch, x_t, "the condition of each row")
            _check_integers("reference_labels", reference_labels, n, x_t, "the condition of each reference")
            labels, reference_labels = labels.long(), reference_labels.long()
            if source is not None and check_values:
                fits = (labels == -1) | (labels == reference_labels[source])
                rule = "the row's own source is a reference with another label; pass its label"
                require(value_check(fits, "labels", labels, rule))
        if log_prior is not None:
            if log_prior.shape != (n,) or log_prior.device != x_t.device:
                raise ValueError(
                    f"log_prior has shape {tuple(log_prior.shape)} on {log_prior.device}: "
                    f"pass one number per reference, shape ({n},), on {x_t.device}."
                )
            if check_values:
                below = log_prior < torch.inf
                require(
                    value_check(below, "log_prior", log_prior, "it must be a number below +inf (-inf excludes one)")
                )
            # Only differences matter; without the common part, they keep their digits in the dtype of the logits.
            largest = log_prior.to(wide).max()
            common = torch.where(largest.isneginf(), 0, largest)
            log_prior = (log_prior.to(wide) - common).to(dtype).to(wide)
            source_prior = None if source_prior is None else source_prior.to(wide) - common
        source_prior = None if source_prior is None else source_prior.to(dtype).to(wide)
        anchor, stored = (
            None if one is None else one.reshape(rows.shape).to(dtype) for one in (self.anchor, self.stored)
        )
        if anchor is not None and stored is not None:
            # An unrounded source would have an advantage over rounded references, because only its distance to x_t would be
            # free of rounding. So rebuild the row from the stored source, with the same noise.
            rows, anchor = torch.addcmul(rows, alpha.to(dtype)[:, None], stored - anchor), stored
        return Query(
            x_t=rows,
            alpha=alpha,
            sigma=sigma,
            like=x_t,
            source=source,
            anchor=anchor,
            labels=labels,
            reference_labels=reference_labels,
            log_prior=log_prior,
            source_prior=source_prior,
            levels=self.levels,
            places=self.places,
            known_labels=self.known_labels,
            flipped=self.flipped,
            partner=None if self.partner is None else self.partner.reshape(rows.shape).to(dtype),
            log_likelihood=self.log_likelihood,
        )

    def at(self, rows: Tensor | slice) -> "Query":
        """What the logits need of the checked rows at `rows` (b,), which may use all references that they meet."""
        return Query(
            x_t=self.x_t[rows],
            alpha=self.alpha[rows],
            sigma=self.sigma[rows],
            log_prior=self.log_prior,
        )

    def part(self, rows: Tensor) -> "Query":
        """The rows at `rows` (b,), of a query that has no `stored`, no `like` and nothing on the host."""

        def at(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[rows]

        return replace(
            self,
            x_t=self.x_t[rows],
            alpha=self.alpha[rows],
            sigma=self.sigma[rows],
            source=at(self.source),
            anchor=at(self.anchor),
            labels=at(self.labels),
            source_prior=at(self.source_prior),
        )

    def prior(self, columns: Columns) -> Tensor | None:
        """Log prior weights of the columns, (c,) or (B, c), float64; None if uniform."""
        prior = None if self.log_prior is None else columns.of(self.log_prior, len(self.x_t))
        if self.log_likelihood is None:
            return prior
        assert isinstance(columns.where, slice)
        index = torch.arange(columns.where.start, columns.where.stop, device=self.x_t.device)
        given = self.log_likelihood(index).to(self.sigma.dtype)
        return given if prior is None else given + prior

    def allowed(self, columns: Columns, rows: Tensor | None = None) -> Tensor | None:
        """Which columns each row (or each of `rows`) may use, bool, (B, c), or (c,) for all alike; None for all."""
        if self.labels is None or self.reference_labels is None:
            return columns.usable(len(self.x_t))
        labels = (self.labels if rows is None else self.labels[rows])[:, None]
        return (labels == columns.of(self.reference_labels, len(labels))) | (labels == -1)

    def prior_weight(self, columns: Columns, allowed: Tensor | None, prior: Tensor | None) -> Tensor:
        """Log of the summed `prior` weights (those of `prior()`) of the allowed columns, shape (B,) or ()."""
        if prior is None:
            if allowed is None:
                return self.sigma.new_full((), math.log(len(columns)))
            return allowed.sum(-1).to(self.sigma).log()
        return (prior if allowed is None else torch.where(allowed, prior, -torch.inf)).logsumexp(-1)


def checked_matrix(x_t: Tensor, references: Tensor) -> ReferenceMatrix:
    """Check that `references` fit the batch `x_t` (B, ...) in shape, dtype and device, and wrap them.

    Raises:
        ValueError: if they do not.
    """
    if not x_t.is_floating_point():
        raise ValueError(f"x_t has dtype {x_t.dtype}: pass floating point samples.")
    if x_t.ndim < 2 or x_t.shape[0] == 0:
        raise ValueError(
            f"x_t has shape {tuple(x_t.shape)}: pass at least one row and one data dimension, shape (B, ...)."
        )
    if not (references.is_floating_point() or references.dtype == torch.uint8):
        raise ValueError(f"references have dtype {references.dtype}: pass floating point data, or uint8 images.")
    if references.ndim < 1 or references.shape[0] == 0 or references.shape[1:] != x_t.shape[1:]:
        raise ValueError(
            f"references have shape {tuple(references.shape)}: pass at least one sample "
            f"with the shape of the rows of x_t, (n, {', '.join(map(str, x_t.shape[1:]))})."
        )
    if references.device != x_t.device:
        raise ValueError(f"references are on {references.device}, x_t is on {x_t.device}: move one of them.")
    return ReferenceMatrix(references)


def _check_integers(name: str, value: Tensor, length: int, x: Tensor, meaning: str) -> None:
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {value.dtype}: pass {meaning}, as integers.")
    if value.shape != (length,):
        raise ValueError(f"{name} has shape {tuple(value.shape)}: pass {meaning}, shape ({length},).")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, the batch is on {x.device}: move one of them.")
