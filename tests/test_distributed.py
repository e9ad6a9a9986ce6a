"""Ranks of one process and of several, and the reports of long waits."""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import stablefield as sf
from forks import Fork, Server
from stablefield._distributed import Ranks

SOURCE = Path(__file__).resolve().parents[1] / "src" / "stablefield"

# Rank 1 comes late to a wait of rank 0. With the argument "stopped", the process that keeps the store is stopped meanwhile.
LATE = """
import os, signal, sys, time
from stablefield._distributed import Ranks
from stablefield._wait_report import WaitReporter

def tell(message):
    print(message, flush=True)

with WaitReporter(tell, patience=2.0), Ranks.launched() as ranks:
    ranks.barrier("to meet once")
    if ranks.rank == 1:
        if sys.argv[1] == "stopped":
            os.kill(int(os.environ["STORE"]), signal.SIGSTOP)
        time.sleep(8 if sys.argv[1] == "stopped" else 5)
        if sys.argv[1] == "stopped":
            os.kill(int(os.environ["STORE"]), signal.SIGCONT)
    ranks.barrier("to come late")
"""
# A torch that was built without torch.distributed, as far as Python sees.
WITHOUT = """
import importlib, importlib.abc, sys

class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch.distributed":
            import torch._C
            for part in ("_c10d_init", "_rpc_init", "_dist_autograd_init", "_faulty_agent_init"):
                if hasattr(torch._C, part):
                    delattr(torch._C, part)

sys.meta_path.insert(0, Without())
import torch
assert not torch.distributed.is_available()
for name in sys.argv[1:]:
    importlib.import_module(name)
import stablefield as sf
x0 = sf.LogNormal().sample(sf.VP(), 8)[:, None]
assert sf.Objective(sf.VP(), target=sf.DenoisingTarget(sf.VP()))(lambda x, s: x, x0).loss > 0
try:
    sf.ShardedPool(x0)
except ValueError as error:
    print(error)
"""
STORE = """
import sys, time
import torch.distributed as dist

store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
print("listening", flush=True)
time.sleep(120)
"""


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(server: Server, what: str) -> list[Fork]:
    """Start two processes as torchrun does it, and a third, which comes first, with the store."""
    port = free_port()
    store = server.start(STORE, [port], None, {})
    until = time.monotonic() + 60
    while "listening" not in store.stdout and time.monotonic() < until:
        time.sleep(0.01)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    group = {**place, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo", "STORE": str(store.pid)}
    return [store, *(server.start(LATE, [what], None, {**group, "RANK": str(rank)}) for rank in range(2))]


def test_one_process_exchanges_with_nobody() -> None:
    ranks, rows = Ranks(), torch.arange(6.0).reshape(3, 2)
    assert ranks.first
    assert ranks.share("abc") == ["a", "b", "c"]
    assert [part.tolist() for part in ranks.all_gather(rows, "to test")] == [rows.tolist()]
    assert ranks.all_gather_rows(rows, "to test").tolist() == rows.tolist()
    assert ranks.total(1.0, 2.0, purpose="to test") == [1, 2]
    assert ranks.all(True, "to test")
    assert not ranks.all(False, "to test")
    assert ranks.broadcast("word", "to test") == "word"
    assert ranks.own_device(torch.device("meta")).type == "meta"
    ranks.all_reduce(rows, "to test")
    with ranks.rank_0_first("to test"):
        ranks.barrier("to test")
    assert rows.sum() == 15


def test_the_core_works_where_torch_was_built_without_torch_distributed() -> None:
    core = ("targets", "diffusion", "networks", "sampling")
    names = [
        ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)
        for package in core
        for path in sorted((SOURCE / package).rglob("*.py"))
    ]
    assert len(names) > 20
    done = subprocess.run([sys.executable, "-c", WITHOUT, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch.distributed has no process group" in done.stdout


@pytest.fixture(scope="module")
def both(fork_server: Server) -> dict[str, list[str]]:
    """The reports of a rank that is late and of a store that is stopped, which are waited for together."""
    started = {what: start(fork_server, what) for what in ("late", "stopped")}
    try:
        for _, *ranks in started.values():
            assert [rank.wait() for rank in ranks] == [0, 0], [rank.stderr for rank in ranks]
    finally:
        for processes in started.values():
            for process in processes:
                process.kill()
    return {what: [rank.stdout for rank in ranks] for what, (_, *ranks) in started.items()}


@pytest.mark.slow
def test_a_rank_that_runs_and_comes_late_is_named_and_not_taken_for_stopped(both: dict[str, list[str]]) -> None:
    first, second = both["late"]
    host = re.escape(socket.gethostname())
    found = re.findall(
        rf"rank 0 of 2 has waited \d s for the others to come late: rank 1 \(process \d+ on {host}\) is running, and has "
        r"not got there yet\. It goes on waiting\.",
        first,
    )
    assert 1 <= len(found) <= 3, first
    assert re.search(r"rank 0 goes on after [56] s of waiting to come late\.", first)
    assert second == ""


@pytest.mark.slow
def test_a_wait_is_reported_although_the_store_does_not_answer(both: dict[str, list[str]]) -> None:
    first, _ = both["stopped"]
    assert "to come late: which of them is unknown, since the store" in first, first
    assert "rank 0 goes on after" in first


REPEATED = """
import torch.distributed as dist
from stablefield._distributed import Ranks, single_process
from stablefield.evaluation._evaluate import evaluate
from stablefield.evaluation._extractor import RawPixels
from stablefield.data._digits import open_digits

def measured():
    found = evaluate(
        open_digits().images[:40], data="digits", metrics=["frechet"], extractor=RawPixels((1, 8, 8)), cache=False
    )
    return found.scores[0].mean

first, second, third = measured(), measured(), measured()
assert first == second == third
assert Ranks.launched().world_size == 2
if Ranks.launched().first:
    with single_process():
        # As an observer of a training, which only this process calls.
        assert Ranks.launched().world_size == 1
        assert abs(measured() - first) < 1e-6 * first
Ranks.launched().barrier("to end")
"""


def test_several_calls_in_a_script_of_several_processes_share_their_group_and_one_may_be_of_one_process(
    fork_ranks: Callable[..., list[Fork]],
) -> None:
    """A group that is started again may meet the addresses of the one before."""
    ranks = fork_ranks(2, REPEATED)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr + ranks[1].stderr


def test_a_gpu_without_a_number_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from stablefield import _shapes

    monkeypatch.setattr(_shapes, "as_device", lambda _, device: torch.device(device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert _shapes.found_device("cuda") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert _shapes.found_device("cuda") == _shapes.found_device(None) == torch.device("cuda:3")


def test_a_comparison_by_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match=r"^compare runs in one process, and several were started: start it without torch"
    ):
        sf.compare("digits", out=tmp_path, device="cpu")
