"""How the probes write their figures: in sentences, in the lines of a table, and as JSON values."""

import math

import torch

__all__ = ["finite", "sampled", "spaced", "with_error"]


def sampled(samples: int, drawn_from: int) -> str:
    """A note that a sample represents the data set."""
    return f"sampled: {samples:,} of {drawn_from:,} images represent the data set"


def spaced(first: int, end: int, most: int) -> list[int]:
    """At most `most` of the indices from `first` to before `end`, evenly spaced, including both ends."""
    return sorted(set(torch.linspace(first, end - 1, min(end - first, most)).round().long().tolist()))


def with_error(mean: float, error: float) -> str:
    """A mean with its standard error, if there is one."""
    return f"{mean:.3g} ± {error:.1g}" if error > 0 else f"{mean:.3g}"


def finite(value: float) -> float | None:
    """A figure as a JSON value: None for what is no number."""
    return value if math.isfinite(value) else None
