"""Memory that a step has freed is there for the next one, without the system clearing it again."""

import sys
from collections.abc import Callable

import pytest

from forks import Fork

PROGRAM = """
import resource
import sys
import torch
from stablefield.training._allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        kept = [torch.ones(2**22) for _ in range(8)]  # a step of 8 activations of 17 MB
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
done = keep_freed_memory()
faults()
print(done, usual, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept(fork: Callable[..., Fork]) -> None:
    process = fork(PROGRAM)
    assert process.wait() == 0, process.stderr
    done, usual, kept = process.stdout.split()
    if done == "False":
        pytest.skip("another C library than glibc")
    assert int(kept) < 0.01 * int(usual)
