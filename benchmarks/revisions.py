"""Time of a target in two revisions of the library, in turn on one machine.

    python benchmarks/revisions.py 7723db5~1

REVISION is checked out beside the working tree. Each round starts a process for it and one for the working tree, in turn,
which time the same batches: uint8 references without labels, and with one label for all. All rows are at one noise level,
at which many references have weight. Writes results/revisions.json: the least milliseconds of each, and the median over
rounds of the ratio, new to old.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from record import write

import stablefield as sf

CASES = {"no labels": None, "one label": 1}
REFERENCES, DIM, BATCH, LEVEL, REPEATS = 50_000, 3072, 256, 20.0, 5
HERE = Path(__file__).resolve().parents[1]


def measure() -> dict[str, float]:
    """Milliseconds of the fastest of a few calls, for each case, with the library that is imported."""
    rng = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (REFERENCES, DIM), generator=rng, dtype=torch.uint8)
    index = torch.randint(0, REFERENCES, (BATCH,), generator=rng)
    x0 = data[index] / 127.5 - 1
    x_t = x0 + LEVEL * torch.randn(x0.shape, generator=rng)
    found: dict[str, float] = {}
    for name, labels in CASES.items():
        label = None if labels is None else torch.zeros(REFERENCES, dtype=torch.int64)
        pool = sf.Pool(data) if label is None else sf.Pool(data, labels=label)
        stable = sf.StableTarget(sf.EDM(), references=pool)
        times: list[float] = []
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            stable(x0, x_t, LEVEL, None if label is None else label[index], index)
            times.append(time.perf_counter() - start)
        found[name] = 1e3 * min(times[1:])
    return found


def measured(source: Path) -> dict[str, float]:
    """`measure` in a process of its own, with the library of a source folder."""
    done = subprocess.run(
        [sys.executable, __file__, "--one"],
        env={**os.environ, "PYTHONPATH": str(source)},
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", default="7723db5~1")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure()))
        return
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(HERE)]
        archive = subprocess.run([*git, "archive", given.revision, "src"], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        old = subprocess.run([*git, "rev-parse", given.revision], check=True, capture_output=True, text=True).stdout
        both: list[tuple[dict[str, float], dict[str, float]]] = []
        for _ in range(given.rounds):
            both.append((measured(Path(folder, "src")), measured(HERE / "src")))
            print(both[-1], flush=True)
    rows = [
        {
            "case": name,
            "old_ms": min(before[name] for before, _ in both),
            "new_ms": min(after[name] for _, after in both),
            "ratio": statistics.median(after[name] / before[name] for before, after in both),
        }
        for name in CASES
    ]
    for row in rows:
        print(row)
    shared = {"old": old.strip(), "references": REFERENCES, "dim": DIM, "batch": BATCH, "dtype": "uint8", "rows": rows}
    write("revisions", f"python benchmarks/revisions.py {given.revision} --rounds {given.rounds}", shared)


if __name__ == "__main__":
    main()
