r"""Guidance (CFG and autoguidance): extrapolate from a worse denoiser through a better one.

$$ D = D_{bad} + w\, (D_{good} - D_{bad}) $$

Classifier-free guidance takes the network without its class label as the worse one, autoguidance a smaller or less
trained network. Scale w = 1 is the good denoiser alone, and no evaluation is spent on the other; the same outside the
noise interval. The interval (lo, hi] is in noise-to-signal units: lo < sigma <= hi is guided.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stablefield._shapes import check_callable, check_kind, check_labels, check_tensor, number, per_row
from stablefield.sampling._counting import Counted, Evaluations

__all__ = ["Guided", "autoguidance", "classifier_free"]


class Guided(Evaluations):
    """A guided denoiser D(x, sigma), with a counter `nfe`. Made by `classifier_free` and `autoguidance`."""

    def __init__(
        self,
        good: tuple[Callable[..., Tensor], Tensor | None],
        bad: tuple[Callable[..., Tensor], Tensor | None],
        scale: float,
        interval: tuple[float, float] | None,
    ) -> None:
        super().__init__()
        for name, (denoiser, _) in (("denoiser", good), ("guide", bad)):
            check_callable(name, denoiser, "denoiser(x, sigma)")
        number("scale", scale)
        if not math.isfinite(scale):
            raise ValueError(f"scale={scale}: pass a finite number, 1 for no guidance.")
        if interval is not None:
            check_kind("interval", interval, (tuple, list), "two noise levels (lo, hi), or None")
            if len(interval) != 2:
                raise ValueError(f"interval holds {len(interval)} numbers: pass two noise levels (lo, hi), or None.")
            number("interval[0]", interval[0])
            number("interval[1]", interval[1])
        if interval is not None and not 0 <= interval[0] < interval[1]:
            raise ValueError(f"interval={interval}: 0 <= lo < hi must hold, in noise levels; None guides everywhere.")
        self.good, self.bad = good, bad
        self.scale, self.interval = scale, interval

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Shape (B, ...), for x (B, ...) and sigma (B,); the labels are those it was made with.

        Raises:
            ValueError: if labels are given here, or `x` has another number of rows than the labels it was made with.
        """
        check_tensor("x", x, batch=True)
        check_tensor("sigma", sigma, real=True)
        if sigma.shape != x.shape[:1]:
            raise ValueError(
                f"sigma has shape {tuple(sigma.shape)}, x has {len(x)} rows: pass one noise level per row."
            )
        if class_labels is not None:
            raise ValueError("class_labels: a guided denoiser has its labels already; call it with (x, sigma).")
        good = self._call(self.good, x, sigma)
        if self.scale == 1:
            return good
        if self.interval is None:
            return self._extrapolate(good, x, sigma)
        low, high = self.interval
        inside = (sigma > low) & (sigma <= high)
        if not inside.any():
            return good
        return torch.where(per_row(inside, x).bool(), self._extrapolate(good, x, sigma), good)

    def _extrapolate(self, good: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        bad = self._call(self.bad, x, sigma)
        return bad + self.scale * (good - bad)

    def _call(self, side: tuple[Callable[..., Tensor], Tensor | None], x: Tensor, sigma: Tensor) -> Tensor:
        denoiser, labels = side
        if labels is not None and labels.shape[0] != x.shape[0]:
            raise ValueError(f"class_labels has {labels.shape[0]} rows, x has {x.shape[0]}: pass one label per row.")
        counter = Counted(denoiser)
        denoised = counter(x, sigma, labels)
        self.nfe += counter.nfe
        return denoised


def classifier_free(
    denoiser: Callable[..., Tensor], class_labels: Tensor, scale: float, interval: tuple[float, float] | None = None
) -> Guided:
    """Classifier-free guidance: away from the unconditional and towards the conditional denoiser.

    Args:
        denoiser: D(x, sigma, class_labels), where label -1 means no class.
        class_labels: integers, shape (B,).
        scale: w; 1 is the conditional denoiser alone, 0 the unconditional one.
        interval: noise levels (lo, hi] to guide in; all of them if None.

    Returns:
        D(x, sigma) for every sampler; two evaluations where it guides, one elsewhere.

    Raises:
        ValueError: if labels are not integers of shape (B,), `scale` is not finite or `interval` is empty.

    References:
        Ho, Salimans, "Classifier-Free Diffusion Guidance", 2022, equation 6 (with w there = scale - 1 here).
        Kynkäänniemi, Aittala, Karras, Laine, Aila, Lehtinen, "Applying Guidance in a Limited Interval Improves Sample
        and Distribution Quality in Diffusion Models", NeurIPS 2024, equation 5.
    """
    labels = _checked_labels(class_labels)
    return Guided((denoiser, labels), (denoiser, torch.full_like(labels, -1)), scale, interval)


def autoguidance(
    denoiser: Callable[..., Tensor],
    guide: Callable[..., Tensor],
    scale: float,
    interval: tuple[float, float] | None = None,
    *,
    class_labels: Tensor | None = None,
) -> Guided:
    """Autoguidance: away from a worse version of the same model.

    Args:
        denoiser: D(x, sigma), or D(x, sigma, class_labels) where labels are given.
        guide: a smaller or less trained denoiser of the same data, called alike.
        scale: w; 1 is `denoiser` alone.
        interval: noise levels (lo, hi] to guide in; all of them if None.
        class_labels: integers, shape (B,), given to both.

    Returns:
        D(x, sigma) for every sampler; two evaluations where it guides, one elsewhere.

    Raises:
        ValueError: if labels are not integers of shape (B,), `scale` is not finite or `interval` is empty.

    References:
        Karras, Aittala, Kynkäänniemi, Lehtinen, Aila, Laine, "Guiding a Diffusion Model with a Bad Version of Itself",
        NeurIPS 2024, section 3.
    """
    labels = None if class_labels is None else _checked_labels(class_labels)
    return Guided((denoiser, labels), (guide, labels), scale, interval)


def _checked_labels(class_labels: Tensor) -> Tensor:
    check_labels("class_labels", class_labels)
    return class_labels
