"""Processes of their own for tests, forked from one that has imported torch and the library, which takes a process seconds.

A fork has its own environment, folder, standard streams, signals and exit status, and ends after its threads and what was
registered for its end. It does not show how the command starts, nor how an interpreter is torn down: tests of imports,
of torchrun, of a terminal and of an interpreter's end start a new one.
"""

import atexit
import gc
import io
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COMMAND = "from stablefield.cli.entry import program; program()"
"""What `python -m stablefield` runs."""
FILE = """
import os, runpy, sys

del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def group_of(count: int) -> list[dict[str, str]]:
    """The environments that torchrun gives the processes of a group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**group, "RANK": rank, "LOCAL_RANK": rank} for rank in map(str, range(count))]


class Fork:
    """A process, with the part of `subprocess.Popen` that tests use; its output is text and complete once it has ended."""

    def __init__(self, server: "Server", pid: int, folder: Path) -> None:
        self.pid, self.returncode = pid, None
        self._server, self._folder = server, folder

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        if self.returncode is None:
            self.returncode = self._server.status(self.pid)
        return self.returncode

    def wait(self, timeout: float = 120.0) -> int:
        """Wait for its end, and return its exit status; after `timeout` seconds kill it and raise TimeoutError."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"process {self.pid} has run for {timeout} s: {self.stderr[-2000:]}")
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float = 120.0) -> tuple[str, str]:
        """Wait for its end, and return what it has written to standard output and to standard error."""
        self.wait(timeout)
        return self.stdout, self.stderr

    def kill(self) -> None:
        """Kill it, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    @property
    def stdout(self) -> str:
        """What it has written to standard output so far."""
        return (self._folder / "stdout").read_text("utf-8")

    @property
    def stderr(self) -> str:
        """What it has written to standard error so far."""
        return (self._folder / "stderr").read_text("utf-8")


class Server:
    """The process that forks them; one for each process of tests, started when it is first needed."""

    def __init__(self) -> None:
        self._place = tempfile.TemporaryDirectory(prefix="forks-")
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            bufsize=0,
        )
        self._ended: dict[int, int] = {}
        self._number = 0
        self._rest = b""

    def start(self, code: str, arguments: Sequence[str], cwd: Path | None, environment: Mapping[str, str]) -> Fork:
        """Fork a process that runs `code` with `arguments`."""
        self._number += 1
        folder = Path(self._place.name, str(self._number))
        folder.mkdir()
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        job = {
            "code": code,
            "arguments": list(arguments),
            "cwd": str(cwd or Path.cwd()),
            "environment": {**os.environ, "OMP_NUM_THREADS": "1", **environment},
            "folder": str(folder),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        while True:
            for message in self._messages(60.0):
                if "began" in message:
                    return Fork(self, message["began"], folder)

    def start_file(self, path: Path, arguments: Sequence[str]) -> Fork:
        """Fork a process that runs a file of Python with `arguments`, as `python FILE ARGUMENTS` does."""
        return self.start(FILE, [str(path), *arguments], None, {})

    def status(self, pid: int) -> int | None:
        """The exit status of a process that has ended."""
        self._messages(0.0)
        return self._ended.get(pid)

    def close(self) -> None:
        """End the server."""
        self._process.kill()
        self._process.communicate()
        self._place.cleanup()

    def _messages(self, seconds: float) -> list[dict[str, Any]]:
        """What the server has said, waiting for up to `seconds`; who has ended is noted."""
        assert self._process.stdout is not None
        found = list[dict[str, Any]]()
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while selector.select(0.0 if found else seconds):
                data = os.read(self._process.stdout.fileno(), 2**16)
                if not data:
                    raise RuntimeError("the process that forks others has died")
                *lines, self._rest = (self._rest + data).split(b"\n")
                found += map(json.loads, lines)
                seconds = 0.0
        for message in found:
            if "ended" in message:
                self._ended[message["ended"]] = message["status"]
        return found


def serve() -> dict[str, Any] | None:
    """Fork a process for each job; return the job in the fork, and None at the end."""
    sys.stdin = open(os.devnull)  # noqa: SIM115
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    rest, running = b"", 0
    while True:
        # Polled: a thread that waits for them would be lost in the forks, with whatever it holds.
        for _ in selector.select(0.02 if running else None):
            data = os.read(0, 2**20)
            if not data:
                return None
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                pid = os.fork()
                if pid == 0:
                    selector.close()
                    return json.loads(line)
                running += 1
                say({"began": pid})
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            running -= 1
            say({"ended": pid, "status": os.waitstatus_to_exitcode(status)})


def say(message: dict[str, int]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def prepare(job: dict[str, Any]) -> None:
    """Make this fork a process like any other."""
    import torch

    from stablefield.cli.console import console

    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(job["folder"], name), os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
    sys.argv = ["-c", *job["arguments"]]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # Decided when it is imported, which was before this process had a rank.
    console.quiet = os.environ.get("RANK", "0") != "0"


def run(code: str) -> int:
    """Run it as `python -c` does; its exit status."""
    try:
        exec(compile(code, "<fork>", "exec"), {"__name__": "__main__"})
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        sys.stderr.write(f"{ended.code}\n")
        return 1
    except Exception:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def end(status: int) -> None:
    """End the process in order, but for what Python does to free its memory, which would first copy all of it: a second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    # Which torch imports when a network or an optimizer is made, and takes longer for than most forks for the rest.
    import torch._dynamo  # noqa: F401

    import stablefield.cli.verbs  # noqa: F401
    from pictures import draw_small_pictures

    draw_small_pictures()
    # What is there now is never collected: to look for it would copy most of a fork's memory.
    gc.freeze()
    found = serve()
    if found is not None:
        prepare(found)
        end(run(found["code"]))
