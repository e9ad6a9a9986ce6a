"""One process at a time trains in a run folder, and a folder that was never finished can be begun again."""

import dataclasses
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_interruptions import SMALL, go, start

from forks import Fork
from stablefield.data._digits import open_digits
from stablefield.training._lock import Holder, Lock
from stablefield.training._loop import TrainingError, fit
from stablefield.training._run_folder import RunFolder

HOLD = """
import sys, time
from pathlib import Path
from stablefield.training._lock import Lock
lock = Lock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(100)
"""


@pytest.fixture
def hold(fork: Callable[..., Fork]) -> Callable[[Path], Fork]:
    """Another process that holds a lock."""

    def start(path: Path) -> Fork:
        holder = fork(HOLD, path)
        while not holder.stdout:
            assert holder.poll() is None, holder.stderr
            time.sleep(0.01)
        return holder

    return start


def write_holder(path: Path, holder: Holder, signs: int = 0) -> None:
    path.write_text(json.dumps({**dataclasses.asdict(holder), "signs_of_life": signs}) + "\n")


def elsewhere(pid: int = 7) -> Holder:
    return Holder(pid, "elsewhere", "another kernel", "2026-01-02 03:04:05 UTC")


def test_a_second_trainer_is_refused_with_who_holds_the_run_until_that_is_killed(
    tmp_path: Path, hold: Callable[[Path], Fork]
) -> None:
    run = start(tmp_path / "run", dataclasses.replace(SMALL, steps=4))
    holder = hold(run.path / ".stablefield.lock")
    try:
        words = rf"run is being trained by process {holder.pid} on {os.uname().nodename} since 20\d\d-.* UTC"
        with pytest.raises(ValueError, match=words):
            go(run)
        assert not (run.path / "metrics.jsonl").exists()
    finally:
        holder.kill()
        holder.communicate()
    go(run)
    assert run.newest() is not None
    assert not (run.path / ".stablefield.lock").exists()


def test_the_command_refuses_to_resume_beside_a_running_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from stablefield.cli.entry import main

    run = start(tmp_path / "run", dataclasses.replace(SMALL, steps=4))
    with run.locked():
        with pytest.raises(SystemExit) as end:
            main(["train", "--resume", "--out", str(run.path), "--device", "cpu"])
        assert end.value.code == 2
        assert f"is being trained by process {os.getpid()} on" in capsys.readouterr().err
        with pytest.raises(SystemExit) as end:  # which writes nothing
            main(["train", "--resume", "--dry-run", "--out", str(run.path), "--device", "cpu"])
        assert end.value.code == 0


def test_a_second_fresh_run_in_a_folder_is_told_who_trains_in_it(
    tmp_path: Path, hold: Callable[[Path], Fork], capsys: pytest.CaptureFixture[str]
) -> None:
    from stablefield.cli.entry import main

    run = start(tmp_path / "run", dataclasses.replace(SMALL, steps=4))
    command = ["train", "digits", "--out", str(run.path), "--device", "cpu"]
    holder = hold(run.path / ".stablefield.lock")
    try:
        words = rf"run is being trained by process {holder.pid} on {os.uname().nodename} since 20\d\d-.* UTC: wait"
        with pytest.raises(SystemExit) as end:
            main(command)
        assert end.value.code == 2
        assert re.search(words, capsys.readouterr().err)
        with pytest.raises(ValueError, match=words):
            start(run.path)
    finally:
        holder.kill()
        holder.communicate()
    assert (run.path / ".stablefield.lock").exists()  # as a kill leaves it
    with pytest.raises(SystemExit):
        main(command)
    told = capsys.readouterr().err
    assert "is not empty" in told
    assert "--resume" in told


def test_whether_a_lock_is_free_is_asked_without_taking_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stablefield.training import _lock as lock

    path = tmp_path / "lock"
    Lock(path).require_free()
    assert not path.exists()
    first = Lock(path, beat=0.05)
    first.acquire()
    with pytest.raises(ValueError, match=f"by process {os.getpid()}"):
        Lock(path).require_free()
    first.release()
    write_holder(path, elsewhere())  # which shows by its signs of life alone
    with pytest.raises(ValueError, match="by process 7 on elsewhere since 2026"):
        Lock(path).require_free()
    os.utime(path, (time.time() - 100, time.time() - 100))
    Lock(path).require_free()
    write_holder(path, Holder.here())
    Lock(path).require_free()
    monkeypatch.setattr(lock, "_flock", lambda *_: None)
    with pytest.raises(ValueError, match=f"by process {os.getpid()}"):
        Lock(path).require_free()


