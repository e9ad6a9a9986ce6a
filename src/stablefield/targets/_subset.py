"""Random subsets of the samples of a pool."""

import torch
from torch import Tensor

__all__ = ["choose", "drawn_seed", "drawn_subset", "others"]


def choose(n: int, index: Tensor, size: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Choose `size` of n samples: those at `index`, each once, and others drawn without replacement.

    Args:
        n: the number of samples.
        index: indices of the batch's rows, integers (B,).
        size: how many to choose.
        generator: draws the others.

    Returns:
        The indices of the chosen samples, shape (size,), and each row's index among them, shape (B,).

    Raises:
        ValueError: if `size` is below the number of distinct rows.
    """
    own: Tensor
    source: Tensor
    own, source = torch.unique(index, return_inverse=True)
    if size < len(own):
        raise ValueError(
            f"Pool size is {size}, but the batch has {len(own)} distinct samples: "
            f"pass at least the batch size, so that every source is among the references."
        )
    return torch.cat([own, others(n, own, size - len(own), generator)]), source


def drawn_seed(generator: torch.Generator | None) -> int:
    """A seed, drawn from `generator`."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def drawn_subset(n: int, size: int, seed: int) -> Tensor:
    """Indices of `size` of n samples, drawn without replacement, shape (size,), on the CPU; the same for the same seed."""
    return others(n, torch.empty(0, dtype=torch.long, device="cpu"), size, torch.Generator("cpu").manual_seed(seed))


def others(n: int, own: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw `count` of the numbers 0 to n - 1 that are not in `own`, without replacement, on the device of `own`."""
    device = own.device if generator is None else generator.device
    if 4 * (count + len(own)) > n:
        taken = torch.zeros(n, dtype=torch.bool, device=own.device)
        taken[own] = True
        free = (~taken).nonzero()[:, 0]
        return free[torch.randperm(len(free), generator=generator, device=device)[:count].to(own.device)]
    # A few out of many: draw with replacement, drop repeats, keep a random subset; this avoids a pass over all n.
    found = own.new_empty(0)
    while len(found) < count:
        drawn = torch.randint(n, (2 * count + 16,), generator=generator, device=device).to(own.device)
        drawn = drawn[~torch.isin(drawn, own)]
        found: Tensor = torch.unique(torch.cat([found, drawn]))
    return found[torch.randperm(len(found), generator=generator, device=device)[:count].to(own.device)]
