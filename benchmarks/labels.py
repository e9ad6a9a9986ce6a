"""Time of a target whose rows have labels: with the references of their label, and with all, of which others are masked out.

    python benchmarks/labels.py

Both are measured in turn in one process, on the same batch: random references, all rows with a label, one noise level, at
which many references have weight. Writes results/labels.json: milliseconds, the ratio, the largest difference, and the time
in which the processor can read the references once. A batch with rows of nearly all labels needs at least that time, so
`masked_ms` over `read_ms` bounds the ratio.
"""

import argparse
import statistics
import time
from itertools import product
from typing import Any
from unittest import mock

import torch
from record import write

import stablefield as sf
from stablefield.targets._engine.label_index import LabelIndex

CASES = (
    (50_000, 3072, 100, "float32"),
    (50_000, 3072, 100, "uint8"),
    (50_000, 3072, 1, "uint8"),
    (100_000, 64, 1000, "float32"),
)
BATCH, LEVEL = 256, 20.0


def measure(n: int, dim: int, labels: int, dtype: str, in_order: bool, pairs: int) -> dict[str, Any]:
    """One case; `in_order` has the references sorted by label."""
    rng = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (n, dim), generator=rng, dtype=torch.uint8)
    data = data if dtype == "uint8" else data / 127.5 - 1
    label = torch.randint(0, labels, (n,), generator=rng)
    label = label.sort().values if in_order else label
    index = torch.randint(0, n, (BATCH,), generator=rng)
    x0 = data[index] / 127.5 - 1 if dtype == "uint8" else data[index]
    x_t = x0 + LEVEL * torch.randn(x0.shape, generator=rng)
    stable = sf.StableTarget(sf.EDM(), references=sf.Pool(data, labels=label))

    def timed() -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        found = stable(x0, x_t, LEVEL, label[index], index).x0
        return time.perf_counter() - start, found

    def masked() -> tuple[float, torch.Tensor]:
        with mock.patch.object(LabelIndex, "parts", return_value=None):
            return timed()

    def read() -> float:
        """Time to read the references, as integers of 32 bits, with no work but their largest value."""
        start = time.perf_counter()
        data.view(torch.int32).amax()
        return time.perf_counter() - start

    gap = float((timed()[1] - masked()[1]).abs().max())
    both = [(timed()[0], masked()[0]) for _ in range(pairs)]
    return {
        "references": n,
        "dim": dim,
        "labels": labels,
        "dtype": dtype,
        "sorted": in_order,
        "batch": BATCH,
        "by_label_ms": 1e3 * min(a for a, _ in both),
        "masked_ms": 1e3 * min(b for _, b in both),
        "read_ms": 1e3 * min(read() for _ in range(pairs)),
        "ratio": statistics.median(b / a for a, b in both),
        "gap": gap,
    }


def main() -> None:
    """Measure all cases and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    rows = [measure(*case, in_order, options.pairs) for case, in_order in product(CASES, (False, True))]
    for row in rows:
        print(row)
    write("labels", "python benchmarks/labels.py", {"rows": rows})


if __name__ == "__main__":
    main()
