"""Reference policies: which clean samples a stable target averages over.

A policy chooses, for a batch of sources, a set of references that includes every row's source. The target is unbiased if,
given the set, the source is equally likely to be any of its members (see `_posterior`). This holds for a batch drawn at
random, for a whole data set, and for a random subset together with the batch's own rows. It fails, measurably, if the source
is left out or included twice, or if references differ from the row in a condition that the network sees.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stablefield.targets._checks import Check, value_check
from stablefield.targets._engine.query import Host, OtherRanks
from stablefield.targets._engine.reference_matrix import ReferenceMatrix

__all__ = ["UNKNOWN_LABEL", "Batch", "InBatch", "References", "Selection", "Stored"]

UNKNOWN_LABEL = (
    "-1 means a label that was dropped by chance; give samples of unknown label a separate class, such as the largest "
    "plus 1"
)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The rows of a call.

    Attributes:
        x0: the sources, shape (B, ...).
        x_t: the noisy samples, shape (B, ...).
        alpha: scale of the data, shape (B,).
        sigma: scale of the noise, shape (B,).
        labels: condition that the network sees for each row, shape (B,), or None.
        reference_labels: true condition of each row, shape (B,), if `labels` may have dropped ones, or None.
        index: each row's index in the data set, shape (B,), or None.
        source_only: rows that use only their source and serve no other row, bool (B,), or None.
        flipped: rows whose source is the flipped sample, bool (B,), if the references hold flipped samples of their own.
        mirrored: rows of the call that were mirror images (last axis), bool (B,), or None.
    """

    x0: Tensor
    x_t: Tensor
    alpha: Tensor
    sigma: Tensor
    labels: Tensor | None
    reference_labels: Tensor | None
    index: Tensor | None
    source_only: Tensor | None = None
    flipped: Tensor | None = None
    mirrored: Tensor | None = None

    @property
    def truth(self) -> Tensor | None:
        """The condition of each source, shape (B,), or None."""
        return self.labels if self.reference_labels is None else self.reference_labels

    def at(self, rows: Tensor) -> "Batch":
        """The rows at `rows`, which will use references."""
        return Batch(
            x0=self.x0[rows],
            x_t=self.x_t[rows],
            alpha=self.alpha[rows],
            sigma=self.sigma[rows],
            labels=None if self.labels is None else self.labels[rows],
            reference_labels=None if self.reference_labels is None else self.reference_labels[rows],
            index=None if self.index is None else self.index[rows],
            flipped=None if self.flipped is None else self.flipped[rows],
        )


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The references of one batch.

    Attributes:
        matrix: the references.
        source: index into the matrix of each row's source, shape (B,); with `ranks`, into the whole set.
        labels: condition of each reference, shape (n,), or None.
        mirrored: whether the mirror image (last axis) of each reference is a reference, too.
        ranks: the ranks that hold other references, or None.
        flipped: the flipped sample of each reference, a reference, too, and the source of rows whose `Batch.flipped` is set;
            None for none.
        partner: of each row's own sample and its flipped one the other, shape (B, d), if `source` may be -1; or None.
        resampled: whether the rows are other draws than their stored samples.
        chosen: indices in the data of the references, shape (n,); None for all data.
        stored: where each row's own sample is, for comparison with the rows; None if the references are the rows themselves,
            or are on other ranks, or the rows are drawn anew.
        verify_all: whether to compare all rows, because their index has decided which references there are; else only those
            that use references.
        log_prior: log prior weight of each reference, shape (n,), float64; None if uniform.
        source_prior: log prior weight of each row's own sample on the same scale, shape (B,), float64; needed with
            `log_prior`. `source` may then be -1, for a sample that is only in its own row's set.
        labelled: makes the references of rows with the given labels, on the host, shape (b,); None if they use these.
        unlabelled: makes the references of rows without a label; None if they use these.
    """

    matrix: ReferenceMatrix
    source: Tensor
    labels: Tensor | None
    mirrored: bool = False
    ranks: OtherRanks | None = None
    flipped: ReferenceMatrix | None = None
    partner: Tensor | None = None
    resampled: bool = False
    chosen: Tensor | None = None
    stored: "Stored | None" = None
    verify_all: bool = False
    log_prior: Tensor | None = None
    source_prior: Tensor | None = None
    labelled: "Callable[[Tensor], Selection] | None" = None
    unlabelled: "Callable[[], Selection] | None" = None


@dataclass(frozen=True)
class Stored:
    """Where the rows' own samples are.

    Attributes:
        matrix: the samples.
        index: the index of each row's sample, shape (B,).
        flipped: the flipped samples, if the references hold them.
    """

    matrix: ReferenceMatrix
    index: Tensor
    flipped: ReferenceMatrix | None = None

    def at(self, rows: Tensor) -> "Stored":
        """Those of the rows at `rows`."""
        return Stored(self.matrix, self.index[rows], self.flipped)


class References(Protocol):
    """The interface of a reference policy."""

    @property
    def labels(self) -> Tensor | None:
        """Condition of each sample, if the policy knows it; `StableTarget` then requires those of the rows."""
        ...

    def checks(self, batch: Batch, count: bool) -> list[Check]:
        """Conditions on the values of a call, to be read together with others.

        Args:
            batch: the rows as given, with labels, index and flags on the host.
            count: whether to count the rows, to compare how often each was drawn with the assumed frequency.

        Raises:
            ValueError: if `index` is missing, or shapes or devices do not fit.
        """
        ...

    def select(self, batch: Batch, generator: torch.Generator | None, host: Host) -> Selection:
        """Choose the references of a batch.

        Args:
            batch: the rows as in the data set (flips undone).
            generator: makes random choices.
            host: whether the host may read values; if so, it has verified `checks`.
        """
        ...


@dataclass(frozen=True)
class InBatch:
    """The batch itself: every row's clean sample is a reference for all rows.

    Each row's target varies less, but the rows of a batch then share all their references, and the variance of the batch's
    gradient can rise: see "One row and a batch" in the theory. Prefer a `Pool` if you have the data. Batches must be random
    subsets of the data: those of one class or clip, or from sorted data by a small shuffle buffer, bias the target, and
    without an index nothing warns of it.
    """

    @property
    def labels(self) -> None:
        """None: the batch brings its own conditions."""
        return

    def checks(self, batch: Batch, count: bool) -> list[Check]:  # noqa: ARG002
        truth, labels, exempt = batch.reference_labels, batch.labels, batch.source_only
        if truth is None:
            return []
        # A batch without any label has no conditions at all.
        known = (truth >= 0) | (truth < 0).all()
        checks = [value_check(known if exempt is None else known | exempt, "reference_labels", truth, UNKNOWN_LABEL)]
        if labels is not None:
            fits = (labels == -1) | (labels == truth)
            rule = "the row's own source is a reference with another label; pass its label"
            checks.append(value_check(fits if exempt is None else fits | exempt, "labels", labels, rule))
        return checks

    def select(self, batch: Batch, generator: torch.Generator | None, host: Host) -> Selection:  # noqa: ARG002
        x0, excluded, log_prior = batch.x0, batch.source_only, None
        source = torch.arange(len(x0), device=x0.device)
        if excluded is not None:
            # Only in compiled functions, whose shapes cannot depend on values, are such rows still in the batch. Zero them:
            # a weight of 0 would not remove values that are not finite.
            log_prior = torch.zeros(len(x0), device=x0.device).masked_fill(excluded, -torch.inf)
            x0 = torch.where(excluded.reshape(-1, *(1,) * (x0.ndim - 1)), 0, x0)
        return Selection(matrix=ReferenceMatrix(x0), source=source, labels=batch.truth, log_prior=log_prior)
