"""Free memory is what the system says, within the limits of the control groups around the process."""

from pathlib import Path

import pytest
import torch

from stablefield._memory import free_bytes

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


def test_a_group_that_does_not_tell_of_its_files_still_has_its_limit(tmp_path: Path) -> None:
    files = group("sys/fs/cgroup", 6 * MIB, 4 * MIB, MIB)
    del files["sys/fs/cgroup/memory.stat"]
    assert free_bytes(CPU, system(tmp_path, files)) == 2 * MIB  # nor which groups there are


def test_no_more_is_left_than_the_limit(tmp_path: Path) -> None:
    files = {**group("sys/fs/cgroup", 6 * MIB, 4 * MIB, 4 * MIB), "sys/fs/cgroup/memory.current": "1\n"}
    assert free_bytes(CPU, system(tmp_path, files)) == 6 * MIB


def test_the_limit_from_which_a_group_is_slowed_down_counts(tmp_path: Path) -> None:
    files = {**group("sys/fs/cgroup", 6 * MIB, 2 * MIB, 0), "sys/fs/cgroup/memory.high": f"{3 * MIB}\n"}
    assert free_bytes(CPU, system(tmp_path, files)) == MIB


def test_groups_of_the_second_version_beside_the_first_count(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "1:name=systemd:/\n0::/job\n",
        **group("sys/fs/cgroup/unified/job", 6 * MIB, 4 * MIB, 0),
    }
    assert free_bytes(CPU, system(tmp_path, files)) == 2 * MIB


def test_what_cannot_be_understood_is_passed_over(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": "MemAvailable:\nMemAvailable: 8192 kB\n",
        "proc/self/cgroup": "\n3\n4:name=systemd:/jöb:1\n0::/a:b\n",
        **group("sys/fs/cgroup/a:b", 6 * MIB, 4 * MIB, 0),
        "sys/fs/cgroup/memory.max": "plenty\n",
    }
    assert free_bytes(CPU, system(tmp_path, files)) == 2 * MIB