def test_a_stopped_holder_on_another_machine_is_outlived_and_a_living_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    write_holder(path, elsewhere())
    told: list[str] = []
    lock = Lock(path, beat=0.05, patience=0.3)
    began = time.monotonic()
    lock.acquire(told.append)
    assert time.monotonic() - began >= 0.3
    assert "process 7 on elsewhere since 2026-01-02 03:04:05 UTC" in told[0]
    lock.release()

    write_holder(path, elsewhere())
    pid = os.fork()
    if pid == 0:
        for signs in range(1, 100):
            time.sleep(0.1)
            write_holder(path, elsewhere(), signs)
        os._exit(0)
    try:
        with pytest.raises(ValueError, match="by process 7 on elsewhere"):
            Lock(path, beat=0.05, patience=2.0).acquire()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_lock_that_the_kernel_keeps_for_a_dead_machine_is_taken_over(
    tmp_path: Path, hold: Callable[[Path], Fork]
) -> None:
    path = tmp_path / "lock"
    holder = hold(path)  # stands for a file server that has not heard of the death
    os.kill(holder.pid, signal.SIGSTOP)
    try:
        write_holder(path, elsewhere())
        lock = Lock(path, beat=0.05, patience=0.3)
        lock.acquire()
        assert json.loads(path.read_text())["pid"] == os.getpid()
        lock.release()
    finally:
        holder.kill()
        holder.communicate()


def test_of_a_machine_that_was_restarted_the_lock_is_taken_over_at_once(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    write_holder(path, dataclasses.replace(elsewhere(), host=os.uname().nodename))
    lock = Lock(path)
    lock.acquire(lambda _: pytest.fail("it waits"))
    lock.release()
    assert not path.exists()


def test_a_run_that_was_taken_over_while_it_stood_still_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stablefield.training import _lock as lock

    run = start(tmp_path / "run", dataclasses.replace(SMALL, steps=10_000, log_every=1))
    monkeypatch.setattr(lock, "BEAT", 0.02)
    monkeypatch.setattr(lock.Lock.__init__, "__defaults__", (0.02, 60.0))

    def take_over(report: object) -> None:
        if report.step == 3:
            (run.path / ".stablefield.lock").unlink()
            write_holder(run.path / ".stablefield.lock", elsewhere())
            time.sleep(0.3)

    with pytest.raises(TrainingError, match="taken over by process 7 on elsewhere"):
        fit(run, run.config(), open_digits(), device=torch.device("cpu"), report=take_over, every=1)
    assert json.loads((run.path / ".stablefield.lock").read_text())["pid"] == 7, "the lock of another was taken away"


def test_a_file_system_without_locks_goes_by_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stablefield.training import _lock as lock

    monkeypatch.setattr(lock, "_flock", lambda descriptor: None)
    path = tmp_path / "lock"
    first = Lock(path, beat=0.05, patience=0.5)
    first.acquire()
    with pytest.raises(ValueError, match=f"by process {os.getpid()}"):
        Lock(path, beat=0.05, patience=0.5).acquire()
    first.release()
    assert not path.exists()


def test_no_file_of_another_program_is_locked_or_taken_away(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        start(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def killer(place: str, killed_at: int) -> Callable[[str, tuple[object, ...]], None]:
    """An audit hook that kills this process before its `killed_at`-th call that is about files in `place`, or a lock."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event == "fcntl.flock" or any(place in str(argument) for argument in arguments):
            count += 1
            if count == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def test_a_folder_whose_making_was_killed_at_any_step_can_be_begun_or_resumed(tmp_path: Path) -> None:
    # Every call that reaches the file system is announced to audit hooks, which only a process of its own can drop.
    steps = {"begun": 0, "resumed": 0}
    for killed_at in range(1, 200):
        path = tmp_path / f"{killed_at}" / "run"
        pid = os.fork()
        if pid == 0:
            try:
                sys.addaudithook(killer(str(tmp_path), killed_at))
                start(path)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == 0:
            break
        assert status == -signal.SIGKILL
        if (path / "config.json").exists():
            assert RunFolder.open(path).config().recipe == SMALL
            steps["resumed"] += 1
        else:
            assert start(path).config().recipe == SMALL
            steps["begun"] += 1
        assert {found.name for found in path.iterdir()} <= {"config.json", ".stablefield.lock"}
    else:
        pytest.fail("it takes no end")
    assert steps["begun"] >= 8
    assert steps["resumed"] >= 2


def test_a_folder_that_holds_nothing_yet_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / ".config.json.4321.tmp").write_text('{"format": 1, "stab')
    with pytest.raises(ValueError, match=r"holds no run yet.*out="):
        RunFolder.open(tmp_path)
    assert start(tmp_path).config().recipe == SMALL
