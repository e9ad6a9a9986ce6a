"""Time and memory of a target over latents by label in a memory map, beside a bank of 256 latents per label.

    python benchmarks/latents.py                         # 1,280,000 latents of 4,096 numbers, 1,000 labels: 10.5 GB
    python benchmarks/latents.py --counts 20000 40000    # smaller maps

Makes a float16 map of random latents (a centre for each label and noise) in a temporary folder, and takes batches of 256 at
flow matching's uniform times, of which a tenth have no label. Measures, in turn in one process:

- labelled: the rows with a label, over all latents of their label, from the noise band on;
- bank: the same rows by differences from a bank of 256 latents of their label, as StableVM has it (arXiv 2602.05435): those
  of the band, those from time 0.5 on, where StableVM begins, and all;
- the tenth without a label, over a random subset and over all latents;
- labelled rows at times from 0.9, which all use references.

Memory is what the process holds itself, without the pages of the map. Writes results/latents.json.
"""

import argparse
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from record import write
from torch import Tensor

import stablefield as sf

BATCH, BANK, UNLABELLED, SUBSET = 256, 256, 26, 4096
Work = Callable[[], object]


def make_map(path: Path, n: int, dim: int, labels: int) -> NDArray[np.float16]:
    """A float16 map of n latents, sample i with label i mod `labels`."""
    rng = torch.Generator().manual_seed(0)
    made = np.lib.format.open_memmap(path, "w+", np.float16, (n, dim))
    centres = 0.5 * torch.randn(labels, dim, generator=rng)
    noise = torch.randn(2 * labels, dim, generator=rng)
    for number, start in enumerate(range(0, n, labels)):
        count = min(labels, n - start)
        shift = int(torch.randint(labels, (), generator=rng))
        block = centres[:count] + noise[shift : shift + count].roll(number % dim, 1)
        made[start : start + count] = block.half().numpy()
    made.flush()
    return np.load(path, mmap_mode="r")


def bank_means(x_t: Tensor, alpha: Tensor, sigma: Tensor, x0: Tensor, bank: Tensor, label: Tensor) -> Tensor:
    """The mean over each row's bank (labels, 256, d) and the row's own, label by label, from differences of b x 257 x d."""
    mean = torch.empty_like(x_t)
    for one in label.unique().tolist():
        rows = (label == one).nonzero()[:, 0]
        references = torch.cat([bank[one].float().expand(len(rows), -1, -1), x0[rows, None]], 1)
        gaps = x_t[rows, None] - alpha[rows, None, None] * references
        logits = -gaps.square().sum(2) / (2 * sigma[rows, None] ** 2)
        mean[rows] = (torch.softmax(logits, 1)[:, :, None] * references).sum(1)
    return mean


def held() -> int:
    """Bytes of memory of this process that are not pages of files."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def peak_of(work: Work) -> int:
    """Bytes that `work` holds at most, beyond what the process held before."""
    before, peak, ended = held(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.002):
            peak = max(peak, held() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        ended.set()
        watcher.join()
    return peak


def times_in_turn(works: dict[str, Work], rounds: int) -> dict[str, float]:
    """Median seconds of each, measured in turn."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            found[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in found.items()}


def measure(path: Path, n: int, dim: int, labels: int, rounds: int) -> dict[str, Any]:
    """All measurements on one map."""
    latents = make_map(path, n, dim, labels)
    label = torch.arange(n) % labels
    process, rng = sf.RectifiedFlow(), torch.Generator().manual_seed(1)
    began = time.perf_counter()
    found = sf.pick_noise_band(sf.Pool(latents))  # over all labels: lower, so that more rows use references
    probed = time.perf_counter() - began

    index = torch.randint(n, (BATCH,), generator=rng)
    x0 = torch.from_numpy(latents[index.numpy()]).float()
    t = torch.rand(BATCH, generator=rng)
    x_t = process.perturb(x0, t, generator=rng)
    seen = label[index].clone()
    seen[:UNLABELLED] = -1
    late = 0.9 + 0.1 * t
    x_late = process.perturb(x0, late, generator=rng)
    few = sf.StableTarget(
        process,
        references=sf.Pool(latents, labels=label, unlabelled_size=SUBSET),
        noise_band=found.level,
        validate_args=False,
    )
    whole = sf.StableTarget(
        process, references=sf.Pool(latents, labels=label), noise_band=found.level, validate_args=False
    )
    bank = torch.from_numpy(np.stack([latents[k::labels][:BANK] for k in range(labels)]))
    alpha, sigma = process.alpha(t), process.sigma(t)
    named = torch.arange(UNLABELLED, BATCH)
    inside, half = named[(sigma / alpha >= found.level)[named]], named[(t >= 0.5)[named]]

    def call(target: sf.StableTarget, rows: Tensor, x: Tensor, time_of: Tensor) -> Work:
        def work() -> object:
            return target(x0[rows], x[rows], time_of[rows], seen[rows], index[rows])

        return work

    def from_bank(rows: Tensor, x: Tensor, time_of: Tensor) -> Work:
        def work() -> object:
            a, s = process.alpha(time_of[rows]), process.sigma(time_of[rows])
            return bank_means(x[rows], a, s, x0[rows], bank, label[index[rows]])

        return work

    began = time.perf_counter()
    first = peak_of(call(few, torch.arange(BATCH), x_t, t))  # norms and labels of all latents, once
    preparation = time.perf_counter() - began
    every = torch.arange(BATCH)
    works = {
        "labelled": call(few, named, x_t, t),
        "bank_in_band": from_bank(inside, x_t, t),
        "bank_from_half": from_bank(half, x_t, t),
        "bank_all_rows": from_bank(named, x_t, t),
        "batch_with_subset": call(few, every, x_t, t),
        "labelled_late": call(few, named, x_late, late),
        "bank_late": from_bank(named, x_late, late),
    }
    for work in works.values():
        work()
    seconds = times_in_turn(works, rounds)
    # All latents for rows without a label: once, since each pass reads the whole map.
    call(whole, named, x_t, t)()  # norms
    peaks = {name: peak_of(works[name]) for name in ("labelled", "batch_with_subset", "bank_in_band", "labelled_late")}
    started = time.perf_counter()
    peaks["batch_with_all"] = peak_of(call(whole, every, x_t, t))
    seconds["batch_with_all"] = time.perf_counter() - started
    return {
        "references": n,
        "dim": dim,
        "labels": labels,
        "batch": BATCH,
        "unlabelled": UNLABELLED,
        "unlabelled_size": SUBSET,
        "bank": bank.shape[1],
        "band": found.level,
        "rows_in_band": int((sigma / alpha >= found.level).sum()),
        "labelled_rows_in_band": len(inside),
        "labelled_rows_from_half": len(half),
        "seconds": seconds,
        "probe_seconds": probed,
        "first_call_seconds": preparation,
        "first_call_mb": first / 1e6,
        "peak_mb": {name: peak / 1e6 for name, peak in peaks.items()},
    }


def main() -> None:
    """Measure maps of all sizes and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[160_000, 320_000, 640_000, 1_280_000])
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--labels", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to make the maps; a temporary folder if not given")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for n in options.counts:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            need = 2 * n * options.dim
            if shutil.disk_usage(folder).free < 1.1 * need:
                print(f"{n:,} latents take {need / 1e9:.1f} GB, more than is free in {folder}: left out")
                continue
            rows.append(measure(Path(folder, "latents.npy"), n, options.dim, options.labels, options.rounds))
            print(rows[-1], flush=True)
    write("latents", "python benchmarks/latents.py", {"rows": rows})


if __name__ == "__main__":
    main()
