"""300 commands at random: each ends with status 0, 1 or 2 in time, and what is wrong is one paragraph."""

import contextlib
import io
import signal
import struct
import sys
import zlib
from collections.abc import Callable, Generator
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import torch
from fuzzing import SMALL, commands

from forks import COMMAND, Fork
from stablefield.cli.entry import main

LIMIT = 20
"""Seconds that a command may take."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "run"
    flags = [*SMALL["train"].split(), "--ema-snapshot-every", "1"]
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit, match="0"):
        main(["train", "digits", *flags, "--out", str(path)])
    return path


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files and folders, good and bad."""
    home = tmp_path_factory.mktemp("places")
    (home / "empty").mkdir()
    (home / "nothing").write_bytes(b"")
    (home / "text [red].txt").write_text("years of work")
    (home / "noise.zip").write_bytes(b"PK\x03\x04" + bytes(range(256)))
    (home / "broken.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr': '<f8'}")
    np.save(home / "good.npy", np.arange(40 * 64, dtype=np.uint8).reshape(40, 8, 8, 1))
    (home / "deep.json").write_text("[" * 100_000)
    (home / "config").mkdir()
    (home / "config" / "config.json").write_text('{"format": 1, "data": 3, "recipe": []}')
    (home / "one.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    (home / "x\x1b]0;evil\x07.png").write_bytes(b"\x89PNG\r\n\x1a\n" + zlib.compress(b"x"))
    return [*sorted(home.iterdir()), home / "missing", home / "nothing" / "below"]


def ended() -> "pytest.RaisesExc[SystemExit]":
    return pytest.raises(SystemExit)


@contextlib.contextmanager
def in_time() -> Generator[None]:
    """For a command, which may not work longer than it may take, nor wait; a busy machine makes all of it longer."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took more than {LIMIT} s")

    found = {number: signal.signal(number, ring) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    signal.alarm(6 * LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in found.items():
            signal.signal(number, handler)


def check(command: list[str], code: object, told: str, printed: str) -> None:
    assert code in (0, 1, 2), (command, code, told)
    assert "Traceback" not in told + printed, (command, told)
    assert "bug in stablefield" not in told, (command, told)
    assert "\n\n" not in told.strip(), (command, told)
    assert "\x1b" not in told + printed, (command, told)
    assert "took more than" not in told, (command, told)
    assert (code != 0) <= told.startswith("stablefield: "), (command, code, told, printed)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGALRM")
@pytest.mark.parametrize("seed", range(10))
def test_commands_at_random_end_in_order(
    seed: int,
    run: Path,
    places: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fork: Callable[..., Fork],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    for command in commands(20, seed, places, run, tmp_path / "out"):
        out, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), in_time(), ended() as exit_:
            main(command)
        check(command, exit_.value.code, error.getvalue(), out.getvalue())
    assert torch.get_num_threads() == before
    for command in commands(1, 1000 + seed, places, run, tmp_path / "out"):
        done = fork(COMMAND, *command, cwd=tmp_path)
        check(command, done.wait(6 * LIMIT), done.stderr, done.stdout)
