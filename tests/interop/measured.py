"""Reading files one by one, each in a process of its own, and what that took: run as a program by the tests.

The process has imported what reading needs and forks for each file, so that a file's peak of memory is its own and not that
of torch, and none can take the test's process with it.

    python measured.py LIMIT_SECONDS FILE...    one line of JSON a file
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forks import Server

# Beyond what any file may take: a fault ends the child, not the machine.
_ADDRESSES = 4 * 2**30


@dataclass(frozen=True)
class Reading:
    """What reading one file took.

    Attributes:
        said: "read", or the error's class and message, or how the process ended.
        seconds: of processor time.
    """

    said: str
    seconds: float
    peak: int


def measure(server: "Server", paths: Sequence[Path], limit: int = 20) -> dict[Path, Reading]:
    """Read files by `read_published` in processes of their own."""
    done = server.start_file(Path(__file__), [str(limit), *map(str, paths)])
    assert done.wait(60 + limit * len(paths)) == 0, done.stderr[-2000:]
    return {path: Reading(*json.loads(line)) for path, line in zip(paths, done.stdout.splitlines(), strict=True)}


def _read(path: Path) -> str:
    from stablefield.interop._published import read_published

    try:
        read_published(path, "edm").denoiser()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "read"


def _measured(path: Path, limit: int) -> tuple[str, float, int]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (2 * _ADDRESSES, 2 * _ADDRESSES))
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
        signal.alarm(3 * limit)
        before = _resident()
        os.write(writing, f"{before} ".encode())
        os.write(writing, _read(path).encode()[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        before, said = pipe.read().decode(errors="replace").split(" ", 1)
    _, status, used = os.wait4(child, 0)
    if status:
        said = f"ended by signal {status & 127}"
    return said, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 - int(before)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _main() -> None:
    limit, *paths = sys.argv[1:]
    import safetensors.torch  # noqa: F401
    import torch

    import stablefield.interop._published  # noqa: F401

    torch.randn(8, 8) @ torch.randn(8, 8)
    for path in paths:
        sys.stdout.write(json.dumps(_measured(Path(path), int(limit))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
