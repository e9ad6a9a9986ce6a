"""Ctrl-C and SIGTERM as a wish to stop in order: the step that is under way is finished first."""

import signal
from types import FrameType, TracebackType
from typing import Self

__all__ = ["Interruption"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Within its block, a signal sets `requested`; a second Ctrl-C acts as it always does.

    A second SIGTERM is the same wish: where a manager signals a whole group, a launcher passes it on to its processes, and
    each of them gets two.

    Attributes:
        requested: whether somebody wants to stop.
    """

    def __init__(self) -> None:
        self.requested = False
        self._found = {number: signal.getsignal(number) for number in _SIGNALS}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._found[signal.SIGINT])

    def _restore(self) -> None:
        for number, handler in self._found.items():
            signal.signal(number, handler)
