"""A pool of references: an array of clean samples; each batch uses all or some of them.

The pool knows the prior: how likely each sample is to be drawn, and its label.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield._shapes import check_floating_dtype, flag, whole_number
from stablefield.targets._checks import Check, require, value_check
from stablefield.targets._draws import Frequencies
from stablefield.targets._engine.query import Host
from stablefield.targets._engine.reference_matrix import ReferenceMatrix, bits_of, tensor_version, wide_dtype
from stablefield.targets._flips import Flips
from stablefield.targets._moments import Moments, check_distances
from stablefield.targets._pool_arguments import (
    check_data,
    check_flipped,
    check_label_sizes,
    check_labels,
    checked_weights,
)
from stablefield.targets._references import UNKNOWN_LABEL, Batch, Selection, Stored
from stablefield.targets._spread import Spread
from stablefield.targets._subset import choose, drawn_seed, drawn_subset, others

__all__ = ["OTHER_LABEL", "WITHOUT_WEIGHT", "Pool"]

OTHER_LABEL = "the Pool has another label for the row's own sample; pass the label of each row, or -1 for none"
WITHOUT_WEIGHT = "its weight in the Pool is 0, so it cannot have been drawn; give the weights that your sampler uses"

_READ_ONLY = (
    "Pool.{name} cannot be set: the pool has checked them and has counted draws with them. Make a new Pool with {name}=..., "
    "and a StableTarget with it."
)

# Samples that are compared with their flips at a time.
_BLOCK = 1024


@dataclass(frozen=True)
class _Held:
    """The samples for one batch on its device, and where its own rows are.

    Attributes:
        matrix: the samples.
        flipped: the flipped samples, or None.
        index: the index of each row's sample, shape (B,).
        stored: the same for comparison with the rows; None if they are drawn anew.
        is_flipped: rows that are flipped samples, bool (B,), or None.
    """

    matrix: ReferenceMatrix
    flipped: ReferenceMatrix | None
    index: Tensor
    stored: Stored | None
    is_flipped: Tensor | None


def _rows(value: Tensor | NDArray[Any], index: Tensor) -> Tensor:
    """The samples at `index` (m,), which is on the host, or their bits."""
    if isinstance(value, Tensor):
        return value[index.to(value.device)]
    rows = bits_of(value)[index.numpy()]
    return torch.from_numpy(rows.view(np.int16) if rows.dtype == np.uint16 else rows)


class Pool:
    """References from an array: the batch's own rows and others drawn without replacement, or the whole array.

    No sample is ever in the set twice, and every row's own sample is always in it.

    Args:
        data: the clean samples, shape (n, ...), floating point (also float16 and bfloat16, which are kept as they are), or
            uint8 images that mean data / 127.5 - 1. A tensor on the device of the training batches; or a tensor in the
            host's memory or a numpy array, such as a memory map of a file larger than memory, which are sent to the device
            of the batch chunk by chunk. Norms are computed once and kept, so make a new pool if you change the data. Only
            changes of a tensor by torch's operations are noticed (by a compiled function, after an ordinary call): not those
            of an array, nor through `.data` or a NumPy array that shares the memory, nor of a tensor made under
            `torch.inference_mode`, which has no count of its changes.
        size: number of references per batch, its own rows among them; None for the whole array. Batches must be random
            subsets of the data: those of one class or clip, or from sorted data by a small shuffle buffer, bias the target.
            For such batches pass `weights`, which may all be 1, too.
        labels: condition of each sample, integers from 0, shape (n,), or None. A row with a label is multiplied with the
            samples of its label only; data sorted by label are then read without a copy. Give samples of unknown label a
            separate one (such as the largest plus 1), because the fact that it is missing is information. They are copied:
            for other labels, make a new pool and a `StableTarget` with it.
        mirrored: use the mirror image (last axis) of each reference, too. For data sets doubled by random flips that the
            network does not see; the set then has 2 `size` members. Each row must be flipped with probability 1/2, whatever
            its sample: the target is biased if the rows are never flipped.
        flipped: the flipped samples, of the shape and dtype of `data`, if they are not its mirror images, as the latents of
            flipped images are not. Both are references, 2 n in all; `flip` in the call of a `StableTarget` says which rows
            are flipped samples. For a network that does not see the flip. Each row must be flipped with probability 1/2.
        label_size: for rows with a label, the number of references of that label, drawn anew for each batch; each row's own
            sample is added for that row. None for all of the label. What is drawn is copied in each step, which pays for
            well below half of the samples.
        unlabelled_size: the same for rows without a label (-1), of all samples.
        resampled: whether the rows of a batch are drawn anew from their samples' distributions, as latents of a variational
            autoencoder are: the row's own reference is then the row itself, and the other samples are one draw each. The
            target is unbiased over these draws, see "Latents" in the theory. `from_moments` makes such a pool; only that one
            can notice a row with a wrong index.
        weights: how likely each sample is to be drawn for a batch, shape (n,), on any scale, not negative; equally likely if
            None. They are the prior of the posterior: pass the weights of your sampler. They are copied: for others, such as
            those of a new phase of training, make a new pool and a `StableTarget` with it. With `size`, the references are
            then drawn uniformly from all samples, and each row's own sample is added only for that row.
        dtype: torch.bfloat16 for an array of uint16 that holds the bits of such numbers; NumPy has no bfloat16 of its own.
            Arrays of the package ml_dtypes need no dtype.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if `data` is empty or has the wrong dtype, a size is not between 1 and n or needs labels that are not
            there, or `labels`, `weights` or `flipped` do not fit the data or each other.
    """

    def __init__(
        self,
        data: Tensor | NDArray[Any],
        size: int | None = None,
        labels: Tensor | None = None,
        *,
        mirrored: bool = False,
        flipped: Tensor | NDArray[Any] | None = None,
        label_size: int | None = None,
        unlabelled_size: int | None = None,
        resampled: bool = False,
        weights: Tensor | NDArray[Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_data(data, dtype)
        n = len(data)
        size = None if size is None else whole_number("Pool size", size)
        flag("mirrored", mirrored)
        flag("resampled", resampled)
        if size is not None and not 1 <= size <= n:
            raise ValueError(f"Pool size is {size}: pass 1 to the {n} samples, or None for all.")
        if labels is not None:
            check_labels(labels, n)
            # A training loop may drop labels in place in this very tensor, which must not drop those of the references.
            labels = labels.to(torch.long, copy=True)
        # Labels on a GPU are checked with the first batch, to avoid a wait here.
        self._unchecked_labels = labels is not None
        if labels is not None and labels.device.type == "cpu":
            require(value_check(labels >= 0, "Pool labels", labels, UNKNOWN_LABEL))
            self._unchecked_labels = False
        if flipped is not None:
            check_flipped(flipped, data, mirrored)
        if mirrored and resampled:
            raise ValueError(
                "resampled latents are not mirror images of others: pass mirrored=False, and the latents of the mirrored "
                "images as flipped=."
            )
        check_label_sizes(n, size, labels, {"label_size": label_size, "unlabelled_size": unlabelled_size})
        self.size = size
        self._labels = labels
        self.mirrored = mirrored
        self.label_size = label_size
        self.unlabelled_size = unlabelled_size
        self.resampled = resampled
        self._weights = None if weights is None else checked_weights(weights, n)
        self._matrix = ReferenceMatrix(data)
        self._flipped = None if flipped is None else ReferenceMatrix(flipped)
        self._elsewhere: dict[tuple[int, torch.device], tuple[int, ReferenceMatrix]] = {}
        self._moved: dict[tuple[str, torch.device], tuple[int, Tensor]] = {}
        self._frequencies: Frequencies | None = None
        self._flips: Flips | None = None
        self._spread: Spread | None = None
        self._moments: tuple[Moments, ...] = ()
        self._seed, self._draw = 0, 0

    @classmethod
    def from_moments(
        cls,
        mean: Tensor | NDArray[Any],
        std: Tensor | NDArray[Any],
        labels: Tensor | None = None,
        *,
        flipped_mean: Tensor | NDArray[Any] | None = None,
        flipped_std: Tensor | NDArray[Any] | None = None,
        label_size: int | None = None,
        unlabelled_size: int | None = None,
        weights: Tensor | NDArray[Any] | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> "Pool":
        """A `resampled` pool of latents drawn from normal distributions, such as a variational autoencoder's.

        The rows of a batch are other draws: x0 = mean[index] + std[index] * noise. `refresh` draws the stored latents anew;
        do so now and then, such as once an epoch, because the target is unbiased over their draws, not for each of them.

        Args:
            mean: of each latent, shape (n, ...), floating point: a tensor on the device of the batches, or a numpy array,
                whose latents are drawn to the CPU.
            std: the standard deviations, of the same kind and shape.
            labels: as in `Pool`.
            flipped_mean: the means of the flipped samples, with `flipped_std`; see `flipped` of `Pool`. Each row must be
                flipped with probability 1/2.
            flipped_std: their standard deviations.
            label_size: as in `Pool`.
            unlabelled_size: as in `Pool`.
            weights: as in `Pool`.
            dtype: of the stored latents; torch.float16 or torch.bfloat16 take half the memory.
            seed: of the draws.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if the moments do not fit together, are not finite, or a standard deviation is negative.
        """
        check_floating_dtype("dtype", dtype)
        whole_number("seed", seed, 0)
        if (flipped_mean is None) != (flipped_std is None):
            raise ValueError("flipped_mean and flipped_std belong together: pass both or none.")
        moments = [Moments(mean, std)]
        if flipped_mean is not None and flipped_std is not None:
            moments.append(Moments(flipped_mean, flipped_std))
        with torch.inference_mode(False):  # or `refresh` could not draw in place
            data = [torch.empty(one.mean.shape, dtype=dtype, device=one.device) for one in moments]
        flipped = data[1] if len(data) == 2 else None
        pool = cls(
            data[0],
            None,
            labels,
            flipped=flipped,
            label_size=label_size,
            unlabelled_size=unlabelled_size,
            resampled=True,
            weights=weights,
        )
        pool._moments, pool._seed = tuple(moments), seed
        pool.refresh(0)
        return pool

    def refresh(self, draw: int | None = None) -> None:
        """Draw all stored latents anew.

        Args:
            draw: which draw; by default the one after the present one. The first is 0, and each is the same every time, so
                a run that goes on can ask for its own.

        Raises:
            ValueError: if the pool is not made by `from_moments`, or `draw` is negative.
        """
        if not self._moments:
            raise ValueError(
                "refresh() needs the moments of the latents: make the pool by Pool.from_moments(mean, std)."
            )
        self._draw = self._draw + 1 if draw is None else whole_number("draw", draw, 0)
        for place, (moments, data) in enumerate(zip(self._moments, (self.data, self.flipped), strict=False)):
            assert isinstance(data, Tensor)
            state = np.random.SeedSequence([self._seed, self._draw, place]).generate_state(1, np.uint64)
            moments.draw(data, int(state[0] >> np.uint64(1)))
        self._matrix.forget()
        if self._flipped is not None:
            self._flipped.forget()
        self._elsewhere.clear()

    def __getstate__(self) -> dict[str, Any]:
        # A copied tensor counts its changes anew, so nothing that was computed may be copied with it.
        return self.__dict__ | {"_elsewhere": {}, "_moved": {}}

    def __repr__(self) -> str:
        given = {"size": self.size, "mirrored": self.mirrored}
        more = {"label_size": self.label_size, "unlabelled_size": self.unlabelled_size, "resampled": self.resampled}
        given |= {name: value for name, value in more.items() if value}
        given |= {"flipped": True} if self._flipped is not None else {}
        text = ", ".join(f"{name}={value}" for name, value in given.items())
        return f"Pool(<{len(self._matrix)} samples>, {text})"

    @property
    def data(self) -> Tensor | NDArray[Any]:
        """The clean samples, shape (n, ...)."""
        return self._matrix.data

    @property
    def flipped(self) -> Tensor | NDArray[Any] | None:
        """The flipped samples, shape (n, ...), or None."""
        return None if self._flipped is None else self._flipped.data

    @property
    def labels(self) -> Tensor | None:
        """A copy of the given labels, int64, shape (n,), or None. Read-only: other labels need a new pool."""
        return self._labels

    @labels.setter
    def labels(self, _: Any) -> NoReturn:
        raise AttributeError(_READ_ONLY.format(name="labels"))

    @property
    def weights(self) -> Tensor | None:
        """A copy of the given weights, the largest 1, shape (n,), or None. Read-only: other weights need a new pool."""
        return self._weights

    @weights.setter
    def weights(self, _: Any) -> NoReturn:
        raise AttributeError(_READ_ONLY.format(name="weights"))

    def matrix(self, device: torch.device) -> ReferenceMatrix:
        """The samples as a matrix for batches on `device`.

        Raises:
            ValueError: if they are a tensor on another device than that or the host.
        """
        return self._for(self._matrix, device)

    def _for(self, matrix: ReferenceMatrix, device: torch.device) -> ReferenceMatrix:
        if matrix.device == device:
            return matrix
        if isinstance(matrix.data, Tensor) and matrix.device.type != "cpu":
            raise ValueError(
                f"the Pool's data are on {matrix.data.device}, the batch on {device}: move them to one device."
            )
        place = int(matrix is self._flipped), device
        version, found = self._elsewhere.get(place, (-1, None))
        if found is None or version != tensor_version(matrix.data):
            found = ReferenceMatrix(matrix.data, device)
            self._elsewhere[place] = tensor_version(matrix.data), found
        return found

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
        even = self.flip_check(place, batch, ~exempt)
        spread = self._spread_check(place, labels, ~exempt)
        return [*checks, *(check for check in (frequent, even, spread) if check is not None)]

    def flip_check(self, place: Tensor, batch: Batch, counted: Tensor) -> Check | None:
        """Count the flips of the rows with samples `place` (B,) that are `counted`, bool (B,), if the pool holds flips."""
        if not self.mirrored and self._flipped is None:
            return None
        if self._flips is None:
            self._flips = Flips(len(self._matrix))
        flips = batch.mirrored if self.mirrored else batch.flipped
        return self._flips.add(place, flips, counted, self._own_flips)

    def _spread_check(self, place: Tensor, labels: Tensor | None, counted: Tensor) -> Check | None:
        """Count the samples `place` (B,) of the rows that are `counted`, bool (B,), if the batch chooses its references."""
        n = len(self._matrix)
        if self.size is None or self.size >= n or self.weights is not None:
            return None
        if self._spread is None:
            self._spread = Spread(n, self.size, self.labels)
        return self._spread.add(place, None if labels is None else labels >= 0, counted)

    def _own_flips(self, index: Tensor) -> Tensor:
        """Which samples at `index` (m,), on the host, are the same as their flips, bool (m,)."""
        ones, others = (self.data,), (self.flipped,)
        if self._moments:
            ones, others = ((moments.mean, moments.std) for moments in self._moments)
        found = []
        for some in index.split(_BLOCK):
            same = torch.ones(len(some), dtype=torch.bool, device="cpu")
            for one, other in zip(ones, others, strict=True):
                rows = _rows(one, some)
                flips = rows.flip(-1) if other is None else _rows(other, some)
                same &= (rows == flips).flatten(1).all(1).cpu()
            found.append(same)
        return torch.cat(found)

    def select(self, batch: Batch, generator: torch.Generator | None, host: Host) -> Selection:
        """Choose the references of a batch, as described at `References`.

        Raises:
            ValueError: if `index` is missing, `size` is below the number of the batch's distinct samples, or shapes or
                devices do not fit.
        """
        device = batch.x0.device
        index, matrix = self.checked_index(batch), self.matrix(device)
        flipped = None if self._flipped is None else self._for(self._flipped, device)
        if host is not Host.NEVER:
            self._unchecked_labels = False
        size = None if self.size == len(matrix) else self.size
        drawn_sizes = {"size": size, "label_size": self.label_size, "unlabelled_size": self.unlabelled_size}
        for name, value in drawn_sizes.items():
            if value is not None and host is Host.NEVER:
                raise ValueError(
                    f"the Pool's {name} is {value}: the drawn references depend on values that a compiled or captured "
                    f"function cannot read. Use the whole pool ({name}=None) with a noise_band and a capacity, or keep the "
                    "target out of the compiled part: torch.compiler.disable(target.__call__)."
                )
        if self._moments and host is not Host.NEVER:
            self._check_draws(batch.x0, index, batch.flipped)
        stored = None if self.resampled else Stored(matrix, index, flipped)
        held = _Held(matrix, flipped, index, stored, batch.flipped)
        labels = self._on("labels", device)
        if size is not None and self.weights is not None:
            # Drawn from all samples; a row's own sample, if not among them, is a reference only for that row.
            return self._drawn(held, others(len(matrix), index.new_empty(0), size, generator))
        if size is not None:
            chosen, source = choose(len(matrix), index, size, generator)
            return Selection(
                matrix=matrix.take(chosen),
                source=source,
                labels=None if labels is None else labels[chosen],
                mirrored=self.mirrored,
                flipped=None if flipped is None else flipped.take(chosen),
                resampled=self.resampled,
                chosen=chosen,
                stored=stored,
                verify_all=stored is not None,
                source_prior=None if flipped is None else torch.zeros(len(index), device=device),
            )
        if labels is None or host is Host.NEVER:
            return self._whole(held)
        by_label = matrix.by_label(labels)
        if flipped is not None:
            flipped.share_by_label(labels, by_label)
        label_size, unlabelled_size = self.label_size, self.unlabelled_size
        label_size = None if label_size is None or label_size >= by_label.largest else label_size
        unlabelled_size = None if unlabelled_size == len(matrix) else unlabelled_size
        if batch.labels is None or (label_size is None and unlabelled_size is None):
            return self._whole(held)
        # A seed is drawn for every batch, so that later draws do not depend on its labels.
        seed = drawn_seed(generator)

        def labelled(some: Tensor) -> Selection:
            assert label_size is not None
            return self._drawn(held, by_label.drawn(some, label_size, seed))

        def unlabelled() -> Selection:
            assert unlabelled_size is not None
            return self._drawn(held, drawn_subset(len(matrix), unlabelled_size, seed).to(device))

        return replace(
            self._whole(held),
            labelled=None if label_size is None else labelled,
            unlabelled=None if unlabelled_size is None else unlabelled,
        )

    def _whole(self, held: "_Held") -> Selection:
        """All samples."""
        log_prior = self._on("log_weights", held.index.device)
        source_prior = None if log_prior is None else log_prior[held.index]
        if held.flipped is not None and source_prior is None:
            source_prior = torch.zeros(len(held.index), device=held.index.device)
        return Selection(
            matrix=held.matrix,
            source=held.index,
            labels=self._on("labels", held.index.device),
            mirrored=self.mirrored,
            flipped=held.flipped,
            resampled=self.resampled,
            stored=held.stored,
            log_prior=log_prior,
            source_prior=source_prior,
        )

    def _drawn(self, held: "_Held", chosen: Tensor) -> Selection:
        """The samples `chosen` (m,) without regard to the batch; a row's own sample is added only for that row."""
        matrix, flipped, index, device = held.matrix, held.flipped, held.index, held.index.device
        labels, log_prior = self._on("labels", device), self._on("log_weights", device)
        chosen = chosen.sort().values
        place = torch.searchsorted(chosen, index).clamp(max=len(chosen) - 1)
        partner = None
        if flipped is not None and held.is_flipped is not None:
            one, other = (some.rows(index, some.dtype) for some in (matrix, flipped))
            partner = torch.where(held.is_flipped[:, None], one, other)
        return Selection(
            matrix=matrix.take(chosen),
            source=torch.where(chosen[place] == index, place, -1),
            labels=None if labels is None else labels[chosen],
            mirrored=self.mirrored,
            flipped=None if flipped is None else flipped.take(chosen),
            partner=partner,
            resampled=self.resampled,
            chosen=chosen,
            stored=held.stored,
            log_prior=None if log_prior is None else log_prior[chosen],
            source_prior=torch.zeros(len(index), device=device) if log_prior is None else log_prior[index],
        )

    def _check_draws(self, x0: Tensor, index: Tensor, is_flipped: Tensor | None) -> None:
        """Check that the rows can be draws of their samples."""
        if not len(x0):
            return
        distances = [moments.distance(x0, index) for moments in self._moments]
        found = distances[0] if is_flipped is None else torch.where(is_flipped, distances[1], distances[0])
        check_distances(found, index, x0[0].numel())

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

    def _on(self, name: Literal["labels", "weights", "log_weights"], device: torch.device) -> Tensor | None:
        """The labels, int64, or the weights or their logarithms on `device`."""
        value = self.labels if name == "labels" else self.weights
        if value is None:
            return None
        dtype = torch.long if name == "labels" else torch.float32 if device.type == "mps" else value.dtype
        if value.device == device and value.dtype == dtype and name != "log_weights":
            return value
        found = self._moved.get((name, device))
        # A compiler sees no versions; an eager call has converted them before.
        if found is None or (found[0] != tensor_version(value) and not torch.compiler.is_compiling()):
            there = value.to(device, dtype)
            found = tensor_version(value), there.log() if name == "log_weights" else there
            self._moved[name, device] = found
        return found[1]

    def subset(self, index: Tensor) -> "Pool":
        """A pool of all the samples at `index`, integers (m,), with their norms if known."""
        part = Pool.__new__(Pool)
        part.size, part.mirrored = None, self.mirrored
        part._labels = None if self.labels is None else self.labels[index]
        part._weights = None if self.weights is None else self.weights[index]
        part.label_size, part.unlabelled_size, part.resampled = None, None, self.resampled
        part._matrix, part._elsewhere, part._moved = self._matrix.take(index), {}, {}
        part._flipped = None if self._flipped is None else self._flipped.take(index)
        part._moments, part._seed, part._draw = (), 0, 0
        part._frequencies, part._flips, part._spread = None, None, None
        part._unchecked_labels = self._unchecked_labels
        return part
