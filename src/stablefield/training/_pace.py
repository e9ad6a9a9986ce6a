"""The pace of a run that is to end in time.

A forecast from a few steps is as good as the machine is quiet. So a run with a time looks at its pace on the way, each time
a quarter of the rest is done, and takes more or fewer steps.
"""

import time
from dataclasses import dataclass

__all__ = ["FREE", "Costs", "Pace", "clock"]

FREE = 0.03
"""Share of the time that is kept free."""

# Steps between two looks at the pace, at least, and the share of the run's steps from which a change of them counts.
_FEW, _CHANGE = 4, 0.005


def clock() -> float:
    """The seconds of the clock that budgets are measured with."""
    return time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What the parts of a run take, in seconds.

    Attributes:
        setup: to begin.
        step: a step.
        picture: a sample grid.
        checkpoint: a checkpoint.
        row: a row through the network, forwards.
        report: the report and the animation at the end.
    """

    setup: float
    step: float
    picture: float
    checkpoint: float
    row: float = 0.0
    report: float = 0.0

    @property
    def end(self) -> float:
        """What a run takes after its last step."""
        return self.picture + self.checkpoint + self.report


class Pace:
    """Looks at the pace of a run that is to end in time.

    Args:
        seconds: from now to its end.
        costs: of its parts.
    """

    def __init__(self, seconds: float, costs: Costs) -> None:
        self._end, self._costs = clock() + (1 - FREE) * seconds, costs
        self._began, self._first, self._steps, self._next = 0.0, 0, 0, 0

    def begin(self, done: int, steps: int) -> None:
        """Begin, or go on, with the next step of a run of `steps` steps, of which some are done."""
        self._began, self._first, self._steps = clock(), done, steps
        self._next = done + max(_FEW, (steps - done) // 4)

    def due(self, done: int) -> bool:
        """Whether to look at the pace after `done` steps; a function of steps alone, so that all processes agree."""
        return done >= self._next and done < self._steps

    def steps(self, done: int) -> int:
        """The steps that the whole run should have, after `done` steps: as now, unless that would miss the time."""
        now = clock()
        # The pace since the last look, with the pictures and checkpoints in between: the machine may have become busier.
        each = (now - self._began) / (done - self._first)
        # On a busier machine the last picture takes longer, too.
        end = self._end - self._costs.end * max(1.0, each / self._costs.step)
        steps = done + max(1, int((end - now) / max(1e-9, each)))
        return self._steps if abs(steps - self._steps) <= _CHANGE * self._steps else steps
