r"""Importance sampling of noise levels: more rows where the gradient is large, each with a smaller weight.

Let the levels be cut into K bins of equal probability, and let a row in bin k have a gradient of mean square $m_k$. Drawing
bin k with probability $p_k$ instead of 1/K, and multiplying the row's loss by $1 / (K p_k)$, leaves the expectation of the
gradient as it is. Its mean square becomes $\sum_k m_k / (K^2 p_k)$, which is smallest for $p_k \propto \sqrt{m_k}$.

The gradient of a row in the weights is that in the raw network's output F, times the network's Jacobian. The former costs
nothing: with the denoiser $D = c_{skip} x + c_{out} F$ and the row loss $\ell = w |D - target|^2 / d$ its square is
$4 w c_{out}^2 \ell / d$. It stands for $m_k$.

References:
    Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", ICML 2021, section 3.3: times drawn in proportion
    to the root of the mean square of the loss; Katharopoulos, Fleuret, "Not All Samples Are Created Equal: Deep Learning
    with Importance Sampling", ICML 2018, section 3.2: the gradient in the last layer's input for that in all weights.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stablefield._shapes import check_callable, check_kind, check_tensor, number, whole_number
from stablefield.diffusion._noise_levels import NoiseLevels
from stablefield.diffusion._process import Process

__all__ = ["ImportanceSampling"]

# Rows that each bin has to have before the density is trusted.
_LEAST_ROWS = 32


class ImportanceSampling(nn.Module):
    """A density of noise levels fitted to the gradient while training; the loss that is minimised stays the same.

    Give it to `Objective(importance=...)`, and after each step call `observe` with what the step gave. Its state is in its
    buffers: save it with `state_dict`. Until each bin has been seen in 32 rows, levels are drawn as without it.

    Args:
        noise_levels: the distribution whose expected loss is minimised.
        process: how data become noise.
        bins: parts of equal probability, each with a constant density.
        uniform: share of the rows that are drawn as without it, in expectation; no row has a weight above 1 / `uniform`.
        half_life: after so many rows, an observation counts half.
        scale: mean square of a row's gradient per unit of what is observed, as a function of the noise level, taken at the
            middle of each bin: w c_out^2 if row losses are observed. 1 if None.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if `bins` is below 1, `uniform` is not above 0 and at most 1, `half_life` is not positive, or `scale`
            returns anything but a finite number, 0 or more, for each noise level.
    """

    squares: Tensor
    rows: Tensor
    edges: Tensor
    scale: Tensor

    def __init__(
        self,
        noise_levels: NoiseLevels,
        process: Process,
        *,
        bins: int = 32,
        uniform: float = 0.2,
        half_life: float = 100_000,
        scale: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        check_kind("noise_levels", noise_levels, NoiseLevels, "a distribution of noise levels, such as LogNormal()")
        check_kind("process", process, Process, "a Process, such as EDM()")
        if not 0 < number("uniform", uniform) <= 1:
            raise ValueError(f"uniform is {uniform}: pass a share above 0, at most 1.")
        if not number("half_life", half_life) > 0:
            raise ValueError(f"half_life is {half_life}: pass a positive number of rows.")
        self.noise_levels, self.process = noise_levels, process
        self.bins, self.uniform, self.half_life = whole_number("bins", bins, 1), uniform, half_life
        if scale is not None:
            check_callable("scale", scale, "scale(noise_level), such as EDMWeighting()")
        # Middles of the bins and edges between them, in turn.
        shares = torch.arange(1, 2 * bins, dtype=torch.float64) / (2 * bins)
        levels = process.noise_level(noise_levels.quantile(shares, process)).float()
        middles = levels[::2]
        per_bin = torch.ones_like(middles) if scale is None else scale(middles)
        check_tensor("scale(noise_level)", per_bin, real=True)
        if per_bin.shape != middles.shape or not bool(((per_bin >= 0) & per_bin.isfinite()).all()):
            raise ValueError(
                f"scale(noise_level) is {per_bin}: return a finite number, 0 or more, for each of the {bins} noise levels."
            )
        self.register_buffer("edges", levels[1::2].contiguous(), persistent=False)
        self.register_buffer("scale", per_bin.float(), persistent=False)
        # Discounted sums over the rows observed so far.
        self.register_buffer("squares", torch.zeros(bins))
        self.register_buffer("rows", torch.zeros(bins))

    def density(self) -> Tensor:
        """The relative density of each bin, shape (bins,), with mean 1."""
        # Few operations: beside the step of a small network, each of them shows.
        root = (self.scale * self.squares / self.rows).sqrt()
        mean = root.mean()
        known = (self.rows.min() >= _LEAST_ROWS) & (mean > 0) & mean.isfinite()
        return torch.where(known, self.uniform + (1 - self.uniform) / mean * root, 1.0)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Move probabilities to where the density is.

        Args:
            u: uniform in (0, 1), shape (B,), such as stratified ones.

        Returns:
            Probabilities for `NoiseLevels.quantile`, and the weights of their rows, shape (B,) each.
        """
        check_tensor("u", u, real=True)
        share = self.density().to(u) / self.bins
        ends = share.cumsum(0)
        u = u * ends[-1]  # which rounding may leave below 1
        place = torch.searchsorted(ends, u, right=True).clamp(max=self.bins - 1)
        within = ((u - ends[place]) / share[place] + 1).clamp(0, 1)
        return (place + within) / self.bins, 1 / (self.bins * share[place])

    def sums(self, noise_level: Tensor, squares: Tensor) -> Tensor:
        """Sums of `squares` and numbers of rows by bin, shape (2, bins), float32.

        Args:
            noise_level: sigma / alpha of each row, shape (B,).
            squares: mean square of the row's gradient without its weight, on any scale, shape (B,); or its loss, with a
                `scale`.

        Raises:
            TypeError: if an argument is no tensor.
            ValueError: if their shapes differ.
        """
        check_tensor("noise_level", noise_level, real=True)
        check_tensor("squares", squares, real=True)
        if noise_level.ndim != 1 or squares.shape != noise_level.shape:
            raise ValueError(
                f"noise_level has shape {tuple(noise_level.shape)} and squares {tuple(squares.shape)}: pass a number per "
                "row, (B,), for each."
            )
        # A product, because sums in the order of a GPU's threads would differ from run to run.
        place = nn.functional.one_hot(torch.bucketize(noise_level.float(), self.edges), self.bins).float()
        return torch.stack([squares.float(), torch.ones_like(squares, dtype=torch.float32)]) @ place

    def observe(self, sums: Tensor) -> None:
        """Fit the density to a step: its `sums`, added up over parts and processes.

        Raises:
            TypeError: if they are no tensor.
            ValueError: if their shape is not (2, bins).
        """
        check_tensor("sums", sums, real=True)
        if sums.shape != (2, self.bins):
            raise ValueError(f"sums has shape {tuple(sums.shape)}: pass what `sums` returns, (2, {self.bins}).")
        keep = 0.5 ** (sums[1].sum() / self.half_life)
        self.squares.mul_(keep).add_(sums[0])
        self.rows.mul_(keep).add_(sums[1])
