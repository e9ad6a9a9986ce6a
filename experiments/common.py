"""Shared by the experiments: the two-Gaussian toy data, and results with a record of how they were made."""

import datetime as dt
import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stablefield
from stablefield.report import LineChart, write_chart

__all__ = ["ASSETS", "draw", "read", "two_gaussians", "write"]

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parent / "figures"
ASSETS = Path(__file__).parents[1] / "docs/assets"


def two_gaussians(n: int = 4096, seed: int = 0) -> Tensor:
    """N samples of an equal mixture of N(+0.25, 0.1^2 I) and N(-0.25, 0.1^2 I) in R^64."""
    generator = torch.Generator().manual_seed(seed)
    side = torch.randint(0, 2, (n, 1), generator=generator) * 2.0 - 1
    return 0.25 * side + 0.1 * torch.randn(n, 64, generator=generator)


def read(name: str) -> dict[str, Any]:
    """What `write` wrote as results/NAME.json."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def write(name: str, command: str, values: dict[str, Any]) -> None:
    """Write results/NAME.json, and print its path."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    record = {
        "command": command,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "stablefield": stablefield.__version__,
        "torch": torch.__version__,
        "commit": commit,
        **values,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"experiments/results/{name}.json")


def draw(charts: dict[str, LineChart]) -> None:
    """Write figures/NAME.png for each chart, and its copy in docs/assets if the site shows it; say where they are."""
    for name, chart in charts.items():
        figure = write_chart(chart, FIGURES / f"{name}.png")
        print(f"experiments/figures/{name}.png")
        if (ASSETS / figure.name).exists():
            shutil.copy(figure, ASSETS)
            print(f"docs/assets/{name}.png")
