"""What the tables of a probe have in common: a number with its error, and which noise levels get a line."""

import torch

__all__ = ["spaced", "with_error"]


def spaced(first: int, end: int, most: int) -> list[int]:
    """At most `most` of the places from `first` to before `end`, evenly spaced, both ends among them."""
    return sorted(set(torch.linspace(first, end - 1, min(end - first, most)).round().long().tolist()))


def with_error(mean: float, error: float) -> str:
    """A mean with its standard error, or alone where there is none."""
    return f"{mean:.3g} ± {error:.1g}" if error > 0 else f"{mean:.3g}"
