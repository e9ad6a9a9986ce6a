"""Features that arrive in batches and from several processes.

Both classes are torchmetrics metrics: `update` takes a batch, `merge_state` joins another metric's state, and the
result is that of all processes where torch.distributed is running (torchmetrics gathers the states). Every process must
ask for the result, those that saw no batch included. Needs torchmetrics: `pip install stablefield[evaluate]`.
"""

from typing import Protocol

import torch
from torch import Tensor

from stablefield.evaluation.features import checked, in_float64
from stablefield.evaluation.statistics import Statistics, empty_moments, join_moments, moments_of, unpack
from stablefield.shapes import check_tensor, whole_number

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(
        "streaming statistics need torchmetrics: pip install 'stablefield[evaluate]'.", name="torchmetrics"
    ) from error

__all__ = ["Gather", "StreamingFeatures", "StreamingStatistics"]


class Gather(Protocol):
    """Collects one state tensor from every process."""

    def __call__(self, state: Tensor, *, group: object) -> list[Tensor]:
        """The states of all processes of `group`, in the order of their ranks."""
        ...


class StreamingStatistics(Metric):
    """Mean and covariance of features over batches and processes, in float64.

    Holds (d + 2) d numbers (34 MB at d = 2048), whatever the number of samples. A sampler that pads its last batch must
    not feed the padding: rows are counted as they come.

    Args:
        dim: number of features d.
        gather: how the state of every process is collected, as torchmetrics' `dist_sync_fn`; torch.distributed's
            all_gather if not given. Giving it means that there are several processes.
        source_only: this process measures for itself, also where torch.distributed is running; the others need not.
    """

    full_state_update = False
    moments: Tensor

    def __init__(self, dim: int, *, gather: Gather | None = None, source_only: bool = False) -> None:
        super().__init__(dist_sync_fn=gather, distributed_available_fn=_no if source_only else _yes if gather else None)
        whole_number("dim", dim)
        if dim < 1:
            raise ValueError(f"dim is {dim}: pass the extractor's number of features.")
        self.dim = dim
        self.add_state("moments", default=empty_moments(dim), dist_reduce_fx=_join_all)

    def update(self, features: Tensor) -> None:
        """Take in the features of a batch, shape (B, dim); B may be 0.

        Raises:
            ValueError: if the shape or dtype is wrong, or a row holds NaN or infinite numbers.
        """
        features = _checked_batch(features, self.dim)
        if len(features) > 0:
            self.moments = join_moments(self.moments, moments_of(features.to(self.moments.device)))

    def compute(self) -> Tensor:
        """The packed moments of all batches, shape (dim + 2, dim); `statistics` unpacks them."""
        return self.moments

    def statistics(self) -> Statistics:
        """Statistics of all batches of all processes.

        Raises:
            ValueError: if there are fewer than 2 rows in all.
        """
        if not self.update_called:
            self.update(torch.empty(0, self.dim))
        return unpack(self.compute())


class StreamingFeatures(Metric):
    """The features themselves over batches and processes, for metrics that need every row.

    Each row comes with the number of its sample. The result is in the order of those numbers, each number once: neither
    the number of processes nor a sampler's padding changes it.

    Args:
        dim: number of features d.
        gather: as for `StreamingStatistics`.
        source_only: as for `StreamingStatistics`.
    """

    full_state_update = False
    rows: list[Tensor]
    numbers: list[Tensor]

    def __init__(self, dim: int, *, gather: Gather | None = None, source_only: bool = False) -> None:
        super().__init__(dist_sync_fn=gather, distributed_available_fn=_no if source_only else _yes if gather else None)
        whole_number("dim", dim)
        if dim < 1:
            raise ValueError(f"dim is {dim}: pass the extractor's number of features.")
        self.dim = dim
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.add_state("numbers", default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, numbers: Tensor) -> None:
        """Take in the features (B, dim) of the samples `numbers` (B,), integers; B may be 0.

        Raises:
            ValueError: as `StreamingStatistics.update`, or if `numbers` is not one integer per row.
        """
        features = _checked_batch(features, self.dim)
        check_tensor("numbers", numbers)
        if numbers.shape != features.shape[:1] or numbers.is_floating_point():
            raise ValueError(
                f"numbers has shape {tuple(numbers.shape)} and dtype {numbers.dtype}: "
                f"pass one integer per row of features, shape ({len(features)},)."
            )
        self.rows.append(features.float().to(self.device))
        self.numbers.append(numbers.long().to(self.device))

    def compute(self) -> tuple[Tensor, Tensor]:
        """All rows (n, dim), float32, and their numbers (n,), sorted and each number once."""
        rows, numbers = _whole(self.rows), _whole(self.numbers)
        order = torch.argsort(numbers, stable=True)
        numbers = numbers[order]
        first = torch.ones_like(numbers, dtype=torch.bool)
        first[1:] = numbers[1:] != numbers[:-1]
        return rows[order[first]], numbers[first]

    def features(self) -> Tensor:
        """The features of all samples of all processes in the order of their numbers, shape (n, dim), float32."""
        if not self.update_called:
            self.update(torch.empty(0, self.dim), torch.empty(0, dtype=torch.long))
        return self.compute()[0]


def _checked_batch(features: Tensor, dim: int) -> Tensor:
    features = checked("features", features, least=0)
    if features.shape[1] != dim:
        raise ValueError(f"features has {features.shape[1]} features per row, this stream was made for {dim}.")
    return features if features.device.type != "mps" else in_float64(features)


def _join_all(stacked: Tensor) -> Tensor:
    """Join the moments of all processes, shape (processes, d + 2, d), as a balanced tree."""
    parts = list(stacked)
    while len(parts) > 1:
        parts = [
            join_moments(*pair) if len(pair) == 2 else pair[0]
            for pair in (parts[i : i + 2] for i in range(0, len(parts), 2))
        ]
    return parts[0]


def _whole(state: list[Tensor] | Tensor) -> Tensor:
    """A list state is a list before it is synchronised, and one tensor after."""
    return state if isinstance(state, Tensor) else torch.cat(state)


def _yes() -> bool:
    return True


def _no() -> bool:
    return False
