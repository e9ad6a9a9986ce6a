"""Ranks with a shard each give the target of one process with all references, and end with a message when one dies."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import stablefield as sf

# What every rank does: its part of a batch over its shard, for several kinds of references; results go to a file.
PROGRAM = """
import os
import sys
from datetime import timedelta
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
import stablefield as sf

rank, size, folder, what = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)
store = dist.FileStore(str(folder / "store"), size)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
case = torch.load(folder / "case.pt", weights_only=True)
bounds = [0, *case["bounds"][size], len(case["data"])]
mine = slice(bounds[rank], bounds[rank + 1])
rows = torch.arange(len(case["index"]))
if what == "idle":
    rows = rows[: 0 if rank else None]
else:
    rows = rows[rank::size]

def result(kind, band=0.0, timeout=None):
    data, group, process = case["data"], case["group"], sf.EDM()
    if kind == "float64":
        data = data.double() / 127.5 - 1
    if kind == "far from zero":
        data = data / 127.5 + case["offset"]
    shard = data[mine].numpy() if kind == "array" else data[mine]
    pool = sf.ShardedPool(shard, group[mine] if kind == "groups" else None, mirrored=kind == "mirrored", timeout=timeout)
    assert (pool.start, pool.total) == (mine.start, len(data))
    target = sf.StableTarget(process, references=pool, noise_band=band, chunk_size=17)
    x0, x_t, t = case["x0"], case["x_t"], case["t"]
    if kind == "float64":
        x0 = data[case["index"]]  # without the rounding of float32, as the shards are
        x_t = x0 + (case["x_t"] - case["x0"]).double()
    if kind == "far from zero":
        x0, x_t = data[case["index"]], case["x_t_far"]
    seen = case["seen"][rows] if kind == "groups" else None
    # A rank may have no row in the band, or no row at all in its batch but one below it.
    some = rows if len(rows) else torch.tensor([0])
    level = t[some] if len(rows) else torch.tensor([1e-6])
    found = target(x0[some], x_t[some], level, seen, case["index"][some])
    return {name: getattr(found, name)[: len(rows)] for name in ("x0", "variance", "ess", "source_weight")}

try:
    if what == "wrong":
        case["index"][1] += 1
        result("uint8")
    elif what in ("dies", "silent"):
        pool = sf.ShardedPool(case["data"][mine], timeout=timedelta(seconds=2 if what == "silent" else 50))
        target = sf.StableTarget(sf.EDM(), references=pool)
        if rank == size - 1:
            if what == "dies":
                print("rank %d: the first error" % rank, file=sys.stderr, flush=True)
                os._exit(3)  # as a killed process: nothing is said to the others
            import time
            time.sleep(5)
        target(case["x0"][rows], case["x_t"][rows], case["t"][rows], index=case["index"][rows])
    else:
        band = 1e-3 if what == "idle" else 0.0
        kinds = ["uint8"] if what == "idle" else ["uint8", "float64", "array", "groups", "mirrored", "far from zero"]
        torch.save({kind: result(kind, band) for kind in kinds} | {"rows": rows}, folder / ("found-%d.pt" % rank))
        dist.barrier()
finally:
    # Without it the threads of gloo can abort the process at its end, after the message.
    dist.destroy_process_group()
"""

TIMEOUT = 60


@pytest.fixture
def case(tmp_path: Path) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (101, 3, 4, 4), generator=rng, dtype=torch.uint8)
    data[60:80] = data[:20]  # near twins in other shards: exact ones but for one pixel
    data[60:80, 0, 0, 0] = 255 - data[:20, 0, 0, 0]
    index = torch.randperm(101, generator=rng)[:31]
    x0 = data[index] / 127.5 - 1
    t = torch.exp(1.5 * torch.randn(31, generator=rng))
    group = torch.arange(101) % 3
    seen = group[index].clone()
    seen[::4] = -1
    values = {
        "data": data,
        "index": index,
        "x0": x0,
        "t": t,
        "x_t": sf.EDM().perturb(x0, t, generator=rng),
        "group": group,
        "seen": seen,
    }
    # Shards that lie in different places, far from zero.
    values["offset"] = 1000 + torch.arange(101)[:, None, None, None] // 40
    far = (data / 127.5 + values["offset"])[index]
    values["x_t_far"] = sf.EDM().perturb(far, t, generator=rng)
    torch.save({**values, "bounds": {1: [], 2: [40], 3: [1, 70]}}, tmp_path / "case.pt")
    return values


def run(size: int, folder: Path, what: str = "") -> list[subprocess.CompletedProcess[str]]:
    """Run the ranks; they must all end in time."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(size), str(folder), what],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(size)
    ]
    try:
        return [
            subprocess.CompletedProcess(
                rank.args, rank.wait(TIMEOUT), *(stream.read() for stream in (rank.stdout, rank.stderr))
            )
            for rank in ranks
        ]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
            rank.stdout.close()
            rank.stderr.close()


