"""Quality of samples against training time, for the losses and packages that people would pick.

    pip install --no-deps diffusers torchcfm POT scipy    # besides what `make test` installs
    python benchmarks/race.py digits --seconds 45 --seeds 0,1,2 --jobs 2
    python benchmarks/race.py FOLDER --runners ours edm torchcfm --fractions 1/3 2/3 1 --out race_fashion

DATA is digits, a folder of Fashion-MNIST's idx files, or CIFAR-10's; its images' shape picks a setting of the table below.

All runners have the same data, network, initial weights, Adam, learning rate, clipping, rows per step, averaging of the
weights and processor time: that of a process of its own with one thread, without imports, a first step that warms up, and
measurement. What a runner prepares (our noise band) counts. The learning rate is a function of the share of the time that
is spent, so each time is a training of its own whose schedule fits it.

A runner is a loss and the sampler that belongs to it, at 35 and at 10 evaluations of the network or the nearest number
below that the sampler can make. EDM's loss and all that build on it: Heun at 35 (18 steps, the last one Euler's), and
DPM-Solver++(2M) at 10, since Heun's five steps of 9 evaluations are useless on EDM's grid. diffusers: its DPM-Solver++, 35
and 10. Flow matching: the midpoint rule, 34 and 10.

Rows are written to results/NAME.json after each training. Rows that the file has already are kept and not run again, so a
race that was cut goes on where it was; delete the file to start anew. A training that fails is a row with its error.
"""

import argparse
import copy
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import KW_ONLY, asdict, dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from record import RESULTS, machine, write
from runners import OURS, PEERS, RUNNERS, Runner, make_runner
from torch import Generator, Tensor, nn

import stablefield as sf
from stablefield._commit import running_commit
from stablefield.evaluation._features import Gaussian, fit_features
from stablefield.evaluation._fid import distance_between
from stablefield.sampling._seeded_images import to_uint8
from stablefield.training._ema import follower, update_ema

