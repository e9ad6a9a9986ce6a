"""What ends a run in order: Ctrl-C, SIGTERM and SIGHUP as a wish to stop, and the end of the launcher that started it."""

import contextlib
import os
import signal
import stat
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Self

__all__ = ["Interruption", "end_with_launcher"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

GRACE = 60.0
"""Seconds that a process has to save its run once its launcher is gone."""


class Interruption:
    """Within its block, a signal sets `requested`: the step that is under way is finished first.

    A second Ctrl-C acts as it always does. A second SIGTERM is the same wish: where a manager signals a whole group, a
    launcher passes it on to its processes, and each of them gets two. SIGHUP, the end of the terminal, is the same wish
    unless it is ignored, as under nohup.

    Attributes:
        requested: whether somebody wants to stop.
        status: the exit status of who stops for it, 128 and the signal's number as a shell has it; 0 if nobody wants it.
    """

    def __init__(self) -> None:
        self.requested = False
        self.status = 0
        self._found = {number: signal.getsignal(number) for number in _SIGNALS}
        if self._found[signal.SIGHUP] == signal.SIG_IGN:
            del self._found[signal.SIGHUP]

    def __enter__(self) -> Self:
        for number in self._found:
            signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.requested = True
        self.status = self.status or 128 + number
        if number == signal.SIGHUP:
            _fall_silent()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._found[signal.SIGINT])

    def _restore(self) -> None:
        for number, handler in self._found.items():
            signal.signal(number, handler)


def _fall_silent() -> None:
    from stablefield.cli.console import console  # here, since a process that only ends with its launcher needs none

    with contextlib.suppress(OSError, ValueError, AttributeError):  # there may be no standard output at all
        descriptor = sys.stdout.fileno()
        if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
            console.quiet = True  # its terminal is gone, and writing to it would fail


def end_with_launcher() -> None:
    """Let this process end when the launcher that started it has ended, as by a kill: it would train on for nobody.

    It asks itself to stop by SIGTERM, and ends for good if it has not stopped after `GRACE` seconds. A process that no
    launcher started outlives whoever started it, as under nohup.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # set by torchrun and by what is built on it, as `accelerate launch`
        threading.Thread(target=_follow, args=(os.getppid(),), name="launcher-watch", daemon=True).start()


def _follow(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(0.5)
    with contextlib.suppress(OSError, ValueError):  # its output may have gone with the launcher
        sys.stderr.write("stablefield: the launcher of this process has ended, and so does the process.\n")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)
