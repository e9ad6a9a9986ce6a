r"""Meters: means over consecutive steps, in total and per noise level.

Sums stay on the device; the host reads them only at the end. The noise levels are cut into bins of equal probability under
the training distribution, so each bin's mean has about the same number of rows.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield.diffusion._noise_levels import NoiseLevels
from stablefield.diffusion._objective import ObjectiveValue
from stablefield.diffusion._process import Process

__all__ = ["BINS", "Meter", "Report", "Stopwatch", "bin_edges"]

BINS = 8


@dataclass(frozen=True)
class Report:
    """Means over the steps since the last report.

    Attributes:
        step: steps done.
        loss: mean loss.
        variance_removed: mean variance that the references removed from the loss, in its units.
        images_per_second: noisy images, over all processes, without checkpoints and pictures.
        target_share: share of the time for noise and target.
        bin_loss: mean loss per noise-level bin; nan for bins without rows.
        bin_removed: mean variance removed per bin.
        steps: steps of the whole run; a run within a time may change it on the way.
    """

    step: int
    loss: float
    variance_removed: float
    images_per_second: float
    target_share: float
    bin_loss: tuple[float, ...] = ()
    bin_removed: tuple[float, ...] = ()
    steps: int = 0

    @property
    def share_removed(self) -> float:
        """Variance removed as a share of the loss with the single-sample target."""
        whole = self.loss + self.variance_removed
        return self.variance_removed / whole if whole > 0 else 0.0


def bin_edges(noise_levels: NoiseLevels, process: Process) -> tuple[float, ...]:
    """Noise levels that cut the training distribution into `BINS` equally probable bins, with open outer ends."""
    shares = torch.arange(1, BINS, dtype=torch.float64) / BINS
    return tuple(process.noise_level(noise_levels.quantile(shares, process)).tolist())


class Stopwatch:
    """Seconds between `start` and `stop`, summed; on CUDA by events, which do not wait for the device.

    Attributes:
        ahead: seconds of the sum that are for later steps, as of targets that are computed for several steps together.
    """

    def __init__(self, device: torch.device) -> None:
        self.ahead = 0.0
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._began: float | torch.cuda.Event = 0.0

    def start(self) -> None:
        """Begin an interval."""
        self._began = self._mark()

    def stop(self) -> None:
        """End the interval."""
        end = self._mark()
        if isinstance(self._began, float) and isinstance(end, float):
            self._seconds += end - self._began
        elif isinstance(self._began, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            self._events.append((self._began, end))

    def seconds(self) -> float:
        """The sum so far; waits for the device."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
            self._events.clear()
        return self._seconds

    def _mark(self) -> "float | torch.cuda.Event":
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Meter:
    """Sums over consecutive steps of one process.

    What the stopwatch has measured ahead counts for the steps that it is for.

    Args:
        edges: of the bins, see `bin_edges`.
        device: of the losses.
        target: the stopwatch for noise and targets.
    """

    def __init__(self, edges: tuple[float, ...], device: torch.device, target: Stopwatch) -> None:
        self._edges = torch.tensor(edges, dtype=torch.float32, device=device)
        self._sums = torch.zeros(3, len(edges) + 1, dtype=torch.float32, device=device)
        self._target, self._ahead = target, target.ahead
        self._target_began = target.seconds() - target.ahead
        self._images = 0
        self._seconds = 0.0
        self._clock = time.perf_counter()

    def step(self, parts: Sequence[ObjectiveValue], images: int) -> None:
        """Add a step: this process's parts of it, and the number of images over all processes."""
        for value in parts:
            loss = value.row_loss.detach().float()
            weight = torch.ones_like(loss) if value.weight is None else value.weight.float()
            rows = torch.stack([loss, value.variance_removed.float(), weight])
            self._sums.index_add_(1, torch.bucketize(value.noise_level.float(), self._edges), rows)
        self._images += images
        now = time.perf_counter()
        self._seconds += now - self._clock
        self._clock = now

    def pause(self) -> None:
        """Exclude the time since the last step."""
        self._clock = time.perf_counter()

    @property
    def sums(self) -> Tensor:
        """Sums of loss, variance removed and weights per bin, shape (3, bins); over only this process."""
        return self._sums

    def report(self, step: int, sums: Tensor | None = None) -> Report:
        """The means over these steps, with `sums` over all processes if there are several."""
        loss, removed, rows = (self._sums if sums is None else sums).double().cpu()
        count = max(1.0, float(rows.sum()))
        seconds = max(1e-9, self._seconds + self._ahead - self._target.ahead)
        target = self._target.seconds() - self._target.ahead - self._target_began
        return Report(
            step=step,
            loss=float(loss.sum()) / count,
            variance_removed=float(removed.sum()) / count,
            images_per_second=self._images / seconds,
            target_share=min(1.0, target / seconds),
            bin_loss=tuple((loss / rows).tolist()),
            bin_removed=tuple((removed / rows).tolist()),
        )
