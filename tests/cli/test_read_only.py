"""Folders that a user may read but not write are refused before any work.

Root may write everywhere, so where the tests run as root the command runs as the user nobody, who may do no more than read.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from stablefield.cli.entry import main

NOBODY = 65534
PROGRAM = """
import json, os, shlex, sys
from stablefield.cli import bench, evaluate, importing, sources
from stablefield.cli import train
from stablefield.training import _run as run, _run_data as run_data, _run_probe as run_probe, _sampler as sampler
from stablefield.cli.entry import main

def work(*_, **__):
    raise AssertionError("it has begun to work")

for module in (bench, evaluate, sources, train):
    module.open_data = work
for module in (run, run_probe, sampler):
    module.open_model = work
importing.read_published = run.combine = run_data.open_images = run_probe.open_images = work
for line in map(json.loads, sys.stdin):
    sys.stderr.write(f"\\0{line}\\0")
    try:
        main(shlex.split(line))
    except SystemExit as end:
        sys.stderr.write(f"\\0{end.code}")
    sys.stderr.flush()
print(os.getuid())
"""
AS_NOBODY = [
    "setpriv",
    f"--reuid={NOBODY}",
    f"--regid={NOBODY}",
    "--clear-groups",
    "--inh-caps=-all,+dac_read_search",
    "--ambient-caps=-all,+dac_read_search",
]
"""It may still read what root may: the interpreter and the sources often lie in a home of root's."""


def as_a_user(code: str, cwd: Path, lines: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program as somebody who is not root; skip where that cannot be."""
    command = [sys.executable, "-c", code]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("the tests run as root, and there is no setpriv to run a command as another user")
        command = AS_NOBODY + command
        tried = subprocess.run([*command[:-1], "import stablefield"], capture_output=True, text=True, check=False)
        if tried.returncode:
            pytest.skip(f"the tests run as root, and nobody cannot run Python: {tried.stderr.strip()[-200:]}")
    environment = {**os.environ, "HOME": str(cwd), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, input=lines, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def places() -> Iterator[Path]:
    """A folder in which nobody may write, with a run that has a snapshot of averages; pytest's own are closed to others."""
    place = Path(tempfile.mkdtemp())
    try:
        options = "--steps 2 --batch 4 --network.width 8 --sample-every 0 --ema-snapshot-every 1 --device cpu"
        with pytest.raises(SystemExit, match="0"):
            main(["train", "digits", "--out", str(place / "run"), *options.split()])
        (place / "model.pkl").touch()
        (place / "empty").mkdir()
        for folder in (place, *(found for found in place.rglob("*") if found.is_dir())):
            folder.chmod(0o555)
        yield place
    finally:
        for folder in (place, *(found for found in place.rglob("*") if found.is_dir())):
            folder.chmod(0o755)
        shutil.rmtree(place)


def test_folders_that_may_not_be_written_are_refused_before_work(places: Path) -> None:
    lines = [
        "train digits",
        "train digits --out new",
        "train digits --out empty",
        "train --resume --out run",
        "compare digits",
        "compare digits --out new",
        "data pack digits new.safetensors",
        "data inspect digits --out new.png",
        "bench digits --out new",
        "probe digits",
        "probe digits --out new",
        "probe run",
        "sample run",
        "sample run --out new.jpg",
        "sample run --out empty",
        "ema run --length 0.1",
        "export run --out new",
        "import model.pkl --out empty",
        "evaluate run",
        "evaluate run --out new.json",
        "evaluate run --out /tmp/x.json --report new.html",
        "evaluate digits --data digits",
    ]
    before = sorted(places.rglob("*"))
    done = as_a_user(PROGRAM, places, "\n".join(map(json.dumps, lines)))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) != 0
    _, *parts = done.stderr.split("\0")
    assert parts[::3] == lines
    wrong = {
        line: told
        for line, told, code in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
        if code != "2" or "cannot be written" not in told or "Permission denied" not in told or len(told) > 400
    }
    assert not wrong, "\n".join(f"{line}: {told}" for line, told in wrong.items())
    assert sorted(places.rglob("*")) == before
