"""Train the digits while being killed, and compare the result with that of a quiet run.

    python tests/training/kills.py KILLS FOLDER

The children are forks of one process that has imported everything and computed nothing, so a kill costs no new start.
"""

import dataclasses
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # each child would import it for its optimizer

from stablefield.data._digits import open_digits
from stablefield.training._loop import fit
from stablefield.training._recipe import SongUNetConfig
from stablefield.training._recipes import DIGITS
from stablefield.training._run_config import RunConfig
from stablefield.training._run_folder import RunFolder

STEPS = 30
RECIPE = dataclasses.replace(
    DIGITS,
    references="all",
    noise_band=0.0,
    steps=STEPS,
    batch=32,
    checkpoint_every=3,
    sample_every=0,
    ema_snapshot_every=15,
    keep_every=15,
    network=SongUNetConfig(base_channels=8, multipliers=(1,), blocks=1, dropout=0.1),
)


def start(path: Path) -> RunFolder:
    data = open_digits()
    config = RunConfig(
        data="digits", shape=data.shape, classes=0, manifest=data.manifest, recipe=RECIPE, version="test"
    )
    return RunFolder.create(path, config)


def child(folder: RunFolder) -> int:
    """Train in a fork; return its process number."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            fit(folder, folder.config(), open_digits(), device=torch.device("cpu"))
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return pid


def content(folder: RunFolder) -> dict[str, bytes]:
    files = sorted(folder.path.rglob("*.safetensors"))
    return {str(path.relative_to(folder.path)): path.read_bytes() for path in files}


def main(kills: int, where: Path) -> int:
    sys.path.append(str(Path(__file__).parents[1]))
    from pictures import draw_small_pictures

    draw_small_pictures()
    quiet = start(where / "quiet")
    began = time.monotonic()
    if os.waitstatus_to_exitcode(os.waitpid(child(quiet), 0)[1]) != 0:
        return 1
    length = time.monotonic() - began
    chance = random.Random(0)
    hits, number, folder = 0, 0, None
    while hits < kills:
        if folder is None:
            number += 1
            folder = start(where / f"killed-{number}")
        pid = child(folder)
        time.sleep(chance.uniform(0.02, 0.5) * length)
        os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == -signal.SIGKILL:
            hits += 1
        elif status != 0:
            return 1
        if status == 0:
            folder = check(folder, quiet)
    if folder is not None:
        if os.waitstatus_to_exitcode(os.waitpid(child(folder), 0)[1]) != 0:
            return 1
        check(folder, quiet)
    print(f"{hits} kills over {number} runs, all results equal")
    return 0


def check(folder: RunFolder, quiet: RunFolder) -> None:
    found, expected = content(folder), content(quiet)
    assert sorted(found) == sorted(expected), sorted(found)
    differing = [name for name in expected if found[name] != expected[name]]
    assert not differing, differing
    assert not list(folder.path.rglob("*.tmp")), "a leftover"


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2])))
