"""Time budgets: the number of steps that fits a time, and what else of a recipe depends on it."""

import math
import re
from dataclasses import replace

from stablefield._shapes import number
from stablefield.training._held_out import HeldOut
from stablefield.training._pace import FREE, Costs
from stablefield.training._recipe import Recipe, SongUNetConfig

__all__ = ["narrowed", "seconds_of", "within"]

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
# Shares of the time for pictures and checkpoints on the way, and the most of each.
_LOOKING, _SAVING, _LOOKS, _SAVES, _EARLY = 0.05, 0.02, 8, 10, 4
# Shares of the images: for the ramp of the learning rate and the half-life of the averages, at most.
_RAMP, _HALF_LIFE = 0.05, 0.05
# Steps below which a network of half the width makes better pictures, and the width of the narrowest one. Measured by
# benchmarks/time_budget.py.
_STEPS, _NARROWEST = 1000, 16


def seconds_of(given: str | float) -> float:
    """The seconds of a time, such as 600, "600s", "10m" or "1.5h".

    Raises:
        ValueError: if it is none, or not positive.
    """
    if isinstance(given, str):
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", given.strip().lower())
        if found is None or found[2] not in _UNITS:
            raise ValueError(f"time={given}: pass a time such as 90s, 10m or 2h.")
        given = float(found[1]) * _UNITS[found[2]]
    number("time", given)
    if not 0 < given < math.inf:
        raise ValueError(f"time={given:g}: it must be positive, such as 90s, 10m or 2h.")
    return float(given)


def narrowed(recipe: Recipe, seconds: float, costs: Costs) -> Recipe | None:
    """The recipe with half the width of its U-Net, if the time allows too few steps of it.

    Returns:
        None if the time allows enough steps, or the network is as narrow as it may be, or no `SongUNet`.
    """
    network = recipe.network
    if not isinstance(network, SongUNetConfig) or network.base_channels < 2 * _NARROWEST:
        return None
    if seconds >= _STEPS * costs.step:
        return None
    return replace(recipe, network=replace(network, base_channels=network.base_channels // 2))


def within(recipe: Recipe, seconds: float, costs: Costs, held_out: HeldOut | None = None) -> Recipe:
    """The recipe with as many steps as the time allows, and the ramp, averages, pictures and checkpoints that suit them.

    The ramp and the half-life of the averages become no longer than a twentieth of the images, and stay as they are if they
    are shorter.

    Args:
        recipe: the recipe.
        seconds: from the start of the run to its end, with a last picture and checkpoint.
        costs: of its parts.
        held_out: what the run holds out, if anything.

    Raises:
        ValueError: if the time is too short for one step.
    """
    pictures = int(_LOOKING * seconds / max(1e-9, costs.picture))
    # Early ones come before the first of the regular ones, as many up to four, and one at least.
    looks = min(_LOOKS, pictures // 2)
    early = min(_EARLY, max(1, looks)) if pictures else 0
    saves = min(_SAVES, int(_SAVING * seconds / max(1e-9, costs.checkpoint)))
    other = costs.setup + costs.end + (looks + early) * costs.picture + saves * costs.checkpoint
    steps = int(((1 - FREE) * seconds - other) / max(1e-9, costs.step))
    if steps < 1:
        least = (costs.setup + costs.end + 10 * costs.step) / (1 - FREE - _LOOKING - _SAVING)
        raise ValueError(
            f"time is too short: {max(0.0, seconds):.2g} s are left for the run, and here a step takes {costs.step:.2g} s, "
            f"the start and the end {costs.setup + costs.end:.2g} s. Pass {math.ceil(least)} s more, or a smaller network."
        )
    if held_out is not None:
        steps = _with_looks(recipe, steps, costs, held_out)
    images = steps * recipe.batch
    return replace(
        recipe,
        steps=steps,
        ramp_images=min(recipe.ramp_images, int(_RAMP * images)),
        ema_half_life=min(recipe.ema_half_life, _HALF_LIFE * images),
        sample_every=math.ceil(steps / (looks + 1)) if pictures else 0,
        checkpoint_every=math.ceil(steps / (saves + 1)),
        log_every=_log_every(recipe, steps),
    )


def _with_looks(recipe: Recipe, steps: int, costs: Costs, held_out: HeldOut) -> int:
    """As many of the steps as leave time for looks: the network on their rows, and a checkpoint if it is the best."""
    look = costs.checkpoint + held_out.evaluations * costs.row
    left, found = steps * costs.step - look, steps
    # Fewer steps may have more frequent looks.
    for _ in range(8):
        every = held_out.paced(replace(recipe, steps=found, log_every=_log_every(recipe, found))).every
        fitting = max(1, int(left / max(1e-9, costs.step + look / every)))
        if fitting >= found:
            break
        found = fitting
    return found


def _log_every(recipe: Recipe, steps: int) -> int:
    return min(recipe.log_every, max(1, steps // 20))
