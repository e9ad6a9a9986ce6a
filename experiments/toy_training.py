"""Training on two Gaussians in R^64: squared error of the score against steps, with DSM and with n references.

    python experiments/toy_training.py           # three minutes on a core
    python experiments/toy_training.py --draw    # only the figure, from results/

The error is that of the network against the exact score of the mixture, E |s(x_t) - grad log p(x_t)|^2, relative to
E |grad log p(x_t)|^2, averaged over noise levels in the middle phase.

References:
    Xu, Tong, Jaakkola, "Stable Target Field for Reduced Variance Score Estimation in Diffusion Models", ICLR 2023,
    section 6.1 (variance and score error on a toy).
"""

import statistics
import sys
import time
from typing import Any

import torch
from common import draw, read, two_gaussians, write
from torch import Tensor

import stablefield as sf
from stablefield.networks._mlp import MLP
from stablefield.report import Line, LineChart
from stablefield.training._ema import ema_decay, follower, update_ema

LEVELS = (0.3, 0.5, 1.0, 2.0)
STEPS, EVERY, BATCH = 1000, 100, 64
SEEDS = (0, 1, 2)
SIZES: tuple[int | None, ...] = (None, 256, 4096)  # None: the single sample


def exact_denoiser(x: Tensor, sigma: float) -> Tensor:
    """E[x0 | x] for the mixture itself, in closed form."""
    total = 0.1**2 + sigma**2
    mean = 0.25 * torch.tanh(x.sum(1, keepdim=True) * 0.25 / total)
    return mean + 0.1**2 / total * (x - mean)


def error(denoiser: sf.Denoiser) -> float:
    clean = two_gaussians(2048, seed=1)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    found = []
    with torch.no_grad():
        for sigma in LEVELS:
            x = clean + sigma * noise
            exact = exact_denoiser(x, sigma)
            # The score is (D - x) / sigma^2: the factor cancels in the ratio.
            gap = (denoiser(x, sigma) - exact).square().sum(1).mean()
            found.append(float(gap / (exact - x).square().sum(1).mean()))
    return statistics.fmean(found)


def run(size: int | None, seed: int) -> tuple[list[float], float]:
    data = two_gaussians()
    process = sf.EDM()
    target = sf.DenoisingTarget(process) if size is None else sf.StableTarget(process, references=sf.Pool(data, size))
    objective = sf.Objective(process, noise_levels=sf.LogNormal(-0.5, 1.0), target=target)
    generator = torch.Generator().manual_seed(seed)
    model = sf.Denoiser(MLP((64,), 128, 2, generator=generator), sf.EDMPreconditioning(0.27))
    average = follower(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    draws = torch.Generator().manual_seed(100 + seed)
    errors, began, measuring = [], time.perf_counter(), 0.0
    for step in range(STEPS):
        index = torch.randperm(len(data), generator=draws)[:BATCH]
        references = torch.Generator().manual_seed(seed * STEPS + step)
        noise = objective.draw((BATCH, 64), draws)
        # References have their own generator, so all runs of a seed see the same rows and noise.
        example = objective.example(data[index], noise, None, index, generator=references)
        loss = objective.evaluate(model, example).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_ema(average, model, ema_decay(BATCH, step * BATCH, 5000, 0.1))
        if (step + 1) % EVERY == 0:
            pause = time.perf_counter()
            errors.append(error(average))
            measuring += time.perf_counter() - pause
    return errors, time.perf_counter() - began - measuring


def chart(record: dict[str, Any]) -> LineChart:
    """The errors over training, with the spread over seeds."""
    lines: list[Line] = []
    for found in record["runs"]:
        curves = torch.tensor(found["errors"])
        name = "DSM" if found["size"] is None else f"{found['size']:,} references"
        band = {"low": curves.min(0).values, "high": curves.max(0).values}
        lines.append(Line(label=name, x=record["steps"], y=curves.mean(0), **band))
    return LineChart(
        lines=tuple(lines),
        x_label="step",
        y_label="relative squared error of the score",
        log_y=True,
        title="Training on two Gaussians",
    )


def main(arguments: list[str]) -> None:
    if arguments != ["--draw"]:
        runs: list[dict[str, Any]] = []
        for size in SIZES:
            found = [run(size, seed) for seed in SEEDS]
            errors, seconds = [errors for errors, _ in found], [seconds for _, seconds in found]
            runs.append({"size": size, "seeds": list(SEEDS), "errors": errors, "seconds": seconds})
            last = statistics.fmean(curve[-1] for curve in errors)
            print(f"{size or 1} references: {last:.5f} after {STEPS} steps, {statistics.fmean(seconds):.1f} s")
        steps = list(range(EVERY, STEPS + 1, EVERY))
        values = {"noise_levels": LEVELS, "steps": steps, "runs": runs}
        write("toy_training", "python experiments/toy_training.py", values)
    draw({"toy_training": chart(read("toy_training"))})


if __name__ == "__main__":
    main(sys.argv[1:])
