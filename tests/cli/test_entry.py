"""The end of a program: with its status, after what was registered for its end, and without an abort of one of several."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# One import for all pairs of processes: each pair is forked. What they run is a verb that talks to the other and, as torch
# does where it compiles, keeps the group alive. Threads that wait for the interpreter wait long, so that one that is torn
# down around them aborts in about a quarter of the pairs.
PAIRS = """
import atexit, os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from stablefield.cli import entry, verbs

folder, pairs, status = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
keep = []

class Verb:
    def run(self):
        for _ in range(3):
            dist.all_reduce(torch.ones(3))
        if status == 1:
            raise OSError("the disk is gone")
        return status

verbs.parse = lambda arguments: Verb()
codes = set()
for pair in range(pairs):
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), WORLD_SIZE="2")
            sys.setswitchinterval(10)
            dist.init_process_group("gloo", init_method=f"file://{folder}/store-{pair}", rank=rank, world_size=2)
            keep.append(dist.group.WORLD)
            atexit.register((folder / f"ended-{pair}-{rank}").touch)
            sys.argv = ["stablefield"]
            entry.program()
        children.append(child)
    codes |= {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
print(sorted(codes))
"""


def pairs(folder: Path, count: int, status: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PAIRS, str(folder), str(count), str(status)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, with gloo on the interface lo")
def test_processes_that_succeed_end_without_an_abort_and_after_what_was_registered(tmp_path: Path) -> None:
    done = pairs(tmp_path, 12, 0)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0]\n", "")
    assert len(list(tmp_path.glob("ended-*"))) == 24


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, with gloo on the interface lo")
def test_processes_that_fail_end_with_their_message_and_status(tmp_path: Path) -> None:
    done = pairs(tmp_path, 2, 1)
    assert (done.returncode, done.stdout) == (0, "[1]\n")
    assert done.stderr == "stablefield: the disk is gone\n" * 4
