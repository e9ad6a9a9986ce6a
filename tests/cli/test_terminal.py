"""What reaches a terminal: no control characters of others, no traceback, whatever happens to the streams."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.table import Table

from forks import COMMAND, Fork
from stablefield._progress import Progress
from stablefield.cli import entry, verbs
from stablefield.cli.console import console, quoted
from stablefield.cli.progress import StageBar
from stablefield.cli.terminal import clean

NAME = "\x1b]0;evil\x07\x9b31m\u202egpj.\x7f\udcff"
WITHOUT_A_READER = f"import os; here, there = os.pipe(); os.close(here); os.dup2(there, 1); {COMMAND}"
PLAIN = "\ufffd]0;evil\ufffd\ufffd31m\ufffdgpj.\ufffd\ufffd"


def test_a_name_is_cleaned_and_a_text_is_left() -> None:
    assert clean(NAME) == PLAIN
    assert clean("two lines\n\tä 字 🙂 – ∞") == "two lines\n\tä 字 🙂 – ∞"


def test_all_that_is_printed_is_cleaned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    console.print(f"read {NAME}", markup=False)
    table = Table("")
    table.add_row(NAME)
    console.print(table)
    monkeypatch.setattr(verbs, "parse", lambda _: (_ for _ in ()).throw(ValueError(f"DATA is {NAME}")))
    with pytest.raises(SystemExit, match="2"):
        entry.main(["train", NAME.encode("utf-8", "replace").decode()])
    told = capsys.readouterr()
    assert told.err == f"stablefield: DATA is {PLAIN}\n"
    assert told.out.count("\ufffd]0;evil") == 2
    for text in (told.out, told.err):
        assert [letter for letter in text if ord(letter) < 32 and letter != "\n"] == []


def read_all(terminal: int) -> bytes:
    """Read until the other side has closed: the system hands on what was written piece by piece."""
    parts = []
    with os.fdopen(terminal, "rb", buffering=0) as stream, contextlib.suppress(OSError):
        while part := stream.read(65536):
            parts.append(part)
    return b"".join(parts)


def test_a_bar_moves_the_cursor_and_a_name_in_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console, "is_interactive", True)
    read, write = os.openpty()
    with os.fdopen(write, "w") as terminal:
        monkeypatch.setattr(console, "_file", terminal)
        monkeypatch.setattr(console, "_force_terminal", True)
        with StageBar() as bar:
            bar.update(Progress(stage="\x1b]0;evil\x07", done=1, total=2))
    shown = read_all(read).decode()
    assert "\x1b[?25l" in shown  # the cursor is hidden: what the bar itself sends goes through
    assert "\x1b]0;" not in shown
    assert "\ufffd]0;evi" in shown


def test_a_bug_says_that_it_is_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise AttributeError("no attribute x")

    monkeypatch.setattr(verbs, "parse", fail)
    with pytest.raises(SystemExit, match="1"):
        entry.main(["doctor"])
    said = "This is a bug in stablefield; rerun with --debug for a traceback."
    assert capsys.readouterr().err == f"stablefield: AttributeError: no attribute x. {said}\n"
    with pytest.raises(SystemExit, match="1"):
        entry.main(["doctor", "--debug"])
    assert "Traceback" in capsys.readouterr().err


def shell(line: str, *, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    python = f"{shlex.quote(sys.executable)} -m stablefield"
    return subprocess.run(
        ["bash", "-c", line.replace("STABLEFIELD", python)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        ("STABLEFIELD --help >&-", 0, ""),
        ("STABLEFIELD --help <&- >&- 2>&-", 0, ""),
        ("STABLEFIELD trian 2>&-", 2, ""),
        ("STABLEFIELD train --help | true; exit ${PIPESTATUS[0]}", 0, ""),
        ("STABLEFIELD --help > /dev/full", 1, "stablefield: cannot write the output"),
        ("PYTHONIOENCODING=ascii STABLEFIELD sample 'ä\u202e\x1b'", 2, "no run"),
    ],
)
def test_closed_and_full_streams_end_without_a_traceback(line: str, code: int, told: str) -> None:
    if "/dev/full" in line and not Path("/dev/full").exists():
        pytest.skip("no device that is full")
    done = shell(line)
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert (told in done.stderr) if told and told != "no run" else done.stderr.count("\n") <= 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
@pytest.mark.slow
def test_a_run_whose_reader_has_left_goes_on_and_does_not_write_into_its_files(
    tmp_path: Path, fork: Callable[..., Fork]
) -> None:
    flags = "--steps 2 --batch 4 --network.width 8 --network.depth 1 --sample-every 0 --device cpu"
    left = fork(WITHOUT_A_READER, "train", "digits", *flags.split(), "--out", "a", cwd=tmp_path)
    assert (left.wait(), left.stderr) == (0, "")
    assert (tmp_path / "a" / "checkpoints" / "step-00000002").is_dir()
    done = shell(f"STABLEFIELD train digits {flags} --out b >&- 2>&-", cwd=tmp_path)
    assert done.returncode == 0
    for file in ("config.json", "metrics.jsonl"):
        assert "run folder" not in (tmp_path / "b" / file).read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_ctrl_c_while_torch_is_imported_is_told_in_a_line(tmp_path: Path) -> None:
    # As an extension module may do, this one makes something else of the exception.
    (tmp_path / "torch.py").write_text(
        "import sys, time\nprint('importing', flush=True)\ntry:\n    time.sleep(30)\nexcept BaseException as error:\n"
        "    raise ImportError('cannot load the library') from error\n"
    )
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from stablefield.cli.entry import program; program()"
    path = os.pathsep.join([str(tmp_path), str(Path(entry.__file__).parents[2])])
    with subprocess.Popen(
        [sys.executable, "-c", code, "doctor"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "importing\n"
        child.send_signal(signal.SIGINT)
        _, told = child.communicate(timeout=20)
    assert (child.returncode, told) == (130, "stablefield: interrupted.\n")


def test_commands_for_copying_are_quoted_for_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my run; $(rm x) [bold]'"
    path.mkdir()
    console.begin_capture()
    console.print(quoted("stablefield", "sample", path, "--seeds", "0-63"))
    words = shlex.split(console.end_capture())
    assert words == ["stablefield", "sample", path.name, "--seeds", "0-63"]
