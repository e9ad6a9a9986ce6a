"""Reports of long waits: a process that waits long for other ranks names them and its purpose, and waits on.

torch itself reports a wait only by giving up, after a timeout. Here a thread of each rank publishes the number of its waits
every few seconds, in the store through which the ranks found each other. In a long wait the thread also reads the others'
numbers: a rank with fewer waits is the awaited one, and one that publishes nothing new may have stopped. This does not slow
the waits, which only leave a number and a time in memory.
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
"""Seconds before the first report of a wait; the next report follows after twice the time."""

# Reads of the others' status, one per interval; a rank without news in all of them may have stopped.
_LOOKS = 4
# The store ends with the other processes, and does not exist if the environment names none.
_NO_STORE = (RuntimeError, OSError, ValueError, KeyError)


class _Status(NamedTuple):
    """A rank's published status: its waits so far, whether the last goes on, its process and host, and a growing number."""

    waits: int
    waiting: bool
    pid: int
    host: str
    number: int


Look = list[_Status | None] | None
"""The status of each rank; None if the store did not answer."""


@dataclass
class _Wait:
    """A wait: its number, purpose and start, the seconds until its next report, and the reads of the others' status."""

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
    """Reports the long waits of this process for other ranks, within its block.

    Args:
        tell: called with the message, from a thread.
        patience: seconds before the first report of a wait; PATIENCE if None.
    """

    def __init__(self, tell: Callable[[str], object], patience: float | None = None) -> None:
        self._tell, self._patience = tell, PATIENCE if patience is None else patience
        self._interval = self._patience / 8
        self._rank, self._world_size, self._waits = 0, 1, 0
        self._wait: _Wait | None = None
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
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
        for thread in self._threads:
            thread.join(1.0)

    @classmethod
    def current(cls) -> "WaitReporter | None":
        """The enclosing reporter."""
        return _CURRENT.get()

    def start(self, rank: int, world_size: int) -> None:
        """Publish this rank's status from now on, and report its long waits; a second call does nothing."""
        if not self._threads:
            self._rank, self._world_size = rank, world_size
            for name, target in (("wait-report-publish", self._publish), ("wait-report", self._watch)):
                self._threads.append(threading.Thread(target=target, name=name, daemon=True))
                self._threads[-1].start()

    def begin(self, purpose: str) -> None:
        """Begin a wait, whose `purpose` completes "waits for the others"."""
        self._waits += 1
        self._wait = _Wait(self._waits, purpose, time.monotonic(), self._patience)

    def end(self, *, met: bool) -> None:
        """End the wait; `met` tells whether the exchange succeeded."""
        wait, self._wait = self._wait, None
        if met and wait is not None and wait.reported:
            self._say(f"rank {self._rank} goes on after {wait.seconds:.0f} s of waiting {wait.purpose}.")

    def _publish(self) -> None:
        # Apart from the reports: a connection to a store that has stopped never returns.
        store, number = None, 0
        while True:
            number += 1
            own = _Status(self._waits, self._wait is not None, os.getpid(), socket.gethostname(), number)
            with contextlib.suppress(*_NO_STORE):
                store = store or self._store()
                store.set(_key(self._rank), json.dumps(own))  # does not wait for an answer
            if self._ended.wait(self._interval):
                return

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
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
        """The awaited ranks, in words; none if another rank reports them."""
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
        # In its own thread, on its own connection: a read from a stopped process never returns.
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

    def _store(self) -> "dist.Store":
        place, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = timedelta(seconds=max(5.0, self._interval))
        return dist.TCPStore(place, port, timeout=timeout, wait_for_workers=False)

    def _say(self, message: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # the output is closed
            self._tell(message)


def _key(rank: int) -> str:
    return f"stablefield/rank/{rank}"


# A context variable, as for torch's own modes: a wait needs no argument for the reporter.
_CURRENT: ContextVar[WaitReporter | None] = ContextVar("stablefield_wait_reporter", default=None)
