"""A pool of references: an array of clean samples; each batch uses all or some of them.

The pool knows the prior: how likely each sample is to be drawn, and its label. It compares the rows of a batch with its
samples: a row that is a different sample would be missing among its references, which silently biases the target.
"""

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield._shapes import array_of_numbers, check_kind, check_tensor, flag, whole_number
from stablefield.targets._checks import Check, require, value_check
from stablefield.targets._draws import Frequencies
from stablefield.targets._engine.query import Host
from stablefield.targets._engine.reference_matrix import (
    ReferenceMatrix,
    in_blocks,
    largest_magnitude,
    tensor_version,
    wide_dtype,
)
from stablefield.targets._references import UNKNOWN_LABEL, Batch, Selection

__all__ = ["OTHER_LABEL", "WITHOUT_WEIGHT", "Pool", "choose", "compared", "sample_weights", "verified_samples"]

OTHER_LABEL = "the Pool has another label for the row's own sample; pass the label of each row, or -1 for none"
WITHOUT_WEIGHT = "its weight in the Pool is 0, so it cannot have been drawn; give the weights that your sampler uses"


class Pool:
    """References from an array: the batch's own rows and others drawn without replacement, or the whole array.

    No sample is ever in the set twice, and every row's own sample is always in it.

    Args:
        data: the clean samples, shape (n, ...), floating point, or uint8 images that mean data / 127.5 - 1. A tensor on the
            device of the training batches; or a numpy array, such as a memory map of a file larger than memory, which is
            sent to the device of the batch chunk by chunk. Norms are computed once and kept: do not change an array in place
            afterwards (changes of a tensor are detected).
        size: number of references per batch; None for the whole array.
        labels: condition of each sample, integers from 0, shape (n,), or None. A row with a label is multiplied with the
            samples of its label only; data sorted by label are then read without a copy. Give samples of unknown label a
            separate one (such as the largest plus 1), because the fact that it is missing is information.
        mirrored: use the mirror image (last axis) of each reference, too. For data sets doubled by random flips that the
            network does not see; the set then has 2 `size` members.
        weights: how likely each sample is to be drawn for a batch, shape (n,), on any scale, not negative; equally likely if
            None. They are the prior of the posterior: pass the weights of your sampler. With `size`, the references are then
            drawn uniformly from all samples, and each row's own sample is added only for that row.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if `data` is empty or has the wrong dtype, `size` is not between 1 and n, or `labels` or `weights` do
            not fit.
    """

    def __init__(
        self,
        data: Tensor | NDArray[Any],
        size: int | None = None,
        labels: Tensor | None = None,
        *,
        mirrored: bool = False,
        weights: Tensor | NDArray[Any] | None = None,
    ) -> None:
        check_kind("Pool data", data, (Tensor, np.ndarray), "a tensor or a numpy array of shape (n, ...)")
        if isinstance(data, Tensor):
            check_tensor("Pool data", data)
        size = None if size is None else whole_number("Pool size", size)
        flag("mirrored", mirrored)
        if labels is not None:
            check_tensor("Pool labels", labels, real=True, numbers=True)
        if data.ndim < 2 or len(data) == 0:
            raise ValueError(f"Pool data have shape {tuple(data.shape)}: pass at least one sample, shape (n, ...).")
        if isinstance(data, Tensor):
            fits = data.is_floating_point() or data.dtype == torch.uint8
        else:
            fits = data.dtype.name in ("uint8", "float16", "float32", "float64")
        if not fits:
            raise ValueError(f"Pool data have dtype {data.dtype}: pass floating point data, or uint8 images.")
        if size is not None and not 1 <= size <= len(data):
            raise ValueError(f"Pool size is {size}: pass 1 to the {len(data)} samples, or None for all.")
        if labels is not None and (labels.shape != (len(data),) or labels.is_floating_point()):
            raise ValueError(
                f"Pool labels has shape {tuple(labels.shape)} and dtype {labels.dtype}: "
                f"pass one integer per sample, shape ({len(data)},)."
            )
        # Labels on a GPU are checked with the first batch, to avoid a wait here.
        self._unchecked_labels = labels is not None
        if labels is not None and labels.device.type == "cpu":
            require(value_check(labels >= 0, "Pool labels", labels, UNKNOWN_LABEL))
            self._unchecked_labels = False
        self.size = size
        self.labels = labels
        self.mirrored = mirrored
        self.weights = None if weights is None else _checked_weights(weights, len(data))
        self._matrix = ReferenceMatrix(data)
        self._elsewhere: dict[torch.device, ReferenceMatrix] = {}
        self._moved: dict[tuple[str, torch.device], tuple[int, Tensor]] = {}
        self._frequencies: Frequencies | None = None

    def __repr__(self) -> str:
        return f"Pool(<{len(self._matrix)} samples>, size={self.size}, mirrored={self.mirrored})"

    @property
    def data(self) -> Tensor | NDArray[Any]:
        """The clean samples, shape (n, ...)."""
        return self._matrix.data

    def matrix(self, device: torch.device) -> ReferenceMatrix:
        """The samples as a matrix for batches on `device`.

        Raises:
            ValueError: if they are a tensor on another device.
        """
        if self._matrix.device == device:
            return self._matrix
        if isinstance(self.data, Tensor):
            raise ValueError(
                f"the Pool's data are on {self.data.device}, the batch on {device}: move them to one device."
            )
        if device not in self._elsewhere:
            self._elsewhere[device] = ReferenceMatrix(self.data, device)
        return self._elsewhere[device]

    def checks(self, batch: Batch, count: bool) -> list[Check]:
        """Conditions on the values of a call, as described at `References`.

        Raises:
            ValueError: if `index` is missing, or shapes or devices do not fit.
        """
        labels, source_only = batch.labels, batch.source_only
        index = self.checked_index(batch)
        n, device = len(self._matrix), index.device
        checks = self.index_checks(index, source_only, n, f"the Pool holds samples 0 to {n - 1}")
        exempt = torch.zeros_like(index, dtype=torch.bool) if source_only is None else source_only
        place = index.clamp(0, n - 1)
        if labels is not None:
            own = self._on("labels", device)
            assert own is not None
            fits = (labels == -1) | (labels == own[place]) | exempt
            checks.append(value_check(fits, "labels", labels, OTHER_LABEL))
        weights = self._on("weights", device)
        if weights is not None:
            checks.append(value_check((weights[place] > 0) | exempt, "index", index, WITHOUT_WEIGHT))
        if not count:
            return checks
        if self._frequencies is None:
            uniform = torch.ones(n, dtype=wide_dtype(device), device=device)
            self._frequencies = Frequencies(uniform if weights is None else weights, self._on("labels", device))
        counted = None if source_only is None else ~source_only
        frequent = self._frequencies.add(index, None if labels is None else labels >= 0, counted)
        return checks if frequent is None else [*checks, frequent]

    def select(self, batch: Batch, generator: torch.Generator | None, host: Host) -> Selection:
        """Choose the references of a batch, as described at `References`.

        Raises:
            ValueError: if `index` is missing, `size` is below the number of the batch's distinct samples, or shapes or
                devices do not fit.
        """
        device = batch.x0.device
        index, matrix = self.checked_index(batch), self.matrix(device)
        if host is not Host.NEVER:
            self._unchecked_labels = False
        size = None if self.size == len(matrix) else self.size
        if size is not None and host is Host.NEVER:
            raise ValueError(
                f"the Pool's size is {size}: the drawn references depend on the batch's index, which a compiled or captured "
                "function cannot read. Use the whole pool (size=None) with a noise_band and a capacity, or keep the target "
                "out of the compiled part: torch.compiler.disable(target.__call__)."
            )
        reference_labels, weights = self._on("labels", device), self._on("weights", device)
        log_prior = source_prior = chosen = None
        source = index
        if reference_labels is not None and size is None and host is not Host.NEVER:
            matrix.by_label(reference_labels)
        if weights is not None:
            log_prior = weights.log()
            source_prior = log_prior[index]
        if size is not None and weights is None:
            chosen, source = choose(len(matrix), index, size, generator)
        elif size is not None:
            # Drawn from all samples; a row's own sample, if not among them, is a reference only for that row.
            chosen = _others(len(matrix), index.new_empty(0), size, generator)
            place = torch.full((len(matrix),), -1, device=device)
            place[chosen] = torch.arange(len(chosen), device=device)
            source = place[index]
        return Selection(
            matrix=matrix if chosen is None else matrix.take(chosen),
            source=source,
            labels=reference_labels if reference_labels is None or chosen is None else reference_labels[chosen],
            mirrored=self.mirrored,
            stored=(matrix, index),
            verify_all=size is not None and weights is None,
            log_prior=log_prior if log_prior is None or chosen is None else log_prior[chosen],
            source_prior=source_prior,
        )

    def checked_index(self, batch: Batch, holder: str = "Pool", where: str = "of the batch in its data") -> Tensor:
        """The index, if the batch fits; errors name the `holder`, and say `where` each row's index counts.

        Raises:
            ValueError: if it is missing, or shapes, devices or labels do not fit.
        """
        x0 = batch.x0
        if batch.index is None:
            raise ValueError(f"index is missing: a {holder} needs the index of each row {where}.")
        self.matrix(x0.device)
        if x0.shape[1:] != self.data.shape[1:]:
            raise ValueError(
                f"rows of x0 have shape {tuple(x0.shape[1:])}, the Pool's {tuple(self.data.shape[1:])}: pass the same."
            )
        if batch.truth is not None and self.labels is None:
            raise ValueError(
                f"labels is given, but the {holder} has none: pass {holder}(..., labels=...), one integer per sample."
            )
        return batch.index.long()

    def index_checks(self, index: Tensor, source_only: Tensor | None, n: int, rule: str) -> list[Check]:
        """The checks, with the message `rule`, that an index is below `n`, and of the samples' labels, if not done yet."""
        there = (index >= 0) & (index < n)
        there = there if source_only is None else there | source_only
        checks = [value_check(there, "index", index, rule)]
        if self._unchecked_labels and self.labels is not None:
            labels = self.labels.to(index.device)
            checks.append(value_check(labels >= 0, "Pool labels", labels, UNKNOWN_LABEL))
        return checks

    def _on(self, name: Literal["labels", "weights"], device: torch.device) -> Tensor | None:
        """The labels, int64, or the weights on `device`."""
        value = self.labels if name == "labels" else self.weights
        if value is None:
            return None
        dtype = torch.long if name == "labels" else torch.float32 if device.type == "mps" else value.dtype
        if value.device == device and value.dtype == dtype:
            return value
        found = self._moved.get((name, device))
        # A compiler sees no versions; an eager call has converted them before.
        if found is None or (found[0] != tensor_version(value) and not torch.compiler.is_compiling()):
            found = tensor_version(value), value.to(device, dtype)
            self._moved[name, device] = found
        return found[1]

    def subset(self, index: Tensor) -> "Pool":
        """A pool of all the samples at `index`, integers (m,), with their norms if known."""
        part = Pool.__new__(Pool)
        part.size, part.mirrored = None, self.mirrored
        part.labels = None if self.labels is None else self.labels[index]
        part.weights = None if self.weights is None else self.weights[index]
        part._matrix, part._elsewhere, part._moved = self._matrix.take(index), {}, {}
        part._frequencies, part._unchecked_labels = None, self._unchecked_labels
        return part


