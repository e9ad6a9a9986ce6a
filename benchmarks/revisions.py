"""Time of a target in two revisions of the library, in turn on one machine.

    python benchmarks/revisions.py 7723db5~1

REVISION is checked out beside the working tree. Two processes, one with it and one with the working tree, time the same
batches in turn, a call each: uint8 references without labels, and with one label for all. All rows are at one noise level,
at which many references have weight. Writes results/revisions.json: the least milliseconds of each, and the median over
pairs of calls of the ratio, new to old, with its quartiles.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import write

import stablefield as sf

CASES = ("no labels", "one label")
REFERENCES, DIM, BATCH, LEVEL = 50_000, 3072, 256, 20.0
HERE = Path(__file__).resolve().parents[1]


def serve() -> None:
    """For each line of the input, the name of a case, print the seconds of a call with the library that is imported."""
    rng = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (REFERENCES, DIM), generator=rng, dtype=torch.uint8)
    index = torch.randint(0, REFERENCES, (BATCH,), generator=rng)
    x0 = data[index] / 127.5 - 1
    x_t = x0 + LEVEL * torch.randn(x0.shape, generator=rng)
    label = torch.zeros(REFERENCES, dtype=torch.int64)
    pools = {"no labels": sf.Pool(data), "one label": sf.Pool(data, labels=label)}
    targets = {name: sf.StableTarget(sf.EDM(), references=pool) for name, pool in pools.items()}
    for line in sys.stdin:
        name = line.strip()
        labels = label[index] if name == "one label" else None
        start = time.perf_counter()
        targets[name](x0, x_t, LEVEL, labels, index)
        print(time.perf_counter() - start, flush=True)


class Library:
    """A process with the library of a source folder."""

    def __init__(self, source: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env={**os.environ, "PYTHONPATH": str(source)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, case: str) -> float:
        """Seconds of one call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(case, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", default="7723db5~1")
    parser.add_argument("--pairs", type=int, default=31)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve()
        return
    git = ["git", "-C", str(HERE)]
    commit = subprocess.run([*git, "rev-parse", given.revision], check=True, capture_output=True, text=True).stdout
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run([*git, "archive", given.revision, "src"], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        old, new = Library(Path(folder, "src")), Library(HERE / "src")
        for case in CASES:
            old.seconds(case), new.seconds(case)  # what a first call prepares
            both = [(old.seconds(case), new.seconds(case)) for _ in range(given.pairs)]
            low, middle, high = statistics.quantiles(after / before for before, after in both)
            rows.append(
                {
                    "case": case,
                    "old_ms": 1e3 * min(before for before, _ in both),
                    "new_ms": 1e3 * min(after for _, after in both),
                    "ratio": middle,
                    "quartiles": (low, high),
                }
            )
            print(rows[-1], flush=True)
        old.close(), new.close()
    shared = {
        "old": commit.strip(),
        "references": REFERENCES,
        "dim": DIM,
        "batch": BATCH,
        "dtype": "uint8",
        "rows": rows,
    }
    write("revisions", f"python benchmarks/revisions.py {given.revision} --pairs {given.pairs}", shared)


if __name__ == "__main__":
    main()
