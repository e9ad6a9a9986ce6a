"""Reference policies: which clean samples a stable target averages over.

A policy chooses, for a batch of sources, a set of references with every row's source in it. The target is unbiased if,
given the set, the source is equally likely to be any of its members (see `posterior`). That holds for a batch drawn at
random, for a whole data set, and for a random subset joined with the batch's own rows; it fails, measurably, if the
source is left out or held twice, or if references differ from the row in a condition that the network is told.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield.reading import readable
from stablefield.targets.bank import Bank, largest_magnitude
from stablefield.targets.excess import Anchor
from stablefield.targets.kernel import Kernel
from stablefield.targets.partial import Partial
from stablefield.targets.query import Query

__all__ = ["Exchange", "InBatch", "Pool", "References", "Selection", "check_is_own", "choose", "own_gap"]


@dataclass(frozen=True)
class Selection:
    """The references of one batch.

    Attributes:
        bank: the references.
        source: index into the bank of the reference that each row was made from, shape (B,).
        group: condition of each reference, shape (n,), or None.
        mirrored: whether the mirror image (last axis) of each reference is a reference, too.
        exchange: how to ask the ranks that hold other references, or None; `source` then counts in the whole set.
        unsure: of which rows it must still be looked whether they are the references at `source`: those that use references,
            all of them (where their index has decided which references there are), or none.
    """

    bank: Bank
    source: Tensor
    group: Tensor | None
    mirrored: bool = False
    exchange: "Exchange | None" = None
    unsure: Literal["using", "all", "none"] = "using"


class Exchange(Protocol):
    """How the sums of a batch over references that lie elsewhere are obtained."""

    def sums(
        self, query: Query, anchor: Anchor, bank: Bank, kernel: Kernel, mirrored: bool, chunk_size: int | None
    ) -> Partial:
        """Softmax sums over the references of all ranks, without the rows' own sources; see `sharded`."""
        ...


class References(Protocol):
    """What a stable target asks of a reference policy."""

    def select(
        self, x0: Tensor, group: Tensor | None, index: Tensor | None, generator: torch.Generator | None
    ) -> Selection:
        """Choose the references of a batch.

        Args:
            x0: the sources as the data set holds them (flips undone), shape (B, ...).
            group: true condition of each source, shape (B,), or None.
            index: place of each source in the data set, shape (B,), or None.
            generator: where random choices are drawn from.
        """
        ...


@dataclass(frozen=True)
class InBatch:
    """The batch itself: every row's clean sample is a reference for all rows."""

    def select(  # noqa: D102
        self,
        x0: Tensor,
        group: Tensor | None,
        index: Tensor | None,  # noqa: ARG002
        generator: torch.Generator | None,  # noqa: ARG002
    ) -> Selection:
        return Selection(Bank(x0), torch.arange(len(x0), device=x0.device), group, unsure="none")


