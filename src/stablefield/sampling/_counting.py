"""Counting: how many network evaluations (NFE) a sample took.

One evaluation is one call of a network on a whole batch. Guidance calls two networks, or one twice, and counts 2.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from stablefield._shapes import check_callable

__all__ = ["Counted", "Evaluations", "counted"]


class Evaluations(ABC):
    """A denoiser that knows how many network evaluations it has made.

    Attributes:
        nfe: evaluations since it was made; set it to 0 to start again.
    """

    def __init__(self) -> None:
        self.nfe = 0

    @abstractmethod
    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """D(x, sigma, class_labels)."""

    def evaluate(
        self, denoiser: Callable[..., Tensor], x: Tensor, sigma: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        """Call `denoiser` and count: 1, or what it counts itself."""
        counter = denoiser if isinstance(denoiser, Evaluations) else None
        before = 0 if counter is None else counter.nfe
        # The labels go in by place, not by name: the third argument is the habit, its name is not.
        labels = () if class_labels is None else (class_labels,)
        denoised = denoiser(x, sigma, *labels)
        self.nfe += 1 if counter is None else counter.nfe - before
        return denoised


class Counted(Evaluations):
    """A denoiser with a counter, `nfe`. Made by `counted`."""

    def __init__(self, denoiser: Callable[..., Tensor]) -> None:
        super().__init__()
        self.denoiser = denoiser

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """D(x, sigma, class_labels), counted."""
        return self.evaluate(self.denoiser, x, sigma, class_labels)


def counted(denoiser: Callable[..., Tensor]) -> Counted:
    """Wrap any denoiser such that its network evaluations are counted.

    Around a guided denoiser it counts the evaluations of both networks, so the number is the same whether the counter
    is put outside or inside.

    Args:
        denoiser: D(x, sigma) or D(x, sigma, class_labels).

    Returns:
        The same denoiser with an attribute `nfe`, which starts at 0.

    Raises:
        TypeError: if `denoiser` cannot be called.
    """
    check_callable("denoiser", denoiser, "denoiser(x, sigma)")
    return Counted(denoiser)
