"""What `stablefield compare` found on digits and on Fashion-MNIST: the ratio of STF to DSM against the noise level.

    python experiments/comparisons.py

Reads results/compare_digits.json and compare_fashion.json; each names the command that made it. Draws, for each seed's pair
of runs, the ratio of the squared distances to the exact posterior mean, with the spread over seeds.
"""

import statistics
from typing import Any

import torch
from common import draw, read, write

from stablefield.report import Line, LineChart

SETS = {"digits": "digits", "fashion": "Fashion-MNIST"}


def last(record: dict[str, Any], target: str) -> dict[int, dict[str, Any]]:
    """The scores at the end of training, by seed."""
    return {run["seed"]: run["scores"][-1] for run in record["runs"] if run["target"] == target}


def main() -> None:
    lines: list[Line] = []
    found: dict[str, Any] = {}
    for name, title in SETS.items():
        record = read(f"compare_{name}")
        levels = record["protocol"]["noise_levels"]
        stf, dsm = last(record, "stf"), last(record, "dsm")
        ratios = torch.tensor(
            [[a / b for a, b in zip(stf[s]["distance"], dsm[s]["distance"], strict=True)] for s in dsm]
        )
        lines.append(Line(label=title, x=levels, y=ratios.mean(0), low=ratios.min(0).values, high=ratios.max(0).values))
        gains = list(record["less_distance_to_the_optimum"].values())
        found[name] = {
            "command": record["command"],
            "seeds": sorted(dsm),
            "less_distance": {"mean": statistics.fmean(gains), "min": min(gains), "max": max(gains)},
            "frechet": {
                target: [scores[s]["frechet"] for s in sorted(scores)]
                for target, scores in (("dsm", dsm), ("stf", stf))
            },
            "gradient_variance_ratio": statistics.fmean(scores["gradient_ratio"] for scores in stf.values()),
        }
        print(f"{title}: {statistics.fmean(gains):.1%} less distance at noise levels 1.5 to 5")
    equal = Line(label="equal", x=levels, y=[1.0] * len(levels), reference=True)
    chart = LineChart(
        lines=(*lines, equal),
        x_label="noise level sigma / alpha",
        y_label="squared distance to the optimum, STF / DSM",
        log_x=True,
    )
    write("comparisons", "python experiments/comparisons.py", {"comparisons": found})
    draw({"comparisons": chart})


if __name__ == "__main__":
    main()