class Pool:
    """References from an array: the batch's own rows and others drawn without replacement, or the whole array.

    No sample is ever in the set twice, and every row's own sample is always in it.

    Args:
        data: the clean samples, shape (n, ...), floating point, or uint8 images that mean data / 127.5 - 1. A tensor on the
            device of the training batches; or a numpy array, such as a memory map of a file larger than memory, which is
            brought to the device of the batch chunk by chunk. Norms are computed once and kept: do not change the data in
            place afterwards.
        size: number of references per batch; None for the whole array.
        group: condition of each sample, integers of shape (n,), or None.
        mirrored: use the mirror image (last axis) of each reference, too. For data sets doubled by random flips that the
            network is not told of; the set then has 2 `size` members.

    Raises:
        ValueError: if `data` is empty or of another dtype, `size` is not between 1 and n, or `group` does not fit.
    """

    def __init__(
        self,
        data: Tensor | NDArray[Any],
        size: int | None = None,
        group: Tensor | None = None,
        *,
        mirrored: bool = False,
    ) -> None:
        if data.ndim < 2 or len(data) == 0:
            raise ValueError(f"Pool data have shape {tuple(data.shape)}: pass at least one sample, shape (n, ...).")
        if isinstance(data, Tensor):
            fits = data.is_floating_point() or data.dtype == torch.uint8
        else:
            fits = data.dtype.name in ("uint8", "float16", "float32", "float64")
        if not fits:
            raise ValueError(f"Pool data have dtype {data.dtype}: pass floating point data, or uint8 images.")
        if size is not None and not 1 <= size <= len(data):
            raise ValueError(f"Pool size is {size}: it must be from 1 to the {len(data)} samples, or None for all.")
        if group is not None and (group.shape != (len(data),) or group.is_floating_point()):
            raise ValueError(
                f"Pool group has shape {tuple(group.shape)} and dtype {group.dtype}: "
                f"it needs one integer per sample, shape ({len(data)},)."
            )
        self.size = size
        self.group = group
        self.mirrored = mirrored
        self._bank = Bank(data)
        self._elsewhere: dict[torch.device, Bank] = {}
        self._groups: dict[torch.device, Tensor] = {}

    def __repr__(self) -> str:
        return f"Pool(<{len(self._bank)} samples>, size={self.size}, mirrored={self.mirrored})"

    @property
    def data(self) -> Tensor | NDArray[Any]:
        """The clean samples, shape (n, ...)."""
        return self._bank.data

    def bank(self, device: torch.device) -> Bank:
        """The samples as a bank for batches on `device`.

        Raises:
            ValueError: if they are a tensor on another one.
        """
        if self._bank.device == device:
            return self._bank
        if isinstance(self.data, Tensor):
            raise ValueError(
                f"the Pool's data are on {self.data.device}, the batch on {device}: move them to one device."
            )
        if device not in self._elsewhere:
            self._elsewhere[device] = Bank(self.data, device)
        return self._elsewhere[device]

    def select(
        self, x0: Tensor, group: Tensor | None, index: Tensor | None, generator: torch.Generator | None
    ) -> Selection:
        """Choose the references of a batch, as described at `References`.

        Raises:
            ValueError: if `index` is missing or out of range, `size` is below the batch's distinct samples, or devices
                differ.
        """
        n = len(self._bank)
        if index is None:
            raise ValueError("index is missing: a Pool needs the place of each row of the batch in its data.")
        if index.shape != x0.shape[:1] or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(
                f"index has shape {tuple(index.shape)} and dtype {index.dtype}: one integer per row is needed."
            )
        if index.device != x0.device:
            raise ValueError(f"index on {index.device}, the batch on {x0.device}: move them to one device.")
        bank = self.bank(x0.device)
        if x0.shape[1:] != self.data.shape[1:]:
            raise ValueError(
                f"rows of x0 have shape {tuple(x0.shape[1:])}, the Pool's {tuple(self.data.shape[1:])}: they must agree."
            )
        if readable(x0.device):
            if not bool(((index >= 0) & (index < n)).all()):
                raise ValueError(f"index runs from {index.min()} to {index.max()}: the Pool holds 0 to {n - 1}.")
        elif self._draws:
            raise ValueError(
                f"the Pool's size is {self.size}: which references are drawn depends on the batch's index, which a compiled "
                "or captured function cannot look at. Use the whole pool (size=None) with a noise_band and a capacity, or "
                "keep the target out of what is compiled: torch.compiler.disable(target.__call__)."
            )
        index = index.long()
        if group is not None and self.group is None:
            raise ValueError(
                "group is given, but the Pool has none: pass Pool(..., group=...), one integer per sample."
            )
        reference_group = self._group_on(x0.device)
        if not self._draws:
            return Selection(bank, index, reference_group, self.mirrored)
        assert self.size is not None
        chosen, source = choose(n, index, self.size, generator)
        group = None if reference_group is None else reference_group[chosen]
        return Selection(bank.take(chosen), source, group, self.mirrored, unsure="all")

    @property
    def _draws(self) -> bool:
        """Whether each batch has references of its own."""
        return self.size is not None and self.size < len(self._bank)

    def _group_on(self, device: torch.device) -> Tensor | None:
        if self.group is None or self.group.device == device:
            return self.group
        if device not in self._groups:
            self._groups[device] = self.group.to(device)
        return self._groups[device]

    def subset(self, index: Tensor) -> "Pool":
        """The whole pool of the samples at `index`, integers (m,), with what is known of their norms."""
        part = Pool.__new__(Pool)
        part.size, part.mirrored = None, self.mirrored
        part.group = None if self.group is None else self.group[index]
        part._bank, part._elsewhere, part._groups = self._bank.take(index), {}, {}
        return part


def own_gap(x0: Tensor, index: Tensor, bank: Bank) -> tuple[Tensor, Tensor]:
    """Largest difference between each row of `x0` and the reference at its index, and whether it is another sample, (B,)."""
    rows = bank.rows(index, x0.dtype if x0.dtype == torch.float64 else torch.float32)
    size = largest_magnitude(rows)
    gap = largest_magnitude(rows.sub_(x0.reshape(rows.shape)))
    return gap, gap > 0.01 * (1 + size)


def check_is_own(x0: Tensor, source: Tensor, bank: Bank, rows: Tensor, index: Tensor | None) -> None:
    """Look whether each row is the reference that it is said to be.

    Args:
        x0: the rows that use references, shape (B, ...).
        source: the reference that each is, shape (B,).
        bank: the references.
        rows: where the rows are in the user's batch, shape (B,).
        index: where they are in the user's data, shape (B,), if that is known.

    Raises:
        ValueError: if one is not. Its source would not be among the references, which biases the target silently.
    """
    gap, wrong = own_gap(x0, source, bank)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        sample = int((source if index is None else index)[row])
        raise ValueError(
            f"row {int(rows[row])} of x0 is not sample {sample} of the Pool (largest difference {gap[row].item():.3g}): "
            "pass flip= for mirrored rows, alone= for rows with another augmentation of their own, or the right index."
        )


def choose(n: int, index: Tensor, size: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Choose `size` of n samples: those at `index`, each once, and others drawn without replacement.

    Args:
        n: how many samples there are.
        index: places of the batch's rows, integers (B,).
        size: how many to choose.
        generator: where the others are drawn from.

    Returns:
        The places of the chosen, shape (size,), and each row's place among them, shape (B,).

    Raises:
        ValueError: if `size` is below the number of distinct rows.
    """
    own: Tensor
    source: Tensor
    own, source = torch.unique(index, return_inverse=True)
    if size < len(own):
        raise ValueError(
            f"Pool size is {size}, but the batch has {len(own)} samples of its own: "
            f"a size of at least the batch is needed, so that every source is among the references."
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
    # Few out of many: draw with replacement, strike out repeats, keep a random subset; no pass over all n.
    found = own.new_empty(0)
    while len(found) < count:
        drawn = torch.randint(n, (2 * count + 16,), generator=generator, device=device).to(own.device)
        drawn = drawn[~torch.isin(drawn, own)]
        found: Tensor = torch.unique(torch.cat([found, drawn]))
    return found[torch.randperm(len(found), generator=generator, device=device)[:count].to(own.device)]
