"""Seeds: every random choice of a run is a function of (seed, purpose, step).

No run saves a generator's state: resumed, or split over more processes, it draws the same numbers.
"""

from enum import IntEnum

import numpy as np
import torch

__all__ = ["Purpose", "generator_for", "seed_for"]


class Purpose(IntEnum):
    """The purpose of a random stream; the numbers are part of the format and never change."""

    WEIGHTS = 0
    OBJECTIVE = 1
    DROPOUT = 2
    REFERENCES = 3
    AUGMENTATION = 4
    HELD_OUT = 5
    LATENTS = 6


def seed_for(seed: int, purpose: Purpose, step: int = 0, part: int = 0) -> int:
    """A number from 0 to 2^32 - 1 for (seed, purpose, step, part): torch's CPU generator reads only these 32 bits."""
    key = (int(purpose), step, part) if part else (int(purpose), step)
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint32)[0])


def generator_for(seed: int, purpose: Purpose, step: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` for (seed, purpose, step)."""
    return torch.Generator(device).manual_seed(seed_for(seed, purpose, step))