Row = dict[str, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all runners share on one data set.

    Attributes:
        name: of the data.
        network: makes the network for images of a shape, its weights drawn from the generator.
        timesteps: whether the network's embedding is made for time steps 0 to 999 (positional), or for numbers of order one.
        batch: rows of the network per step.
        learning_rate: Adam's, after the ramp.
        block: side of the squares of pixels whose averages are the features of the Frechet distance.
        samples: how many are drawn for it.
        chunk: how many are drawn at a time.
    """

    name: str
    network: Callable[[Shape, Generator], nn.Module]
    timesteps: bool
    batch: int
    learning_rate: float
    block: int
    samples: int
    chunk: int


def perceptron(shape: Shape, generator: Generator) -> nn.Module:
    return sf.networks.MLP(shape, width=512, depth=4, generator=generator)


def unet(shape: Shape, generator: Generator) -> nn.Module:
    """A small DDPM++ without dropout."""
    network = sf.networks.SongUNet.ddpmpp(
        shape[1:], shape[0], 16, (1, 2, 2), blocks=1, dropout=0.0, generator=generator
    )
    return network.to(memory_format=torch.channels_last)


DIGITS = Setting(
    name="digits",
    network=perceptron,
    timesteps=False,
    batch=128,
    learning_rate=2e-3,
    block=1,
    samples=5000,
    chunk=1000,
)
FASHION_MNIST = Setting(
    name="fashion_mnist",
    network=unet,
    timesteps=True,
    batch=64,
    learning_rate=2e-3,
    block=4,
    samples=1000,
    chunk=100,
)
SETTINGS: dict[Shape, Setting] = {
    (1, 8, 8): DIGITS,
    (1, 28, 28): FASHION_MNIST,
    (3, 32, 32): replace(FASHION_MNIST, name="cifar10"),
}
RAMP, DECAY = 0.04, 0.3
"""Shares of the time over which the learning rate rises from 0 and falls to 0."""
CLIP = 1.0
"""Norm to which gradients are clipped."""
HALF_LIFE = 0.05
"""Half-life of the averaged weights, as a share of the steps so far."""
EVALUATIONS = (35, 10)


def runner_of(name: str, data: Tensor, setting: Setting, generator: Generator) -> Runner:
    """The runner of a name under a setting."""
    return make_runner(name, data, setting.batch, generator, timesteps=setting.timesteps)


def learning_rate(share: float) -> float:
    """The learning rate as a share of its peak, at a share of the time."""
    return min(1.0, share / RAMP, (1 - share) / DECAY)


def train(name: str, data: Tensor, setting: Setting, seed: int, seconds: float) -> tuple[Runner, nn.Module, Row]:
    """Train for so many seconds of this process's time; the runner, the averaged network and what it took."""
    network = setting.network(tuple(data.shape[1:]), Generator().manual_seed(seed))
    # Unmeasured: a first step imports and sets up what later ones find.
    copied, runner = copy.deepcopy(network), runner_of(name, data, setting, Generator().manual_seed(seed))
    step_of(runner, copied, adam(copied, setting), data, torch.arange(runner.images) % len(data))

    average, optimizer = follower(network), adam(network, setting)
    generator = Generator().manual_seed(seed)
    torch.manual_seed(seed)
    np.random.seed(seed)  # torchcfm draws from it
    steps, order = 0, torch.empty(0, dtype=torch.int64)
    began = time.process_time()
    runner = runner_of(name, data, setting, generator)
    ahead: deque[Tensor] = deque()
    while (spent := time.process_time() - began) < seconds:
        if not ahead:
            while len(ahead) < runner.ahead:
                if len(order) < runner.images:
                    order = torch.randperm(len(data), generator=generator)
                ahead.append(order[: runner.images])
                order = order[runner.images :]
            runner.prepare([(scaled(data, index), index) for index in ahead])
        index = ahead.popleft()
        optimizer.param_groups[0]["lr"] = setting.learning_rate * learning_rate(spent / seconds)
        step_of(runner, network, optimizer, data, index)
        steps += 1
        update_ema(average, network, 0.5 ** (1 / max(1.0, HALF_LIFE * steps)))
    took = {"spent": round(spent, 3), "steps": steps, "steps_per_second": round(steps / max(spent, 1e-9), 2)}
    return runner, average, took


def adam(network: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    return torch.optim.Adam(network.parameters(), lr=setting.learning_rate, fused=True)


def scaled(data: Tensor, index: Tensor) -> Tensor:
    """Rows of the data in [-1, 1]."""
    return data[index].float() / 127.5 - 1


def step_of(runner: Runner, network: nn.Module, optimizer: torch.optim.Optimizer, data: Tensor, index: Tensor) -> None:
    loss = runner.loss(network, scaled(data, index), index)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
    optimizer.step()


def gaussian_of(images: Tensor, block: int) -> Gaussian:
    """The Gaussian of the averages of uint8 images (n, C, H, W) over squares of pixels, which run from -1 to 1."""
    parts = [torch.nn.functional.avg_pool2d(part.float() / 127.5 - 1, block).flatten(1) for part in images.split(1000)]
    return fit_features(torch.cat(parts))


@torch.no_grad()
def measure(runner: Runner, network: nn.Module, data: Tensor, setting: Setting, seed: int) -> list[Row]:
    """The Frechet distance of samples to the data, per number of evaluations."""
    reference = gaussian_of(data, setting.block)
    found: list[Row] = []
    for evaluations in EVALUATIONS:
        noise = torch.randn(setting.samples, *data.shape[1:], generator=Generator().manual_seed(1000 + seed))
        drawn, used = [], 0
        for part in noise.split(setting.chunk):
            images, used = runner.sample(network, part, evaluations)
            drawn.append(images)
        images = torch.cat(drawn)
        if not images.isfinite().all():
            raise FloatingPointError(f"samples at {evaluations} evaluations are not finite")
        distance = distance_between(gaussian_of(to_uint8(images), setting.block), reference).value
        found.append({"evaluations": evaluations, "used": used, "distance": distance})
    return found


def run_one(
    name: str, source: str, seed: int, seconds: float, samples: int | None = None, batch: int | None = None
) -> list[Row]:
    """One training and its rows, in this process."""
    data, setting = open_data(source, samples, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner, network, took = train(name, data, setting, seed, seconds)
        found = measure(runner, network, data, setting, seed)
    return [{"runner": name, "seed": seed, "seconds": seconds, **took, **row} for row in found]


def open_data(source: str, samples: int | None = None, batch: int | None = None) -> tuple[Tensor, Setting]:
    """Images, uint8 (n, C, H, W), and the setting for them, with other numbers of samples and rows if they are given."""
    images = sf.data.open_images(source)
    if images.shape not in SETTINGS:
        raise SystemExit(f"{source} has images of shape {images.shape}: there are settings for {list(SETTINGS)}.")
    setting = SETTINGS[images.shape]
    setting = replace(setting, samples=samples or setting.samples, batch=batch or setting.batch)
    return torch.from_numpy(np.array(images.images)), setting


@dataclass
class Race:
    """The trainings to run, and the rows that there are."""

    arguments: list[str]
    _: KW_ONLY
    jobs: int
    rows: list[Row]
    save: Callable[[list[Row]], object]

    def run(self, wanted: list[tuple[str, int, float]]) -> None:
        done = {(row["runner"], row["seed"], row["seconds"]) for row in self.rows if "error" not in row}
        waiting = deque(job for job in wanted if job not in done)
        running: dict[tuple[str, int, float], subprocess.Popen[str]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    job = waiting.popleft()
                    running[job] = self._start(*job)
                time.sleep(0.05)
                for job, process in list(running.items()):
                    if process.poll() is not None:
                        del running[job]
                        self._add(job, *process.communicate(), process.returncode)
        finally:
            for process in running.values():
                process.kill()

    def _start(self, name: str, seed: int, seconds: float) -> "subprocess.Popen[str]":
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        command = [sys.executable, __file__, *self.arguments, "--one", name, str(seed), str(seconds)]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **threads}
        )

    def _add(self, job: tuple[str, int, float], out: str, err: str, status: int) -> None:
        name, seed, seconds = job
        if status == 0:
            made = {"machine": machine(), "commit": running_commit()}  # a race may go on elsewhere
            rows: list[Row] = [row | made for row in json.loads(out.splitlines()[-1])]
        else:
            error = (err.strip().splitlines() or [f"exit status {status}"])[-1]
            rows = [{"runner": name, "seed": seed, "seconds": seconds, "error": error}]
        self.rows[:] = [row for row in self.rows if (row["runner"], row["seed"], row["seconds"]) != job] + rows
        self.save(self.rows)
        for row in rows:
            print(json.dumps(row), flush=True)


def curve(rows: list[Row], runner: str, evaluations: int) -> dict[float, list[float]]:
    """Distances per time, one per seed."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if row["runner"] == runner and row.get("evaluations") == evaluations:
            found.setdefault(row["seconds"], []).append(row["distance"])
    return dict(sorted(found.items()))


def time_to(means: dict[float, float], value: float) -> str:
    """When a curve of means reaches a value: interpolated in log distance, "<" its first time, or ">" its last."""
    times = list(means)
    if means[times[0]] <= value:
        return f"<{times[0]:.3g}" if means[times[0]] < value else f"{times[0]:.3g}"
    for before, after in pairwise(times):
        if means[after] <= value:
            fall = math.log(means[before] / value) / math.log(means[before] / means[after])
            return f"{before + fall * (after - before):.3g}"
    return f">{times[-1]:.3g}"


def table(rows: list[Row]) -> str:
    """Mean and range over seeds at each time, and the time in which a runner reaches the best peer's last mean."""
    names = list(dict.fromkeys(row["runner"] for row in rows))
    lines: list[str] = []
    for evaluations in EVALUATIONS:
        curves = {name: curve(rows, name, evaluations) for name in names}
        curves = {name: found for name, found in curves.items() if found}
        if not curves:
            continue
        means = {name: {t: statistics.fmean(d) for t, d in found.items()} for name, found in curves.items()}
        last = max(t for found in means.values() for t in found)
        ends = {name: means[name][last] for name in PEERS if name in means and last in means[name]}
        times = sorted({t for found in curves.values() for t in found})
        best = min(ends, key=ends.__getitem__) if ends else None
        goal = f"the best peer, {best}, ends at {ends[best]:.4f}" if best else "no peer ran to the end"
        lines += ["", f"{evaluations} evaluations: distance, mean (least to most); {goal}"]
        lines += [f"{'runner':16}" + "".join(f"{f'{t:g} s':>24}" for t in times) + f"{'reaches it':>12}"]
        for name in sorted(curves, key=lambda name: list(means[name].values())[-1]):
            cells = [
                f"{means[name][t]:.4f} ({min(d):.3f}-{max(d):.3f})" if (d := curves[name].get(t)) else "" for t in times
            ]
            reached = time_to(means[name], ends[best]) if best else ""
            lines += [f"{name:16}" + "".join(f"{cell:>24}" for cell in cells) + f"{reached:>12}"]
    lines += [
        f"failed: {row['runner']}, seed {row['seed']}, {row['seconds']:g} s: {row['error']}"
        for row in rows
        if "error" in row
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--runners", nargs="+", choices=RUNNERS, default=list(RUNNERS), metavar="NAME")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--seconds", type=float, default=45.0, help="of processor time, of the longest training")
    parser.add_argument("--fractions", nargs="+", type=Fraction, default=[Fraction(k, 3) for k in (1, 2, 3)])
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one thread each")
    parser.add_argument("--samples", type=int, help="images per measurement, instead of the setting's number")
    parser.add_argument("--batch", type=int, help="rows of the network per step, instead of the setting's number")
    parser.add_argument("--out", help="name of the file in results/, or a path without .json")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        name, seed, seconds = args.one
        print(json.dumps(run_one(name, args.data, int(seed), float(seconds), args.samples, args.batch)))
        return
    # A race that is stopped ends its trainings.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    data, setting = open_data(args.data, args.samples, args.batch)
    path = RESULTS / f"{args.out or f'race_{setting.name}'}.json"
    found: Row = json.loads(path.read_text("utf-8")) if path.exists() else {"rows": []}
    network = setting.network(tuple(data.shape[1:]), Generator())
    weights = sum(weight.numel() for weight in network.parameters())
    shared = {**asdict(setting), "network": f"{type(network).__name__}, {weights:,} weights", "images": len(data)}
    shared |= {"ramp": RAMP, "decay": DECAY, "clip": CLIP, "half_life": HALF_LIFE}
    ours = json.loads(json.dumps(asdict(OURS)))
    if found.get("setting", shared) != shared or ours | found.get("ours", {}) != ours:
        raise SystemExit(f"{path} holds a race under other settings: delete it, or name another file with --out.")
    rows: list[Row] = found["rows"]
    command = " ".join(["python benchmarks/race.py", *sys.argv[1:]])

    def save(rows: list[Row]) -> None:
        values = {"jobs": args.jobs, "setting": shared, "ours": asdict(OURS), "rows": rows}
        write(str(path.with_suffix("")), command, values)

    # The longest first, which leaves no processor idle at the end; seeds before runners, so that all runners share the load.
    wanted = [
        (name, int(seed), round(args.seconds * float(fraction), 4))
        for fraction in sorted(args.fractions, reverse=True)
        for seed in args.seeds.split(",")
        for name in args.runners
    ]
    given = {"--samples": args.samples, "--batch": args.batch}
    arguments = [args.data, *(text for flag, value in given.items() if value for text in (flag, str(value)))]
    try:
        Race(arguments, jobs=args.jobs, rows=rows, save=save).run(wanted)
    finally:
        print(table(rows))


if __name__ == "__main__":
    main()
