"""The lock of a run folder: one process at a time trains in it.

The lock is the kernel's (flock), so it disappears with its process, however that ends. The file names the holder. A file
system shared between machines may keep each machine's locks local, so the holder also writes a new count into the file every
10 seconds. The end of a process on another machine is invisible here, so its lock is taken over when the count has not
changed for a minute.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

__all__ = ["Holder", "Lock"]

BEAT = 10.0
"""Seconds between signs of life."""
PATIENCE = 60.0
"""Seconds without one after which a process on another machine counts as dead."""
_POLL = 0.5
_LONGEST = 4096


@dataclass(frozen=True)
class Holder:
    """The holder of a lock.

    Attributes:
        pid: the process.
        host: the machine's name.
        boot: identifies the machine's running kernel, which containers with different names share; "" if unknown.
        since: when it took the lock, UTC.
    """

    pid: int
    host: str
    boot: str
    since: str

    @classmethod
    def here(cls) -> "Holder":
        """This process, from now on."""
        boot = ""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(os.getpid(), socket.gethostname(), boot, datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"))

    def near(self, other: "Holder") -> bool:
        """Whether both are, or were, on the same machine, whose kernel knows the locks of both."""
        return self.host == other.host or (self.boot == other.boot and bool(self.boot))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class Lock:
    """The lock of the file `path`; the file exists while a process holds the lock, and after a kill.

    Args:
        path: the file.
        beat: seconds between signs of life.
        patience: seconds without one after which a holder on another machine counts as dead.
    """

    def __init__(self, path: Path, beat: float = BEAT, patience: float = PATIENCE) -> None:
        self._path, self._beat, self._patience = path, beat, patience
        self._me = Holder.here()
        self._descriptor: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name="run-lock", daemon=True)
        self._successor: Holder | None = None

    def acquire(self, tell: Callable[[str], None] | None = None) -> None:
        """Take the lock at once or fail; wait only if the last holder was on another machine.

        Args:
            tell: called with the reason for a wait.

        Raises:
            ValueError: naming the holder.
            OSError: if the file cannot be made.
        """
        while not self._attempt(tell):
            pass
        self._thread.start()

    def require_free(self) -> None:
        """Check that no process holds the lock, without taking it, and without waiting.

        Raises:
            ValueError: naming the holder.
        """
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return  # the file does not exist or is not readable: `acquire` finds out
        try:
            found = os.fstat(descriptor)
            holder = _holder(os.pread(descriptor, _LONGEST, 0)) if stat.S_ISREG(found.st_mode) else None
            if holder is None:
                return
            free = _flock(descriptor, fcntl.LOCK_SH)
            if free and holder.near(self._me):
                return
            if free is False or time.time() - found.st_mtime < self._patience:
                raise self._refusal(holder)
        finally:
            os.close(descriptor)

    def release(self) -> None:
        """Release the lock."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if _is_at(descriptor, self._path):
                self._path.unlink()
        os.close(descriptor)

    @property
    def successor(self) -> Holder | None:
        """The process that took the lock over, as may happen while this one is stopped for a minute; None if none did."""
        return self._successor

    def _attempt(self, tell: Callable[[str], None] | None) -> bool:
        """Try to take the lock; on False the file has changed, and the next attempt may succeed."""
        descriptor = _open(self._path)
        try:
            ours = _flock(descriptor)
            if not _is_at(descriptor, self._path):
                return False
            text = os.pread(descriptor, _LONGEST, 0)
            holder = _holder(text)
            if ours is False and holder is None:  # it is about to write its name
                time.sleep(_POLL)
                text = os.pread(descriptor, _LONGEST, 0)
                holder = _holder(text)
            if ours is False and (holder is None or holder.near(self._me)):
                raise self._refusal(holder)
            if holder is not None and not (ours and holder.near(self._me)):
                if not self._outlived(text, holder, ours, tell):
                    return False
                if ours is False:
                    # A dead process on another machine holds it: leave it that file, and make a new one.
                    if _is_at(descriptor, self._path):
                        self._path.unlink()
                    return False
            self._take(descriptor)
            descriptor = -1
            return True
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _outlived(self, text: bytes, holder: Holder, ours: bool | None, tell: Callable[[str], None] | None) -> bool:
        """Whether the file stays unchanged for as long as a living holder would take to write to it."""
        # Other processes may wait too: the one with this machine's lock is the first to write.
        patience = self._patience if ours else 1.25 * self._patience + 2 * _POLL
        if tell is not None:
            tell(f"{self._path.parent} was locked by {holder}: waiting up to {patience:.0f} s for a sign of life.")
        until = time.monotonic() + patience
        while time.monotonic() < until:
            time.sleep(min(_POLL, self._beat))
            try:
                found = self._path.read_bytes()
            except FileNotFoundError:
                return False
            if found != text:
                now = _holder(found)
                if now is not None:
                    raise self._refusal(now)
                return False
        return True

    def _refusal(self, holder: Holder | None) -> ValueError:
        who = "another process" if holder is None else str(holder)
        stop = "" if holder is None or not holder.near(self._me) else f" (kill {holder.pid})"
        return ValueError(
            f"{self._path.parent} is being trained by {who}: wait until that has ended, or stop it{stop}, then resume "
            "the run."
        )

    def _take(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._write(descriptor, 0)
        if _flock(descriptor) is None:  # no locks on this file system: the last writer has it
            time.sleep(_POLL)
            if _holder(os.pread(descriptor, _LONGEST, 0)) != self._me:
                self._descriptor = None
                raise self._refusal(_holder(os.pread(descriptor, _LONGEST, 0)))

    def _write(self, descriptor: int, count: int) -> None:
        text = json.dumps({**asdict(self._me), "signs_of_life": count}).encode() + b"\n"
        os.pwrite(descriptor, text, 0)
        os.ftruncate(descriptor, len(text))

    def _live(self) -> None:
        count = 0
        while not self._ended.wait(self._beat):
            descriptor = self._descriptor
            if descriptor is None:
                return
            count += 1
            # Writing the run will report a full disk, or a server that does not answer.
            with contextlib.suppress(OSError):
                found = _holder(self._path.read_bytes())
                if found is not None and found != self._me:
                    self._successor = found
                    return
                self._write(descriptor, count)


def _open(path: Path) -> int:
    # Without O_NONBLOCK, opening a FIFO could wait.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a regular file: remove it.")
    return descriptor


def _flock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool | None:
    """Whether the kernel granted its lock; None if the file system has no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            return None
        raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    own = os.fstat(descriptor)
    return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)


def _holder(text: bytes) -> Holder | None:
    """The writer of a lock's file; None if the file does not name one."""
    try:
        record: Any = json.loads(text)
        entries = {name: record[name] for name in ("pid", "host", "boot", "since")}
        pid = entries.pop("pid")
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(pid, int) or not all(isinstance(value, str) for value in entries.values()):
        return None
    return Holder(pid, **cast("dict[str, str]", entries))
