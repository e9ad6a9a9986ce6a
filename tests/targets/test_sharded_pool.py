"""Ranks with a shard each give the target of one process with all references, and end with a message when one dies.

What one process would refuse or warn of, the rank does that holds the sample, or the one that asked for it.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import stablefield as sf
from forks import Fork

# What every rank does: its part of a batch over its shard, for several kinds of references; results go to a file.
PROGRAM = """
import os
import sys
import warnings
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
    data, labels, process = case["data"], case["labels"], sf.EDM()
    if "float64" in kind:
        data = data.double() / 127.5 - 1
    if kind == "far from zero":
        data = data / 127.5 + case["offset"]
    shard = data[mine].numpy() if kind == "array" else data[mine]
    pool = sf.ShardedPool(
        shard,
        labels[mine] if "groups" in kind else None,
        mirrored="mirrored" in kind,
        unlabelled_size=20 if "subset" in kind else None,
        resampled="anew" in kind,
        weights=case["weights"][mine] if "weights" in kind else None,
        timeout=timeout,
    )
    if what == "unknown" and rank:
        # As on a GPU, whose labels nothing has waited for.
        pool.pool._labels = pool.pool.labels.index_fill(0, torch.tensor([2]), -1)
        pool.pool._unchecked_labels = True
    assert (pool.start, pool.total) == (mine.start, len(data))
    target = sf.StableTarget(process, references=pool, noise_band=band, chunk_size=17)
    x0, x_t, t = case["x0"], case["x_t"], case["t"]
    if "float64" in kind:
        x0 = data[case["index"]]  # without the rounding of float32, as the shards are
        x_t = x0 + (case["x_t"] - case["x0"]).double()
    if kind == "far from zero":
        x0, x_t = data[case["index"]], case["x_t_far"]
    seen = case["seen"][rows] if "groups" in kind else None
    # A rank may have no row in the band, or no row at all in its batch but one below it.
    some = rows if len(rows) else torch.tensor([0])
    level = t[some] if len(rows) else torch.tensor([1e-6])
    if "anew" in kind:
        x0, x_t = x0 + case["moved"], x_t + case["moved"]
    rng = torch.Generator().manual_seed(5 + rank)  # that of rank 0 decides
    found = target(x0[some], x_t[some], level, seen, case["index"][some], generator=rng)
    return {name: getattr(found, name)[: len(rows)] for name in ("x0", "variance", "ess", "source_weight")}

