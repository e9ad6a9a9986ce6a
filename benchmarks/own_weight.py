"""Own weight and variance removed against noise level on CIFAR-10: the table in the README.

    python benchmarks/own_weight.py CIFAR_FOLDER     ->  benchmarks/results/own_weight.json

CIFAR_FOLDER holds data_batch_1.bin to data_batch_5.bin. 512 rows per noise level, each made from a random image; for n
below 50,000 the references are the rows' own images and others drawn without replacement.
"""

import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

import stablefield as sf
from stablefield._commit import running_commit

LEVELS = (1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)
SIZES = (1024, 4096, 50_000)
ROWS = 512


def main(folder: Path) -> None:
    files = [np.fromfile(folder / f"data_batch_{k}.bin", np.uint8).reshape(-1, 3073)[:, 1:] for k in range(1, 6)]
    images = torch.from_numpy(np.concatenate(files).reshape(-1, 3, 32, 32))
    rows = []
    for level in LEVELS:
        row: dict[str, object] = {"noise_level": level}
        for size in SIZES:
            generator = torch.Generator().manual_seed(0)
            index = torch.randperm(len(images), generator=generator)[:ROWS]
            x0 = images[index].float() / 127.5 - 1
            x_t = sf.EDM().perturb(x0, level, generator=generator)
            pool = sf.Pool(images, None if size == len(images) else size)
            target = sf.StableTarget(sf.EDM(), references=pool)(x0, x_t, level, index=index, generator=generator)
            weight = target.source_weight
            row[f"own_weight_{size}"] = float(weight.mean())
            row[f"own_weight_{size}_standard_error"] = float(weight.std() / ROWS**0.5)
            row[f"variance_removed_{size}"] = float(target.variance.mean())
        rows.append(row)
        print(f"noise level {level:g}: source weight {row['own_weight_50000']:.4f} among all images")
    record = {
        "command": "python benchmarks/own_weight.py CIFAR_FOLDER",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": running_commit(),
        "rows_per_level": ROWS,
        "levels": rows,
    }
    (Path(__file__).parent / "results" / "own_weight.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
