"""Does a loss rank the checkpoints of a training as the quality of their samples does?

    pip install scipy
    python benchmarks/ranking.py digits --steps 6000 --checkpoints 20 --out ranking_digits

DATA, networks, runners and samplers are those of race.py. One training per runner, of a given number of steps; at each
checkpoint, evenly spaced, three numbers:

- the loss as a log shows it: the mean over the last `--window` steps;
- the excess: `ExcessLoss` of the averaged weights, its distance to the exact posterior mean, with its standard error; for
  all runners with EDM's noise levels and weighting, and the same rows;
- the Frechet distance of samples of the averaged weights to the data, as in race.py.

Spearman's rank correlation of each with the third is printed for each runner, for the second half of its checkpoints (with
20 or more), and for all runners together. Values near 1 mean that a lower loss is a better model. Between runners the logged
losses have different targets, so their ranks need not mean anything; that is a part of the question.

Runners whose rows the file has already are not trained again; delete it to start anew.
"""

import argparse
import json
import sys
from typing import Any

import numpy as np
import race
import runners
import torch
from record import RESULTS, write
from scipy.stats import spearmanr
from torch import Generator, Tensor, nn

import stablefield as sf
from stablefield.evaluation._fid import distance_between
from stablefield.probing import Excess
from stablefield.sampling._seeded_images import to_uint8
from stablefield.training._ema import follower, update_ema

Row = dict[str, Any]
FEW = 20
"""Checkpoints of a training from which on its second half has enough of them for ranks."""


def frechet(runner: runners.Runner, network: nn.Module, data: Tensor, setting: race.Setting, evaluations: int) -> float:
    """The Frechet distance of samples to the data, from the same noise for every network."""
    noise = torch.randn(setting.samples, *data.shape[1:], generator=Generator().manual_seed(1000))
    with torch.no_grad():
        images = torch.cat([runner.sample(network, part, evaluations)[0] for part in noise.split(setting.chunk)])
    drawn = race.gaussian_of(to_uint8(images), setting.block)
    return distance_between(drawn, race.gaussian_of(data, setting.block)).value


def checkpoint(found: Excess) -> Row:
    distance, difference = found.total("distance"), found.total("loss_minus_floor")
    return {
        "excess": distance.value,
        "excess_se": distance.error,
        "loss_minus_floor": difference.value,
        "loss_minus_floor_se": difference.error,
        "loss_at_fixed_noise": found.total("loss").value,
    }


def train(name: str, data: Tensor, setting: race.Setting, excess: sf.ExcessLoss, args: argparse.Namespace) -> list[Row]:
    """One training, and a row at each of its checkpoints."""
    generator = Generator().manual_seed(args.seed)
    network = setting.network(tuple(data.shape[1:]), Generator().manual_seed(args.seed))
    average, optimizer = follower(network), race.adam(network, setting)
    runner = race.runner_of(name, data, setting, generator)
    torch.manual_seed(args.seed)
    wanted = {round(args.steps * (k + 1) / args.checkpoints) for k in range(args.checkpoints)}
    losses: list[float] = []
    rows: list[Row] = []
    order = torch.empty(0, dtype=torch.int64)
    for step in range(1, args.steps + 1):
        if len(order) < runner.images:
            order = torch.randperm(len(data), generator=generator)
        index, order = order[: runner.images], order[runner.images :]
        optimizer.param_groups[0]["lr"] = setting.learning_rate * race.learning_rate((step - 0.5) / args.steps)
        loss = runner.loss(network, data[index].float() / 127.5 - 1, index)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), race.CLIP)
        optimizer.step()
        losses.append(float(loss.detach()))
        update_ema(average, network, 0.5 ** (1 / max(1.0, race.HALF_LIFE * step)))
        if step in wanted:
            row = {
                "runner": name,
                "step": step,
                "logged_loss": float(np.mean(losses[-args.window :])),
                **checkpoint(excess(runners.preconditioned(average))),
                "frechet": frechet(runner, average, data, setting, args.evaluations),
            }
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def correlations(rows: list[Row]) -> Row:
    """Spearman's rank correlations with the Frechet distance: per runner, in its second half, and over all rows."""
    groups: dict[str, list[Row]] = {}
    for name in dict.fromkeys(row["runner"] for row in rows):
        some = [row for row in rows if row["runner"] == name]
        groups[name] = some
        if len(some) >= FEW:
            groups[f"{name}, second half"] = some[len(some) // 2 :]
    groups["all"] = rows
    return {
        group: {
            key: round(float(spearmanr([row[key] for row in some], [row["frechet"] for row in some]).statistic), 3)
            for key in ("logged_loss", "loss_at_fixed_noise", "loss_minus_floor", "excess")
        }
        for group, some in groups.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--runners", nargs="+", choices=runners.LEVERS, default=["edm"], metavar="NAME")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--window", type=int, default=100, help="steps over whose mean the logged loss runs")
    parser.add_argument("--rows", type=int, default=512, dest="excess_rows", help="of the excess, per noise level")
    parser.add_argument("--samples", type=int, help="images per Frechet distance, instead of the setting's number")
    parser.add_argument("--evaluations", type=int, default=35)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="name of the file in results/")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, setting = race.open_data(args.data, args.samples)
    name = args.out or f"ranking_{setting.name}"
    path = RESULTS / f"{name}.json"
    shared = {key: value for key, value in vars(args).items() if key not in ("data", "out", "runners")}
    shared |= {"data": setting.name, "images": len(data), "samples": setting.samples}
    shared |= {"batch": setting.batch, "learning_rate": setting.learning_rate}
    before: Row = json.loads(path.read_text("utf-8")) if path.exists() else {"rows": [], **shared}
    if any(before.get(key) != value for key, value in shared.items()):
        raise SystemExit(f"{path} was measured with other settings: delete it, or name another file with --out.")
    rows: list[Row] = before["rows"]
    missing = [runner for runner in args.runners if not any(row["runner"] == runner for row in rows)]
    if missing:
        excess = sf.ExcessLoss(data, rows=args.excess_rows, seed=args.seed, device="cpu")
        rows = rows + [row for runner in missing for row in train(runner, data, setting, excess, args)]
    found = correlations(rows)
    write(name, " ".join(["python benchmarks/ranking.py", *sys.argv[1:]]), {**shared, "spearman": found, "rows": rows})
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
