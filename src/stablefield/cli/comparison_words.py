"""What a comparison says in words: how long it will take, and what came out."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from stablefield.cli.words import duration
from stablefield.data.image_set import ImageSet
from stablefield.training.comparison import (
    NFE,
    Looks,
    Outcome,
    TargetName,
    improvement,
    optimum_of,
    rows_of,
    spread,
)
from stablefield.training.estimate import estimate
from stablefield.training.feed import Feed
from stablefield.training.loop import make_accelerator
from stablefield.training.placement import placed
from stablefield.training.run_folder import RunConfig, RunFolder
from stablefield.training.stepper import Stepper

if TYPE_CHECKING:
    from stablefield.evaluation.self_check import SelfCheck

__all__ = ["foretold", "summary"]

# Samples of a picture, and the seconds of a report: matplotlib is read, and a dozen charts are drawn.
_PICTURE, _REPORT = 64, 2.0
# Rows that the posterior mean is timed on.
_FEW, _SOME = 16, 128


def foretold(
    configs: Sequence[tuple[TargetName, int, RunConfig]],
    looks: Looks,
    data: ImageSet,
    check: SelfCheck,
    device: torch.device,
    out: Path,
) -> str:
    """How long the comparison will take from here, from a few steps, samples and rows taken here and thrown away.

    Args:
        configs: target, seed and settings of each run.
        looks: at each.
        data: the images.
        check: measures their samples.
        device: where they are trained.
        out: folder of the comparison, which may hold some of them.
    """
    config = next(config for target, _, config in configs if target == "stf")
    left, begun = 0.0, 0
    for target, seed, one in configs:
        folder = RunFolder(out / f"{target}-seed{seed}")
        newest = folder.newest() if (folder.path / "config.json").is_file() else None
        rest = 1 - (0 if newest is None else min(1, newest[1].step / one.recipe.steps))
        left, begun = left + rest, begun + (rest > 0)
    accelerator = make_accelerator(device)
    feed = Feed(data, config.recipe, device, labelled=config.classes > 0, placement=placed(config.recipe, data, device))
    found = estimate(config, feed, accelerator)
    # The second time: what making the first one loads is loaded once.
    began = time.perf_counter()
    Stepper(config, feed, accelerator)
    setup = time.perf_counter() - began
    feed.close()
    training = left * config.recipe.steps * found.seconds_per_step
    # A training step is three evaluations of its rows, and its target.
    per_row = max(0.0, found.seconds_per_step - found.target_seconds) / (3 * config.recipe.batch)
    scoring = left * looks.count * (looks.evaluations * per_row + _reading_seconds(check, data, device))
    # A run makes three networks, its own and one for the gradients of each target, and a picture; the report draws two more.
    rest = begun * (3 * setup + NFE * _PICTURE * per_row) + 2 * NFE * _PICTURE * per_row + _REPORT
    if begun:
        rest += _optimum_seconds(data, device, labelled=config.classes > 0)
    times = "1 look" if looks.count == 1 else f"{looks.count} looks"
    return (
        f"takes about {duration(training + scoring + rest)} from here: {duration(training)} of training, "
        f"{duration(scoring)} of scoring ({times} at each run on {looks.samples:,} samples)"
        + (f", {duration(rest)} of what is around them" if rest >= 1 else "")
    )


def _reading_seconds(check: SelfCheck, data: ImageSet, device: torch.device) -> float:
    """Time of a look's Frechet distance with its error, without drawing the samples."""
    images = torch.from_numpy(np.array(data.images[: check.batch])).to(device)
    began = time.perf_counter()
    check.read(lambda seeds: images[torch.arange(len(seeds), device=device) % len(images)])
    return time.perf_counter() - began


def _optimum_seconds(data: ImageSet, device: torch.device, *, labelled: bool) -> float:
    """Time of the exact posterior mean of all rows: what does not depend on their number, and what does."""
    times: list[float] = []
    for rows in (_FEW, _FEW, _SOME):  # what is slow at first is so once
        began = time.perf_counter()
        optimum_of(data, device, labelled=labelled, rows=rows)
        times.append(time.perf_counter() - began)
    each = max(0.0, (times[2] - times[1]) / (_SOME - _FEW))
    return times[2] + each * (rows_of(data) - min(_SOME, len(data)))


def _places(error: float) -> int:
    """As many decimals as tell an error to two digits; those of a usual figure where it is 0."""
    return min(6, max(0, 1 - math.floor(math.log10(error)))) if error > 0 else 3


def _rounded(value: float, places: int) -> str:
    """A number without the sign of a zero."""
    return f"{round(value, places) + 0.0:.{places}f}"


def _over_seeds(values: Sequence[float]) -> str:
    """A mean with its standard error over seeds, or alone where there is one seed."""
    found = spread(values)
    if found.error is None:
        return f"{found.mean:.3g}"
    places = _places(found.error)
    return f"{_rounded(found.mean, places)} ± {_rounded(found.error, places)}"


def _gain(values: Sequence[float]) -> str:
    """Shares over seeds in per cent, with what they vary by, or alone where there is one seed."""
    found = spread([100 * value for value in values])
    if found.error is None:
        return f"by {_rounded(found.mean, 1)}%"
    # Beyond a hundredth of a per cent, digits tell nothing.
    places = min(2, _places(found.error))
    mean, error, least, most = (_rounded(v, places) for v in (found.mean, found.error, found.least, found.most))
    error = error if float(error) else f"less than {10**-places:g}"
    return f"by {mean}% ± {error}% on average ({least}% to {most}%)"


def summary(outcomes: Sequence[Outcome], seeds: Sequence[int], name: str) -> str:
    """What came out, each figure with what it varies by over seeds.

    Args:
        outcomes: the runs, done.
        seeds: of them.
        name: of the distance of their samples.
    """
    gains = [improvement(outcomes, seed) for seed in seeds]
    better = sum(gain > 0 for gain in gains)
    frechet = {t: [o.scores[-1].frechet for o in outcomes if o.target == t] for t in ("dsm", "stf")}
    seconds = {t: float(np.mean([o.scores[-1].seconds for o in outcomes if o.target == t])) for t in ("dsm", "stf")}
    lower = sum(b < a for a, b in zip(frechet["dsm"], frechet["stf"], strict=True))
    source_only = len(seeds) == 1
    spreads = (
        "One seed tells no spread: pass more, such as --seeds 0,1,2. "
        if source_only
        else f"± is the standard error over {len(seeds)} seeds. "
    )
    many = "1 seed" if source_only else f"{len(seeds)} seeds"
    return (
        f"STF is nearer to the optimum at middle noise levels in {better} of {many}, {_gain(gains)}; its {name} is lower in "
        f"{lower} of {len(seeds)}: {_over_seeds(frechet['stf'])} against {_over_seeds(frechet['dsm'])}. {spreads}"
        f"Training took {seconds['stf']:.0f} s with STF, {seconds['dsm']:.0f} s with DSM."
    )