def warned(kind):
    # What is said of rows that are drawn in one way or another.
    rng = torch.Generator().manual_seed(rank)
    n, labels = len(case["data"]), torch.arange(len(case["data"])) % 3
    weights = 1.0 + 9 * (torch.arange(n) % 2 == 0) if "weights" in kind else None
    pool = sf.ShardedPool(
        case["data"][mine],
        labels[mine] if "labels" in kind else None,
        mirrored="mirrored" in kind,
        weights=None if weights is None else weights[mine],
    )
    target = sf.StableTarget(sf.EDM(), references=pool, noise_band=0.5, validate_args="not asked" not in kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(12):
            index = torch.randint(n, (160,), generator=rng)
            if "part" in kind:
                index = index % bounds[1]
            if "half of a shard" in kind:
                index = torch.where(index < bounds[1], index % (bounds[1] // 2), index)
            if "as weighed" in kind:
                index = torch.multinomial(weights, 160, replacement=True, generator=rng)
            if "balanced" in kind:
                index = torch.multinomial(1.0 + 9 * (labels == 1), 160, replacement=True, generator=rng)
            seen = labels[index] if "labels" in kind else None
            if "dropped" in kind:
                seen = torch.where(index % 2 == 0 if "by sample" in kind else torch.arange(160) % 2 == 0, -1, seen)
            x0 = case["data"][index] / 127.5 - 1
            flip = torch.rand(160, generator=rng) < 0.5 if "flipped at random" in kind else None
            x0 = x0 if flip is None else torch.where(flip.view(-1, *[1] * (x0.ndim - 1)), x0.flip(-1), x0)
            t = torch.rand(160, generator=rng) + 0.2  # some of them below the band
            target(x0, sf.EDM().perturb(x0, t, generator=rng), t, seen, index, flip=flip)
    here = warned.__code__.co_filename
    assert [warning.filename for warning in caught] == [here] * len(caught), caught
    return [str(warning.message) for warning in caught]

try:
    if what == "wrong":
        case["index"][1] += 1
        result("uint8")
    elif what == "mislabelled":
        case["seen"][3] = 1 - case["seen"][3] % 2
        result("groups")
    elif what == "weightless":
        case["weights"][case["index"][3]] = 0
        result("weights")
    elif what == "all weightless":
        case["weights"][:] = 0
        result("weights")
    elif what == "weights of one":
        sf.ShardedPool(case["data"][mine], weights=case["weights"][mine] if rank else None)
    elif what == "unknown":
        result("groups")
    elif what.startswith("draws"):
        torch.save({kind: warned(kind) for kind in what.split(": ")[1].split("; ")}, folder / ("warned-%d.pt" % rank))
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
        kinds = ["uint8"] if what == "idle" else what.split("; ")
        torch.save({kind: result(kind, band) for kind in kinds} | {"rows": rows}, folder / ("found-%d.pt" % rank))
        dist.barrier()
finally:
    # Without it the threads of gloo can abort the process at its end, after the message.
    dist.destroy_process_group()
"""

TIMEOUT = 60
Run = Callable[..., list[Fork]]
KINDS = (
    *("uint8", "float64", "array", "groups", "mirrored", "far from zero"),
    *("weights", "weights float64", "weights groups float64", "weights mirrored groups float64"),
    *("anew", "subset groups", "weights mirrored subset groups float64", "anew subset groups"),
)


@pytest.fixture
def case(tmp_path: Path) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (101, 3, 4, 4), generator=rng, dtype=torch.uint8)
    data[60:80] = data[:20]  # near twins in other shards: exact ones but for one pixel
    data[60:80, 0, 0, 0] = 255 - data[:20, 0, 0, 0]
    index = torch.randperm(101, generator=rng)[:31]
    x0 = data[index] / 127.5 - 1
    t = torch.exp(1.5 * torch.randn(31, generator=rng))
    labels = torch.arange(101) % 3
    seen = labels[index].clone()
    seen[::4] = -1
    values = {
        "data": data,
        "index": index,
        "x0": x0,
        "t": t,
        "x_t": sf.EDM().perturb(x0, t, generator=rng),
        "labels": labels,
        "seen": seen,
    }
    # Most of the weight on few samples, so that a row's own may be far below it. Some are never drawn, all of a shard too.
    weights = torch.exp(4 * torch.randn(101, generator=rng, dtype=torch.float64))
    idle = torch.ones(101, dtype=torch.bool).index_fill(0, index, False)
    assert idle[0]
    weights[idle & (torch.arange(101) % 3 == 0)] = 0
    values["weights"] = weights
    # Shards that lie in different places, far from zero.
    values["offset"] = 1000 + torch.arange(101)[:, None, None, None] // 40
    far = (data / 127.5 + values["offset"])[index]
    values["moved"] = torch.randn(31, 3, 4, 4, generator=rng)
    values["x_t_far"] = sf.EDM().perturb(far, t, generator=rng)
    torch.save({**values, "bounds": {1: [], 2: [40], 3: [1, 70]}}, tmp_path / "case.pt")
    return values


@pytest.fixture
def run(fork: Callable[..., Fork], tmp_path: Path) -> Run:
    """Run the ranks; they must all end in time."""

    def of(size: int, what: str = "") -> list[Fork]:
        ranks = [fork(PROGRAM, rank, size, tmp_path, what, GLOO_SOCKET_IFNAME="lo") for rank in range(size)]
        for rank in ranks:
            rank.wait(TIMEOUT)
        return ranks

    return of


def whole(case: dict[str, torch.Tensor], kind: str) -> sf.Target:
    data = case["data"].double() / 127.5 - 1 if "float64" in kind else case["data"]
    if kind == "far from zero":
        data = data / 127.5 + case["offset"]
    pool = sf.Pool(
        data,
        labels=case["labels"] if "groups" in kind else None,
        mirrored="mirrored" in kind,
        unlabelled_size=20 if "subset" in kind else None,
        resampled="anew" in kind,
        weights=case["weights"] if "weights" in kind else None,
    )
    x0, x_t = case["x0"], case["x_t"]
    if "float64" in kind:
        x_t = data[case["index"]] + (x_t - x0).double()
        x0 = data[case["index"]]
    if kind == "far from zero":
        x0, x_t = data[case["index"]], case["x_t_far"]
    seen = case["seen"] if "groups" in kind else None
    if "anew" in kind:
        x0, x_t = x0 + case["moved"], x_t + case["moved"]
    rng = torch.Generator().manual_seed(5)
    return sf.StableTarget(sf.EDM(), references=pool)(x0, x_t, case["t"], seen, case["index"], generator=rng)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_together_give_the_target_of_one_process(
    size: int, case: dict[str, torch.Tensor], run: Run, tmp_path: Path
) -> None:
    done = run(size, "; ".join(KINDS))
    assert [rank.returncode for rank in done] == [0] * size, done[-1].stderr
    found = [torch.load(tmp_path / f"found-{rank}.pt", weights_only=True) for rank in range(size)]
    rows = torch.cat([part["rows"] for part in found])
    assert sorted(rows.tolist()) == list(range(31))
    for kind in KINDS:
        truth = whole(case, kind)
        tolerance = 1e-12 if "float64" in kind else 1e-5
        for name in ("x0", "source_weight", "ess", "variance"):
            together = torch.cat([part[kind][name] for part in found])
            torch.testing.assert_close(
                together, getattr(truth, name)[rows], rtol=tolerance, atol=tolerance, msg=lambda m, k=kind: f"{k}: {m}"
            )
    assert whole(case, "uint8").ess.max() > 20


def test_a_rank_without_rows_serves_the_others(case: dict[str, torch.Tensor], run: Run, tmp_path: Path) -> None:
    done = run(2, "idle")
    assert [rank.returncode for rank in done] == [0, 0], done[-1].stderr
    found = torch.load(tmp_path / "found-0.pt", weights_only=True)["uint8"]["x0"]
    torch.testing.assert_close(found, whole(case, "uint8").x0, rtol=0, atol=1e-5)


def test_a_rank_that_dies_ends_the_others_with_a_message(case: dict[str, torch.Tensor], run: Run) -> None:
    start = time.monotonic()
    done = run(3, "dies")
    assert time.monotonic() - start < 45  # far below the timeout of the labels: a closed connection is noticed
    assert "rank 2: the first error" in done[2].stderr
    for rank in (0, 1):
        assert done[rank].returncode == 1
        assert f"RankError: rank {rank} of 3 waited for the others" in done[rank].stderr
        assert "look for the first error among the ranks" in done[rank].stderr


def test_a_rank_that_does_not_answer_ends_the_others_after_the_timeout(case: dict[str, torch.Tensor], run: Run) -> None:
    done = run(2, "silent")
    assert done[0].returncode == 1
    assert "RankError: rank 0 of 2 waited for the others" in done[0].stderr


def test_a_row_that_is_not_its_sample_is_told_by_the_rank_that_asked(case: dict[str, torch.Tensor], run: Run) -> None:
    done = run(2, "wrong")
    # Row 1 of the batch is the first of rank 1; its sample lies in the shard of either rank.
    assert [rank.returncode for rank in done] == [0, 1]
    assert "row 0 of x0 is not sample" in done[1].stderr


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("mislabelled", "labels[1] is {seen}: the Pool has another label for the row's own sample"),
        ("weightless", "index[1] is {index}: its weight in the Pool is 0, so it cannot have been drawn"),
        ("unknown", "Pool labels[2] is -1: -1 means a label that was dropped by chance"),
    ],
)
def test_what_a_pool_refuses_is_refused_by_the_rank_that_asked(
    what: str, message: str, case: dict[str, torch.Tensor], run: Run
) -> None:
    """Row 3 of the batch is row 1 of rank 1; a label of -1 is among the samples of rank 1."""
    done = run(2, what)
    wrong, index = 1 - int(case["seen"][3]) % 2, int(case["index"][3])
    assert wrong != case["seen"][3]
    assert done[1].returncode == 1
    assert message.format(seen=wrong, index=index) in done[1].stderr


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("all weightless", "the weights are all 0 on all ranks"),
        ("weights of one", "weights, resampled or unlabelled_size on only one of them"),
    ],
)
def test_weights_that_do_not_fit_together_are_refused_by_all_ranks(
    what: str, message: str, case: dict[str, torch.Tensor], run: Run
) -> None:
    for rank in run(2, what):
        assert rank.returncode == 1
        assert message in rank.stderr


def test_draws_that_the_shards_do_not_expect_are_warned_of_by_a_rank_that_holds_them(
    case: dict[str, torch.Tensor], run: Run, tmp_path: Path
) -> None:
    # How many warnings rank 0, which holds samples 0 to 39, and rank 1 give.
    expected = {
        "uniform": (0, 0),
        "labels": (0, 0),
        "labels dropped by chance": (0, 0),
        "labels, balanced": (0, 0),
        "weights, as weighed": (0, 0),
        "weights, labels, as weighed, dropped by chance": (0, 0),
        "part, not asked": (0, 0),
        "part": (1, 1),
        "part, labels": (1, 1),
        "half of a shard": (1, 0),
        "half of a shard, labels": (1, 0),
        "balanced": (1, 1),
        "weights": (1, 1),
        "labels dropped by sample": (1, 1),
    }
    done = run(2, "draws: " + "; ".join(expected))
    assert [rank.returncode for rank in done] == [0, 0], done[-1].stderr
    found = [torch.load(tmp_path / f"warned-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert {kind: tuple(len(part[kind]) for part in found) for kind in expected} == expected
    told = [text for part in found for texts in part.values() for text in texts]
    assert all("were not drawn from the Pool as it assumes" in text for text in told)
    assert re.search("one of the samples (elsewhere came 0|0 to 39 came [0-9]+) times", found[0]["part"][0])
    assert re.search("assumes: sample ([0-9]|[123][0-9]) came", found[0]["half of a shard"][0])
    assert re.search("one with label [012] (elsewhere|among the samples 40 to 100) came", found[1]["part, labels"][0])


def test_rows_that_are_never_flipped_are_warned_of_by_each_rank_of_mirrored_shards(
    case: dict[str, torch.Tensor], run: Run, tmp_path: Path
) -> None:
    expected = {"mirrored, flipped at random": 0, "mirrored, never flipped": 1, "mirrored, not asked": 0}
    done = run(2, "draws: " + "; ".join(expected))
    assert [rank.returncode for rank in done] == [0, 0], done[-1].stderr
    for rank in (0, 1):
        found = torch.load(tmp_path / f"warned-{rank}.pt", weights_only=True)
        assert {kind: len(texts) for kind, texts in found.items()} == expected
        assert found["mirrored, never flipped"][0].startswith("0 of ")