def _checked_weights(weights: Tensor | NDArray[Any], n: int) -> Tensor:
    """The weights of `n` samples in float64, the largest 1."""
    values = sample_weights(weights, n)
    if not bool((values > 0).any()):
        raise ValueError("Pool weights are all 0: give each sample that can be drawn a positive weight.")
    return values / values.max()


def sample_weights(weights: Tensor | NDArray[Any], n: int) -> Tensor:
    """The weights of `n` samples in float64, on their given scale.

    Raises:
        ValueError: if they are not `n` finite numbers, 0 or more.
    """
    values = array_of_numbers("Pool weights", weights).detach()
    if values.shape != (n,):
        raise ValueError(
            f"Pool weights have shape {tuple(values.shape)} and dtype {values.dtype}: pass one number per sample, ({n},)."
        )
    values = values.to(wide_dtype(values.device))
    bad = ~((values >= 0) & values.isfinite())
    if bool(bad.any()):
        place = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"Pool weights are {values[place].item():g} at sample {place}: pass finite numbers, 0 or more."
        )
    return values


def compared(
    x0: Tensor, index: Tensor, matrix: ReferenceMatrix, rounded: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compare each row of `x0` with its sample.

    Args:
        x0: the rows, shape (B, ...).
        index: the claimed sample of each, shape (B,).
        matrix: the samples.
        rounded: whether the matrix may have rounded them to the dtype in which it stores them.

    Returns:
        The largest difference, whether it is a different sample, and whether they differ by more than rounding in float32,
        shape (B,) each; and the samples, shape (B, d).
    """
    dtype, given, narrow = matrix.dtype_with(x0), x0.flatten(1), torch.finfo(torch.float32).eps
    eps = max(torch.finfo(x0.dtype).eps, matrix.eps if rounded else narrow)
    samples = matrix.rows(index, dtype)

    def gap_and_size(some: slice) -> Tensor:
        return torch.stack([largest_magnitude(samples[some] - given[some]), largest_magnitude(samples[some])])

    gap, size = in_blocks(gap_and_size, given).unbind(0)
    size = size + matrix.holds_bytes
    # Rounding, including that of decoding bytes, and a hundredth of the data's spread for different arithmetic.
    allowed = 4 * eps * size + torch.finfo(dtype).tiny + 0.01 * matrix.spread
    return gap, ~(gap <= allowed), gap > 4 * narrow * size, samples


def verified_samples(x0: Tensor, index: Tensor, matrix: ReferenceMatrix, places: Tensor) -> Tensor | None:
    """Verify that each row is its claimed sample, and return the samples as stored.

    Args:
        x0: the rows that use references, shape (B, ...).
        index: the claimed sample of each, shape (B,).
        matrix: the samples.
        places: indices of the rows in the user's batch, shape (B,).

    Returns:
        The samples, shape (B, d), float32, or float64 if either is; None if the rows are the same up to rounding in float32.

    Raises:
        ValueError: if a row is a different sample. Its source would not be among the references, which silently biases the
            target.
    """
    gap, wrong, moved, samples = compared(x0, index, matrix)
    # One value to read for both.
    seen = int((2 * wrong.int() + moved.int()).max()) if len(x0) else 0
    if seen >= 2:
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"row {int(places[row])} of x0 is not sample {int(index[row])} of the Pool (largest difference "
            f"{gap[row].item():.3g}): pass flip= for mirrored rows, source_only= for rows with another augmentation, or "
            "the right index."
        )
    return samples if seen else None


def choose(n: int, index: Tensor, size: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Choose `size` of n samples: those at `index`, each once, and others drawn without replacement.

    Args:
        n: the number of samples.
        index: indices of the batch's rows, integers (B,).
        size: how many to choose.
        generator: draws the others.

    Returns:
        The indices of the chosen samples, shape (size,), and each row's index among them, shape (B,).

    Raises:
        ValueError: if `size` is below the number of distinct rows.
    """
    own: Tensor
    source: Tensor
    own, source = torch.unique(index, return_inverse=True)
    if size < len(own):
        raise ValueError(
            f"Pool size is {size}, but the batch has {len(own)} distinct samples: "
            f"pass at least the batch size, so that every source is among the references."
        )
    return torch.cat([own, _others(n, own, size - len(own), generator)]), source


def _others(n: int, own: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw `count` of the numbers 0 to n - 1 that are not in `own`, without replacement, on the device of `own`."""
    device = own.device if generator is None else generator.device
    if 4 * (count + len(own)) > n:
        taken = torch.zeros(n, dtype=torch.bool, device=own.device)
        taken[own] = True
        free = (~taken).nonzero()[:, 0]
        return free[torch.randperm(len(free), generator=generator, device=device)[:count].to(own.device)]
    # A few out of many: draw with replacement, drop repeats, keep a random subset; this avoids a pass over all n.
    found = own.new_empty(0)
    while len(found) < count:
        drawn = torch.randint(n, (2 * count + 16,), generator=generator, device=device).to(own.device)
        drawn = drawn[~torch.isin(drawn, own)]
        found: Tensor = torch.unique(torch.cat([found, drawn]))
    return found[torch.randperm(len(found), generator=generator, device=device)[:count].to(own.device)]
