"""Free memory is what the system says, within the limits of the control groups around the process."""

from pathlib import Path

import pytest
import torch

from stablefield.memory import free_bytes

CPU = torch.device("cpu")
MIB = 2**20


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8192 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(folder: str, limit: int | str, used: int, cache: int) -> dict[str, str]:
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon {used - cache}\nfile {cache}\ninactive_file {cache}\n",
    }


def test_this_system_tells() -> None:
    assert 10 * MIB < free_bytes(CPU) < 10**14


def test_without_groups_it_is_what_the_system_calls_available(tmp_path: Path) -> None:
    assert free_bytes(CPU, system(tmp_path, {})) == 8 * MIB


def test_a_system_that_does_not_say_leaves_half_of_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert free_bytes(CPU, tmp_path) == 2_048_000


def test_a_system_that_says_nothing_leaves_4_gb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sysconf")
    assert free_bytes(CPU, tmp_path) == 2**32


@pytest.mark.parametrize(
    ("own", "around", "expected"),
    [
        (("max", 5 * MIB, 0), ("max", 9 * MIB, 0), 8 * MIB),
        ((6 * MIB, 4 * MIB, 0), ("max", 9 * MIB, 0), 2 * MIB),
        # Files that were read are used memory that gives way.
        ((6 * MIB, 5 * MIB, 3 * MIB), ("max", 9 * MIB, 0), 4 * MIB),
        ((6 * MIB, 2 * MIB, 0), (10 * MIB, 9 * MIB, 0), 1 * MIB),
        ((2 * MIB, 3 * MIB, 0), ("max", 9 * MIB, 0), 0),
    ],
    ids=["no limit", "its own", "cached files", "that of the group around", "exceeded"],
)
def test_the_limit_of_a_control_group_counts(
    tmp_path: Path, own: tuple[int | str, int, int], around: tuple[int | str, int, int], expected: int
) -> None:
    files = {
        "proc/self/cgroup": "0::/batch/job\n",
        **group("sys/fs/cgroup/batch/job", *own),
        **group("sys/fs/cgroup/batch", *around),
    }
    assert free_bytes(CPU, system(tmp_path, files)) == expected


def test_in_a_container_the_path_may_be_that_of_the_host(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/docker/abc\n", **group("sys/fs/cgroup", 6 * MIB, 4 * MIB, MIB)}
    assert free_bytes(CPU, system(tmp_path, files)) == 3 * MIB


def test_control_groups_of_the_first_version_count(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory"
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n",
        f"{folder}/memory.limit_in_bytes": "9223372036854771712\n",
        f"{folder}/memory.usage_in_bytes": f"{9 * MIB}\n",
        f"{folder}/memory.stat": "inactive_file 0\ntotal_inactive_file 0\n",
        f"{folder}/job/memory.limit_in_bytes": f"{6 * MIB}\n",
        f"{folder}/job/memory.usage_in_bytes": f"{5 * MIB}\n",
        f"{folder}/job/memory.stat": f"inactive_file 0\ntotal_inactive_file {2 * MIB}\n",
    }
    assert free_bytes(CPU, system(tmp_path, files)) == 3 * MIB
