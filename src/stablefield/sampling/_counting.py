"""Counting: how many network evaluations (NFE) a sample took.

One evaluation is one call of a network on a whole batch. Guidance calls two networks, or one twice, and counts 2.
"""

from collections.abc import Callable

from torch import Tensor

from stablefield._shapes import check_callable

__all__ = ["Counted", "Evaluations", "counted"]


class Evaluations:
    """A denoiser that knows how many network evaluations it has made.

    Attributes:
        nfe: evaluations since it was made; set it to 0 to start again.
    """

    def __init__(self) -> None:
        self.nfe = 0


class Counted(Evaluations):
    """A denoiser with a counter, `nfe`. Made by `counted`."""

    def __init__(self, denoiser: Callable[..., Tensor], progress: Callable[[Tensor], object] | None = None) -> None:
        super().__init__()
        self.denoiser, self._progress = denoiser, progress

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """D(x, sigma, class_labels); counts 1, or what the denoiser counts itself."""
        if self._progress is not None:
            self._progress(sigma)
        before = _nfe_of(self.denoiser)
        # By position: labels are the third argument by convention, but their name varies.
        denoised = self.denoiser(x, sigma) if class_labels is None else self.denoiser(x, sigma, class_labels)
        after = _nfe_of(self.denoiser)
        self.nfe += 1 if before is None or after is None else after - before
        return denoised


def _nfe_of(denoiser: object) -> int | None:
    """The evaluations that a denoiser has counted; None if it counts none."""
    return denoiser.nfe if isinstance(denoiser, Evaluations) else None


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