def whole(case: dict[str, torch.Tensor], kind: str) -> sf.Target:
    data = case["data"].double() / 127.5 - 1 if kind == "float64" else case["data"]
    if kind == "far from zero":
        data = data / 127.5 + case["offset"]
    pool = sf.Pool(data, group=case["group"] if kind == "groups" else None, mirrored=kind == "mirrored")
    x0, x_t = case["x0"], case["x_t"]
    if kind == "float64":
        x_t = data[case["index"]] + (x_t - x0).double()
        x0 = data[case["index"]]
    if kind == "far from zero":
        x0, x_t = data[case["index"]], case["x_t_far"]
    seen = case["seen"] if kind == "groups" else None
    return sf.StableTarget(sf.EDM(), references=pool)(x0, x_t, case["t"], seen, case["index"])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_together_give_the_target_of_one_process(
    size: int, case: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    done = run(size, tmp_path)
    assert [rank.returncode for rank in done] == [0] * size, done[-1].stderr
    found = [torch.load(tmp_path / f"found-{rank}.pt", weights_only=True) for rank in range(size)]
    rows = torch.cat([part["rows"] for part in found])
    assert sorted(rows.tolist()) == list(range(31))
    for kind in ("uint8", "float64", "array", "groups", "mirrored", "far from zero"):
        truth = whole(case, kind)
        tolerance = 1e-12 if kind == "float64" else 1e-5
        for name in ("x0", "source_weight", "ess", "variance"):
            together = torch.cat([part[kind][name] for part in found])
            torch.testing.assert_close(
                together, getattr(truth, name)[rows], rtol=tolerance, atol=tolerance, msg=lambda m, k=kind: f"{k}: {m}"
            )
    assert whole(case, "uint8").ess.max() > 20


def test_a_rank_without_rows_serves_the_others(case: dict[str, torch.Tensor], tmp_path: Path) -> None:
    done = run(2, tmp_path, "idle")
    assert [rank.returncode for rank in done] == [0, 0], done[-1].stderr
    found = torch.load(tmp_path / "found-0.pt", weights_only=True)["uint8"]["x0"]
    torch.testing.assert_close(found, whole(case, "uint8").x0, rtol=0, atol=1e-5)


def test_a_rank_that_dies_ends_the_others_with_a_message(case: dict[str, torch.Tensor], tmp_path: Path) -> None:
    start = time.monotonic()
    done = run(3, tmp_path, "dies")
    assert time.monotonic() - start < 45  # far below the timeout of the group: a closed connection is noticed
    assert "rank 2: the first error" in done[2].stderr
    for rank in (0, 1):
        assert done[rank].returncode == 1
        assert f"RankError: rank {rank} of 3 waited for the others" in done[rank].stderr
        assert "look for the first error among the ranks" in done[rank].stderr


def test_a_rank_that_does_not_answer_ends_the_others_after_the_timeout(
    case: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    done = run(2, tmp_path, "silent")
    assert done[0].returncode == 1
    assert "RankError: rank 0 of 2 waited for the others" in done[0].stderr


def test_a_row_that_is_not_its_sample_is_told_by_the_rank_that_asked(
    case: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    done = run(2, tmp_path, "wrong")
    # Row 1 of the batch is the first of rank 1; its sample lies in the shard of either rank.
    assert [rank.returncode for rank in done] == [0, 1]
    assert "row 0 of the rows in the noise band is not sample" in done[1].stderr


def test_without_ranks_a_sharded_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="no process group: call torch"):
        sf.ShardedPool(torch.randn(4, 2))
