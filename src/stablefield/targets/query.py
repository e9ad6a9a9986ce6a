"""A query: the noisy rows that ask for a posterior, checked and brought to the dtype of the computation.

Arguments are checked here and in `checked_matrix`, in one place, before anything is computed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield.reading import watched
from stablefield.shapes import row_values
from stablefield.targets.check import finite_check, require, value_check
from stablefield.targets.reference_matrix import ReferenceMatrix, largest_magnitude

__all__ = ["Query", "checked_matrix"]


@dataclass(frozen=True)
class Query:
    """B noisy rows and what is known of each.

    Attributes:
        x_t: the noisy samples as rows in the dtype of the computation, shape (B, d).
        alpha: scale of the data, shape (B,), float64.
        sigma: scale of the noise, shape (B,), float64.
        source: index of each row's own reference, shape (B,), or None.
        labels: condition of each row, shape (B,), or None.
        reference_labels: condition of each reference, shape (n,), or None.
        log_prior: log prior weight of each reference, shape (n,), float64, or None.
        source_prior: log prior weight of each row's own source on the scale of `log_prior`, shape (B,), float64; None where
            it is that of its place. A source that is no reference (-1) is then one for its own row.
        levels: alpha / sigma of each row on the host, shape (B,), float64: which rows have small noise is then known there;
            None if the device has to be asked.
        like: x_t as it was given, whose shape and dtype the mean takes.
        static: whether what is computed must not depend on values, see `reading`.
        wide: whether logits of all rows are made in float64: of use where `static` forbids to ask which rows need it.
    """

    x_t: Tensor
    alpha: Tensor
    sigma: Tensor
    source: Tensor | None
    labels: Tensor | None
    reference_labels: Tensor | None
    log_prior: Tensor | None
    like: Tensor
    static: bool = False
    wide: bool = False
    source_prior: Tensor | None = None
    levels: Tensor | None = None

    @property
    def watched(self) -> bool:
        """Whether values may decide what is computed."""
        return not self.static and watched(self.x_t.device)

    @classmethod
    def checked(
        cls,
        x_t: Tensor,
        alpha: float | Tensor,
        sigma: float | Tensor,
        matrix: ReferenceMatrix,
        source: Tensor | None = None,
        labels: Tensor | None = None,
        reference_labels: Tensor | None = None,
        log_prior: Tensor | None = None,
        source_prior: Tensor | None = None,
        *,
        static: bool = False,
        wide: bool = False,
        levels: Tensor | None = None,
    ) -> "Query":
        """Check the arguments of `posterior`, described there, against each other and against `matrix`.

        If `static`, only what can be told without looking at values is checked. Who has the `levels` on the host has checked
        the rows already.

        Raises:
            ValueError: naming the argument, its first bad value and the remedy.
        """
        batch, n = x_t.shape[0], len(matrix)
        dtype = matrix.dtype_with(x_t)
        scalar = torch.float32 if x_t.device.type == "mps" else torch.float64
        alpha = row_values("alpha", alpha, x_t).to(scalar)
        sigma = row_values("sigma", sigma, x_t).to(scalar)
        rows = x_t.reshape(batch, matrix.dim).to(dtype)
        if source is not None:
            _check_integers("source", source, batch, x_t, "the index of each row's own reference")
            source = source.long()
        if not static and levels is None:
            checks = [
                value_check((sigma > 0) & sigma.isfinite(), "sigma", sigma, "it must be positive and finite"),
                value_check(alpha.isfinite(), "alpha", alpha, "it must be finite"),
                finite_check(_largest_square(rows), "x_t"),
            ]
            if source is not None:
                there, rule = (source >= 0) & (source < n), f"it must index the {n} references, 0 to {n - 1}"
                checks.append(value_check(there, "source", source, rule))
            require(*checks)
        if not static:
            norms = matrix.norms(dtype)
            if not norms.finite:
                require(finite_check(norms.squares, "references"))
        if (labels is None) != (reference_labels is None):
            missing, given = ("labels", "reference_labels") if labels is None else ("reference_labels", "labels")
            raise ValueError(f"{missing} is missing: it is needed with {given}, one integer per row and per reference.")
        if labels is not None and reference_labels is not None:
            _check_integers("labels", labels, batch, x_t, "the condition of each row")
            _check_integers("reference_labels", reference_labels, n, x_t, "the condition of each reference")
            labels, reference_labels = labels.long(), reference_labels.long()
            if source is not None and not static and levels is None:
                fits = (labels == -1) | (labels == reference_labels[source])
                rule = "the row's own source is a reference of another label; it must fit its row"
                require(value_check(fits, "labels", labels, rule))
        if log_prior is not None:
            if log_prior.shape != (n,) or log_prior.device != x_t.device:
                raise ValueError(
                    f"log_prior has shape {tuple(log_prior.shape)} on {log_prior.device}: "
                    f"it needs one number per reference, shape ({n},), on {x_t.device}."
                )
            if not static and levels is None:
                below = log_prior < torch.inf
                require(
                    value_check(below, "log_prior", log_prior, "it must be a number below +inf (-inf excludes one)")
                )
            # Only differences count; without the common part, they keep their digits in the dtype of the logits.
            largest = log_prior.to(scalar).max()
            common = torch.where(largest.isneginf(), 0, largest)
            log_prior = (log_prior.to(scalar) - common).to(dtype).to(scalar)
            if source_prior is not None:
                source_prior = (source_prior.to(scalar) - common).to(dtype).to(scalar)
        return cls(
            rows, alpha, sigma, source, labels, reference_labels, log_prior, x_t, static, wide, source_prior, levels
        )

    def prior(self, where: slice) -> Tensor | None:
        """Log prior weights of the references of the slice, shape (c,), in the dtype of the logits; None if uniform."""
        return None if self.log_prior is None else self.log_prior[where].to(self.x_t.dtype)

    def allowed(self, where: slice, rows: Tensor | None = None) -> Tensor | None:
        """Which references of the slice each row (or each of `rows`) may use, shape (B, c); None if all may use all."""
        if self.labels is None or self.reference_labels is None:
            return None
        labels = (self.labels if rows is None else self.labels[rows])[:, None]
        return (labels == self.reference_labels[where]) | (labels == -1)


def checked_matrix(x_t: Tensor, references: Tensor) -> ReferenceMatrix:
    """Check that `references` fit the batch `x_t` (B, ...) in shape, dtype and device, and wrap them.

    Raises:
        ValueError: if they do not.
    """
    if not x_t.is_floating_point():
        raise ValueError(f"x_t has dtype {x_t.dtype}: noisy samples are floating point.")
    if x_t.ndim < 2 or x_t.shape[0] == 0:
        raise ValueError(
            f"x_t has shape {tuple(x_t.shape)}: it needs at least one row and one data dimension, shape (B, ...)."
        )
    if not (references.is_floating_point() or references.dtype == torch.uint8):
        raise ValueError(f"references have dtype {references.dtype}: pass floating point data, or uint8 images.")
    if references.ndim < 1 or references.shape[0] == 0 or references.shape[1:] != x_t.shape[1:]:
        raise ValueError(
            f"references have shape {tuple(references.shape)}: they must be at least one sample "
            f"of the shape of the rows of x_t, (n, {', '.join(map(str, x_t.shape[1:]))})."
        )
    if references.device != x_t.device:
        raise ValueError(f"references are on {references.device}, x_t is on {x_t.device}: move one of them.")
    return ReferenceMatrix(references)


def _check_integers(name: str, value: Tensor, length: int, x: Tensor, meaning: str) -> None:
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {value.dtype}: it holds {meaning}, as integers.")
    if value.shape != (length,):
        raise ValueError(f"{name} has shape {tuple(value.shape)}: it holds {meaning}, shape ({length},).")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, the batch is on {x.device}: move one of them.")


def _largest_square(rows: Tensor) -> Tensor:
    # Not finite where a number is not, in one pass without a copy.
    return largest_magnitude(rows).square() * rows.shape[1]
