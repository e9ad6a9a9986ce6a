"""Reports of long waits: a process that waits long for other ranks says for which of them and for what, and waits on.

torch itself reports a wait only by giving it up, after a timeout. Here a thread of each rank publishes every few seconds, in
the store through which the ranks once found each other, how many waits the rank has come to. In a long wait the thread also
reads what the others publish: a rank that has come to fewer waits is awaited, and one that publishes nothing new may be
stopped. The waits themselves are not slowed: they leave a number and a time in memory.
"""

import contextlib
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import NamedTuple, Self

import torch.distributed as dist

__all__ = ["WaitReporter"]

PATIENCE = 60.0
"""Seconds after which a wait is reported; it is reported again when it has become twice as long."""

# Looks at what the others publish, one an interval; a rank that publishes nothing new in all of them may be stopped.
_LOOKS = 4
# The store is gone when the others have ended, and there is none if the environment names none.
_NO_STORE = (RuntimeError, OSError, ValueError, KeyError)


class _Status(NamedTuple):
    """What a rank publishes: its waits so far, whether it is in the last, where it runs, and a number that grows."""

    waits: int
    waiting: bool
    pid: int
    host: str
    number: int


Look = list[_Status | None] | None
"""What each rank has published; None if the store did not answer."""


@dataclass
class _Wait:
    """A wait: its number, its purpose, when it began, after how many seconds it is due for a report, and looks so far."""

    number: int
    purpose: str
    began: float
    due: float
    reported: bool = False
    looks: list[Look] = field(default_factory=list[Look])

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


class WaitReporter:
    """Within its block, the long waits of this process for other ranks are reported.

    Args:
        tell: takes the message; a thread calls it.
        patience: seconds after which a wait is reported; PATIENCE if None.
    """

    def __init__(self, tell: Callable[[str], object], patience: float | None = None) -> None:
        self._tell, self._patience = tell, PATIENCE if patience is None else patience
        self._interval = self._patience / 8
        self._rank, self._world_size, self._waits = 0, 1, 0
        self._wait: _Wait | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._token: Token[WaitReporter | None] | None = None

    def __enter__(self) -> Self:
        self._token = _CURRENT.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            _CURRENT.reset(self._token)
        self._ended.set()
        if self._thread is not None:
            self._thread.join(1.0)

    @classmethod
    def current(cls) -> "WaitReporter | None":
        """The reporter in whose block this is."""
        return _CURRENT.get()

    def start(self, rank: int, world_size: int) -> None:
        """Publish from now on that this rank is alive, and report its long waits; a second call does nothing."""
        if self._thread is None:
            self._rank, self._world_size = rank, world_size
            self._thread = threading.Thread(target=self._run, name="wait-report", daemon=True)
            self._thread.start()

    def begin(self, purpose: str) -> None:
        """A wait begins, whose `purpose` completes "waits for the others"."""
        self._waits += 1
        self._wait = _Wait(self._waits, purpose, time.monotonic(), self._patience)

    def end(self, *, met: bool) -> None:
        """The wait is over, and the others were met or have failed."""
        wait, self._wait = self._wait, None
        if met and wait is not None and wait.reported:
            self._say(f"rank {self._rank} goes on after {wait.seconds:.0f} s of waiting {wait.purpose}.")

    def _run(self) -> None:
        store, number = None, 0
        while True:
            number += 1
            own = _Status(self._waits, self._wait is not None, os.getpid(), socket.gethostname(), number)
            with contextlib.suppress(*_NO_STORE):
                store = store or self._store()
                store.set(_key(self._rank), json.dumps(own))  # does not wait for an answer
            if self._ended.wait(self._interval):
                return
            wait = self._wait
            if wait is not None and wait.seconds > wait.due - _LOOKS * self._interval:
                wait.looks.append(self._look())
                enough = wait.looks[-1] is None or len(wait.looks) >= _LOOKS
                if enough and wait.seconds >= wait.due:
                    self._report(wait)

    def _report(self, wait: _Wait) -> None:
        seconds, awaited = wait.seconds, self._awaited(wait)
        wait.due, wait.looks = 2 * seconds, []
        if awaited and self._wait is wait:
            wait.reported = True
            self._say(
                f"rank {self._rank} of {self._world_size} has waited {seconds:.0f} s for the others {wait.purpose}: "
                f"{', and '.join(awaited)}. It goes on waiting."
            )

    def _awaited(self, wait: _Wait) -> list[str]:
        """Which ranks are awaited, in words; none if another rank is to report it."""
        before, now = wait.looks[-_LOOKS:][0], wait.looks[-1]
        if before is None or now is None:
            return ["which of them is unknown, since the store (kept by rank 0 or the launcher) does not answer"]
        found: list[str] = []
        for rank, (old, new) in enumerate(zip(before, now, strict=True)):
            if rank == self._rank:
                continue
            name = f"rank {rank}" if new is None else f"rank {rank} (process {new.pid} on {new.host})"
            if new is None or new == old:
                found.append(f"{name} shows no sign of life, and may be stopped")
            elif new.waits < wait.number:
                found.append(f"{name} is running, and has not got there yet")
            elif rank < self._rank and new.waits == wait.number and new.waiting:
                return []
        return found or ["all are running and have got there, so what they send may be lost"]

    def _look(self) -> Look:
        # In a thread and on a connection of its own: a read from a process that is stopped never returns.
        answer: queue.SimpleQueue[Look] = queue.SimpleQueue()

        def read() -> None:
            with contextlib.suppress(*_NO_STORE):
                store = self._store()
                keys = [_key(rank) for rank in range(self._world_size)]
                texts = [store.get(key) if store.check([key]) else None for key in keys]
                answer.put([None if text is None else _Status(*json.loads(text)) for text in texts])

        threading.Thread(target=read, name="wait-report-look", daemon=True).start()
        with contextlib.suppress(queue.Empty):
            return answer.get(timeout=max(1.0, self._interval))
        return None

    def _store(self) -> "dist.Store":  # pyright: ignore[reportPrivateImportUsage]
        place, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = timedelta(seconds=max(5.0, self._interval))
        return dist.TCPStore(place, port, timeout=timeout, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]

    def _say(self, message: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody can read it any more
            self._tell(message)


def _key(rank: int) -> str:
    return f"stablefield/rank/{rank}"


# A variable of the context, as torch's own modes are: a wait needs no argument for the reporter.
_CURRENT: ContextVar[WaitReporter | None] = ContextVar("stablefield_wait_reporter", default=None)
