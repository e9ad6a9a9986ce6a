"""On a device that Python has to wait for: the same numbers, no mixture of devices, and known, few waits.

No GPU is needed: `far.py` is a device written in Python that counts what a GPU would be waited for. What a GPU computes, and
how fast, only a GPU tells: `pytest -m gpu` and benchmarks/gpu.py.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from names import LAUNCHES, SAMPLERS, STEPS, TARGETS
from torch.utils import backend_registration

from forks import Server

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)
STATIC = [kind for kind in TARGETS if kind != "drawn"]


@pytest.fixture(scope="module")
def seen(fork_server: Server) -> dict[str, dict[str, Any]]:
    # Torch knows one device written in Python per process, and keeps its name: it has a process of its own.
    process = fork_server.start_file(Path(__file__).with_name("scenarios.py"), [])
    assert process.wait(300) == 0, process.stderr[-3000:]
    return json.loads(process.stdout)


def looks(waits: dict[str, int]) -> int:
    return sum(count for name, count in waits.items() if name.startswith("look"))


def copies(waits: dict[str, int], where: str = "") -> int:
    return sum(count for name, count in waits.items() if name.startswith(f"copy {where}"))


@pytest.mark.slow
def test_the_device_counts_what_waits_and_refuses_what_a_gpu_refuses(seen: dict[str, dict[str, Any]]) -> None:
    assert seen["device"] == {
        "sum": {},
        "item": {"look: _local_scalar_dense": 1},
        "bool": {"look: _local_scalar_dense": 1},
        "mask": {"look: index": 1},
        "byte mask": {"look: index": 1},
        "put by mask": {"look: index_put": 1},
        "nonzero": {"look: nonzero": 1},
        "equal": {"look: equal": 1},
        "allclose": {"look: allclose": 1},
        "masked_select": {"look: masked_select": 1},
        "unique": {"look: _unique2": 1},
        "unique rows": {"look: unique_dim": 1},
        "repeat_interleave": {"look: repeat_interleave": 1},
        "bincount": {"look: bincount": 1},
        "histc": {"look: histc": 1},
        "multinomial": {"look: multinomial": 1},
        "inv": {"look: linalg_inv_ex": 1},
        "cholesky": {"look: linalg_cholesky_ex": 1},
        "eigh": {"look: _linalg_eigh": 1},
        "solve": {"look: _linalg_solve_ex": 1},
        "svd": {"look: _linalg_svd": 1},
        "to near": {"copy to near": 1},
        "to far": {"copy to far": 1},
        "of numbers": {"copy to far": 1},
        "two devices": "add: operands on two devices",
        "two generators": "normal: a generator of another device",
    }


@pytest.mark.parametrize("kind", TARGETS)
def test_targets_there_are_those_of_the_cpu(seen: dict[str, dict[str, Any]], kind: str) -> None:
    # Paths differ: a CPU is asked which rows need what, the others compute it for all.
    assert seen["targets"][kind]["gap"] < 5e-5
    assert seen["targets"][kind]["waits of views"] == {}


@pytest.mark.parametrize("kind", TARGETS)
def test_no_chunk_is_waited_for(seen: dict[str, dict[str, Any]], kind: str) -> None:
    one, few, many = (seen["targets"][kind]["waits"][size] for size in ("300", "100", "30"))
    assert one == few == many  # of 1, 3 and 10 chunks
    assert (looks(one) + copies(one), copies(one)) == (TARGETS[kind], 1)


@pytest.mark.parametrize("kind", LAUNCHES)
def test_a_call_launches_few_operations(seen: dict[str, dict[str, Any]], kind: str) -> None:
    assert 20 < seen["targets"][kind]["launches"] <= LAUNCHES[kind]


def test_rows_with_labels_met_the_references_of_their_label(seen: dict[str, dict[str, Any]]) -> None:
    # Five products and the rest, where "groups" has one that is masked.
    assert seen["targets"]["by label"]["launches"] > 2 * seen["targets"]["groups"]["launches"]


@pytest.mark.parametrize("kind", ["array", "host"])
def test_a_pool_in_a_file_or_in_the_hosts_memory_is_copied_chunk_by_chunk(
    kind: str, seen: dict[str, dict[str, Any]]
) -> None:
    plain, found = seen["targets"]["pool"]["waits"], seen["targets"][kind]
    for size, chunks in (("300", 1), ("100", 3), ("30", 10)):
        # Of each chunk; and of the samples themselves, whose places the file's owner has to know.
        assert found["waits"][size] == {**plain[size], "copy to far": chunks + 1, "copy to near": 2}
    assert found["gap"] < 5e-5


def test_a_pool_in_a_file_is_sent_ahead_to_a_gpu(seen: dict[str, dict[str, Any]]) -> None:
    plain, found = seen["targets"]["pool"]["waits"], seen["staged"]
    for size in ("300", "100", "30"):
        # Of the samples themselves; no chunk.
        assert found["waits"][size] == {**plain[size], "copy to far": 1, "copy to near": 2}
    assert found["same waits"]
    assert max(found["gap"], found["gap of small pages"]) < 5e-5
    # Of 1, 3 and 10 chunks, twice, and of a pass for the norms each; of pages of 7 samples, 43 for each pass.
    assert found["pages"] > 2 * (1 + 3 + 10) + 9 * 43
    assert found["sent"]
    assert found["most"] == 2  # copies of a pass that are under way at a time


@pytest.mark.parametrize("kind", STATIC)
def test_what_is_compiled_or_captured_waits_for_nothing(seen: dict[str, dict[str, Any]], kind: str) -> None:
    assert seen["static"][kind]["waits"] == {}
    assert seen["static"][kind]["gap"] < 5e-5


@pytest.mark.parametrize("name", STEPS)
def test_training_there_has_the_losses_of_the_cpu(seen: dict[str, dict[str, Any]], name: str) -> None:
    assert seen["steps"][name]["losses"] == pytest.approx(seen["steps"][name]["truth"], rel=1e-5)


@pytest.mark.parametrize("name", STEPS)
def test_once_its_network_runs_a_step_waits_for_nothing(seen: dict[str, dict[str, Any]], name: str) -> None:
    # Nor do backward pass, clipping, optimiser, averages and what is added up for reports; only a further part of a batch.
    for waits, before in zip(seen["steps"][name]["waits"], seen["steps"][name]["before the network"], strict=True):
        assert len(before) == (2 if name == "accumulated" else 1)
        assert Counter(waits) == Counter(before[-1])


@pytest.mark.parametrize("name", STEPS)
def test_the_waits_of_a_step_are_few_and_do_not_grow(seen: dict[str, dict[str, Any]], name: str) -> None:
    first, *later = seen["steps"][name]["waits"]
    assert later == [later[0]] * 3
    assert (looks(later[0]), copies(later[0], "to far"), copies(later[0], "to near")) == STEPS[name]
    # Norms, once; and the labels of the samples, of their classes, and in order.
    assert sum(first.values()) <= sum(later[0].values()) + (4 if name == "conditional" else 1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_waits_once_for_each_evaluation(seen: dict[str, dict[str, Any]], name: str) -> None:
    few, many = (seen["samplers"][name][steps] for steps in ("3", "7"))
    assert looks(many) - looks(few) == 4 * SAMPLERS[name]
    assert copies(many) == copies(few) == 0
    assert seen["samplers"][name]["gap"] < 1e-5


def test_the_benchmark_for_gpus_runs_there(seen: dict[str, dict[str, Any]]) -> None:
    found = seen["gpu benchmark"]
    assert found["accuracy"] < 1e-4
    assert (found["cost"], found["throughput"], found["proof"]) == (2, 6, ["dsm", "stf"])
    assert 0 < found["sanity"] < 1
