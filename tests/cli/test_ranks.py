"""Processes of a run that wait, lose their launcher or their terminal."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from forks import Fork
from stablefield.training._run_folder import RunFolder

FLAGS = ["train", "digits", "--device", "cpu", "--steps", "1000000", "--log-every", "1", "--sample-every", "0"]
FLAGS += ["--network.width", "32", "--network.depth", "1", "--batch", "32", "--references", "64", "--noise-band", "0"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
# The command, with a minute of patience made three seconds.
PATIENT = """
from stablefield.cli.entry import program
from stablefield import _wait_report

_wait_report.PATIENCE = 3.0
program()
"""
# The command, started by a process that ends at once; as nohup has it, without an end by SIGHUP.
IN_THE_BACKGROUND = """
import os, signal

signal.signal(signal.SIGHUP, signal.SIG_IGN)
if pid := os.fork():
    print(pid, flush=True)
    os._exit(0)
from stablefield.cli.entry import program
program()
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def wait_for(found, what: str, seconds: float = 120.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.1)
    pytest.fail(f"{what} did not come")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def lines_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def begin(command: list[str], tmp_path: Path, **more: str) -> "subprocess.Popen[bytes]":
    with (tmp_path / "stdout").open("wb") as out, (tmp_path / "stderr").open("wb") as err:
        return subprocess.Popen(command, cwd=tmp_path, env=environment(**more), stdout=out, stderr=err)


def ranks_of(launcher: int) -> list[int]:
    """The processes that a launcher has started, in the order of their ranks."""
    found: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(path.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = path.joinpath("environ").read_bytes()
        except (OSError, IndexError):
            continue
        rank = re.search(rb"\0RANK=(\d+)", variables)
        if parent == launcher and rank is not None:
            found[int(rank[1])] = int(path.name)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
def test_who_is_awaited_is_told_and_ranks_save_and_end_when_their_launcher_is_killed(tmp_path: Path) -> None:
    run, said = tmp_path / "run", tmp_path / "stderr"
    program = tmp_path / "patient.py"
    program.write_text(PATIENT)
    launcher = begin([*TORCHRUN, str(program), *FLAGS, "--out", str(run)], tmp_path)
    stopped = 0
    try:
        wait_for(lambda: lines_of(run) > 3, "a step")
        ranks = ranks_of(launcher.pid)
        assert len(ranks) == 2
        before = len(said.read_text())  # the start may take as long, too
        stopped = ranks[0]
        os.kill(stopped, signal.SIGSTOP)
        wait_for(lambda: "has waited" in said.read_text()[before:], "a word", 40)
        message = said.read_text()[before:]
        found = re.search(r"stablefield: rank 1 of 2 has waited (\d+) s for the others (to [\w ]+): (.*)", message)
        assert found is not None, message
        assert 3 <= int(found[1]) <= 20
        purposes = ("to sum their gradients", "to say whether one of them is to stop", "to report their losses")
        assert found[2] in purposes
        assert f"rank 0 (process {stopped} on {os.uname().nodename}) shows no sign of life" in found[3]
        steps = lines_of(run)
        os.kill(stopped, signal.SIGCONT)
        wait_for(lambda: lines_of(run) > steps + 3, "a step after it")
        assert "rank 1 goes on after" in said.read_text()[before:]
    finally:
        if stopped and alive(stopped):
            os.kill(stopped, signal.SIGCONT)
        launcher.kill()
        launcher.wait()
    wait_for(lambda: not any(map(alive, ranks)), "their end", 40)
    newest = RunFolder(run).newest()
    assert newest is not None
    assert newest[1].step >= 4
    assert not (run / ".stablefield.lock").exists()


@pytest.mark.slow
def test_a_process_without_a_launcher_outlives_who_started_it(tmp_path: Path, fork: Callable[..., Fork]) -> None:
    run = tmp_path / "run"
    starter = fork(IN_THE_BACKGROUND, *FLAGS, "--out", run, cwd=tmp_path)
    assert starter.wait() == 0
    pid = int(starter.stdout.split()[0])
    try:
        wait_for(lambda: lines_of(run) > 3, "a step")
        os.kill(pid, signal.SIGHUP)  # ignored, as nohup has it
        steps = lines_of(run)
        time.sleep(1.5)
        wait_for(lambda: lines_of(run) > steps + 3, "a step after it")
        assert alive(pid)
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not alive(pid), "its end")
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    assert RunFolder(run).newest() is not None


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_is_saved(tmp_path: Path) -> None:
    run = tmp_path / "run"
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
        os.execvpe(sys.executable, [sys.executable, "-m", "stablefield", *FLAGS, "--out", str(run)], environment())
    try:
        os.set_blocking(terminal, False)

        def stepping() -> bool:
            try:
                while os.read(terminal, 65536):
                    pass
            except OSError:
                pass
            return lines_of(run) > 3

        wait_for(stepping, "a step")
        os.close(terminal)
        wait_for(lambda: not alive(pid), "its end", 60)
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 129
    newest = RunFolder(run).newest()
    assert newest is not None
    assert newest[1].step >= 4


def test_sighup_is_a_wish_to_stop_unless_it_is_ignored() -> None:
    from stablefield.cli.interruption import Interruption

    found = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGHUP)
            assert interruption.requested
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGHUP)
            assert not interruption.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, found)
