"""Orderly ends of a run: Ctrl-C, SIGTERM and SIGHUP request a stop; so does the end of its launcher."""

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
"""Seconds for a process to save its run after its launcher has ended."""


class Interruption:
    """Within its block, a signal sets `requested`, and the run finishes its current step before it stops.

    A second Ctrl-C interrupts as usual. A second SIGTERM changes nothing: if a manager signals a whole process group, the
    launcher passes the signal on, and each process gets two. SIGHUP, the end of the terminal, also requests a stop, unless
    the process ignores it, as under nohup.

    Attributes:
        requested: whether a signal requested a stop.
        status: the exit status for that signal, 128 plus its number as in shells; 0 if there was none.
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
    from stablefield.cli.console import console  # here, since a process that only watches its launcher needs no console

    with contextlib.suppress(OSError, ValueError, AttributeError):  # there may be no standard output at all
        descriptor = sys.stdout.fileno()
        if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
            console.quiet = True  # its terminal is gone, so writing would fail


def end_with_launcher() -> None:
    """End this process when its launcher ends, as by a kill; otherwise it would train on unattended.

    It sends itself SIGTERM, and exits at once if it still runs after `GRACE` seconds. A process without a launcher outlives
    its parent, as under nohup.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # set by torchrun, and by launchers built on it such as `accelerate launch`
        threading.Thread(target=_follow, args=(os.getppid(),), name="launcher-watch", daemon=True).start()


def _follow(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(0.5)
    with contextlib.suppress(OSError, ValueError):  # its output may have gone with the launcher
        sys.stderr.write("stablefield: the launcher of this process has ended, so the process ends, too.\n")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)
