"""What `stablefield train DATA --time 10m` makes of its time, with networks of several widths.

    python benchmarks/time_budget.py fashion-mnist --time 10m --widths 16 32 64
    python benchmarks/time_budget.py cifar-10 --time 10m --widths 8 16 32 --out time_budget_cifar10

Each DATA is trained once with each width of the recipe's U-Net, by the command itself, in a process of its own, one after
the other: leave the machine alone meanwhile. Seconds are those of the whole command. The samples, 1,000 of the averaged
weights by Heun's method with 18 steps, are measured by the Frechet distance of the averages of squares of 4 x 4
pixels to all the images. The same distance of 1,000 of the images is about the best that a model can reach.

Rows are written to results/time_budget.json after each training; those that the file has are kept. --pictures FOLDER keeps
the grid of each run's last picture.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from record import RESULTS, write

import stablefield as sf
from stablefield.data import ImageSet, open_images
from stablefield.evaluation._features import Gaussian, fit_features
from stablefield.evaluation._fid import distance_between

BLOCK, SAMPLES = 4, 1000


def averages(images: NDArray[np.uint8]) -> torch.Tensor:
    """Averages of the squares of BLOCK x BLOCK pixels, in [0, 1], float64 (n, d)."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).float() / 255
    return torch.nn.functional.avg_pool2d(pixels, BLOCK).flatten(1).double()


def fitted(images: NDArray[np.uint8]) -> Gaussian:
    return fit_features(averages(images))


def trained(data: str, name: str, width: int, given: str, folder: Path) -> tuple[sf.Run, float]:
    """A run with the time that is given, and the seconds that the command took."""
    flags = ["--time", given, "--network.base-channels", str(width), "--out", str(folder)]
    command = [sys.executable, "-m", "stablefield", "train", data, *flags]
    print(f"{name}, width {width}: {shlex.join(command[2:])}", flush=True)
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return sf.Run(folder), time.monotonic() - started


def measured(run: sf.Run, images: ImageSet, whole: Gaussian) -> float:
    drawn = run.sample(SAMPLES, device="cpu")
    assert drawn.images.shape[1:] == images.shape
    return distance_between(fitted(drawn.images), whole).value


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", nargs="+")
    parser.add_argument("--time", default="10m")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--pictures", type=Path, help="folder for the pictures")
    parser.add_argument("--out", default="time_budget", help="name of the file in results/")
    given = parser.parse_args()
    path = RESULTS / f"{given.out}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
    names = [Path(data).name for data in given.data]
    command = f"python benchmarks/time_budget.py {shlex.join(names)} --time {given.time} --widths "
    command += " ".join(map(str, given.widths))
    for data, name in zip(given.data, names, strict=True):
        images = open_images(data)
        whole = fitted(np.asarray(images.images))
        some = np.random.default_rng(0).permutation(len(images))[:SAMPLES]
        floor = distance_between(fitted(np.asarray(images.images)[some]), whole).value
        for width in given.widths:
            if any((row["data"], row["width"], row["time"]) == (name, width, given.time) for row in rows):
                continue
            with tempfile.TemporaryDirectory() as folder:
                run, seconds = trained(data, name, width, given.time, Path(folder, "run"))
                recipe = run.config.recipe
                row = {
                    "data": name,
                    "width": width,
                    "time": given.time,
                    "seconds": seconds,
                    "steps": run.step,
                    "batch": recipe.batch,
                    "parameters": sum(p.numel() for p in run.model().denoiser.parameters()),
                    "distance": measured(run, images, whole),
                    "distance_of_real_images": floor,
                }
                if given.pictures is not None:
                    given.pictures.mkdir(parents=True, exist_ok=True)
                    grids = sorted(Path(folder, "run", "samples").glob("*.png"))
                    shutil.copy(grids[-1], given.pictures / f"{name}-{width}.png")
            rows.append(row)
            print(f"  {seconds:.0f} s, {row['steps']:,} steps, distance {row['distance']:.3f}", flush=True)
            write(given.out, command, {"rows": rows})


if __name__ == "__main__":
    main()
