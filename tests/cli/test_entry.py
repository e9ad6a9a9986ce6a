"""The end of a program: with its status, after what was registered for its end, and without an abort of one of several."""

import json
import os
import runpy
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from stablefield.cli import entry, verbs

linux = pytest.mark.skipif(sys.platform != "linux", reason="forks, with gloo on the interface lo")

# One import for all pairs of processes of all cases: each pair is forked. What they run is a verb that talks to the other
# and, as torch does where it compiles, keeps the group alive. Threads that wait for the interpreter wait long, so that one
# that is torn down around them aborts in about a quarter of the pairs.
PAIRS = """
import atexit, json, os, sys, threading, time
from pathlib import Path
import torch
import torch.distributed as dist
from stablefield.cli import entry, verbs

torch.set_num_threads(1)
keep = []

def write_late(path):
    time.sleep(0.2)
    path.write_text("in a group" if dist.is_initialized() else "alone")

class Verb:
    def __init__(self, status):
        self.status = status

    def run(self):
        for _ in range(3):
            dist.all_reduce(torch.ones(3))
        if self.status == 1:
            raise OSError("the disk is gone")
        if self.status == 3:
            raise SystemExit("words")
        return self.status

def start(folder, pair, rank, size, status):
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    sys.setswitchinterval(10)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{pair}", rank=rank, world_size=size)
    keep.append(dist.group.WORLD)
    atexit.register(lambda: (folder / f"end-{pair}-{rank}").write_text(str(dist.is_initialized())))
    threading.Thread(target=write_late, args=(folder / f"thread-{pair}-{rank}",)).start()
    verbs.parse = lambda arguments: Verb(status)
    sys.argv = ["stablefield", "doctor"]
    entry.program()

for name, (pairs, size, status) in json.loads(sys.argv[2]).items():
    folder, codes = Path(sys.argv[1], name), set()
    folder.mkdir()
    for pair in range(pairs):
        children = [start(folder, pair, rank, size, status) for rank in range(size)]
        codes |= {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
    (folder / "codes").write_text(str(sorted(codes)))
"""
# Pairs, processes in each, and what each is to end with.
CASES = {"twelve pairs": (12, 2, 0), "four alone": (4, 1, 0), "an error": (2, 2, 1), "words": (2, 2, 3)}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each case, in which its processes have left what they said and did."""
    folder = tmp_path_factory.mktemp("ends")
    done = subprocess.run(
        [sys.executable, "-c", PAIRS, str(folder), json.dumps(CASES)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


@linux
@pytest.mark.slow
@pytest.mark.parametrize("name", ["twelve pairs", "four alone"])
def test_processes_that_succeed_end_without_an_abort_and_after_all_that_they_have_begun(ends: Path, name: str) -> None:
    pairs, size, _ = CASES[name]
    folder = ends / name
    assert (folder / "codes").read_text() == "[0]"
    assert "terminate" not in (folder / "stderr").read_text()
    assert [path.read_text() for path in folder.glob("end-*")] == ["False"] * (pairs * size)
    assert len(list(folder.glob("thread-*"))) == pairs * size


@linux
@pytest.mark.slow
@pytest.mark.parametrize(("name", "words"), [("an error", "the disk is gone"), ("words", "words")])
def test_processes_that_fail_end_with_their_message_and_status(ends: Path, name: str, words: str) -> None:
    folder = ends / name
    assert (folder / "codes").read_text() == "[1]"
    assert (folder / "stderr").read_text() == f"stablefield: {words}\n" * 4
    assert len(list(folder.glob("end-*"))) == len(list(folder.glob("thread-*"))) == 4


class Ended(BaseException):
    """In place of the end of the process."""


class Stream:
    """Keeps what is written, one entry for each write; full if told so."""

    def __init__(self, full: bool = False) -> None:
        self.full, self.writes = full, list[str]()

    def write(self, text: str) -> int:
        self.writes.append(text)
        return len(text)

    def flush(self) -> None:
        if self.full:
            raise OSError("no space left")


@pytest.fixture
def end(monkeypatch: pytest.MonkeyPatch):
    """Run the end of a process of several; its status."""

    def status_after(
        status: int, *, at_exit=lambda: None, out: Stream | None = None, error: Stream | None = None
    ) -> int:
        with monkeypatch.context() as patch:

            def leave(status: int) -> None:
                raise Ended(status)

            patch.setattr(os, "_exit", leave)
            patch.setattr("atexit._run_exitfuncs", at_exit)
            patch.setattr("threading._shutdown", lambda: None)
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", error)
            with pytest.raises(Ended) as ended:
                entry._end(status)
        return ended.value.args[0]

    return status_after


def raised(error: BaseException):
    def function(*_: object) -> None:
        raise error

    return function


def test_a_process_ends_also_where_it_cannot_end_in_order(end) -> None:
    assert end(0) == 0  # with closed streams
    assert end(0, out=Stream(full=True)) == 120
    assert end(2, out=Stream(full=True)) == 2
    error = Stream()
    assert end(0, at_exit=raised(RuntimeError("a tracker is gone")), error=error) == 1
    assert error.writes == ["stablefield: at its end: RuntimeError: a tracker is gone\n"]
    assert end(0, at_exit=raised(KeyboardInterrupt())) == 130


def test_a_message_is_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    error = Stream()
    monkeypatch.setattr(sys, "stderr", error)
    monkeypatch.setattr(verbs, "parse", raised(OSError("the disk\nis gone")))
    with pytest.raises(SystemExit, match="1"):
        entry.main(["doctor"])
    assert error.writes == ["stablefield: the disk\nis gone\n"]


def test_the_command_and_the_module_are_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = entry_points(group="console_scripts", name="stablefield")
    assert command.value == "stablefield.cli.entry:program"
    called = []
    monkeypatch.setattr(entry, "program", lambda: called.append(True))
    runpy.run_module("stablefield", run_name="__main__")
    assert called == [True]


def test_a_process_alone_ends_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(entry, "main", raised(SystemExit(2)))
    with pytest.raises(SystemExit, match="2"):
        entry.program()
