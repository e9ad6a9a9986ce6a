"""A watch over waiting: a process that waits long for other ranks says for whom and for what, and goes on waiting.

Every few seconds each rank tells the store, through which the ranks once found each other, how many waits it has come to. A
rank that has come to fewer than the one that waits is awaited, and so is one that no longer tells anything, as a stopped
process does not. The steps themselves are not slowed: they leave a number and a time in memory.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar, Token
from datetime import timedelta
from types import TracebackType
from typing import NamedTuple, Self

import torch.distributed as dist

__all__ = ["Watch"]

PATIENCE = 60.0
"""Seconds of waiting after which it is told, and again after twice the time."""


class _Sign(NamedTuple):
    """What a rank has told of itself.

    Attributes:
        waits: how many waits it has come to.
        waiting: whether it is in the last of them.
        pid: its process.
        host: its machine.
        heard: when that was last new, by this process's clock.
    """

    waits: int
    waiting: bool
    pid: int
    host: str
    heard: float


class Watch:
    """Within its block, this process's long waits for other ranks are told.

    Args:
        tell: takes the message.
        patience: seconds of waiting after which it is told; PATIENCE if None.
    """

    def __init__(self, tell: Callable[[str], object], patience: float | None = None) -> None:
        self._tell, self._patience = tell, PATIENCE if patience is None else patience
        self._beat = self._patience / 8
        self._waits = 0
        # The present wait: its purpose, its beginning, and after how many seconds of it something is said.
        self._purpose: str | None = None
        self._began, self._due, self._told = 0.0, self._patience, False
        self._signs: dict[int, _Sign] = {}
        self._texts: dict[int, bytes] = {}
        self._answered = 0.0
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self._token: Token[Watch | None] | None = None

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
    def current(cls) -> "Watch | None":
        """The watch in whose block this is."""
        return _CURRENT.get()

    def begin(self, purpose: str) -> None:
        """A wait begins, whose `purpose` completes "waits for the others"."""
        if not self._threads and dist.is_initialized():
            self._start()
        self._waits += 1
        self._began, self._due, self._told = time.monotonic(), self._patience, False
        self._purpose = purpose

    def end(self, *, met: bool) -> None:
        """The wait is over, and the others were met or have failed."""
        purpose, self._purpose = self._purpose, None
        if met and self._told:
            self._say(f"rank {self._rank} goes on after {time.monotonic() - self._began:.0f} s of waiting {purpose}.")

    def _start(self) -> None:
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._answered = time.monotonic()
        # Two, for the store may not answer either: where rank 0 keeps it, it stops with rank 0.
        for target in (self._exchange, self._observe):
            self._threads.append(threading.Thread(target=target, name="rank-watch", daemon=True))
            self._threads[-1].start()

    def _exchange(self) -> None:
        """Tell the store of this rank, and in a long wait read what the others have told."""
        with contextlib.suppress(RuntimeError, OSError, ValueError):  # the store is gone, and the ranks are ending
            # A connection of its own: on the shared one, whoever waits keeps the others out.
            store = dist.distributed_c10d._get_default_store().clone()  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
            store.set_timeout(timedelta(seconds=max(5.0, 2 * self._beat)))
            names = [f"stablefield/watch/{rank}" for rank in range(self._size)]
            number = 0
            while not self._ended.is_set():
                number += 1
                own = [self._waits, self._purpose is not None, os.getpid(), socket.gethostname(), number]
                store.set(names[self._rank], json.dumps(own))
                if self._purpose is not None and time.monotonic() - self._began > 2 * self._beat:
                    for rank, name in enumerate(names):
                        if rank != self._rank and store.check([name]):
                            self._hear(rank, store.get(name))
                self._answered = time.monotonic()
                self._ended.wait(self._beat)

    def _hear(self, rank: int, text: bytes) -> None:
        if self._texts.get(rank) != text:
            self._texts[rank] = text
            waits, waiting, pid, host, _ = json.loads(text)
            self._signs[rank] = _Sign(waits, waiting, pid, host, time.monotonic())

    def _observe(self) -> None:
        """Say so when a wait takes long."""
        tick, last = min(1.0, self._beat), time.monotonic()
        while not self._ended.wait(tick):
            now = time.monotonic()
            if now - last > 5 * tick:  # this process itself stood still: what it knows of the others is old
                self._began = self._answered = now
                self._signs, self._texts = {}, {}
            last = now
            waits, purpose, seconds = self._waits, self._purpose, now - self._began
            if purpose is None or seconds < self._due:
                continue
            awaited = self._awaited(waits)
            if waits != self._waits or self._purpose is None:  # it has ended meanwhile
                continue
            self._due = 2 * seconds
            if awaited is not None:
                self._told = True
                self._say(
                    f"rank {self._rank} of {self._size} has waited {seconds:.0f} s for the others {purpose}: "
                    f"{', and '.join(awaited)}. It goes on waiting."
                )

    def _awaited(self, waits: int) -> list[str] | None:
        """Who is awaited; None if another rank is to say so."""
        now = time.monotonic()
        if now - self._answered > 3 * self._beat:
            return [
                "whom, is not known, since the process that keeps the store (rank 0, or the launcher) does not answer"
            ]
        found: list[str] = []
        for rank in range(self._size):
            sign = self._signs.get(rank)
            if rank == self._rank:
                continue
            silent = sign is None or now - sign.heard > 2.5 * self._beat
            if silent or sign is None:
                who = "" if sign is None else f" (process {sign.pid} on {sign.host})"
                found.append(f"rank {rank}{who} shows no sign of life, and may be stopped")
            elif sign.waits < waits:
                found.append(f"rank {rank} (process {sign.pid} on {sign.host}) lives, and has not come that far")
            elif rank < self._rank and sign.waits == waits and sign.waiting:
                return None  # that one says it
        return found or ["all live and have come that far, so what they send may be lost"]

    def _say(self, message: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody can read it any more
            self._tell(message)


# What a block is watched by, as what it is computed with is in torch's own modes.
_CURRENT: ContextVar[Watch | None] = ContextVar("stablefield_watch", default=None)
